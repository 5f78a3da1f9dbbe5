"""The options of `afnext serve` that belong to --ray."""

from dataclasses import dataclass
from typing import Annotated

import typer

from ...runtime.app.cli.options import RayOptions

FRONT_CPUS = 1  # cores that each front asks Ray for


@dataclass(frozen=True)
class FleetOptions(RayOptions):
    """The size of the fleet."""

    max_replicas: Annotated[
        int | None, typer.Option(help="With --ray: add replicas under load, up to so many.", min=1)
    ] = None
    fronts: Annotated[int, typer.Option(help="With --ray: processes that receive requests.", min=1)] = 1

    def check(self) -> None:
        """Raise typer.BadParameter for options that need --ray, or that contradict each other."""
        super().check()
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise typer.BadParameter(f"it is less than --replicas {self.replicas}.", param_hint="--max-replicas")
