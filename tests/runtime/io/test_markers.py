"""Markers in a transcript: every layout of the table is found where it is one, and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.runtime.io.markers import LAYOUTS, Place, find_markers

SECONDS = st.integers(0, 3599 * 10).map(lambda tenths: tenths / 10)


def clock(seconds: float) -> str:
    return f"{int(seconds // 60):02}:{seconds % 60:04.1f}"


@pytest.mark.parametrize(("layout", "place"), LAYOUTS, ids=[layout for layout, _ in LAYOUTS])
@given(start=SECONDS, end=SECONDS, speaker=st.integers(1, 99), wide=st.booleans())
def test_every_layout_is_found_and_read(
    layout: str, place: Place, start: float, end: float, speaker: int, wide: bool
) -> None:
    both = f"{clock(start)} - {clock(end)}"
    values = {"times": both, "range": both, "clock": clock(start), "numbers": f"{start:.0f}-{end:.0f}"}
    written = layout.removesuffix("$").format(**values, speaker=f"Speaker {speaker}", numbered=f"SPEAKER_{speaker:02}")
    if wide:
        written = written.translate(str.maketrans("[]():", "【】（）："))
    text = {
        Place.ANYWHERE: f"one {written} two",
        Place.LINE: f"one\n{written}{'' if layout.endswith('$') else ' '}\ntwo",
        Place.CLOCKS: f"{written} one\n{written} two",
        Place.END: f"one {written}\ntwo",
    }[place]
    marker = next(find_markers(text))
    times: tuple[float, ...] = (start, end) if "{times}" in layout or "{range}" in layout else ()
    times = (start,) if "{clock}" in layout else times
    times = (round(start), round(end)) if "{numbers}" in layout else times
    assert marker.times == pytest.approx(times)
    assert marker.speaker == (f"Speaker {speaker}" if "{speaker}" in layout or "{numbered}" in layout else None)
    assert written.strip() in text[marker.start : marker.end]


@pytest.mark.parametrize("text", ["it was (00:05 - 00:07) then", "at 3:16 sharp", "a Speaker Ann: no", "[12] [1-2 x]"])
def test_the_same_within_a_sentence_is_none(text: str) -> None:
    assert list(find_markers(text)) == []
