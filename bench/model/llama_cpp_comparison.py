"""afnext beside llama.cpp at full width: the encoder, a chunk of prefill, and a step of decode at any depth.

Both hold random weights of the same shape in one process and take turns. Only the backbone and the encoder can be
compared, since llama.cpp has no RoTE, which is part of afnext's encoder. Outputs are not compared, because packed
weights are random codes on both sides. Tests check that both compute the same function of the same weights.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from ...kernels.errors import AfnextError
from ...quant.recipe import Recipe, recipe
from ...runtime.app.api import Model, load
from ...runtime.model.config import ModelConfig
from ...runtime.model.published import AUDIO_FLAMINGO_NEXT
from ..core.machine import machine
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of
from ..core.timing import measure_interleaved
from ..ops.libraries import available
from .e2e import recording
from .layers import STAGES, Afnext, Subject, scheme_parts, stage_calls
from .llama_cpp import LlamaCpp, LlamaCppEncoder, LlamaCppModel, description, library

_WINDOW = 30.0  # seconds
_ROUND_TIME = 150.0  # seconds a case may take before its last round starts
_UNCOMPARED = "outputs are not compared: packed weights are random codes on either side"
_FULL_LAYERS = AUDIO_FLAMINGO_NEXT["text_config"]["num_hidden_layers"]
Q4_K = "q4_k"
"""The scheme of a GGUF package in Q4_K, whose lm_head is in it too."""


def run_llama_cpp(
    out: Path,
    *,
    shape: str,
    schemes: Sequence[str] = ("int4",),
    kinds: Sequence[str] = ("q4_0",),
    stages: Sequence[str] = STAGES,
    depths: Sequence[int] = (0,),
    chunk: int = 512,
    repeats: int = 5,
    fewer: int | None = None,
    quiet: bool = False,
) -> list[Record]:
    """Measure, append records to `out`, and return them.

    shape: of a random checkpoint, "full-width:ENC,DEC"; schemes: afnext's, of SCHEMES or Q4_K, each with a suffix of KV
    for a quantized KV cache; kinds: llama.cpp's, of `random_gguf.KINDS`, whose encoder is bf16 beside bf16 and Q8_0
    otherwise; depths: tokens before the chunk of prefill and before the decode step; fewer: time decode steps also with
    that many of the decoder's layers, in the same rounds, and record the full number's time extrapolated from both.
    Raises AfnextError for an unknown scheme and without llama.cpp.
    """
    unknown = [name for name in schemes if scheme_parts(name)[0] not in (*SCHEMES, Q4_K)]
    if unknown:
        raise AfnextError(f"unknown scheme {', '.join(unknown)}; choose from {', '.join((*SCHEMES, Q4_K))}")
    if not available("gguf"):
        raise AfnextError("the package gguf writes the weights; run `pip install gguf`")
    library()
    console = Console(stderr=True, quiet=quiet)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        compared = _compared(Path(folder), shape, schemes, kinds, "encode" in stages, fewer)
        for stage, depth in product(stages, depths):
            if stage == "encode" and depth != depths[0]:
                continue
            case = _case(shape, stage, depth, chunk)
            console.print(f"{stage}, {case['label']}")
            for record in _measured(stage, case, compared, repeats):
                append(out, record)
                records.append(record)
    return records


@dataclass(frozen=True)
class _Compared:
    """subjects: with `layers` layers; few: the same ones in the same order with `fewer` layers; none without."""

    subjects: list[Subject]
    few: list[Subject]
    layers: int
    fewer: int | None

    def full(self, more: float, few: float) -> float:
        """The time with all layers: each further one takes as long as one of those that `few` lacks."""
        assert self.fewer is not None
        return more + (more - few) * (_FULL_LAYERS - self.layers) / (self.layers - self.fewer)


def _compared(
    folder: Path, shape: str, schemes: Sequence[str], kinds: Sequence[str], encoders: bool, fewer: int | None
) -> _Compared:
    subjects: list[Subject] = []
    few: list[Subject] = []
    models: dict[str, Model] = {}
    for name in schemes:
        scheme, kv_dtype = scheme_parts(name)
        if scheme not in models:
            checkpoint = write_random_checkpoint(folder / scheme, shape, quant=_recipe(scheme))
            models[scheme] = load(checkpoint, device="cpu", dtype=SCHEMES.get(scheme, "bfloat16"))
        model = models[scheme]
        kv = kv_dtype or model.network.dtype
        subjects.append(Afnext(f"afnext {name}", model, kv))
        few += [] if fewer is None else [Afnext(f"afnext {name}, {fewer} layers", model, kv, fewer)]
    config = model.network.config
    layers = config.decoder.layers
    if fewer is not None and not 0 < fewer < layers:
        raise AfnextError(f"there is nothing to extrapolate from {fewer} and {layers} layers")
    subjects += _llama_cpp(folder, config, kinds, encoders)
    if fewer is not None:
        shallow = replace(config, decoder=replace(config.decoder, layers=fewer))
        few += _llama_cpp(folder, shallow, kinds, False, f", {fewer} layers")
    return _Compared(subjects, few, layers, fewer)


def _llama_cpp(
    folder: Path, config: ModelConfig, kinds: Sequence[str], encoders: bool, suffix: str = ""
) -> Iterator[LlamaCpp]:
    """llama.cpp with random weights of each kind, with flash attention and without. suffix: of the subjects' names."""
    from .random_gguf import write_random_backbone  # needs the package gguf

    layers = config.decoder.layers
    prefixes = LlamaCppModel(write_random_backbone(folder / f"prefixes-{layers}.gguf", _narrow(config), "bf16"))
    for kind in kinds:
        backbone = LlamaCppModel(write_random_backbone(folder / f"{kind}-{layers}.gguf", config, kind))
        projector = _projector(folder, config, kind) if encoders else None
        for flash, way in ((True, "flash"), (False, "no flash")):
            encoder = LlamaCppEncoder(projector, backbone, recording(_WINDOW), flash=flash) if projector else None
            name = f"llama.cpp {kind}, {way}{suffix}"
            yield LlamaCpp(name, backbone, encoder, flash=flash, prefixes=prefixes)


def _projector(folder: Path, config: ModelConfig, kind: str) -> Path:
    """A random encoder for backbones of this kind, which several kinds share."""
    from .random_gguf import write_random_encoder  # needs the package gguf

    encoder_kind = "bf16" if kind == "bf16" else "q8_0"
    path = folder / f"encoder-{encoder_kind}.gguf"
    if not path.exists():
        write_random_encoder(path, config, encoder_kind)
    return path


def _recipe(scheme: str) -> Recipe | None:
    if scheme == Q4_K:
        return recipe("int4-g32-zeros-f32", rules=[("decoder.lm_head", "int4-g32-zeros-f32")])
    packed = recipe_of(scheme)
    return recipe(packed) if packed else None


def _narrow(config: ModelConfig) -> ModelConfig:
    """The narrowest model with the same KV cache."""
    decoder, rows = config.decoder, 64
    width = decoder.kv_heads * decoder.head_dim
    decoder = replace(decoder, hidden_size=width, heads=decoder.kv_heads, intermediate_size=rows, vocab_size=rows)
    return replace(config, decoder=decoder)


def _case(shape: str, stage: str, depth: int, chunk: int) -> dict[str, Any]:
    tokens = {"encode": 0, "prefill": chunk, "decode": 1}[stage]
    label = "one window" if stage == "encode" else f"{tokens} {'tokens' if tokens > 1 else 'token'} after {depth}"
    return {"label": label, "model": shape, "depth": depth, "tokens": tokens}


def _measured(stage: str, case: dict[str, Any], compared: _Compared, repeats: int) -> Iterator[Record]:
    subjects, few = compared.subjects, compared.few if stage == "decode" else []
    calls = stage_calls(stage, case["depth"], case["tokens"], subjects)
    if few:
        calls |= stage_calls(stage, case["depth"], case["tokens"], few)
    samples = measure_interleaved(calls, repeats=repeats, max_time=_ROUND_TIME, watch=True)
    where = machine()
    figures = [samples[subject.name].values() for subject in subjects]
    yield from _records(stage, case, subjects, figures, "measured", where)
    if few:
        further = [samples[subject.name].values() for subject in few]
        fewer = case | {"model": f"{case['model']}, {compared.fewer} decoder layers"}
        yield from _records(stage, fewer, subjects, further, "measured", where)
        pairs = [(samples[more.name], samples[less.name]) for more, less in zip(subjects, few, strict=True)]
        full = [{"median_s": compared.full(more.median, less.median)} for more, less in pairs]
        yield from _records(stage, case | {"model": "full"}, subjects, full, "extrapolated", where)


def _records(
    stage: str,
    case: dict[str, Any],
    subjects: Sequence[Subject],
    figures: Sequence[dict[str, Any]],
    kind: str,
    where: dict[str, Any],
) -> Iterator[Record]:
    medians = {subject.name: values["median_s"] for subject, values in zip(subjects, figures, strict=True)}
    theirs = {subject.name: medians[subject.name] for subject in subjects if isinstance(subject, LlamaCpp)}
    best = min(theirs, key=theirs.__getitem__)
    for subject, taken in zip(subjects, figures, strict=True):
        values = dict(taken)
        if case["tokens"]:
            values["tokens_per_s"] = case["tokens"] / values["median_s"]
        if isinstance(subject, LlamaCpp):
            values |= description()
        else:
            values |= {"speedup": theirs[best] / values["median_s"], "speedup_over": best, "note": _UNCOMPARED}
        yield Record("llama-cpp", stage, subject.name, case, values, kind, machine=where)
