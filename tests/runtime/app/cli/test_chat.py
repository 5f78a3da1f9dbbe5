"""`afnext chat`: a conversation from a pipe, and on a real terminal."""

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

import pytest
from support.command_line import CommandLine

import afnext


def test_chat_goes_on_with_what_was_said(run: CommandLine, folder: Path, model: afnext.Model, clip: Path) -> None:
    options = ("-m", folder, "--max-new-tokens", 6, "--dtype", "float32", "--json")
    done = run("chat", clip, *options, stdin=b"What is it?\nAnd then?\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    first = [
        {"role": "user", "content": [{"type": "audio", "audio": str(clip)}, {"type": "text", "text": "What is it?"}]}
    ]
    said = model.chat([first], max_new_tokens=6)[0]
    second = [*first, {"role": "assistant", "content": said.text}, {"role": "user", "content": "And then?"}]
    expected = [said.token_ids, model.chat([second], max_new_tokens=6)[0].token_ids]
    assert [answer["token_ids"] for answer in answers] == expected


def test_commands_from_a_pipe(run: CommandLine, folder: Path, clip: Path, tmp_path: Path) -> None:
    options = ("-m", folder, "--max-new-tokens", 4, "--dtype", "fp32")
    texts, messages = tmp_path / "said.txt", tmp_path / "said.json"
    typed = f"/help\n/audio {clip}\n/nosuch\n/audio\nWhat?\n/save {texts}\n/save {messages}\n/exit\nnever asked\n"
    done = run("chat", *options, stdin=typed.encode())
    assert done.returncode == 0, done.stderr
    assert "1.25 s of audio" in done.stderr
    assert "there is no /nosuch" in done.stderr
    assert "/audio needs a FILE" in done.stderr
    answer = done.stdout.removesuffix("\n")
    asked = f"[{clip}]\nWhat?"
    assert texts.read_text(encoding="utf-8") == f"user: {asked}\n\nassistant: {answer}\n"
    assert json.loads(messages.read_text(encoding="utf-8")) == [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]


def test_the_first_error_ends_a_conversation_from_a_pipe(run: CommandLine, folder: Path) -> None:
    done = run("chat", "-m", folder, "-q", stdin=b"/audio nowhere.wav\nWhat?\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere.wav" in done.stderr


def test_audio_is_checked_before_a_model_is_loaded(run: CommandLine, no_model: None) -> None:
    done = run("chat", "nowhere.wav", stdin=b"What?\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere.wav" in done.stderr


@pytest.mark.skipif(not hasattr(termios, "TIOCSCTTY"), reason="this system has no controlling terminals")
def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    ours, theirs = pty.openpty()

    def take_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "afnext", "chat", "-m", str(folder), "--max-new-tokens", "99999"]
    env = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_the_terminal, env=env
    )
    os.close(theirs)
    screen = b""

    def wait_for(text: bytes, seconds: float = 100) -> None:
        nonlocal screen
        deadline = time.monotonic() + seconds
        while text not in screen:
            ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {screen[-2000:]!r}"
            screen += os.read(ours, 65536)
        screen = screen.partition(text)[2]

    def press_ctrl_c_until(text: bytes) -> None:
        # CPython's readline looks at a signal only if it comes while select() waits. One that comes while the key
        # before it is echoed is seen at the next one.
        for _ in range(10):
            os.write(ours, b"\x03")
            try:
                return wait_for(text, seconds=10)
            except AssertionError:
                continue
        raise AssertionError(f"{text!r} did not come after ten times Ctrl-C")

    try:
        wait_for(b"> ")
        os.write(ours, b"What?\n")
        wait_for(b"What?\r\n")
        while len(screen) < 20:  # the answer has begun
            screen += os.read(ours, 65536)
        os.write(ours, b"\x03")
        wait_for(b"stopped")
        wait_for(b"> ")
        os.write(ours, b"half a line")
        wait_for(b"half a line")
        press_ctrl_c_until(b"Ctrl-C again")
        os.write(ours, b"/exit\n")
        while True:
            try:
                screen += os.read(ours, 65536)
            except OSError:
                break
        assert process.wait(60) == 0
        assert b"Traceback" not in screen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
