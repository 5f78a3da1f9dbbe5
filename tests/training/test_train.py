"""Training: a few steps of either part learn a batch, and a loop goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from training import loop, train
from training.batches import Batches, Stage
from training.features import Crop
from training.hearing import HearingHeads, Scenes, hearing_losses, hearing_total
from training.model import TinyModel
from training.tokenizer import build_tokenizer
from training.voices import VoiceBank


def test_a_few_steps_learn_to_answer_a_batch(crops: tuple[list[Crop], list[Crop]], seed: int) -> None:
    tokenizer = build_tokenizer()
    batch = Batches(*crops, tokenizer, [Stage(steps=1, batch=4, questions=3, long=0.5)], seed)[0]
    torch.manual_seed(seed)
    model, auxiliary = TinyModel(tokenizer.get_vocab_size()), train.Auxiliary()
    adam = torch.optim.AdamW([*model.parameters(), *auxiliary.parameters()], lr=1e-3)
    totals = []
    for _ in range(6):
        total, parts = train.step_losses(model, auxiliary, batch)
        assert all(bool(loss.isfinite()) for loss in parts.values()), parts
        adam.zero_grad()
        total.backward()
        assert all(bool(p.grad.isfinite().all()) for p in auxiliary.parameters() if p.grad is not None)
        adam.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.9 * totals[0]


def test_a_few_steps_learn_to_hear_a_batch(bank: VoiceBank, seed: int) -> None:
    batch = Scenes(bank, 1, seed)[0]
    torch.manual_seed(seed)
    model, heads = TinyModel(300), HearingHeads()
    adam = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3)
    totals = []
    for _ in range(5):
        total = hearing_total(hearing_losses(heads(model, batch), batch))
        adam.zero_grad()
        total.backward()
        adam.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.95 * totals[0]


def test_training_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    """Stopped after 4 of 6 steps and begun anew, the weights are those of 6 steps in one go."""
    monkeypatch.setattr(loop, "_SAVE_EVERY", 2)
    inputs = torch.randn(6, 8, 5)

    def run(state: Path, stop: int) -> nn.Linear:
        torch.manual_seed(seed)
        layer, seen = nn.Linear(5, 1), 0

        def losses(batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal seen
            seen += 1
            if seen > stop:
                raise InterruptedError
            loss = (layer(batch.float()) - batch.sum(-1, keepdim=True)).square().mean()
            return loss, {"loss": loss}

        groups, modules = [loop.Group(list(layer.parameters()), 1e-2)], nn.ModuleDict({"layer": layer})
        loop.run_training(state, modules, groups, list(inputs), losses, Console(quiet=True))  # type: ignore[arg-type]
        return layer

    whole = run(tmp_path / "whole.pt", 6)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts.pt", 4)
    resumed = run(tmp_path / "parts.pt", 2)
    torch.testing.assert_close(resumed.weight, whole.weight)
