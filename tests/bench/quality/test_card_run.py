"""`afnext bench card` from the questions to the table: batches, continuation, unscored rows, published figures."""

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support import card

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.bench.core.record import ResultsError
from afnext.bench.quality.card import run as module
from afnext.bench.quality.card.judge import Judge
from afnext.bench.quality.card.run import run_card, show
from afnext.bench.quality.data import Item
from afnext.kernels.errors import AfnextError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_checkpoint(tmp_path_factory.mktemp("card") / "model"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked: messages of all conversations. Every reply is the same."""
    seen: list[Any] = []

    def chat(self: Any, conversations: Sequence[Any], **options: Any) -> list[Any]:
        seen.extend(conversations)
        return [SimpleNamespace(text="It is (A) a man.", finish_reason="stop")] * len(conversations)

    monkeypatch.setattr(afnext.Model, "chat", chat)
    return seen


def test_a_whole_run_and_its_continuation(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = card.librispeech(tmp_path / "data"), tmp_path / "out"
    sizes: list[int] = []

    def answered(scoring: Any, judge: Any, loaded: Any, items: Sequence[Item], limit: int) -> Any:
        sizes.append(len(items))
        return real(scoring, judge, loaded, items, limit)

    real = module.answered
    monkeypatch.setattr(module, "answered", answered)
    options: dict[str, Any] = {"model": model, "device": "cpu", "schemes": ("fp32",), "max_new_tokens": 4}
    (figure,) = run_card("librispeech-clean", folder, out, batch=2, **options)
    assert sizes == [2, 1], "in batches"
    assert figure.record.values["items"] == 3
    assert figure.interval is not None
    assert figure.interval[0] > 50, "random weights transcribe nothing"
    assert "Whisper's English normalizer" in figure.record.case["scoring"]
    path = out / "librispeech-clean-fp32.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + '\n"2","1089')  # what an interruption leaves
    sizes.clear()
    (again,) = run_card("librispeech-clean", folder, out, batch=8, **options)
    assert sizes == [2], "the first row is kept"
    assert again.record.values["wer"] == pytest.approx(figure.record.values["wer"], abs=0.2)
    with pytest.raises(ResultsError, match="another model"):
        run_card("librispeech-clean", folder, out, **{**options, "max_new_tokens": 5})


def test_a_bad_recording_costs_its_own_row_alone(model: str, tmp_path: Path) -> None:
    folder = card.librispeech(tmp_path / "data")
    broken = folder / "LibriSpeech/test-clean/121/121726/121-121726-0000.flac"
    broken.write_bytes(b"no audio")
    options: dict[str, Any] = {"model": model, "device": "cpu", "schemes": ("fp32",), "max_new_tokens": 2}
    (figure,) = run_card("librispeech-clean", folder, tmp_path / "out", batch=3, **options)
    assert (figure.record.values["items"], figure.record.values["failed"]) == (2, 1)


def test_choices_are_scored_and_the_table_says_what_is_published(
    model: str, tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (figure,) = run_card("mmau", card.mmau(tmp_path), tmp_path / "out", model=model, device="cpu", schemes=("fp32",))
    assert figure.interval is not None
    assert figure.interval[0] == 100
    show([figure], Console(width=160))
    said = " ".join(capsys.readouterr().out.split())
    assert "74.20 / 75.01 / 75.76" in said
    assert "MMAU's string match" in said


def test_open_answers_are_unscored_without_a_judge_and_their_rows_are_kept_for_one(
    model: str, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = card.mmau_pro(tmp_path / "data"), tmp_path / "out"
    options: dict[str, Any] = {"model": model, "device": "cpu", "schemes": ("fp32",)}
    (figure,) = run_card("mmau-pro", folder, out, **options)
    audios = [[part["audio"] for part in one[0]["content"] if part["type"] == "audio"] for one in asked]
    assert [len(paths) for paths in audios] == [1, 2, 1, 1], "both recordings are heard"
    assert figure.record.values["unscored"] == 1
    assert figure.record.values["score"] == pytest.approx(1 / 3), "of a right choice, a wrong one, a broken instruction"
    show([figure], Console(width=160))
    assert "1 rows without choices are left out" in capsys.readouterr().out
    with (out / "mmau-pro-fp32.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[2]
    kept = {name: row[name] for name in ("question", "reference", "reply", "category", "figure")}
    assert kept == {
        "question": "What is it about?",
        "reference": "It is about duty.",
        "reply": "It is (A) a man.",
        "category": "open",
        "figure": "",
    }
    monkeypatch.setattr(Judge, "score", lambda self, *case: 0.4)
    judge = Judge("http://localhost", "strict")
    with pytest.raises(ResultsError, match="another manifest"):
        run_card("mmau-pro", folder, out, judge=judge, **options)
    (figure,) = run_card("mmau-pro", folder, out, judge=judge, restart=True, **options)
    assert figure.record.values["unscored"] == 0
    assert figure.record.values["score"] == pytest.approx((1 + 0.4) / 4)
    assert figure.record.case["judge"] == "strict"


def test_a_translation_asks_with_the_cards_prompt_and_is_scored_by_bleu(
    model: str, tmp_path: Path, asked: list[Any]
) -> None:
    pytest.importorskip("sacrebleu")
    folder = card.covost2(tmp_path / "data", split=True)
    (figure,) = run_card("covost2-en-de", folder, tmp_path / "out", model=model, device="cpu", schemes=("fp32",))
    assert asked[0][0]["content"][-1]["text"] == "Translate any speech you hear from English into German."
    assert figure.interval is not None
    assert 0 <= figure.interval[0] < 20


def test_mistakes_are_named() -> None:
    with pytest.raises(AfnextError, match="choose from librispeech-clean"):
        run_card("mmmu", Path(), Path(), model="")
    with pytest.raises(AfnextError, match="unknown scheme int5"):
        run_card("mmau", Path(), Path(), model="", schemes=("int5",))
