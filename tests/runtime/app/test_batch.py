"""Batches: ids, rows on disk, and runs that go on where an earlier one ended."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import speech_like, wav_bytes

import afnext
from afnext.runtime.app.batch import (
    Item,
    Question,
    Transcription,
    item_id,
    local_runner,
    pending,
    plan_files,
    run_batch,
)
from afnext.runtime.app.batch_requests import plan_requests
from afnext.runtime.app.batch_rows import Row, open_rows
from afnext.runtime.app.responder import AnswerOptions
from afnext.runtime.errors import EngineDeadError, OutputError, RequestError

MODEL = {"name": "random"}
SHORT: AnswerOptions = {"max_new_tokens": 4}
ASK = Question("What do you hear?", options=SHORT)


def row(identifier: str, status: str = "ok", **fields: Any) -> Row:
    return {"id": identifier, "path": f"{identifier}.wav", "status": status, **fields}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file or folder, whichever it is; nested values of a folder's are read from their JSON."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(path).to_pylist()
    nested = ("result", "response", "error", "usage", "timings")
    return [
        {name: json.loads(value) if name in nested else value for name, value in each.items() if value is not None}
        for each in rows
    ]


def ran(model: afnext.Model, items: list[Item], out: Path, *, retry: bool = False, jobs: int = 3) -> dict[str, Any]:
    """What `run_batch` says of the items that are left."""
    with open_rows(out) as rows:
        return vars(run_batch(local_runner(model, jobs), pending(items, rows, retry=retry), rows))


@pytest.fixture
def recordings(tmp_path: Path, seed: int) -> list[str]:
    """Four recordings of different lengths."""
    paths = [tmp_path / f"{index}.wav" for index in range(4)]
    for index, path in enumerate(paths):
        path.write_bytes(wav_bytes(speech_like(0.5 + 0.7 * index, seed + index)))
    return [str(path) for path in paths]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where rows go."""
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_answers_equal_those_of_ask(model: afnext.Model, recordings: list[str], tmp_path: Path, suffix: str) -> None:
    bad = tmp_path / "bad.mp3"
    bad.write_text("no audio")
    paths = [recordings[0], str(bad), *recordings[1:], str(tmp_path / "missing.wav")]
    items = plan_files(paths, ASK, MODEL)
    out = tmp_path / f"out{suffix}"
    summary = ran(model, items, out)
    assert (summary["items"], summary["done"], summary["failed"]) == (6, 4, 2)
    rows = {each["path"]: each for each in rows_in(out)}
    assert [rows[path]["id"] for path in paths] == [item.id for item in items]
    for path in recordings:
        answer = model.ask(path, "What do you hear?", **SHORT)
        done = rows[path]
        assert done["status"] == "ok"
        assert done["result"]["text"] == answer.text
        assert done["result"]["finish_reason"] == answer.finish_reason
        assert done["usage"]["audio_tokens"] == answer.usage.audio_tokens
        assert done["usage"]["new_tokens"] == 4
        assert done["timings"]["total"] > 0
    for path in (str(bad), str(tmp_path / "missing.wav")):
        assert rows[path]["status"] == "failed"
        assert rows[path]["error"]["code"] == "AudioError"
        assert path in rows[path]["error"]["message"]
    if suffix == ".parquet":
        assert rows[recordings[0]]["text"] == rows[recordings[0]]["result"]["text"]


def test_transcripts_equal_those_of_transcribe(model: afnext.Model, recordings: list[str], out: Path) -> None:
    work = Transcription(window=1.0, overlap=0.25, options=SHORT)
    assert ran(model, plan_files(recordings, work, MODEL), out)["done"] == 4
    for done in rows_in(out):
        alone = model.transcribe(done["path"], window=1.0, overlap=0.25, **SHORT)
        expected = json.loads(json.dumps({"text": alone.text, **alone.to_dict()}))
        for window in expected["windows"]:
            del window["usage"]
        assert done["result"] == expected
        assert done["usage"]["audio_seconds"] == alone.usage.audio_seconds


def test_done_items_are_left_out_and_changed_ones_are_not(
    model: afnext.Model, recordings: list[str], out: Path
) -> None:
    ran(model, plan_files(recordings[:2], ASK, MODEL), out)
    before = out.read_bytes()
    assert ran(model, plan_files(recordings, ASK, MODEL), out)["done"] == 2
    assert out.read_bytes().startswith(before)
    assert ran(model, plan_files(recordings, ASK, MODEL), out)["items"] == 0
    os.utime(recordings[1], ns=(1, 1))
    assert ran(model, plan_files(recordings, ASK, MODEL), out)["done"] == 1
    assert [each["path"] for each in rows_in(out)].count(recordings[1]) == 2
    other = Question("Who speaks?", options=SHORT)
    assert ran(model, plan_files(recordings[:1], other, MODEL), out)["done"] == 1
    assert ran(model, plan_files(recordings[:1], ASK, {"name": "other"}), out)["done"] == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_failures_stay_until_they_are_retried(
    model: afnext.Model, recordings: list[str], tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{suffix}"
    items = plan_files(recordings, ASK, MODEL)
    prepare = afnext.Model.prepare_chat

    def broken(self: afnext.Model, messages: Any, *rest: Any) -> Any:
        if messages[0]["content"][0]["audio"] == recordings[1]:
            raise RuntimeError("the disk is away")
        return prepare(self, messages, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(afnext.Model, "prepare_chat", broken)
        assert ran(model, items, out)["failed"] == 1
    [failed] = [each for each in rows_in(out) if each["status"] == "failed"]
    assert failed["error"] == {"code": "RuntimeError", "message": "the disk is away"}
    assert ran(model, items, out)["items"] == 0
    assert ran(model, items, out, retry=True)["done"] == 1
    assert sorted(each["path"] for each in rows_in(out)) == sorted(recordings)
    assert {each["status"] for each in rows_in(out)} == {"ok"}


def test_what_nothing_can_go_on_after_ends_a_run(
    model: afnext.Model, recordings: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*arguments: Any) -> None:
        raise EngineDeadError("the engine is dead")

    monkeypatch.setattr(afnext.Model, "prepare_chat", dead)
    with pytest.raises(EngineDeadError):
        ran(model, plan_files(recordings, ASK, MODEL), out)
    assert out.read_bytes() == b""


def test_no_more_than_jobs_run_at_once(
    model: afnext.Model, recordings: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = 0, 0
    finish = afnext.AsyncStream.finish

    async def counted(self: afnext.AsyncStream) -> afnext.Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await finish(self)
        finally:
            running -= 1

    monkeypatch.setattr(afnext.AsyncStream, "finish", counted)
    assert ran(model, plan_files(recordings, ASK, MODEL), out, jobs=2)["done"] == 4
    assert most == 2


def test_a_task_is_asked_and_what_no_recording_can_be_asked_is_refused(
    model: afnext.Model, recordings: list[str], out: Path
) -> None:
    work = Question(task="ast", to="German", options=SHORT)
    work.check(model)
    ran(model, plan_files(recordings[:1], work, MODEL), out)
    expected = model.ask(recordings[0], afnext.prompts.get("ast", to="German"), **SHORT)
    assert rows_in(out)[0]["result"]["text"] == expected.text
    with pytest.raises(afnext.PromptError, match="needs the language"):
        Question(task="ast").check(model)
    with pytest.raises(afnext.SamplingError, match="top_p"):
        Question("?", options={"top_p": 7.0}).check(model)
    with pytest.raises(afnext.AudioError, match="cannot be cut"):
        Transcription(window=1.0).check(model)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=8)


@given(st.lists(NAMES, max_size=12), st.randoms())
def test_ids_depend_on_nothing_but_the_item(names: list[str], random: Any) -> None:
    items = plan_files(names, ASK, MODEL)
    assert [item.head["path"] for item in items] == list(dict.fromkeys(names))
    assert len({item.id for item in items}) == len(items)
    shuffled = random.sample(names, len(names))
    assert {item.head["path"]: item.id for item in plan_files(shuffled, ASK, MODEL)} == {
        item.head["path"]: item.id for item in items
    }
    for other in (plan_files(names, Question("?"), MODEL), plan_files(names, Transcription(), MODEL)):
        assert not {item.id for item in other} & {item.id for item in items}
    again = Question("What do you hear?", options=dict(reversed(SHORT.items())))  # type: ignore[arg-type]
    assert [item.id for item in plan_files(names, again, MODEL)] == [item.id for item in items]


PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(PLAIN, PLAIN)
def test_equal_ids_mean_equal_values(one: Any, two: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    assert (item_id(value=one) == item_id(value=two)) == same


@settings(max_examples=30)
@given(st.data())
def test_any_cut_of_a_file_is_taken_up(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("rows") / "out.jsonl"
    texts = data.draw(st.lists(st.text(max_size=5), min_size=1, max_size=5))
    written = [row(item_id(number=number), result={"text": text}) for number, text in enumerate(texts)]
    with open_rows(path) as rows:
        for each in written:
            rows.append(each)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    begun = whole[:cut].rpartition(b"\n")[2]
    zeros = b"" if begun else b"\0" * data.draw(st.integers(0, 9))  # as some file systems leave after a power failure
    path.write_bytes(whole[:cut] + zeros)
    with open_rows(path) as rows:
        assert len(rows.statuses) == whole[:cut].count(b"\n")
        for each in written:
            if each["id"] not in rows.statuses:
                rows.append(each)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"notes\n", b'{"id": 7}\n', b'[]\n{"id": "a', b'{"x": 1}\n', b"[" * 9999]
)
def test_a_file_of_something_else_is_left_alone(out: Path, content: bytes) -> None:
    out.write_bytes(content)
    with pytest.raises(OutputError, match="is not a row of a batch"), open_rows(out):
        pass
    assert out.read_bytes() == content


def test_links_and_other_runs_are_refused(tmp_path: Path, out: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with pytest.raises(OutputError, match="symbolic link"), open_rows(link):
        pass
    with pytest.raises(OutputError, match="ends neither in"), open_rows(tmp_path / "out.csv"):
        pass
    for path in (out, tmp_path / "out.parquet"):
        with open_rows(path) as rows:
            rows.append(row("a", "failed"))
            rows.forget({"a"})
            with pytest.raises(OutputError, match="another run"), open_rows(path):
                pass
            rows.append(row("b"))
        assert [each["id"] for each in rows_in(path)] == ["b"]


def test_a_disk_that_is_full_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with open_rows(out) as rows:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="free some space"):
            rows.append(row("a"))
        assert "a" not in rows.statuses


def test_names_that_are_no_unicode_are_rows(tmp_path: Path) -> None:
    for path in (tmp_path / "out.jsonl", tmp_path / "out.parquet"):
        with open_rows(path) as rows:
            rows.append({**row("a", result={"text": "Grüße"}), "path": "x\udcff.wav"})
        [read] = rows_in(path)
        assert read["result"]["text"] == "Grüße"
        assert read["path"] in ("x\udcff.wav", "x\\udcff.wav")
        with open_rows(path) as rows:
            assert rows.statuses == {"a": "ok"}


def test_unfinished_parts_are_removed_and_others_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    for identifier in "ab":
        with open_rows(folder) as rows:
            rows.append(row(identifier, "failed" if identifier == "a" else "ok"))
    (folder / ".part-000002.parquet.0.part").write_bytes(b"torn")
    with open_rows(folder) as rows:
        assert rows.statuses == {"a": "failed", "b": "ok"}
        rows.forget({"a"})
        rows.append(row("c"))
    assert sorted(path.name for path in folder.iterdir()) == ["part-000001.parquet", "part-000002.parquet"]
    (folder / "part-000009.parquet").write_bytes(b"no parquet")
    with pytest.raises(OutputError, match="has no rows"), open_rows(folder):
        pass


def request(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "any", **body}}) + "\n"


def about(*parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What do you hear?"}]}]


def test_requests_are_answered_as_openai_does(
    model: afnext.Model, recordings: list[str], tmp_path: Path, out: Path
) -> None:
    types = pytest.importorskip("openai.types.chat")
    encoded = base64.b64encode(Path(recordings[0]).read_bytes()).decode()
    inline = {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    named = {"type": "audio_url", "audio_url": {"url": Path(recordings[1]).as_uri()}}
    chat, spoken = "/v1/chat/completions", "/v1/audio/transcriptions"
    batch = tmp_path / "requests.jsonl"
    batch.write_text(
        request("inline", chat, messages=about(inline), max_tokens=4)
        + request("named", chat, messages=about(named), max_completion_tokens=4, temperature=0)
        + "\n"
        + request("none", chat, messages=[{"role": "user", "content": "Hello?"}], max_tokens=4)
        + request("json", spoken, file=recordings[1])
        + request("srt", spoken, file=f"data:audio/wav;base64,{encoded}", response_format="srt")
        + request("inline", chat, messages=about(named))
        + request("tools", chat, messages=about(), tools=[{"type": "function"}])
        + request("unknown", chat, messages=about(), colour="red")
        + request("lost", spoken, file=str(tmp_path / "lost.wav"))
        + request("images", "/v1/images", prompt="a cat")
        + "not JSON\n"
    )
    items = plan_requests(batch, MODEL)
    assert [item.id for item in items] == [item.id for item in plan_requests(batch, MODEL)]
    assert ran(model, items, out)["failed"] == 6
    by_status = {status: [each for each in rows_in(out) if each["status"] == status] for status in ("ok", "failed")}
    done = {each["custom_id"]: each for each in by_status["ok"]}
    assert done.keys() == {"inline", "named", "none", "json", "srt"}
    sources = {"inline": recordings[0], "named": recordings[1], "none": None}
    for name, source in sources.items():
        response = done[name]["response"]
        assert (response["status_code"], done[name]["error"]) == (200, None)
        completion = types.ChatCompletion.model_validate(response["body"], strict=True)
        question = "Hello?" if source is None else "What do you hear?"
        assert completion.choices[0].message.content == model.ask(source, question, max_new_tokens=4).text
        assert completion.usage.completion_tokens == done[name]["usage"]["new_tokens"]
    transcript = model.transcribe(recordings[1])
    body = done["json"]["response"]["body"]
    assert body["text"] == " ".join(segment.text for segment in transcript.segments)
    assert done["srt"]["response"]["body"] == model.transcribe(recordings[0], timestamps=True).to_srt()
    failed = {each["custom_id"]: each["error"]["message"] for each in by_status["failed"]}
    assert len(failed) == 6
    for name, message in {
        "inline": "has the custom_id of line 1",
        "tools": "tools is not supported",
        "unknown": "'colour' is not known",
        "lost": "there is no file",
        "images": "only POST to",
        "line 12": "is not valid JSON",
    }.items():
        assert message in failed[name]
    assert ran(model, items, out)["items"] == 0
    os.utime(recordings[1], ns=(1, 1))
    assert ran(model, plan_requests(batch, MODEL), out)["items"] == 2  # "named", and the one that repeats its custom_id


@given(st.binary(max_size=60) | PLAIN.map(lambda v: json.dumps(v).encode()))
def test_any_line_is_an_item(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    path.write_bytes(content)
    items = plan_requests(path, MODEL)
    assert len(items) <= len([line for line in content.split(b"\n") if line.strip()])
    assert bool(items) == bool(content.strip())


def test_a_request_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        plan_requests(tmp_path / "none.jsonl", MODEL)
