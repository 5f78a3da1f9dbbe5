"""Which of the prompts are measured on, and which are calibrated on."""

from afnext.bench.quality.prompts import select

WORDS = "please leave your message after the tone and hang up when done"
LINES = [
    *(f"prompt-{i}: {WORDS}." for i in range(9)),
    f"digits/none: {WORDS}.",
    f"unrecorded: {WORDS}.",
    "short: Goodbye.",
    f"tone: [a beep] {WORDS}",
    f"number: Press 1 to {WORDS}",
    "; a comment",
    "",
]


def test_whole_sentences_without_digits_are_divided() -> None:
    recorded = {line.partition(":")[0] for line in LINES} - {"unrecorded"}
    data, calibration = select(LINES, recorded)
    assert set(data) | set(calibration) == {*(f"prompt-{i}" for i in range(9)), "digits/none"}
    assert not set(data) & set(calibration)
    assert (len(data), len(calibration)) == (6, 4)
    assert {*data.values(), *calibration.values()} == {f"{WORDS}."}
