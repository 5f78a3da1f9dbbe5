"""The problems of the kernel lab: every operation at every shape that the full model launches, as data.

A problem has seeded inputs, a float64 reference, an error rule, FLOPs and least bytes, which give a roofline on any
machine. Stages list how often the model makes each call, so that the share of an operation in the whole can be
computed:

    encode               a batch of 30 s windows, from waveforms to audio tokens
    prefill N at D       a chunk of N tokens behind D tokens
    decode B at D        one step of B sequences with D tokens each
    choose B             the next token of B sequences

each for every scheme of weights, and those that touch the KV cache also for int8 keys and values. A test compares them
with what the runtime's own host code calls.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from ...kernels.conv_stem import conv_length
from ...kernels.linear_nvfp4 import MXFP4_BLOCK
from ...kernels.log_mel import HOP_LENGTH
from ...kernels.packed_weight import Packed
from ...kernels.rote import pooled_length
from ...quant.recipe import RECIPES, recipe
from ...quant.scheme import Fp4, Fp8, Int3, Int4, Int8, Int8Groups
from ..core.work import Work, work_of
from .inputs import Arguments, Draw, Shape
from .specs import Spec, spec

TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
SCHEMES = ("dense", *RECIPES, "int8-g32")
Calls = Iterator[tuple[str, dict[str, int], int]]  # operation, shape, how often


@dataclass(frozen=True)
class Sizes:
    """The model's sizes; the defaults are Audio Flamingo Next's. depths: tokens before a prefill chunk or a decode
    step; batches: sequences of a decode step."""

    window_samples: int = 480_000
    encode_batch: int = 4
    mel_bins: int = 128
    encoder_layers: int = 32
    encoder_heads: int = 20
    encoder_head_dim: int = 64
    encoder_inner: int = 5120
    rote_dim: int = 256
    layers: int = 28
    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    inner: int = 18_944
    vocab: int = 151_672
    page_size: int = 256
    chunk: int = 1024
    batches: tuple[int, ...] = (1, 2, 4, 8, 32)
    prefill_depths: tuple[int, ...] = (0, 16_384, 45_000)
    decode_depths: tuple[int, ...] = (0, 8192, 45_000)

    @property
    def frames(self) -> int:
        """Mel frames of a window."""
        return self.window_samples // HOP_LENGTH

    @property
    def positions(self) -> int:
        """Encoder positions of a window."""
        return conv_length(self.frames)

    @property
    def encoder_width(self) -> int:
        """Channels of the encoder."""
        return self.encoder_heads * self.encoder_head_dim


FULL = Sizes()
QUICK = Sizes(
    window_samples=19_200,
    encode_batch=2,
    mel_bins=16,
    encoder_layers=2,
    encoder_heads=2,
    encoder_head_dim=32,
    encoder_inner=128,
    rote_dim=8,
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    inner=256,
    vocab=512,
    page_size=16,
    chunk=32,
    batches=(1, 2),
    prefill_depths=(0, 48),
    decode_depths=(40,),
)


@dataclass(frozen=True)
class Problem:
    """One operation at one shape and dtype. odd: for correctness, not of the model; context: tokens in each sequence of
    the KV cache, the new ones included, 0 where there is none."""

    operation: str
    shape: Mapping[str, int] = field(hash=False)
    dtype: str
    odd: bool = False

    @cached_property
    def name(self) -> str:
        """Of the operation, the shape and the dtype: decode_attention/8x1-of-45001-int8-kv-bfloat16."""
        sizes = re.sub(r"[^a-z0-9]+", "-", self.label.lower().replace(" x ", "x"))
        return f"{self.operation}/{'odd-' if self.odd else ''}{sizes}-{self.dtype}"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def label(self) -> str:
        """The shape for display."""
        return _label(self.operation, self.shape)

    @property
    def spec(self) -> Spec:
        """The operation."""
        return spec(self.operation)

    @property
    def context(self) -> int:
        """Tokens in each sequence of the KV cache, the new ones included; 0 where there is none."""
        return self.shape.get("keys", 0)

    @property
    def tolerance(self) -> float:
        """The relative RMS within which two implementations agree before their times are compared.

        Inputs rounded to int8 are not those of a dense product, whatever the dtype; those rounded to e4m3 even less.
        """
        if self.operation.startswith("linear_fp8"):
            return 2 * TOLERANCES["bfloat16"]
        return TOLERANCES["bfloat16" if self.spec.also else self.dtype]

    def arguments(self, device: torch.device, seed: int = 0) -> Arguments:
        """Keyword arguments for the operation's public function."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.spec.make(self.shape, Draw(device, dtype, torch.Generator().manual_seed(seed), self.odd))

    @cached_property
    def _counted(self) -> tuple[Work, float]:
        arguments = self.arguments(torch.device("meta"))
        work = work_of(self.operation, arguments, self.context)
        return work, work.least_bytes(arguments)

    @property
    def work(self) -> Work:
        """FLOPs, and the dtype whose peak bounds them."""
        return self._counted[0]

    @property
    def least_bytes(self) -> float:
        """The least bytes of memory traffic."""
        return self._counted[1]

    def to_dict(self) -> dict[str, Any]:
        """The problem as JSON values, without its numbers."""
        arguments = self.arguments(torch.device("meta"))
        return {
            "name": self.name,
            "operation": self.operation,
            "label": self.label,
            "shape": dict(self.shape),
            "dtype": self.dtype,
            "inputs": {name: _described(value) for name, value in arguments.items()},
            "error_rule": "RMS error at most twice that of plain torch at the same dtype, against float64",
            "flops": self.work.flops,
            "bytes": self.least_bytes,
        }


@dataclass(frozen=True)
class Stage:
    """One pass of the model. rows: windows, tokens of a chunk or sequences; depth: tokens before them; scheme: of the
    weights, one of `SCHEMES`; kv8: keys and values in int8."""

    kind: str
    rows: int
    depth: int = 0
    scheme: str = "dense"
    kv8: bool = False

    @property
    def name(self) -> str:
        """For people: decode 8 at 45000, int4, int8 KV."""
        rows = {"encode": f"encode {self.rows} windows", "choose": f"choose {self.rows}"}
        parts = [rows.get(self.kind, f"{self.kind} {self.rows} at {self.depth}")]
        parts += [self.scheme] if self.scheme != "dense" else []
        return ", ".join([*parts, "int8 KV"] if self.kv8 else parts)

    def calls(self, sizes: Sizes = FULL, dtype: str = "bfloat16") -> dict[Problem, int]:
        """How often the stage makes each call, as on a CPU; a GPU joins some products."""
        found: Counter[Problem] = Counter()
        for operation, shape, count in _CALLS[self.kind](self, sizes):
            # Scores are float32 whatever the model computes in, and features are made in its dtype.
            kind = "float32" if operation in ("log_mel", "penalize", "greedy", "sample") else dtype
            found[Problem(operation, shape, kind)] += count
        return dict(found)


def stages(sizes: Sizes = FULL) -> Iterator[Stage]:
    """All stages, in the order of a request."""
    for scheme in SCHEMES:
        yield Stage("encode", sizes.encode_batch, scheme=scheme)
    for scheme in SCHEMES:
        for kv8 in (False, True):
            for depth in sizes.prefill_depths:
                yield Stage("prefill", sizes.chunk, depth, scheme, kv8)
            for depth in sizes.decode_depths:
                for batch in sizes.batches:
                    yield Stage("decode", batch, depth, scheme, kv8)
    for batch in sizes.batches:
        yield Stage("choose", batch)


@lru_cache(maxsize=8)
def problems(sizes: Sizes = FULL, dtype: str = "bfloat16") -> tuple[Problem, ...]:
    """Every problem of the model once, by stage; then the products that GPUs compute as one, and the operations that
    the model has only within others.

    dtype: of weights and activations.
    """
    found = {problem: None for stage in stages(sizes) for problem in stage.calls(sizes, dtype)}
    for stage in stages(sizes):
        for operation, shape, _ in _joined(stage, sizes):
            found[Problem(operation, shape, dtype)] = None
    for interleaved in (0, 1):
        shape = {"tokens": sizes.chunk, "heads": sizes.heads, "head_dim": sizes.head_dim, "interleaved": interleaved}
        found[Problem("rotary", shape, dtype)] = None
    for rows in (*sizes.batches, sizes.chunk):
        found[Problem("swiglu", {"rows": rows, "channels": sizes.inner}, dtype)] = None
    for channels in (sizes.hidden, sizes.inner):
        found[Problem("quantize_rows", {"rows": sizes.chunk, "channels": channels}, dtype)] = None
    return tuple(found)


@lru_cache(maxsize=8)
def launches(sizes: Sizes = FULL, dtype: str = "bfloat16") -> dict[Problem, dict[str, int]]:
    """Of every problem: how often each stage, by its name, makes the call."""
    found: dict[Problem, dict[str, int]] = {problem: {} for problem in problems(sizes, dtype)}
    for stage in stages(sizes):
        for problem, count in stage.calls(sizes, dtype).items():
            found[problem][stage.name] = count
    return found


def odd_problems(operation: str, dtype: str) -> list[Problem]:
    """The odd variants of an operation, small enough for the float64 reference and the interpreter."""
    return [Problem(operation, shape, dtype, odd=True) for shape in spec(operation).odd]


def _encode(stage: Stage, s: Sizes) -> Calls:
    windows, width, time = stage.rows, s.encoder_width, s.positions
    rows, tokens, layers = windows * time, windows * pooled_length(time), s.encoder_layers
    yield "log_mel", {"batch": windows, "samples": s.window_samples, "mel_bins": s.mel_bins}, 1
    yield "conv_stem", {"batch": windows, "frames": s.frames, "mel_bins": s.mel_bins, "hidden": width}, 1
    yield "layer_norm", {"rows": rows, "channels": width}, layers
    yield "add_layer_norm", {"rows": rows, "channels": width}, layers
    heads = {"heads": s.encoder_heads, "head_dim": s.encoder_head_dim}
    yield "attention", {"batch": windows, "queries": time, **heads}, layers
    attend, mlp = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.fc1"
    for layer, inputs, outputs, bias, count in (
        (attend, width, width, 1, 3),
        (attend, width, width, 0, 1),
        (mlp, width, s.encoder_inner, 1, 1),
        (mlp, s.encoder_inner, width, 1, 1),
    ):
        yield _product(stage, layer, rows, inputs, outputs, bias, count * layers)
    yield "gelu", {"rows": rows, "channels": s.encoder_inner}, layers
    pooled = {"batch": windows, "positions": time, "channels": width, "pairs": s.rote_dim}
    yield "pool_norm_rotate", {**pooled, "windows": windows}, 1
    yield _product(stage, "adaptor.linear_1", tokens, width, s.hidden, 1, 1)
    yield "gelu", {"rows": tokens, "channels": s.hidden}, 1
    yield _product(stage, "adaptor.linear_2", tokens, s.hidden, s.hidden, 1, 1)


def _decoder(stage: Stage, s: Sizes) -> Calls:
    batch, tokens = (stage.rows, 1) if stage.kind == "decode" else (1, stage.rows)
    rows, layers, width, kv_width = batch * tokens, s.layers, s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield "rms_norm", {"rows": rows, "channels": s.hidden}, 1
    yield "add_rms_norm", {"rows": rows, "channels": s.hidden}, 2 * layers
    heads = {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim, "page_size": s.page_size}
    kv8 = int(stage.kv8)
    yield "kv_write", {"batch": batch, "tokens": tokens, "before": stage.depth, **heads, "kv8": kv8}, layers
    keys = {"batch": batch, "queries": tokens, "keys": stage.depth + tokens, **heads, "kv8": kv8}
    yield "decode_attention" if stage.kind == "decode" else "attention", keys, layers
    layer = "decoder.layers.0.mlp.up_proj"
    yield _product(stage, layer, rows, s.hidden, width, 1, layers)
    yield _product(stage, layer, rows, s.hidden, kv_width, 1, 2 * layers)
    yield _product(stage, layer, rows, width, s.hidden, 0, layers)
    yield _product(stage, layer, rows, s.hidden, s.inner, 0, layers, suffix="_swiglu")
    yield _product(stage, layer, rows, s.inner, s.hidden, 0, layers)
    yield _product(stage, "decoder.lm_head", batch, s.hidden, s.vocab, 0, 1)


def _joined(stage: Stage, s: Sizes) -> Calls:
    """Operations of a GPU in place of those of `_decoder`: queries, keys and values as one product, dense gate and up
    as one (`Decoder.join`), products with int4 weights with the norm after them."""
    if stage.kind not in ("prefill", "decode"):
        return
    layer, layers = "decoder.layers.0.mlp.up_proj", s.layers
    qkv_width = (s.heads + 2 * s.kv_heads) * s.head_dim
    yield _product(stage, layer, stage.rows, s.hidden, qkv_width, 1, layers)
    if stage.scheme == "dense":
        yield _product(stage, layer, stage.rows, s.hidden, 2 * s.inner, 0, layers)
    if stage.kind == "decode" and stage.scheme == "int4":
        for inputs in (s.heads * s.head_dim, s.inner):
            _, shape, count = _product(stage, layer, stage.rows, inputs, s.hidden, 0, layers)
            yield "linear_norm", shape, count


def _choose(stage: Stage, s: Sizes) -> Calls:
    shape = {"batch": stage.rows, "vocab": s.vocab}
    yield "penalize", shape, 1
    yield "greedy", shape, 1
    for top_k in (0, 50):
        yield "sample", {**shape, "top_k": top_k}, 1


_CALLS = {"encode": _encode, "prefill": _decoder, "decode": _decoder, "choose": _choose}


def _product(
    stage: Stage, layer: str, rows: int, inputs: int, outputs: int, bias: int, count: int, suffix: str = ""
) -> tuple[str, dict[str, int], int]:
    """The product of a layer with weights [outputs, inputs], as the stage's recipe stores them."""
    shape = {"rows": rows, "in_features": inputs, "out_features": outputs, "bias": bias}
    scheme = None if stage.scheme == "dense" else recipe(stage.scheme).scheme(layer)
    if scheme is None:
        return f"linear{suffix}", shape, count
    if isinstance(scheme, Int8):
        return f"linear_{'w8a8' if scheme.int8_inputs else 'int8'}{suffix}", shape, count
    if isinstance(scheme, Fp8):
        return f"linear_fp8{suffix}", shape, count
    if isinstance(scheme, Int8Groups):
        return f"linear_int8_groups{suffix}", {**shape, "group": scheme.group_size}, count
    if isinstance(scheme, Int4):
        shape["group"] = scheme.group_size
        return f"linear_{'w4a8' if scheme.int8_inputs else 'int4'}{suffix}", shape, count
    if isinstance(scheme, Int3):
        return f"linear_int3{suffix}", {**shape, "group": scheme.group_size}, count
    if isinstance(scheme, Fp4):
        return f"linear_nvfp4{suffix}", {**shape, "group": scheme.block_size}, count
    return f"linear_nf4{suffix}", shape, count


def _label(operation: str, shape: Shape) -> str:
    if "in_features" in shape:
        groups = ", mxfp4" if operation.startswith("linear_nvfp4") and shape["group"] == MXFP4_BLOCK else ""
        bias = ", bias" * shape["bias"]
        return f"{shape['rows']} rows, {shape['in_features']} to {shape['out_features']}{bias}{groups}"
    if "keys" in shape:
        kv = ", int8 KV" if shape["kv8"] else ""
        return f"{shape['batch']} x {shape['queries']} of {shape['keys']}{kv}"
    if operation == "attention":
        return f"encoder {shape['batch']} x {shape['queries']}"
    if operation == "kv_write":
        kv = ", int8 KV" if shape["kv8"] else ""
        return f"{shape['batch']} x {shape['tokens']} tokens after {shape['before']}{kv}"
    if operation == "sample":
        return f"{'top-k ' + str(shape['top_k']) if shape['top_k'] else 'top-p'}, {shape['batch']} x {shape['vocab']}"
    if operation == "rotary":
        return f"{'interleaved' if shape['interleaved'] else 'half'}, {shape['tokens']} tokens"
    return " x ".join(str(value) for value in shape.values())


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Packed):
        return f"Packed({', '.join(f'{k} {_described(v)}' for k, v in value._asdict().items() if v is not None)})"
    if hasattr(value, "__dataclass_fields__"):
        return f"{type(value).__name__}({', '.join(f'{k} {_described(v)}' for k, v in vars(value).items())})"
    return str(value)
