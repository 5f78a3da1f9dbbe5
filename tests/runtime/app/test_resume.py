"""Contexts in files: a resumed one equals a fresh one, and everything else is refused with its reason."""

import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.audio import speech_like
from support.contexts import put_together, take_apart

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.errors import ContextFileError

RATE = 16_000
GREEDY = {"max_new_tokens": 8, "ignore_eos": True}
AUDIO = [(speech_like(1.3, 1), RATE), (speech_like(0.5, 2), RATE)]


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A saved context, and the answer of the fresh one."""
    path = tmp_path_factory.mktemp("saved") / "context.safetensors"
    with afnext.load(folder, dtype="float32", page_size=16).listen(AUDIO, system="Be brief.") as context:
        context.save(path)
        return path, context.ask("What?", **GREEDY).token_ids


@pytest.mark.parametrize("page_size", [7, 256])
def test_a_resumed_context_equals_a_fresh_one(folder: Path, saved: tuple[Path, list[int]], page_size: int) -> None:
    path, expected = saved
    model = afnext.load(folder, dtype="float32", page_size=page_size, prefix_cache_bytes=0)
    with model.resume(path, AUDIO) as context:
        answer = context.ask("What?", **GREEDY)
        assert answer.token_ids == expected
        assert answer.token_ids == model.ask(AUDIO, "What?", system="Be brief.", **GREEDY).token_ids
        assert (answer.usage.audio_seconds, answer.usage.windows) == (1.8, 2)
        assert answer.usage.cached_tokens == context.tokens
    model.engine.release_memory()
    assert model.engine.cache.nbytes == 0


@pytest.mark.parametrize("kv", ["int8", "fp8", "int4"])
def test_quantized_keys_and_values_are_saved_with_their_scales(kv: str, folder: Path, tmp_path: Path) -> None:
    model = afnext.load(folder, dtype="float32", kv=kv, page_size=16)
    with model.listen(AUDIO[0]) as context:
        context.save(tmp_path / "context")
        with model.resume(tmp_path / "context") as resumed:
            assert resumed.ask("What?", **GREEDY).token_ids == context.ask("What?", **GREEDY).token_ids


def test_the_file_is_safetensors_and_takes_the_bytes_of_its_tokens(saved: tuple[Path, list[int]], folder: Path) -> None:
    with safe_open(saved[0], "pt") as file:
        keys = file.get_tensor("keys.0")
        assert file.metadata()["dtype"] == "float32"
        assert file.metadata()["kv"] == "float32"
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert keys.shape[1:] == (text["num_key_value_heads"], text["hidden_size"] // text["num_attention_heads"])
    token = 2 * 4 * text["num_hidden_layers"] * keys[0].numel()
    assert 0 < saved[0].stat().st_size - len(keys) * token < 8 * len(keys) + 4096
    assert not list(saved[0].parent.glob("*.part"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_byte_changes_the_file_is_refused(
    model: afnext.Model, saved: tuple[Path, list[int]], tmp_path: Path, data: st.DataObject
) -> None:
    pool = model.engine.cache.pool
    in_use = pool.pages - pool.free
    content = bytearray(saved[0].read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    with pytest.raises(ContextFileError, match=r"listen|check the path"):
        model.resume(damaged)
    model.engine.release_memory()  # pages of what is closed are free after the step that takes notice of it
    assert pool.pages - pool.free == in_use


def test_another_model_dtype_or_audio_is_refused(folder: Path, saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    path = saved[0]
    with pytest.raises(ContextFileError, match="is not of this model"):
        afnext.load(write_random_checkpoint(tmp_path / "other", seed=1), dtype="float32").resume(path)
    with pytest.raises(ContextFileError, match="is not computed in bfloat16"):
        afnext.load(folder, dtype="bfloat16").resume(path)
    for kv in ("int8", "fp8", "int4"):
        with pytest.raises(ContextFileError, match=f"is not stored in {kv}"):
            afnext.load(folder, dtype="float32", kv=kv).resume(path)
    model = afnext.load(folder, dtype="float32")
    with pytest.raises(ContextFileError, match="saved from other audio"):
        model.resume(path, AUDIO[0])
    with pytest.raises(ContextFileError, match="cannot be read"):
        model.resume(tmp_path / "nowhere")


def test_another_template_is_refused(folder: Path, saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>{{", "<|im_start|>the {{"))
    with pytest.raises(ContextFileError, match="another tokenizer or chat template"):
        afnext.load(tmp_path / "other", dtype="float32").resume(saved[0])


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    model: afnext.Model, saved: tuple[Path, list[int]], tmp_path: Path, how: str
) -> None:
    path = tmp_path / "context"
    shutil.copy(saved[0], path)
    pool = model.engine.cache.pool
    in_use = pool.pages - pool.free
    with closing(model.engine.saved(path)) as opened:
        if how == "cut":
            os.truncate(path, path.stat().st_size // 2)  # a mapped file would end the process here
        else:
            with path.open("r+b") as file:
                file.seek(-1000, os.SEEK_END)
                file.write(bytes(500))
        with pytest.raises(ContextFileError, match="cut short" if how == "cut" else "is damaged"):
            model.engine.load(opened)
    model.engine.release_memory()  # pages of what is closed are free after the step that takes notice of it
    assert pool.pages - pool.free == in_use


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_no_context(model: afnext.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ContextFileError, match="a FIFO, not a regular file"):
        model.resume(tmp_path / "fifo")


def forged_text(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    header["__metadata__"]["conversation"] = header["__metadata__"]["conversation"].replace("Be", "\\ud800")


def forged_metadata(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    header["__metadata__"]["conversation"] = "\ud800"


def swapped_tensors(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    keys = tensors.pop("keys.0")
    tensors["keys.0"] = keys


def one_tensor_less(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    tensors.popitem()


def other_tokens(header: dict[str, Any], tensors: dict[str, bytes]) -> None:
    tensors["token_ids"] = bytes(len(tensors["token_ids"]))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (forged_text, "surrogates not allowed"),
        (forged_metadata, "surrogates not allowed"),
        (swapped_tensors, "does not hold the tensors"),
        (one_tensor_less, "does not hold the tensors"),
        (other_tokens, "another tokenizer or chat template"),
    ],
)
def test_forged_files_are_refused(
    model: afnext.Model,
    saved: tuple[Path, list[int]],
    tmp_path: Path,
    forge: Callable[[dict[str, Any], dict[str, bytes]], None],
    message: str,
) -> None:
    header, tensors = take_apart(saved[0].read_bytes())
    forge(header, tensors)
    (tmp_path / "forged").write_bytes(put_together(header, tensors))
    with pytest.raises(ContextFileError, match=message):
        model.resume(tmp_path / "forged")


def test_more_tokens_than_the_context_has_are_not_read(
    model: afnext.Model, saved: tuple[Path, list[int]], tmp_path: Path
) -> None:
    """A sparse file of a terabyte whose header is sound."""
    header, _ = take_apart(saved[0].read_bytes())
    tokens, offset = 10**9, 0
    for name in [name for name in header if name != "__metadata__"]:
        shape = [tokens, *header[name]["shape"][1:]]
        size = math.prod(shape) * (8 if name == "token_ids" else 4)
        header[name] |= {"shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header["digest"] = {"dtype": "U8", "shape": [32], "data_offsets": [offset, offset + 32]}
    encoded = json.dumps(header).encode()
    with (tmp_path / "sparse").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        try:
            file.truncate(8 + len(encoded) + offset + 32)
        except OSError:
            pytest.skip("this file system has no sparse files of a terabyte")
    with pytest.raises(ContextFileError, match="does not hold the tensors"):
        model.resume(tmp_path / "sparse")


def test_file_names_that_are_no_text_are_saved_as_escapes(model: afnext.Model, tmp_path: Path) -> None:
    clip = tmp_path / os.fsdecode(b"caf\xe9.wav")
    with clip.open("wb") as file:
        soundfile.write(file, speech_like(0.5, 1), RATE, format="WAV")
    with model.listen(clip) as context:
        context.save(tmp_path / "context")
    with model.resume(tmp_path / "context", clip) as resumed:
        assert resumed.recordings[0].source.endswith("caf\\udce9.wav")


def test_what_cannot_be_written_is_explained(model: afnext.Model, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "context.part").symlink_to(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with model.listen(AUDIO[0]) as context:
        with pytest.raises(ContextFileError, match="create the folder first"):
            context.save(tmp_path / "no" / "such" / "folder")
        with pytest.raises(ContextFileError, match="is a symbolic link"):
            context.save(tmp_path / "link")
        context.save(tmp_path / "context")
        expected = context.ask("What?", **GREEDY).token_ids
    assert (tmp_path / "secret").read_bytes() == b"secret"
    with model.resume(tmp_path / "context") as resumed:
        assert resumed.ask("What?", **GREEDY).token_ids == expected
    with pytest.raises(afnext.AfnextError, match="closed; listen again"):
        context.save(tmp_path / "context")


class Throttled(io.BytesIO):
    """A disk that is so slow that `between` is done before a second write is over."""

    def __init__(self, between: Callable[[], None]):
        super().__init__()
        self._between = threading.Thread(target=between, daemon=True)
        self._writes = 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes == 6:
            self._between.start()
            self._between.join(timeout=100)
            assert not self._between.is_alive(), "other requests waited for the disk"
        return super().write(data)


def test_other_requests_are_answered_while_a_context_is_written(folder: Path) -> None:
    """Also the closing of that context, and requests for which the cache grows."""
    model = afnext.load(folder, dtype="float32", page_size=16)
    context = model.listen(AUDIO)
    prefix, undisturbed, disturbed = context._prefix, io.BytesIO(), []
    model.engine.save(prefix, undisturbed, {})

    def others() -> None:
        context.close()
        before = model.engine.cache.pool.pages
        disturbed.append(model.ask((speech_like(20, 5), RATE), "What?", max_new_tokens=2).text)
        assert model.engine.cache.pool.pages > before
        disturbed.append(model.listen(AUDIO[1]))

    file = Throttled(others)
    model.engine.save(prefix, file, {})
    assert len(disturbed) == 2
    assert file.getvalue() == undisturbed.getvalue()
