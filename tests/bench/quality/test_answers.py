"""Scores of planted manifests and answers, the refusal of hostile manifests, and runs that go on where they stopped."""

import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afnext
from afnext.bench.core import record
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.bench.core.record import ResultsError
from afnext.bench.quality.answers import run_quality, word_errors
from afnext.bench.quality.data import LETTERS, ManifestError, choice_prompt, match_choice, normalise, read_manifest
from afnext.runtime.app.conversation import Conversation
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.errors import AudioError


class FakeModel:
    """Answers as planted, by the name of the file; counts its answers and fails where told to."""

    def __init__(self, answers: dict[str, str], weight: float = 1.0, stop_after: int | None = None):
        self.network = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.constant_(self.network.weight, weight)
        self.network.dtype = torch.float32
        self.network.config = type("Config", (), {"quantization": None})()
        self.options = EngineOptions()
        self.template = type("Template", (), {"source": "{{ messages }}"})()
        self.answers, self.stop_after, self.asked = answers, stop_after, list[tuple[str, str]]()

    def ask(self, audio: str, question: str, **options: Any) -> Any:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        name = Path(audio).name
        self.asked.append((name, question))
        if name not in self.answers:
            raise AudioError(f"{name} cannot be read")
        return type("Answer", (), {"text": self.answers[name], "finish_reason": "stop"})()


def manifest(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return folder / name


def speech(folder: Path, answers: dict[str, tuple[str, str]]) -> tuple[Path, FakeModel]:
    """A manifest of {file: (reference, answer)} and the model that gives those answers."""
    data = manifest(folder, [{"audio": name, "text": text} for name, (text, _) in answers.items()])
    return data, FakeModel({name: answer for name, (_, answer) in answers.items()})


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


SPEECH = {
    "a.wav": ("Ask not what your country can do.", "ask not what YOUR country can do"),  # equal but for spelling
    "b.wav": ("one two three four", "one too three"),  # a substitution and a deletion
    "c.wav": ("hello", "well, hello there"),  # two insertions
}


def test_word_error_rate_counts_every_edit(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    result = run_quality(model, data, tmp_path / "out.csv", subject="planted")
    expected = {"words": 12, "substitutions": 1, "deletions": 1, "insertions": 2, "wer": 4 / 12, "failed": 0}
    assert {name: result.values[name] for name in expected} == expected
    rows = rows_of(tmp_path / "out.csv")
    assert [row["audio"] for row in rows] == list(SPEECH)
    assert [(row["substitutions"], row["deletions"], row["insertions"]) for row in rows] == [
        ("0", "0", "0"),
        ("1", "1", "0"),
        ("0", "0", "2"),
    ]
    assert rows[2]["hypothesis"] == "well, hello there"
    assert list(record.read(tmp_path / "out.jsonl")) == [result]


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


WORDS = st.lists(st.sampled_from(["yes", "no", "maybe", "so"]), max_size=8)


@settings(max_examples=60)
@given(WORDS, WORDS)
def test_word_errors_are_the_edit_distance(reference: list[str], hypothesis: list[str]) -> None:
    errors = word_errors(" ".join(reference), " ".join(hypothesis))
    edits = errors["substitutions"] + errors["deletions"] + errors["insertions"]
    assert (errors["words"], edits) == (len(reference), edit_distance(reference, hypothesis))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don’t  stop,\tBelievin'!", "dont stop believin"),
        ("a well-known   fact…", "a well known fact"),
        ("ＦＵＬＬ width", "full width"),
        ("हिन्दी", "हिन्दी"),
        ("20 €", "20"),
        ("...", ""),
    ],
)
def test_normalisation(text: str, words: str) -> None:
    assert normalise(text) == words


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_nemo_manifests_are_read_and_segments_refused(tmp_path: Path) -> None:
    row = {"audio_filepath": "x/a.wav", "text": "hi", "duration": 3.2, "offset": 0.0}
    (item,) = read_manifest(manifest(tmp_path, [row])).items
    assert item.audio == (tmp_path / "x" / "a.wav").resolve()
    with pytest.raises(ManifestError, match="row 1: offset is not supported"):
        read_manifest(manifest(tmp_path, [{**row, "offset": 1.5}]))


HOSTILE = [
    "../secret.wav",
    "a/../../secret.wav",
    "/etc/passwd",
    "C:\\x.wav",
    "\\\\host\\x.wav",
    "..\\x.wav",
    "a\0b",
    "",
]


@pytest.mark.parametrize("name", [*HOSTILE, 7, ["a.wav"], "\ud800.wav", "a" * 5000 + "/../.."])
@pytest.mark.parametrize("task", ["asr", "choice", "perplexity"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: Any, task: str) -> None:
    row = {"audio": name, "text": "x", "question": "?", "choices": ["x", "y"], "answer": "x"}
    with pytest.raises(ManifestError, match="row 1"):
        read_manifest(manifest(tmp_path, [row]), task)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(b"RIFF")
    data = manifest(tmp_path / "data", [{"audio": "a.wav", "text": "x"}])
    os.symlink(tmp_path / "secret.wav", tmp_path / "data" / "a.wav")
    with pytest.raises(ManifestError, match="leads out of"):
        read_manifest(data)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "7", '["x"]', '{"audio": "a.wav"}', "[" * 100_000, '{"text": 3}', "\xff"],
)
def test_damaged_manifests_are_refused_with_their_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"bad\.json"):
        read_manifest(tmp_path)


def test_a_folder_needs_exactly_one_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has none"):
        read_manifest(tmp_path)
    manifest(tmp_path, [{"text": "x"}], "a.jsonl")
    assert read_manifest(tmp_path).task == "perplexity"
    manifest(tmp_path, [{"text": "x"}], "b.jsonl")
    with pytest.raises(ManifestError, match=r"a\.jsonl, b\.jsonl"):
        read_manifest(tmp_path)


ANIMALS = ("a dog barks", "two dogs bark", "a cat", "dogs")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("(B)", 1),
        ("(b) two dogs bark", 1),
        ("C", 2),
        ("c.", 2),
        ("D) dogs", 3),
        ("B: two dogs bark", 1),
        ("The answer is (C).", 2),
        ("The correct option is B", 1),
        ("Answer: D", 3),
        ("A dog barks", 0),
        ("I hear a cat, I think.", 2),
        ("Two dogs bark!", 1),  # although "dogs" is a choice of its own
        ("(B) or (C)", None),
        ("(B) a cat", None),  # the letter contradicts the text
        ("a cat and a dog barks", None),
        ("(E)", None),
        ("A horse", None),
        ("", None),
    ],
)
def test_answers_are_matched_with_choices(answer: str, index: int | None) -> None:
    assert match_choice(answer, ANIMALS) == index


FORMS = (
    "{text}",
    "({letter})",
    "({letter}) {text}",
    "{letter}",
    "{letter}.",
    "{letter}. {text}",
    "The answer is {text}.",
)


@settings(max_examples=80)
@given(
    st.lists(st.from_regex(r"[a-z]{2,7}( [a-z]{2,7}){0,2}", fullmatch=True), min_size=2, max_size=8, unique=True),
    st.data(),
)
def test_a_named_choice_is_found_in_any_form(choices: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(choices) - 1))
    answer = data.draw(st.sampled_from(FORMS)).format(text=choices[index], letter=LETTERS[index])
    found = match_choice(answer, tuple(choices))
    others = [f" {choice} " for choice in choices if choice != choices[index]]
    ambiguous = any(choice in f" {normalise(answer)} " or f" {choices[index]} " in choice for choice in others)
    assert found == index or (ambiguous and found is None)


def test_choices_without_words_can_be_told_apart() -> None:
    assert [match_choice(answer, ("+", "-")) for answer in ("+", "-", "?")] == [0, 1, None]


def test_accuracy_by_task(tmp_path: Path) -> None:
    rows = [
        {"id": f"q{i}", "audio_id": f"./clips/{i}.wav", "question": "What is it?", "choices": list(ANIMALS)}
        | {"answer": answer, "task": task, "difficulty": "easy"}
        for i, (answer, task) in enumerate(
            [("a cat", "sound"), ("(B)", "sound"), ("dogs", "speech"), ("a cat", "speech")]
        )
    ]
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    model = FakeModel({"0.wav": "(C) a cat", "1.wav": "a cat", "2.wav": "dogs", "3.wav": "A horse"})
    result = run_quality(model, tmp_path, tmp_path / "out" / "choice.csv")
    assert (result.values["accuracy"], result.values["questions"], result.values["unclear"]) == (0.5, 4, 1)
    assert result.values["accuracy_low"] == pytest.approx(0.150, abs=1e-3)  # Wilson's interval for 2 of 4
    assert {name: group["correct"] for name, group in result.values["by"]["task"].items()} == {"sound": 1, "speech": 1}
    assert result.values["by"]["difficulty"]["easy"]["questions"] == 4
    assert [row["correct"] for row in rows_of(tmp_path / "out" / "choice.csv")] == ["1", "0", "1", "0"]
    assert model.asked[0][1] == choice_prompt("What is it?", ANIMALS)
    assert model.asked[0][1].split("\n")[2:] == ["(A) a dog barks", "(B) two dogs bark", "(C) a cat", "(D) dogs"]


@pytest.mark.parametrize(
    "row", [{"answer": "a horse"}, {"choices": ["one"]}, {"choices": "ab"}, {"question": None}, {"answer": 3}]
)
def test_questions_that_cannot_be_scored_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"audio": "a.wav", "question": "?", "choices": ["a dog", "a cat"], "answer": "a dog"}
    with pytest.raises(ManifestError, match="row 2"):
        read_manifest(manifest(tmp_path, [good, good | row]))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    expected = run_quality(model, data, tmp_path / "whole.csv")
    model.asked.clear()
    model.stop_after = 2
    out = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        run_quality(model, data, out)
    assert not out.with_suffix(".jsonl").exists()
    model.stop_after = None
    seen: list[tuple[int, int]] = []
    assert run_quality(model, data, out, progress=lambda done, total: seen.append((done, total))) == expected
    assert [name for name, _ in model.asked] == ["a.wav", "b.wav", "c.wav"]  # none of them twice
    assert seen == [(2, 3), (3, 3)]
    assert out.read_text() == (tmp_path / "whole.csv").read_text()


NASTY = [
    'quoted "words"',
    "two\nlines, and a comma",
    "\r",
    "line\u2028separator\x85",
    "=cmd()",
    "nul \0 byte",
    '"',
    "é,b",
]


def test_a_file_cut_anywhere_resumes_to_the_same_rows(tmp_path: Path, seed: int) -> None:
    data, model = speech(tmp_path, {f"{i}.wav": ("one two", text) for i, text in enumerate(NASTY)})
    expected = run_quality(model, data, tmp_path / "whole.csv")
    whole = (tmp_path / "whole.csv").read_bytes()
    out = tmp_path / "cut.csv"
    for length in (0, 5, *np.random.default_rng(seed).integers(1, len(whole), 25), len(whole) - 1):
        out.write_bytes(whole[: int(length)])
        assert run_quality(model, data, out) == expected
        assert out.read_bytes() == whole


def test_rows_of_another_model_or_manifest_are_never_mixed_in(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    out = tmp_path / "out.csv"
    run_quality(model, data, out)
    before = out.read_bytes()
    other = FakeModel(dict.fromkeys(SPEECH, ""), weight=1.01)
    with pytest.raises(ResultsError, match=r"another model .*--restart"):
        run_quality(other, data, out)
    with pytest.raises(ResultsError, match="another model"):
        run_quality(model, data, out, max_new_tokens=7)
    manifest(tmp_path, [{"audio": name, "text": "changed"} for name in SPEECH])
    with pytest.raises(ResultsError, match="another manifest"):
        run_quality(model, data, out)
    assert out.read_bytes() == before
    assert run_quality(other, data, out, restart=True).values["deletions"] == 3
    assert len(rows_of(out)) == 3


def test_a_csv_of_another_task_is_not_touched(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    (tmp_path / "mine.csv").write_text("my,own\n1,2\n")
    with pytest.raises(ResultsError, match="other columns"):
        run_quality(model, data, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "my,own\n1,2\n"
    with pytest.raises(ResultsError, match=r"\.csv"):
        run_quality(model, data, tmp_path / "out.json")


def test_a_limit_can_grow(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    assert run_quality(model, data, tmp_path / "out.csv", limit=1).values["wer"] == 0
    assert run_quality(model, data, tmp_path / "out.csv").values["wer"] == pytest.approx(4 / 12)
    assert len(model.asked) == 3
    with pytest.raises(ResultsError, match="limit is 0"):
        run_quality(model, data, tmp_path / "out.csv", limit=0)


def test_failures_are_kept_out_of_the_score_and_tried_again(tmp_path: Path) -> None:
    data, model = speech(tmp_path, SPEECH)
    missing = model.answers.pop("b.wav")
    first = run_quality(model, data, tmp_path / "out.csv")
    assert (first.values["failed"], first.values["items"], first.values["words"]) == (1, 2, 8)
    assert "b.wav cannot be read" in rows_of(tmp_path / "out.csv")[1]["error"]
    model.answers["b.wav"] = missing
    again = run_quality(model, data, tmp_path / "out.csv")
    assert (again.values["failed"], again.values["wer"]) == (0, pytest.approx(4 / 12))
    assert [name for name, _ in model.asked].count("a.wav") == 1


def test_missing_jiwer_is_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = speech(tmp_path, SPEECH)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(afnext.AfnextError, match="pip install jiwer"):
        run_quality(model, data, tmp_path / "out.csv")
    assert not model.asked
    assert not (tmp_path / "out.csv").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> afnext.Model:
    return afnext.load(checkpoint, dtype="float32", chunk_size=16)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    jfk = Path(__file__).parents[3] / "bench" / "data" / "jfk.flac"
    shutil.copy(jfk, tmp_path / "jfk.flac")
    rows = [{"text": "Short."}, {"text": "Longer, so that several chunks of sixteen tokens are needed for it. " * 2}]
    return manifest(tmp_path, [*rows, {"audio": "jfk.flac", "text": "And so"}])


@torch.inference_mode()
def next_token_logits(model: afnext.Model, ids: list[int], audio: Any = ()) -> torch.Tensor:
    """The model's own scores of what follows `ids`, from its prefill alone: [vocab]."""
    from afnext.runtime.engine.kv_cache import KVCache
    from afnext.runtime.engine.prefill import PromptEmbeddings, prefill
    from afnext.runtime.engine.timings import Timings

    network = model.network
    cache = KVCache(network.config.decoder, pages=1, page_size=len(ids), device=network.device, dtype=network.dtype)
    logits = prefill(
        network,
        cache,
        cache.allocate(len(ids)),
        PromptEmbeddings(network, ids, audio, encode_batch=1, timings=Timings()),
        len(ids),
        chunk_size=10_000,
        timings=Timings(),
    )
    return logits[0].double()


def test_perplexity_equals_that_of_one_prefill_a_token(model: afnext.Model, texts: Path, tmp_path: Path) -> None:
    from afnext.runtime.engine.sampler import SamplingParams

    result = run_quality(model, texts, tmp_path / "out.csv", task="perplexity")
    spoken = {"role": "user", "content": [{"type": "audio", "audio": str(texts.parent / "jfk.flac")}]}
    spoken["content"].append({"type": "text", "text": "Transcribe the input speech."})
    conversation = Conversation.load([spoken], model.tokenizer, model.template, max_audio_seconds=1800, truncate=False)
    prompt = conversation.request(SamplingParams(max_new_tokens=1))
    nll = []
    for item in read_manifest(texts, "perplexity").items:
        ids = model.tokenizer.encode(item.text)
        before, audio, rest = (prompt.token_ids, prompt.audio, ids) if item.audio else (ids[:1], (), ids[1:])
        for i, token in enumerate(rest):
            scores = next_token_logits(model, [*before, *rest[:i]], audio)
            nll.append((scores.logsumexp(0) - scores[token]).item())
    assert result.values["tokens"] == len(nll)
    assert result.values["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert "kl_nats_per_token" not in result.values


def test_a_model_agrees_with_itself(model: afnext.Model, texts: Path, tmp_path: Path) -> None:
    values = run_quality(model, texts, tmp_path / "out.csv", task="perplexity", baseline=model).values
    assert (values["kl_nats_per_token"], values["top1_agreement"]) == (0, 1)
    assert values["perplexity"] == values["baseline_perplexity"]


def test_divergence_and_agreement_with_another_model(
    model: afnext.Model, checkpoint: Path, tmp_path: Path, seed: int
) -> None:
    text = "Ask what you can do for your country."
    data = manifest(tmp_path, [{"text": text}])
    other = afnext.load(checkpoint, dtype="float32")
    weight = other.network.decoder.lm_head.weight
    weight += 0.02 * torch.randn_like(weight)
    values = run_quality(other, data, tmp_path / "out.csv", baseline=model).values
    ids = model.tokenizer.encode(text)
    p, q = (
        torch.stack([next_token_logits(one, ids[:i]) for i in range(1, len(ids))]).softmax(-1) for one in (model, other)
    )
    assert values["kl_nats_per_token"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert values["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert values["baseline_perplexity"] != values["perplexity"]


def test_what_a_baseline_cannot_be_compared_by_is_refused(model: afnext.Model, texts: Path, tmp_path: Path) -> None:
    speech_only = manifest(tmp_path / "asr", [{"audio": "jfk.flac", "text": "x"}])
    with pytest.raises(afnext.AfnextError, match="task is asr"):
        run_quality(model, speech_only, tmp_path / "out.csv", baseline=model)


def test_texts_that_cannot_be_scored_are_counted(model: afnext.Model, tmp_path: Path) -> None:
    data = manifest(tmp_path, [{"text": "x"}, {"text": ""}, {"text": "enough"}, {"audio": "none.wav", "text": "x"}])
    result = run_quality(model, data, tmp_path / "out.csv", task="perplexity")
    assert (result.values["failed"], result.values["tokens"]) == (3, 5)
    errors = [row["error"] for row in rows_of(tmp_path / "out.csv")]
    assert ["too short" in error for error in errors] == [True, True, False, False]
    assert "none.wav" in errors[3]


def test_asr_with_a_real_model(model: afnext.Model, texts: Path, tmp_path: Path) -> None:
    data = manifest(texts.parent, [{"audio": "jfk.flac", "text": "And so, my fellow Americans"}])
    result = run_quality(model, data, tmp_path / "out.csv", max_new_tokens=12)
    (row,) = rows_of(tmp_path / "out.csv")
    answer = model.ask(str(texts.parent / "jfk.flac"), "Transcribe the input speech.", max_new_tokens=12, temperature=0)
    assert row["hypothesis"] == answer.text
    assert result.values["words"] == 5
    assert result.values["cut_answers"] == int(answer.finish_reason == "length")
