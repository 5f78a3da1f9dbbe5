"""`afnext quantize`: a checkpoint with its weights packed in 8, 4 or 3 bits."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import RECIPES, JsonOption, QuietOption, scheme_name
from .output import note, progress, write_json

if TYPE_CHECKING:
    from ....quant.calibrate import LayerReport


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            help="A dense checkpoint, or one in GGUF, GPTQ, AWQ, compressed-tensors or ModelOpt's fp8 or nvfp4: "
            "folder, file or Hub name."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "--quant",
            parser=scheme_name,
            metavar="SCHEME",
            help=f"{', '.join(RECIPES)}, or as in int4-g128-zeros.",
        ),
    ] = "int4",
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale, for int4: 32, 64 or 128.")] = None,
    zeros: Annotated[bool, typer.Option("--zeros", help="With zero points, for int4.")] = False,
    rule: Annotated[
        list[str] | None,
        typer.Option(help='A rule LAYERS=SCHEME, applied first, as in "decoder.layers.0.*=dense"; repeat for more.'),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Quantized Qwen2 (GPTQ, AWQ, compressed-tensors or ModelOpt's fp8 or nvfp4) to take the decoder from."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of recordings with their texts, for calibration.")
    ] = None,
    measured: Annotated[str | None, typer.Option(help="Measured losses, in Markdown, for the model card.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, ...")] = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pack the weights of a checkpoint in 8, 4 or 3 bits.

    The folder has everything needed to run the model, and a model card for the Hub. Layers packed by another library
    keep their values.
    """
    from ....quant.recipe import recipe
    from ...engine.memory import shown_bytes
    from ..api import usable_device
    from ..calibration import calibrate as calibrate_checkpoint
    from ..quantize import quantize as quantize_checkpoint

    packed_by = recipe(scheme, group_size=group_size, symmetric=not zeros, rules=[_rule(text) for text in rule or ()])
    if calibrate is not None:
        if backbone is not None:
            raise typer.BadParameter("leave it out: only dense weights can be calibrated", param_hint="--backbone")
        with progress(quiet or as_json) as report:
            layers = calibrate_checkpoint(
                source, out, packed_by, calibrate, device=usable_device(device), measured=measured, progress=report
            )
        _show_calibration(out, packed_by.name, layers, as_json=as_json, quiet=quiet)
        return
    with progress(quiet or as_json) as report:
        done = quantize_checkpoint(
            source,
            out,
            packed_by,
            backbone=backbone,
            device=usable_device(device),
            measured=measured,
            progress=lambda done, total: report("quantizing", done, total),
        )
    if as_json:
        write_json(done)
    elif not quiet:
        note(
            f"{done['out']}: {shown_bytes(done['bytes'])} instead of {shown_bytes(done['bytes_before'])}, "
            f"{done['recipe']}, in {done['seconds']:g} s"
        )


def _show_calibration(out: Path, name: str, layers: "Sequence[LayerReport]", *, as_json: bool, quiet: bool) -> None:
    if as_json:
        write_json({"out": str(out), "recipe": name, "layers": [asdict(layer) for layer in layers]})
    elif not quiet and layers:
        worst = max(layers, key=lambda layer: layer.error)
        note(
            f"{out}: {name}, calibrated; of {len(layers)} layers {worst.layer} has the largest error, "
            f"{100 * worst.error:.2g} % of its output"
        )


def _rule(text: str) -> tuple[str, str]:
    pattern, found, scheme = text.partition("=")
    if not found or not pattern:
        raise typer.BadParameter(f'{text!r} should read LAYERS=SCHEME, as in "encoder.*=dense"', param_hint="--rule")
    return pattern, scheme
