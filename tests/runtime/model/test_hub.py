"""Local folders and Hub names, without the network: the Hub's client is replaced, or told to stay offline."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects

from afnext.runtime.errors import CheckpointError
from afnext.runtime.model.hub import BUNDLED, resolve

NAME = "nvidia/audio-flamingo-next-hf"


class FakeHub:
    """Stands in for snapshot_download: records its calls, then returns `result` or raises it."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def use(monkeypatch: pytest.MonkeyPatch, result: Any) -> FakeHub:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub = FakeHub(result)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_folder_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, RuntimeError("the Hub was asked"))
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/model") == Path("org/model")
    assert hub.calls == []


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
def test_what_looks_like_a_path_is_no_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*org/name"):
        resolve(name)
    assert hub.calls == []


def test_an_absent_path_object_is_no_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, "unused")
    with pytest.raises(CheckpointError, match=r"there is no folder 'org/absent-model'"):
        resolve(Path("org/absent-model"))
    assert hub.calls == []


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the folder"):
        resolve(file)
    with pytest.raises(CheckpointError, match=r"has no revision 'main'"):
        resolve(tmp_path, revision="main")


def test_a_hub_name_downloads_weights_and_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, tmp_path)
    assert resolve(NAME, revision="abc123") == tmp_path
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"], call["local_files_only"]) == (NAME, "abc123", False)
    files = ["model.safetensors", "llm/model-00001-of-00004.safetensors", "config.json", "chat_template.jinja"]
    unsafe = ["pytorch_model.bin", "modeling.py", "weights.pt", "llm/model.pth", "x.json.py"]
    kept = list(filter_repo_objects([*files, *unsafe], allow_patterns=call["allow_patterns"]))
    assert kept == files


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_by_the_environment(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    resolve(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    resolve(NAME)
    resolve(NAME, offline=True)
    assert [call["local_files_only"] for call in hub.calls] == [True, False, True]


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
        (errors.HFValidationError("no"), r"is no valid name on the Hub"),
        (ConnectionError("no route"), r"could not be downloaded .*\(ConnectionError\)"),
        (OSError(28, "No space left on device"), r"could not be downloaded .*\(OSError\)"),
        (ValueError("whatever"), r"could not be downloaded .*\(ValueError\)"),
    ],
)
def test_every_failure_says_what_to_do(problem: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, problem)
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
        f"{NAME} is not in the local cache, and the Hub is off limits: unset HF_HUB_OFFLINE"
    )
