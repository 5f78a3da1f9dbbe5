"""The tokenizer against the `tokenizers` library, recorded vectors and recorded outputs of the released checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers import (
    AF3_ORDER,
    AFNEXT_ORDER,
    IM_END,
    OTHER_ORDER,
    SOUND,
    TOOL_CALL,
    small_tokenizer,
    unpack_shared,
    write_checkpoint_texts,
    write_json,
)

from afnext.runtime.errors import CheckpointError, ConfigError, PromptError
from afnext.runtime.io.tokenizer import BYTE_OF_SYMBOL, StreamDecoder, Tokenizer

BACKEND = small_tokenizer()
TOKENIZER = Tokenizer(BACKEND, audio_bos_token="<|sound_bos|>", audio_eos_token="<|sound_eos|>")


@pytest.fixture(scope="module", params=["afnextA", "mfdefaultB"])
def shared_folder(request, shared_data, tmp_path_factory) -> Path:
    return unpack_shared(shared_data, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared_tokenizer(shared_folder) -> Tokenizer:
    return Tokenizer.from_folder(shared_folder)


def test_recorded_texts_have_the_recorded_ids(shared_tokenizer, shared_data):
    lines = (shared_data / "vectors" / "tokenizer_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for vector in map(json.loads, lines):
        assert shared_tokenizer.encode(vector["text"]) == vector["ids"]
        assert shared_tokenizer.encode(vector["text"], allow_special=True) == vector["ids"]


def test_outputs_of_released_checkpoints_decode_to_their_texts(shared_tokenizer, shared_data):
    lines = (shared_data / "vectors" / "real_checkpoint_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for output in map(json.loads, lines):
        assert shared_tokenizer.decode(output["token_ids"]) == output["text"]
        assert streamed(shared_tokenizer, output["token_ids"]) == output["text"]


def test_real_vocabulary_decodes_like_the_library(shared_folder, shared_tokenizer, seed):
    library = tokenizers.Tokenizer.from_file(str(shared_folder / "tokenizer.json"))
    for ids in np.random.default_rng(seed).integers(0, shared_tokenizer.vocab_size + 50, (200, 12)).tolist():
        assert shared_tokenizer.decode(ids) == library.decode(ids)
        assert shared_tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)
        assert streamed(shared_tokenizer, ids) == library.decode(ids)


def test_ids_of_the_shared_variants_follow_their_files(shared_folder, shared_tokenizer):
    library = tokenizers.Tokenizer.from_file(str(shared_folder / "tokenizer.json"))
    config = json.loads((shared_folder / "config.json").read_text())
    settings = json.loads((shared_folder / "tokenizer_config.json").read_text())
    assert shared_tokenizer.audio_token_id == library.token_to_id(SOUND) == config["audio_token_id"]
    assert shared_tokenizer.audio_bos_id == library.token_to_id("<|sound_bos|>")
    assert shared_tokenizer.audio_eos_id == library.token_to_id("<|sound_eos|>")
    assert shared_tokenizer.pad_id == library.token_to_id(settings["pad_token"])
    assert shared_tokenizer.eos_ids == (151645,)
    assert shared_tokenizer.vocab_size == config["text_config"]["vocab_size"]
    names = ("audio_token_id", "audio_bos_token_id", "audio_eos_token_id")
    shared_tokenizer.check_against({name: config.get(name) for name in names})


def test_bytes_of_symbols_are_the_librarys_alphabet():
    library = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ["\u0000\t\n ~\x7f", "\u0080ÿĀƑ", "\u00ad語😀"]:
        [(symbols, _)] = library.pre_tokenize_str(text)
        assert bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols) == text.encode()
    assert BYTE_OF_SYMBOL.keys() == set(library.alphabet())


@given(st.text())
def test_plain_text_encodes_like_the_library_and_comes_back_normalized(text):
    ids = TOKENIZER.encode(text)
    assert ids == BACKEND.encode(text).ids
    assert TOKENIZER.decode(ids) == BACKEND.normalizer.normalize_str(text)


mixed_texts = st.lists(st.one_of(st.sampled_from(AFNEXT_ORDER), st.text(max_size=5))).map("".join)


@given(mixed_texts)
def test_spellings_of_added_tokens_are_text_unless_allowed(text):
    ids = TOKENIZER.encode(text)
    assert not {BACKEND.token_to_id(spelling) for spelling in AFNEXT_ORDER} & set(ids)
    assert TOKENIZER.decode(ids) == BACKEND.normalizer.normalize_str(text)
    assert TOKENIZER.encode(text, allow_special=True) == BACKEND.encode(text).ids


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(token_id) for token_id in ids] + [decoder.finish()])


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 5)))
def test_any_ids_decode_like_the_library_whole_and_streamed(ids):
    assert TOKENIZER.decode(ids) == BACKEND.decode(ids) == streamed(TOKENIZER, ids)
    assert TOKENIZER.decode(ids, skip_special=False) == BACKEND.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦🇫🇷", "你好，世界", "naïve café", "a😀"])
def test_stream_gives_characters_only_when_complete(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) > len(text)  # characters are split over tokens, or this shows nothing
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert decoder.finish() == ""
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_stream_ends_an_unfinished_character_with_a_replacement():
    ids = TOKENIZER.encode("a語")[:-1]
    decoder = StreamDecoder(TOKENIZER)
    assert "".join(map(decoder.push, ids)) == "a"
    assert decoder.finish() == "\ufffd"


def test_special_tokens_are_left_out_and_others_kept():
    ids = TOKENIZER.encode(f"a{TOOL_CALL}b{IM_END}", allow_special=True)
    assert TOKENIZER.decode(ids) == f"a{TOOL_CALL}b"
    assert TOKENIZER.decode(ids, skip_special=False) == f"a{TOOL_CALL}b{IM_END}"


def test_think_tags_survive_decoding_even_when_special():
    tokenizer = Tokenizer(small_tokenizer((*AF3_ORDER, "<think>", "</think>")))
    text = "<think>so</think>yes"
    assert tokenizer.decode(tokenizer.encode(text + IM_END, allow_special=True)) == text


@pytest.mark.parametrize("order", [AFNEXT_ORDER, OTHER_ORDER, AF3_ORDER])
def test_ids_are_looked_up_by_spelling(tmp_path, order):
    write_checkpoint_texts(tmp_path, order)
    tokenizer, library = Tokenizer.from_folder(tmp_path), small_tokenizer(order)
    assert tokenizer.audio_token_id == library.token_to_id(SOUND)
    assert tokenizer.audio_bos_id == library.token_to_id("<|sound_bos|>")
    assert tokenizer.audio_eos_id == library.token_to_id("<|sound_eos|>")
    assert tokenizer.pad_id == library.token_to_id("[PAD]")
    assert tokenizer.eos_ids == (library.token_to_id(IM_END),)
    assert (tokenizer.audio_bos_id is None) == (order is AF3_ORDER)


def test_end_tokens_come_from_generation_config_then_config_then_tokenizer(tmp_path):
    write_checkpoint_texts(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [3, 5]})
    write_json(tmp_path / "config.json", {"text_config": {"eos_token_id": 7}})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (3, 5)
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_ids == (7,)
    (tmp_path / "config.json").unlink()
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (BACKEND.token_to_id("<|endoftext|>"),)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_ids == (BACKEND.token_to_id(IM_END),)


def test_audio_tokens_may_be_renamed_by_the_processor(tmp_path):
    write_checkpoint_texts(tmp_path)
    write_json(tmp_path / "processor_config.json", {"audio_token": TOOL_CALL})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.audio_token_id == BACKEND.token_to_id(TOOL_CALL)


def test_a_config_of_another_checkpoint_is_refused_naming_both_ids():
    own = BACKEND.token_to_id(SOUND)
    TOKENIZER.check_against({"audio_token_id": own, "audio_bos_token_id": None})
    with pytest.raises(ConfigError, match=rf"audio_token_id = {own + 1}.*'<sound>' at {own}"):
        TOKENIZER.check_against({"audio_token_id": own + 1})
    with pytest.raises(ConfigError, match=r"audio_eos_token_id = 9999.*at \d+"):
        TOKENIZER.check_against({"audio_eos_token_id": 9999})
    with pytest.raises(ConfigError, match=r"audio_bos_token_id = 3.*no such token"):
        Tokenizer(small_tokenizer(AF3_ORDER)).check_against({"audio_bos_token_id": 3})
    with pytest.raises(ConfigError, match="hidden_size"):
        TOKENIZER.check_against({"hidden_size": 1})


@pytest.mark.parametrize(
    ("file", "content", "error", "says"),
    [
        ("tokenizer.json", "{", CheckpointError, "not valid JSON"),
        ("tokenizer.json", "[]", CheckpointError, "not an object"),
        ("tokenizer.json", "\ud800".encode("utf-16", "surrogatepass"), CheckpointError, "UTF-8"),
        ("processor_config.json", "nope", CheckpointError, "processor_config.json is not valid JSON"),
        ("processor_config.json", "[" * 100_000, CheckpointError, "not valid JSON"),
        ("processor_config.json", "[1]", CheckpointError, "not an object"),
        ("processor_config.json", '{"audio_token": "<music>"}', ConfigError, "no added token '<music>'"),
        ("processor_config.json", '{"audio_token": 5}', ConfigError, "audio_token is 5"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', ConfigError, "'<none>' as its pad_token"),
        ("generation_config.json", '{"eos_token_id": "end"}', ConfigError, "eos_token_id is 'end'"),
        ("generation_config.json", '{"eos_token_id": [1, -5]}', ConfigError, "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": true}', ConfigError, "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": 151645}', ConfigError, "no token with that id"),
        ("generation_config.json", '{"eos_token_id": 99999999999999999999}', ConfigError, "no token with that id"),
    ],
)
def test_damaged_or_contradicting_files_are_refused(tmp_path, file, content, error, says):
    write_checkpoint_texts(tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=says):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def edited(backend: tokenizers.Tokenizer, **changes: object) -> tokenizers.Tokenizer:
    """The tokenizer with top-level or (`model_*`) model entries of its JSON replaced."""
    value = json.loads(backend.to_str())
    for name, change in changes.items():
        place = value["model"] if name.startswith("model_") else value
        place[name.removeprefix("model_")] = change
    return tokenizers.Tokenizer.from_str(json.dumps(value))


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_dropout": 0.5}, "BPE dropout of 0.5"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 9}}, r"other than NFC \(Repl"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, "Split"),
        ({"pre_tokenizer": SPLIT}, "ends with ByteLevel"),
        ({"pre_tokenizer": None}, "ends with ByteLevel"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "ends with ByteLevel"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a{9})+"}, "content": "x"}}, "decoder with an unknown"),
        ({"added_tokens": [{"id": 300 + i, "content": f"<{i}>"} for i in range(5000)]}, "at most 4096"),
    ],
)
def test_files_that_could_stall_or_change_texts_are_refused(tmp_path, changes, says):
    write_checkpoint_texts(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    for name, change in changes.items():
        place = value["model"] if name.startswith("model_") else value
        place[name.removeprefix("model_")] = change
    write_json(tmp_path / "tokenizer.json", value)
    with pytest.raises(ConfigError, match=says):
        Tokenizer.from_folder(tmp_path)


def test_the_splits_of_gpt2_are_read(tmp_path):
    write_checkpoint_texts(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text()) | {"pre_tokenizer": BYTES}
    write_json(tmp_path / "tokenizer.json", value)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("it's 12 cafés") == library.encode("it's 12 cafés").ids


def test_texts_that_are_too_long_are_refused_before_they_are_tokenized():
    assert len(TOKENIZER.encode(" " * 2**16)) > 1
    with pytest.raises(PromptError, match="1,048,577 characters"):
        TOKENIZER.encode(" " * (2**20 + 1))


def test_panics_of_the_library_are_errors(monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    class Panicking:
        def encode(self, *arguments, **options):
            raise panic("match-stack limit over")

    tokenizer = Tokenizer(small_tokenizer())
    monkeypatch.setattr(tokenizer, "_text_only", Panicking())
    with pytest.raises(PromptError, match="cannot be tokenized"):
        tokenizer.encode("a")


def test_tokenizers_that_would_lose_or_invent_text_are_refused():
    vocab = json.loads(BACKEND.to_str())["model"]["vocab"]
    del vocab["ÿ"]
    with pytest.raises(ConfigError, match="lacks 1 of the 256"):
        Tokenizer(edited(BACKEND, model_vocab=vocab))
    with pytest.raises(ConfigError, match="BPE only"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    adding = small_tokenizer()
    adding.post_processor = tokenizers.processors.BertProcessing(("[PAD]", 1), ("[BOS]", 2))
    with pytest.raises(ConfigError, match="post-processor"):
        Tokenizer(adding)
    with pytest.raises(ConfigError, match=r"no added token '<\|im_end\|>'"):
        Tokenizer(small_tokenizer((SOUND,)))


def test_a_vocabulary_that_spells_out_an_added_token_is_refused():
    vocab = json.loads(BACKEND.to_str())["model"]["vocab"]
    smuggling = edited(BACKEND, model_vocab={**vocab, "sound": vocab["sound"]}, model_ignore_merges=True)
    smuggling.add_special_tokens(["sound"])
    tokenizer = Tokenizer(smuggling)
    with pytest.raises(ConfigError, match="smuggle"):
        tokenizer.encode("sound")


def test_truncation_and_padding_stored_in_the_file_do_not_apply():
    backend = small_tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode("xyz" * 4)) == 12


def test_added_tokens_that_take_spaces_are_refused_where_they_matter():
    backend = small_tokenizer()
    backend.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a <mask>")) == "a <mask>"
    with pytest.raises(ConfigError, match="<mask>"):
        tokenizer.encode("a <mask>", allow_special=True)


def test_invalid_unicode_is_refused():
    with pytest.raises(PromptError, match="lone surrogate at position 2"):
        TOKENIZER.encode("ab\ud800")
