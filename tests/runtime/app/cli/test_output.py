"""Standard output and standard error: on pipes, terminals, full disks, and in encodings that lack characters."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from afnext.kernels.errors import AfnextError
from afnext.runtime.app.cli import output

TEXT = "\t“Grüße” 你好 🎵 :dog: [bold]x[/bold]\r\n\x1b]0;renamed\x07\x9b2J" + "long " * 60

# A command without a model: it answers with its argument, in pieces, thinking before it speaks.
SCRIPT = """
import sys
from types import SimpleNamespace
import typer
from afnext.runtime.app.cli import run
from afnext.runtime.app.cli.options import OutputOptions, grouped
from afnext.runtime.app.cli.output import show_answer, write_json

class Piece(str):
    thinking = False

class Thought(str):
    thinking = True

def answer(text: str, show: OutputOptions):
    usage = SimpleNamespace(**{name: 0 for name in "audio_seconds windows audio_tokens text_tokens new_tokens".split()})
    timings = SimpleNamespace(
        **{name: 0 for name in "load_audio log_mel encode prefill first_token total tokens_per_second".split()}
    )
    answer = SimpleNamespace(
        warnings=[text],
        finish_reason="stop",
        repetition=None,
        to_dict=lambda: {"text": text},
        usage=usage,
        timings=timings,
    )
    stream = iter([Thought("I \\x1b[2J think"), *(Piece(text[start : start + 3]) for start in range(0, len(text), 3))])

    class Stream:
        answer = None
        def __iter__(self): return self
        def __next__(self):
            try: return next(stream)
            except StopIteration:
                Stream.answer = answer
                raise
    source = Stream()
    show_answer(source, next(source), show)

app = typer.Typer()
app.command()(grouped(answer))
run(app)
"""


def answer(text: str, *options: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[bytes]:
    """What a process prints that answers with `text`."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, text, *options],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        timeout=99,
    )


def test_on_a_pipe_the_answer_is_what_it_is() -> None:
    done = answer(TEXT, "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout == TEXT.encode() + b"\n"
    loud = answer(TEXT, "-q", FORCE_COLOR="1", COLUMNS="20")
    assert loud.stdout == done.stdout


def test_thinking_goes_to_standard_error_of_a_pipe() -> None:
    done = answer("x")
    assert done.stdout == b"x\n"
    assert done.stderr.startswith(b"I \\x1b[2J think\n")
    assert b"think" not in answer("x", "-q").stderr


def test_messages_are_one_line_and_obey_nothing() -> None:
    text = "a\nb :dog: [1] [/red] \x1b[2J\t" + "long " * 60
    done = answer(text, "-q", COLUMNS="20")
    warning = "warning: a\\nb :dog: [1] [/red] \\x1b[2J\\t" + "long " * 60
    assert done.stderr.decode().splitlines() == [warning]


def test_a_terminal_shows_control_characters() -> None:
    ours, theirs = pty.openpty()
    done = answer(TEXT, "-q", stdout=theirs, TERM="xterm")
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert done.returncode == 0, done.stderr
    thought, _, said = shown.decode().partition("\r\n\r\n")
    assert "I \\x1b[2J think" in thought
    plain = said.removeprefix("\x1b[22m").replace("\r\n", "\n")
    assert (
        plain
        == TEXT.replace("\r", "\\r").replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\x9b", "\\x9b") + "\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_characters_that_the_encoding_lacks_are_escaped_with_one_warning(encoding: str) -> None:
    done = answer("“Grüße” 你好 🎵, ça 🎵", "-q", PYTHONIOENCODING=f"{encoding}:strict")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == "“Grüße” 你好 🎵, ça 🎵\n".encode(encoding, "backslashreplace").decode(
        encoding
    )
    warnings = [line for line in done.stderr.decode(encoding).splitlines() if "backslash" in line]
    assert len(warnings) == 1
    assert encoding in warnings[0]
    printed = answer("“Grüße” 你好 🎵", "--json", PYTHONIOENCODING=f"{encoding}:strict")
    assert (printed.returncode, printed.stderr) == (0, b"")
    assert json.loads(printed.stdout.decode(encoding)) == {"text": "“Grüße” 你好 🎵"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("x",), ("x", "--json"), ("--help",)])
def test_a_full_disk_is_one_sentence(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = answer(*arguments, stdout=full.fileno())
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("error:")]
    assert done.returncode == 1
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [("x", "-q"), ("x", "--json"), ("--help",)])
def test_a_pipe_that_nobody_reads_ends_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = answer(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


def test_standard_output_may_be_closed() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" x -q >&-', sys.executable, SCRIPT], stderr=subprocess.PIPE, timeout=99
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard output is closed")


def test_a_standard_error_that_is_full_or_closed_loses_no_answer() -> None:
    for redirection in ("2>/dev/full", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -c "$1" x {redirection}', sys.executable, SCRIPT], stdout=subprocess.PIPE, timeout=99
        )
        assert done.stdout == b"x\n", redirection


def write_to(path: Path, data: bytes, *, fail: bool = False) -> None:
    with output.open_output(path) as file:
        assert file is not None
        file.write(data)
        if fail:
            raise ZeroDivisionError


def test_an_output_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "answer.txt"
    write_to(target, b"whole")
    assert target.read_bytes() == b"whole"
    with pytest.raises(ZeroDivisionError):
        write_to(target, b"half", fail=True)
    assert target.read_bytes() == b"whole"
    assert [path.name for path in target.parent.iterdir()] == ["answer.txt"]
    link = tmp_path / "link"
    link.symlink_to(target)
    write_to(link, b"through the link")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"through the link")
    with output.open_output(Path("-")) as nothing:
        assert nothing is None


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-", "/dev/stderr", "/dev/fd/2"])
def test_what_a_descriptor_is_redirected_to_is_not_replaced(tmp_path: Path, name: str) -> None:
    code = (
        "from pathlib import Path; from afnext.runtime.app.cli import output\n"
        f"with output.open_output(Path({name!r})) as file:\n"
        "    output.write('written') if file is None else file.write(b'written')\n"
    )
    redirected = tmp_path / "all.txt"
    redirected.write_bytes(b"before ")
    with redirected.open("ab") as file:
        done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file, timeout=99)
        file.write(b" after")
    assert (done.returncode, redirected.read_bytes()) == (0, b"before written after")


def test_pipes_and_devices_are_written_directly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    write_to(Path(f"/dev/fd/{writer}"), b"piped")
    assert os.read(reader, 99) == b"piped"
    os.close(reader)
    os.close(writer)
    if Path("/dev/full").exists():
        with pytest.raises(AfnextError, match="No space left"):
            write_to(Path("/dev/full"), b"x")
    write_to(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(AfnextError, match="folder"), output.open_output(tmp_path):
        pass
