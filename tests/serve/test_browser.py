"""The page in a real Chromium: upload, record, ask, stop, seek, download, by mouse, keyboard and on a phone."""

import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import srt

from afnext.runtime.io.segments import Segment
from afnext.runtime.io.subtitles import to_srt, to_text, to_vtt

from .conftest import QUESTION, SCENE, Running, eventually
from .test_speech import ToneSpeaker

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
THINK = "Please think and reason about the input audio before you respond."
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser's tests need chromium: make browser")
WAIT = 100_000  # milliseconds


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, whose microphone hears the beginning of the scene. For this module only: playwright's event loop in the
    main thread would be in the way of other tests' loops."""
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    samples, rate = soundfile.read(SCENE, dtype="int16")
    soundfile.write(spoken, samples[: 3 * rate], rate)
    arguments = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=WAIT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Any) -> Any:
    return browser.new_page(viewport={"width": 1200, "height": 900})


@pytest.fixture
def page(tab: Any, service: Running) -> Iterator[Any]:
    """The page of the server, ready. No test may make a request to another host or raise an error in the page."""
    faults: list[str] = []
    listeners = {
        "pageerror": lambda error: faults.append(f"error: {error}"),
        "console": lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None,
        "request": lambda r: (
            faults.append(r.url) if not r.url.startswith((service.url, f"blob:{service.url}")) else None
        ),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.set_default_timeout(WAIT)
    tab.goto(service.url)
    tab.wait_for_selector("#model.ready", timeout=WAIT)
    yield tab
    tab.unroute_all()
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert faults == []


def upload(page: Any, path: Path = SCENE) -> None:
    """Open a recording, and wait until it has been heard and its waveform is there."""
    page.set_input_files("#file", path)
    opened(page)


def opened(page: Any) -> None:
    page.wait_for_selector("#listening", state="hidden")
    page.wait_for_function("() => Number(document.getElementById('wave').getAttribute('aria-valuemax')) > 0")


def ask(page: Any, question: str) -> Any:
    """Ask, and return the answer's element once it is complete."""
    count = page.locator(".turn").count()
    page.fill("#question", question)
    page.click("#ask")
    turn = page.locator(".turn").nth(count)
    turn.and_(page.locator("[aria-busy=false]")).wait_for()
    return turn


def shown(answer: str) -> str:
    """An answer as the page shows it: times without their brackets, on buttons."""
    return re.sub(r"\[([\d:.]+)\]", r"\1", answer)


def stand(page: Any) -> None:
    """Let the recording play without getting on: a test may take any time to look where it is."""
    page.wait_for_function("() => audio.readyState >= 1")
    page.evaluate("audio.defaultPlaybackRate = audio.playbackRate = 0")


def position(page: Any) -> float:
    return float(page.evaluate("audio.currentTime"))


def answers_with(page: Any, *deltas: dict[str, str]) -> None:
    """Answer every question with these pieces instead of the model's."""
    chunks = [{"model": "afnext-tiny", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_a_recording_is_uploaded_once_and_asked_several_times(page: Any, service: Running) -> None:
    posts: list[str] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            posts.append(request.url)

    page.on("request", note)
    upload(page)
    assert page.inner_text("#name") == "scene.flac"
    assert float(page.get_attribute("#wave", "aria-valuemax")) == pytest.approx(13.0)
    for question in ("How many words are spoken?", f"What happens first? {THINK}"):
        turn = ask(page, question)
        expected = service.model.ask(str(SCENE), question)
        assert turn.locator(".question").inner_text() == question
        assert turn.locator(".answer").text_content() == shown(expected.text)
        assert turn.locator(".meta").inner_text().startswith("afnext-tiny")
        if expected.thinking is not None:
            details = turn.locator("details.thinking")
            assert details.get_attribute("open") is None
            details.locator("summary").click()
            assert details.locator(".thought").text_content() == shown(expected.thinking)
    assert expected.thinking is not None
    page.remove_listener("request", note)
    assert [url.rpartition("/v1/")[2] for url in posts] == ["files", "contexts", *["chat/completions"] * 2]


def test_the_model_and_its_tasks_are_shown(page: Any, service: Running) -> None:
    assert "afnext-tiny" in page.inner_text("#model")
    assert "demonstration" in page.inner_text("#demo")
    upload(page)
    page.get_by_role("button", name="Transcribe with times").click()
    page.wait_for_selector(".turn[aria-busy=false]")
    prompt = service.model.prompts.get("asr-timestamps")
    assert page.inner_text(".question") == prompt
    assert page.text_content(".answer") == shown(service.model.ask(str(SCENE), prompt).text)


def test_translations_ask_for_languages(page: Any, service: Running) -> None:
    prompt = "Translate any speech you hear from {source} into {target}."
    about = {"dtype": "float32", "device": "cpu", "quant": None, "max_audio_seconds": 1800}
    about["tasks"] = [{"name": "ast", "description": "", "prompt": prompt}, {"name": "qa", "prompt": None}]
    body = json.dumps({"data": [{"id": "another", "afnext": about}]})
    page.route("**/v1/models", lambda route: route.fulfill(body=body, content_type="application/json"))
    answers_with(page, {"content": "Hallo"})
    page.goto(service.url)
    upload(page)
    assert page.is_hidden("#demo")
    assert page.locator("#presets button").count() == 1
    for source, expected in (("", "hear into Dutch."), ("French", "hear from French into Dutch.")):
        if page.is_hidden("#languages"):
            page.get_by_role("button", name="Translate…").click()
        page.fill("#source", source)
        page.fill("#target", "Dutch")
        page.click("#translate")
        page.locator(".turn[aria-busy=false]").last.wait_for()
        assert page.locator(".question").last.inner_text() == f"Translate any speech you {expected}"


def test_stop_ends_the_answer_at_the_server_and_the_next_question_works(
    page: Any, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = service.model.engine._steps._decode_runner
    decode, go, steps = runner.decode, threading.Event(), itertools.count()

    def halfway(*args: Any) -> Any:
        if next(steps) == 20:
            go.wait(200)  # the rest of the answer comes after the click only
        return decode(*args)

    monkeypatch.setattr(runner, "decode", halfway)
    upload(page)
    page.fill("#question", QUESTION)
    page.click("#ask")
    page.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 3")
    page.click("#stop")
    page.wait_for_selector(".turn[aria-busy=false]")
    assert page.inner_text(".meta") == "stopped"
    go.set()
    monkeypatch.undo()
    partial, whole = page.text_content(".answer"), service.model.ask(str(SCENE), QUESTION).text
    assert shown(whole).startswith(re.sub(r"\[[^\]]*$", "", partial))
    assert len(partial) < len(shown(whole))
    assert eventually(lambda: not service.server.requests)
    turn = ask(page, "How many words are spoken?")
    assert turn.locator(".answer").text_content() == service.model.ask(str(SCENE), "How many words are spoken?").text


def test_a_time_in_an_answer_seeks_and_an_impossible_one_is_text(page: Any) -> None:
    pieces = [
        "at [00:0",
        "7.5] and [00:08.2 - 00:09.0], 00:0",
        "9.",
        "1",
        ", not [31:00.0], 1:2, 10.5, [x",
        "]; 00:10",
        ".3",
    ]
    answers_with(page, *({"content": piece} for piece in pieces))
    upload(page)
    turn = ask(page, "When?")
    expected = "at 00:07.5 and 00:08.2 - 00:09.0, 00:09.1, not [31:00.0], 1:2, 10.5, [x]; 00:10.3"
    assert turn.locator(".answer").text_content() == expected
    assert turn.locator(".time").all_inner_texts() == ["00:07.5", "00:08.2 - 00:09.0", "00:09.1", "00:10.3"]
    stand(page)
    for index, seconds in enumerate((7.5, 8.2, 9.1, 10.3)):
        turn.locator(".time").nth(index).click()
        assert position(page) == pytest.approx(seconds, abs=0.01)
        assert not page.evaluate("audio.paused")


def test_markup_in_an_answer_stays_text(page: Any) -> None:
    tag = "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>"
    attack = f"{tag} [00:01.0] {tag} [<b>"
    answers_with(page, {"reasoning_content": attack}, {"content": attack})
    upload(page)
    turn = ask(page, "<b>bold?</b>")
    assert turn.locator(".answer").text_content() == shown(attack)
    assert turn.locator(".thought").text_content() == shown(attack)
    assert turn.locator(".question").text_content() == "<b>bold?</b>"
    assert page.locator("img, .turn script, .turn b").count() == 0
    assert page.title() == "afnext"


def test_downloads_equal_the_transcript(page: Any, service: Running) -> None:
    upload(page)
    page.click("#transcribe")
    page.wait_for_selector("#downloads:not([hidden])")
    expected = service.model.transcribe(str(SCENE), timestamps=True)
    assert page.locator("#segments li > span").all_inner_texts() == [s.text for s in expected.segments]
    files = downloads(page)
    assert files["scene.srt"] == expected.to_srt()
    assert files["scene.vtt"] == expected.to_vtt()
    assert files["scene.txt"] == expected.text
    assert [cue.content for cue in srt.parse(files["scene.srt"])] == [s.text for s in expected.segments]
    told = json.loads(files["scene.json"])["segments"]
    assert [(s["start"], s["end"], s["text"]) for s in told] == [(s.start, s.end, s.text) for s in expected.segments]


def test_speakers_follow_playback_and_reach_the_files(page: Any) -> None:
    segments = [
        Segment(0.0, 2.0, "Good <b>morning</b> & --> bye", "Speaker 1"),
        Segment(2.0, 5.25, "二つ", "Speaker 2"),
        Segment(5.25, 5.25, "三つ", "Speaker 2"),
        Segment(8.0, 12.9996, "End", None),
    ]
    events = [
        {"type": "transcript.text.segment", "start": s.start, "end": s.end, "text": s.text, **speaker(s)}
        for s in segments
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/audio/transcriptions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    upload(page)
    page.click("#transcribe")
    page.wait_for_selector("#downloads:not([hidden])")
    assert page.locator("#segments .speaker").all_inner_texts() == ["Speaker 1", "Speaker 2"]
    files = downloads(page)
    assert files["scene.srt"] == to_srt(segments)
    assert files["scene.vtt"] == to_vtt(segments)
    assert files["scene.txt"] == to_text(segments)
    page.wait_for_function("() => document.getElementById('audio').readyState >= 1")
    for seconds, marked in ((1.0, segments[0].text), (3.0, "二つ"), (9.0, "End")):
        page.evaluate(f"document.getElementById('audio').currentTime = {seconds}")
        page.wait_for_function(
            "text => document.querySelector('#segments [aria-current] > span')?.textContent === text", arg=marked
        )
    page.evaluate("document.getElementById('audio').currentTime = 7")
    page.wait_for_function("() => !document.querySelector('#segments [aria-current]')")


def speaker(segment: Segment) -> dict[str, str]:
    return {} if segment.speaker is None else {"speaker": segment.speaker}


def downloads(page: Any) -> dict[str, str]:
    """What each download button gives, by file name."""
    files = {}
    for button in page.locator("#downloads button").all():
        with page.expect_download() as download:
            button.click()
        files[download.value.suggested_filename] = Path(download.value.path()).read_bytes().decode()
    return files


def test_questions_are_answered_while_recording(page: Any, service: Running) -> None:
    """The answers come from the realtime endpoint; the recording is not listened to again when it stops."""
    posts: list[str] = []
    page.on("request", lambda request: posts.append(f"{request.method} {request.url.rpartition('/v1/')[2]}"))
    page.click("#record")
    page.wait_for_function("() => document.getElementById('record-time').textContent >= '00:02'")
    first = ask(page, "How many words are spoken?")
    assert first.locator(".answer").inner_text()
    assert first.locator(".meta").inner_text().startswith("afnext-tiny")
    assert page.is_visible("#recording")
    assert page.is_hidden(".player")
    page.click("#record-stop")
    page.wait_for_selector(".player:not([hidden])")
    opened(page)
    assert page.locator(".turn").count() == 1
    second = ask(page, QUESTION)
    assert second.locator(".meta").inner_text().startswith("afnext-tiny")
    assert page.locator(".turn").count() == 2
    assert "POST contexts" not in posts
    assert "POST chat/completions" in posts


def test_a_recording_that_is_discarded_leaves_nothing(page: Any, service: Running) -> None:
    page.click("#record")
    page.wait_for_selector("#work.live:not([hidden])")
    page.click("#record-cancel")
    assert page.is_visible("#start")
    assert page.is_hidden("#work")
    upload(page)
    assert page.is_visible(".player")


def test_recording_goes_on_without_questions_where_sessions_are_refused(
    page: Any, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.server, "settings", replace(service.server.settings, max_live=0))
    page.click("#record")
    page.wait_for_selector("#problem:not([hidden])")
    assert "the recording goes on" in page.inner_text("#problem")
    page.wait_for_function("() => document.getElementById('record-time').textContent >= '00:01'")
    page.click("#record-stop")
    page.wait_for_selector("#listening", state="hidden")
    assert ask(page, QUESTION).locator(".meta").inner_text().startswith("afnext-tiny")


@pytest.mark.parametrize("live", [False, True])
def test_answers_are_spoken_and_stopped(
    page: Any, service: Running, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    speaker = ToneSpeaker(letter=0.5)
    monkeypatch.setattr(service.server, "speaker", speaker)
    page.reload()
    page.wait_for_selector("#model.ready")
    if live:
        page.click("#record")
        page.wait_for_function("() => document.getElementById('record-time').textContent >= '00:02'")
    else:
        upload(page)
    page.check("#speak")
    page.fill("#question", QUESTION)
    page.click("#ask")
    page.wait_for_function("() => document.querySelector('.turn[aria-busy=false] .answer')?.textContent")
    assert speaker.texts
    page.wait_for_selector("#stop", state="visible")  # the voice goes on after the text
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    if live:
        page.click("#record-cancel")


def test_the_microphone_is_recorded(page: Any, service: Running) -> None:
    page.click("#record")
    page.wait_for_function("() => document.getElementById('record-time').textContent >= '00:02'")
    page.click("#record-stop")
    page.wait_for_function("() => Number(document.getElementById('wave').getAttribute('aria-valuemax')) > 0")
    seconds = float(page.get_attribute("#wave", "aria-valuemax"))
    assert seconds > 1.4
    played = page.evaluate("new Promise(done => setInterval(() => audio.duration && done(audio.duration), 20))")
    assert played == pytest.approx(seconds, abs=0.06)
    with service.http() as client:
        stored = client.get("/v1/files").json()["data"]
        recorded = next(file for file in stored if file["filename"].endswith(".wav"))
        peaks = np.array(client.get(f"/v1/files/{recorded['id']}/peaks").json()["peaks"])
    assert np.abs(peaks).max() > 0.05
    assert ask(page, QUESTION).locator(".meta").inner_text().startswith("afnext-tiny")


def test_errors_of_the_server_are_shown(page: Any, tmp_path: Path) -> None:
    text = tmp_path / "notes.mp3"
    text.write_text("no audio")
    page.set_input_files("#file", text)
    page.wait_for_selector("#problem:not([hidden])")
    assert "notes.mp3" in page.inner_text("#problem p")
    page.click("#another")
    body = json.dumps({"error": {"message": "too much to do", "type": "rate_limit_error", "code": "server_overloaded"}})
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=429, body=body, headers={"Retry-After": "7"}, content_type="application/json"
        ),
    )
    upload(page)
    assert page.is_hidden("#problem")
    assert ask(page, "Well?").locator(".meta").inner_text() == "too much to do (in about 7 s)"


def test_a_recording_that_is_too_long_can_be_cut(page: Any) -> None:
    body = json.dumps({"error": {"message": "longer than 30 minutes", "code": "audio_too_long"}})
    asked: list[bool] = []

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json["truncate"])
        if asked[-1]:
            route.continue_()
        else:
            route.fulfill(status=400, body=body, content_type="application/json")

    page.route("**/v1/contexts", answer)
    page.set_input_files("#file", SCENE)
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#problem p") == "longer than 30 minutes"
    page.click("#problem-retry")
    assert ask(page, "How many words are spoken?").locator(".meta").inner_text().startswith("afnext-tiny")
    assert asked == [False, True]
    assert page.is_hidden("#problem")


def test_a_forgotten_recording_is_heard_again(page: Any, service: Running) -> None:
    upload(page)
    with service.http() as client:
        for context in client.get("/v1/contexts").json()["data"]:
            client.delete(f"/v1/contexts/{context['id']}")
    question = "How many words are spoken?"
    assert ask(page, question).locator(".answer").text_content() == service.model.ask(str(SCENE), question).text


def test_a_key_is_asked_for_and_forgotten_with_the_tab(browser: Any, keyed_service: Running) -> None:
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(keyed_service.url)
    page.wait_for_selector("#problem:not([hidden])")
    assert "API key" in page.inner_text("#problem p")
    page.keyboard.type("one")  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#model.ready")
    assert page.is_hidden("#problem")
    upload(page)
    assert ask(page, "How many words are spoken?").locator(".meta").inner_text().startswith("afnext-tiny")
    kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert kept == [["one"], [], ""]
    page.close()


def test_the_keyboard_is_enough(page: Any, service: Running) -> None:
    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"the focus on {selector} is not visible"
                return
        raise AssertionError(f"{selector} is not reached by {key}")

    choosers: list[Any] = []

    def take(chooser: Any) -> None:
        choosers.append(chooser)

    page.on("filechooser", take)  # long before the key: the browser takes a moment to hand choosers over
    tab_to("#choose")
    page.keyboard.press("Enter")
    for _ in range(WAIT // 100):
        if choosers:
            break
        page.wait_for_timeout(100)
    page.remove_listener("filechooser", take)
    choosers[0].set_files(SCENE)
    page.wait_for_selector("#work:not([hidden])")
    opened(page)
    page.keyboard.type(QUESTION)  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn[aria-busy=false]")
    assert page.text_content(".answer") == shown(service.model.ask(str(SCENE), QUESTION).text)
    tab_to(".turn .time", "Shift+Tab")
    seconds = float(page.evaluate("document.activeElement.textContent").removeprefix("00:"))
    stand(page)
    page.keyboard.press("Enter")
    assert position(page) == pytest.approx(seconds, abs=0.01)
    page.evaluate("audio.pause()")
    tab_to("#wave", "Shift+Tab")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert position(page) == pytest.approx(5.0)
    assert page.get_attribute("#wave", "aria-valuetext") == "00:05.0 of 00:13.0"
    tab_to("#transcribe")
    page.keyboard.press("Enter")
    page.wait_for_selector("#downloads:not([hidden])")


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, service: Running) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.set_default_timeout(WAIT)
    long = "word" * 60
    answers_with(page, {"reasoning_content": long}, {"content": f"{long} [00:01.0]"})
    page.goto(service.url)
    page.wait_for_selector("#model.ready")
    sideways = "document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth"
    assert not page.evaluate(sideways)
    upload(page)
    page.tap("#transcribe")
    page.wait_for_selector("#downloads:not([hidden])")
    ask(page, long)
    page.tap("#key summary")
    assert not page.evaluate(sideways)
    assert page.evaluate("document.scrollingElement.clientWidth") == 360
    buttons = page.locator("button:not(.time, .link):visible").all()
    small = [button.inner_text() for button in buttons if button.bounding_box()["height"] < 32]
    assert small == []
    page.close()
