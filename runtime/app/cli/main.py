"""The `afnext` command: its sub-commands, and how errors end it."""

import os
import sys
from contextlib import suppress
from typing import Annotated, TextIO

import typer

from ....kernels.errors import AfnextError
from .ask import ask
from .batch import batch
from .chat import chat
from .info import info
from .listen import listen
from .models import models
from .output import fail, write
from .plan import plan
from .quantize import quantize
from .tasks import tasks
from .transcribe import transcribe


def _print_version(wanted: bool) -> None:
    if wanted:
        from afnext import __version__

        write(f"afnext {__version__}\n")
        raise typer.Exit


app = typer.Typer(
    name="afnext",
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(
    epilog='Example: afnext ask meeting.mp3 "Who speaks first?" -m nvidia/audio-flamingo-next-hf',
)(ask)
app.command(epilog="Example: afnext chat meeting.mp3 -m nvidia/audio-flamingo-next-think-hf")(chat)
app.command(
    epilog="Example: afnext transcribe talk.mp3 -f srt -o talk.srt -m nvidia/audio-flamingo-next-hf",
)(transcribe)
app.command(
    epilog='Example: afnext batch recordings/ --ask "Who speaks?" --out answers.jsonl -m next',
)(batch)
app.command(
    epilog="Example: ffmpeg -i URL -f s16le -ac 1 -ar 16000 - | afnext listen - --raw s16le -m MODEL",
)(listen)
app.command(epilog="Example: afnext ask talk.mp3 --task ast --to German -m nvidia/audio-flamingo-next-hf")(tasks)
app.command(epilog="Example: afnext quantize nvidia/audio-flamingo-next-hf af-next-int4 --scheme int4")(quantize)
app.command(epilog="Example: afnext info nvidia/audio-flamingo-next-hf --json")(info)
app.command(epilog="Example: afnext plan --gpu 8GB --audio 1800 --scheme int4 --kv int8")(plan)
app.add_typer(models)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Ask Audio Flamingo Next about speech, sound and music."""


def run(command: typer.Typer) -> None:
    """Run a command line; errors that a user can act on end it with one sentence and exit code 1."""
    code: str | int | None = 0
    try:
        command(prog_name="afnext")
    except SystemExit as end:
        code = end.code
    except AfnextError as error:
        code = 1
        fail(error)
    except BrokenPipeError:
        code = 1
    except OSError as problem:  # raised by `--help` or a table if standard output cannot be written
        code = 1
        fail(f"{problem.filename or 'the output'}: {problem.strerror or problem}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(_flushed(code))


def _flushed(code: str | int | None) -> str | int | None:
    """Flush the output, so that the interpreter reports no error at exit; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as problem:
            if stream is sys.stdout and code == 0 and not isinstance(problem, BrokenPipeError):
                fail(f"standard output cannot be written: {getattr(problem, 'strerror', None) or problem}.")
            code = code or 1
            _discard(stream)
    return code


def _discard(stream: TextIO) -> None:
    """Discard the buffered output of `stream`."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
