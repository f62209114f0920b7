"""Fetch or check CIFAR-10 from the command line.

python -m cifar_tl.data fetch [--root data]     download and extract it, or finish what is there
python -m cifar_tl.data verify [--root data]    one line per file; exit code 1 if one is missing or wrong
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from cifar_tl.data import download
from cifar_tl.errors import UserError
from cifar_tl.files import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 something is wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m cifar_tl.data", description="Fetch or check CIFAR-10.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("fetch", "download and extract what is missing"), ("verify", "check every file's MD5")):
        command = commands.add_parser(name, help=text, description=f"CIFAR-10: {text}.")
        command.add_argument("--root", default="data", help="folder of the data set (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return _verify(options.root) if options.command == "verify" else _fetch(options.root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        part = download.partial(options.root)
        if part.exists():
            print(f"{part} is kept; run the same command again to go on from there.", file=sys.stderr)
        return 130


def _fetch(root: str) -> int:
    download.ensure(root, download=True)
    say(f"CIFAR-10 is complete in {download.FOLDER} under {root}: {len(download.FILES)} files, every MD5 right")
    return 0


def _verify(root: str) -> int:
    files = download.verify(root)
    for file in files:
        say(file.message)
    return 0 if all(file.state == "ok" for file in files) else 1


if __name__ == "__main__":
    if "verify" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
