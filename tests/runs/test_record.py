"""What a run's record says of the code."""

import subprocess

from cifar_tl.runs import record


def test_the_commit_and_changes_that_may_change_a_run_are_recorded(tmp_path, monkeypatch):
    def git(*args):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@n", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(record, "__file__", str(tmp_path / "cifar_tl" / "runs" / "record.py"))
    assert record.git_state() == {"git_commit": None, "git_dirty": None}
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").touch()
    for args in (["init"], ["add", "."], ["commit", "-m", "x"]):
        git(*args)
    (tmp_path / "notes").touch()  # outside of conf and cifar_tl
    assert record.git_state() == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    (tmp_path / "conf" / "b.yaml").touch()
    assert record.git_state()["git_dirty"]
    (tmp_path / "conf" / "b.yaml").unlink()
    (tmp_path / "conf" / "a.yaml").write_text("x: 1")
    assert record.git_state()["git_dirty"]
