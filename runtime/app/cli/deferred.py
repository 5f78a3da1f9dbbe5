"""Command groups that are imported only when one of their commands or their help is used."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group


def deferred_group(module: str, help: str) -> typer.Typer:
    """A group with the commands of the `app` in `module`, which is imported when they are needed."""

    class Deferred(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return get_group(import_module(module).app).list_commands(ctx)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return get_group(import_module(module).app).get_command(ctx, cmd_name)

    return typer.Typer(cls=Deferred, no_args_is_help=True, help=help, rich_markup_mode=None)
