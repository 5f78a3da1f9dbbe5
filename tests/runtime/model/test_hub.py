"""Local folders, short names and Hub names; the Hub is a small one on loopback, see support/fake_hub.py."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors
from support.fake_hub import COMMIT, FakeHub, served, sha256
from support.fake_hub import use as use_hub

from afnext.runtime.errors import CheckpointError
from afnext.runtime.model import download
from afnext.runtime.model.download import Listing
from afnext.runtime.model.hub import (
    BUNDLED,
    SHORT_NAMES,
    LocalModel,
    local_models,
    pull,
    remove,
    resolve,
    where,
)

NAME = "nvidia/audio-flamingo-next-hf"
TEXTS = {
    "config.json": b'{"model_type": "musicflamingo"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"terms",
}
UNWANTED = {"README.md": b"card", "modeling.py": b"import os", "pytorch_model.bin": b"pickle", "extra/a.json": b"{}"}


def weights(seed: int, nbytes: int = 30_000) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def sharded(seed: int, count: int = 3) -> dict[str, bytes]:
    shards = {f"model-{i}-of-{count}.safetensors": weights(seed + i) for i in range(count)}
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    return {**shards, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFNEXT_CACHE", str(tmp_path / "afnext"))
    return tmp_path / "cache"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on loopback that this process's client talks to."""
    with served(FakeHub()) as fake:
        use_hub(fake, cache, monkeypatch)
        yield fake


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_never_reaches_the_hub(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/model") == Path("org/model")
    assert fake.received == []


def test_the_bundled_model_is_in_the_package_unless_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (resolve(BUNDLED) / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="no revision 'main'"):
        resolve(BUNDLED, revision="main")
    (tmp_path / BUNDLED).mkdir()
    assert resolve(BUNDLED) == Path(BUNDLED)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["./org/model", "../model", "/org/model", "~/no/model", "a/b/c", "model", "org\\model", ""]
)
def test_what_looks_like_a_path_is_no_hub_name(
    name: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*org/name"):
        resolve(name)
    assert fake.received == []


def test_an_absent_path_object_is_no_hub_name(fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder 'org/absent-model'"):
        resolve(Path("org/absent-model"))
    assert fake.received == []


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a file but not a GGUF; give a \.gguf file, or the folder"
    ):
        resolve(file)
    with pytest.raises(CheckpointError, match=r"has no revision 'main'"):
        resolve(tmp_path, revision="main")


def test_short_names_stand_for_models_unless_a_folder_has_the_name(
    fake: FakeHub, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == resolve(BUNDLED)
    assert set(SHORT_NAMES) == {"tiny", "next", "next-think", "next-captioner"}
    for short, name in SHORT_NAMES.items():
        if name != BUNDLED:
            fake.add(name, {**TEXTS, "model.safetensors": weights(seed)})
            assert resolve(short) == resolve(name)
    with pytest.raises(CheckpointError, match="there is no folder 'next'"):
        resolve(Path("next"))
    (tmp_path / "next").mkdir()
    assert resolve("next") == Path("next")


@pytest.mark.parametrize("kind", ["single", "sharded", "both", "components"])
def test_only_what_loading_reads_is_downloaded(kind: str, fake: FakeHub, seed: int) -> None:
    single, shards = {"model.safetensors": weights(seed)}, sharded(seed + 1)
    wanted: dict[str, bytes] = {**TEXTS, **(shards if kind == "sharded" else single)}
    other: dict[str, bytes] = {**UNWANTED, "adapter_model.safetensors": b"x"}
    if kind == "both":  # the same weights twice, as Audio Flamingo 3 is published
        other |= shards
    if kind == "components":
        parts = {"llm": shards, "sound_tower": single, "sound_mm_projector": {"model.safetensors": weights(seed + 9)}}
        wanted = dict(TEXTS)
        for part, files in parts.items():
            wanted |= {f"{part}/{name}": data for name, data in {**files, "config.json": part.encode()}.items()}
        other |= {"llm/optimizer.pth": b"pickle"}
    fake.add(NAME, {**wanted, **other})
    folder = resolve(NAME)
    assert contents(folder) == wanted
    assert sorted(set(fake.downloaded())) == sorted(wanted)


def test_settings_alone_leave_the_weights_on_the_hub(fake: FakeHub, seed: int) -> None:
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    assert contents(resolve(NAME, weights=False)) == TEXTS


def test_a_second_time_downloads_nothing(fake: FakeHub, seed: int) -> None:
    fake.add(NAME, {**TEXTS, **sharded(seed)})
    folder = resolve(NAME)
    fake.received.clear()
    assert resolve(NAME) == folder
    assert fake.downloaded() == []
    fake.received.clear()
    assert resolve(NAME, revision=COMMIT) == folder
    assert fake.received == []  # a commit never changes


def test_a_new_commit_is_downloaded_where_it_differs(fake: FakeHub, seed: int) -> None:
    files = {**TEXTS, **sharded(seed)}
    fake.add(NAME, files)
    old = resolve(NAME)
    fake.commits[NAME] = COMMIT[::-1]
    fake.add(NAME, {**files, "model-1-of-3.safetensors": weights(seed + 99)})
    fake.received.clear()
    new = resolve(NAME)
    assert (old.name, new.name) == (COMMIT, COMMIT[::-1])
    assert [name for name in fake.downloaded() if name.endswith(".safetensors")] == ["model-1-of-3.safetensors"]
    assert where(NAME) == new


class InterruptedAt:
    """A progress callback that ends the download like Ctrl-C once so many bytes have come."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes

    def __call__(self, stage: str, done: float, total: float) -> None:
        if done >= self.nbytes:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_where_it_ended(ranges: bool, fake: FakeHub, seed: int) -> None:
    data = weights(seed, 50_000)
    fake.add(NAME, {**TEXTS, "model.safetensors": data})
    fake.ranges = ranges
    with pytest.raises(KeyboardInterrupt):
        resolve(NAME, progress=InterruptedAt(20_000))
    with pytest.raises(CheckpointError, match=r"in part only.*afnext models pull"):
        where(NAME)
    assert [(model.name, model.complete) for model in local_models()] == [(BUNDLED, True), (NAME, False)]
    fake.received.clear()
    told: list[tuple[str, float, float]] = []
    folder = resolve(NAME, progress=lambda *report: told.append(report))
    assert (folder / "model.safetensors").read_bytes() == data
    (request,) = [request for request in fake.received if request.path.startswith("/blobs/")]
    start = int((request.range or "").removeprefix("bytes=").rstrip("-"))
    assert 18_000 <= start <= 20_000
    assert told[0][1] == (start if ranges else 0)
    assert told[-1] == ("downloading", 50_000, 50_000)
    assert all(one[1] < other[1] for one, other in pairwise(told) if one[1])


def test_a_connection_that_breaks_is_taken_up_again(fake: FakeHub, seed: int) -> None:
    data = weights(seed)
    fake.add(NAME, {**TEXTS, "model.safetensors": data})
    fake.cut.add(sha256(data))
    assert (resolve(NAME) / "model.safetensors").read_bytes() == data


def test_damaged_weights_are_refused_and_forgotten(fake: FakeHub, seed: int) -> None:
    data = weights(seed)
    fake.add(NAME, {**TEXTS, "model.safetensors": data})
    fake.damaged.add(sha256(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was damaged .* SHA-256"):
        resolve(NAME)
    fake.damaged.clear()
    assert (resolve(NAME) / "model.safetensors").read_bytes() == data


def test_disk_space_is_checked_before_the_weights_come(
    fake: FakeHub, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    usage = shutil.disk_usage(Path.home())
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=(1 << 26) + 29_999))
    with pytest.raises(CheckpointError, match=r"still to be downloaded.*GB free.*HF_HOME"):
        resolve(NAME)
    assert "model.safetensors" not in fake.downloaded()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=(1 << 26) + 30_000))
    resolve(NAME)


def test_the_token_goes_to_the_hub_and_to_no_file_server(
    fake: FakeHub, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    resolve(NAME)
    assert {request.token for request in fake.received if request.path.startswith("/blobs/")} == {None}
    assert {request.token for request in fake.received if "/resolve/" in request.path} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"pickle"}, "no safetensors weights"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, "the repository lacks"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'}, "the repository lacks"),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
    ],
)
def test_a_repository_without_usable_weights_is_refused(files: dict[str, bytes], message: str, fake: FakeHub) -> None:
    fake.add(NAME, {**TEXTS, **files})
    with pytest.raises(CheckpointError, match=f"{NAME}.*{message}"):
        resolve(NAME)


def test_the_cache_serves_when_the_hub_cannot_be_reached(
    fake: FakeHub, seed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    folder = resolve(NAME)
    fake.refused[NAME] = (401, "GatedRepo")
    assert resolve(NAME) == folder
    assert "may be out of date" in caplog.text
    monkeypatch.setattr(Listing, "fetch", lambda *_: (_ for _ in ()).throw(ConnectionError("no route")))
    assert resolve(NAME) == folder
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        resolve("org/other")


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_asks_nobody(value: str, fake: FakeHub, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    with pytest.raises(CheckpointError, match=r"not in the local cache; run `afnext models pull"):
        resolve(NAME, offline=True)
    folder = resolve(NAME)
    fake.received.clear()
    assert where("next") == resolve(NAME, offline=True) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert resolve(NAME) == folder
    with pytest.raises(CheckpointError, match="unset HF_HUB_OFFLINE"):
        resolve("org/other")
    assert fake.received == []


@pytest.mark.parametrize("hostile", ["../../evil", "/tmp/evil", ""])
def test_a_hub_that_lies_about_hashes_is_refused(
    hostile: str, fake: FakeHub, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(NAME, {**TEXTS, "model.safetensors": weights(seed)})
    monkeypatch.setattr("support.fake_hub.sha256", lambda data: hostile)
    with pytest.raises(CheckpointError, match="in the place of a hash"):
        resolve(NAME)
    fake.commits[NAME] = hostile or "../x"
    fake.add(NAME, TEXTS)
    with pytest.raises(CheckpointError, match="in the place of a hash"):
        resolve(NAME)


@pytest.mark.parametrize("revision", ["../../../etc", "/etc", "..\\x"])
def test_a_revision_is_no_path(revision: str, fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="is not a revision"):
        resolve(NAME, revision=revision)


def test_models_on_this_machine_are_listed_and_removed(fake: FakeHub, seed: int, cache: Path) -> None:
    assert [model.name for model in local_models()] == [BUNDLED]
    fake.add(NAME, {**TEXTS, **sharded(seed)})
    fake.add("org/other", {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights(seed)})
    folder = pull("next")
    pull("org/other")
    nbytes = sum(map(len, contents(folder).values()))
    bundled, listed = local_models()  # what is of another family is not afnext's to show
    assert listed == LocalModel(NAME, folder, COMMIT, nbytes, True)
    assert (listed.short_name, bundled.short_name) == ("next", "tiny")
    assert remove("next") >= nbytes
    assert not folder.exists()
    assert [model.name for model in local_models()] == [BUNDLED]
    assert (cache / "models--org--other").is_dir()
    for name, message in [("next", "not in the Hub's cache"), ("tiny", "comes with afnext"), ("../x", "not in the")]:
        with pytest.raises(CheckpointError, match=message):
            remove(name)


def test_pulling_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to download"):
        pull(str(tmp_path))


def http_error(kind: type[Exception]) -> Exception:
    """An error of the Hub's client as it is after an HTTP answer; its constructors differ between versions."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error. (Request ID: Root=1-2)",)
    return error


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (http_error(errors.GatedRepoError), r"is gated: accept its terms .* `hf auth login`"),
        (http_error(errors.RepositoryNotFoundError), r"is not on the Hub, or is private: .* `hf auth login`"),
        (http_error(errors.RevisionNotFoundError), r"check the revision"),
        (errors.LocalEntryNotFoundError("no"), r"the Hub cannot be reached: check the network"),
        (errors.HFValidationError("no"), r"is not a valid name on the Hub"),
        (ConnectionError("no route"), r"could not be downloaded .*\(ConnectionError\)"),
        (OSError(28, "No space left on device"), r"could not be downloaded .*\(OSError\)"),
        (ValueError("whatever"), r"could not be downloaded .*\(ValueError\)"),
    ],
)
def test_every_failure_says_what_to_do(problem: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Listing:
        raise problem

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(Listing, "fetch", fails)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(NAME)
    assert NAME in str(caught.value)
    assert caught.value.__cause__ is problem


def test_the_real_client_offline(tmp_path: Path) -> None:
    code = (
        "from afnext.runtime.errors import CheckpointError\n"
        "from afnext.runtime.model.hub import resolve\n"
        f"try: resolve({NAME!r})\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(
        f"{NAME} is not in the local cache; unset HF_HUB_OFFLINE and run `afnext models pull"
    )


GGUF = "audio-cpp/Audio-Flamingo-GGUF"


def test_one_gguf_file_of_a_repository(fake: FakeHub) -> None:
    files = {"next-q4_k.gguf": weights(1), "next-q8_0.gguf": weights(2), "README.md": b"card"}
    fake.add(GGUF, files)
    path = resolve(f"{GGUF}:next-q4_k.gguf")
    assert path.name == "next-q4_k.gguf"
    assert path.read_bytes() == weights(1)
    assert fake.downloaded() == ["next-q4_k.gguf"]
    assert where(f"{GGUF}:next-q4_k.gguf") == path
    assert fake.downloaded() == ["next-q4_k.gguf"]
    with pytest.raises(CheckpointError, match=rf"{GGUF}:next-q8_0\.gguf is in the local cache in part only"):
        where(f"{GGUF}:next-q8_0.gguf")
    with pytest.raises(
        CheckpointError, match=r"no file bf16\.gguf; the repository has next-q4_k\.gguf, next-q8_0\.gguf"
    ):
        resolve(f"{GGUF}:bf16.gguf")
    with pytest.raises(CheckpointError, match=r"Name one of its GGUF files, as in org/name:next-q4_k\.gguf"):
        resolve(GGUF)


def test_the_encoder_comes_with_a_text_model(fake: FakeHub) -> None:
    files = {"q4/text.gguf": weights(1), "q4/mmproj-text.gguf": weights(2), "mmproj-other.gguf": weights(3)}
    fake.add("org/pair", files)
    path = resolve("org/pair:q4/text.gguf")
    assert (path.parent / "mmproj-text.gguf").read_bytes() == weights(2)
    assert sorted(fake.downloaded()) == ["q4/mmproj-text.gguf", "q4/text.gguf"]
    fake.add("org/several", {**files, "q4/mmproj-f16.gguf": weights(4)})
    with pytest.raises(CheckpointError, match="several mmproj files lie beside"):
        resolve("org/several:q4/text.gguf")


@pytest.mark.parametrize("file", ["../a.gguf", "/a.gguf", "a//b.gguf", ".hidden.gguf", "a.bin", "a\\b.gguf", ""])
def test_names_of_files_that_lead_elsewhere_are_refused(file: str, fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(f"org/name:{file}")
    assert fake.received == []
