"""`afnext plan`: the memory that a model needs on a device, before anything is loaded."""

from dataclasses import replace
from typing import Annotated

import typer

from .options import (
    DENSE,
    KV,
    RECIPES,
    AheadOption,
    ChunkOption,
    DTypeOption,
    EncodeBatchOption,
    JsonOption,
    KVOption,
    ReleaseOption,
    scheme_name,
)
from .output import write_json, write_table


def plan(
    gpu: Annotated[
        str, typer.Option(help='An amount ("8GB"), a known GPU ("rtx3060"), "cuda", or "cpu" for this machine.')
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder, GGUF file, config.json or Hub name; the published AF-Next if left out."
        ),
    ] = None,
    audio: Annotated[float, typer.Option(help="Seconds of audio.", min=0.0)] = 1800.0,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 2048,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "--quant",
            parser=scheme_name,
            metavar="SCHEME",
            help=f"Scheme of the weights: {', '.join((DENSE, *RECIPES))}, int4-g32, ...",
        ),
    ] = DENSE,
    kv: KVOption = KV.auto,
    dtype: DTypeOption = "auto",
    page_size: Annotated[int, typer.Option(help="Tokens per KV page.", min=1)] = 256,
    chunk_size: ChunkOption = None,
    encode_batch: EncodeBatchOption = 4,
    release_encoder: ReleaseOption = False,
    encode_ahead: AheadOption = None,
    tp: Annotated[int, typer.Option(help="GPUs that share the model; the plan is for each.", min=1)] = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Choose the mildest settings with which it fits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how much memory a model needs on a device.

    Nothing is loaded. If it does not fit, lists the changes that help; --fit makes them.
    """
    import torch

    from ...engine.memory import MemoryPlan
    from ...engine.options import default_chunk_size, encodes_ahead
    from ...model.sharding import shard_config
    from ..plan import Target, model_config, view

    target = Target.parse(gpu)
    config = model_config(model)
    if tp > 1:
        config, target = shard_config(config, tp), replace(target, name=f"{target.name}, each of {tp}")
    planned = MemoryPlan(
        config,
        target.memory,
        gpu=target.gpu,
        dtype=getattr(torch, config.dtype if dtype == "auto" else dtype),
        audio_seconds=audio,
        scheme=scheme,
        kv=kv.value,
        page_size=page_size,
        chunk_size=chunk_size or default_chunk_size(target.memory, target.gpu),
        encode_batch=encode_batch,
        release_encoder=release_encoder,
        encode_ahead=encodes_ahead(encode_ahead, target.memory, target.gpu, tp),
        new_tokens=new_tokens,
        mapped=not target.gpu and scheme == DENSE and dtype in ("auto", config.dtype),
    )
    changes = planned.changes_to_fit() if fit else ()
    planned = planned.changed(changes)
    if as_json:
        write_json({"device": target.name, "gpu": target.gpu, "tp": tp, **planned.to_dict(), "changes": list(changes)})
    else:
        write_table(view(planned, target, changes))
