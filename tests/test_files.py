"""Files are written in one step, and what cannot be written is named."""

import errno
from pathlib import Path

import pytest

from cifar_tl.errors import UserError
from cifar_tl.files import check_writable, remove_partial_files, replacing, write_text


def test_a_file_that_the_disk_has_no_room_for_is_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")  # as write() has it: without a name

    with pytest.raises(OSError, match=r"a\.json") as full:
        write()
    assert full.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_what_a_killed_process_leaves_is_deleted_and_nothing_else(tmp_path):
    with replacing(tmp_path / "last.ckpt") as partial:
        partial.write_text("new")
        left = partial.name
    (tmp_path / left).write_text("half")
    (tmp_path / ".lock").touch()
    remove_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "last.ckpt"]


def test_a_link_is_written_through_and_a_device_is_not_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    with pytest.raises(UserError, match="output=/dev/null cannot be written: is a folder or a device"):
        check_writable(Path("/dev/null"))
