"""Text and figures of records for display. Files of results may come from anywhere, so they are untrusted."""

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.record import Record, ResultsError, read

KINDS = ("measured", "extrapolated", "projected")
_UNITS = {"audio_seconds": "{} s audio", "batch": "batch {}", "context": "context {}", "layers": "{} layers"}


def records(path: Path) -> list[Record]:
    """The records of a file, their fields of the right types. Raises ResultsError otherwise, or for an unknown kind."""
    found = list(read(path))
    for line, one in enumerate(found, start=1):
        texts, objects = (one.bench, one.name, one.subject, one.kind), (one.case, one.values, one.machine)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, dict) for each in objects):
            raise ResultsError(
                f"{path}, record {line}: a field is of the wrong type, so it is no result of afnext bench"
            )
        if one.kind not in KINDS:
            raise ResultsError(f"{path}, record {line}: the kind {clean(one.kind)!r} is not one of {', '.join(KINDS)}")
    return found


def number(value: Any) -> float | None:
    """The value as a finite float, or None for anything else: absent, text, true, NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def positive(value: Any) -> float | None:
    """Like `number`, but None for zero and below, for logarithmic axes."""
    found = number(value)
    return found if found is not None and found > 0 else None


def clean(value: Any) -> str:
    """The value as one line of printable text: control characters, lone surrogates and the like as U+FFFD."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    visible = (
        "\ufffd" if unicodedata.category(character)[0] == "C" and not character.isspace() else character
        for character in text
    )
    return " ".join("".join(visible).split())


def short(text: str, length: int = 36) -> str:
    """The text, its middle left out when it is longer than `length`."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def case_label(case: Mapping[str, Any], without: Iterable[str] = ()) -> str:
    """A record's case in one line: "300 s audio, batch 1, scheme int8". A `label` stands for all the figures."""
    parts = [clean(case["label"])] if case.get("label") else []
    for key, value in case.items():
        figure = number(value)
        if key in (*without, "label") or value is None or (parts and "label" in case and not isinstance(value, str)):
            continue
        shown = clean(value) if figure is None else f"{figure:g}" if abs(figure) < 1e6 else f"{value}"
        if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
            shown = " + ".join(map(str, value))  # the layers of encoder and decoder
        parts.append(_UNITS[key].format(shown) if key in _UNITS else f"{clean(key)} {shown}")
    return ", ".join(parts)


def machine_label(machine: Mapping[str, Any]) -> str:
    """The GPU's name, else the CPU's and how many cores; "" for a record without a machine."""
    gpu = machine.get("gpu")
    if isinstance(gpu, Mapping) and gpu.get("name"):
        return clean(gpu["name"])
    cores = f", {clean(machine['cores'])} cores" if machine.get("cores") is not None else ""
    return f"{clean(machine['cpu'])}{cores}" if machine.get("cpu") else ""


def seconds(value: Any) -> str:
    """A time with three digits and its unit; "" if it is not a number."""
    figure = number(value)
    if figure is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(figure) >= scale or unit == "µs":
            return f"{figure / scale:.3g} {unit}" if abs(figure / scale) < 999.5 else f"{figure / scale:,.0f} {unit}"
    return ""


def size(value: Any) -> str:
    """Bytes in GB or MB, powers of ten; "" if it is not a number."""
    figure = number(value)
    if figure is None:
        return ""
    return f"{figure / 1e9:.3g} GB" if abs(figure) >= 1e9 else f"{figure / 1e6:.3g} MB"


def digits(value: Any) -> str:
    """A figure with three digits, thousands with commas; "" if it is not a number."""
    figure = number(value)
    if figure is None:
        return ""
    return f"{figure:,.0f}" if 999.5 <= abs(figure) < 1e15 else f"{figure:.3g}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level, with dots: {"gpu": {"name": 1}} gives {"gpu.name": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
