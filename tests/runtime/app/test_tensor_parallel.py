"""Models in several processes: the same answers, and nothing left behind whatever ends."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.audio import speech_like

import afnext
from afnext.runtime.engine.rank import Op, encoded, send
from afnext.runtime.errors import ConfigError, EngineDeadError
from afnext.runtime.model import group
from afnext.runtime.model.hub import resolve

AUDIO = (speech_like(1.3, 1), 16_000)
GREEDY = {"max_new_tokens": 12, "ignore_eos": True}
ENDLESS = {"max_new_tokens": 16_000, "ignore_eos": True}
SECONDS = 60.0  # within which everything has ended; ranks that notice nothing wait for 600 seconds

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ranks need socket pairs that a process inherits")


@pytest.fixture(scope="module")
def model() -> Iterator[afnext.Model]:
    with afnext.load(tp=2, page_size=16) as loaded:
        yield loaded


def ranks_of(model: afnext.Model) -> list[subprocess.Popen[bytes]]:
    return model.engine._executor._links._processes  # type: ignore[attr-defined]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_give_the_answers_of_one(model: afnext.Model, tmp_path: Path) -> None:
    """Contexts of either are resumed by the other."""
    one = afnext.load(page_size=16)
    expected = one.ask(AUDIO, "What is said?", **GREEDY).token_ids
    assert model.ask(AUDIO, "What is said?", **GREEDY).token_ids == expected
    for saving, resuming in ((one, model), (model, one)):
        path = tmp_path / f"from-{saving.engine._executor.size}"
        with saving.listen(AUDIO) as context:
            context.save(path)
        with resuming.resume(path, AUDIO) as context:
            assert context.ask("What is said?", **GREEDY).token_ids == expected


@pytest.mark.slow
def test_long_prompts_are_divided_by_tokens() -> None:
    """25 seconds are 625 tokens, and so a chunk that is long enough."""
    audio = (speech_like(25, 2), 16_000)
    expected = afnext.load().ask(audio, "What is said?", **GREEDY).token_ids
    with afnext.load(sp=2) as several:
        assert several.ask(audio, "What is said?", **GREEDY).token_ids == expected


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_no_rank_listens_outside_the_loopback_interface(model: afnext.Model) -> None:
    model.ask(AUDIO, "?", max_new_tokens=1)
    listening = []
    for pid in (os.getpid(), *(process.pid for process in ranks_of(model))):
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and inode in inodes:
                    listening.append(local.partition(":")[0])
    assert listening
    assert set(listening) == {"0100007F"}


def test_a_closed_model_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with afnext.load(tp=2) as loaded:
        processes = ranks_of(loaded)
        assert loaded.ask(AUDIO, "?", max_new_tokens=2).token_ids
    del loaded
    assert [process.poll() for process in processes] == [0]
    assert not list(tmp_path.iterdir())


def test_a_killed_rank_ends_every_request() -> None:
    loaded = afnext.load(tp=2, page_size=16)
    (process,) = ranks_of(loaded)
    errors: list[BaseException] = []

    def ask(question: str) -> None:
        try:
            loaded.ask(AUDIO, question, **ENDLESS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(question,)) for question in ("What?", "Who?")]
    for thread in threads:
        thread.start()
    eventually(lambda: loaded.engine.stats().decoding == 2)
    process.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(SECONDS)
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, EngineDeadError)
        assert "the process of rank 1 was killed by SIGKILL" in str(error)
    assert not loaded.engine.stats().alive
    with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
        loaded.ask(AUDIO, "?")
    loaded.close()


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped, which nothing but the time without an answer shows."""
    monkeypatch.setitem(group._SECONDS, "cpu", 10)
    loaded = afnext.load(tp=2, page_size=16)
    (process,) = ranks_of(loaded)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match=r"rank 0 failed \(GroupError: another rank ended or did not answer"):
        loaded.ask(AUDIO, "What?", **ENDLESS)
    assert process.wait(SECONDS) == -signal.SIGKILL
    loaded.close()


def test_an_exception_on_a_rank_names_its_cause() -> None:
    """Also while nothing is computed."""
    loaded = afnext.load(tp=2, page_size=16)
    (process,) = ranks_of(loaded)
    send(loaded.engine._executor._links._sockets[0], encoded(Op.COPY_PAGE, [[10**6, 0]]))  # type: ignore[attr-defined]
    process.wait(SECONDS)
    eventually(lambda: not loaded.engine.stats().alive)
    with pytest.raises(EngineDeadError, match=r"rank 1 failed \(IndexError: .*out of bounds"):
        loaded.ask(AUDIO, "What?", **ENDLESS)
    loaded.close()


def test_what_cannot_be_divided_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=r"3 processes cannot share .*choose 1, 2 or 4"):
        afnext.load(tp=3)
    with pytest.raises(ConfigError, match=r"3 processes cannot share .*choose 1, 2 or 4"):
        afnext.load(sp=3)
    with pytest.raises(ValueError, match="tp must be at least 1"):
        afnext.load(tp=0)
    with pytest.raises(ValueError, match="give tp or sp"):
        afnext.load(tp=2, sp=2)


def test_an_error_while_a_rank_loads_is_that_of_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint disappears between rank 0's look at it and that of the others."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in resolve("afnext-tiny", revision=None).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> object:
        (folder / "config.json").unlink()
        return popen(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(EngineDeadError, match=r"rank 1 failed \(ConfigError: .*has no config.json"):
        afnext.load(folder, tp=2)


SCRIPT = """
import json, sys, afnext, numpy as np
if __name__ == "__main__":
    model = afnext.load(tp=2)
    print(json.dumps([process.pid for process in model.engine._executor._links._processes]), flush=True)
    silence = (np.zeros(16_000, np.float32), 16_000)
    pieces = model.stream(silence, "?", max_new_tokens=60_000, ignore_eos=True)
    print("answering" if next(pieces) else "", flush=True)
    list(pieces)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_first_process(number: signal.Signals) -> None:
    """Ctrl-C reaches the whole group of processes; SIGKILL the first alone."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        (rank,) = json.loads(process.stdout.readline())
        assert process.stdout.readline() == b"answering\n"
        assert alive(rank)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate(timeout=SECONDS)
        eventually(lambda: not alive(rank))


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
