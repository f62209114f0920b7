"""python -m cifar_tl: the commands there are."""

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

if __name__ == "__main__":
    for name, text in COMMANDS.items():
        print(f"python -m cifar_tl.{name:<12}{text}")
    print("Each takes --help.")
