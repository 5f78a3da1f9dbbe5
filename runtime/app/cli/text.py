"""Text for output: escapes control characters, and replaces Python's option names by those of the command line."""

import json
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_CONTROL_OR_DIRECTION = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Names with an underscore can only be options; the others are also English words and need `=value`.
_NAMES = (
    "batch_invariant chunk_size draft_tokens encode_ahead encode_batch keep_packed max_new_tokens min_p page_size "
    "release_encoder repetition_penalty top_k top_p"
)
_WORDS = "attention device dtype kv memory quant revision seed stop temperature truncate"
_OPTION = re.compile(
    rf"(?<![\w/\\.-])(?:(?P<name>{_NAMES.replace(' ', '|')})(?:=(?P<value>[\w.-]*\w))?"
    rf"|(?P<word>{_WORDS.replace(' ', '|')})=(?P<quote>\"?)(?P<other>[\w.-]*\w)(?P=quote))(?![\w/\\]|[.-]\w)"
)


def visible(text: str, *, keep: str = "") -> str:
    """`text` with control characters, except those in `keep`, as backslash escapes.

    A terminal would execute them: move the cursor, rename the window, write to the clipboard.
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def visible_line(text: str) -> str:
    """`text` as one line for a message: like `visible`, and without characters that reverse the text direction."""
    return _CONTROL_OR_DIRECTION.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def encodable(text: str, encoding: str) -> str:
    """`text` with the characters that `encoding` lacks as backslash escapes."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def json_text(value: Any, encoding: str) -> str:
    """`value` as one line of JSON that `encoding` can hold; see `encodable_json`."""
    return encodable_json(json.dumps(value, ensure_ascii=False), encoding)


def encodable_json(text: str, encoding: str) -> str:
    """JSON with its non-ASCII characters, which only occur in strings, escaped if `encoding` lacks any of them.

    Bytes of a file name that are not UTF-8 remain Python's lone surrogates.
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return _BEYOND_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
    return text


def command_line_spelling(message: str) -> str:
    """A message of the library with the command line's option names: --max-new-tokens, --kv int8.

    Words within paths are not changed.
    """
    return _OPTION.sub(_option, message)


def _option(match: re.Match[str]) -> str:
    name = (match["name"] or match["word"]).replace("_", "-")
    flag, value = f"--{name}", match["value"] or match["other"]
    if value == "False":
        return f"--no-{name}"
    return flag if value in (None, "True") else f"{flag} {value}"
