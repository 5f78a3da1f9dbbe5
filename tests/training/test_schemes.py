"""The table of schemes, and the recordings that calibration hears."""

from pathlib import Path

import pytest

from afnext.quant.recipe import RECIPES, recipe
from afnext.runtime.app.calibration import read_examples
from training.evaluate import Row
from training.schemes import NEAREST, Results, Storage, long_table, table, write_calibration_set
from training.voices import VoiceBank


def test_the_table_has_a_line_a_scheme() -> None:
    def rows(rate: float, f1: float) -> list[Row]:
        words = Row("words, clean", 4, {"word error rate": rate}, stopped=4)
        return [words, Row("words with times", 4, {"F1": f1, "90th percentile, s": 0.1}, stopped=3)]

    text = table({Storage(): rows(0.125, 0.9), Storage("int8"): rows(0.25, 0.8)})
    lines = text.splitlines()
    assert lines[0] == "| scheme | words, clean: word error rate | words with times: F1 | ended by itself |"
    assert lines[2:] == ["| dense | 12.5 % | 0.900 | 87.5 % |", "| int8 | 25.0 % | 0.800 | 87.5 % |"]


def test_long_recordings_are_compared_one_by_one() -> None:
    def rows(*f1: float) -> list[Row]:
        return [Row("recording", 8, {"accuracy": 0.75, "F1 of the list": each}, stopped=8) for each in f1]

    results = {
        Storage("int4-g64"): rows(0.5),
        Storage("int4-g64", kv="int8"): rows(0.2, 0.6, 0.7),
        Storage("int4-g64", kv="int4"): rows(0.1, 0.5, 0.9),
        Storage(kv="int4"): rows(0.1, 0.5, 0.9),
    }
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in long_table(results).splitlines()[2:]]
    assert cells == [
        ["1", "6 of 8", "0.500", ""],
        ["3", "18 of 24", "0.500 ± 0.153", ""],
        ["3", "18 of 24", "0.500 ± 0.231", "+0.000 ± 0.100"],
        ["3", "18 of 24", "0.500 ± 0.231", ""],
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_line(name: str) -> None:
    assert recipe(name) in [recipe(each) for each in NEAREST if each != "dense"]


def test_calibration_reads_what_is_written_for_it(bank: VoiceBank, tmp_path: Path) -> None:
    write_calibration_set(bank, tmp_path, 6)
    examples = read_examples(tmp_path)
    assert len(examples) == 6
    assert all(example.question.endswith((".", "?")) and example.answer for example in examples)


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    storages = (Storage(), Storage("int4-g64", calibrated=True, kv="int8"))
    assert [storage.name for storage in storages] == ["dense", "int4-g64, calibrated, int8 KV"]
    measured = []

    def measure(storage: Storage) -> list[Row]:
        measured.append(storage)
        return [Row("words, clean", 4, {"word error rate": 0.125 * len(measured)}, stopped=4)]

    Results(tmp_path / "schemes.json").complete("10 s", storages[:1], measure)
    results = Results(tmp_path / "schemes.json")
    results.complete("10 s", storages, measure)
    assert measured == list(storages)
    lines = table(results.rows("10 s", storages)).splitlines()
    assert lines[2:] == ["| dense | 12.5 % | 100.0 % |", f"| {storages[1].name} | 25.0 % | 100.0 % |"]
