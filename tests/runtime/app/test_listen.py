"""`afnext listen`: audio from pipes, questions from the command line, a pipe, and a real terminal."""

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.audio import speech_like
from support.command_line import CommandLine
from support.mp3 import with_cover

import afnext
from afnext.runtime.app.live_session import LiveSession, Source

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
        ("-", (), "within a frame of 2 bytes: the last 1 bytes are dropped"),
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


def test_a_surplus_byte_is_a_warning(run: CommandLine, folder: Path, samples: np.ndarray) -> None:
    data = samples[: 13 * 16_000].tobytes() + b"x"
    done = run("listen", "-", *RAW, "-m", folder, *OPTIONS, "--ask", "What?", "--json", stdin=data)
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["usage"]["audio_seconds"] == 13.0
    assert "<stdin>: the audio ends within a frame of 2 bytes" in answer["warnings"][0]


def test_a_cover_before_the_audio(run: CommandLine, folder: Path, samples: np.ndarray) -> None:
    file = io.BytesIO()
    soundfile.write(file, samples[:32_000], 16_000, format="MP3")
    pipe = with_cover(file.getvalue(), 2 << 20)
    done = run("listen", "-", "-m", folder, *OPTIONS, "--ask", "What?", "--json", stdin=pipe)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["usage"]["audio_seconds"] == pytest.approx(2, abs=0.1)


def test_warnings_are_those_of_ask(run: CommandLine, folder: Path, samples: np.ndarray, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp3"
    soundfile.write(clip, samples[: 8 * 16_000], 16_000)
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    clip.write_bytes(data)
    asked = json.loads(run("ask", clip, "What?", "-m", folder, *OPTIONS, "--json").stdout)
    heard = json.loads(run("listen", clip, "--ask", "What?", "-m", folder, *OPTIONS, "--json").stdout)
    assert asked["warnings"]
    assert heard["warnings"] == asked["warnings"]
    assert heard["token_ids"] == asked["token_ids"]
    told = run("listen", clip, "--ask", "What?", "-m", folder, *OPTIONS).stderr
    assert asked["warnings"][0].split(": ")[1] in " ".join(told.split())


class FellError(BaseException):
    """What libraries raise past `except Exception`."""


@pytest.mark.parametrize(
    ("error", "asked"),
    [(ZeroDivisionError("one"), True), (MemoryError("two"), False), (FellError("three"), False), (SystemExit(0), True)],
)
def test_an_exception_of_the_feeding_thread_ends_the_command(
    run: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, asked: bool, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise error

    def questions(*_: object) -> Iterator[str]:
        for thread in threading.enumerate():
            if thread.name == "afnext-listen":
                thread.join()
        yield "What?"

    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(16_000), 16_000)
    monkeypatch.setattr(afnext.Live, "feed", broken)
    monkeypatch.setattr("afnext.runtime.app.live_session.typed_questions", questions)
    done = run("listen", clip, "-m", folder, *OPTIONS, *(("--ask", "What?") if asked else ()))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"listening failed with an internal error ({type(error).__name__}: {error})" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_question_that_fails_is_in_the_exit_code(run: CommandLine, folder: Path, samples: np.ndarray) -> None:
    arguments = ("listen", "-", *RAW, "-m", folder, "--max-new-tokens", 10**6, "--ask", "What?")
    done = run(*arguments, stdin=samples.tobytes())
    assert (done.returncode, done.stdout) == (1, "")
    assert "context ends at" in " ".join(done.stderr.split())


def test_a_question_that_comes_while_the_end_is_processed(
    folder: Path, samples: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the live recording, finds that ended, and is answered by the context."""
    finish = afnext.Live.finish
    finished = threading.Event()

    def slow_finish(self: afnext.Live) -> afnext.Context:
        context = finish(self)
        finished.set()
        time.sleep(0.5)
        return context

    monkeypatch.setattr(afnext.Live, "finish", slow_finish)
    model = afnext.load(folder, dtype="float32")
    pieces = Source("test", lambda stopped, warn: iter([(samples, 16_000)]))
    session = LiveSession(model.listen(), pieces)
    session.start()
    assert finished.wait(100)
    stream = session.stream("What?", {"max_new_tokens": 5})
    assert "".join(stream)
    assert stream.answer is not None
    assert stream.answer.token_ids == model.ask((samples, 16_000), "What?", max_new_tokens=5).token_ids


def test_questions_in_another_encoding_are_an_error(
    run: CommandLine, folder: Path, samples: np.ndarray, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.flac"
    soundfile.write(clip, samples[:16_000], 16_000)
    done = run("listen", clip, "-m", folder, *OPTIONS, stdin=b"Caf\xe9?\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not utf-8 text" in " ".join(done.stderr.split())


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
