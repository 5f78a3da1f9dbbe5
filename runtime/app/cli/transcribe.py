"""`afnext transcribe`: transcripts of recordings as text, JSON, SRT or WebVTT."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ....kernels.errors import AfnextError
from ...errors import OutputError
from .options import (
    Format,
    LoadOptions,
    OutputOptions,
    SamplingOptions,
    SystemOption,
    TruncateOption,
    grouped,
)
from .output import (
    Bars,
    announce,
    fail,
    log_to_stderr,
    note,
    open_output,
    progress,
    stdout_encoding,
    warn,
    write,
    write_json,
)
from .sources import open_sources
from .targets import Recording, output_paths, recordings
from .text import encodable_json

if TYPE_CHECKING:
    from ...io.audio import AudioSource
    from ..responder import AnswerOptions
    from ..transcribe import Transcript, TranscriptStream

_JSON = (Format.json, Format.ndjson)


@grouped
def transcribe(
    audio: Annotated[list[str], typer.Argument(help="Audio or video files, or folders of them; - reads stdin.")],
    loading: LoadOptions,
    sampling: SamplingOptions,
    show: OutputOptions,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.text,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A file; a folder if it ends in / or there are several; else stdout."),
    ] = None,
    window: Annotated[float | None, typer.Option(help="Seconds per window; 300 by default.", min=1.0)] = None,
    overlap: Annotated[float, typer.Option(help="Overlap of windows in seconds.", min=0.0)] = 10.0,
    timestamps: Annotated[
        bool | None, typer.Option(help="Ask for times; by default if the checkpoint supports them.")
    ] = None,
    speakers: Annotated[
        bool | None, typer.Option(help="Ask for speakers; by default if the checkpoint supports them.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Replaces the prompt.")] = None,
    system: SystemOption = None,
    truncate: TruncateOption = False,
) -> None:
    """Transcribe speech, with times and speakers.

    The transcript is text, JSON, NDJSON (one line per segment), SRT or WebVTT. A recording that cannot be transcribed
    is reported; the others are transcribed, and the exit code is 1.
    """
    log_to_stderr(show.verbose)
    if show.as_json and format in (Format.text, Format.json):
        format = Format.json
    elif show.as_json and format is not Format.ndjson:
        raise typer.BadParameter(f"--json and --format {format.value} contradict each other.", param_hint="--json")
    found = recordings(audio)
    several = len(found) > 1 or found[0].source not in audio
    targets = output_paths(found, output, "txt" if format is Format.text else format.value, several=several)
    to_stdout = targets[0] is None
    if several and to_stdout and format in (Format.srt, Format.vtt):
        raise typer.BadParameter(
            f"several recordings do not make one {format.value} file; give a folder with --output.",
            param_hint="--format",
        )
    checked = [
        (recording, target, _checked(recording, truncate)) for recording, target in zip(found, targets, strict=True)
    ]
    failed = sum(source is None for _, _, source in checked)
    if failed < len(checked):
        announce(loading.model, show.quiet)
        with progress(show.quiet) as bars:
            model = loading.load(bars)
    for recording, target, source in checked:
        if source is None:
            continue

        def start(bars: Bars, source: "AudioSource" = source) -> "TranscriptStream":
            options: AnswerOptions = {**sampling.given(), "truncate": truncate, "progress": bars}
            return model.stream_transcribe(
                source,
                window=window,
                overlap=overlap,
                timestamps=timestamps,
                speakers=speakers,
                prompt=prompt,
                system=system,
                **options,
            )

        try:
            transcript = _write_transcript(start, target, format, several=several, quiet=show.quiet)
        except OutputError:
            raise
        except AfnextError as error:
            _report(recording, error)
            failed += 1
        else:
            _print_transcribed(transcript, target, show.quiet)
    if failed:
        if several:
            note(f"{failed} of {len(found)} recordings could not be transcribed")
        raise typer.Exit(1)


def _write_transcript(
    start: "Callable[[Bars], TranscriptStream]", target: Path | None, format: Format, *, several: bool, quiet: bool
) -> "Transcript":
    """Write a transcript to `target` or stdout as its segments arrive; return it."""
    ended: BaseException | None = None
    with open_output(target) as file, progress(quiet) as bars:
        stream = start(bars)
        if file is not None:
            ended = _write_file(stream, format, file)
        elif several and format is Format.json:
            write_json(stream.finish().to_dict())
        else:
            _write_stdout(stream, format, bars)
    if ended is not None:
        note(f"{target} holds what was transcribed before the error")
        raise ended
    return stream.finish()


def _write_stdout(stream: "TranscriptStream", format: Format, bars: Bars) -> None:
    from ..transcribe import render_stream

    for piece in render_stream(stream, format.value):
        with bars.out_of_the_way():
            write(encodable_json(piece, stdout_encoding()) if format in _JSON else piece)


def _write_file(stream: "TranscriptStream", format: Format, file: BinaryIO) -> BaseException | None:
    """Write the transcript as it arrives. If an error or Ctrl-C ends it after output was written, return that."""
    from ..transcribe import render_stream

    pieces = 0
    try:
        for piece in render_stream(stream, format.value):
            text = encodable_json(piece, "utf-8") if format in _JSON else piece
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            pieces += 1
    except (AfnextError, KeyboardInterrupt) as error:
        if pieces <= (format is Format.vtt):  # a header alone is no reason to keep the file
            raise
        return error
    return None


def _checked(recording: Recording, truncate: bool) -> "AudioSource | None":
    """The recording, opened and checked, or None with an error printed."""
    try:
        return open_sources([recording.source], truncate=truncate)[0]
    except AfnextError as error:
        _report(recording, error)
        return None


def _report(recording: Recording, error: AfnextError) -> None:
    message = str(error)
    fail(message if recording.source in message else f"{recording.source}: {message}")


def _print_transcribed(transcript: "Transcript", target: "Path | None", quiet: bool) -> None:
    for warning in transcript.warnings:
        warn(f"{transcript.source}: {warning}")
    if not quiet:
        written = "" if target is None else f", written to {target}"
        note(
            f"{transcript.source}: {transcript.duration:.2f} s in {len(transcript.windows)} windows, "
            f"{len(transcript.segments)} segments{written}"
        )
