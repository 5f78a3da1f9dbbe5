"""`afnext bench`: measure speed, memory and quality, on any machine."""

import typer

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and quality.", rich_markup_mode="rich")
