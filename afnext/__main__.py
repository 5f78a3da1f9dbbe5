"""The command line: `afnext ...` or `python -m afnext ...`."""

from afnext.bench.cli import app as bench
from afnext.runtime.app.cli import app, run


def main() -> None:
    """Run the command line, with the benchmarks as its `bench` command."""
    app.add_typer(bench, name="bench")
    run(app)


if __name__ == "__main__":
    main()
