"""afnext beside llama.cpp at full width: the encoder, a chunk of prefill, and a step of decode at any depth.

Both hold random weights of the same shape in one process and take turns. Only the backbone and the encoder can be
compared, since llama.cpp has no RoTE, which is part of afnext's encoder. Outputs are not compared, because packed
weights are random codes on both sides. Tests check that both compute the same function of the same weights.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from ...kernels.errors import AfnextError
from ...quant.recipe import recipe
from ...runtime.app.api import load
from ..core.machine import machine
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of
from ..core.timing import measure_interleaved
from ..ops.libraries import available
from .e2e import recording
from .layers import STAGES, Afnext, Subject, stage_calls
from .llama_cpp import LlamaCpp, LlamaCppEncoder, LlamaCppModel, description, library

_WINDOW = 30.0  # seconds
_ROUND_TIME = 150.0  # seconds a case may take before its last round starts
_UNCOMPARED = "outputs are not compared: packed weights are random codes on either side"


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
    quiet: bool = False,
) -> list[Record]:
    """Measure, append records to `out`, and return them.

    shape: of a random checkpoint, "full-width:ENC,DEC"; schemes: afnext's, of SCHEMES; kinds: llama.cpp's, of
    `random_gguf.KINDS`, whose encoder is bf16 beside bf16 and Q8_0 otherwise; depths: tokens before the chunk of
    prefill and before the decode step. Raises AfnextError for an unknown scheme and without llama.cpp.
    """
    if set(schemes) - set(SCHEMES):
        raise AfnextError(f"unknown scheme among {', '.join(schemes)}; choose from {', '.join(SCHEMES)}")
    if not available("gguf"):
        raise AfnextError("the package gguf writes the weights; run `pip install gguf`")
    library()
    console = Console(stderr=True, quiet=quiet)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = list(_subjects(Path(folder), shape, schemes, kinds, encoders="encode" in stages))
        for stage, depth in product(stages, depths):
            if stage == "encode" and depth != depths[0]:
                continue
            case = _case(shape, stage, depth, chunk)
            console.print(f"{stage}, {case['label']}")
            for record in _measured(stage, case, subjects, repeats):
                append(out, record)
                records.append(record)
    return records


def _subjects(
    folder: Path, shape: str, schemes: Sequence[str], kinds: Sequence[str], *, encoders: bool
) -> Iterator[Subject]:
    from .random_gguf import write_random_backbone, write_random_encoder  # needs the package gguf

    for scheme in schemes:
        packed = recipe_of(scheme)
        checkpoint = write_random_checkpoint(folder / scheme, shape, quant=recipe(packed) if packed else None)
        model = load(checkpoint, device="cpu", dtype=SCHEMES[scheme])
        yield Afnext(f"afnext {scheme}", model, model.network.dtype)
    config = model.network.config
    for kind in kinds:
        backbone = LlamaCppModel(write_random_backbone(folder / f"{kind}.gguf", config, kind))
        encoder_kind = "bf16" if kind == "bf16" else "q8_0"
        projector = folder / f"encoder-{encoder_kind}.gguf"
        if encoders and not projector.exists():
            write_random_encoder(projector, config, encoder_kind)
        for flash, way in ((True, "flash"), (False, "no flash")):
            encoder = LlamaCppEncoder(projector, backbone, recording(_WINDOW), flash=flash) if encoders else None
            yield LlamaCpp(f"llama.cpp {kind}, {way}", backbone, encoder, flash=flash)


def _case(shape: str, stage: str, depth: int, chunk: int) -> dict[str, Any]:
    tokens = {"encode": 0, "prefill": chunk, "decode": 1}[stage]
    label = "one window" if stage == "encode" else f"{tokens} {'tokens' if tokens > 1 else 'token'} after {depth}"
    return {"label": label, "model": shape, "depth": depth, "tokens": tokens}


def _measured(stage: str, case: dict[str, Any], subjects: Sequence[Subject], repeats: int) -> Iterator[Record]:
    samples = measure_interleaved(
        stage_calls(stage, case["depth"], case["tokens"], subjects), repeats=repeats, max_time=_ROUND_TIME, watch=True
    )
    theirs = {subject.name: samples[subject.name].median for subject in subjects if isinstance(subject, LlamaCpp)}
    best, where = min(theirs, key=theirs.__getitem__), machine()
    for subject in subjects:
        taken = samples[subject.name]
        values: dict[str, Any] = taken.values()
        if case["tokens"]:
            values["tokens_per_s"] = case["tokens"] / taken.median
        if isinstance(subject, LlamaCpp):
            values |= description()
        else:
            values |= {"speedup": theirs[best] / taken.median, "speedup_over": best, "note": _UNCOMPARED}
        yield Record("llama-cpp", stage, subject.name, case, values, machine=where)
