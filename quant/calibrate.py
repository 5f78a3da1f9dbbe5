"""Quantizes the layers of a model from statistics of their inputs, one stage at a time.

A stage is a few linear layers and the norms before them, such as a decoder layer. Its parameters have their names
within the stage (`self_attn.q_proj.weight`), its inputs correspond to the folds of `awq`. The statistics of an input
are its Gram matrix and some of its rows, gathered while the dense stage runs over the calibration set; so the stage
runs once to gather and once, quantized, to compute the inputs of the next stage.

    scaling    the scales of `awq`, folded into the layer before where there is one that takes them
    feedback   the rounding of `gptq`, on inputs divided by those scales; floats and nf4 are rounded to the nearest

Without feedback, scales of groups are fitted to errors weighted by the inputs' mean squares. Feedback needs many
tokens, and overfits if inputs are uncorrelated. So the kept rows are not in the Gram matrix, and a layer whose output
has a smaller error on them without feedback is rounded without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.packed_weight import Packed
from .awq import Fold, scaled_source, scaled_target, search_scales
from .gptq import gptq_int3, gptq_int4, gptq_int8
from .scheme import Int3, Int4, Int8, Scheme

WITH_FEEDBACK = (Int3, Int4, Int8)
"""Schemes that are rounded with feedback; others are rounded to the nearest value."""

_ROWS = 4096  # of a weight at once
_SEARCHED_CHANNELS = 512  # per layer, in the search for scales, which takes twenty times the work of rounding


@dataclass(frozen=True)
class Calibration:
    """Options of calibration. rows: of each input, for the search of scales and the measurement of errors.

    scaling, feedback: see the module; damping, activation_order: see `gptq`.
    """

    scaling: bool = True
    feedback: bool = True
    damping: float = 0.01
    activation_order: bool = True
    rows: int = 512


class InputStatistics:
    """The Gram matrix of an input, [channels, channels], and evenly spaced rows of it, [rows, channels], in float32.

    The number of tokens is given in advance; `add` takes them in pieces of any size. At most a quarter of the tokens,
    and at least one, are kept as rows; these are not in the matrix.
    """

    def __init__(self, channels: int, tokens: int, rows: int, device: torch.device | None = None):
        count = max(1, min(rows, tokens // 4))
        self.gram = torch.zeros(channels, channels, device=device)
        self.rows = torch.zeros(count, channels, device=device)
        self._kept = torch.arange(count) * tokens // count
        self._seen = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens x: [..., channels] of any floating dtype."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        first, last = torch.searchsorted(self._kept, torch.tensor([self._seen, self._seen + len(x)])).tolist()
        kept = (self._kept[first:last] - self._seen).to(x.device)
        self.rows[first:last] = x[kept]
        x[kept] = 0
        self.gram.addmm_(x.T, x)
        self._seen += len(x)

    def divide(self, scales: Tensor) -> None:
        """Convert to the statistics of the input divided by `scales`: [channels]."""
        self.gram /= scales
        self.gram /= scales[:, None]
        self.rows /= scales

    @property
    def mean_squares(self) -> Tensor:
        """Mean square of each channel up to a common factor: [channels]."""
        return self.gram.diagonal()


@dataclass(frozen=True)
class LayerReport:
    """The result of a layer: the relative error of its output, as RMS over the kept rows; the exponent of its input's
    scales, None if they were not searched; and whether it was rounded with feedback."""

    layer: str
    error: float
    alpha: float | None
    feedback: bool


@contextmanager
def gathering(stage: nn.Module, folds: Sequence[Fold], statistics: Mapping[str, InputStatistics]) -> Iterator[None]:
    """During the block, add the inputs of each fold's first target to the statistics of that name."""
    inputs = {name: statistics[name] for name in (fold.targets[0] for fold in folds) if name in statistics}
    hooks = [stage.get_submodule(name).register_forward_pre_hook(_taking(taken)) for name, taken in inputs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _taking(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, inputs: statistics.add(inputs[0])


def quantize_stage(
    parameters: Mapping[str, Tensor],
    folds: Sequence[Fold],
    statistics: Mapping[str, InputStatistics],
    scheme: Callable[[str], Scheme | None],
    options: Calibration,
    *,
    report: Callable[[LayerReport], None] = lambda _: None,
) -> Iterator[tuple[str, Tensor | Packed]]:
    """Quantize a stage; yield the name and the result of every parameter.

    parameters: all of the stage, dense; folds: one for each input of the layers to quantize; statistics: by the first
    target of each fold, CHANGED here; scheme: returns the scheme of a layer by its name, None to leave it dense. Packed
    weights have the name of the dense one. Dense parameters that absorbed a division keep their dtype. One weight at a
    time is held in float32. Raises SchemeError or ValueError if a layer does not fit its scheme.
    """
    rows: dict[str, Tensor] = {}  # divisors of a layer's output channels
    columns: dict[str, Tensor] = {}  # factors of a layer's input channels
    alphas: dict[str, float] = {}
    for fold in folds if options.scaling else ():
        if fold.source is None or all(scheme(name) is None for name in fold.targets):
            continue
        inputs = statistics[fold.targets[0]]
        layers = [(_sample(parameters[f"{name}.weight"]), _rounding(scheme(name))) for name in fold.targets]
        found = search_scales(layers, inputs.rows, columns=fold.columns)
        rows[fold.source] = found.scales if fold.rows is None else found.scales[fold.rows]
        spread = found.scales if fold.columns is None else found.scales[fold.columns]
        inputs.divide(spread)
        columns |= dict.fromkeys(fold.targets, spread)
        alphas |= dict.fromkeys(fold.targets, found.alpha)
    input_of = {
        name: statistics[fold.targets[0]] for fold in folds for name in fold.targets if fold.targets[0] in statistics
    }
    for name, parameter in parameters.items():
        layer, _, kind = name.rpartition(".")
        chosen = scheme(layer) if kind == "weight" and parameter.ndim == 2 else None
        weight = _adjusted(parameter, rows.get(layer), columns.get(layer) if kind == "weight" else None)
        if chosen is None:
            yield name, weight.to(parameter.dtype)
            continue
        packed, error, feedback = _quantized(weight, chosen, input_of[layer], options)
        report(LayerReport(layer, error, alphas.get(layer), feedback))
        yield name, packed


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced output channels of a weight, enough to compare exponents."""
    return weight[:: max(1, len(weight) // _SEARCHED_CHANNELS)]


def _adjusted(parameter: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if columns is not None:
        parameter = scaled_target(parameter, columns)
    return parameter if rows is None else scaled_source(parameter, rows)


def _rounding(scheme: Scheme | None) -> Callable[[Tensor], Tensor]:
    if scheme is None:
        return lambda weight: weight
    return lambda weight: scheme.dequantize(scheme.quantize(weight), weight.dtype)


def _quantized(
    weight: Tensor, scheme: Scheme, inputs: InputStatistics, options: Calibration
) -> tuple[Packed, float, bool]:
    """The packed weight, the error of its output, and whether it was rounded with feedback."""
    nearest = scheme.quantize(weight, inputs.mean_squares)
    error = _output_error(weight, nearest, scheme, inputs.rows)
    if not options.feedback or not isinstance(scheme, WITH_FEEDBACK):
        return nearest, error, False
    fed_back = _with_feedback(weight, scheme, inputs.gram, options)
    error_fed_back = _output_error(weight, fed_back, scheme, inputs.rows)
    return (fed_back, error_fed_back, True) if error_fed_back < error else (nearest, error, False)


def _with_feedback(weight: Tensor, scheme: Int3 | Int4 | Int8, gram: Tensor, options: Calibration) -> Packed:
    damping, order = options.damping, options.activation_order
    if isinstance(scheme, Int8):
        return Packed(*gptq_int8(weight, gram, damping=damping, activation_order=order))
    if isinstance(scheme, Int3):
        return Packed(*gptq_int3(weight, gram, scheme.group_size, damping=damping, activation_order=order))
    group, symmetric = scheme.group_size, scheme.symmetric
    return Packed(*gptq_int4(weight, gram, group, symmetric, damping=damping, activation_order=order))


def _output_error(weight: Tensor, packed: Packed, scheme: Scheme, inputs: Tensor) -> float:
    error = size = 0.0
    for start in range(0, len(weight), _ROWS):
        dense = weight[start : start + _ROWS].float()
        part = packed.rows(slice(start, start + _ROWS))
        error += float((inputs @ (scheme.dequantize(part, torch.float32) - dense).T).square().sum())
        size += float((inputs @ dense.T).square().sum())
    return (error / size) ** 0.5 if size else 0.0
