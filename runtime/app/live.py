"""Live listening: each window is processed as soon as it is complete, so a question waits only for the incomplete
one."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ...kernels.audio_format import SAMPLE_RATE
from ...kernels.errors import AfnextError
from ..engine.prefill import AudioInput
from ..engine.prefix import Prefix
from ..engine.request import Request
from ..engine.timings import Timings
from ..errors import AudioError
from ..io.audio import Array
from ..io.audio_stream import AudioStream
from ..io.prompt import Prompt
from ..model.encoder import audio_token_count
from .context import Context, Fingerprint, Listening, asked, conversation_prompt, prefix_ids
from .conversation import Conversation, Message, Recording
from .responder import QuestionOptions, Responder, check_options


class Live(Listening):
    """A recording in progress. One thread feeds it; any thread may ask about the audio so far.

    An answer equals that for a recording that ends at the last sample fed. The object holds KV pages until it is
    finished, closed, left as a `with` block, or dropped.

    source: a short name for display; warnings: defects of the audio. The feeding thread may set both; answers and the
    finished context report them.
    """

    def __init__(self, responder: Responder, system: str | None, salt: bytes = b""):
        """salt: of the requests that process the audio, see `Request`."""
        self._responder = responder
        self._salt = salt
        self._system = system
        self._lock = threading.Lock()
        self._audio = AudioStream(responder.network.config.max_audio_seconds)
        self._fingerprint = Fingerprint()
        self._heard = 0  # samples of the windows in the prefix
        self._windows = 0
        self._complete: list[np.ndarray] = []  # windows that are not in the prefix yet
        self._prefix: Prefix | None = None
        self._ended: str | None = None  # why it no longer accepts audio or questions
        self.source = "<live>"
        self.warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Length of the audio fed."""
        return self._audio.samples / SAMPLE_RATE

    @property
    def ended(self) -> bool:
        """Whether it has been finished or closed."""
        return self._ended is not None

    def feed(self, pcm: Array, rate: int | float) -> None:
        """Append a piece of any size: an array that `load_audio` takes, with more samples than channels.

        Returns when the windows that it completes have been processed. Raises AudioError, AudioTooLongError beyond the
        model's limit (the piece is then not appended), and AfnextError after `finish` or `close`.
        """
        with self._lock:
            self._check_open()
            with self._changing():
                self._audio.feed(pcm, rate)
                self._complete += self._audio.take_windows()
            self._hear_complete()

    def finish(self) -> Context:
        """Process the rest, end the recording, and return the same context as `Model.listen` of the whole recording.

        Raises AudioError if there is no audio yet, and AfnextError after `finish` or `close`. If processing fails, the
        recording stays open.
        """
        with self._lock:
            self._check_open()
            with self._changing():
                self._audio.finish()
                self._complete += self._audio.take_windows()
            self._hear_complete()
            recordings = self._recordings()
            ids = prefix_ids(self._responder, self._system, recordings)
            prefix = self._prefix
            if prefix is None or prefix.token_ids != ids:
                audio = self._rest(conversation_prompt(self._responder, self._system, recordings, asked("?")))
                prefix = self._responder.engine.listen(
                    Request(ids, audio, sampling=None, prefix=prefix, salt=self._salt)
                )
            for window in self._audio.open_windows():
                self._fingerprint.add(window)
            self._fingerprint.end(self._audio.samples)
            self._end("the live recording has been finished; ask the context that finish() returned")
            return Context(self._responder, self._system, recordings, prefix, str(self._fingerprint))

    def close(self) -> None:
        """See `Listening`."""
        with self._lock:
            self._end("the live recording has been closed; listen again")

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self._prefix = None
        self._complete = []

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """End the recording if the block is interrupted, by Ctrl-C for example, because answers would miss some
        audio."""
        self._ended = "the live recording was interrupted while a piece was appended; listen again"
        try:
            yield
        except (AfnextError, TypeError, ValueError):  # raised by the checks of a piece, before any change
            self._ended = None
            raise
        self._ended = None

    def _check_open(self) -> None:
        if self._ended is not None:
            raise AfnextError(self._ended)

    def _recordings(self) -> tuple[Recording, ...]:
        if audio_token_count(self._audio.samples) == 0:
            problem = "".join(f" ({warning})" for warning in self.warnings)
            raise AudioError(
                f"nothing has been heard yet{problem}; the model needs more than 20 ms of audio. Feed some first."
            )
        return (Recording(self.source, self._audio.samples, warnings=self.warnings),)

    def _hear_complete(self) -> None:
        """Add complete windows to the prefix. If that fails they are kept and processed with the next ones."""
        windows = self._complete
        if not windows:
            return
        samples = self._heard + sum(map(len, windows))
        recordings = (Recording(self.source, samples),)
        prompt = conversation_prompt(self._responder, self._system, recordings, asked("?"))
        ids = prompt.token_ids[: prompt.audio[0].position + audio_token_count(samples)]
        request = Request(ids, self._inputs(prompt, windows), sampling=None, prefix=self._prefix, salt=self._salt)
        prefix = self._responder.engine.listen(request)
        with self._changing():
            self._prefix, self._complete = prefix, []
            self._heard, self._windows = samples, self._windows + len(windows)
            for window in windows:
                self._fingerprint.add(window)

    def _rest(self, prompt: Prompt) -> tuple[AudioInput, ...]:
        """All audio after the windows in the prefix."""
        return self._inputs(prompt, [*self._complete, *self._audio.open_windows()])

    def _inputs(self, prompt: Prompt, windows: list[np.ndarray]) -> tuple[AudioInput, ...]:
        """Windows after those in the prefix."""
        position = prompt.audio[0].position + audio_token_count(self._heard)
        return (AudioInput(position, tuple(torch.from_numpy(window) for window in windows), first=self._windows),)

    def _conversation(self, messages: Sequence[Message], options: QuestionOptions) -> Conversation:
        check_options(options, QuestionOptions)
        timings = Timings()
        with self._lock:
            self._check_open()
            recordings = self._recordings()
            prompt = conversation_prompt(self._responder, self._system, recordings, messages, self._prefix)
            return Conversation(recordings, prompt, self._rest(prompt), timings, self._prefix)
