"""Markers of times and speakers in a transcript: their spellings and values.

`LAYOUTS` is the table of spellings; to add one, add a line. In a layout

    {times}     is a time or a range of two, {range} a range, {clock} a time such as 00:12.5;
    {numbers}   is a range of two plain numbers, which are seconds;
    {speaker}   is a speaker, such as "Speaker 1" or "SPEAKER_Ann"; {numbered} one with a number or a letter;
    [ ] and ( ) are brackets: round ones, or square, lenticular, angle, curly ones and Whisper's <| |>;
    a space     is any blanks, and one of the separators , ; : | / - among them;
    :           is a colon, $ the end of the line, which is not part of the marker.

Any marker may be bold or italic in Markdown, or followed by a separator. Wide punctuation counts as its ASCII form.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from math import inf


class Place(Enum):
    """Where a layout is a marker; elsewhere it is part of the speech."""

    ANYWHERE = auto()
    LINE = auto()  # at the start of a line, or, if it names a speaker, after another marker
    CLOCKS = auto()  # at the start of a line, if every line starts with a clock
    END = auto()  # at the end of a line


LAYOUTS = (
    ("{speaker} [{times}]", Place.LINE),
    ("{speaker} ({times})", Place.LINE),
    ("[{times} {speaker}]", Place.ANYWHERE),
    ("[{speaker} {times}]", Place.ANYWHERE),
    ("[{times}]", Place.ANYWHERE),
    ("[{numbers}]", Place.LINE),
    ("[{speaker}]", Place.ANYWHERE),
    ("({times} {speaker})", Place.LINE),
    ("({speaker} {times})", Place.LINE),
    ("({times})", Place.LINE),
    ("({speaker})", Place.LINE),
    ("{times} {speaker}:", Place.LINE),
    ("{times} [{speaker}]", Place.LINE),
    ("{times} ({speaker})", Place.LINE),
    ("{speaker} {times}:", Place.LINE),
    ("{times} {speaker}$", Place.LINE),
    ("{speaker} {times}$", Place.LINE),
    ("{numbered}:", Place.ANYWHERE),
    ("{speaker}:", Place.LINE),
    ("{numbered}$", Place.LINE),
    ("{range}", Place.LINE),
    ("{clock}:", Place.LINE),
    ("{clock}|", Place.LINE),
    ("{clock}-", Place.LINE),
    ("{clock}$", Place.LINE),
    ("{clock}", Place.CLOCKS),
    ("({range})", Place.END),
)
"""Spellings of markers; if several match at one place, the first applies."""


@dataclass(frozen=True)
class Marker:
    """A marker in a text, from index `start` to `end`.

    times: none, one, or start and end, in seconds; infinity for an invalid time such as 00:75.
    """

    start: int
    end: int
    times: tuple[float, ...]
    speaker: str | None


_CLOCK = r"\d{1,3}:\d{1,2}(?:[:;]\d{1,3}){0,2}(?:[.,]\d{1,6})?(?!\d)"
_UNIT = r"(?:\d{1,2} ?h ?)?(?:\d{1,3} ?m(?:in)? ?)?\d{1,6}(?:\.\d{1,6})? ?(?:seconds?|secs?|s)\b"
_DECIMAL, _NUMBER = r"\d{1,6}\.\d{1,6}(?![\d.])", r"\d{1,6}(?:\.\d{1,6})?(?![\d.])"
_TO = r" *(?:--?>|=>|[-~]|\.\.\.?|to\b) *"
_TOKENS = {
    "clock": _CLOCK,
    "numbers": rf"{_NUMBER}{_TO}{_NUMBER}",
    "speaker": r"(?:speaker|spk)(?:[ _#-]*\d{1,4}|[ _#-]+[^\W\d_][^\W_]{0,19})(?![^\W_])",
    "numbered": r"(?<!\w)(?:speaker|spk)(?:[ _#-]*\d{1,4}|[ _#-]+[a-z])(?![^\W_])",
}


def _range(time: str) -> str:
    """A range with at least one end that is certainly a time."""
    return rf"(?:{time}{_TO}(?:{time}|{_NUMBER})|{_NUMBER}{_TO}{time})"


_SURE, _IN_BRACKETS = rf"(?:{_CLOCK}|{_UNIT})", rf"(?:{_CLOCK}|{_UNIT}|{_DECIMAL})"
_SIGNS = {
    "[": r"(?:\[|<\|?|\{) *",
    "]": r" *(?:\]|\|?>|\})",
    "(": r"\( *",
    ")": r" *\)",
    " ": r"[ *_]*(?:[,;:|/-][ *_]*)?",
    ":": r"(?: *:(?!\d)[*_]{0,3}|[*_]{1,3} *:(?!\d))",
    "|": r" *\|",
    "-": r" *-(?= )",
    "$": r"(?=[ *_:]*$)",
}
_MARKER_END = r"[*_]{0,3}(?: *[:,;|](?!\d)[*_]{0,3}| +-(?= ))?"
_LINE_START = (
    rf"^ *(?:\d{{1,6}} *\n *(?={_CLOCK}{_TO}{_CLOCK})"  # the number of an SRT cue
    r"|(?:[-*+>•#]{1,6} +|\d{1,6}[.)] +){0,2})"
)


def _compiled(layout: str) -> str:
    time = _IN_BRACKETS if "[" in layout.partition("{times}")[0] else _SURE
    tokens = {**_TOKENS, "range": _range(time), "times": f"(?:{_range(time)}|{time})"}
    pieces = re.findall(r"\{(\w+)\}|(.)", layout)
    return "".join(tokens[token] if token else _SIGNS[sign] for token, sign in pieces)


def _any_of(chosen: Iterable[str]) -> str:
    return rf"[*_]{{0,3}}(?:{'|'.join(map(_compiled, chosen))}){_MARKER_END}"


def _at(*places: Place) -> list[str]:
    return [layout for layout, place in LAYOUTS if place in places]


def _search_for(*at_line_start: Place) -> re.Pattern[str]:
    """A pattern for the next marker, whatever precedes it."""
    return re.compile(
        rf"(?P<lead>{_LINE_START}){_any_of(_at(Place.ANYWHERE, *at_line_start))}"
        rf"|{_any_of(_at(Place.ANYWHERE))}"
        rf"|{_any_of(_at(Place.END))}(?= *$)",
        re.IGNORECASE | re.MULTILINE,
    )


_NEXT = _search_for(Place.LINE)
_NEXT_OF_CLOCKS = _search_for(Place.LINE, Place.CLOCKS)
_SPEAKERS = [layout for layout in _at(Place.LINE) if "{speaker}" in layout or "{numbered}" in layout]
_ADJACENT = re.compile(rf" *{_any_of(_at(Place.ANYWHERE) + _SPEAKERS)}", re.IGNORECASE | re.MULTILINE)
_SPEAKER = re.compile(rf"{_TOKENS['speaker']}|{_TOKENS['numbered']}", re.IGNORECASE)
_TIME = re.compile(rf"{_CLOCK}|{_UNIT}|{_NUMBER}", re.IGNORECASE)
_FRAMES = re.compile(r"\b\d{1,3}:\d{1,2}:\d{1,2}[:;](\d{1,2})\b")
_CLOCK_LINE = re.compile(rf"{_LINE_START}[*_]{{0,3}}{_CLOCK}(?!\w)", re.IGNORECASE)
_SUSPECT = re.compile(
    rf"[\[({{<][^\[\](){{}}<>\n]{{0,40}}{_CLOCK}[^\[\](){{}}<>\n]{{0,40}}[\])}}>]"
    rf"|{_SURE}{_TO}{_SURE}|[\[({{<] *{_SURE}"
    rf"|{_CLOCK}[*_]{{0,3}} *[:|](?!\d)|[*_]{_CLOCK}"
    r"|(?:speaker|spk)[ _#-]*\d"
    r"|\d:\d\d[.,]\d",  # a clock with fractions
    re.IGNORECASE,
)
_PLAIN: dict[int, int] = {
    ord(char): ord(plain)
    for plain, chars in {
        " ": "\t\r\u00a0\u2009\u202f\u3000",
        "\n": "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029",
        "-": "‐‑‒–—―−－",
        "~": "→⟶➔～〜…",
        "[": "【［〔〖",
        "]": "】］〕〗",
        "(": "（",
        ")": "）",
        ":": "：",
        ";": "；",
        ",": "，",
        ".": "．",
        "|": "｜",
        "*": "＊",
        "_": "＿",
        "#": "＃",
    }.items()
    for char in chars
}


def find_markers(text: str) -> Iterator[Marker]:
    """The markers in a text, in order, without overlaps."""
    plain = text.translate(_PLAIN)
    rate = _frame_rate(plain)
    lines = [line for line in plain.split("\n") if line.strip()]
    only_clocks = len(lines) > 1 and all(map(_CLOCK_LINE.match, lines))
    find = _NEXT_OF_CLOCKS if only_clocks else _NEXT
    position = chain = 0
    while match := find.search(plain, position):
        start = match.start() + len(match["lead"] or "")
        chain = start if plain[position : match.start()].strip() else chain
        while match:
            end = _without_opening(plain, chain, match.end())
            yield _marker(match.start(), end, plain[start:end], rate)
            position = start = end
            match = _ADJACENT.match(plain, position)


def suspects(text: str) -> list[str]:
    """Possible markers in a text in which `find_markers` found none."""
    return [text[match.start() : match.end()] for match in _SUSPECT.finditer(text.translate(_PLAIN))]


def _without_opening(plain: str, start: int, end: int) -> int:
    """The end without closing emphasis that was not opened after `start`: it belongs to the following text."""
    body = plain[start:end]
    rest = body.rstrip("*_")
    return end if rest == body or body[-1] in rest else start + len(rest)


def _marker(start: int, end: int, body: str, rate: int) -> Marker:
    speaker = _SPEAKER.search(body)
    rest = body if speaker is None else f"{body[: speaker.start()]} {body[speaker.end() :]}"
    times = tuple(_seconds(time, rate) for time in _TIME.findall(rest)[:2])
    return Marker(start, end, times, speaker and _name(speaker.group()))


def _name(speaker: str) -> str:
    label = re.sub(r"^(?:speaker|spk)[ _#-]*", "", speaker, flags=re.IGNORECASE)
    return f"Speaker {int(label) if label.isdecimal() else label}"


def _frame_rate(plain: str) -> int:
    """Frames per second of times hh:mm:ss:ff, which do not state it: 25, or more if the largest number requires it."""
    largest = max(map(int, _FRAMES.findall(plain)), default=0)
    return next((rate for rate in (25, 30) if largest < rate), 60)


def _seconds(time: str, rate: int) -> float:
    """A time in seconds, infinite if one of its fields is too large."""
    if ":" not in time:
        numbers = re.findall(r"\d+(?:\.\d+)?", time)
        return float(sum(float(number) * 60**power for power, number in enumerate(reversed(numbers))))
    fields = re.split("[:;]", time.replace(",", "."))
    fraction = 0.0
    if len(fields) > 2 and len(fields[-1]) == 3:
        fraction = int(fields.pop()) / 1000
    elif len(fields) == 4:
        if "." in fields[3] or int(fields[3]) >= rate:
            return inf
        fraction = int(fields.pop()) / rate
    *larger, seconds = fields
    if len(larger) > 2 or float(seconds) >= 60 or (len(larger) == 2 and int(larger[1]) >= 60):
        return inf
    minutes = sum(int(field) * 60**power for power, field in enumerate(reversed(larger)))
    return 60.0 * minutes + float(seconds) + fraction
