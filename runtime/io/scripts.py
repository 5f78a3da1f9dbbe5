"""Text in scripts without spaces between words."""

import re
from collections.abc import Iterable

_HAN_AND_KANA = (
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer: spaces separate phrases
_WIDE_PUNCTUATION = "\u3000-\u3004\u3008-\u303f\uff00-\uff65"
_UNIT = re.compile(rf"[{_HAN_AND_KANA}{_SOUTH_EAST_ASIAN}]|[^\W{_HAN_AND_KANA}{_SOUTH_EAST_ASIAN}]+")
_NO_SPACE_BESIDE = re.compile(rf"[{_HAN_AND_KANA}{_WIDE_PUNCTUATION}]")


def units(text: str) -> list[str]:
    """The words of the text, or single characters in scripts without spaces, without case and punctuation."""
    return _UNIT.findall(text.casefold())


def joined(pieces: Iterable[str]) -> str:
    """Join pieces with spaces, except between Chinese or Japanese characters."""
    parts, last = [], ""
    for piece in pieces:
        parts.append(continued(last, piece))
        last = piece or last
    return "".join(parts)


def continued(before: str, piece: str) -> str:
    """The piece, preceded by the separator from the text before it; either text may be empty."""
    return separator(before, piece) + piece if before and piece else piece


def separator(before: str, after: str) -> str:
    """The separator of two texts on one line: empty between Chinese or Japanese characters, else a space."""
    return "" if _NO_SPACE_BESIDE.match(before[-1:]) and _NO_SPACE_BESIDE.match(after[:1]) else " "
