"""Answers conversations: sampling options, requests to the engine, and decoding of the answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.errors import AfnextError
from ..engine.engine import Engine
from ..engine.request import Request
from ..engine.sampler import MOST_TOKENS, SamplingParams
from ..errors import SamplingError
from ..files import shown
from ..io.audio import Audio, AudioSource
from ..io.prompt import PromptTemplate
from ..io.tokenizer import Tokenizer
from ..model.audio_flamingo import AudioFlamingo
from ..model.encoder import token_count
from ..values import flag, real, whole
from .answer import Answer, Piece
from .conversation import AnswerReader, Conversation, Message, load_audible
from .early_prefill import Early, EarlyPrefill
from .generation_config import GenerationDefaults, stop_strings
from .token_kinds import token_kinds

Progress = Callable[[str, float, float], None]
DEFAULT_NEW_TOKENS = 2048
MOST_PRIORITY = 10**9
_OF_EARLY_PARTS = ("priority", "deadline", "salt", "cancelled")


class QuestionOptions(TypedDict, total=False):
    """Options of a question about processed audio. Sampling options default to the checkpoint's generation_config.json.

    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, min_new_tokens, no_repeat_ngram_size,
    suppress_tokens, begin_suppress_tokens, bad_words_ids, sequence_bias: see `SamplingParams`.
    max_answer_tokens: limit of the answer without thinking. max_new_tokens limits both; its default is the checkpoint's
    value plus max_answer_tokens.
    stop_repetition: end an answer that repeats itself; `Answer.repetition` always reports it. ignore_eos: continue to
    max_new_tokens, for measurements. stop: one or several strings that end the answer and are not part of it. priority,
    deadline, salt: see `Request`. progress: called with (stage, done, total). cancelled: polled between steps; when it
    returns true, the answer ends with its tokens so far.
    """

    max_answer_tokens: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop_repetition: bool
    ignore_eos: bool
    stop: str | Sequence[str]
    min_new_tokens: int
    no_repeat_ngram_size: int
    suppress_tokens: Sequence[int]
    begin_suppress_tokens: Sequence[int]
    bad_words_ids: Sequence[Sequence[int]]
    sequence_bias: Sequence[tuple[Sequence[int], float]]
    priority: int
    deadline: float | None
    salt: bytes
    progress: Progress
    cancelled: Callable[[], bool]


class AnswerOptions(QuestionOptions, total=False):
    """Options of `ask`, `stream` and `chat`: those of a question and of its audio.

    truncate: cut audio to the model's limit instead of raising an error.
    """

    truncate: bool


def check_options(options: QuestionOptions, known: type) -> None:
    """Raise TypeError for an option that `known` does not have, and SamplingError for a value of the wrong type.

    Sampling options are checked by `SamplingParams`.
    """
    names = [name for base in reversed(known.__mro__) for name in getattr(base, "__annotations__", {})]
    if unknown := options.keys() - set(names):
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; the options are {', '.join(names)}")
    for name, value in options.items():
        if name in ("ignore_eos", "truncate"):
            flag(name, value, SamplingError)
        elif name == "max_answer_tokens":
            whole(name, value, SamplingError, least=1, most=MOST_TOKENS)
        elif name == "priority":
            whole(name, value, SamplingError, least=-MOST_PRIORITY, most=MOST_PRIORITY)
        elif name == "deadline" and value is not None:
            real(name, value, SamplingError, "a number of seconds, or None for no deadline")
        elif name in ("progress", "cancelled") and value is not None and not callable(value):
            raise SamplingError(f"{name} is {shown(value)}; it must be a function")


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are generated. After the last piece, `answer` is the whole answer.

    Close it (or drop it) to stop early.
    """

    def __init__(self, pieces: Iterator[tuple[int, Piece]], answers: list[Answer | None]):
        self._pieces = pieces
        self._answers = answers

    @property
    def answer(self) -> Answer | None:
        """The whole answer, or None before the last piece."""
        return self._answers[0]

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    def close(self) -> None:
        """Stop generating and free the memory."""
        self._pieces.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Prepared:
    """A prepared question: the engine's request, and the reader of its answer."""

    request: Request
    reader: AnswerReader


class Responder:
    """Answers conversations with an engine over a network, its tokenizer, template and defaults."""

    def __init__(
        self,
        engine: Engine,
        network: AudioFlamingo,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        defaults: GenerationDefaults,
    ):
        self._loaded: tuple[Engine, AudioFlamingo] | None = (engine, network)
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self._token_kinds = token_kinds(tokenizer)

    @property
    def engine(self) -> Engine:
        """The engine. Raises AfnextError after `close`."""
        return self._open()[0]

    @property
    def network(self) -> AudioFlamingo:
        """The network. Raises AfnextError after `close`."""
        return self._open()[1]

    def _open(self) -> tuple[Engine, AudioFlamingo]:
        loaded = self._loaded
        if loaded is None:
            raise AfnextError("the model has been closed; load it again")
        return loaded

    def close(self) -> None:
        """Stop the engine and drop it and the network. Answers in progress are completed. Idempotent."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded[0].stop()

    def load(self, messages: Sequence[Message], options: AnswerOptions) -> Conversation:
        """The conversation in `messages`, with its audio loaded. Raises AudioError or PromptError."""
        return Conversation.load(
            messages,
            self.tokenizer,
            self.template,
            max_audio_seconds=self.network.config.max_audio_seconds,
            truncate=options.get("truncate", False),
            early=self.early(options),
        )

    def early(self, options: QuestionOptions) -> Early | None:
        """How to compute the beginning of a prompt with these options while its audio is decoded; None if the encoder
        cache does not hold the windows that two parts of a prompt have in common."""
        engine, network = self._open()
        window = token_count(WINDOW_SAMPLES) * network.config.decoder.hidden_size * network.dtype.itemsize
        if engine.options.encoder_cache_bytes < 2 * engine.options.windows_at_once * window:
            return None
        answer = options.get("max_new_tokens", self.defaults.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS))
        longest = min(network.config.decoder.max_positions, engine.room)
        how = {name: value for name, value in options.items() if name in _OF_EARLY_PARTS and value is not None}
        return Early(lambda: self.engine, engine.options, longest, answer, how)

    def load_audio(self, source: AudioSource, *, truncate: bool, ahead: EarlyPrefill | None = None) -> Audio:
        """Load a recording within the model's limits. Raises AudioError."""
        limit = self.network.config.max_audio_seconds
        return load_audible(source, max_seconds=limit, truncate=truncate, ahead=ahead)

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
        """Check everything now; the returned iterator generates as it is consumed."""
        progress = _sum_of_progress(len(conversations), options.get("progress") or (lambda stage, done, total: None))
        try:
            prepared = [
                self.prepare(conversation, options, progress=report)
                for conversation, report in zip(conversations, progress, strict=True)
            ]
        except BaseException:
            abandon_all(conversations)
            raise
        return self._read(prepared, answers)

    def prepare(self, conversation: Conversation, options: QuestionOptions, **how: Any) -> Prepared:
        """The engine's request for a conversation, checked, and the reader of its answer.

        how: further fields of `Request` besides those of the options. Raises SamplingError, ContextLengthError or
        OutOfPagesError.
        """
        stop = stop_strings("stop", options["stop"]) if "stop" in options else self.defaults.stop
        request = conversation.request(
            self._sampling(conversation, options),
            priority=options.get("priority", 0),
            deadline=options.get("deadline"),
            salt=options.get("salt", b""),
            token_kinds=self._token_kinds,
            cancelled=options.get("cancelled") or (lambda: False),
            **how,
        )
        self.engine.check(request)
        return Prepared(request, AnswerReader(conversation, self.tokenizer, stop, options.get("max_answer_tokens")))

    def _sampling(self, conversation: Conversation, options: QuestionOptions) -> SamplingParams:
        given = {name: value for name, value in options.items() if name in SamplingParams.__dataclass_fields__}
        values = {**self.defaults.sampling, **given}
        prompt = len(conversation.prompt.token_ids)
        # A default is reduced to the room in context and memory; a caller's number is checked unchanged.
        room = min(self.network.config.decoder.max_positions, self.engine.room) - prompt
        if "max_new_tokens" not in options:
            wanted = values.get("max_new_tokens", DEFAULT_NEW_TOKENS) + options.get("max_answer_tokens", 0)
            values["max_new_tokens"] = max(1, min(wanted, room))
        if "min_new_tokens" not in options:
            values["min_new_tokens"] = max(values.get("min_new_tokens", 0), self.defaults.min_length - prompt)
        if not options.get("ignore_eos"):
            values["stop_token_ids"] = self.tokenizer.eos_ids
        return SamplingParams(**values)

    def _read(self, prepared: list[Prepared], answers: list[Answer | None]) -> Iterator[tuple[int, Piece]]:
        """Yield (conversation, piece) as text is generated; fill `answers` at the end."""
        engine = self.engine  # the model may be closed before the answers end
        readers = [one.reader for one in prepared]
        sequences = [engine.sequence(one.request) for one in prepared]
        for index, token in engine.follow(sequences):
            if readers[index].ended:
                continue
            yield from ((index, piece) for piece in readers[index].push(token))
            if reason := readers[index].ended:
                engine.cancel(sequences[index], reason=reason)
        for index, (reader, sequence) in enumerate(zip(readers, sequences, strict=True)):
            pieces, answers[index] = reader.finish(sequence)
            yield from ((index, piece) for piece in pieces)


def abandon_all(conversations: Sequence[Conversation]) -> None:
    """Release what has been computed early for conversations that will not be answered."""
    for conversation in conversations:
        conversation.abandon()


def _sum_of_progress(count: int, report: Progress) -> list[Callable[[int, int], None]]:
    """One callback per prompt; `report` is called with the sum over all of them."""
    done, total = [0] * count, [0] * count

    def callback(index: int) -> Callable[[int, int], None]:
        def heard(tokens: int, all_tokens: int) -> None:
            done[index], total[index] = tokens, all_tokens
            report("listening", sum(done), sum(total))

        return heard

    return [callback(index) for index in range(count)]
