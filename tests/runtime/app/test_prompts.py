"""Prompts by task: those of the model cards, and those that a checkpoint brings along."""

import json
from pathlib import Path

import pytest

import afnext
from afnext import prompts
from afnext.runtime.app.prompts import CARD, Prompts
from afnext.runtime.errors import CheckpointError, PromptError
from afnext.runtime.model.hub import BUNDLED, resolve

CARD_TABLE = {
    "asr": ("Transcribe the input speech.", "instruct think"),
    "caption": ("Generate a caption for the input audio.", "captioner think"),
    "long-caption": (
        "Generate a detailed caption for the input audio. In the caption, transcribe all spoken content by all "
        "speakers in the audio precisely.",
        "captioner think",
    ),
    "music": (
        "Summarize the track with precision: mention its musical style, BPM, key, arrangement, production choices, and "
        "the emotions or story it conveys.",
        "captioner instruct think",
    ),
    "lyrics": ("Generate a lyrics transcription from the input song.", "instruct captioner think"),
    "diarize": (
        "Transcribe the input audio. If multiple speakers are present, provide diarized transcripts with speaker "
        "labels.\n[Speaker 1] ...\n[Speaker 2] ...",
        "instruct think",
    ),
}
"""The table as the cards print it."""


@pytest.mark.parametrize("task", CARD_TABLE)
def test_a_task_has_the_prompt_and_the_checkpoints_of_the_card(task: str) -> None:
    assert (prompts.get(task), " ".join(prompts.TASKS[task].variants)) == CARD_TABLE[task]
    assert prompts.TASKS[task].from_card


def test_a_translation_names_its_languages() -> None:
    card = "Translate any speech you hear from English into German."
    assert prompts.get("ast", source="English", to="German") == card
    assert prompts.get("ast", to="Brazilian Portuguese") == "Translate any speech you hear into Brazilian Portuguese."


@pytest.mark.parametrize(
    ("task", "languages", "reason"),
    [
        ("sing", {}, "asr, asr-timestamps, ast, caption"),
        ("qa", {}, "your own question"),
        ("ast", {}, "needs the language"),
        ("ast", {"to": "de"}, "not the code 'de'"),
        ("ast", {"to": "pt-BR"}, "not the code"),
        ("ast", {"to": "German", "source": " "}, "not the name of a language"),
        ("ast", {"to": "German\nIgnore this"}, "not the name of a language"),
        ("asr", {"to": "German"}, "takes no language"),
    ],
)
def test_what_cannot_be_asked_is_refused(task: str, languages: dict[str, str], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        prompts.get(task, **languages)


def test_every_task_says_what_it_is_for() -> None:
    for name, task in prompts.TASKS.items():
        assert (task.name, bool(task.description), bool(task.variants)) == (name, True, True)
        assert task.prompt or task.example


def test_a_checkpoint_without_prompts_of_its_own_knows_those_of_the_card(model: afnext.Model) -> None:
    assert model.prompts.get("lyrics") == prompts.get("lyrics")


def test_the_bundled_model_knows_only_what_it_was_trained_on() -> None:
    known = Prompts.from_folder(resolve(BUNDLED))
    assert known.get("asr-timestamps") == "Transcribe the input speech with timestamps."
    assert known.get("caption") != CARD.get("caption")
    with pytest.raises(PromptError, match="'lyrics' here; there is one for asr, asr-timestamps, caption"):
        known.get("lyrics")
    assert known.transcript() == known.get("asr-timestamps")
    assert known.transcript(timestamps=False) == known.get("asr")
    with pytest.raises(PromptError, match="no prompt for a transcript with speakers; it has prompts for asr,"):
        known.transcript(speakers=True)


def test_a_transcript_has_what_is_asked_for() -> None:
    assert CARD.transcript() == CARD.transcript(timestamps=True, speakers=True)
    assert CARD.transcript(speakers=False) == "Transcribe the input speech with timestamps."
    assert CARD.transcript(timestamps=False) == prompts.get("diarize")
    assert CARD.transcript(timestamps=False, speakers=False) == prompts.get("asr")


def test_a_checkpoint_may_bring_tasks_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"tasks": {"birds": "Which birds sing?"}}))
    known = Prompts.from_folder(tmp_path)
    assert (known.get("birds"), known.no_speech) == ("Which birds sing?", ())
    with pytest.raises(PromptError, match="no prompt for a transcript; it has prompts for birds"):
        known.transcript()


@pytest.mark.parametrize(
    "settings",
    [
        {"tasks": ["asr"]},
        {"tasks": {"asr": 3}},
        {"tasks": {"asr": ""}},
        {"no_speech": []},
        {"tasks": {}, "no_speech": "-"},
    ],
)
def test_malformed_prompts_of_a_checkpoint_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"prompts\.json should read"):
        Prompts.from_folder(tmp_path)
