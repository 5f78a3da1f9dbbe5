"""`afnext listen`: audio from pipes, questions from the command line, a pipe, and a real terminal."""

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.audio import speech_like
from support.command_line import CommandLine

import afnext

OPTIONS = ("--dtype", "float32", "--max-new-tokens", 5)
RAW = ("--raw", "s16le", "--rate", 16_000)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def samples(seed: int) -> np.ndarray:
    """31 s of audio, more than a window."""
    return (speech_like(31.0, seed) * 2**14).astype("<i2")


def test_questions_at_the_end_of_a_pipe(
    run: CommandLine, folder: Path, model: afnext.Model, samples: np.ndarray
) -> None:
    arguments = ("listen", "-", *RAW, "-m", folder, *OPTIONS, "--ask", "What?", "--ask", "And then?", "--json")
    done = run(*arguments, stdin=samples.tobytes())
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    audio = (samples, 16_000)
    expected = [model.ask(audio, question, max_new_tokens=5).token_ids for question in ("What?", "And then?")]
    assert [answer["token_ids"] for answer in answers] == expected
    assert answers[0]["usage"]["audio_seconds"] == 31.0


def test_a_file_is_heard_and_questions_come_from_standard_input(
    run: CommandLine, folder: Path, samples: np.ndarray, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.flac"
    soundfile.write(clip, samples[:16_000], 16_000)
    done = run("listen", clip, "-m", folder, *OPTIONS, "--ask", "What?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "1.00 s of audio" in " ".join(done.stderr.split())
    silent = run("listen", clip, "-m", folder, *OPTIONS, stdin=b"\n")
    assert (silent.returncode, silent.stdout) == (0, "")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.wav", (), "nowhere.wav"),
        ("-", (), "within a frame"),
        ("-", ("--raw", "mp3"), "s16le"),
    ],
)
def test_what_cannot_be_heard_is_explained(
    run: CommandLine, folder: Path, source: str, options: tuple[object, ...], message: str
) -> None:
    raw = RAW if source == "-" else ()
    done = run("listen", source, *raw, *options, "-m", folder, *OPTIONS, "--ask", "What?", stdin=b"\0" * 7)
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_nothing_heard_is_no_end(run: CommandLine, folder: Path) -> None:
    done = run("listen", "-", *RAW, "-m", folder, *OPTIONS, "--ask", "What?", stdin=b"")
    assert done.returncode == 1
    assert "nothing has been heard yet" in " ".join(done.stderr.split())


class Terminal:
    """A command on a pseudo terminal that is its controlling one, with its audio on another pipe."""

    def __init__(self, *arguments: object):
        self.screen = b""
        self._ours, theirs = pty.openpty()

        def take_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        self._process = subprocess.Popen(
            [sys.executable, "-m", "afnext", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_the_terminal,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)
        assert self._process.stdin is not None
        self.audio = self._process.stdin

    def type(self, line: str) -> None:
        os.write(self._ours, line.encode() + b"\n")

    def wait_for(self, text: str, seconds: float = 200) -> str:
        """Read on until the command has shown `text`; return what came before it."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.screen:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.screen!r}"
            try:
                self.screen += os.read(self._ours, 65536)
            except OSError:
                raise AssertionError(f"the command ended without {text!r}: {self.screen!r}") from None
        before, _, self.screen = self.screen.partition(text.encode())
        return before.decode(errors="replace")

    def ask_until(self, heard: str) -> None:
        """Ask again and again until the answer is about `heard` seconds: feeding takes its time."""
        for _ in range(100):
            self.type("What so far?")
            said = self.wait_for("> ")
            if f"{heard} s of audio" in said:
                return
            time.sleep(0.2)
        raise AssertionError(f"never were {heard} s heard; last: {said!r}")

    def end(self) -> int:
        try:
            while os.read(self._ours, 65536):
                pass
        except OSError:
            pass
        self.audio.close()
        code = self._process.wait(60)
        os.close(self._ours)
        return code


@pytest.mark.skipif(not hasattr(termios, "TIOCSCTTY"), reason="this system has no controlling terminals")
def test_questions_typed_while_the_audio_goes_on(folder: Path, samples: np.ndarray) -> None:
    terminal = Terminal("listen", "-", *RAW, "-m", folder, *OPTIONS)
    terminal.wait_for("> ")
    terminal.audio.write(samples[:32_000].tobytes())
    terminal.audio.flush()
    terminal.ask_until("2.00")
    terminal.audio.write(samples[32_000:].tobytes())
    terminal.audio.close()
    terminal.ask_until("31.00")
    terminal.type("")
    assert terminal.end() == 0
