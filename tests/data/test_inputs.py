"""Archives that are damaged, or written in ways of their own: no file is lost without a word."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from cifar_tl.data.inputs import UnreadableFile, open_inputs
from cifar_tl.errors import UserError

COMPRESSED = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def tar(count, size=2000):
    """Return a tar of files of random bytes, their number as names."""
    stream, draw = io.BytesIO(), random.Random(0)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:03}.png")
            info.size = size
            archive.addfile(info, io.BytesIO(draw.randbytes(size)))
    return stream.getvalue()


def read(path):
    """Return the contents of the files that can be read, and what is said of the others."""
    contents, errors = [], []
    with open_inputs(path) as inputs:
        for file in inputs.files:
            try:
                contents.append(file.read())
            except UnreadableFile as error:
                errors.append(str(error))
    return contents, errors


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_tar_that_is_cut_off_says_so_wherever_it_is_cut(tmp_path, ending):
    whole, draw = COMPRESSED[ending](tar(20)), random.Random(1)
    path = tmp_path / f"photos.tar{ending}"
    path.write_bytes(whole)
    assert [len(part) for part in read(path)] == [20, 0]
    # a tar without its end mark may end between two members: that is no damage that shows
    last = 20 * 2560 if ending == "" else len(whole)
    cuts = [cut for cut in (draw.randrange(600, last) for _ in range(60)) if ending or cut % 2560]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        try:
            contents, errors = read(path)
        except UserError:  # a bzip2 has blocks of 900 kB, and the first one is cut
            assert ending == ".bz2"
            continue
        if ending == "":
            assert len(contents) == (cut + 48) // 2560  # what is cut of the last one may be its padding
        assert [error.partition(":")[0] for error in errors] == ["the archive is broken from here on"], cut


def test_a_damaged_header_in_a_tar_ends_it_with_a_word(tmp_path):
    damaged = bytearray(tar(20))
    damaged[10 * 2560 + 100] ^= 1
    (tmp_path / "photos.tar").write_bytes(damaged)
    contents, errors = read(tmp_path / "photos.tar")
    assert len(contents) == 10
    assert errors == ["the archive is broken from here on: bad checksum"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_tar_that_is_compressed_in_pieces_is_read_to_its_end(tmp_path, ending):
    plain = tar(30)
    pieces = [COMPRESSED[ending](plain[start : start + 10_000]) for start in range(0, len(plain), 10_000)]
    (tmp_path / f"photos.tar{ending}").write_bytes(b"".join(pieces))
    assert [len(part) for part in read(tmp_path / f"photos.tar{ending}")] == [30, 0]


def test_the_checksum_of_a_gzip_counts(tmp_path):
    content = bytearray(gzip.compress(tar(3)))
    content[-6] ^= 1  # of the CRC
    (tmp_path / "photos.tgz").write_bytes(content)
    contents, errors = read(tmp_path / "photos.tgz")
    assert len(contents) == 3
    assert len(errors) == 1
    assert "CRC check failed" in errors[0]


def test_a_hard_link_in_a_tar_has_a_row(tmp_path):
    (tmp_path / "a.png").write_bytes(b"content")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.add(tmp_path / name, name)
    assert read(tmp_path / "photos.tar") == ([b"content"], ["hard link: its content is that of a.png in the archive"])


def test_a_zip_that_python_cannot_list_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("é.png", b"content")
    content = (tmp_path / "photos.zip").read_bytes()
    (tmp_path / "photos.zip").write_bytes(content.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(UserError, match="cannot be opened as an archive"):
        read(tmp_path / "photos.zip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_list_of_windows_names_its_files_once(tmp_path, encoding):
    for name in ("ä.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [tmp_path / "b.png", tmp_path / "ä.png", tmp_path / "b.png", tmp_path]
    (tmp_path / "list.txt").write_text("\r\n".join(map(str, lines)), encoding=encoding)
    contents, errors = read(Path(f"@{tmp_path / 'list.txt'}"))
    assert contents == [b"b.png", "ä.png".encode(), (tmp_path / "list.txt").read_bytes()]
    assert errors == []


def test_a_list_that_cannot_be_decoded_or_is_closed_is_named(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match=r"the list .*list.txt cannot be read: .*truncated"):
        read(Path(f"@{tmp_path / 'list.txt'}"))
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="the list - cannot be read: it is closed"):
        read(Path("@-"))


def test_a_broken_sparse_header_ends_a_tar_with_a_word(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("a.png", {}), ("b.png", {"GNU.sparse.map": "x,y", "GNU.sparse.size": "z"})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 4, headers
            archive.addfile(info, io.BytesIO(b"1234"))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    contents, errors = read(tmp_path / "a.tar")
    assert contents == [b"1234"]
    assert [error.partition(":")[0] for error in errors] == ["the archive is broken from here on"]
