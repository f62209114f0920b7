"""Prediction: what each kind of file becomes in the table, hostile ones by name."""

import codecs
import csv
import gc
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from cifar_tl import cli
from cifar_tl.checkpoints import load_trained
from cifar_tl.data import inputs
from cifar_tl.errors import UserError
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.predict import attempts, main, predict


def picture(size=(48, 40), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_claiming(width, height):
    """A PNG of a few bytes whose header announces so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


PNG = encoded(picture(), "PNG")
JPEG = encoded(picture(), "JPEG")
RESIZED = "resized from 48x40"
EXIF_ON_ITS_SIDE = Image.Exif()
EXIF_ON_ITS_SIDE[0x0112] = 6

GOOD = {
    # file: (content, note)
    "32x32.png": (encoded(picture((32, 32)), "PNG"), ""),
    "48x40.png": (PNG, RESIZED),
    "a PNG.txt": (PNG, RESIZED),
    "a PNG.jpg": (PNG, RESIZED),
    "no ending": (PNG, RESIZED),
    "alpha.png": (encoded(picture(mode="RGBA"), "PNG"), f"transparency over white; {RESIZED}"),
    "animated.gif": (
        encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
        f"first frame of several; {RESIZED}",
    ),
    "cmyk.jpg": (encoded(picture(mode="CMYK"), "JPEG"), f"CMYK converted without its colour profile; {RESIZED}"),
    "exif.jpg": (encoded(picture(), "JPEG", exif=EXIF_ON_ITS_SIDE), f"turned as its EXIF says; {RESIZED}"),
    "grey.png": (encoded(picture(mode="L"), "PNG"), RESIZED),
    "grey16.png": (
        encoded(Image.fromarray(np.full((40, 48), 128 * 256, np.uint16)), "PNG"),
        f"16-bit grey scaled to 8 bits; {RESIZED}",
    ),
    "palette.png": (encoded(picture().convert("P"), "PNG"), RESIZED),
    "one pixel.png": (encoded(picture((1, 1)), "PNG"), "resized from 1x1"),
    "new\nline.png": (PNG, RESIZED),
}
BAD = {
    # file: (content, part of the error)
    "bomb.png": (png_claiming(60_000, 60_000), "too large: as its header has it, more than 89,478,485 pixels"),
    "small bomb.png": (png_claiming(10_000, 10_000), "too large: 10000x10000, more than 89,478,485 pixels"),
    "truncated.png": (PNG[: len(PNG) // 2], "broken image: image file is truncated"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "broken image: image file is truncated"),
    "zero.png": (b"", "empty: 0 bytes"),
    "text.png": (b"just text", "no image: its content is none of PNG, JPEG"),
    "text.txt": (b"just text", "no image: its content is none of PNG, JPEG"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    "float.tiff": (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "floating-point pixels"),
}
LINKS = {
    "loop.png": ("loop.png", "cannot be read: Too many levels of symbolic links"),
    "dangling.png": ("nowhere", "cannot be read: No such file or directory"),
}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in (GOOD | BAD).items():
        (folder / name).write_bytes(content)
    for name, (target, _) in LINKS.items():
        (folder / name).symlink_to(target)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(PNG)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder loop").symlink_to(".")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.png").write_bytes(PNG)
    (folder / ".hidden.png").write_bytes(PNG)
    (folder / "desktop.ini").write_text("[.ShellClassInfo]")
    return folder


@pytest.fixture(scope="session")
def run(compose, tiny_checkpoint, tmp_path_factory):
    """Predict an input; return the rows of the CSV file."""

    def run(source, *overrides):
        folder = tmp_path_factory.mktemp("predict")
        common = (f"checkpoint='{tiny_checkpoint}'", f"input='{source}'", "trainer.accelerator=cpu", "threads=2")
        output = predict(compose(*common, *overrides, config_name="predict"), folder)
        with output.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture(scope="session")
def rows(hostile, run):
    return {row["path"].removeprefix(f"{hostile}/"): row for row in run(hostile, "batch_size=4")}


def test_a_model_that_has_diverged_predicts_nothing(compose, hostile, tiny_checkpoint, tmp_path):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["state_dict"]["head.0.weight"] *= float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    keys = (f"checkpoint='{tmp_path / 'nan.ckpt'}'", f"input='{hostile}/sub'", "trainer.accelerator=cpu", "format=json")
    with pytest.raises(UserError, match="says why for each file"):
        predict(compose(*keys, config_name="predict"), tmp_path)
    (row,) = json.loads((tmp_path / "predictions.json").read_text())
    assert row["error"] == "the model's logits are not finite numbers: its training has diverged"
    assert row["class_1"] is None


@pytest.mark.parametrize("name", GOOD)
def test_an_image_of_any_kind_is_predicted_and_what_was_done_is_noted(rows, name):
    row = rows[name]
    assert row["error"] == ""
    assert row["note"] == GOOD[name][1]
    assert row["class_1"].endswith(" degrees")


@pytest.mark.parametrize("name", [*BAD, *LINKS])
def test_a_file_that_is_no_readable_image_gets_a_row_with_the_reason(rows, name):
    row = rows[name]
    assert (BAD | LINKS)[name][1] in row["error"]
    assert row["class_1"] == row["probability_1"] == ""


def test_what_is_hidden_or_of_the_system_or_no_regular_file_is_skipped_and_counted(command, hostile):
    code, out, _ = command(f"input='{hostile}'")
    assert code == 0
    assert (
        "skipped     4 entries: hidden 1, link to a folder met before 1, no regular file 1, of the system 1\n"
    ) in out


def test_a_named_pipe_that_is_the_input_does_not_block(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="no file could be predicted"):
        run(tmp_path / "pipe.png")


def test_a_linked_folder_is_read(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(PNG)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "link").symlink_to(tmp_path / "elsewhere")
    (row,) = run(tmp_path / "input")
    assert (row["path"], row["error"]) == (f"{tmp_path}/input/link/1.png", "")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_an_unreadable_file_gets_a_row(run, tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "memory.png").symlink_to("/proc/self/mem")  # reading its first byte fails, for root, too
    assert run(tmp_path)[1]["error"] == "cannot be read: Input/output error"


def test_a_name_that_is_not_utf8_is_written_escaped(rows):
    assert rows["caf\\xe9.png"]["error"] == ""


def test_every_file_has_a_row_in_sorted_order_hidden_ones_none(hostile, run, rows):
    found = list(rows)
    assert len(found) == len(GOOD) + len(BAD) + len(LINKS) + 2
    assert "sub/deep.png" in found
    without = {".hidden.png", "desktop.ini", "folder loop", "pipe.png", "sub"}
    names = sorted({path.name for path in hostile.iterdir()} - without)
    assert [name.replace("\udce9", "\\xe9") for name in names] == [name for name in found if "/" not in name]
    assert [*run(hostile, "batch_size=4", "threads=7")] == [*rows.values()]


def test_probabilities_are_the_softmax_of_the_checkpoints_logits(run, tiny_checkpoint, tmp_path):
    picture((32, 32)).save(tmp_path / "image.png")
    (row,) = run(tmp_path / "image.png", "top_k=10")
    trained = load_trained(tiny_checkpoint)
    mean, std = (torch.tensor(trained.facts["normalization"][key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.from_numpy(np.asarray(picture((32, 32))).copy()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        expected = trained.module(((pixels - mean) / std)[None]).softmax(dim=1)[0]
    order = expected.argsort(descending=True).tolist()
    assert [row[f"class_{rank}"] for rank in range(1, 11)] == [trained.classes[i] for i in order]
    got = [float(row[f"probability_{rank}"]) for rank in range(1, 11)]
    assert got == pytest.approx(expected[order].tolist(), abs=2e-6)
    assert sum(got) == pytest.approx(1, abs=1e-5)


def test_a_full_gpu_gets_advice(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    picture().save(tmp_path / "image.png")
    monkeypatch.setattr("cifar_tl.predict.predict_batch", full)
    with pytest.raises(UserError, match=r"out of memory\. Lower batch_size=3\."):
        run(tmp_path / "image.png", "batch_size=3")


def test_resizing_is_antialiased(tmp_path):
    from cifar_tl.data.decode import decode

    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255  # picking single pixels would give black or white
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert abs(decode(tmp_path / "stripes.png").pixels[:, 4:-4, 4:-4].astype(int) - 127).max() <= 8


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    from cifar_tl.data.decode import decode

    (tmp_path / "grey.png").write_bytes(GOOD["grey16.png"][0])
    assert np.unique(decode(tmp_path / "grey.png").pixels).tolist() == [128]


def test_csv_json_and_parquet_say_the_same(hostile, run, compose, tiny_checkpoint, tmp_path):
    from pyarrow import parquet

    def table(*overrides):
        common = (f"checkpoint='{tiny_checkpoint}'", f"input='{hostile}'", "trainer.accelerator=cpu")
        return predict(compose(*common, *overrides, config_name="predict"), tmp_path)

    records = json.loads(table(f"output='{tmp_path}/new folder/table.json'").read_text())
    assert records == parquet.read_table(table("format=parquet")).to_pylist()
    assert records[0].keys() == {"path", "note", "error"} | {
        f"{n}_{r}" for n in ("class", "probability") for r in (1, 2, 3)
    }
    texts = [{key: "" if value is None else str(value) for key, value in record.items()} for record in records]
    assert texts == run(hostile)


def test_six_views_and_a_temperature_are_those_of_the_evaluation(compose, tiny_checkpoint, tmp_path):
    picture((32, 32), seed=5).save(tmp_path / "a.png")
    keys = (f"checkpoint='{tiny_checkpoint}'", f"input='{tmp_path}/a.png'", "trainer.accelerator=cpu", "format=json")

    def probabilities(*overrides):
        (row,) = json.loads(predict(compose(*keys, "top_k=2", *overrides, config_name="predict"), tmp_path).read_text())
        return [row["probability_1"], row["probability_2"]]

    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None]
    padded = pad(image.float(), (1, 1, 1, 1), "reflect").to(torch.uint8)
    shifts = {(1, 1): 0.25, (0, 0): 0.125, (2, 2): 0.125}
    views = {padded[..., y : y + 32, x : x + 32]: weight for (y, x), weight in shifts.items()}
    with torch.no_grad():
        network = load_trained(tiny_checkpoint).classifier()
        single = network(image)
        six = sum(w * (network(view) + network(view.flip(-1))) for view, w in views.items())
    for overrides, logits in (
        ([], single),
        (["tta=true"], six),
        (["temperature=0.5"], single / 0.5),
        (["tta=true", "temperature=2"], six / 2),
    ):
        assert probabilities(*overrides) == pytest.approx(logits.softmax(dim=1)[0].topk(2).values.tolist(), abs=2e-6)
    assert probabilities("tta=true") != probabilities()


@pytest.mark.parametrize("key", ["temperature=0", "temperature=-1", "tta=maybe"])
def test_what_changes_probabilities_is_checked(compose, tiny_checkpoint, tmp_path, key):
    picture().save(tmp_path / "a.png")
    keys = (f"checkpoint='{tiny_checkpoint}'", f"input='{tmp_path}'", "trainer.accelerator=cpu", key)
    with pytest.raises(UserError, match=f"{key} is not allowed"):
        predict(compose(*keys, config_name="predict"), tmp_path)


def test_parquet_without_pyarrow_is_refused_before_the_work(compose, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_tl.predict.find_spec", lambda name: None)
    cfg = compose("checkpoint=nowhere.ckpt", "input=nowhere", "format=parquet", config_name="predict")
    with pytest.raises(UserError, match="`pip install pyarrow`"):
        predict(cfg, tmp_path)


def members(archive, names):
    """Write files into an open archive."""
    for name in names:
        content = (GOOD | BAD)[name][0]
        if isinstance(archive, zipfile.ZipFile):
            archive.writestr(f"folder/{name}", content)
        else:
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


UNSORTED = ["text.txt", "grey.png", "truncated.png", "48x40.png", "zero.png", "alpha.png"]


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_an_archive_gives_what_its_files_give_sorted_by_path(run, rows, tmp_path, ending):
    path = tmp_path / f"photos{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            members(archive, UNSORTED)
    else:
        with tarfile.open(path, f"w:{ending.rpartition('.')[2].replace('tgz', 'gz').replace('tar', '')}") as archive:
            members(archive, UNSORTED)
    got = run(path)
    assert [row.pop("path") for row in got] == [f"{path}/folder/{name}" for name in sorted(UNSORTED)]
    values = [{key: value for key, value in rows[name].items() if key != "path"} for name in sorted(UNSORTED)]
    for row, expected in zip(got, values, strict=True):  # other batches: the last digit may differ
        assert float(row.pop("probability_1") or 0) == pytest.approx(float(expected["probability_1"] or 0), abs=1e-5)
        assert (row["class_1"], row["note"], row["error"]) == (expected["class_1"], expected["note"], expected["error"])
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was extracted


@pytest.mark.parametrize("source", ["@list.txt", "@-"])
@pytest.mark.parametrize(("mark", "separator"), [(b"", b"\n"), (codecs.BOM_UTF8, b"\r\n"), (b"", b"\0")])
def test_a_list_of_paths_from_a_file_or_from_standard_input(command, tmp_path, monkeypatch, source, mark, separator):
    (tmp_path / "text" / "my photo (1).png").write_bytes(PNG)
    paths = (b"image.png", b"text", b"nowhere.png")
    (tmp_path / "list.txt").write_bytes(mark + separator.join(paths) + separator)
    with (tmp_path / "list.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert command(f"input={source}", "output=table.csv")[0] == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        errors = {row["path"]: row["error"] for row in csv.DictReader(file)}
    assert list(errors) == ["image.png", "nowhere.png", "text/my photo (1).png", "text/readme.txt"]
    assert errors["image.png"] == errors["text/my photo (1).png"] == ""
    assert errors["nowhere.png"] == "cannot be read: No such file or directory"


def test_a_zip_from_windows_and_one_from_macos(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, content in (
            *(("folder\\", b""), ("folder\\1.png", PNG), ("folder\\.hidden.png", PNG), ("folder\\Thumbs.db", b"")),
            *(("__MACOSX/folder/._1.png", b"\0\5\x16\7"), ("__MACOSX/folder/1.png", b"\0\5\x16\7")),
        ):
            archive.writestr(name, content)
    (row,) = run(tmp_path / "photos.zip")
    assert (row["path"], row["error"]) == (f"{tmp_path}/photos.zip/folder/1.png", "")


def test_names_that_would_leave_a_folder_leave_nothing(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../../evil.png", PNG)
        archive.writestr("/absolute.png", PNG)
    assert [row["error"] for row in run(tmp_path / "slip.zip")] == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["slip.zip"]


def test_limits_of_an_archive_are_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(inputs, "MAX_ARCHIVE_BYTES", 150_000)
    contents = {"1.png": PNG, "2 large.png": bytes(100_000), "3.png": PNG, "4 beyond.png": bytes(60_000), "5.png": PNG}
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    errors = [row["error"] for row in run(tmp_path / "bomb.zip")]
    assert [e[:9] for e in errors] == ["", "too large", "", "not read:", "not read:"]
    errors = [row["error"] for row in run(tmp_path / "bomb.tar.gz")]
    assert [e[:9] for e in errors] == ["", "too large", "", "not read:"]
    assert errors[-1].endswith("nor is what follows")


def test_a_tar_header_of_gigabytes_is_not_read_into_memory(run, tmp_path):
    good, bomb = tarfile.TarInfo("good.png"), tarfile.TarInfo("long name")
    good.size, bomb.size, bomb.type = len(PNG), 5 * 10**9, tarfile.GNUTYPE_LONGNAME
    padding = bytes(-len(PNG) % 512)
    (tmp_path / "bomb.tar").write_bytes(good.tobuf() + PNG + padding + bomb.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    rows = run(tmp_path / "bomb.tar")
    assert [bool(row["error"]) for row in rows] == [True, False]
    assert "broken from here on: a header of 5,000,000,000 bytes" in rows[0]["error"]


def test_a_truncated_archive_gives_what_it_has(run, tmp_path):
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        members(archive, ["48x40.png", "grey.png", "alpha.png"])
    content = (tmp_path / "photos.tar.gz").read_bytes()
    (tmp_path / "photos.tar.gz").write_bytes(content[: len(content) * 2 // 3])
    errors = {row["path"].rpartition("/")[2]: row["error"] for row in run(tmp_path / "photos.tar.gz")}
    assert errors["48x40.png"] == ""
    assert "the archive is broken from here on" in errors["photos.tar.gz"]


def test_a_broken_member_and_an_encrypted_one_get_a_row(run, tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        members(archive, ["48x40.png", "alpha.png", "grey.png"])
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 50] ^= 255  # the first member's checksum is wrong now
    flags = content.rindex(b"PK\x01\x02") + 8  # the last member's, in the directory
    content[flags] |= 1
    flags = content.rindex(b"PK\x03\x04") + 6
    content[flags] |= 1
    path.write_bytes(content)
    broken, good, encrypted = run(path)
    assert "broken in the archive: Bad CRC-32" in broken["error"]
    assert good["error"] == ""
    assert "encrypted" in encrypted["error"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, tiny_checkpoint):
    """Run the command in an empty folder; return its exit code, output and error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("text")
    (tmp_path / "image.png").write_bytes(PNG)
    (tmp_path / "broken.zip").write_bytes(b"PK no")
    (tmp_path / "broken.tar.gz").write_bytes(b"no tar")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    tarfile.open(tmp_path / "empty.tar", "w").close()

    def command(*arguments):
        code = cli.run(main, "predict", [f"checkpoint='{tiny_checkpoint}'", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["input=nowhere"], "input=nowhere: no such file or folder"),
        (["input=2024"], "input=2024: no such file or folder"),
        (["input=2024_05"], "input=2024_05: no such file or folder"),
        (["input=[a,b]"], "input=['a', 'b'] is not allowed: give one path."),
        (["input=null"], "input=null is not allowed: give one path."),
        (["input=~/nowhere"], f"input={Path.home()}/nowhere: no such file or folder"),
        (["input=@nowhere"], "input=@nowhere: the list nowhere cannot be read: No such file or directory"),
        (["input=image.png", "checkpoint=5"], "checkpoint 5: no such file"),
        (["input=image.png", "output=7"], "output=7 does not end in .csv, .json, .parquet"),
        (["input=image.png", "checkpoint=text"], "checkpoint text: there is no best.ckpt in this folder"),
        (["input=empty"], "input=empty has no images"),
        (["input=empty.zip"], "input=empty.zip has no images"),
        (["input=empty.tar"], "input=empty.tar has no images"),
        (["input=broken.zip"], "input=broken.zip cannot be opened as an archive"),
        (["input=broken.tar.gz"], "input=broken.tar.gz cannot be opened as an archive"),
        (["input=text"], "predictions.csv says why for each file"),
        (["input=image.png", "format=cvs"], "format=cvs is not allowed: choose csv, json, parquet. Did you mean csv?"),
        (["input=image.png", "output=table.xlsx"], "output=table.xlsx does not end in .csv, .json, .parquet"),
        (
            ["input=image.png", "output=image.png/table.csv"],
            "output=image.png/table.csv cannot be written: image.png is no folder",
        ),
        (["input=image.png", "top_k=11"], "top_k=11 is not allowed"),
        (["input=image.png", "batch_size=0"], "batch_size=0 is not allowed"),
        (["input=image.png", "checkpoint=nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["input=my (1).png"], "input=my (1).png: no such file or folder"),
        (["top_k=my (1)"], "top_k=my (1) cannot be parsed: quote values"),
        (["inptu=image.png"], "Unknown config key inptu. Did you mean input?"),
        ([], "input= is missing: give it."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_a_readable_error(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 1
    assert said in err
    assert "Traceback" not in err


def test_what_it_says(command, tmp_path):
    (tmp_path / "text" / "image.png").write_bytes(PNG)
    code, out, _ = command("input=text", "output=table.csv")
    assert code == 0
    assert "input       text: files 2, predicted 1, errors 1" in out
    assert "resized     1 to 32x32" in out
    assert "error       'text/readme.txt': no image" in out
    assert (tmp_path / "table.csv").read_text().splitlines()[0].startswith("path,class_1,probability_1,")
    assert not list(tmp_path.glob("**/*.partial*"))


def test_a_hard_link_to_a_name_that_is_not_utf8_has_a_row(command, tmp_path):
    with tarfile.open("photos.tar", "w") as archive:
        archive.add("image.png", "image.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "caf\udce9.png"
        archive.addfile(link)
    assert command("input=photos.tar", "output=table.csv")[0] == 0
    assert "hard link: its content is that of caf\\xe9.png" in Path("table.csv").read_text(encoding="utf-8")


def test_the_log_of_an_image_whose_name_is_not_utf8_is_whole(command, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(PNG)
    code, _, err = command(f"input={name}", "output=table.csv")
    assert code == 0
    assert "Logging error" not in err
    (log,) = tmp_path.glob("outputs/predict/*/predict.log")
    assert "caf\\udce9.png" in log.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a log that nothing writes to
def test_hydras_way_of_logging_without_a_file_is_there(command):
    assert command("input=image.png", "output=table.csv", "hydra/job_logging=stdout")[0] == 0
    gc.collect()  # of the log, whose warning would come in a later test


def test_a_model_of_two_classes_gives_two_without_being_told(tmp_path, monkeypatch, tiny_checkpoint):
    trained = load_trained(tiny_checkpoint)
    two = ResNet50Classifier(**{**trained.module.hparams, "classes": ["cat", "dog"]})
    few = replace(trained, module=two.eval(), facts={**trained.facts, "classes": ["cat", "dog"]})
    monkeypatch.setattr("cifar_tl.predict.load_trained", lambda path: few)
    (tmp_path / "image.png").write_bytes(PNG)
    table = predict(cli.compose("predict", [f"checkpoint='{tiny_checkpoint}'", f"input='{tmp_path}'"]), tmp_path)
    head = table.read_text().splitlines()[0]
    assert head == "path,class_1,probability_1,class_2,probability_2,note,error"


def test_a_caller_who_stops_early_waits_for_no_other_file(monkeypatch):
    asked = []
    monkeypatch.setattr("cifar_tl.predict.ThreadPoolExecutor", lambda threads: Eager(asked))
    decoded = attempts([SimpleNamespace(path=str(i)) for i in range(100)], threads=2)
    assert next(decoded)[0] == "0"
    assert len(asked) == 5
    decoded.close()
    assert asked[-1] == "cancelled"


class Eager:
    """A pool that notes what it is asked for."""

    def __init__(self, asked):
        self.asked = asked

    def submit(self, function, file):
        self.asked.append(file.path)
        return SimpleNamespace(result=lambda: "decoded")

    def shutdown(self, cancel_futures):
        self.asked.append("cancelled" if cancel_futures else "left running")
