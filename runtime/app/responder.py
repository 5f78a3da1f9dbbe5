"""From conversations to answers: sampling options, requests to the engine, and the text that comes back."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

from ..engine.request import Request
from ..engine.sampler import SamplingParams
from ..engine.scheduler import Engine
from ..io.audio import Audio, AudioSource
from ..io.prompt import PromptTemplate
from ..io.tokenizer import Tokenizer
from ..model.audio_flamingo import AudioFlamingo
from .answer import Answer, Piece
from .conversation import AnswerReader, Conversation, Message, load_audible

Progress = Callable[[str, float, float], None]
DEFAULT_NEW_TOKENS = 2048


class QuestionOptions(TypedDict, total=False):
    """Options of a question about audio that has been heard. Those of sampling default to the checkpoint's
    generation_config.json.

    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingParams`.
    stop_repetition: end an answer that says the same over and over; `Answer.repetition` reports it in any case.
    ignore_eos: go on to max_new_tokens, for measurements. stop: strings that end the answer and are left out of it.
    priority, deadline: see `Request`. progress: called with (stage, done, total). cancelled: polled between steps; once
    it returns true the answer ends with what it has.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop_repetition: bool
    ignore_eos: bool
    stop: Sequence[str]
    priority: int
    deadline: float | None
    progress: Progress
    cancelled: Callable[[], bool]


class AnswerOptions(QuestionOptions, total=False):
    """Options of `ask`, `stream` and `chat`: those of a question, and of the audio that comes with it.

    truncate: cut audio to what the model can hear instead of refusing it.
    """

    truncate: bool


def check_options(options: QuestionOptions, known: type) -> None:
    """Raise TypeError for an option that is not among those of `known`."""
    names = [name for base in reversed(known.__mro__) for name in getattr(base, "__annotations__", {})]
    if unknown := options.keys() - set(names):
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; the options are {', '.join(names)}")


class Stream(Iterator[Piece]):
    """The pieces of an answer as they come. `answer` is the whole of it once the last piece has been given out.

    Close it (or drop it) to stop early.
    """

    def __init__(self, pieces: Iterator[tuple[int, Piece]], answers: list[Answer | None]):
        self._pieces = pieces
        self._answers = answers

    @property
    def answer(self) -> Answer | None:
        """The whole answer, or None while pieces are still to come."""
        return self._answers[0]

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    def close(self) -> None:
        """Stop generating and free the memory."""
        self._pieces.close()  # type: ignore[attr-defined]


class Responder:
    """What it takes to answer conversations: an engine over a network, its tokenizer, template and defaults."""

    def __init__(
        self,
        engine: Engine,
        network: AudioFlamingo,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        sampling_defaults: dict[str, Any],
    ):
        self.engine = engine
        self.network = network
        self.tokenizer = tokenizer
        self.template = template
        self._sampling_defaults = sampling_defaults

    def load(self, messages: Sequence[Message], *, truncate: bool) -> Conversation:
        """The conversation that `messages` spell, its audio loaded. Raises AudioError or PromptError."""
        return Conversation.load(
            messages,
            self.tokenizer,
            self.template,
            max_audio_seconds=self.network.config.max_audio_seconds,
            truncate=truncate,
        )

    def load_audio(self, source: AudioSource, *, truncate: bool) -> Audio:
        """A recording that the model can hear. Raises AudioError."""
        return load_audible(source, max_seconds=self.network.config.max_audio_seconds, truncate=truncate)

    def chat(self, conversations: Sequence[Conversation], options: QuestionOptions) -> list[Answer]:
        """The answers to several conversations, in one batch."""
        answers: list[Answer | None] = [None] * len(conversations)
        for _ in self._start(conversations, answers, options):
            pass
        return [answer for answer in answers if answer is not None]

    def stream(self, conversation: Conversation, options: QuestionOptions) -> Stream:
        """The answer to one conversation, piece by piece."""
        answers: list[Answer | None] = [None]
        return Stream(self._start([conversation], answers, options), answers)

    def _start(
        self, conversations: Sequence[Conversation], answers: list[Answer | None], options: QuestionOptions
    ) -> Iterator[tuple[int, Piece]]:
        """Check everything now; what is returned generates as it is read."""
        progress = _sum_of_progress(len(conversations), options.get("progress") or (lambda stage, done, total: None))
        requests = [
            conversation.request(
                self._sampling(conversation, options),
                priority=options.get("priority", 0),
                deadline=options.get("deadline"),
                cancelled=options.get("cancelled") or (lambda: False),
                progress=report,
            )
            for conversation, report in zip(conversations, progress, strict=True)
        ]
        for request in requests:
            self.engine.check(request)
        stop = options.get("stop", ())
        readers = [AnswerReader(conversation, self.tokenizer, stop) for conversation in conversations]
        return self._read(requests, readers, answers)

    def _sampling(self, conversation: Conversation, options: QuestionOptions) -> SamplingParams:
        values = self._sampling_defaults | {
            k: v for k, v in options.items() if k in SamplingParams.__dataclass_fields__
        }
        # A default may be more than context and memory have room for; a number from the caller is checked as it is.
        room = min(self.network.config.decoder.max_positions, self.engine.room) - len(conversation.prompt.token_ids)
        if "max_new_tokens" not in options:
            values["max_new_tokens"] = max(1, min(values.get("max_new_tokens", DEFAULT_NEW_TOKENS), room))
        if not options.get("ignore_eos"):
            values["stop_token_ids"] = self.tokenizer.eos_ids
        return SamplingParams(**values)

    def _read(
        self, requests: list[Request], readers: list[AnswerReader], answers: list[Answer | None]
    ) -> Iterator[tuple[int, Piece]]:
        """Yield (conversation, piece) as text comes; fill `answers` at the end."""
        sequences = [self.engine.submit(request) for request in requests]
        for index, token in self.engine.follow(sequences):
            if readers[index].stopped:
                continue
            yield from ((index, piece) for piece in readers[index].push(token))
            if readers[index].stopped:
                self.engine.cancel(sequences[index], reason="stop")
        for index, (reader, sequence) in enumerate(zip(readers, sequences, strict=True)):
            pieces, answers[index] = reader.finish(sequence)
            yield from ((index, piece) for piece in pieces)


def _sum_of_progress(count: int, report: Progress) -> list[Callable[[int, int], None]]:
    """One callback a prompt; `report` hears of the sum over all of them."""
    done, total = [0] * count, [0] * count

    def callback(index: int) -> Callable[[int, int], None]:
        def heard(tokens: int, all_tokens: int) -> None:
            done[index], total[index] = tokens, all_tokens
            report("listening", sum(done), sum(total))

        return heard

    return [callback(index) for index in range(count)]
