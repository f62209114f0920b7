"""Fetching CIFAR-10, with an archive of a few kilobytes and a web server on this machine."""

import errno
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import make_run

from cifar_tl.data import __main__ as command_line
from cifar_tl.data import download
from cifar_tl.errors import UserError


def content(name: str) -> bytes:
    """Bytes that compress badly, so that the archive has a few kilobytes."""
    return b"".join(hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(20))


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive with the real names; the constants are set to it. It also holds files nobody asked for."""
    files = {f"{download.FOLDER}/{name}": content(name) for name in download.FILES}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in {**files, f"{download.FOLDER}/readme.html": b"hello", "../outside": b"evil"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = buffer.getvalue()
    monkeypatch.setattr(download, "ARCHIVE_SIZE", len(packed))
    monkeypatch.setattr(download, "ARCHIVE_MD5", hashlib.md5(packed).hexdigest())
    spec = {name: (len(content(name)), hashlib.md5(content(name)).hexdigest()) for name in download.FILES}
    monkeypatch.setattr(download, "FILES", spec)
    return packed


@dataclass
class Server:
    """A web server that misbehaves by path, and what it was asked for."""

    address: str
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range header)

    def url(self, behaviour: str) -> str:
        return f"{self.address}/{behaviour}"


@pytest.fixture
def server(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "TIMEOUT_S", 5.0)
    monkeypatch.setattr(download, "CHUNK", 200)  # however much of a slow answer is there when the first read comes
    monkeypatch.setenv("no_proxy", "*")
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behaviour, wanted = self.path.strip("/"), self.headers.get("Range")
            running.asked.append((behaviour, wanted))
            body = bytes(len(archive)) if behaviour == "wrong" else archive
            start = 0
            if behaviour == "gone":
                self.send_error(503)
                return
            if behaviour == "login_page":
                body = b"<html>please log in</html>"
            if behaviour == "refuses_range" and wanted:
                self.send_error(416)
                return
            if wanted and behaviour not in ("ignores_range", "login_page"):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                place = 0 if behaviour == "other_range" else start
                self.send_header("Content-Range", f"bytes {place}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            half = (start + len(body)) // 2
            if behaviour == "stalls":
                self.wfile.write(body[start:half])
                self.wfile.flush()
                released.wait(60)
            elif behaviour == "breaks":
                self.wfile.write(body[start:half])
            elif behaviour == "crawls":
                for position in range(start, len(body), 200):
                    self.wfile.write(body[position : position + 200])
                    time.sleep(0.02)
            else:
                self.wfile.write(body[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up on this mirror, which some tests are about
                super().handle()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    released.set()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def assert_complete(root: Path) -> None:
    found = {path.name: path.read_bytes() for path in (root / download.FOLDER).iterdir()}
    assert found == {name: content(name) for name in download.FILES}


@pytest.fixture
def complete(tmp_path: Path, archive: bytes) -> Path:
    (tmp_path / download.ARCHIVE).write_bytes(archive)
    download.ensure(tmp_path, download=False)
    (tmp_path / download.ARCHIVE).unlink()
    return tmp_path


# What is on the disk.


@pytest.mark.usefixtures("no_network")
def test_complete_folder_needs_neither_archive_nor_network(complete: Path) -> None:
    download.ensure(complete, download=True)
    assert all(file.state == "ok" for file in download.verify(complete))


@pytest.mark.usefixtures("no_network")
def test_archive_copied_by_hand_is_extracted_and_only_the_known_names(tmp_path: Path, archive: bytes) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / download.ARCHIVE).write_bytes(archive)
    download.ensure(root, download=False)
    assert_complete(root)
    assert not (tmp_path / "outside").exists()
    assert (root / download.ARCHIVE).read_bytes() == archive


@pytest.mark.usefixtures("no_network", "archive")
def test_missing_data_without_download_says_where_to_put_it_and_every_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        download.ensure(tmp_path / "my data", download=False)
    message = str(caught.value)
    assert str(tmp_path / "my data" / download.FOLDER) in message
    assert f"copy {download.ARCHIVE}" in message
    assert f"python -m cifar_tl.data fetch --root '{tmp_path}/my data'" in message
    assert "experiment=demo" in message
    assert "data_batch_1" not in message  # the folder says it, rather than seven files
    assert not (tmp_path / "my data").exists()


@pytest.mark.usefixtures("no_network")
def test_one_missing_file_is_named_alone(complete: Path) -> None:
    (complete / download.FOLDER / "test_batch").unlink()
    with pytest.raises(UserError, match="test_batch is missing") as caught:
        download.ensure(complete, download=False)
    assert "data_batch_1" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("archive_is_there", [False, True])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "is truncated: expected 640 bytes, found 639"),
        (lambda data: data + b"x", "is altered: expected 640 bytes, found 641"),
        (lambda data: b"x" + data[1:], "is altered: expected MD5 {right}, found {wrong}"),
    ],
    ids=["truncated", "longer", "altered"],
)
def test_damaged_file_is_reported_with_both_values_and_left_alone(
    complete: Path, archive: bytes, damage: Callable[[bytes], bytes], says: str, archive_is_there: bool
) -> None:
    if archive_is_there:
        (complete / download.ARCHIVE).write_bytes(archive)
    path = complete / download.FOLDER / "data_batch_3"
    right, wrong = content("data_batch_3"), damage(content("data_batch_3"))
    path.write_bytes(wrong)
    says = says.format(right=hashlib.md5(right).hexdigest(), wrong=hashlib.md5(wrong).hexdigest())
    with pytest.raises(UserError) as caught:
        download.ensure(complete, download=True)
    assert f"{path} {says}" in str(caught.value)
    assert "Delete" in str(caught.value)
    assert path.read_bytes() == wrong


@pytest.mark.usefixtures("no_network")
def test_after_deleting_the_damaged_file_the_archive_brings_it_back(complete: Path, archive: bytes) -> None:
    (complete / download.ARCHIVE).write_bytes(archive)
    (complete / download.FOLDER / "data_batch_3").unlink()
    kept = (complete / download.FOLDER / "data_batch_1").stat().st_mtime_ns
    download.ensure(complete, download=False)
    assert_complete(complete)
    assert (complete / download.FOLDER / "data_batch_1").stat().st_mtime_ns == kept


@pytest.mark.usefixtures("no_network")
def test_truncated_archive_is_refused_and_left_alone(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / download.ARCHIVE).write_bytes(archive[:-5])
    with pytest.raises(UserError, match=rf"{download.ARCHIVE} is truncated: expected {len(archive)} bytes"):
        download.ensure(tmp_path, download=True)
    assert (tmp_path / download.ARCHIVE).read_bytes() == archive[:-5]
    assert not (tmp_path / download.FOLDER).exists()


def test_extraction_cut_short_leaves_no_file_that_looks_whole(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / download.ARCHIVE).write_bytes(archive)

    def cut_short(source: io.BufferedIOBase, target: io.BufferedIOBase) -> None:
        target.write(source.read(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", cut_short)
        with pytest.raises(KeyboardInterrupt):
            download.ensure(tmp_path, download=False)
    assert not set(download.FILES) & {path.name for path in (tmp_path / download.FOLDER).iterdir()}
    download.ensure(tmp_path, download=False)
    assert_complete(tmp_path)


def test_read_only_root_is_explained(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / download.ARCHIVE).write_bytes(archive)

    def read_only(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", read_only)
    with pytest.raises(UserError, match=r"cannot be written under .*Read-only file system"):
        download.ensure(tmp_path, download=False)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / download.ARCHIVE).write_bytes(archive)
    said = r"cannot be read:\n.*: Not a directory(?s:.*)\ndata\.root= is to be the folder that holds"
    with pytest.raises(UserError, match=said) as caught:
        download.ensure(tmp_path / download.ARCHIVE, download=True)
    assert "Delete" not in str(caught.value)


def test_read_checked_refuses_bytes_without_the_md5(complete: Path) -> None:
    assert download.read_checked(complete, "test_batch") == content("test_batch")
    (complete / download.FOLDER / "test_batch").write_bytes(bytes(640))
    with pytest.raises(UserError, match="test_batch is altered"):
        download.read_checked(complete, "test_batch")


# The network.


def test_download_extracts_and_keeps_the_archive(tmp_path: Path, archive: bytes, server: Server) -> None:
    root = tmp_path / "new" / "data"
    download.ensure(root, download=True, urls=[server.url("serves")])
    assert_complete(root)
    assert (root / download.ARCHIVE).read_bytes() == archive
    assert not download.partial(root).exists()


@pytest.mark.parametrize("bad", ["gone", "wrong", "login_page"])
def test_bad_mirror_is_left_for_the_next_one_which_starts_at_zero(tmp_path: Path, server: Server, bad: str) -> None:
    download.ensure(tmp_path, download=True, urls=[server.url(bad), server.url("serves")])
    assert_complete(tmp_path)
    assert server.asked == [(bad, None), ("serves", None)]


@pytest.mark.parametrize(("bad", "says"), [("stalls", "timed out"), ("breaks", "connection closed")])
def test_the_next_mirror_goes_on_where_a_broken_one_stopped(
    tmp_path: Path,
    archive: bytes,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
    says: str,
) -> None:
    if bad == "stalls":
        monkeypatch.setattr(download, "TIMEOUT_S", 3.0)
    download.ensure(tmp_path, download=True, urls=[server.url(bad), server.url("serves")])
    assert_complete(tmp_path)
    assert says in caplog.text
    assert server.asked == [(bad, None), ("serves", f"bytes={len(archive) // 2}-")]


def test_slow_mirror_is_left_for_a_faster_one(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SPEED_WINDOW_S", 0.0)
    monkeypatch.setattr(download, "MIN_SPEED", float("inf"))  # for which everything is slow
    download.ensure(tmp_path, download=True, urls=[server.url("crawls"), server.url("serves")])
    assert_complete(tmp_path)
    assert [behaviour for behaviour, _ in server.asked[:2]] == ["crawls", "serves"]
    assert server.asked[1][1] is not None  # it went on with what the slow one had sent


@pytest.mark.parametrize(("bytes_per_s", "slow"), [(100_000, True), (300_000, False)])
def test_slow_is_what_delivers_less_than_the_least_speed(
    monkeypatch: pytest.MonkeyPatch, bytes_per_s: int, slow: bool
) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(download, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    answer = SimpleNamespace(read1=lambda size: bytes(bytes_per_s))
    got = download._blocks(answer, download.ARCHIVE_SIZE - 40 * bytes_per_s, download.MIN_SPEED)  # type: ignore[arg-type]
    if slow:
        with pytest.raises(download._MirrorError, match="only 100 kB/s"):
            list(got)
    else:
        assert len(list(got)) == 40


def test_where_everything_is_slow_the_download_still_ends(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SPEED_WINDOW_S", 0.0)
    monkeypatch.setattr(download, "MIN_SPEED", float("inf"))
    download.ensure(tmp_path, download=True, urls=[server.url("crawls")])
    assert_complete(tmp_path)
    assert len(server.asked) == 2


@pytest.mark.parametrize("behaviour", ["serves", "ignores_range", "refuses_range"])
@pytest.mark.parametrize("old", ["right", "wrong", "too_long", "whole_but_wrong"])
def test_partial_file_of_an_earlier_run_ends_in_the_right_archive(
    tmp_path: Path, archive: bytes, server: Server, behaviour: str, old: str
) -> None:
    before = {"right": archive[:99], "wrong": bytes(99), "too_long": archive + b"x", "whole_but_wrong": bytes(9999)}
    download.partial(tmp_path).write_bytes(before[old] if old != "whole_but_wrong" else bytes(len(archive)))
    download.ensure(tmp_path, download=True, urls=[server.url(behaviour)])
    assert_complete(tmp_path)
    assert (server.asked[0][1] == "bytes=99-") == (old in ("right", "wrong"))
    if old == "right" and behaviour == "serves":
        assert len(server.asked) == 1


def test_a_range_other_than_the_one_asked_for_is_not_appended(tmp_path: Path, archive: bytes, server: Server) -> None:
    download.partial(tmp_path).write_bytes(archive[:99])
    download.ensure(tmp_path, download=True, urls=[server.url("other_range"), server.url("serves")])
    assert_complete(tmp_path)
    assert server.asked == [("other_range", "bytes=99-"), ("serves", "bytes=99-")]


def test_when_no_mirror_delivers_the_error_lists_them_and_the_ways_out(tmp_path: Path, server: Server) -> None:
    nobody = "http://127.0.0.1:9/nobody"
    with pytest.raises(UserError) as caught:
        download.ensure(tmp_path, download=True, urls=[nobody, server.url("gone"), server.url("breaks")])
    message = str(caught.value)
    assert all(text in message for text in (nobody, "Connection refused", "503", "connection closed at byte"))
    assert f"{download.partial(tmp_path)} keeps what was received" in message
    assert "python -m cifar_tl.data fetch" in message
    assert "experiment=demo" in message


def test_two_downloads_at_once_fetch_the_archive_once(tmp_path: Path, server: Server) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            download.ensure(tmp_path, download=True, urls=[server.url("crawls")])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_complete(tmp_path)
    assert len(server.asked) == 1


@pytest.mark.usefixtures("archive", "no_network")
def test_too_little_disk_space_is_found_before_downloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"No space|are free.* It takes .* MB"):
        download.ensure(tmp_path, download=True, urls=["http://127.0.0.1:9/"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux's")
def test_disk_that_fills_up_is_not_blamed_on_the_mirror(tmp_path: Path, server: Server) -> None:
    download.partial(tmp_path).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device.* It takes .* MB"):
        download.ensure(tmp_path, download=True, urls=[server.url("serves"), server.url("gone")])
    assert [behaviour for behaviour, _ in server.asked] == ["serves"]


def test_without_a_terminal_progress_is_logged_at_most_every_tenth(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    download.ensure(tmp_path, download=True, urls=[server.url("crawls")])
    lines = [record.getMessage() for record in caplog.records if " % of " in record.getMessage()]
    assert 5 <= len(lines) <= 10
    assert lines[-1].startswith("100 %")


# The commands.


def test_verify_prints_one_line_per_file_and_fails_on_a_wrong_one(
    complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["verify", "--root", str(complete)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(download.FILES)
    (complete / download.FOLDER / "data_batch_2").write_bytes(b"")
    assert command_line.main(["verify", "--root", str(complete)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "truncated" in line] == [lines[1]]


def test_fetch_command_fails_without_a_traceback(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "MIRRORS", (server.url("gone"),))
    assert command_line.main(["fetch", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: CIFAR-10 could not be downloaded")


def test_interrupted_fetch_keeps_the_partial_file_and_the_next_one_resumes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def interrupting(done: int) -> Iterator[Callable[[int], None]]:
        def press_ctrl_c(received: int) -> None:
            if received > 1000:
                raise KeyboardInterrupt

        yield press_ctrl_c

    monkeypatch.setattr(download, "MIRRORS", (server.url("crawls"),))
    with monkeypatch.context() as patch:
        patch.setattr(download, "_progress", interrupting)
        assert command_line.main(["fetch", "--root", str(tmp_path)]) == 130
    assert f"{download.partial(tmp_path)} is kept" in capsys.readouterr().err
    size = download.partial(tmp_path).stat().st_size
    assert size > 1000
    assert command_line.main(["fetch", "--root", str(tmp_path)]) == 0
    assert_complete(tmp_path)
    assert server.asked[-1] == ("crawls", f"bytes={size}-")


@pytest.mark.parametrize("name", [download.FOLDER, "elsewhere"])
def test_a_root_one_level_too_deep_is_said_to_be(tmp_path: Path, archive: bytes, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in download.FILES:
        (folder / file).write_bytes(content(file))
    deep = rf"{folder} is one level too deep: the data set's folder is the one above, {tmp_path}\."
    with pytest.raises(UserError, match=deep if name == download.FOLDER else "incomplete"):
        download.ensure(folder, download=False)
    if name == download.FOLDER:
        with pytest.raises(UserError, match=deep):
            download.verify(folder)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["cifar_tl.data", "cifar_tl.reports"])
def test_a_reader_that_has_seen_enough_of_a_list_gets_no_traceback(tmp_path: Path, module: str) -> None:
    make_run(tmp_path / "run")
    given = ["verify"] if module == "cifar_tl.data" else [str(tmp_path / "run")]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", module, *given]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert done.stderr == ""
    assert module == "cifar_tl.data" or (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_commands_do_not_import_torch() -> None:
    script = "import sys, cifar_tl.data.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
