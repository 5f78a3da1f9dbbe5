"""`afnext info`: describes a checkpoint, or the implementations on this machine."""

from typing import Annotated

import typer

from .options import DeviceOption, JsonOption
from .output import write_json, write_table


def info(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, GGUF file, or a name on the Hub.")] = None,
    backend: Annotated[
        bool, typer.Option("--backend", help="Show the implementation of each operation instead.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint, or the implementations on this machine.

    For a checkpoint: shape, parameters, bytes by part, token ids, context. With --backend: the implementation of each
    operation, and how the CPU's kernels were built.
    """
    from .. import backend_info
    from .. import info as model_info
    from ..api import usable_device

    if backend == (model is not None):
        raise typer.BadParameter("name a model, or ask for --backend", param_hint="MODEL")
    description = backend_info.describe_backends(usable_device(device)) if model is None else model_info.describe(model)
    if as_json:
        write_json(description)
    else:
        write_table((backend_info if model is None else model_info).table(description))
