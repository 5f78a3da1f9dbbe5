"""A conversation about audio that is still being recorded: one thread feeds it, questions are answered meanwhile."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import BinaryIO, TextIO, cast

from ...kernels.errors import AfnextError
from ..errors import AudioError
from ..io.live_source import Pieces, decoded_pieces, microphone_pieces, raw_pieces
from .context import Context
from .live import Live
from .responder import QuestionOptions, Stream

MICROPHONE = "mic"


class LiveSession:
    """Feeds a `Live` from pieces in a thread of its own, from `start` to the end of the pieces or `stop`."""

    def __init__(self, live: Live, pieces: Callable[[Callable[[], bool]], Pieces]):
        """pieces: called with what tells whether to stop, returns the pieces to feed."""
        self._live = live
        self._stopped = threading.Event()
        self._pieces = pieces
        self._thread = threading.Thread(target=self._feed, name="afnext-listen", daemon=True)
        self._context: Context | None = None
        self.error: AfnextError | None = None

    @property
    def ended(self) -> bool:
        """Whether the audio has come to its end."""
        return self._context is not None or self.error is not None

    @property
    def seconds(self) -> float:
        """What has been heard."""
        return self._live.seconds

    def start(self) -> None:
        """Begin to feed."""
        self._thread.start()

    def stop(self) -> None:
        """Stop feeding after the piece that is under way."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait for the end of the audio. Raises the error that ended it."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def stream(self, question: str, options: QuestionOptions) -> Stream:
        """The answer to a question about what has been heard so far, piece by piece."""
        heard = self._context or self._live
        return heard.stream(question, **options)

    def _feed(self) -> None:
        try:
            for pcm, rate in self._pieces(self._stopped.is_set):
                self._live.feed(pcm, rate)
                if self._stopped.is_set():
                    return
            self._context = self._live.finish()
        except AfnextError as error:
            self.error = error


def open_pieces(
    source: str, stack: ExitStack, *, raw: str | None, rate: int, channels: int
) -> Callable[[Callable[[], bool]], Pieces]:
    """What `LiveSession` feeds from: "mic" or "mic:NAME", "-" for standard input, or the path of a pipe or file.

    raw: the format of samples without a header, one of RAW_FORMATS, or None for a container. Raises AudioError when the
    path cannot be opened.
    """
    if source == MICROPHONE or source.startswith(f"{MICROPHONE}:"):
        name = source.partition(":")[2] or None
        return lambda stopped: microphone_pieces(stopped, name)

    def pieces(stopped: Callable[[], bool]) -> Pieces:
        file = sys.stdin.buffer if source == "-" else stack.enter_context(_opened(source))
        if raw is None:
            return decoded_pieces(file, source)
        return raw_pieces(file, raw, rate=rate, channels=channels)

    return pieces


def _opened(path: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(path, "rb", buffering=0))
    except (OSError, ValueError) as error:
        raise AudioError(f"{path!r} cannot be opened ({error}); check the path.") from None


def typed_questions(source: str, stack: ExitStack) -> Iterator[str] | None:
    """Lines typed on standard input or, where that is the audio, on the terminal; None without a terminal then.

    An empty line ends them.
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
        question = terminal.readline().strip()
        if not question:
            return
        yield question
