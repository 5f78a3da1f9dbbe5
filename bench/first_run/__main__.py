"""`python -m afnext.bench.first_run`: like `afnext bench first-run`, with only torch and Triton installed."""

import argparse
import sys
from pathlib import Path

from .run import first_run


def main() -> None:
    """Read the options and run; the exit status is 1 if something failed and 130 after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m afnext.bench.first_run", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all of it")
    parser.add_argument("--out", type=Path, default=Path("first-run"), help="folder for the results and the archive")
    options = parser.parse_args()
    sys.exit(first_run(options.out, device=options.device, minutes=options.minutes))


if __name__ == "__main__":
    main()
