"""Tables between markers in the READMEs: they show what the committed CSVs hold."""

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from cifar_tl.errors import UserError
from cifar_tl.reproduce.frontier import PICTURE, description, published_results
from cifar_tl.reproduce.publish import DOCUMENTS, MARKED, PROVENANCE, RESULTS, filled, publish

ROOT = Path(__file__).parents[2]
HEAD = ["config", "test acc", *PROVENANCE]
ORIGIN = ["a device, 2 cores", "2026-01-02", "0123abc", "some.pth (761a)", "at RMS 0.4", "32-true"]


def write(path, head, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture
def checkout(tmp_path):
    """Two documents, and a committed table of two recipes."""
    (tmp_path / "pyproject.toml").touch()
    write(tmp_path / RESULTS / "results.csv", HEAD, ["best32", "89.00", *ORIGIN], ["best64", "94.30", *ORIGIN])
    for name in DOCUMENTS:
        (tmp_path / name).write_text("Before.\n<!-- table: results -->\n<!-- /table -->\nAfter.\n")
    return tmp_path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_marked_table_is_its_csv(name):
    text = (ROOT / name).read_text()
    assert MARKED.search(text)
    assert filled(text, ROOT / RESULTS) == text, "python -m cifar_tl.reproduce tables_only=true publish=true fills it"
    assert text.count("<!-- table:") == text.count("<!-- /table -->") == len(MARKED.findall(text))


def test_the_picture_is_of_both_csvs():
    with Image.open(ROOT / PICTURE) as picture:
        drawn = picture.text["Description"]
    assert drawn == description(published_results(ROOT)), "publish=true draws it"


def test_every_csv_is_shown_and_says_where_its_numbers_come_from():
    shown = {
        match["what"].split("|")[0].strip()
        for name in DOCUMENTS
        for match in MARKED.finditer((ROOT / name).read_text())
    }
    paths = list((ROOT / RESULTS).glob("*.csv"))
    assert {path.stem for path in paths} == shown
    for path in paths:
        with path.open(newline="") as file:
            assert all(row[name] for row in csv.DictReader(file) for name in PROVENANCE), path


def test_what_was_measured_replaces_the_row_and_fills_the_documents(checkout, tmp_path_factory):
    new = write(tmp_path_factory.mktemp("new") / "results.csv", HEAD, ["best32", "90.12", *ORIGIN])
    written = publish([new], checkout)
    assert written == [checkout / RESULTS / "results.csv", *(checkout / name for name in DOCUMENTS)]
    for name in DOCUMENTS:
        text = (checkout / name).read_text()
        assert "| config | test acc |\n| --- | ---: |\n| best32 | 90.12 |\n| best64 | 94.30 |\n" in text
        assert "a device, 2 cores; 2026-01-02; commit 0123abc; weights some.pth (761a); filters: at RMS 0.4; " in text
        assert re.fullmatch(r"Before\.\n<!-- table: results -->\n.*<!-- /table -->\nAfter\.\n", text, re.DOTALL)
        assert filled(text, checkout / RESULTS) == text


def test_a_column_that_an_old_row_lacks_is_a_dash(checkout, tmp_path_factory):
    head = ["config", "test acc", "flip TTA", *PROVENANCE]
    publish([write(tmp_path_factory.mktemp("new") / "results.csv", head, ["best32", "90.12", "91", *ORIGIN])], checkout)
    assert "| best64 | 94.30 | - |" in (checkout / "README.md").read_text()


def test_a_column_that_nothing_new_has_stays_for_the_old_rows(checkout, tmp_path_factory):
    head, old = ["config", "test acc", "flip TTA", *PROVENANCE], ["best64", "94.30", "94.55", *ORIGIN]
    publish([write(tmp_path_factory.mktemp("old") / "results.csv", head, old)], checkout)
    new = ["best32", "90.12", *ORIGIN]
    publish([write(tmp_path_factory.mktemp("new") / "results.csv", [head[0], head[1], *PROVENANCE], new)], checkout)
    text = (checkout / "README.md").read_text()
    assert "| best32 | 90.12 | - |" in text
    assert "| best64 | 94.30 | 94.55 |" in text


def test_a_mark_may_choose_rows_and_columns(checkout):
    text = "<!-- table: results | best64 | test acc, config -->\n<!-- /table -->"
    assert "| test acc | config |\n| --- | ---: |\n| 94.30 | best64 |\n\n" in filled(text, checkout / RESULTS)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("result", "table=result is not allowed: choose results. Did you mean results?"),
        ("results | best16", "row=best16 is not allowed"),
        ("results | best32 | tset acc", "column=tset acc is not allowed"),
    ],
)
def test_a_mark_that_names_what_is_not_there_is_an_error(checkout, mark, message):
    with pytest.raises(UserError, match=re.escape(message)):
        filled(f"<!-- table: {mark} -->\n<!-- /table -->", checkout / RESULTS)


def test_where_a_readme_asks_for_a_column_that_went_nothing_is_written(checkout, tmp_path_factory):
    (checkout / "README.md").write_text("<!-- table: results | | config, flip TTA -->\n<!-- /table -->\n")
    before = {path: path.read_text() for path in checkout.rglob("*.*")}
    new = write(tmp_path_factory.mktemp("new") / "results.csv", HEAD, ["best32", "90.12", *ORIGIN])
    with pytest.raises(UserError, match="column=flip TTA is not allowed"):
        publish([new], checkout)
    assert {path: path.read_text() for path in checkout.rglob("*.*")} == before


def test_an_installed_copy_publishes_nothing(tmp_path):
    with pytest.raises(UserError, match="goes into a checkout"):
        publish([], tmp_path)


def test_where_a_row_is_of_another_device_each_row_says_its_own(checkout):
    other = [*ORIGIN]
    other[PROVENANCE.index("device")] = "another device, 2 cores"
    write(checkout / RESULTS / "results.csv", HEAD, ["best32", "89.00", *ORIGIN], ["best64", "94.30", *other])
    text = filled((checkout / "README.md").read_text(), checkout / RESULTS)
    assert "| config | test acc | device |" in text
    assert "| best64 | 94.30 | another device, 2 cores |" in text
    assert "\n2026-01-02; commit 0123abc; weights some.pth (761a); filters: at RMS 0.4; 32-true.\n" in text


def test_a_device_whose_name_has_commas_is_said_whole(checkout):
    both = ["a device, 2 cores, another device, 2 cores", *ORIGIN[1:]]
    both[PROVENANCE.index("commit")] = "0123abc, 4567def"
    write(checkout / RESULTS / "results.csv", HEAD, ["best32", "89.00", *both], ["best64", "94.30", *both])
    text = filled((checkout / "README.md").read_text(), checkout / RESULTS)
    assert "\na device, 2 cores, another device, 2 cores; 2026-01-02; commit 0123abc, 4567def; weights" in text


def test_distances_of_two_measurements_do_not_mix(checkout, tmp_path_factory):
    head = ["removed", "val acc", "points against none", *PROVENANCE]
    write(checkout / RESULTS / "ablation.csv", head, ["none", "82", "", *ORIGIN], ["no_flip", "81", "-1", *ORIGIN])
    publish([write(tmp_path_factory.mktemp("new") / "ablation.csv", head, ["none", "79", "", *ORIGIN])], checkout)
    with (checkout / RESULTS / "ablation.csv").open() as file:
        assert [row["removed"] for row in csv.DictReader(file)] == ["none"]
