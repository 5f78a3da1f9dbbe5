"""`afnext verify`: a sound checkpoint passes beside transformers, and each kind of fault is a row and a status."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import save_checkpoint
from support.command_line import CommandLine

from afnext.bench.model import verify as module
from afnext.bench.model.e2e_subjects import TransformersSubject
from afnext.bench.model.verify import FAIL, PASS, SKIP, Report, Row, verify
from afnext.runtime.model.hub import BUNDLED

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("verify") / "model").folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def states(report: Report, check: str) -> dict[str, str]:
    return {row.case: row.state for row in report.rows if row.check == check}


def test_a_random_checkpoint_passes_every_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[TransformersSubject] = []
    encode = TransformersSubject.encode
    monkeypatch.setattr(TransformersSubject, "encode", lambda self: encoded.append(self) or encode(self))
    report = verify(str(folder), device="cpu", schemes=("dense", "int8"), dtypes=("float32",), new_tokens=8)
    assert report.passed, [row for row in report.rows if row.state == FAIL]
    assert states(report, "files")["weights"] == PASS
    assert states(report, "settings")["token ids"] == PASS
    assert states(report, "parity") == {"float32, jfk": PASS, "float32, scene": PASS}
    assert states(report, "schemes") == {"int8": PASS}
    assert {case.split(", ")[1] for case in states(report, "stages")} == {"log-mel", "encode", "prefill", "decode"}
    assert set(states(report, "memory")) == {"float32", "int8"}
    json.dumps(report.to_dict())
    assert len(encoded) <= 1 + module._ROUNDS, "once to compare, and the rounds: its encoder is slow"


@pytest.mark.slow
def test_the_bundled_model_passes() -> None:
    report = verify(BUNDLED, device="cpu", schemes=("dense", "int4"), dtypes=("float32", "bfloat16"), new_tokens=24)
    assert report.passed, [row for row in report.rows if row.state == FAIL]
    assert next(row for row in report.rows if row.case == "float32, jfk").found == "all 24 tokens are the same"


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_audio_id(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["audio_token_id"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def with_a_wrong_hash(folder: Path) -> None:
    blob = folder / hashlib.sha256(b"what was published").hexdigest()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)


@pytest.mark.parametrize(
    ("change", "check", "found"),
    [
        (without_a_tensor, "files", "up_proj"),
        (with_another_audio_id, "settings", "<sound>"),
        (with_a_wrong_hash, "files", "SHA-256"),
    ],
)
def test_faults_of_a_checkpoint_are_rows(folder: Path, tmp_path: Path, change: Change, check: str, found: str) -> None:
    broken = copied(folder, tmp_path / "broken")
    change(broken)
    report = verify(str(broken), device="cpu", schemes=(), dtypes=())
    (row,) = (row for row in report.rows if row.state == FAIL)
    assert row.check == check
    assert found in row.found
    assert not report.passed


def test_a_right_hash_is_a_pass(folder: Path, tmp_path: Path) -> None:
    cached = copied(folder, tmp_path / "cached")
    data = (cached / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    (cached / "model.safetensors").rename(blob)
    (cached / "model.safetensors").symlink_to(blob)
    report = verify(str(cached), device="cpu", schemes=(), dtypes=())
    assert states(report, "files")["hashes"] == PASS


class Reference:
    """Answers 5, 6, 7, scores as given."""

    def __init__(self, lead: float):
        self.lead = lead

    def greedy(self, audio: Any, new_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        scores = torch.zeros(10)
        scores[6], scores[9] = 10.0, 10.0 - self.lead
        return [5, 6, 7][:new_tokens], [scores] * new_tokens


@pytest.mark.parametrize(
    ("lead", "dtype", "state"),
    [(0.3, "bfloat16", PASS), (0.3, "float32", FAIL), (0.0001, "float32", PASS), (3.0, "bfloat16", FAIL)],
)
def test_another_token_is_a_fault_unless_the_reference_could_not_tell_them_apart(
    lead: float, dtype: str, state: str
) -> None:
    reference: Any = Reference(lead)
    assert module._compared(reference, torch.zeros(1).numpy(), [5, 6, 7], dtype) == (PASS, "all 3 tokens are the same")
    found, text = module._compared(reference, torch.zeros(1).numpy(), [5, 9, 7], dtype)
    assert found == state
    assert "token 1 of 3 is 9 instead of 6" in text
    longer = module._compared(reference, torch.zeros(1).numpy(), [5, 6, 7, 8], dtype)
    assert longer == (FAIL, "the answer has 4 tokens and the reference's ends after 3")


def test_what_does_not_fit_is_skipped_with_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    report = verify(str(folder), device="cpu", schemes=("dense", "int4"), dtypes=("float32",))
    assert states(report, "parity") == {"float32": SKIP}
    assert states(report, "schemes") == {"int4": SKIP}
    assert any("and 1,000 are free" in row.found for row in report.rows)


def test_the_command_prints_a_table_writes_json_and_ends_with_a_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def checked(model: str, **options: Any) -> Report:
        return Report(model, "cpu", [Row("files", "weights", PASS, "all there"), Row("parity", "x", state, "tokens")])

    monkeypatch.setattr(module, "verify", checked)
    run = CommandLine(monkeypatch, capsys, ("verify",))
    for state, code in ((PASS, 0), (FAIL, 1)):
        done = run(str(folder), "--out", tmp_path / "verify.json")
        assert done.returncode == code
        assert "all there" in done.stdout
        assert json.loads((tmp_path / "verify.json").read_text())["passed"] is (code == 0)
        assert json.loads(run(str(folder), "--json").stdout)["rows"][1]["state"] == state
