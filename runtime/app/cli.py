"""The command line: ask, chat, transcribe, listen, quantize, info, plan. Answers go to stdout, all else to stderr.

Exit codes: 0 for success, 1 for an error that the message explains, 2 for wrong usage, 130 when interrupted.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ...kernels.errors import AfnextError
from ...quant.calibrate import LayerReport
from ...quant.recipe import RECIPES, recipe
from ..engine.memory import DENSE, SCHEMES, MemoryPlan, shown_bytes
from ..io.audio import AudioSource
from ..io.live_source import RAW_FORMATS
from ..model.hub import BUNDLED
from . import backend_info
from . import info as model_info
from .answer import Answer, Piece
from .api import Model, load, usable_device
from .calibration import calibrate as calibrate_checkpoint
from .cli_options import (
    KV,
    ChunkOption,
    DeviceOption,
    DType,
    DTypeOption,
    Format,
    JsonOption,
    KVOption,
    ModelOption,
    NewTokensOption,
    PenaltyOption,
    QuantOption,
    QuietOption,
    ReleaseOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    TruncateOption,
    VerboseOption,
)
from .live_session import MICROPHONE, LiveSession, open_pieces, typed_questions
from .plan import Target, model_config, view
from .quantize import quantize as quantize_checkpoint
from .responder import AnswerOptions, QuestionOptions, Stream
from .responder import Progress as Report
from .transcribe import DEFAULT_OVERLAP, Transcript, output_paths, write_transcript

app = typer.Typer(
    name="afnext",
    help="Ask Audio Flamingo Next about speech, sound and music.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_err = Console(stderr=True, highlight=False)


@app.command(
    epilog='Example: [bold]afnext ask meeting.mp3 "Who speaks first?" -m nvidia/audio-flamingo-next-hf[/bold]',
)
def ask(
    audio: Annotated[str, typer.Argument(help="An audio or video file; - reads standard input.")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    model: ModelOption = BUNDLED,
    also: Annotated[list[str] | None, typer.Option(help="A further recording; repeat for more.")] = None,
    system: SystemOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    kv: KVOption = KV.auto,
    quant: QuantOption = None,
    release_encoder: ReleaseOption = False,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    truncate: TruncateOption = False,
    chunk_size: ChunkOption = 1024,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer a question about a recording."""
    _logging(verbose)
    options = _options(max_new_tokens, temperature, top_p, repetition_penalty, seed, truncate)
    _announce(model, quiet or as_json)
    with _progress(quiet or as_json) as report:
        loaded = load(
            model,
            device=device,
            dtype=dtype.value,
            chunk_size=chunk_size,
            kv=kv.value,
            quant=quant,
            release_encoder=release_encoder,
            progress=report,
        )
        sources: list[AudioSource] = [sys.stdin.buffer if name == "-" else name for name in [audio, *(also or [])]]
        options["progress"] = report
        stream = loaded.stream(sources, question, system=system, **options)
        first = next(stream, None)
    _show(stream, first, as_json=as_json, quiet=quiet)


@app.command(epilog="Example: [bold]afnext chat meeting.mp3 -m nvidia/audio-flamingo-next-think-hf[/bold]")
def chat(
    model: ModelOption = BUNDLED,
    audio: Annotated[list[str] | None, typer.Argument(help="Recordings to talk about; none for text only.")] = None,
    system: SystemOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    kv: KVOption = KV.auto,
    quant: QuantOption = None,
    release_encoder: ReleaseOption = False,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    truncate: TruncateOption = False,
    chunk_size: ChunkOption = 1024,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Ask one question after another; an empty line or end of input leaves."""
    _logging(verbose)
    options = _options(max_new_tokens, temperature, top_p, repetition_penalty, seed, truncate)
    _announce(model, quiet or as_json)
    with _progress(quiet or as_json) as report:
        loaded = load(
            model,
            device=device,
            dtype=dtype.value,
            chunk_size=chunk_size,
            kv=kv.value,
            quant=quant,
            release_encoder=release_encoder,
            progress=report,
        )
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": name} for name in audio or []]
    while question := _read_question():
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        parts = []
        answer = _reply(loaded, messages, options, as_json=as_json, quiet=quiet)
        messages.append({"role": "assistant", "content": answer.text})


def _reply(
    loaded: Model, messages: list[dict[str, Any]], options: AnswerOptions, *, as_json: bool, quiet: bool
) -> Answer:
    with _progress(quiet or as_json) as report:
        options["progress"] = report
        stream = loaded.stream_chat(messages, **options)
        first = next(stream, None)
    return _show(stream, first, as_json=as_json, quiet=quiet)


def _show(stream: Stream, first: Piece | None, *, as_json: bool, quiet: bool) -> Answer:
    """Print the answer as it comes, or as one JSON object; return it."""
    answer = _print_stream(stream, first, silent=as_json)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False), flush=True)
    else:
        _print_footer(answer, quiet)
    return answer


@app.command(
    epilog="Example: [bold]afnext transcribe talk.mp3 -f srt -o talk.srt -m nvidia/audio-flamingo-next-hf[/bold]",
)
def transcribe(
    audio: Annotated[list[str], typer.Argument(help="Audio or video files; - reads standard input.")],
    model: ModelOption = BUNDLED,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.text,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file, or with several recordings a folder; else stdout.")
    ] = None,
    window: Annotated[float | None, typer.Option(help="Seconds heard at once; 300 if left out.", min=1.0)] = None,
    overlap: Annotated[float, typer.Option(help="Seconds that neighbouring windows share.", min=0.0)] = DEFAULT_OVERLAP,
    timestamps: Annotated[bool, typer.Option(help="Ask for times.")] = True,
    speakers: Annotated[bool, typer.Option(help="Ask who speaks.")] = True,
    prompt: Annotated[str | None, typer.Option(help="What to ask instead.")] = None,
    system: SystemOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    kv: KVOption = KV.auto,
    quant: QuantOption = None,
    release_encoder: ReleaseOption = False,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    truncate: TruncateOption = False,
    chunk_size: ChunkOption = 1024,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write down what is said, with times and speakers, as text, JSON, SRT or WebVTT."""
    _logging(verbose)
    options = _options(max_new_tokens, temperature, top_p, repetition_penalty, seed, truncate)
    targets = output_paths(audio, output, format.value)
    _announce(model, quiet)
    with _progress(quiet) as report:
        loaded = load(
            model,
            device=device,
            dtype=dtype.value,
            chunk_size=chunk_size,
            kv=kv.value,
            quant=quant,
            release_encoder=release_encoder,
            progress=report,
        )
    for name, target in zip(audio, targets, strict=True):
        with _progress(quiet) as report:
            options["progress"] = report
            transcript = loaded.transcribe(
                sys.stdin.buffer if name == "-" else name,
                window=window,
                overlap=overlap,
                timestamps=timestamps,
                speakers=speakers,
                prompt=prompt,
                system=system,
                **options,
            )
        write_transcript(transcript, format.value, target)
        _print_transcribed(transcript, target, quiet)


def _print_transcribed(transcript: Transcript, target: Path | None, quiet: bool) -> None:
    for warning in transcript.warnings:
        _err.print(f"[yellow]warning:[/yellow] {escape(transcript.source)}: {escape(warning)}")
    if not quiet:
        written = "" if target is None else f", written to {escape(str(target))}"
        _err.print(
            f"[dim]{escape(transcript.source)}: {transcript.duration:.2f} s in {len(transcript.windows)} windows, "
            f"{len(transcript.segments)} segments{written}[/dim]"
        )


@app.command(
    epilog="Example: [bold]ffmpeg -i URL -f s16le -ac 1 -ar 16000 - | afnext listen - --raw s16le -m MODEL[/bold]",
)
def listen(
    model: ModelOption = BUNDLED,
    source: Annotated[
        str, typer.Argument(help="mic, mic:NAME, - for standard input, or the path of a pipe or file.")
    ] = MICROPHONE,
    question: Annotated[
        list[str] | None, typer.Option("--ask", help="Ask this at the end of the audio, and leave; repeat for more.")
    ] = None,
    raw: Annotated[str | None, typer.Option(help=f"Samples without a header: {', '.join(RAW_FORMATS)}.")] = None,
    rate: Annotated[int, typer.Option(help="Hz of raw samples.", min=1)] = 16_000,
    channels: Annotated[int, typer.Option(help="Channels of raw samples, interleaved.", min=1)] = 1,
    system: SystemOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    kv: KVOption = KV.auto,
    quant: QuantOption = None,
    release_encoder: ReleaseOption = False,
    max_new_tokens: NewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    chunk_size: ChunkOption = 1024,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Listen to audio while it is recorded, and answer typed questions about what has been heard so far.

    An empty line or end of input leaves.
    """
    _logging(verbose)
    options = _options(max_new_tokens, temperature, top_p, repetition_penalty, seed, False)
    del options["truncate"]
    with ExitStack() as stack:
        questions = None if question else typed_questions(source, stack)
        if question is None and questions is None:
            raise AfnextError("there is no terminal to type questions on; give them with --ask.")
        _announce(model, quiet or as_json)
        with _progress(quiet or as_json) as report:
            loaded = load(
                model,
                device=device,
                dtype=dtype.value,
                chunk_size=chunk_size,
                kv=kv.value,
                quant=quant,
                release_encoder=release_encoder,
                progress=report,
            )
        live = stack.enter_context(loaded.listen(system=system))
        session = LiveSession(live, open_pieces(source, stack, raw=raw, rate=rate, channels=channels))
        session.start()
        stack.callback(session.stop)
        if questions is None:
            session.wait()
        for each in question or questions or ():
            _answer_live(session, each, options, as_json=as_json, quiet=quiet)


def _answer_live(session: LiveSession, question: str, options: QuestionOptions, *, as_json: bool, quiet: bool) -> None:
    """Answer one question; what goes wrong with it is told and ends nothing."""
    if session.error is not None:
        _err.print(f"[yellow]warning:[/yellow] nothing more is heard: {escape(str(session.error))}")
    try:
        stream = session.stream(question, options)
        _show(stream, next(stream, None), as_json=as_json, quiet=quiet)
    except AfnextError as error:
        _err.print(f"[red]error:[/red] {escape(str(error))}")


@app.command(epilog="Example: [bold]afnext quantize nvidia/audio-flamingo-next-hf af-next-int4 --scheme int4[/bold]")
def quantize(
    source: Annotated[
        str, typer.Argument(help="A dense checkpoint, or one in GPTQ, AWQ or compressed-tensors: folder or Hub name.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    scheme: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}, or as in int4-g128-zeros.")] = "int4",
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale, for int4: 32, 64 or 128.")] = None,
    zeros: Annotated[bool, typer.Option("--zeros", help="With zero points, for int4.")] = False,
    rule: Annotated[
        list[str] | None,
        typer.Option(help='LAYERS=SCHEME that comes first, as in "decoder.layers.0.*=dense"; repeat for more.'),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Quantized Qwen2 (GPTQ, AWQ, compressed-tensors) to take the decoder from.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of recordings, with texts beside them, to choose the codes by.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, ...")] = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pack the weights of a checkpoint in 8 or 4 bits, once for all.

    Layers that another library packed in 4 bits keep their bits.
    """
    packed_by = recipe(scheme, group_size=group_size, symmetric=not zeros, rules=[_rule(text) for text in rule or ()])
    if calibrate is not None:
        if backbone is not None:
            raise typer.BadParameter("leave it out: only dense weights can be calibrated", param_hint="--backbone")
        with _progress(quiet or as_json) as report:
            layers = calibrate_checkpoint(
                source, out, packed_by, calibrate, device=usable_device(device), progress=report
            )
        _show_calibration(out, packed_by.name, layers, as_json=as_json, quiet=quiet)
        return
    with _progress(quiet or as_json) as report:
        done = quantize_checkpoint(
            source,
            out,
            packed_by,
            backbone=backbone,
            device=usable_device(device),
            progress=lambda done, total: report("quantizing", done, total),
        )
    if as_json:
        print(json.dumps(done, ensure_ascii=False))
    elif not quiet:
        _err.print(
            f"{done['out']}: {shown_bytes(done['bytes'])} instead of {shown_bytes(done['bytes_before'])}, "
            f"{done['recipe']}, in {done['seconds']:g} s"
        )


def _show_calibration(out: Path, name: str, layers: Sequence[LayerReport], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "recipe": name, "layers": [asdict(layer) for layer in layers]}))
    elif not quiet and layers:
        worst = max(layers, key=lambda layer: layer.error)
        _err.print(
            f"{out}: {name}, calibrated; of {len(layers)} layers {worst.layer} has the largest error, "
            f"{100 * worst.error:.2g} % of its output"
        )


def _rule(text: str) -> tuple[str, str]:
    pattern, found, scheme = text.partition("=")
    if not found or not pattern:
        raise typer.BadParameter(f'{text!r} should read LAYERS=SCHEME, as in "encoder.*=dense"', param_hint="--rule")
    return pattern, scheme


@app.command(epilog="Example: [bold]afnext info nvidia/audio-flamingo-next-hf --json[/bold]")
def info(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, or a name on the Hub.")] = None,
    backend: Annotated[
        bool, typer.Option("--backend", help="Show which implementation each operation runs on instead.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: shape, parameters, bytes by part, tokens, context."""
    if backend == (model is not None):
        raise typer.BadParameter("name a model, or ask for --backend", param_hint="MODEL")
    description = backend_info.describe_backends(usable_device(device)) if model is None else model_info.describe(model)
    if as_json:
        print(json.dumps(description, ensure_ascii=False))
    else:
        show = backend_info.table if model is None else model_info.table
        Console(highlight=False).print(show(description))


@app.command(epilog="Example: [bold]afnext plan --gpu 8GB --audio 1800 --scheme int4 --kv int8[/bold]")
def plan(
    gpu: Annotated[
        str, typer.Option(help='An amount ("8GB"), a known GPU ("rtx3060"), "cuda", or "cpu" for this machine.')
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder, config.json or Hub name; the published AF-Next if left out."),
    ] = None,
    audio: Annotated[float, typer.Option(help="Seconds of audio.", min=0.0)] = 1800.0,
    new_tokens: Annotated[int, typer.Option(help="Room for the answer, in tokens.", min=1)] = 2048,
    scheme: Annotated[
        str,
        typer.Option("--scheme", "--quant", help=f"What weights are stored in: {', '.join(SCHEMES)}, int4-g32, ..."),
    ] = DENSE,
    kv: KVOption = KV.auto,
    dtype: DTypeOption = DType.auto,
    page_size: Annotated[int, typer.Option(help="Tokens a KV page.", min=1)] = 256,
    chunk_size: ChunkOption = 1024,
    encode_batch: Annotated[int, typer.Option(help="Audio windows encoded at once.", min=1)] = 4,
    release_encoder: ReleaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model takes on a device, what fits, and what to change when it does not. Nothing is loaded."""
    target = Target.parse(gpu)
    config = model_config(model)
    planned = MemoryPlan(
        config,
        target.memory,
        gpu=target.gpu,
        dtype=getattr(torch, config.dtype if dtype is DType.auto else dtype.value),
        audio_seconds=audio,
        scheme=scheme,
        kv=kv.value,
        page_size=page_size,
        chunk_size=chunk_size,
        encode_batch=encode_batch,
        release_encoder=release_encoder,
        new_tokens=new_tokens,
        mapped=not target.gpu and scheme == DENSE and dtype.value in ("auto", config.dtype),
    )
    if as_json:
        print(json.dumps({"device": target.name, "gpu": target.gpu, **planned.to_dict()}, ensure_ascii=False))
    else:
        Console(highlight=False).print(view(planned, target))


def run(command: typer.Typer) -> None:
    """Run a command line; errors that a user can act on end it with one sentence and exit code 1."""
    try:
        command(prog_name="afnext")
    except AfnextError as error:
        _err.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        _err.print("interrupted")
        sys.exit(130)


def _announce(model: str, quiet: bool) -> None:
    """Say that the small model answers, so that nobody takes it for the real one."""
    if model == BUNDLED and not quiet:
        _err.print(
            f"[dim]{BUNDLED} answers, a demonstration that often errs: it knows 113 words and nine sounds. "
            "For everything else, --model nvidia/audio-flamingo-next-hf[/dim]",
            soft_wrap=True,
        )


def _options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    truncate: bool,
) -> AnswerOptions:
    """Only what was given: the checkpoint's generation_config.json decides the rest."""
    options: AnswerOptions = {"truncate": truncate}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if seed is not None:
        options["seed"] = seed
    return options


@contextmanager
def _progress(hidden: bool) -> Iterator[Report]:
    """A progress bar on stderr, one task a stage, gone once the first piece of the answer is there."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_err, transient=True, disable=hidden or not _err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: float, total: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def _print_stream(stream: Stream, first: Piece | None, *, silent: bool) -> Answer:
    """Write the pieces as they come, thoughts dimmed, and return the answer."""
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    thinking = False
    for piece in () if first is None else chain([first], stream):
        if silent:
            continue
        is_thought = piece.thinking
        if thinking and not is_thought:
            out.print("\n")
        thinking = is_thought
        out.print(piece, style="dim" if is_thought else None, end="")
    if not silent:
        out.print()
    assert stream.answer is not None
    return stream.answer


def _print_footer(answer: Answer, quiet: bool) -> None:
    for warning in answer.warnings:
        _err.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    if answer.finish_reason == "length":
        _err.print("[yellow]warning:[/yellow] the answer was cut at max_new_tokens")
    if quiet:
        return
    usage, timings = answer.usage, answer.timings
    _err.print(
        f"[dim]{usage.audio_seconds:.2f} s of audio in {usage.windows} windows, {usage.audio_tokens} audio + "
        f"{usage.text_tokens} text tokens; {usage.new_tokens} new tokens at {timings.tokens_per_second:.1f}/s\n"
        f"load {timings.load_audio:.2f} s, log-mel {timings.log_mel:.2f} s, encode {timings.encode:.2f} s, prefill "
        f"{timings.prefill:.2f} s, first token after {timings.first_token:.2f} s, total {timings.total:.2f} s[/dim]"
    )


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _logging(verbose: bool) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO if verbose else logging.WARNING)
