"""The fastest backend of an operation for the shapes at hand, timed on this machine under `AFNEXT_AUTOTUNE=1`.

A choice is made once for each kind of shapes and kept in the file of `autotune`, with the times of all backends. It is
used on the same GPU, with the same versions of Triton, torch, cuDNN and flash-attn. Others are reported and ignored.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import autotune
from .errors import BackendError

_log = logging.getLogger("afnext.kernels")
_winners: dict[str, str] = {}
_reported: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """A choice in the file. machine: the GPU and versions that it was made on; milliseconds: by backend."""

    operation: str
    shapes: str
    machine: str
    backend: str
    milliseconds: dict[str, float]


def fastest(
    operation: str,
    shapes: str,
    backends: Sequence[str],
    device: torch.device,
    versions: tuple[str, ...],
    run: Callable[[str], object],
) -> str:
    """The fastest of several backends. The first of them while a graph is captured, if nothing was chosen before.

    versions: of the libraries among them; run: computes the operation by one of them. A backend that raises is reported
    and not chosen. Raises BackendError if all do.
    """
    entry = autotune.entry_name(device, operation, shapes, versions)
    if entry not in _winners:
        known = _choice(entry, autotune.stored().get(entry))
        if known is None or known.backend not in backends:
            if not autotune.may_time(device):
                return backends[0]
            _report_others(operation, entry)
            known = _timed(entry, backends, run)
        _winners[entry] = known.backend
    return _winners[entry]


def choices(device: torch.device, versions: tuple[str, ...]) -> tuple[list[Choice], list[Choice]]:
    """The choices in the file that hold on this machine, and those that do not."""
    here, _, _ = autotune.entry_parts(autotune.entry_name(device, "", "", versions))
    found = [choice for entry, value in autotune.stored().items() if (choice := _choice(entry, value)) is not None]
    found.sort(key=lambda choice: (choice.operation, choice.shapes))
    return [one for one in found if one.machine == here], [one for one in found if one.machine != here]


def _choice(entry: str, value: Any) -> Choice | None:
    """An entry of the file as a choice, or None if it is something else."""
    machine, operation, shapes = autotune.entry_parts(entry)
    try:
        times = {str(name): float(time) for name, time in value["milliseconds"].items()}
        return Choice(operation, shapes, machine, str(value["backend"]), times)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _report_others(operation: str, entry: str) -> None:
    """Warn once if choices for an operation were made with another GPU or other versions."""
    here, _, _ = autotune.entry_parts(entry)
    made = (_choice(other, value) for other, value in autotune.stored().items())
    machines = sorted({one.machine for one in made if one is not None and one.operation == operation} - {here})
    if machines and operation not in _reported:
        _reported.add(operation)
        _log.warning(
            "%s: backends are timed again, as those in %s were timed with %s and this is %s",
            *(operation, autotune.path(), "; ".join(machines), here),
        )


def _timed(entry: str, backends: Sequence[str], run: Callable[[str], object]) -> Choice:
    times: dict[str, float] = {}
    machine, operation, shapes = autotune.entry_parts(entry)
    for name in backends:
        try:
            times[name] = autotune.milliseconds(lambda name=name: run(name))  # type: ignore[misc]
        except Exception as error:  # a library's own
            _log.warning("%s (%s): %s failed and is not chosen: %s", operation, shapes, name, error)
    if not times:
        raise BackendError(f"{operation} ({shapes}): none of {', '.join(backends)} computes it")
    winner = min(times, key=times.__getitem__)
    shown = ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
    _log.info("%s (%s): %s is the fastest: %s", operation, shapes, winner, shown)
    autotune.store(entry, {"backend": winner, "milliseconds": times})
    return Choice(operation, shapes, machine, winner, times)
