"""Describes a checkpoint without loading its weights."""

import math
from collections import Counter
from os import PathLike
from typing import Any

import torch
from rich.table import Table

from ..engine.kv_cache import page_bytes
from ..engine.memory import shown_bytes
from ..model.hub import resolve
from ..model.opened import open_checkpoint
from ..model.parameters import PARTS, expected_shapes, part_of
from ..model.quantized import layer_schemes


def describe(model: str | PathLike[str]) -> dict[str, Any]:
    """Shape, parameters, bytes by part, token ids and context of a checkpoint, as plain values.

    model: a folder, a GGUF file, or a name on the Hub. Raises CheckpointError or ConfigError.
    """
    path = resolve(model)
    opened = open_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    checkpoint, config = opened.weights, opened.config
    parts: Counter[str] = Counter()
    for name in checkpoint.names:
        parts[part_of(name)] += checkpoint.stored_bytes(name)
    stored = config.quantization
    schemes: dict[str, set[str]] = {}
    for layer, scheme in layer_schemes(config).items():
        schemes.setdefault(part_of(layer), set()).add(str(scheme))
    parameters = checkpoint.parameter_count
    if stored is not None:
        parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    decoder = config.decoder
    return {
        "model": str(model),
        "folder": str(path),
        "files": [str(path.relative_to(folder)) for path in checkpoint.files],
        "model_type": config.model_type,
        "dtype": config.dtype,
        "parameters": parameters,
        "quantization": stored and {"recipe": stored.name, "source": stored.source},
        "schemes_by_part": {part: sorted(schemes[part]) for part in PARTS if part in schemes},
        "bytes": checkpoint.nbytes,
        "bytes_by_part": {part: parts[part] for part in PARTS if parts[part]},
        "encoder": {
            "layers": config.encoder.layers,
            "hidden_size": config.encoder.hidden_size,
            "heads": config.encoder.heads,
            "mel_bins": config.encoder.mel_bins,
        },
        "decoder": {
            "layers": decoder.layers,
            "hidden_size": decoder.hidden_size,
            "heads": decoder.heads,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
        },
        "rote_theta": config.rote.theta if config.rote else None,
        "audio_token_id": config.audio_token_id,
        "max_audio_seconds": config.max_audio_seconds,
        "context_tokens": decoder.max_positions,
        "kv_bytes_per_token": page_bytes(decoder, 1, torch.bfloat16),
    }


def table(description: dict[str, Any]) -> Table:
    """`describe`'s result as a table."""
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column()
    encoder, decoder = description["encoder"], description["decoder"]
    total = description["bytes"]
    rows.add_row("model", f"{description['model']} ({description['model_type']}, {description['dtype']})")
    rows.add_row("parameters", f"{description['parameters']:,}")
    rows.add_row("weights", f"{shown_bytes(total)} in {len(description['files'])} file(s)")
    for part, nbytes in description["bytes_by_part"].items():
        schemes = ", ".join(description["schemes_by_part"].get(part, ()))
        rows.add_row(f"  {part}", f"{shown_bytes(nbytes)} ({100 * nbytes / total:.1f} %)" + (schemes and f" {schemes}"))
    rows.add_row(
        "encoder",
        f"{encoder['layers']} layers, width {encoder['hidden_size']}, {encoder['heads']} heads, "
        f"{encoder['mel_bins']} mel bins",
    )
    rows.add_row(
        "decoder",
        f"{decoder['layers']} layers, width {decoder['hidden_size']}, {decoder['heads']} heads over "
        f"{decoder['kv_heads']} KV heads of {decoder['head_dim']}, vocabulary {decoder['vocab_size']:,}",
    )
    rows.add_row("RoTE", f"theta {description['rote_theta']:g}" if description["rote_theta"] else "none")
    rows.add_row("audio", f"up to {description['max_audio_seconds']} s")
    rows.add_row("context", f"{description['context_tokens']:,} tokens")
    rows.add_row("KV cache", f"{description['kv_bytes_per_token']:,} bytes a token in bfloat16")
    return rows
