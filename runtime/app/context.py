"""Listen once, ask many: a recording heard and kept as keys and values, which every question about it begins with."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..engine.prefix import Prefix
from ..engine.request import Request
from ..engine.timings import Timings
from ..errors import PromptError
from ..io.prompt import Prompt, build_prompt
from .answer import Answer
from .conversation import Conversation, Message, Recording
from .responder import Progress, QuestionOptions, Responder, Stream, check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Context:
    """Recordings that have been heard. Questions share the computed prefix, also when asked from several threads.

    It holds memory for its tokens until it is closed, left as a `with` block, or dropped.
    """

    def __init__(
        self, responder: Responder, messages: list[dict[str, Any]], recordings: tuple[Recording, ...], prefix: Prefix
    ):
        """messages: the conversation up to the question, its last message the user's and its audio without sources."""
        self._responder = responder
        self._messages = messages
        self._recordings = recordings
        self._prefix = prefix

    @classmethod
    def listen(
        cls,
        responder: Responder,
        messages: Sequence[Message],
        *,
        truncate: bool,
        progress: Progress | None,
        cancelled: Callable[[], bool],
    ) -> "Context":
        """Hear the audio of `messages`, whose last is the user's with an empty question."""
        loaded = responder.load(messages, truncate=truncate)
        if not loaded.recordings:
            raise PromptError("there is nothing to listen to; give at least one recording.")
        described = _without_sources(messages)
        ids = _prefix_ids(responder, described, loaded.recordings)
        report = progress or (lambda stage, done, total: None)
        request = Request(
            ids,
            loaded.audio,
            sampling=None,
            cancelled=cancelled,
            progress=lambda done, total: report("listening", done, total),
            timings=loaded.timings,
        )
        return cls(responder, described, loaded.recordings, responder.engine.listen(request))

    @property
    def tokens(self) -> int:
        """Tokens of the prefix: the system message, and the audio with what stands around it."""
        return len(self._prefix.token_ids)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return sum(recording.seconds for recording in self._recordings)

    def ask(self, question: str, **options: "Unpack[QuestionOptions]") -> Answer:
        """Answer a question about what was heard. Each is answered by itself, without those before it.

        Raises PromptError, ContextLengthError or SamplingError, and AfnextError once the context is closed.
        """
        return self._responder.chat([self._conversation(question, options)], options)[0]

    def stream(self, question: str, **options: "Unpack[QuestionOptions]") -> Stream:
        """Like `ask`, but gives the answer piece by piece."""
        return self._responder.stream(self._conversation(question, options), options)

    def close(self) -> None:
        """Give the memory back. Answers on their way go on to their end."""
        self._prefix.close()

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _conversation(self, question: str, options: QuestionOptions) -> Conversation:
        check_options(options, QuestionOptions)
        timings = Timings()
        prompt = _prompt(self._responder, self._messages, question, self._recordings)
        return Conversation(self._recordings, prompt, (), timings, self._prefix)


def _prompt(
    responder: Responder, messages: list[dict[str, Any]], question: str, recordings: tuple[Recording, ...]
) -> Prompt:
    """The prompt of a question, which takes the place of the last text of the last message."""
    *before, user = messages
    asked = {**user, "content": [*user["content"][:-1], {"type": "text", "text": question}]}
    counts = [recording.tokens for recording in recordings]
    return build_prompt([*before, asked], counts, responder.tokenizer, responder.template)


def _prefix_ids(responder: Responder, messages: list[dict[str, Any]], recordings: tuple[Recording, ...]) -> list[int]:
    """The prompt up to the end of the last audio. Raises PromptError where a template lets the question precede it."""
    one, other = (_prompt(responder, messages, question, recordings) for question in ("What?", "Who is it?"))
    end = one.audio[-1].position + one.audio[-1].tokens + (responder.tokenizer.audio_eos_id is not None)
    if one.token_ids[:end] != other.token_ids[:end]:
        raise PromptError("this checkpoint's chat template puts the question before the audio; use ask or chat.")
    return one.token_ids[:end]


def _without_sources(messages: Sequence[Message]) -> list[dict[str, Any]]:
    def plain(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "audio"} if part["type"] == "audio" else part

    described = [dict(message) for message in messages]
    for message in described:
        if not isinstance(message["content"], str):
            message["content"] = [plain(part) for part in message["content"]]
    return described
