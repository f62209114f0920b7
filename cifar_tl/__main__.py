"""python -m cifar_tl: the commands there are."""

import sys

COMMANDS = {
    "train": "train, or go on with a run: experiment=NAME, resume=RUN",
    "evaluate": "measure a checkpoint: checkpoint=RUN",
    "predict": "classify images: checkpoint=RUN input=FOLDER",
    "export": "write a model for other programs: checkpoint=RUN",
    "reports": "draw a run's page, or compare runs: RUN_OR_SWEEP ...",
    "data": "fetch or verify CIFAR-10",
    "reproduce": "train what the tables of the documentation are made of",
    "benchmarks": "measure speeds",
}


def main(arguments: list[str]) -> int:
    """Print the commands; return 2 if one was asked for here, where none is carried out."""
    wrong = arguments not in ([], ["--help"], ["-h"])
    if wrong:
        print(f"error: python -m cifar_tl carries nothing out: {' '.join(arguments)}", file=sys.stderr)
    for name, text in COMMANDS.items():
        print(f"python -m cifar_tl.{name:<12}{text}", file=sys.stderr if wrong else sys.stdout)
    print("Each takes --help.", file=sys.stderr if wrong else sys.stdout)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
