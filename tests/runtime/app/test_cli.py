"""The command line as a user runs it: output, JSON, exit codes, messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.audio import speech_like, wav_bytes
from support.command_line import CommandLine

import afnext


@pytest.fixture
def clip(tmp_path: Path, seed: int) -> Path:
    """A recording of 1.25 s."""
    path = tmp_path / "clip [1].wav"
    path.write_bytes(wav_bytes(speech_like(1.25, seed)))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs the command line in this process; `test_the_module_is_the_command` shows that a process does the same."""
    return CommandLine(monkeypatch, capsys)


def test_the_module_is_the_command(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "afnext", "info", str(folder), "--json"], capture_output=True, timeout=99
    )
    assert (done.returncode, json.loads(done.stdout)["folder"]) == (0, str(folder))


def test_ask_prints_the_answer_and_where_the_time_went(
    run: CommandLine, folder: Path, model: afnext.Model, clip: Path
) -> None:
    done = run("ask", clip, "What is it?", "-m", folder, "--max-new-tokens", 9, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.ask(clip, "What is it?", max_new_tokens=9).text
    assert "1.25 s of audio in 1 windows" in done.stderr.replace("\n", " ")
    assert "cut at max_new_tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_ask_as_json_is_one_object(run: CommandLine, folder: Path, model: afnext.Model, clip: Path) -> None:
    done = run("ask", clip, "What is it?", "-m", folder, "--max-new-tokens", 9, "--dtype", "float32", "--json")
    answer = json.loads(done.stdout)
    expected = model.ask(clip, "What is it?", max_new_tokens=9)
    assert answer["token_ids"] == expected.token_ids
    assert answer["usage"] == expected.to_dict()["usage"]
    assert answer["timings"].keys() == expected.timings.to_dict().keys()
    assert (answer["finish_reason"], done.stderr) == ("length", "")


def test_ask_reads_audio_from_standard_input(run: CommandLine, folder: Path, clip: Path) -> None:
    options = ("What is it?", "-m", folder, "--max-new-tokens", 9, "--json")
    piped = json.loads(run("ask", "-", *options, stdin=clip.read_bytes()).stdout)
    assert piped["token_ids"] == json.loads(run("ask", clip, *options).stdout)["token_ids"]


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


def test_info_shows_the_shape_and_the_bytes(run: CommandLine, folder: Path) -> None:
    shown = run("info", folder)
    described = json.loads(run("info", folder, "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert f"{described['parameters']:,}" in shown.stdout
    assert sum(described["bytes_by_part"].values()) == described["bytes"] == 2 * described["parameters"]
    assert described["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert described["context_tokens"] == 131_072


def test_info_tells_what_each_operation_runs_on(
    run: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("info", "--backend", "--device", "cpu")
    described = json.loads(run("info", "--backend", "--device", "cpu", "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert {"rms_norm", "attention", "sample", "linear_int4"} <= described["operations"].keys()
    assert all(name in shown.stdout for name in described["operations"])
    if described["native"]:
        assert described["operations"]["rms_norm"] == ["native", "torch"]
        assert described["native"]["isa"] in described["native"]["levels"]
        assert described["native"]["compiler"] in shown.stdout
    monkeypatch.setenv("AFNEXT_BACKEND", "torch")
    forced = json.loads(run("info", "--backend", "--device", "cpu", "--json").stdout)
    assert forced["operations"]["rms_norm"] == ["torch"]
    if described["native"]:
        monkeypatch.setenv("AFNEXT_ISA", "mmx")
        assert "AFNEXT_ISA=mmx" in run("info", "--backend").stderr.replace("\n", " ")
    assert [run("info").returncode, run("info", folder, "--backend").returncode] == [2, 2]


@pytest.mark.parametrize("command", [[], ["ask"], ["chat"], ["transcribe"], ["listen"], ["info"], ["plan"], ["bench"]])
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
