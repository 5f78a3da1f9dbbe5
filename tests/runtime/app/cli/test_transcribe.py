"""`afnext transcribe`: formats, files, folders, and recordings that fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.audio import speech_like, wav_bytes
from support.command_line import CommandLine

import afnext
from afnext.runtime.errors import AudioError

OPTIONS = ("--dtype", "fp32", "--max-new-tokens", 3)


@pytest.fixture
def talk(tmp_path: Path, seed: int) -> Path:
    """A recording of 5 s."""
    path = tmp_path / "talk.wav"
    path.write_bytes(wav_bytes(speech_like(5.0, seed)))
    return path


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model say a word for each second of the recording."""
    answer = afnext.Model.ask

    def spoken(self: afnext.Model, audio: Any, question: str, **options: Any) -> afnext.Answer:
        text = "\n".join(f"[00:{s:02} - 00:{s + 1:02}] [Speaker 1] word{s}" for s in range(int(audio.duration)))
        done = answer(self, audio, question, **{**options, "max_new_tokens": 1})
        return replace(done, text=text, finish_reason="stop")

    monkeypatch.setattr(afnext.Model, "ask", spoken)


def test_each_format(run: CommandLine, folder: Path, talk: Path, say: None, tmp_path: Path) -> None:
    common = ("transcribe", talk, "-m", folder, *OPTIONS, "-q")
    assert run(*common).stdout == "[Speaker 1] word0 word1 word2 word3 word4\n"
    for option in (("-f", "json"), ("--json",)):
        assert len(json.loads(run(*common, *option).stdout)["segments"]) == 5
    lines = [json.loads(line) for line in run(*common, "-f", "ndjson").stdout.splitlines()]
    assert [line["text"] for line in lines if line["type"] == "segment"] == [f"word{second}" for second in range(5)]
    target = tmp_path / "new" / "talk.vtt"
    done = run(*common, "-f", "vtt", "-o", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert target.read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n<v Speaker 1>word0\n")


def test_several_recordings_go_to_a_folder(run: CommandLine, folder: Path, talk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.wav"
    other.write_bytes(talk.read_bytes())
    options = ("-m", folder, *OPTIONS, "-f", "srt", "-o", tmp_path / "out")
    done = run("transcribe", talk, other, *options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"talk.srt", "other.srt"}
    assert "5.00 s in 1 windows" in done.stderr
    assert "cut at --max-new-tokens" in done.stderr
    twice = run("transcribe", talk, talk, *options)
    assert (twice.returncode, "only once" in twice.stderr) == (1, True)


def test_a_folder_is_transcribed_and_a_bad_file_is_no_end(
    run: CommandLine, folder: Path, talk: Path, say: None, tmp_path: Path
) -> None:
    for name in ("rec/a/talk.wav", "rec/b/talk.wav", "rec/b/bad.mp3"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(talk.read_bytes() if path.suffix == ".wav" else b"no audio")
    out = tmp_path / "out"
    done = run("transcribe", tmp_path / "rec", "-m", folder, *OPTIONS, "-f", "srt", "-o", f"{out}/")
    assert done.returncode == 1
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {"a/talk.srt", "b/talk.srt"}
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "bad.mp3" in error
    assert "1 of 3 recordings" in done.stderr
    printed = run("transcribe", tmp_path / "rec", "-m", folder, *OPTIONS, "--json", "-q")
    described = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [len(transcript["segments"]) for transcript in described] == [5, 5]


def test_a_name_that_is_no_unicode_is_written(run: CommandLine, folder: Path, talk: Path, say: None) -> None:
    name = talk.with_name("talk \udcff.wav")
    talk.rename(name)
    common = ("transcribe", name, "-m", folder, *OPTIONS)
    assert json.loads(run(*common, "--json").stdout)["source"] == str(name)
    done = run(*common, "-f", "json", "-o", f"{name.parent}/out/")
    assert done.returncode == 0, done.stderr
    assert "\\udcff.wav" in done.stderr
    [written] = (name.parent / "out").iterdir()
    assert json.loads(written.read_text(encoding="utf-8"))["source"] == str(name)


def test_standard_input_is_transcribed(run: CommandLine, folder: Path, talk: Path) -> None:
    options = ("-m", folder, *OPTIONS, "-f", "json", "-q")
    piped = json.loads(run("transcribe", "-", *options, stdin=talk.read_bytes()).stdout)
    assert piped["duration"] == 5.0
    assert piped["windows"] == json.loads(run("transcribe", talk, *options).stdout)["windows"]


@pytest.mark.parametrize("error", [AudioError("the end is damaged"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["text", "ndjson", "srt", "vtt", "json"])
def test_what_came_before_an_error_is_kept(
    run: CommandLine,
    folder: Path,
    talk: Path,
    say: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    format: str,
) -> None:
    ask = afnext.Model.ask

    def fail_at_the_third(self: afnext.Model, *arguments: Any, **options: Any) -> afnext.Answer:
        left.pop()
        if not left:
            raise error
        return ask(self, *arguments, **options)

    monkeypatch.setattr(afnext.Model, "ask", fail_at_the_third)
    target = tmp_path / "out" / "talk"
    common = ("transcribe", talk, "-m", folder, *OPTIONS, "-f", format, "-o", target, "--overlap", 0)
    left = [1, 2, 3]
    done = run(*common, "--window", 2)
    assert done.returncode == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert target.exists() == (format != "json")
    if target.exists():
        assert "word1" in target.read_text()
        assert "holds what was transcribed before" in done.stderr
    left = [1]
    target = tmp_path / "none" / "talk"
    run(*common, "-o", target)
    assert not target.exists()


def test_segments_are_written_as_they_come(
    run: CommandLine, folder: Path, talk: Path, say: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask, shown = afnext.Model.ask, []

    def look(self: afnext.Model, *arguments: Any, **options: Any) -> afnext.Answer:
        shown.append("".join(path.read_text() for path in tmp_path.glob("out/.talk*.part")))
        return ask(self, *arguments, **options)

    monkeypatch.setattr(afnext.Model, "ask", look)
    options = ("--window", 1, "--overlap", 0, "-f", "srt", "-o", f"{tmp_path}/out/")
    assert run("transcribe", talk, "-m", folder, *OPTIONS, *options).returncode == 0
    assert [text.count("word0") for text in shown] == sorted(text.count("word0") for text in shown)
    assert ("word0" in shown[0], "word0" in shown[-1]) == (False, True)
    assert (tmp_path / "out" / "talk.srt").read_text().count("word0") == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("talk.wav", "talk.wav", "-f", "vtt"), 2, "--output"),
        (("rec", "-f", "srt"), 2, "--output"),
        (("talk.wav", "-f", "srt", "--json"), 2, "contradict"),
        (("talk.wav", "-o", "talk.wav"), 1, "is a recording"),
        (("nowhere.wav", "bad.wav"), 1, "2 of 2 recordings"),
        (("empty",), 1, "holds no audio"),
    ],
)
def test_what_cannot_be_transcribed_is_refused_before_a_model_is_loaded(
    run: CommandLine,
    no_model: None,
    talk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("bad.wav").write_text("no audio")
    Path("empty").mkdir()
    Path("rec").mkdir()
    Path("rec/talk.wav").write_bytes(talk.read_bytes())
    done = run("transcribe", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
