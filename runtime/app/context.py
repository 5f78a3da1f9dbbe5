"""Listen once, ask many: a recording heard and kept as keys and values, which every question about it begins with."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.log_mel import SAMPLE_RATE
from ..engine.prefix import Prefix
from ..engine.request import Request
from ..engine.timings import Timings
from ..errors import ContextFileError, PromptError
from ..files import parse_json_object
from ..io.audio import MAX_SECONDS, Audio, AudioSource
from ..io.prompt import Prompt, build_prompt
from .answer import Answer
from .conversation import Conversation, Message, Recording, audio_inputs
from .responder import Progress, QuestionOptions, Responder, Stream, check_options

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

MAX_SAMPLES = round(MAX_SECONDS * SAMPLE_RATE)


class Listening(ABC):
    """Something heard, or being heard, that answers questions until it is closed or left as a `with` block."""

    _responder: Responder

    def ask(self, question: str, **options: "Unpack[QuestionOptions]") -> Answer:
        """Answer a question about what has been heard. Each is answered by itself, without those before it.

        Raises PromptError, ContextLengthError or SamplingError, AudioError while nothing has been heard, and
        AfnextError once it is closed.
        """
        return self._responder.chat([self._conversation(question, options)], options)[0]

    def stream(self, question: str, **options: "Unpack[QuestionOptions]") -> Stream:
        """Like `ask`, but gives the answer piece by piece."""
        return self._responder.stream(self._conversation(question, options), options)

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Answers on their way go on to their end."""

    @abstractmethod
    def _conversation(self, question: str, options: QuestionOptions) -> Conversation:
        """The conversation that the question begins, on what is there to share."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Context(Listening):
    """Recordings that have been heard. Questions share the computed prefix, also when asked from several threads.

    It holds memory for its tokens until it is closed, left as a `with` block, or dropped.
    """

    def __init__(
        self, responder: Responder, system: str | None, recordings: tuple[Recording, ...], prefix: Prefix, audio: str
    ):
        """prefix: of the prompt that `system` and `recordings` begin; audio: the fingerprint of what was heard."""
        self._responder = responder
        self._system = system
        self._recordings = recordings
        self._prefix = prefix
        self._audio = audio

    @classmethod
    def listen(
        cls,
        responder: Responder,
        sources: Sequence[AudioSource],
        system: str | None,
        *,
        truncate: bool,
        progress: Progress | None,
        cancelled: Callable[[], bool],
    ) -> "Context":
        """Hear the audio of `sources`; see `Model.listen`."""
        if not sources:
            raise PromptError("there is nothing to listen to; give at least one recording.")
        timings = Timings()
        with timings.measure("load_audio", torch.device("cpu")):
            audio = [responder.load_audio(source, truncate=truncate) for source in sources]
        recordings = tuple(Recording.of(recording) for recording in audio)
        prompt = question_prompt(responder, system, recordings, "?")
        ids = prefix_ids(responder, system, recordings)
        report = progress or (lambda stage, done, total: None)
        request = Request(
            ids,
            audio_inputs(prompt, audio),
            sampling=None,
            cancelled=cancelled,
            progress=lambda done, total: report("listening", done, total),
            timings=timings,
        )
        prefix = responder.engine.listen(request)
        return cls(responder, system, recordings, prefix, _fingerprint(audio))

    @classmethod
    def resume(cls, responder: Responder, path: Path, sources: Sequence[AudioSource] | None) -> "Context":
        """Take up a context that `save` wrote; see `Model.resume`."""
        saved = responder.engine.saved(path)
        if sources is not None:
            audio = [responder.load_audio(source, truncate=True) for source in sources]
            if _fingerprint(audio) != saved.metadata.get("audio"):
                raise ContextFileError(f"{path} was saved from other audio than the one given; listen to that.")
        system, recordings = _described(saved.metadata.get("conversation", ""), path)
        if prefix_ids(responder, system, recordings) != saved.token_ids:
            raise ContextFileError(
                f"{path} was saved with another tokenizer or chat template than those of this checkpoint; listen again."
            )
        return cls(responder, system, recordings, responder.engine.load(saved), saved.metadata.get("audio", ""))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the context to a safetensors file, to be taken up with `Model.resume` by the same model.

        It holds the system message, names and lengths of the recordings, and keys and values: not the audio itself, but
        what the model made of it. Raises ContextFileError when the file cannot be written.
        """
        conversation = {"system": self._system, "recordings": [asdict(recording) for recording in self._recordings]}
        extra = {"audio": self._audio, "conversation": json.dumps(conversation)}
        self._responder.engine.save(self._prefix, Path(path), extra)

    @property
    def tokens(self) -> int:
        """Tokens of the prefix: the system message, and the audio with what stands around it."""
        return len(self._prefix.token_ids)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return sum(recording.seconds for recording in self._recordings)

    def close(self) -> None:
        """See `Listening`."""
        self._prefix.close()

    def _conversation(self, question: str, options: QuestionOptions) -> Conversation:
        check_options(options, QuestionOptions)
        timings = Timings()
        prompt = question_prompt(self._responder, self._system, self._recordings, question)
        return Conversation(self._recordings, prompt, (), timings, self._prefix)


def question_prompt(
    responder: Responder, system: str | None, recordings: tuple[Recording, ...], question: str
) -> Prompt:
    """The prompt of a question about recordings."""
    parts = [*({"type": "audio"} for _ in recordings), {"type": "text", "text": question}]
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": parts})
    return build_prompt(messages, [r.tokens for r in recordings], responder.tokenizer, responder.template)


def prefix_ids(responder: Responder, system: str | None, recordings: tuple[Recording, ...]) -> list[int]:
    """The prompt up to the end of the last audio. Raises PromptError where a template lets the question precede it."""
    one, other = (question_prompt(responder, system, recordings, text) for text in ("What?", "Who is it?"))
    end = one.audio[-1].position + one.audio[-1].tokens + (responder.tokenizer.audio_eos_id is not None)
    if one.token_ids[:end] != other.token_ids[:end]:
        raise PromptError("this checkpoint's chat template puts the question before the audio; use ask or chat.")
    return one.token_ids[:end]


class Fingerprint:
    """A hash of the samples that were heard, recording by recording."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=32)

    def add(self, samples: np.ndarray) -> None:
        """Go on with the samples that follow in this recording."""
        self._digest.update(samples.tobytes())

    def end(self, samples: int) -> None:
        """End a recording of so many samples."""
        self._digest.update(samples.to_bytes(8, "little"))

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _fingerprint(audio: Sequence[Audio]) -> str:
    fingerprint = Fingerprint()
    for recording in audio:
        fingerprint.add(recording.samples)
        fingerprint.end(len(recording.samples))
    return str(fingerprint)


def _described(text: str, path: Path) -> tuple[str | None, tuple[Recording, ...]]:
    """The system message and recordings that a file describes. Raises ContextFileError unless they are sound."""
    problem = f"{path} does not say what it holds; listen and save again."
    values = parse_json_object(text.encode(), str(path), ContextFileError)
    system, entries = values.get("system"), values.get("recordings")
    if not isinstance(system, str | None) or not isinstance(entries, list) or not entries:
        raise ContextFileError(problem)
    recordings = []
    for entry in entries:
        kinds = {"source": str, "samples": int, "truncated": bool, "warnings": list}
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != kinds:
            raise ContextFileError(problem)
        if not 0 < entry["samples"] <= MAX_SAMPLES or not all(isinstance(text, str) for text in entry["warnings"]):
            raise ContextFileError(problem)
        recordings.append(Recording(**{**entry, "warnings": tuple(entry["warnings"])}))
    return system, tuple(recordings)
