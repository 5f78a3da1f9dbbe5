"""Training: where the encoder's weights go between phases, and that a few steps learn a batch."""

from pathlib import Path

import pytest
import torch

from afnext.bench.tiny import train
from afnext.bench.tiny.batches import Batches, Stage
from afnext.bench.tiny.model import TinyModel
from afnext.bench.tiny.tokenizer import build_tokenizer
from afnext.bench.tiny.voices import VoiceBank

STAGE = Stage(steps=1, seconds=2.0, crops=1, batch=4, questions=3)


def optimizer(model: TinyModel) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": [parameter]} for parameter in parameters[:3]])


def test_an_averaged_encoder_lies_between_before_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    phases = [
        train.Phase([STAGE], encoder_rate=0.0),
        train.Phase([STAGE], encoder_rate=1e-3, averaged=0.25),
        train.Phase([STAGE], encoder_rate=0.0),
    ]
    monkeypatch.setattr(train, "PHASES", phases)
    model = TinyModel(300)
    adam, weight = optimizer(model), model.audio_tower.conv1.weight
    begun = weight.detach().clone()
    for step, expected in enumerate((0.0, 1.0, 2.0 - 0.25 * 1.0)):
        train._enter(step, model, adam, tmp_path)
        torch.testing.assert_close(weight.detach(), begun + expected)
        assert weight.requires_grad == (step == 1)
        with torch.no_grad():
            weight += 1.0


def test_a_few_steps_learn_a_batch(bank: VoiceBank, seed: int) -> None:
    tokenizer = build_tokenizer()
    batch = Batches(bank, tokenizer, [STAGE], seed)[0]
    model, auxiliary = TinyModel(tokenizer.get_vocab_size()), train.Auxiliary()
    adam = torch.optim.AdamW([*model.parameters(), *auxiliary.parameters()], lr=3e-4)
    totals = []
    for _ in range(6):
        losses = train.step_losses(model, auxiliary, batch)
        assert all(bool(loss.isfinite()) for loss in losses.values()), losses
        totals.append(train.total(losses))
        adam.zero_grad()
        totals[-1].backward()
        assert all(bool(p.grad.isfinite().all()) for p in auxiliary.parameters() if p.grad is not None)
        adam.step()
    assert totals[-1] < 0.9 * totals[0]


def test_the_schedule_rises_and_falls_within_a_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = Stage(steps=400, seconds=2.0, crops=1, batch=4)
    monkeypatch.setattr(train, "PHASES", [train.Phase([long], encoder_rate=1e-3, rate=2e-3)])
    model = TinyModel(300)
    adam = optimizer(model)
    rates = []
    for step in (0, 99, 200, 399):
        train._enter(step, model, adam, tmp_path)
        rates.append([group["lr"] for group in adam.param_groups])
    assert rates[0][0] < rates[1][0] > rates[2][0] > rates[3][0] > 0
    assert all(encoder == pytest.approx(rest / 2) == pytest.approx(heads / 2) for encoder, rest, heads in rates)
