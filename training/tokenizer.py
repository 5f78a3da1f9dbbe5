"""The tokenizer of afnext-tiny: bytes, and whole words for all text in questions and answers.

A word of the vocabulary is one token; any other text is split into bytes. A timestamp is three tokens, as in `[12:`
`34` `.5]`.
"""

from tokenizers import Tokenizer

from afnext.bench.core.random_checkpoint import byte_tokenizer

from . import vocabulary

_SPLIT = r"\[?\p{N}\p{N}:|\p{N}\p{N}|\.\p{N}\]?|\p{N}| ?\p{L}+|</?think>|\s|[^\s\p{L}\p{N}]"


def build_tokenizer() -> Tokenizer:
    """Byte-level, with every piece of the closed vocabulary as one token, then the special tokens."""
    return byte_tokenizer(_texts(), _SPLIT)


def _texts() -> list[str]:
    times = [f"[{minute:02}:" for minute in range(30)] + [f"{minute:02}:" for minute in range(30)]
    times += [f"{number:02}" for number in range(60)] + [f".{digit}" for digit in range(10)]
    times += [f".{digit}]" for digit in range(10)]
    labels = (*vocabulary.WORDS, *vocabulary.SOUNDS, *vocabulary.PITCHES)
    words = [text for label in labels for text in (label, f" {label}")]
    plurals = [f" {plural}" for plural in vocabulary.PLURALS.values()]
    prompts = [
        *vocabulary.TRANSCRIBE,
        *vocabulary.TRANSCRIBE_TIMES,
        *vocabulary.SOUNDS_TIMES,
        *vocabulary.DESCRIBE,
        *vocabulary.WHEN_SOUND,
        *vocabulary.WHEN_WORD,
        *(text.format(plural="", sound="") for text in vocabulary.COUNT_SOUND),
        *vocabulary.COUNT_WORDS,
        *vocabulary.FIRST,
        *vocabulary.LAST,
        *vocabulary.PITCH,
        vocabulary.THINK,
    ]
    answers = ["No speech.", "No sound.", "Silence.", "It does not occur.", "It is not spoken.", "There is no tone."]
    answers += ["Low.", "Medium.", "High.", 'The word "yes" at 00:00.0.', "A beep at 00:00.0.", "<think>", "</think>"]
    return [*times, *words, *plurals, *prompts, *answers, "user", "assistant", "system", "\n", "nothing"]
