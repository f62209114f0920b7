"""The built wheel runs from any folder: it carries the configs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_contains_the_configs_and_finds_them(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "cifar_tl"
    expected = {p.relative_to(ROOT) for p in (ROOT / "conf").rglob("*.yaml")}
    assert {p.relative_to(installed) for p in installed.rglob("*.yaml")} == expected
    drawn = ROOT / "cifar_tl" / "reports"
    for path in (*drawn.glob("templates/*"), *drawn.glob("*.mplstyle")):
        assert (installed / "reports" / path.relative_to(drawn)).is_file()
    assert (installed / "reports" / "templates" / "report.css").is_file()
    shown = subprocess.run(
        [sys.executable, "-m", "cifar_tl.train", "--cfg", "job", "experiment=demo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "synthetic" in shown.stdout
