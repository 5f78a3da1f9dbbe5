"""`afnext ask`: answers, tasks, files, and what is checked before a model is loaded."""

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine

import afnext
from afnext import prompts

TINY = ("--dtype", "fp32", "--max-new-tokens", 9)


def test_ask_prints_the_answer_and_where_the_time_went(
    run: CommandLine, folder: Path, model: afnext.Model, clip: Path
) -> None:
    done = run("ask", clip, "What is it?", "-m", folder, "--max-new-tokens", 9, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.ask(clip, "What is it?", max_new_tokens=9).text
    assert "1.25 s of audio in 1 windows" in done.stderr.replace("\n", " ")
    assert "cut at --max-new-tokens" in done.stderr
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


def test_an_answer_goes_to_a_file(
    run: CommandLine, folder: Path, model: afnext.Model, clip: Path, tmp_path: Path
) -> None:
    target = tmp_path / "answer.txt"
    done = run("ask", clip, "What is it?", "-m", folder, *TINY, "-q", "-o", target)
    expected = model.ask(clip, "What is it?", max_new_tokens=9)
    assert (done.returncode, done.stdout) == (0, "")
    assert target.read_text(encoding="utf-8") == f"{expected.text}\n"
    done = run("ask", clip, "What is it?", "-m", folder, *TINY, "--json", "-o", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text(encoding="utf-8"))["token_ids"] == expected.token_ids


def test_a_task_asks_with_its_prompt(run: CommandLine, folder: Path, model: afnext.Model, clip: Path) -> None:
    done = run("ask", clip, "--task", "ast", "--to", "German", "-m", folder, *TINY, "--json")
    question = prompts.get("ast", to="German")
    assert json.loads(done.stdout)["token_ids"] == model.ask(clip, question, max_new_tokens=9).token_ids
    assert run("ask", clip, "--task", "ast", "-m", folder).returncode == 1
    assert "language to translate into" in run("ask", clip, "--task", "ast", "-m", folder).stderr


def test_sampling_options_reach_the_sampler(run: CommandLine, folder: Path, model: afnext.Model, clip: Path) -> None:
    sampling = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 7}
    options = [value for name, each in sampling.items() for value in (f"--{name.replace('_', '-')}", each)]
    common = ("-m", folder, *TINY, "--threads", 2, "--draft-tokens", 0, "--memory", "4GB", "--encode-batch", 1)
    done = run("ask", clip, "What?", *common, *options, "--json")
    expected = model.ask(clip, "What?", max_new_tokens=9, **sampling)
    assert json.loads(done.stdout)["token_ids"] == expected.token_ids
    stop = expected.text[2:4]
    done = run("ask", clip, "What?", *common, *options, "--stop", stop, "--stop", "never", "--json")
    assert json.loads(done.stdout)["text"] == expected.text.partition(stop)[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.wav", "?"), 1, "nowhere.wav"),
        (("notes.wav", "?"), 1, "notes.wav"),
        (("", "?"), 1, "empty"),
        ((".", "?"), 1, ". is a folder"),
        (("-", "?"), 1, "standard input is empty"),
        (("-", "?", "--also", "-"), 1, "only once"),
        (("good.wav", "?", "--also", "notes.wav"), 1, "notes.wav"),
        (("good.wav", "?", "-o", "missing.wav/answer.txt"), 1, "missing.wav"),
        (("good.wav", ""), 2, "the question is empty"),
        (("good.wav", " \n"), 2, "the question is empty"),
        (("good.wav",), 2, "give either a question or --task"),
        (("good.wav", "?", "--task", "asr"), 2, "give either a question or --task"),
        (("good.wav", "?", "--dtype", "int8"), 2, "bfloat16 (bf16)"),
        (("good.wav", "?", "--quant", "bf16"), 2, "give it with --dtype"),
        (("good.wav", "?", "--memory", "8"), 2, "write 8GB"),
        (("good.wav", "?\udcff"), 2, "UTF-8"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    run: CommandLine,
    no_model: None,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    clip.rename("good.wav")
    Path("notes.wav").write_text("no audio")
    Path("missing.wav").write_text("a file, not a folder")
    done = run("ask", *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert ("Traceback" in done.stderr, done.stdout) == (False, "")


def test_a_name_that_is_no_unicode_is_written_and_heard(run: CommandLine, folder: Path, clip: Path) -> None:
    name = clip.with_name("clip \udcff.wav")
    clip.rename(name)
    done = run("ask", name, "What?", "-m", folder, *TINY, "--also", name)
    assert done.returncode == 0, done.stderr


def test_a_backend_that_cannot_run_here_is_explained(
    run: CommandLine, folder: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFNEXT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run("ask", clip, "What?", "-m", folder, *TINY, "--device", "cpu", "-q")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "unset AFNEXT_BACKEND" in done.stderr
