"""`afnext models`: download, list, find and delete models."""

from typing import Annotated

import typer

from ...model import hub
from .options import JsonOption, QuietOption
from .output import note, progress, write, write_json, write_table

models = typer.Typer(name="models", help="Download, list, find and delete models.", no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"A short name ({', '.join(hub.SHORT_NAMES)}) or a Hub name, org/name.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; main if left out.")]


@models.command(epilog="Example: afnext models pull next")
def pull(
    model: NameArgument, revision: RevisionOption = None, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Download a model, or its missing files. An interrupted download continues where it stopped."""
    with progress(quiet or as_json) as report:
        folder = hub.pull(model, revision=revision, progress=report)
    if as_json:
        write_json({"name": hub.full_name(model), "folder": str(folder)})
    else:
        write(f"{folder}\n")


@models.command("list", epilog="Example: afnext models list --json")
def list_models(as_json: JsonOption = False) -> None:
    """List the models on this machine, and those that have a short name."""
    found = hub.local_models()
    absent = {short: name for short, name in hub.SHORT_NAMES.items() if name not in {model.name for model in found}}
    if as_json:
        rows = [
            {
                "name": model.name,
                "short_name": model.short_name,
                "commit": model.commit,
                "bytes": model.nbytes,
                "complete": model.complete,
                "folder": str(model.folder),
            }
            for model in found
        ]
        write_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("short name", "name", "size", "commit", "state"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for model in found:
        state = "complete" if model.complete else "incomplete"
        table.add_row(model.short_name, model.name, _size(model.nbytes), (model.commit or "")[:12], state)
    for short, name in absent.items():
        table.add_row(short, name, "", "", "not downloaded")
    write_table(table)


@models.command(epilog="Example: afnext models rm next-think")
def rm(
    model: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a model from the Hub's cache, which other programs may share, or a packed copy by its folder."""
    name = hub.full_name(model)
    if not yes and not as_json:
        typer.confirm(f"Delete {name} from this machine?", abort=True, err=True)
    freed = hub.remove(model)
    if as_json:
        write_json({"name": name, "bytes": freed})
    else:
        note(f"{name} deleted, {_size(freed)} freed")


@models.command(epilog="Example: ls -l $(afnext models where next)")
def where(model: NameArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Print the folder of a model that is on this machine; nothing is downloaded."""
    folder = hub.where(model, revision=revision)
    if as_json:
        write_json({"name": hub.full_name(model), "folder": str(folder)})
    else:
        write(f"{folder}\n")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
