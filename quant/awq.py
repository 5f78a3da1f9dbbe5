"""Activation-aware scaling: weights of large inputs are rounded more finely, at the cost of those of small inputs.

Multiplying input channel j of a weight by s[j] and dividing the input by s[j] has no effect before rounding; after
rounding, the channel's error is that of a weight s[j] times larger, divided by s[j]:

    y = W x ~ Q(W diag(s)) (x / s),    s[j] = mean|x[j]|^alpha,    alpha from 0, 1/20 .. 1 with the least error
    error = sum over calibration rows x of ||Q(W diag(s)) (x / s) - W x||^2

The division costs nothing if the preceding operation is linear in its output channels, because its weights can absorb
it (`Fold`). In this model family:

    decoder   input_layernorm -> q, k, v;  post_attention_layernorm -> gate, up;  final norm -> lm_head
              v_proj -> o_proj, one scale for the query heads that share a value head
              up_proj -> down_proj, as silu(gate) * up is linear in up
    encoder   self_attn_layer_norm -> q, k, v;  final_layer_norm -> fc1, weight and bias of the norm
              v_proj -> out_proj;  not fc1 -> fc2, nor linear_1 -> linear_2 in the adaptor: GELU lies between
    adaptor   the encoder's last norm -> linear_1, one scale for the two channels that RoTE rotates into each other

AWQ's second step, clipping the weights of a group, is not used: int4's fitted scales have the same effect.

Source: Lin et al. 2023, arXiv:2306.00978 (AWQ).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rounded = Callable[[Tensor], Tensor]
"""dequantize(quantize(weight)) of a weight [rows, in], each row independently."""

STEPS = 20
_ROWS = 4096  # rows of a weight at a time; rows are rounded independently
_SMALLEST = 1e-4  # of the largest magnitude: smaller channels, even zero ones, are scaled as if they had this magnitude


@dataclass(frozen=True)
class Scaling:
    """The result of a search: the scales [channels] float32, their exponent, and the error with and without them."""

    scales: Tensor
    alpha: float
    error: float
    plain_error: float


@dataclass(frozen=True)
class Fold:
    """Linear layers with the same input, and the layer before them that can absorb the division by their scales.

    source: the norm or linear layer before, whose output channel i is divided by scale rows[i] (None: i); None if no
    layer can. targets: the linear layers, whose input channel j is multiplied by scale columns[j] (None: j).
    """

    source: str | None
    targets: tuple[str, ...]
    rows: Tensor | None = None
    columns: Tensor | None = None


def encoder_folds() -> tuple[Fold, ...]:
    """The folds within an encoder layer; fc2 has none."""
    return (
        Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.out_proj",)),
        Fold("final_layer_norm", ("fc1",)),
        Fold(None, ("fc2",)),
    )


def adaptor_folds(width: int, rotated: int) -> tuple[Fold, ...]:
    """The folds of the adaptor after the encoder's last norm of `width` channels; RoTE rotates the first `rotated`."""
    channels = torch.arange(width)
    shared = torch.where(channels < rotated, channels // 2, channels - rotated // 2)
    return Fold("layer_norm", ("linear_1",), rows=shared, columns=shared), Fold(None, ("linear_2",))


def decoder_folds(heads: int, kv_heads: int, head_dim: int) -> tuple[Fold, ...]:
    """The folds within a decoder layer."""
    values = torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim)
    shared = values.expand(-1, heads // kv_heads, -1).flatten()
    return (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), columns=shared),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    )


def head_folds() -> tuple[Fold, ...]:
    """The fold of the last norm into the lm_head."""
    return (Fold("norm", ("lm_head",)),)


def scales_for(magnitudes: Tensor, alpha: float) -> Tensor:
    """magnitudes^alpha, [channels] float32, normalized so that the product of the largest and the smallest scale is 1.

    magnitudes: mean |x| of each channel. All scales are 1 if all magnitudes are 0.
    """
    largest = magnitudes.max()
    if largest == 0:
        return torch.ones_like(magnitudes, dtype=torch.float32)
    scales = (magnitudes.double() / largest).clamp_min(_SMALLEST).pow(alpha)
    return (scales / (scales.max() * scales.min()).sqrt()).float()


def search_scales(
    layers: Sequence[tuple[Tensor, Rounded]],
    activations: Tensor,
    *,
    columns: Tensor | None = None,
    steps: int = STEPS,
) -> Scaling:
    """The scales, for exponents 0, 1/steps .. 1, with the least error of the outputs of `layers` on `activations`.

    layers: linear layers with the same input, each as its weight [out, in] and its rounding; activations: calibration
    rows [rows, in]; columns: see `Fold`.
    Exponent 0 is plain rounding, so the error is never larger than that of plain rounding. Computed in float32, or
    float64 if the activations are. Raises ValueError if shapes do not fit or activations are not finite.
    """
    for weight, _ in layers:
        if activations.ndim != 2 or activations.shape[1] != weight.shape[1]:
            raise ValueError(f"activations {tuple(activations.shape)} do not fit a weight {tuple(weight.shape)}")
    if len(activations) == 0 or not activations.isfinite().all():
        raise ValueError("activation-aware scaling needs one row of activations or more, all finite")
    x = activations.to(torch.promote_types(activations.dtype, torch.float32))
    magnitudes = _tied_mean(x.abs().mean(0), columns)
    plain = best = None
    for step in range(steps + 1):
        scales = scales_for(magnitudes, step / steps)
        spread = scales if columns is None else scales[columns]
        error = sum(_scaled_error(weight, x, spread, rounded) for weight, rounded in layers)
        found = Scaling(scales, step / steps, error, error if plain is None else plain.error)
        plain = plain or found
        if best is None or error < best.error:
            best = found
    assert best is not None
    return best


def _scaled_error(weight: Tensor, x: Tensor, scales: Tensor, rounded: Rounded) -> float:
    """Sum of squares of (Q(W diag(s)) diag(1 / s) - W) x over rows and outputs."""
    total = 0.0
    for rows in weight.split(_ROWS):
        dense = rows.to(x.dtype)
        change = rounded(dense * scales).to(x.dtype) / scales - dense
        total += float((x @ change.T).square().sum(dtype=torch.float64))
    return total


def _tied_mean(magnitudes: Tensor, columns: Tensor | None) -> Tensor:
    """The mean of the magnitudes that share a scale: [scales]."""
    if columns is None:
        return magnitudes
    count = int(columns.max()) + 1
    sums = magnitudes.new_zeros(count).index_add_(0, columns, magnitudes)
    return sums / torch.bincount(columns, minlength=count)


def scaled_target(weight: Tensor, scales: Tensor, columns: Tensor | None = None) -> Tensor:
    """The weight [out, in] of a layer whose input channels have been divided by their scales, float32 or float64."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) * (
        scales if columns is None else scales[columns]
    )


def scaled_source(parameter: Tensor, scales: Tensor, rows: Tensor | None = None) -> Tensor:
    """A weight [out, in] or a norm's weight or a bias [out] whose output channels are divided by their scales."""
    divisor = scales if rows is None else scales[rows]
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    return wide / (divisor[:, None] if parameter.ndim == 2 else divisor)
