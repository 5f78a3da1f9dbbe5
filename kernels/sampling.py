"""From logits to the next token: repetition penalty, then greedy choice or filtered sampling.

    penalized:  logit / p if logit > 0 else logit * p        for every token already in the sequence
    scaled:     logit / temperature
    top_k:      the k most likely tokens stay                (0: all)
    top_p:      the most likely tokens stay until their probabilities, renormalized, reach p; at least one
    min_p:      tokens with at least min_p times the highest probability stay
    drawn:      the first token, from the most likely on, whose cumulative probability exceeds u * total

in this order. u is uniform in [0, 1) and comes from the caller, one a row, so a row's draw depends neither on the rest
of its batch nor on the device's random generator. Rows are independent and carry their own parameters.

Source: Keskar et al. 2019 (repetition penalty), Holtzman et al. 2019 (top-p), Nguyen et al. 2024 (min-p).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Operation


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of each row, [batch] each: float32, top_k int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def penalize_reference(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """The specification of `penalize`."""
    out = logits.clone()
    for row in range(logits.shape[0]):
        for token in torch.nonzero(seen[row]).flatten().tolist():
            value, p = logits[row, token], penalty[row]
            out[row, token] = value / p if value > 0 else value * p
    return out


def sample_reference(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """The specification of `sample`: float64, one row and one token at a time."""
    drawn = []
    for row in range(logits.shape[0]):
        scaled = logits[row].double() / rows.temperature[row].double()
        order = torch.argsort(scaled, descending=True, stable=True).tolist()
        order = order[: int(rows.top_k[row]) or None]
        probabilities = scaled[order].softmax(0).tolist()
        kept: list[tuple[int, float]] = []
        mass = 0.0
        for token, probability in zip(order, probabilities, strict=True):
            enough = mass >= float(rows.top_p[row]) or probability < float(rows.min_p[row]) * probabilities[0]
            if kept and enough:
                break
            kept.append((token, probability))
            mass += probability
        target, cumulative = float(uniform[row]) * mass, 0.0
        for token, probability in kept:  # noqa: B007 - the token at the break is the draw
            cumulative += probability
            if cumulative > target:
                break
        drawn.append(token)
    return torch.tensor(drawn, device=logits.device)


_penalize = Operation("penalize", penalize_reference)
_sample = Operation("sample", sample_reference)


@_penalize.implementation("torch")
def _penalize_torch(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@_sample.implementation("torch")
def _sample_torch(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    scaled, order = (logits / rows.temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(rows.top_k > 0, rows.top_k, logits.shape[-1])
    probabilities = scaled.masked_fill(rank >= top_k[:, None], -torch.inf).softmax(-1)
    mass = probabilities.cumsum(-1)
    # Measured against its own total: a float32 softmax over a whole vocabulary adds up to 1 only within about 1e-5, and
    # top_p = 1 would cut off the tail.
    keep = mass - probabilities < rows.top_p[:, None] * mass[:, -1:]
    keep &= probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(-1)
    # A parallel sum rounds differently at each rank: without `keep` the draw could fall just beyond the last one kept.
    choice = (keep & (cumulative > uniform[:, None] * cumulative[:, -1:])).int().argmax(-1, keepdim=True)
    return order.gather(1, choice).squeeze(1)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply each row's repetition penalty to the tokens it has seen.

    logits: [batch, vocab] float32; seen: [batch, vocab] bool; penalty: [batch] float32, 1 for none.
    Returns like logits. Raises ValueError when shapes do not fit.
    """
    _check(logits, penalty)
    if seen.shape != logits.shape:
        raise ValueError(f"seen must have the shape of the logits, {tuple(logits.shape)}, got {tuple(seen.shape)}")
    return _penalize.on(logits.device)(logits, seen, penalty)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row. logits: [batch, vocab]. Returns [batch] int64."""
    return logits.argmax(-1)


def sample(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """Draw one token a row.

    logits: [batch, vocab] float32, penalized; rows: the parameters, temperature > 0; uniform: [batch] float32 in
    [0, 1). Returns [batch] int64. Raises ValueError when shapes do not fit.
    """
    _check(logits, uniform, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    return _sample.on(logits.device)(logits, rows, uniform)


def _check(logits: Tensor, *per_row: Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or any(x.shape != logits.shape[:1] for x in per_row):
        raise ValueError(
            f"expected float32 logits [batch, vocab] and one value a row, got {logits.dtype} {tuple(logits.shape)} "
            f"and {', '.join(str(tuple(x.shape)) for x in per_row)}"
        )
