"""`afnext chat`: one question after another about recordings, or about none."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....kernels.errors import AfnextError
from ...errors import PromptError
from .options import (
    FromOption,
    LoadOptions,
    OutputOptions,
    SamplingOptions,
    SystemOption,
    TaskOption,
    ToOption,
    TruncateOption,
    grouped,
)
from .output import announce, fail, log_to_stderr, note, open_output, progress, show_answer, write
from .sources import open_sources

if TYPE_CHECKING:
    from ..api import Model
    from ..responder import AnswerOptions

HELP = (
    "/audio FILE  add a recording to the next question",
    "/think       show the model's thinking, or hide it",
    "/save FILE   save the conversation as text, or as messages if FILE ends in .json",
    "/help        show this",
    "/exit        exit, like an empty line and Ctrl-D",
    "Ctrl-C       stop the answer",
)


@grouped
def chat(
    loading: LoadOptions,
    sampling: SamplingOptions,
    show: OutputOptions,
    audio: Annotated[list[str] | None, typer.Argument(help="Recordings to talk about; none for text only.")] = None,
    task: TaskOption = None,
    to: ToOption = None,
    source: FromOption = None,
    system: SystemOption = None,
    truncate: TruncateOption = False,
) -> None:
    """Ask one question after another.

    /help lists the commands; an empty line or the end of input exits. Ctrl-C stops an answer.
    """
    log_to_stderr(show.verbose)
    with progress(show.silent) as report:
        sources = open_sources(audio or [], truncate=truncate)
        announce(loading.model, show.silent)
        model = loading.load(report)
    options = sampling.given()
    options["truncate"] = truncate
    conversation = _Chat(model, options, show)
    if system is not None:
        conversation.messages.append({"role": "system", "content": system})
    for recording in sources:
        conversation.add_audio(recording)
    if task is not None:
        conversation.ask(model.prompts.get(task, to=to, source=source))
    conversation.run()


@dataclass
class _Chat:
    """A conversation on the terminal, or with questions from a pipe; with a pipe, the first error ends it."""

    model: "Model"
    options: "AnswerOptions"
    show: OutputOptions
    messages: list[dict[str, Any]] = field(default_factory=list)
    new_audio: list[dict[str, Any]] = field(default_factory=list)  # goes with the next question
    thoughts: bool = True

    def run(self) -> None:
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive and not self.show.silent:
            note("/help lists the commands; an empty line leaves.")
        for line in _lines(interactive):
            try:
                if not line.startswith("/"):
                    self.ask(line)
                elif not self._obey(*line.split(maxsplit=1)):
                    return
            except AfnextError as error:
                if not interactive:
                    raise
                fail(error)

    def add_audio(self, source: Any) -> None:
        """Add a recording to the next question. Raises AudioError if it cannot be read."""
        from ...io.audio import load_audio

        limit = self.model.network.config.max_audio_seconds
        recording = load_audio(source, max_seconds=limit, truncate=self.options.get("truncate", False))
        self.new_audio.append({"type": "audio", "audio": recording})

    def ask(self, question: str) -> None:
        """Answer a question, and add it to the conversation unless it raises."""
        asked = {"role": "user", "content": [*self.new_audio, {"type": "text", "text": question}]}
        with _interruptible() as stopped:
            with progress(self.show.silent) as report:
                options: AnswerOptions = {**self.options, "progress": report, "cancelled": lambda: bool(stopped)}
                stream = self.model.stream_chat([*self.messages, asked], **options)
                first = next(stream, None)
            answer = show_answer(stream, first, self.show, thoughts=self.thoughts)
        if answer.finish_reason == "cancelled" and not self.show.silent:
            note("stopped")
        self.new_audio = []
        self.messages += [asked, {"role": "assistant", "content": answer.text}]

    def _obey(self, command: str, argument: str = "") -> bool:
        """Run a command; return whether the conversation continues."""
        argument = argument.strip()
        if command in ("/exit", "/quit"):
            return False
        if command == "/help":
            for line in HELP:
                note(line)
        elif command == "/think":
            self.thoughts = not self.thoughts
            note("thinking is shown" if self.thoughts else "thinking is not shown")
        elif command == "/audio" and argument:
            for source in open_sources([str(Path(argument).expanduser())]):
                self.add_audio(source)
            note("the next question is about it")
        elif command == "/save" and argument:
            self._save(Path(argument).expanduser())
        else:
            note(f"{command} needs a FILE" if command in ("/audio", "/save") else f"there is no {command}; see /help")
        return True

    def _save(self, path: Path) -> None:
        spoken = [(message["role"], _text(message["content"])) for message in self.messages]
        if path.suffix == ".json":
            written = json.dumps(
                [{"role": role, "content": text} for role, text in spoken], ensure_ascii=False, indent=2
            )
        else:
            written = "\n\n".join(f"{role}: {text}" for role, text in spoken)
        with open_output(path) as file:
            if file is None:
                write(f"{written}\n")
            else:
                file.write(f"{written}\n".encode("utf-8", "backslashreplace"))
        note(f"saved to {path}")


def _text(content: Any) -> str:
    """The text of a message, with its recordings by name."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else f"[{part['audio'].source}]" for part in content)


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Ctrl-C fills the list instead of raising; pressed again, it raises KeyboardInterrupt."""
    pressed: list[bool] = []

    def stop(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(interactive: bool) -> Iterator[str]:
    """Lines up to an empty one or the end of input. Ctrl-C drops the line; twice in a row it leaves."""
    if sys.stdin is None:
        return
    if interactive:
        with suppress(ImportError):  # gives `input` line editing and history
            import readline  # noqa: F401
    interrupted = False
    while True:
        try:
            line = _read_line(interactive)
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted or not interactive:
                raise
            interrupted = True
            note("")
            note("Ctrl-C again, or an empty line, leaves")
            continue
        interrupted = False
        if not line:
            return
        yield line


def _read_line(interactive: bool) -> str:
    """A line without the spaces around it, prompted for on the terminal. Raises EOFError at the end of input."""
    on_screen = interactive and sys.stdout is not None and sys.stdout.isatty()
    if interactive and not on_screen:
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        return input("> " if on_screen else "").strip()
    except UnicodeDecodeError as problem:
        raise PromptError(f"the question is not valid {problem.encoding}; type or send it in that encoding.") from None
