"""What the tests of the command line share."""

from pathlib import Path

import pytest
from support.audio import speech_like, wav_bytes
from support.command_line import CommandLine


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs the command line in this process; `test_the_module_is_the_command` shows that a process does the same."""
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def clip(tmp_path: Path, seed: int) -> Path:
    """A recording of 1.25 s, whose name looks like markup."""
    path = tmp_path / "clip [1] :dog:.wav"
    path.write_bytes(wav_bytes(speech_like(1.25, seed)))
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model fail the test."""

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("afnext.runtime.app.api.load", load)
