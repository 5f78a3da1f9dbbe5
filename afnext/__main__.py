"""The command line: `afnext ...` or `python -m afnext ...`."""

import sys


def main() -> None:
    """Run the command line, with the server as `serve`, the checks as `verify` and the benchmarks as `bench`."""
    try:
        from afnext.bench.model.verify_cli import verify
        from afnext.runtime.app.cli import app, run
        from afnext.runtime.app.cli.deferred import deferred_group
        from afnext.serve.cli import serve
    except KeyboardInterrupt:
        sys.exit(130)
    if not any(group.name == "bench" for group in app.registered_groups):
        app.command(epilog="Example: [bold]afnext serve -m nvidia/audio-flamingo-next-hf --port 8000[/bold]")(serve)
        app.command(epilog="Example: [bold]afnext verify nvidia/audio-flamingo-next-hf[/bold]")(verify)
        app.add_typer(deferred_group("afnext.bench.cli", "Measure speed, memory and quality."), name="bench")
    run(app)


if __name__ == "__main__":
    main()
