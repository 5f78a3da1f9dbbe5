"""`afnext serve`."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import AfnextError
from ..runtime.app.cli.options import LoadOptions, VerboseOption, grouped
from ..runtime.app.cli.output import announce, log_to_stderr, progress
from .ray.options import FleetOptions

if TYPE_CHECKING:
    from ..runtime.app.api import Model
    from .settings import Settings
    from .speech import Speaker


@dataclass(frozen=True)
class Plan:
    """A parsed command line. speaker: see `speech.speaker_of`; tls: paths of a certificate and its key."""

    loading: LoadOptions
    settings: "Settings"
    fleet: FleetOptions
    speaker: str | None
    tls: tuple[str, str] | None
    verbose: bool


@grouped
def _plan(
    loading: LoadOptions,
    fleet: FleetOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    alias: Annotated[list[str] | None, typer.Option(help="A further name of the model; repeat for more.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys, one NAME:SHA256 per line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Allow a public address without API keys.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Host name that clients may use; repeat for more.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of pages that may call; repeat for more.")
    ] = None,
    audio_host: Annotated[list[str] | None, typer.Option(help="Host to fetch https recordings from; repeat.")] = None,
    share_cache: Annotated[bool, typer.Option("--share-cache", help="Let API keys share cached prompts.")] = False,
    max_requests: Annotated[
        int | None, typer.Option(help="Unfinished requests at once; by default 4 times the batch.", min=1)
    ] = None,
    decode_workers: Annotated[int, typer.Option(help="Processes that decode audio.", min=1)] = 2,
    drain_seconds: Annotated[float, typer.Option(help="Time for running requests at shutdown.", min=0.0)] = 30.0,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Keep files and contexts here; without it they end with the server."),
    ] = None,
    store_size: Annotated[
        str, typer.Option(help='Disk space for uploaded files, and as much for contexts, such as "20GB".')
    ] = "20GiB",
    speaker: Annotated[
        str | None,
        typer.Option(help="Speak answers on request: piper:VOICE.onnx, or a command from text to WAV."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    verbose: VerboseOption = False,
) -> Plan:
    """Serve the model over HTTP, for OpenAI's clients and in the browser.

    API keys can also stand in AFNEXT_API_KEYS, with commas.
    """
    try:
        from .guard import read_keys
        from .run import check
        from .settings import Settings
    except ModuleNotFoundError as error:
        raise AfnextError(
            f"serving needs the extra `serve` ({error.name} is missing): pip install '.[serve]'"
        ) from None
    fleet.check()
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("give both --tls-cert and --tls-key, or none", param_hint="--tls-cert")
    name = loading.model.rstrip("/").rsplit("/", 1)[-1]
    settings = Settings(
        host=host,
        port=port,
        keys=read_keys(api_key_file, os.environ.get("AFNEXT_API_KEYS")),
        no_auth=no_auth,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        audio_hosts=tuple(audio_host or ()),
        names=(name, *(alias or ())),
        share_cache=share_cache,
        max_requests=max_requests,
        drain_seconds=drain_seconds,
        state_dir=state_dir,
        store_bytes=_bytes(store_size, "--store-size"),
        decode_workers=decode_workers,
    )
    check(settings)
    tls = (str(tls_cert), str(tls_key)) if tls_cert else None
    return Plan(loading, settings, fleet, speaker, tls, verbose)


def _bytes(text: str, option: str) -> int:
    from ..runtime.engine.memory import parse_bytes
    from ..runtime.errors import MemoryPlanError

    try:
        return parse_bytes(text)
    except MemoryPlanError:
        raise typer.BadParameter(f'{text!r} is no amount; write it as "20GB"', param_hint=option) from None


def parsed(arguments: Sequence[str]) -> Plan:
    """The plan of a command line's arguments after `afnext serve`. Raises AfnextError and click's errors."""
    command = typer.Typer(add_completion=False)
    command.command()(_plan)
    plan: Plan = typer.main.get_command(command)(list(arguments), prog_name="afnext serve", standalone_mode=False)
    return plan


def command_line(options: Mapping[str, Any]) -> list[str]:
    """The arguments for options given by name. A value is true for a flag and a list for a repeated option."""
    arguments: list[str] = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not False:
                arguments += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return arguments


@wraps(_plan, assigned=("__doc__", "__annotations__"))
def serve(**values: Any) -> None:
    plan = _plan(**values)
    log(plan.verbose)
    speaker = None
    if plan.speaker is not None:
        from .speech import check as check_speaker
        from .speech import speaker_of

        speaker = speaker_of(plan.speaker)
        check_speaker(speaker)
    announce(plan.loading.model, False)
    code = _on_ray(plan) if plan.fleet.ray else _here(plan, speaker)
    if code:
        raise typer.Exit(code)


def log(verbose: bool) -> None:
    """Log a line of JSON per request, and the server's messages, to stderr."""
    from .run import log_requests

    log_to_stderr(verbose)
    logging.getLogger("afnext.serve").setLevel(logging.INFO)
    log_requests()


def _here(plan: Plan, speaker: "Speaker | None") -> int:
    from .run import run

    def load() -> "Model":
        with progress(False) as report:
            return plan.loading.load(report)

    return run(plan.settings, load, tls=plan.tls, speaker=speaker)


def _on_ray(plan: Plan) -> int:
    from .ray.run import run

    return run(plan)
