import json
from types import SimpleNamespace

import pytest
from conftest import SMALL

from cifar_tl.benchmarks import step, whole
from cifar_tl.benchmarks.__main__ import main, table
from cifar_tl.benchmarks.setting import summary, take_turns
from cifar_tl.benchmarks.step import peak_bf16


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_benchmark_runs_and_leaves_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(whole, "TRAIN", SMALL[1:])
    assert main(["--limit", "20", "--rounds", "1", "--batch-sizes", "256"]) == 0
    (folder,) = (tmp_path / "outputs" / "bench").iterdir()
    result = json.loads((folder / "bench.json").read_text())
    # features of random weights are not kept, so that there is nothing that an earlier run could have left
    expected = {"pipeline": 3, "frozen": 2, "step": 7, "predict": 2, "startup": 2, "runs": 1}
    assert {name: len(result[name]) for name in expected} == expected
    assert all(row["median"] > 0 for name in expected for row in result[name])
    shares = [row["median"] for row in result["step"] if row["unit"] == "of a step"]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)
    assert "peers" not in result  # installs TensorFlow, which only who asks for gets
    assert result["runs"][0]["host GiB"] > 0
    assert result["device"] in capsys.readouterr().out
    assert "### Fine-tune step" in (folder / "bench.md").read_text()


@pytest.mark.slow
def test_a_run_that_fails_is_no_measurement(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["--only", "startup", "--data-root", "nowhere", "--rounds", "1", "--limit", "20"]) == 1
    err = capfd.readouterr().err
    assert "ended with exit code 1; what it printed says why" in err
    assert "Traceback" not in err


def test_ctrl_c_keeps_what_has_been_measured(tmp_path, monkeypatch, capsys):
    def interrupted(setting):
        raise SystemExit  # as Lightning does

    row = {"what": "x", "median": 1.0}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cifar_tl.benchmarks.pipeline.measure", lambda setting: [row])
    monkeypatch.setattr("cifar_tl.benchmarks.step.measure", interrupted)
    assert main(["--only", "pipeline", "step"]) == 130
    (folder,) = (tmp_path / "outputs" / "bench").iterdir()
    assert f"What had been measured is in {folder.relative_to(tmp_path)}" in capsys.readouterr().err
    assert json.loads((folder / "bench.json").read_text())["pipeline"] == [row]


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_a_number_that_cannot_be_is_refused(number, capsys):
    with pytest.raises(SystemExit):
        main(["--rounds", number])
    assert "argument --rounds: invalid positive value" in capsys.readouterr().err


def test_candidates_take_turns_and_the_first_round_does_not_count():
    calls = []

    def candidate(name):
        def measure():
            calls.append(name)
            return float(len(calls))

        return measure

    figures = take_turns({"a": candidate("a"), "b": candidate("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    rows = summary(figures, "s", reference="a")
    assert [(row["median"], row["ratio"]) for row in rows] == [(4.0, 1.0), (5.0, 1.25)]


def test_a_table_has_every_column_of_every_row():
    assert table([{"what": "x", "s": 1234.5}, {"what": "y", "more": 0.5}]).splitlines() == [
        "| what | s | more |",
        "| --- | ---: | ---: |",
        "| x | 1,234 |  |",
        "| y |  | 0.5 |",
    ]


def test_a_gpu_that_is_not_there_is_a_readable_error(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--device", "cuda"]) == 1
    assert "sees no CUDA GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_a_devices_peak_is_that_of_its_longest_name(name, peak):
    assert peak_bf16(name) == peak
    assert peak_bf16("NVIDIA T4") is None
    assert peak_bf16("NVIDIA H200 MIG 1g.18gb") is None  # a seventh of it


@pytest.mark.resnet50
def test_the_share_of_a_devices_peak_is_of_what_a_step_computes(monkeypatch):
    monkeypatch.setattr(step, "device_name", lambda device: "NVIDIA H100 PCIe")
    rows = [{"median": 1e6}]
    step.add_share_of_peak(rows, SimpleNamespace(device="cuda", precision="bf16-mixed"))
    assert rows[0]["MFU"] == pytest.approx(1e6 * 0.497e9 / 756e12, rel=0.01)
    step.add_share_of_peak(rows, SimpleNamespace(device="cuda", precision="32-true"))
    assert rows[0]["MFU"] is None
