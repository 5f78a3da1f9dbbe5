"""The command line as a user runs it: help, exit codes, messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import CommandLine


def test_the_module_is_the_command(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "afnext", "info", str(folder), "--json"], capture_output=True, timeout=99
    )
    assert (done.returncode, json.loads(done.stdout)["folder"]) == (0, str(folder))


@pytest.mark.parametrize(
    "command",
    [[], ["ask"], ["chat"], ["transcribe"], ["batch"], ["listen"], ["info"], ["plan"], ["bench"]],
)
def test_every_command_explains_itself(run: CommandLine, command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage: afnext" in done.stdout
    assert command in ([], ["bench"]) or "Example" in done.stdout


def test_errors_are_one_sentence_and_exit_code_1(run: CommandLine, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.wav"
    text.write_text("this is no audio\n" * 9)
    for arguments in (
        ("ask", tmp_path / "nowhere.wav", "?", "-m", folder),
        ("ask", text, "?", "-m", folder),
        ("ask", text, "?", "-m", tmp_path / "nomodel"),
        ("info", tmp_path),
        ("ask", text, "?", "-m", folder, "--device", "abacus"),
    ):
        done = run(*arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_wrong_usage_is_exit_code_2(run: CommandLine, folder: Path, clip: Path) -> None:
    assert run("ask", clip).returncode == 2
    assert run("ask", clip, "?", "-m", folder, "--temperature", "hot").returncode == 2
