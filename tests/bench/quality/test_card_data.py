"""The model card's datasets are read in their published layouts, from local copies and by `datasets`."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import card
from support.card import UTTERANCES, recording

from afnext.bench.quality.card.covost2 import PAIRS
from afnext.bench.quality.card.mmau_pro import InstructionItem
from afnext.bench.quality.card.published import DATASETS
from afnext.bench.quality.data import Items, ManifestError
from afnext.kernels.errors import AfnextError


def read(name: str, source: Path | str, tmp_path: Path) -> Items:
    return DATASETS[name].read(source, tmp_path / "unpacked")


def test_librispeech_is_read_as_it_unpacks(tmp_path: Path) -> None:
    found = read("librispeech-clean", card.librispeech(tmp_path), tmp_path)
    assert [(item.id, item.text) for item in found.items] == [("-".join(key), text) for key, text in UTTERANCES.items()]
    assert found.items[2].audio_name == "121/121726/121-121726-0000.flac"
    assert read("librispeech-clean", tmp_path / "LibriSpeech", tmp_path).fingerprint == found.fingerprint
    with pytest.raises(ManifestError, match="test-other"):
        read("librispeech-other", tmp_path, tmp_path)
    (tmp_path / "LibriSpeech/test-clean/121/121726/121-121726-0000.flac").unlink()
    with pytest.raises(ManifestError, match=r"names 121-121726-0000"):
        read("librispeech-clean", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "choice", "category"),
    [("mmau", card.mmau, "Man", "Reasoning"), ("mmar", card.mmar, "a president", "Semantic Layer")],
)
def test_questions_are_read_as_they_are_published(
    name: str, write: Callable[[Path], Path], choice: str, category: str, tmp_path: Path
) -> None:
    (item,) = read(name, write(tmp_path), tmp_path).items
    assert item.audio is not None
    assert item.audio.is_file()
    assert (item.choices[0], item.groups["category"]) == (choice, category)
    item.audio.unlink()
    with pytest.raises(ManifestError, match="1 recordings that are not there"):
        read(name, tmp_path, tmp_path)


def test_medley_solos_asks_for_the_instrument_of_the_test_subset(tmp_path: Path) -> None:
    items = read("medley-solos", card.medley(tmp_path), tmp_path).items
    assert [item.text for item in items] == ["piano", "violin"]
    assert len(items[0].choices) == 8
    with pytest.raises(ManifestError, match=r"no Medley-solos-DB_metadata\.csv"):
        read("medley-solos", tmp_path / "nowhere", tmp_path)


def test_mmau_pro_has_choices_open_answers_instructions_and_several_recordings(tmp_path: Path) -> None:
    found = read("mmau-pro", card.mmau_pro(tmp_path), tmp_path)
    choice, double, unbound, instruction = found.items
    assert (choice.text, choice.choices, choice.groups) == ("A man", ("A man", "A child"), {"category": "speech"})
    assert double.audio is not None
    assert (double.audio.name, [path.name for path in double.more_audio]) == ("1.wav", ["1b.wav"])
    assert (unbound.text, unbound.choices) == ("It is about duty.", ())
    assert isinstance(instruction, InstructionItem)
    assert instruction.rule == "Number Words (at most)"
    assert instruction.values == {"N": 3.0, "prompt": "Describe it in at most 3 words."}
    assert found.left_out == 1, "the multiple-choice question with a single choice"
    (tmp_path / "data/1b.wav").unlink()
    with pytest.raises(ManifestError, match=r"row 2: 'data/1b\.wav' is not below"):
        read("mmau-pro", tmp_path, tmp_path)


@pytest.mark.parametrize("write", [card.mmsu_tables, card.mmsu_lines])
def test_mmsu_is_read_from_tables_and_from_lines(write: Callable[[Path], Path], tmp_path: Path) -> None:
    first, second = read("mmsu", write(tmp_path), tmp_path).items
    assert (first.id, first.text, first.choices[3]) == ("accent_identification_58df4754", "American", "American")
    assert (second.text, second.choices) == ("1", ("1", "2", "3"))
    assert first.groups == {"category": "Perception", "task": "accent_identification"}
    for item in (first, second):
        assert item.audio is not None
        assert item.audio.read_bytes() == card.CLIP.read_bytes()
        assert item.audio.suffix == ".wav"


def test_long_audio_bench_is_read_in_the_layout_of_longaudio(tmp_path: Path) -> None:
    (item,) = read("long-audio-bench", card.long_audio(tmp_path), tmp_path).items
    assert item.question == "What does the speaker ask for?"
    assert (item.id, item.text) == ("17", "He asks what one can do for one's country.")
    (tmp_path / "another.json").write_text("[]")
    with pytest.raises(ManifestError, match=r"has LongAudioBench\.json, another\.json; name the file"):
        read("long-audio-bench", tmp_path, tmp_path)
    assert len(read("long-audio-bench", tmp_path / "LongAudioBench.json", tmp_path).items) == 1


@pytest.mark.parametrize("split", [True, False])
def test_covost2_is_the_validated_part_of_the_test_split(split: bool, tmp_path: Path) -> None:
    first, second = read("covost2-en-de", card.covost2(tmp_path, split=split), tmp_path).items
    assert [first.text, second.text] == ['Er sagte "los".', "Es regnet."]
    assert second.audio == (tmp_path / "en/clips/common_voice_en_2.mp3").resolve()
    with pytest.raises(ManifestError, match=r"no covost_v2\.de_en\.test\.tsv"):
        read("covost2-de-en", tmp_path, tmp_path)


def test_covost2_has_15_languages_from_english_and_21_into_it() -> None:
    assert (sum(source == "en" for source, _ in PAIRS), sum(target == "en" for _, target in PAIRS)) == (15, 21)
    assert {f"covost2-{source}-{target}" for source, target in PAIRS} <= DATASETS.keys()


@pytest.mark.parametrize(
    ("name", "write", "texts"),
    [
        ("librispeech-clean", lambda folder: card.librispeech_table(folder / "clean"), list(UTTERANCES.values())),
        ("mmsu", card.mmsu_tables, ["American", "1"]),
        ("covost2-en-de", lambda folder: card.covost2_table(folder / "en_de"), ['Er sagte "los".', "Es regnet."]),
    ],
)
def test_datasets_loads_the_hubs_tables(
    name: str, write: Callable[[Path], Path], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local folders in the layouts of the Hub's repositories, whose cards name the configurations."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    write(folder)
    config = DATASETS[name].hub.config  # type: ignore[union-attr]
    if config is not None:
        head = f"configs:\n- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}/test-*\n"
        (folder / "README.md").write_text(f"---\n{head}---\n")
    items = read(name, f"hub:{folder}", tmp_path).items
    assert [item.text for item in items] == texts
    for item in items:
        assert item.audio is not None
        assert item.audio.read_bytes() == card.CLIP.read_bytes()


def test_mistakes_of_the_source_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AfnextError, match="mmau is read from a local copy only"):
        read("mmau", "hub", tmp_path)
    recording(tmp_path / "test.parquet")
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        read("mmau-pro", tmp_path, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AfnextError, match=r"pip install '\.\[card\]'"):
        read("mmsu", "hub", tmp_path)


def test_recordings_outside_of_the_copy_are_refused(tmp_path: Path) -> None:
    card.long_audio(tmp_path / "data")
    text = (tmp_path / "data/LongAudioBench.json").read_text()
    (tmp_path / "data/LongAudioBench.json").write_text(text.replace("17.wav", "../17.wav"))
    recording(tmp_path / "17.wav")
    with pytest.raises(ManifestError, match="leads out of the data folder"):
        read("long-audio-bench", tmp_path / "data", tmp_path)
