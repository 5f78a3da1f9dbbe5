"""Live listening in the background: a thread feeds the audio, and questions are answered meanwhile."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, TextIO, cast

from ...kernels.errors import AfnextError
from ..errors import AudioError
from ..io.live_source import Pieces, Warn, decoded_pieces, microphone_pieces, raw_pieces
from .context import Context
from .live import Live
from .responder import QuestionOptions, Stream

MICROPHONE = "mic"
_log = logging.getLogger("afnext")


class LiveSession:
    """Feeds a `Live` from a source in a separate thread, from `start` to the end of the audio or `stop`.

    error: the error that ended the audio early, or None. An exception other than AfnextError is its `__cause__`.
    """

    def __init__(self, live: Live, source: "Source"):
        self._live = live
        self._live.source = source.name
        self._source = source
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._feed, name="afnext-listen", daemon=True)
        self._context: Context | None = None
        self.error: AfnextError | None = None

    @property
    def ended(self) -> bool:
        """Whether the audio has ended."""
        return self._context is not None or self.error is not None

    @property
    def seconds(self) -> float:
        """Length of the audio so far."""
        return self._live.seconds

    def start(self) -> None:
        """Start the feeding thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop feeding after the current piece."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait for the end of the audio. Raises the error that ended it."""
        self._thread.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error that ended the audio early, if any."""
        if self.error is not None:
            raise self.error

    def stream(self, question: str, options: QuestionOptions) -> Stream:
        """Stream the answer to a question about the audio so far."""
        if self._context is None:
            try:
                return self._live.stream(question, **options)
            except AfnextError:
                if self._live.ended:  # by the feeding thread, while the question waited for it
                    self._thread.join()
                if self._context is None:
                    raise
        return self._context.stream(question, **options)

    def _feed(self) -> None:
        try:
            for pcm, rate in self._source.pieces(self._stopped.is_set, self._warn):
                self._live.feed(pcm, rate)
                if self._stopped.is_set():
                    return
            self._context = self._live.finish()
        except AfnextError as error:
            self.error = error
        except BaseException as error:  # otherwise lost, as the thread ends here
            _log.info("listening failed", exc_info=error)
            self.error = AfnextError(
                f"listening failed with an internal error ({type(error).__name__}: {error}); please report it."
            )
            self.error.__cause__ = error

    def _warn(self, warnings: tuple[str, ...]) -> None:
        self._live.warnings = warnings


@dataclass(frozen=True)
class Source:
    """A source of audio. name: for warnings; pieces: called with a function that returns whether to stop, and one that
    takes the warnings so far."""

    name: str
    pieces: Callable[[Callable[[], bool], Warn], Pieces]


def open_source(source: str, stack: ExitStack, *, raw: str | None, rate: int, channels: int) -> Source:
    """A source for `LiveSession`: "mic" or "mic:NAME", "-" for standard input, or the path of a pipe or file.

    raw: the format of samples without a header, one of RAW_FORMATS, or None for a container. A path is opened when
    `pieces` is called, which raises AudioError if that fails.
    """
    if source == MICROPHONE or source.startswith(f"{MICROPHONE}:"):
        device = source.partition(":")[2] or None
        return Source(source, lambda stopped, warn: microphone_pieces(stopped, device, warn))
    name = "<stdin>" if source == "-" else source

    def pieces(stopped: Callable[[], bool], warn: Warn) -> Pieces:
        file = sys.stdin.buffer if source == "-" else stack.enter_context(_opened(source))
        if raw is None:
            return decoded_pieces(file, name, warn)
        return raw_pieces(file, raw, rate=rate, channels=channels, warn=warn)

    return Source(name, pieces)


def _opened(path: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(path, "rb", buffering=0))
    except (OSError, ValueError) as error:
        raise AudioError(f"{path!r} cannot be opened ({error}); check the path.") from None


def typed_questions(source: str, stack: ExitStack) -> Iterator[str] | None:
    """Lines typed on standard input, or on the terminal if standard input is the audio; None if there is no terminal.

    An empty line ends them. Raises AfnextError for a line in another encoding.
    """
    if source != "-":
        return _lines(sys.stdin)
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return None
    return _lines(stack.enter_context(os.fdopen(terminal, "r")))


def _lines(terminal: TextIO) -> Iterator[str]:
    while True:
        if terminal.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            question = terminal.readline().strip()
        except UnicodeDecodeError as error:
            raise AfnextError(f"the question is not {error.encoding} text ({error}); check its encoding.") from None
        if not question:
            return
        yield question
