"""`afnext listen`: audio that is still being recorded, and questions about it meanwhile."""

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from ....kernels.errors import AfnextError
from ...errors import AudioError
from .options import (
    FromOption,
    LoadOptions,
    OutputOptions,
    SamplingOptions,
    SystemOption,
    TaskOption,
    ToOption,
    grouped,
    question_text,
)
from .output import announce, fail, log_to_stderr, progress, show_answer, warn
from .sources import STDIN, standard_input

if TYPE_CHECKING:
    from ..live_session import LiveSession
    from ..responder import QuestionOptions

MICROPHONE = "mic"
RAW_FORMATS = ("s16le", "s32le", "f32le", "u8")


@grouped
def listen(
    loading: LoadOptions,
    sampling: SamplingOptions,
    show: OutputOptions,
    source: Annotated[
        str, typer.Argument(help="mic, mic:NAME, - for standard input, or the path of a pipe or file.")
    ] = MICROPHONE,
    question: Annotated[
        list[str] | None, typer.Option("--ask", help="Ask this at the end of the audio, and exit; repeat for more.")
    ] = None,
    task: TaskOption = None,
    to: ToOption = None,
    spoken: FromOption = None,
    raw: Annotated[str | None, typer.Option(help=f"Samples without a header: {', '.join(RAW_FORMATS)}.")] = None,
    rate: Annotated[int, typer.Option(help="Hz of raw samples.", min=1)] = 16_000,
    channels: Annotated[int, typer.Option(help="Channels of raw samples, interleaved.", min=1)] = 1,
    system: SystemOption = None,
) -> None:
    """Answer questions about audio while it is recorded.

    Type questions about the audio so far; an empty line or the end of input exits.
    """
    from ..live_session import LiveSession, open_source, typed_questions

    log_to_stderr(show.verbose)
    for text in question or ():
        question_text(text)
    with ExitStack() as stack:
        questions = None if question or task else typed_questions(source, stack)
        if not question and task is None and questions is None:
            raise AfnextError("there is no terminal to type questions on; give them with --ask.")
        _check(source, raw)
        announce(loading.model, show.silent)
        with progress(show.silent) as report:
            model = loading.load(report)
        at_the_end = [*([] if task is None else [model.prompts.get(task, to=to, source=spoken)]), *(question or ())]
        live = stack.enter_context(model.listen(system=system))
        session = LiveSession(live, open_source(source, stack, raw=raw, rate=rate, channels=channels))
        session.start()
        stack.callback(session.stop)
        if questions is None:
            session.wait()
        answered = [_answer(session, each, sampling.given(), show) for each in at_the_end or questions or ()]
        session.raise_error()
        if at_the_end and not all(answered):
            raise typer.Exit(1)


def _check(source: str, raw: str | None) -> None:
    """Raise AudioError if the source does not exist, before a model is loaded."""
    from ...io.live_source import check_microphone

    if raw is not None and raw not in RAW_FORMATS:
        raise AudioError(f"{raw!r} is not a format of raw samples; choose one of {', '.join(RAW_FORMATS)}.")
    if source == MICROPHONE or source.startswith(f"{MICROPHONE}:"):
        check_microphone(source.partition(":")[2] or None)
    elif source == STDIN:
        standard_input()
    elif os.path.isdir(source) or not os.access(source, os.R_OK):
        raise AudioError(f"{source!r} cannot be opened; give the path of a file or pipe that can be read.")


def _answer(session: "LiveSession", question: str, options: "QuestionOptions", show: OutputOptions) -> bool:
    """Answer one question and return whether that worked. Errors are printed; the session continues."""
    if session.error is not None:
        warn(f"nothing more is heard: {session.error}")
    try:
        stream = session.stream(question, options)
        show_answer(stream, next(stream, None), show)
    except AfnextError as error:
        fail(error)
        return False
    return True
