"""Converts messages to token ids with the checkpoint's chat template, and adds placeholders for every audio.

The whole conversation is rendered and split at the special tokens that the template wrote, and the text between them is
encoded piece by piece. This gives the ids of the `transformers` processor, which splits at the same tokens, with one
exception: the contents of messages are text. A message that contains `<sound>` or `<|im_end|>` means those characters
and can neither open a turn nor claim an audio. This applies to system messages, too.

A template writes one `<sound>` for a message with audio, in front of its text. It becomes `<|sound_bos|>`, one
`<sound>` for each audio token, `<|sound_eos|>`; Audio Flamingo 3 has no enclosing tokens. The reference takes one audio
per conversation; here a message with n audio parts gets n such expansions in order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from .chat_template import PromptTemplate
from .tokenizer import THINK_TAGS, Tokenizer

__all__ = ["AudioSpan", "Prompt", "PromptTemplate", "Tokenizer", "build_prompt"]

ROLES = ("system", "user", "assistant")
# Unicode's private-use code points; those absent from a conversation replace spellings of special tokens in it.
PRIVATE_USE = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE), *range(0xE000, 0xF900))


@dataclass(frozen=True)
class AudioSpan:
    """The position of one audio's embeddings: the index of its first `<sound>` in the ids, and their number."""

    position: int
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation and the spans of its audios, in order.

    opens_thinking: the prompt ends with an opened `<think>`, so the answer starts in the middle of thinking.
    """

    token_ids: list[int]
    audio: tuple[AudioSpan, ...]
    opens_thinking: bool = False

    @property
    def audio_tokens(self) -> int:
        """Number of `<sound>` placeholders among the ids."""
        return sum(span.tokens for span in self.audio)

    @property
    def text_tokens(self) -> int:
        """Number of other ids."""
        return len(self.token_ids) - self.audio_tokens


def build_prompt(
    messages: Sequence[Mapping[str, Any]],
    audio_tokens: Sequence[int],
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Turn a conversation into token ids.

    messages: `{"role": "system" | "user" | "assistant", "content": ...}`, where the content is a string or a list of
        parts `{"type": "text", "text": ...}` and `{"type": "audio", ...}` (further keys of an audio part are ignored).
        The messages are not modified.
    audio_tokens: the number of audio tokens of each audio part, in order of appearance over the conversation.
    add_generation_prompt: end with the opening of the assistant's turn.

    Raises PromptError when messages are malformed, the number of audios is wrong, an audio is too short, or the
    template fails.
    """
    conversation, audio_parts = _checked(messages)
    _check_audio_tokens(audio_tokens, sum(audio_parts))
    texts = [text for message in conversation for text in _texts(message)]
    shield = _Shield(tokenizer, [template.source, *texts])
    rendered = template.render(
        [shield.cover(message) for message in conversation],
        add_generation_prompt=add_generation_prompt,
        variables=tokenizer.template_variables,
    )
    pieces = list(tokenizer.split_at_added(rendered))
    counts = iter(audio_tokens)
    groups = iter([[next(counts) for _ in range(parts)] for parts in audio_parts if parts])
    _check_placeholders(pieces.count(tokenizer.audio_token_id), sum(parts > 0 for parts in audio_parts))

    ids: list[int] = []
    spans: list[AudioSpan] = []
    for piece in pieces:
        if isinstance(piece, str):
            ids += tokenizer.encode(shield.uncover(piece))
        elif piece != tokenizer.audio_token_id:
            ids.append(piece)
        else:
            for count in next(groups):
                spans.append(_expand(ids, count, tokenizer))
    opens_thinking = add_generation_prompt and rendered.rstrip().endswith(THINK_TAGS[0])
    return Prompt(ids, tuple(spans), opens_thinking)


def _expand(ids: list[int], count: int, tokenizer: Tokenizer) -> AudioSpan:
    """Append one audio's placeholders to `ids`, between enclosing tokens if the checkpoint has them."""
    if tokenizer.audio_bos_id is not None:
        ids.append(tokenizer.audio_bos_id)
    span = AudioSpan(position=len(ids), tokens=count)
    ids += [tokenizer.audio_token_id] * count
    if tokenizer.audio_eos_id is not None:
        ids.append(tokenizer.audio_eos_id)
    return span


class _Shield:
    """Keeps the conversation's text from being read as control tokens while it passes through the template.

    Each spelling of an added token in a text is replaced by a private-use character that occurs nowhere else. A text
    that starts or ends with a fragment of a spelling gets a filler character there, so that joining texts creates no
    token either: two parts `<so` and `und>`, which a template joins, stay text.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Iterable[str]):
        used = set().union(*strings)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        self._pattern = tokenizer.added_pattern
        self._cover = dict(zip(tokenizer.added_tokens, free, strict=False))
        self._filler = next(free, "")
        if not self._filler:
            raise PromptError("the messages use up Unicode's private-use characters. Remove some from the text.")
        self._uncover = {ord(character): spelling for spelling, character in self._cover.items()}
        self._uncover[ord(self._filler)] = ""
        self._spellings = tuple(self._cover)
        self._heads = tuple({spelling[:i] for spelling in self._spellings for i in range(1, len(spelling))})
        self._tails = tuple({spelling[i:] for spelling in self._spellings for i in range(1, len(spelling))})

    def cover(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a checked message with the replacements made."""
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._covered(content)}
        parts = [{**part, "text": self._covered(part["text"])} if "text" in part else dict(part) for part in content]
        return {**message, "content": parts}

    def uncover(self, text: str) -> str:
        """The text with the replacements undone."""
        return text.translate(self._uncover)

    def _covered(self, text: str) -> str:
        text = self._pattern.sub(lambda match: self._cover[match[0]], text)
        core = text.strip()  # templates trim, so the fillers are placed where trimming keeps them
        start, end = text.partition(core)[::2] if core else (text, "")
        if core.startswith(self._tails) or any(core in spelling for spelling in self._spellings if core):
            start += self._filler
        if core.endswith(self._heads):
            end = self._filler + end
        return start + core + end


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def _checked(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Copies of the messages with only the keys that a template needs, and the number of audio parts in each."""
    if not messages or not isinstance(messages, list | tuple):
        raise PromptError("there are no messages. Give a list with at least one, the last usually from the user.")
    conversation = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise PromptError(f"{where} is a {type(message).__name__}; expected an object with role and content.")
        role = message.get("role")
        if role not in ROLES:
            raise PromptError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}.")
        surplus = [repr(key) for key in message if key not in ("role", "content")]
        if surplus:
            raise PromptError(f"{where} has {', '.join(surplus)} besides role and content. Leave it out.")
        conversation.append({"role": role, "content": _checked_content(message.get("content"), where)})
    audio_parts = [
        0 if isinstance(message["content"], str) else sum(part["type"] == "audio" for part in message["content"])
        for message in conversation
    ]
    return conversation, audio_parts


def _checked_content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise PromptError(f"{where} has no content. Give a string or a list of text and audio parts.")
    return [_checked_part(part, f"part {number} of {where}") for number, part in enumerate(content)]


def _checked_part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "audio":
        return {"type": "audio"}
    if kind != "text":
        raise PromptError(f'{where} is neither {{"type": "text", "text": ...}} nor {{"type": "audio", ...}}.')
    text = part.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where} has no text; expected a string under 'text'.")
    return {"type": "text", "text": str(text)}


def _check_audio_tokens(audio_tokens: Sequence[int], parts: int) -> None:
    if len(audio_tokens) != parts:
        raise PromptError(f"the messages have {parts} audio parts, but {len(audio_tokens)} audios were given.")
    for number, count in enumerate(audio_tokens):
        if count < 1:
            raise PromptError(f"audio {number} is too short: it gives no audio token. Use at least 30 ms of audio.")


def _check_placeholders(written: int, wanted: int) -> None:
    if written != wanted:
        raise PromptError(
            f"the checkpoint's chat template wrote {written} audio placeholders for {wanted} messages with audio. Put "
            "audio into user messages only, or use a template that writes one <sound> per message."
        )
