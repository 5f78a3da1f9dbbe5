"""Contexts in files: a resumed one equals a fresh one, and everything else is refused with its reason."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.audio import speech_like

import afnext
from afnext.bench.random_checkpoint import write_random_checkpoint
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
    assert model.engine.cache.nbytes == 0


def test_int8_keys_and_values_are_saved_with_their_scales(folder: Path, tmp_path: Path) -> None:
    model = afnext.load(folder, dtype="float32", kv="int8", page_size=16)
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


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert pool.pages - pool.free == in_use


def test_another_model_dtype_or_audio_is_refused(folder: Path, saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    path = saved[0]
    with pytest.raises(ContextFileError, match="is not of this model"):
        afnext.load(write_random_checkpoint(tmp_path / "other", seed=1), dtype="float32").resume(path)
    with pytest.raises(ContextFileError, match="is not computed in bfloat16"):
        afnext.load(folder, dtype="bfloat16").resume(path)
    with pytest.raises(ContextFileError, match="is not stored in int8"):
        afnext.load(folder, dtype="float32", kv="int8").resume(path)
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


def test_what_cannot_be_written_is_said(model: afnext.Model, tmp_path: Path) -> None:
    with model.listen(AUDIO[0]) as context, pytest.raises(ContextFileError, match="cannot be written"):
        context.save(tmp_path / "no" / "such" / "folder")
