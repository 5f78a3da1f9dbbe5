"""Listening while it is being recorded: each window is heard as it completes, so a question waits for the open one."""

import threading

import numpy as np
import torch

from ...kernels.log_mel import SAMPLE_RATE
from ..engine.prefill import AudioInput
from ..engine.prefix import Prefix
from ..engine.request import Request
from ..engine.timings import Timings
from ..errors import AudioError
from ..io.audio import Array
from ..io.audio_stream import AudioStream
from ..io.prompt import Prompt
from ..model.encoder import audio_token_count
from .context import Context, Fingerprint, Listening, prefix_ids, question_prompt
from .conversation import Conversation, Recording
from .responder import QuestionOptions, Responder, check_options


class Live(Listening):
    """A recording that goes on. Feed it pieces from one thread, ask about what has been heard so far from any.

    Answers are those about a recording that ends where the feeding stands. It holds memory for its tokens until it is
    closed, left as a `with` block, or dropped.
    """

    def __init__(self, responder: Responder, system: str | None):
        self._responder = responder
        self._system = system
        self._lock = threading.Lock()
        self._audio = AudioStream(responder.network.config.max_audio_seconds)
        self._fingerprint = Fingerprint()
        self._heard = 0  # samples of the windows in the prefix
        self._windows = 0
        self._complete: list[np.ndarray] = []  # windows that are not in the prefix yet
        self._prefix: Prefix | None = None

    @property
    def seconds(self) -> float:
        """Length of what has been fed."""
        return self._audio.samples / SAMPLE_RATE

    def feed(self, pcm: Array, rate: int | float) -> None:
        """Take in a piece of any size, as `load_audio` takes arrays; of several channels, longer than they are many.

        Returns once the windows that it completes have been heard. Raises AudioError, and AudioTooLongError beyond what
        the model can hear, which leaves everything as it was.
        """
        with self._lock:
            self._audio.feed(pcm, rate)
            self._hear_complete()

    def finish(self) -> Context:
        """Hear the rest, end the recording, and return what `Model.listen` of the whole would."""
        with self._lock:
            self._audio.finish()
            self._hear_complete()
            recordings = self._recordings()
            ids = prefix_ids(self._responder, self._system, recordings)
            prefix = self._prefix
            if prefix is None or prefix.token_ids != ids:
                audio = self._rest(question_prompt(self._responder, self._system, recordings, "?"))
                prefix = self._responder.engine.listen(Request(ids, audio, sampling=None, prefix=prefix))
            for window in self._audio.open_windows():
                self._fingerprint.add(window)
            self._fingerprint.end(self._audio.samples)
            self._prefix = None
            return Context(self._responder, self._system, recordings, prefix, str(self._fingerprint))

    def close(self) -> None:
        """See `Listening`."""
        with self._lock:
            self._prefix = None

    def _recordings(self) -> tuple[Recording, ...]:
        if audio_token_count(self._audio.samples) == 0:
            raise AudioError("nothing has been heard yet; the model needs more than 20 ms of audio. Feed some first.")
        return (Recording("<live>", self._audio.samples),)

    def _hear_complete(self) -> None:
        """Add complete windows to the prefix. Where that fails they stay, to be heard with what follows."""
        self._complete += self._audio.take_windows()
        windows = self._complete
        if not windows:
            return
        samples = self._heard + sum(map(len, windows))
        prompt = question_prompt(self._responder, self._system, (Recording("<live>", samples),), "?")
        ids = prompt.token_ids[: prompt.audio[0].position + audio_token_count(samples)]
        request = Request(ids, self._inputs(prompt, windows), sampling=None, prefix=self._prefix)
        self._prefix = self._responder.engine.listen(request)
        self._heard, self._windows, self._complete = samples, self._windows + len(windows), []
        for window in windows:
            self._fingerprint.add(window)

    def _rest(self, prompt: Prompt) -> tuple[AudioInput, ...]:
        """All that follows the windows in the prefix."""
        return self._inputs(prompt, [*self._complete, *self._audio.open_windows()])

    def _inputs(self, prompt: Prompt, windows: list[np.ndarray]) -> tuple[AudioInput, ...]:
        """Windows that follow those in the prefix."""
        position = prompt.audio[0].position + audio_token_count(self._heard)
        return (AudioInput(position, tuple(torch.from_numpy(window) for window in windows), first=self._windows),)

    def _conversation(self, question: str, options: QuestionOptions) -> Conversation:
        check_options(options, QuestionOptions)
        timings = Timings()
        with self._lock:
            recordings = self._recordings()
            prompt = question_prompt(self._responder, self._system, recordings, question)
            return Conversation(recordings, prompt, self._rest(prompt), timings, self._prefix)
