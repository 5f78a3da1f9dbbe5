"""Conversations to engine requests: load the audio, build the prompt, and read the answer back from its tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.log_mel import SAMPLE_RATE
from ..engine.generate import FinishReason, Request
from ..engine.prefill import AudioInput
from ..engine.sampler import SamplingParams
from ..engine.timings import Timings
from ..errors import AudioError, PromptError
from ..io.audio import Audio, AudioSource, load_audio, windows
from ..io.prompt import Prompt, PromptTemplate, build_prompt
from ..io.stop_strings import StopStrings
from ..io.tokenizer import StreamDecoder, Tokenizer
from ..io.transcript import ThinkingSplitter
from ..model.encoder import audio_token_count
from .answer import Answer, Piece, Usage

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation on its way through the model: its audio, its prompt, and the clock that started with it."""

    audio: tuple[Audio, ...]
    prompt: Prompt
    timings: Timings

    @classmethod
    def load(
        cls,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        max_audio_seconds: float,
        truncate: bool,
    ) -> "Conversation":
        """Read every audio of the messages and build the prompt.

        An audio part is {"type": "audio", "audio": source} with a source that `load_audio` takes ("path" is accepted
        for "audio"). Raises AudioError or PromptError.
        """
        timings = Timings()
        with timings.measure("load_audio", torch.device("cpu")):
            audio = tuple(
                _audible(load_audio(source, max_seconds=max_audio_seconds, truncate=truncate))
                for source in _audio_sources(messages)
            )
        counts = [audio_token_count(len(recording.samples)) for recording in audio]
        return cls(audio, build_prompt(messages, counts, tokenizer, template), timings)

    def request(self, sampling: SamplingParams) -> Request:
        """The engine's view of the conversation."""
        inputs = tuple(
            AudioInput(span.position, tuple(torch.from_numpy(window) for window in windows(recording.samples)))
            for span, recording in zip(self.prompt.audio, self.audio, strict=True)
        )
        return Request(self.prompt.token_ids, inputs, sampling, self.timings)

    def usage(self, new_tokens: int) -> Usage:
        """What the conversation and an answer of `new_tokens` tokens consumed."""
        return Usage(
            audio_seconds=sum(recording.duration for recording in self.audio),
            truncated=any(recording.truncated for recording in self.audio),
            windows=sum(len(windows(recording.samples)) for recording in self.audio),
            audio_tokens=self.prompt.audio_tokens,
            text_tokens=self.prompt.text_tokens,
            new_tokens=new_tokens,
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


def _audible(audio: Audio) -> Audio:
    if audio_token_count(len(audio.samples)) == 0:
        milliseconds = 1000 * len(audio.samples) / SAMPLE_RATE
        raise AudioError(
            f"{audio.source} holds {milliseconds:.0f} ms of audio; the model needs more than 20 ms. "
            "Give a longer recording, or ask without audio."
        )
    return audio


class AnswerReader:
    """Turns the tokens of one answer into pieces of text, and at the end into an Answer."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, stop: Sequence[str]):
        self._conversation = conversation
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopStrings(stop)
        self._splitter = ThinkingSplitter(opened=conversation.prompt.opens_thinking)
        self._text = {"thinking": "", "answer": ""}

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been reached."""
        return self._stop.reached

    def push(self, token: int) -> list[Piece]:
        """The text that the next token completes."""
        return self._split(self._stop.push(self._decoder.push(token)))

    def finish(self, tokens: list[int], finish_reason: FinishReason) -> tuple[list[Piece], Answer]:
        """The rest of the text, and the whole answer."""
        pieces = self._split(self._stop.push(self._decoder.finish()) + self._stop.finish())
        pieces += self._pieces(self._splitter.finish())
        audio = self._conversation.audio
        answer = Answer(
            text=self._text["answer"],
            thinking=self._text["thinking"] if self._splitter.thought else None,
            usage=self._conversation.usage(len(tokens)),
            timings=self._conversation.timings,
            finish_reason=finish_reason,
            token_ids=tokens,
            warnings=tuple(f"{recording.source}: {text}" for recording in audio for text in recording.warnings),
        )
        return pieces, answer

    def _split(self, text: str) -> list[Piece]:
        return self._pieces(self._splitter.push(text))

    def _pieces(self, parts: Sequence[tuple[str, str]]) -> list[Piece]:
        for part, text in parts:
            self._text[part] += text
        return [Piece(text, thinking=part == "thinking") for part, text in parts]
