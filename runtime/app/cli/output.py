"""Output of the commands: answers to stdout as they are generated; notes, warnings and progress to stderr.

On a pipe, stdout gets the answer's bytes unchanged. On a terminal, its control characters are escaped. Messages are one
line each, whatever the terminal's width, and never contain control characters.
"""

import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import OutputError
from ...files import output_file
from ...model.hub import BUNDLED, full_name
from .text import command_line_spelling, encodable, json_text, visible, visible_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichProgress

    from ..answer import Answer, Piece
    from ..responder import Stream
    from .options import OutputOptions


def write(text: str) -> None:
    """Write to stdout and flush. Characters that its encoding lacks become escapes, with one warning.

    Raises OutputError, and BrokenPipeError when the reader has closed the pipe.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to a file, or use --output.")
    if sys.stdout.isatty():
        text = visible(text, keep="\n\t")
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            _degrade_stdout()
            sys.stdout.write(encodable(text, sys.stdout.encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise OutputError(f"standard output cannot be written: {problem.strerror or problem}.") from None


def _degrade_stdout() -> None:
    """Make stdout escape characters that its encoding lacks, and print a warning."""
    warn(
        f"standard output is encoded in {sys.stdout.encoding}, which lacks some of the characters; they are written as "
        "backslash escapes. Set PYTHONIOENCODING=utf-8, or use --output or --json."
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def stdout_encoding() -> str:
    """The encoding of stdout."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def write_json(value: Any) -> None:
    """Write `value` to stdout as one line of JSON, escaped where the encoding requires it."""
    write(json_text(value, stdout_encoding()) + "\n")


def write_table(renderable: "RenderableType") -> None:
    """Write a table to stdout; if it is not a terminal, lines may have any length."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 10_000
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


_STANDARD = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


def descriptor(path: str) -> int | None:
    """The open file descriptor that a path names ("-" and "/dev/stdout": 1), None if it names a file."""
    numbered = _DESCRIPTOR.fullmatch(path)
    return int(numbered[1]) if numbered else _STANDARD.get(path)


@contextmanager
def open_output(path: Path | None) -> Iterator[BinaryIO | None]:
    """The file of `--output`, which is created only when it is complete; None for stdout.

    Pipes, devices and open descriptors (/dev/stderr, /dev/fd/3) are written directly; their targets are not replaced.
    Raises OutputError when it cannot be written.
    """
    number = 1 if path is None else descriptor(str(path))
    if path is None or number == 1:
        yield None
        return
    try:
        if number is not None:
            with os.fdopen(os.dup(number), "wb") as file:
                yield file
            return
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                yield file
            return
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise OutputError(f"{path} cannot be written: {problem.strerror or problem}.") from None
    target = Path(os.path.realpath(path))  # a link is followed and kept
    with _creating_folder(target), output_file(target, OutputError) as file:
        yield file


@contextmanager
def _creating_folder(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{target.parent} cannot be created: {problem.strerror or problem}.") from None
    yield


def note(message: str) -> None:
    """Print a note on stderr."""
    _print((message, "dim"))


def warn(message: str) -> None:
    """Print a warning on stderr."""
    _print(("warning:", "yellow"), (f" {command_line_spelling(message)}", ""))


def fail(error: Exception | str) -> None:
    """Print an error on stderr."""
    _print(("error:", "bold red"), (f" {command_line_spelling(str(error))}", ""))


def _print(*parts: tuple[str, str]) -> None:
    """Print one line on stderr, never wrapped. Errors of writing are ignored, unless stderr is a pipe."""
    from rich.text import Text

    if sys.stderr is None:
        return
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    shown = [(encodable(visible_line(text), encoding), style) for text, style in parts]
    try:
        stderr_console().print(Text.assemble(*shown), soft_wrap=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


_consoles: "list[Console]" = []


def stderr_console() -> "Console":
    """The console of stderr, one for messages and progress, so that they do not overwrite each other."""
    from rich.console import Console

    if not _consoles:
        _consoles.append(Console(stderr=True, highlight=False, markup=False, emoji=False))
    return _consoles[0]


class _Formatter(logging.Formatter):
    """Formats log records with the control characters in their arguments escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def log_to_stderr(verbose: bool) -> None:
    """Log warnings, or with `verbose` also which implementation runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)


def announce(model: str, quiet: bool) -> None:
    """Print a note that the small model answers, so that it is not mistaken for the real one."""
    if full_name(model) == BUNDLED and not quiet:
        note(
            f"{BUNDLED} answers, a demonstration that often errs: it knows 113 words and nine sounds. "
            "For everything else, --model nvidia/audio-flamingo-next-hf"
        )


class Bars:
    """A progress bar per stage on stderr. Called with (stage, done, total), like the library's `progress`."""

    def __init__(self, bars: "RichProgress"):
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: float, total: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)

    @contextmanager
    def out_of_the_way(self) -> Iterator[None]:
        """Hide the bars during the block, so that output on a terminal is visible."""
        self._bars.stop()
        yield
        self._bars.start()


@contextmanager
def progress(hidden: bool) -> Iterator[Bars]:
    """Progress bars on stderr if it is a terminal; they are removed at the end."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bars:
        yield Bars(bars)


def show_answer(
    stream: "Stream",
    first: "Piece | None",
    show: "OutputOptions",
    *,
    output: BinaryIO | None = None,
    thoughts: bool = True,
) -> "Answer":
    """Write the answer as it is generated, or as one JSON object, to `output` or stdout; return it.

    first: the first piece of the stream; thoughts: whether to print the model's thinking.
    """
    pieces: Iterable[Piece] = () if first is None else chain([first], stream)
    if show.as_json or output is not None:
        text = "".join(piece for piece in pieces if not piece.thinking)
    else:
        _write_pieces(pieces if thoughts else (p for p in pieces if not p.thinking), show.quiet)
        text = ""
    answer = stream.answer
    assert answer is not None
    if output is not None:
        written = json_text(answer.to_dict(), "utf-8") if show.as_json else text
        output.write(f"{written}\n".encode("utf-8", "backslashreplace"))
    elif show.as_json:
        write_json(answer.to_dict())
    if not show.as_json:
        _print_footer(answer, show.quiet)
    return answer


def _write_pieces(pieces: "Iterable[Piece]", quiet: bool) -> None:
    """Write the answer piece by piece, after the model's thinking, which is dimmed or, on a pipe, goes to stderr."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    thinking = False
    for piece in pieces:
        if thinking and not piece.thinking:
            _write_thought("\n\n" if terminal else "\n", terminal, quiet)
        thinking = piece.thinking
        if thinking:
            _write_thought(piece, terminal, quiet)
        else:
            write(piece)
    write("\n")


def _write_thought(text: str, terminal: bool, quiet: bool) -> None:
    text = visible(text, keep="\n\t")
    if terminal and sys.stdout is not None:
        styled = os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ
        text = encodable(text, sys.stdout.encoding)
        sys.stdout.write(f"\x1b[2m{text}\x1b[22m" if styled else text)
        sys.stdout.flush()
    elif not quiet and sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(encodable(text, sys.stderr.encoding))
            sys.stderr.flush()


def _print_footer(answer: "Answer", quiet: bool) -> None:
    for warning in answer.warnings:
        warn(warning)
    if answer.finish_reason == "length":
        warn("the answer was cut at max_new_tokens")
    if answer.repetition is not None:
        ended = "was ended because it repeats" if answer.finish_reason == "repetition" else "repeats"
        warn(f"the answer {ended} itself; try repetition_penalty=1.2 or another question")
    if quiet:
        return
    usage, timings = answer.usage, answer.timings
    note(
        f"{usage.audio_seconds:.2f} s of audio in {usage.windows} windows, {usage.audio_tokens} audio + "
        f"{usage.text_tokens} text tokens; {usage.new_tokens} new tokens at {timings.tokens_per_second:.1f}/s"
    )
    note(
        f"load {timings.load_audio:.2f} s, log-mel {timings.log_mel:.2f} s, encode {timings.encode:.2f} s, prefill "
        f"{timings.prefill:.2f} s, first token after {timings.first_token:.2f} s, total {timings.total:.2f} s"
    )
