"""The subjects timed beside afnext's operations, on the same inputs: usual torch code, and installed libraries.

Each rival is prepared once, outside the timing: dense copies of paged caches, tables of angles, packed weights. One
that is not installed, or does not cover a problem, is left out, and `absent` says which. The libraries are in
`libraries.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.log_mel import N_FFT, mel_filters
from ...kernels.quantize_rows import reference as quantize_rows_reference
from . import baselines
from .inputs import Arguments
from .libraries import LIBRARIES, Library, available, static_cache_attention
from .plain import dense_weight
from .problems import Problem

OURS, BASELINE = "afnext", "torch"


@dataclass(frozen=True)
class Subject:
    """One way to do it. output: what to compare of what the call returned, where that is not all."""

    call: Callable[[], Any]
    output: Callable[[Any], Any] = lambda returned: returned


Subjects = dict[str, Subject]


def subjects(problem: Problem, device: torch.device) -> Subjects:
    """afnext, torch and the installed libraries that cover the problem, on the same inputs."""
    arguments = problem.arguments(device)
    found = {OURS: ours(problem, arguments), BASELINE: _torch(problem, arguments)}
    if device.type == "cuda":
        for library in LIBRARIES:
            if available(library.module) and library.covers(problem):
                found[library.name] = Subject(partial(_prepared, library, problem, arguments, []))
    return found


def _prepared(library: Library, problem: Problem, arguments: Arguments, made: list[Callable[[], Any]]) -> Any:
    """Call a library, and prepare it at the first call; a failure of preparation counts as the call's."""
    if not made:
        made.append(library.prepare(problem, arguments))
    return made[0]()


def ours(problem: Problem, arguments: Arguments, function: Callable[..., Any] | None = None) -> Subject:
    """The operation's public function, or another with its signature, on these arguments."""
    spec = problem.spec
    return Subject(partial(function or spec.function, **arguments), partial(spec.results, arguments))


def absent(problem: Problem) -> list[str]:
    """The libraries that cover the problem on a GPU and are not installed here."""
    return [library.name for library in LIBRARIES if library.covers(problem) and not available(library.module)]


def _torch(problem: Problem, arguments: Arguments) -> Subject:
    prepare = _TORCH.get(problem.operation, _plain)
    made = prepare(problem, arguments)
    return made if isinstance(made, Subject) else Subject(made)


def _plain(problem: Problem, arguments: Arguments) -> Subject:
    return ours(problem, arguments, problem.spec.plain)


def _log_mel(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    x = a["waveforms"]
    filters, hann = mel_filters(a["mel_bins"], x.device, torch.float32), torch.hann_window(N_FFT, device=x.device)
    return lambda: baselines.log_mel(x, filters, hann, a["window_samples"])


def _layer_norm(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    return lambda: F.layer_norm(a["x"], a["weight"].shape, a["weight"], a["bias"], 1e-5)


def _rms_norm(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    return lambda: F.rms_norm(a["x"], a["weight"].shape, a["weight"], 1e-6)


def _add_norm(problem: Problem, a: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    weight, bias = a["weight"], a.get("bias")

    def call() -> tuple[Tensor, Tensor]:
        hidden = a["residual"] + a["x"]
        if bias is None:
            return F.rms_norm(hidden, weight.shape, weight, 1e-6), hidden
        return F.layer_norm(hidden, weight.shape, weight, bias, 1e-5), hidden

    return call


def _pool_norm_rotate(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    turns = a["angles"][a["windows"]].double()
    cos, sin = (turn(turns).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
    return lambda: baselines.pool_norm_rotate(a["x"], a["weight"], a["bias"], cos, sin)


def _turns(rotation: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin as baselines take them: [batch, time, 1, head_dim] in the dtype of the activations."""
    cos, sin = rotation.cos_sin
    if rotation.pairing == "half":
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype)
    return cos.repeat_interleave(2, -1).to(dtype), sin.repeat_interleave(2, -1).to(dtype)


def _rotary(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    turns = _turns(a["rotation"], a["x"].dtype)
    rotate = baselines.rotate_half if a["rotation"].pairing == "half" else baselines.rotate_pairs
    return lambda: rotate(a["x"], *turns)


def _kv_write(problem: Problem, a: Arguments) -> Subject:
    """Rotation in the dtype of the activations, then index_copy_ into a cache; int8 as `plain.py` has it."""
    if a.get("k_scales") is not None:
        return _plain(problem, a)
    turns, flat = _turns(a["rotation"], a["q"].dtype), a["slots"].flatten()
    # Caches of its own, so that what it writes is not taken for ours.
    own = {**a, "k_cache": a["k_cache"].clone(), "v_cache": a["v_cache"].clone()}

    def call() -> Tensor:
        own["k_cache"].flatten(0, 1).index_copy_(0, flat, baselines.rotate_half(a["k"], *turns).flatten(0, 1))
        own["v_cache"].flatten(0, 1).index_copy_(0, flat, a["v"].flatten(0, 1))
        return baselines.rotate_half(a["q"], *turns)

    return Subject(call, partial(problem.spec.results, own))


def _linear(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    """A dense product; of packed weights with the weight unpacked beforehand."""
    x, bias = a["x"], a.get("bias")
    weight = a["weight"] if problem.operation == "linear" else dense_weight(a, x.dtype)
    return lambda: F.linear(x, weight, bias)


def _swiglu(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    dense = problem.operation == "linear_swiglu"
    gate, up = (a[part] if dense else dense_weight(a, a["x"].dtype, part) for part in ("gate", "up"))
    return lambda: F.silu(F.linear(a["x"], gate)) * F.linear(a["x"], up)


def _quantize_rows(problem: Problem, a: Arguments) -> Callable[[], Any]:
    return lambda: quantize_rows_reference(a["x"])


def _penalize(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    ids = a["seen"][0].nonzero().flatten().expand(len(a["logits"]), -1).contiguous()
    return lambda: baselines.repetition_penalty(a["logits"], ids, a["penalty"])


def _sample(problem: Problem, a: Arguments) -> Callable[[], Tensor]:
    rows, top_k = a["rows"], problem.shape["top_k"]
    if top_k:
        return lambda: baselines.draw_top_k(a["logits"], rows.temperature, top_k, rows.top_p, a["uniform"])
    return lambda: baselines.draw_nucleus(a["logits"], rows.temperature, rows.top_p, a["uniform"])


_PRODUCTS = (
    "linear",
    "linear_int8",
    "linear_int8_groups",
    "linear_w8a8",
    "linear_fp8",
    "linear_int4",
    "linear_w4a8",
    "linear_int3",
    "linear_nf4",
    "linear_nvfp4",
)
_TORCH: Mapping[str, Callable[[Problem, Arguments], Any]] = {
    "log_mel": _log_mel,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "add_layer_norm": _add_norm,
    "add_rms_norm": _add_norm,
    "pool_norm_rotate": _pool_norm_rotate,
    "rotary": _rotary,
    "kv_write": _kv_write,
    "attention": static_cache_attention,
    "decode_attention": static_cache_attention,
    **dict.fromkeys(_PRODUCTS, _linear),
    **dict.fromkeys((f"{name}_swiglu" for name in _PRODUCTS), _swiglu),
    "quantize_rows": _quantize_rows,
    "penalize": _penalize,
    "sample": _sample,
}
