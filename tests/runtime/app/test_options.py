"""Options of a question: numbers of every type, stop strings, and sentences for what makes no sense."""

from typing import Any

import numpy as np
import pytest

import afnext
from afnext.runtime.app.conversation import MAX_RECORDINGS
from afnext.runtime.errors import PromptError, SamplingError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", None),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "5"),
        ("temperature", 1e-46),
        ("temperature", "hot"),
        ("seed", 1.5),
        ("repetition_penalty", 1e300),
        ("stop", 5),
        ("stop", [b"x"]),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["x" * 1001]),
        ("stop", ["x"] * 257),
        ("deadline", float("nan")),
        ("deadline", "soon"),
        ("priority", "high"),
        ("priority", float("nan")),
        ("ignore_eos", "no"),
        ("truncate", "no"),
        ("progress", 5),
        ("cancelled", True),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_a_sentence(model: afnext.Model, name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"^{name} "):
        model.ask(None, "Write.", **{"max_new_tokens": 4, name: value})


def test_a_string_is_one_stop_string(model: afnext.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = model.ask(None, "Write.", **options).text
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if whole[i : i + 2].isprintable())
    one, several = (model.ask(None, "Write.", stop=given, **options) for given in (stop, [stop]))
    assert one.text == several.text == whole[: whole.find(stop)].strip()


def test_numpy_numbers_are_numbers(model: afnext.Model) -> None:
    plain = model.ask(None, "Write.", max_new_tokens=12, temperature=1.0, top_k=9, seed=7, ignore_eos=True)
    numpy = model.ask(
        None,
        "Write.",
        max_new_tokens=np.int64(12),  # type: ignore[arg-type]
        temperature=np.float32(1),  # type: ignore[arg-type]
        top_k=np.uint8(9),  # type: ignore[arg-type]
        seed=np.int32(7),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        priority=np.int64(1),  # type: ignore[arg-type]
        deadline=np.float64(100),
    )
    assert numpy.token_ids == plain.token_ids


def test_too_many_recordings_are_refused_before_any_is_read(model: afnext.Model) -> None:
    """Their paths do not exist."""
    parts = [{"type": "audio", "audio": "nowhere.wav"}] * (MAX_RECORDINGS + 1)
    with pytest.raises(PromptError, match="at most 1,000 recordings"):
        model.chat([[{"role": "user", "content": parts}]])
