"""Stop strings over any way of cutting the text into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.runtime.io.stop_strings import StopStrings

TEXT = st.text(alphabet="ab\n", max_size=30)


@given(TEXT, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_the_text_before_the_first_stop_string_passes(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    strings = StopStrings(stops)
    passed = "".join(map(strings.push, pieces))
    assert strings.reached == any(stop in text for stop in stops)
    if strings.reached:
        assert any(text.removeprefix(passed).startswith(stop) for stop in stops)
        assert not any(stop in passed for stop in stops)
        assert strings.push("more") == strings.finish() == ""
    else:
        assert passed + strings.finish() == text


@given(TEXT, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_of_overlapping_stop_strings_the_one_that_ends_first_counts(text: str, stops: list[str]) -> None:
    strings = StopStrings(stops)
    passed = "".join(map(strings.push, text)) + strings.finish()
    end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if end is None:
        assert passed == text
    else:
        assert passed == text[: min(text[:end].find(stop) for stop in stops if stop in text[:end])]


def test_text_is_not_held_back_longer_than_needed() -> None:
    strings = StopStrings(["\n\nUser:"])
    assert strings.push("Hello\n") == "Hello"
    assert strings.push("there") == "\nthere"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        StopStrings([""])
