"""Listen once, ask many: the keys and values of a recording are kept, and conversations about it reuse them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.audio_format import SAMPLE_RATE
from ..engine.prefix import Prefix
from ..engine.prefix_file import SavedPrefix
from ..engine.request import OnUpdate, Request
from ..engine.timings import Timings
from ..errors import ContextFileError, PromptError
from ..files import output_file, parse_json_object
from ..io.audio import MAX_SECONDS, Audio, AudioSource
from ..io.prompt import Prompt, build_prompt
from .answer import Answer
from .conversation import Conversation, Message, Recording
from .early_prefill import EarlyPrefill
from .lifetime import NotCopyable
from .responder import Prepared, Progress, QuestionOptions, Responder, Stream, check_options

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

MAX_SAMPLES = round(MAX_SECONDS * SAMPLE_RATE)


class Listening(NotCopyable, ABC):
    """Audio that has been, or is being, processed. It answers questions until it is closed or its `with` block ends."""

    _responder: Responder

    def ask(self, question: str, **options: "Unpack[QuestionOptions]") -> Answer:
        """Answer a question about the audio so far, independently of earlier questions.

        Raises PromptError, ContextLengthError or SamplingError, AudioError if there is no audio yet, and AfnextError
        after `close`.
        """
        return self.chat(asked(question), **options)

    def stream(self, question: str, **options: "Unpack[QuestionOptions]") -> Stream:
        """Like `ask`, but yields the answer piece by piece."""
        return self.stream_chat(asked(question), **options)

    def chat(self, messages: Sequence[Message], **options: "Unpack[QuestionOptions]") -> Answer:
        """Continue a conversation about the audio so far.

        messages: user and assistant turns as in `Model.chat`, without audio. The first one is the user's; the
        recordings are placed before its text. The answer equals that of `Model.chat` for the whole conversation. Raises
        the errors of `ask`, and PromptError for other messages.
        """
        return self._responder.chat([self._conversation(messages, options)], options)[0]

    def stream_chat(self, messages: Sequence[Message], **options: "Unpack[QuestionOptions]") -> Stream:
        """Like `chat`, but yields the answer piece by piece."""
        return self._responder.stream(self._conversation(messages, options), options)

    def prepare(self, messages: Sequence[Message], options: QuestionOptions, on_update: OnUpdate) -> Prepared:
        """The engine's request for a conversation; `on_update` notifies the caller. For `AsyncListening`."""
        return self._responder.prepare(self._conversation(messages, options), options, on_update=on_update)

    def _instead(self) -> str:
        return "it holds keys and values in the model's cache. Share it between threads, or save a Context to a file."

    @abstractmethod
    def close(self) -> None:
        """Release the memory. Answers in progress are completed."""

    @abstractmethod
    def _conversation(self, messages: Sequence[Message], options: QuestionOptions) -> Conversation:
        """The conversation about the audio so far, with the computed prefix."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Context(Listening):
    """Recordings that have been processed. Questions, also from several threads, share the computed prefix.

    It holds KV pages for its tokens until it is closed, left as a `with` block, or dropped.
    """

    def __init__(
        self, responder: Responder, system: str | None, recordings: tuple[Recording, ...], prefix: Prefix, audio: str
    ):
        """prefix: of the prompt with `system` and `recordings`; audio: the fingerprint of the audio."""
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
        salt: bytes = b"",
        truncate: bool,
        progress: Progress | None,
        cancelled: Callable[[], bool],
    ) -> "Context":
        """Load, encode and prefill the audio of `sources`; see `Model.listen`."""
        if not sources:
            raise PromptError("there is nothing to listen to; give at least one recording.")
        timings = Timings()
        turns = _turns(system, asked("?"), len(sources))

        def build(audio_tokens: list[int]) -> Prompt:
            return build_prompt(turns, audio_tokens, responder.tokenizer, responder.template)

        early = responder.early({"salt": salt, "cancelled": cancelled})
        with EarlyPrefill(early, build, len(sources), timings) as ahead:
            with timings.measure("load_audio", torch.device("cpu")):
                audio = [responder.load_audio(source, truncate=truncate, ahead=ahead) for source in sources]
            recordings = tuple(Recording.of(recording) for recording in audio)
            ids = prefix_ids(responder, system, recordings)
            report = progress or (lambda stage, done, total: None)
            request = Request(
                ids,
                ahead.inputs(build([recording.tokens for recording in recordings])),
                sampling=None,
                beginning=ahead.beginning(ids),
                salt=salt,
                cancelled=cancelled,
                progress=lambda done, total: report("listening", done, total),
                timings=timings,
            )
            prefix = responder.engine.listen(request)
        return cls(responder, system, recordings, prefix, _fingerprint(audio))

    @classmethod
    def resume(cls, responder: Responder, path: Path, sources: Sequence[AudioSource] | None) -> "Context":
        """Load a context that `save` wrote; see `Model.resume`."""
        with closing(responder.engine.saved(path)) as saved:
            try:
                system, recordings = _checked(responder, saved, path, sources)
            except (ContextFileError, PromptError):
                saved.verify()  # report damage rather than a mismatch
                raise
            return cls(responder, system, recordings, responder.engine.load(saved), saved.metadata.get("audio", ""))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the context to a safetensors file that `Model.resume` loads into the same model.

        The file holds the system message, the recordings' names and lengths, and the keys and values, not the audio.
        Other requests continue meanwhile. Raises ContextFileError when the file cannot be written, or when `path` is
        neither new nor a regular file.
        """
        recordings = [
            {**asdict(each), "source": _text(each.source), "warnings": [_text(warning) for warning in each.warnings]}
            for each in self._recordings
        ]
        conversation = {"system": self._system, "recordings": recordings}
        extra = {"audio": self._audio, "conversation": json.dumps(conversation)}
        with output_file(Path(path), ContextFileError) as file:
            self._responder.engine.save(self._prefix, file, extra)

    @property
    def fingerprint(self) -> str:
        """A hash of the samples of all recordings in order."""
        return self._audio

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """The name, length and warnings of each recording."""
        return self._recordings

    @property
    def tokens(self) -> int:
        """Tokens of the prefix: the system message, and the audio with the text around it."""
        return len(self._prefix.token_ids)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return sum(recording.seconds for recording in self._recordings)

    def close(self) -> None:
        """See `Listening`."""
        self._prefix.close()

    def _conversation(self, messages: Sequence[Message], options: QuestionOptions) -> Conversation:
        check_options(options, QuestionOptions)
        timings = Timings()
        prompt = conversation_prompt(self._responder, self._system, self._recordings, messages, self._prefix)
        return Conversation(self._recordings, prompt, (), timings, self._prefix)


def asked(question: str) -> list[Message]:
    """A conversation with one question."""
    return [{"role": "user", "content": question}]


def conversation_prompt(
    responder: Responder,
    system: str | None,
    recordings: tuple[Recording, ...],
    messages: Sequence[Message],
    prefix: Prefix | None = None,
) -> Prompt:
    """The prompt of a conversation about recordings.

    Raises PromptError for messages that `Listening.chat` does not accept, and if the prompt does not begin with
    `prefix`.
    """
    turns = _turns(system, messages, len(recordings))
    prompt = build_prompt(turns, [r.tokens for r in recordings], responder.tokenizer, responder.template)
    if prefix is not None and prompt.token_ids[: len(prefix.token_ids)] != prefix.token_ids:
        raise PromptError("this checkpoint's chat template changes the first turn in a longer conversation; use chat.")
    return prompt


def _turns(system: str | None, messages: Sequence[Message], recordings: int) -> list[Message]:
    """The whole conversation about recordings. Raises PromptError, see `conversation_prompt`."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return turns + _with_audio(messages, recordings)


def _with_audio(messages: Sequence[Message], recordings: int) -> list[Message]:
    """The messages with the recordings placed before the text of the first one."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise PromptError('messages are a list of {"role": "user" or "assistant", "content": ...}.')
    if not messages or messages[0].get("role") != "user":
        raise PromptError("the first message about a recording is the user's; the audio belongs to it.")
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else ()
        if any(isinstance(part, Mapping) and part.get("type") == "audio" for part in parts):
            raise PromptError("the audio is already in the context; leave it out of the messages.")
        if message.get("role") == "system":
            raise PromptError("the system message comes before the audio; give it to listen.")
    first, *later = messages
    content = first.get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(text, list | tuple) or not text:
        raise PromptError("the first message has no content. Give a string or a list of text parts.")
    return [{**first, "content": [*({"type": "audio"} for _ in range(recordings)), *text]}, *later]


def prefix_ids(responder: Responder, system: str | None, recordings: tuple[Recording, ...]) -> list[int]:
    """The prompt up to the end of the last audio. Raises PromptError if the template puts the question before it."""
    one, other = (conversation_prompt(responder, system, recordings, asked(text)) for text in ("What?", "Who is it?"))
    end = one.audio[-1].position + one.audio[-1].tokens + (responder.tokenizer.audio_eos_id is not None)
    if one.token_ids[:end] != other.token_ids[:end]:
        raise PromptError("this checkpoint's chat template puts the question before the audio; use ask or chat.")
    return one.token_ids[:end]


class Fingerprint:
    """A hash of the samples of all recordings in order."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=32)

    def add(self, samples: np.ndarray) -> None:
        """Add the next samples of the recording."""
        self._digest.update(samples.tobytes())

    def end(self, samples: int) -> None:
        """End a recording that has `samples` samples."""
        self._digest.update(samples.to_bytes(8, "little"))

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _fingerprint(audio: Sequence[Audio]) -> str:
    fingerprint = Fingerprint()
    for recording in audio:
        fingerprint.add(recording.samples)
        fingerprint.end(len(recording.samples))
    return str(fingerprint)


def _checked(
    responder: Responder, saved: SavedPrefix, path: Path, sources: Sequence[AudioSource] | None
) -> tuple[str | None, tuple[Recording, ...]]:
    """The system message and recordings of a file. Raises ContextFileError if it was saved from other audio than
    `sources`, or if its tokens differ from their prompt."""
    if sources is not None:
        audio = [responder.load_audio(source, truncate=True) for source in sources]
        if _fingerprint(audio) != saved.metadata.get("audio"):
            raise ContextFileError(f"{path} was saved from other audio than the one given; listen to that.")
    system, recordings = _described(saved.metadata.get("conversation", ""), path)
    if prefix_ids(responder, system, recordings) != saved.token_ids:
        raise ContextFileError(
            f"{path} was saved with another tokenizer or chat template than those of this checkpoint; listen again."
        )
    return system, recordings


def _text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


def _described(text: str, path: Path) -> tuple[str | None, tuple[Recording, ...]]:
    """The system message and recordings that a file describes. Raises ContextFileError if it is not valid."""
    problem = f"{path} has no valid description; listen and save again."
    values = parse_json_object(text.encode(errors="surrogatepass"), str(path), ContextFileError)
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
