"""Converts conversations to engine requests: loads the audio, builds the prompt, and decodes the answer's tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ..engine.prefill import AudioInput
from ..engine.prefix import Prefix
from ..engine.request import FinishReason, Request, SequenceState
from ..engine.sampler import SamplingParams
from ..engine.timings import Timings
from ..errors import AudioError, PromptError
from ..io.audio import Audio, AudioSource, load_audio
from ..io.prompt import Prompt, PromptTemplate, build_prompt
from ..io.stop_strings import StopStrings
from ..io.tokenizer import StreamDecoder, Tokenizer
from ..io.transcript import ThinkingSplitter
from ..model.encoder import audio_token_count
from .answer import Answer, Piece, Usage
from .early_prefill import Early, EarlyPrefill, abandon

Message = Mapping[str, Any]
MAX_RECORDINGS = 1000


@dataclass(frozen=True)
class Recording:
    """One audio in an answer's report: its short name, its length in samples at 16 kHz, its warnings."""

    source: str
    samples: int
    truncated: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, audio: Audio) -> "Recording":
        """The `Recording` of an `Audio`."""
        return cls(audio.source, len(audio.samples), audio.truncated, audio.warnings)

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / SAMPLE_RATE

    @property
    def tokens(self) -> int:
        """Number of audio tokens."""
        return audio_token_count(self.samples)

    @property
    def windows(self) -> int:
        """Number of windows of 30 s, including a shorter last one."""
        return -(-self.samples // WINDOW_SAMPLES)


@dataclass(frozen=True)
class Conversation:
    """A conversation in progress: its recordings, its prompt, and its timings.

    audio: the waveforms of audio after `prefix`, the part of the prompt that is already computed. beginning: what has
    been computed while the audio was decoded, see `Request`.
    """

    recordings: tuple[Recording, ...]
    prompt: Prompt
    audio: tuple[AudioInput, ...]
    timings: Timings
    prefix: Prefix | None = None
    beginning: SequenceState | None = None

    @classmethod
    def load(
        cls,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        max_audio_seconds: float,
        truncate: bool,
        early: Early | None = None,
    ) -> "Conversation":
        """Read every audio of the messages and build the prompt.

        An audio part is {"type": "audio", "audio": source} with a source that `load_audio` accepts ("path" may replace
        "audio"). early: where to compute the prompt's beginning meanwhile. Raises AudioError or PromptError.
        """
        timings = Timings()
        sources = list(islice(_audio_sources(messages), MAX_RECORDINGS + 1))
        if len(sources) > MAX_RECORDINGS:
            raise PromptError(
                f"a conversation has at most {MAX_RECORDINGS:,} recordings; this one has more. Ask in parts."
            )

        def build(audio_tokens: list[int]) -> Prompt:
            return build_prompt(messages, audio_tokens, tokenizer, template)

        with EarlyPrefill(early, build, len(sources), timings) as ahead:
            with timings.measure("load_audio", torch.device("cpu")):
                audio = [
                    load_audible(source, max_seconds=max_audio_seconds, truncate=truncate, ahead=ahead)
                    for source in sources
                ]
            recordings = tuple(Recording.of(recording) for recording in audio)
            prompt = build([recording.tokens for recording in recordings])
            return cls(recordings, prompt, ahead.inputs(prompt), timings, beginning=ahead.beginning(prompt.token_ids))

    def request(self, sampling: SamplingParams, **how: Any) -> Request:
        """The engine's request. how: further fields of `Request`."""
        ids = self.prompt.token_ids
        return Request(
            ids, self.audio, sampling, prefix=self.prefix, beginning=self.beginning, timings=self.timings, **how
        )

    def abandon(self) -> None:
        """Release what has been computed early, as there will be no request."""
        if self.beginning is not None:
            abandon(self.beginning)

    def usage(self, new_tokens: int, cached_tokens: int, thinking_tokens: int) -> Usage:
        """The usage of the conversation with an answer of `new_tokens` tokens."""
        return Usage(
            audio_seconds=sum(recording.seconds for recording in self.recordings),
            truncated=any(recording.truncated for recording in self.recordings),
            windows=sum(recording.windows for recording in self.recordings),
            audio_tokens=self.prompt.audio_tokens,
            text_tokens=self.prompt.text_tokens,
            cached_tokens=cached_tokens,
            new_tokens=new_tokens,
            thinking_tokens=thinking_tokens,
        )


def _audio_sources(messages: Sequence[Message]) -> Iterator[AudioSource]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type") == "audio":
                source = part.get("audio", part.get("path"))
                if source is None:
                    raise PromptError('an audio part needs its recording: {"type": "audio", "audio": "clip.wav"}')
                yield source


def load_audible(
    source: AudioSource, *, max_seconds: float, truncate: bool, ahead: EarlyPrefill | None = None
) -> Audio:
    """`load_audio` for a recording of at least one token, the next one of `ahead`. Raises AudioError for a shorter
    one."""
    on_window = None if ahead is None else ahead.heard
    audio = load_audio(source, max_seconds=max_seconds, truncate=truncate, on_window=on_window)
    if audio_token_count(len(audio.samples)) == 0:
        milliseconds = 1000 * len(audio.samples) / SAMPLE_RATE
        raise AudioError(
            f"{audio.source} holds {milliseconds:.0f} ms of audio; the model needs more than 20 ms. "
            "Give a longer recording, or ask without audio."
        )
    if ahead is not None:
        ahead.end(audio.samples)
    return audio


class AnswerReader:
    """Converts the tokens of one answer to pieces of text, and at the end to an Answer."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        max_answer_tokens: int | None = None,
    ):
        """stop, max_answer_tokens: see `QuestionOptions`."""
        self._conversation = conversation
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopStrings(stop)
        self._splitter = ThinkingSplitter(opened=conversation.prompt.opens_thinking)
        self._text = {"thinking": "", "answer": ""}
        self._tokens: list[int] = []
        self._thinking_tokens = 0
        self._max_answer_tokens = max_answer_tokens

    @property
    def ended(self) -> FinishReason | None:
        """Why the answer ends here, whatever tokens follow (a stop string or max_answer_tokens), or None."""
        if self._stop.reached:
            return "stop"
        limit = self._max_answer_tokens
        return "length" if limit is not None and len(self._tokens) - self._thinking_tokens >= limit else None

    def push(self, token: int) -> list[Piece]:
        """The text completed by the next token."""
        self._tokens.append(token)
        answering = self._splitter.answering
        pieces = self._split(self._stop.push(self._decoder.push(token)))
        if self._splitter.thought and not answering:
            self._thinking_tokens = len(self._tokens)
        return pieces

    def finish(self, sequence: SequenceState) -> tuple[list[Piece], Answer]:
        """The rest of the text, and the whole answer."""
        pieces = self._split(self._stop.push(self._decoder.finish()) + self._stop.finish())
        pieces += self._pieces(self._splitter.finish())
        recordings = self._conversation.recordings
        answer = Answer(
            text=self._text["answer"],
            thinking=self._text["thinking"] if self._splitter.thought else None,
            usage=self._conversation.usage(len(self._tokens), sequence.cached, self._thinking_tokens),
            timings=self._conversation.timings,
            finish_reason=self._finish_reason(sequence),
            token_ids=self._tokens,
            repetition=sequence.guard.found,
            warnings=tuple(f"{recording.source}: {text}" for recording in recordings for text in recording.warnings),
        )
        return pieces, answer

    def _finish_reason(self, sequence: SequenceState) -> FinishReason:
        # The engine may have decoded past the token at which the reader stopped, or even ended.
        if self.ended is not None and (self._stop.reached or len(sequence.tokens) > len(self._tokens)):
            return self.ended
        return sequence.finish_reason or "cancelled"

    def _split(self, text: str) -> list[Piece]:
        return self._pieces(self._splitter.push(text))

    def _pieces(self, parts: Sequence[tuple[str, str]]) -> list[Piece]:
        for part, text in parts:
            self._text[part] += text
        return [Piece(text, thinking=part == "thinking") for part, text in parts]
