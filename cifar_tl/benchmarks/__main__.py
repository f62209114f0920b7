"""python -m cifar_tl.benchmarks: measure side by side, print tables, write outputs/bench/TIME/bench.{json,md}."""

import argparse
import json
import logging
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_tl.files import say
from cifar_tl.runs.table import markdown


def main(arguments: list[str]) -> int:
    """Run the benchmarks that are asked for.

    Returns:
        0; 1 after a mistake, whose explanation is then on stderr; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m cifar_tl.benchmarks", description=__doc__)
    names = ["pipeline", "frozen", "step", "predict", "startup", "runs"]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", default="auto", help="as in trainer.precision (default: auto); not of predict and Keras"
    )
    parser.add_argument("--data-root", help="folder with CIFAR-10; without it, generated images")
    parser.add_argument("--weights", help="as in model.weights; without it, random ones")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each candidate (default: 5)")
    parser.add_argument("--limit", type=positive, help="images to use at most, for a quick look")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*names, "recipes", "peers"],
        default=names,
        help="default: all but recipes, which takes long, and peers, which installs TensorFlow for Keras, 1.6 GB, "
        "into outputs/bench/keras-env",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="what recipes measures also into conf/experiment/results/speed.csv of this code's checkout, its READMEs "
        "and frontier.png",
    )
    given = parser.parse_args(arguments)
    if given.publish and ("recipes" not in given.only or given.limit or not given.data_root or not given.weights):
        parser.error("--publish is for --only recipes, with --data-root and --weights, without --limit")

    # late: --help should not wait for torch
    from cifar_tl.benchmarks import frozen, peers, pipeline, predict, recipes, step, whole
    from cifar_tl.benchmarks.setting import Setting
    from cifar_tl.errors import Interrupted, UserError
    from cifar_tl.files import write_text
    from cifar_tl.hardware import (
        advice_when_out_of_memory,
        environment,
        flush_denormals,
        resolve_accelerator,
        resolve_precision,
    )
    from cifar_tl.reproduce.publish import check_checkout
    from cifar_tl.runs.record import git_state
    from cifar_tl.trainer import quieten_lightning

    measures = {
        "pipeline": ("Input pipeline, batches of 128, flip and crop", pipeline.measure),
        "frozen": ("Frozen phase of 10 epochs", frozen.measure),
        "step": ("Fine-tune step", step.measure),
        "predict": ("cifar_tl.predict on a folder of PNGs", predict.measure),
        "startup": ("Start-up", whole.startup),
        "runs": ("Whole 10 + 10 epoch runs, from command to test result", whole.runs),
        "recipes": (
            "Training of the recipes on 45,000 images, training alone: minutes computed from the medians of images/s",
            recipes.measure,
        ),
        "peers": (
            "10 + 10 epochs on 45,000 images, training alone: seconds computed from the medians of images/s",
            peers.measure,
        ),
    }
    now = datetime.now(UTC)
    output = Path("outputs/bench") / now.strftime("%Y-%m-%d_%H-%M-%S")
    logging.basicConfig(level=logging.WARNING)
    quieten_lightning()
    try:
        resolve_accelerator(given.device)
        precision = resolve_precision(given.precision, given.device)
        if given.publish:
            check_checkout(recipes.checkout())
            if git_state()["git_dirty"]:
                raise UserError("--publish is for what a commit measures, and this checkout has changes: commit them.")
        output.mkdir(parents=True)
        result: dict[str, Any] = {
            "command": " ".join(["python -m cifar_tl.benchmarks", *arguments]),
            "date": now.isoformat(timespec="seconds"),
            **environment(given.device),
            **git_state(),
        }
        where = f"{result['device']}, {result['threads']} threads, {precision}"
        text = [f"{where}, torch {result['versions']['torch']}", ""]
        text += [f"`{result['command']}`, {result['date']}, commit {(result['git_commit'] or 'none')[:7]}", ""]
        print("\n".join(text))
        with tempfile.TemporaryDirectory(prefix="cifar_tl_bench") as folder:
            setting = Setting(
                device=given.device,
                precision=precision,
                data_root=given.data_root,
                weights=given.weights,
                rounds=given.rounds,
                limit=given.limit,
                batch_sizes=tuple(given.batch_sizes),
                folder=Path(folder),
            )
            flush_denormals()
            for name in given.only:
                title, measure = measures[name]
                with advice_when_out_of_memory("Give smaller --batch-sizes, or leave the part out with --only."):
                    result[name] = measure(setting)
                section = [f"### {title}", "", table(result[name]), ""]
                text += section
                print("\n".join(section), flush=True)
                write_text(output / "bench.json", json.dumps(result, indent=1) + "\n")
                write_text(output / "bench.md", "\n".join(text))
                if name == "recipes" and given.publish:
                    for path in recipes.publish_speed(result, setting):
                        say(f"written: {path}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted, SystemExit):  # the last one is Lightning's, after Ctrl-C
        kept = f" What had been measured is in {output}." if (output / "bench.json").is_file() else ""
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return 130
    say(f"written to {output}/bench.json and bench.md")
    return 0


def positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, with a column per key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
        return "" if value is None else str(value)

    words = [i for i, column in enumerate(columns) if any(isinstance(row.get(column), str) for row in rows)]
    return markdown(columns, [[cell(row.get(column)) for column in columns] for row in rows], words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
