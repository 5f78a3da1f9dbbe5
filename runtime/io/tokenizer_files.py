"""Loads the byte-level BPE vocabulary of a checkpoint: tokenizer.json, or vocab.json and merges.txt.

A tokenizer.json can contain far more than byte-level BPE: regular expressions that never finish, replacements that
multiply the text, random merges. Everything outside the model section is therefore compared with a short list of
settings that Qwen2-style tokenizers use, before the `tokenizers` library compiles any of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from ..checkpoint_folder import MAX_TOKENIZER_BYTES, CheckpointFolder
from ..errors import CheckpointError, ConfigError
from ..files import shown

FILE = "tokenizer.json"
MAX_ADDED_TOKENS = 4096

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TINY_SPLIT = r"\[?\p{N}\p{N}:|\p{N}\p{N}|\.\p{N}\]?|\p{N}| ?\p{L}+|</?think>|\s|[^\s\p{L}\p{N}]"
SPLITS = (QWEN2_SPLIT, LLAMA3_SPLIT, GPT2_SPLIT, TINY_SPLIT)
"""The allowed regular expressions for splitting text into words: Qwen2, Llama 3, GPT-2 and the bundled model."""


def load_backend(files: CheckpointFolder) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint, with its added tokens, from the folder or, in the component layout, from llm/.

    Raises CheckpointError for missing or damaged files, ConfigError for a tokenizer that is not plain byte-level BPE.
    """
    name = files.find(FILE)
    if not files.has(name):
        return _from_vocabulary(files)
    text = files.text(name, MAX_TOKENIZER_BYTES) or ""
    _check(files.settings(name, MAX_TOKENIZER_BYTES), name)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as problem:
        if not is_library_error(problem):
            raise
        raise CheckpointError(f"{name} is damaged ({problem}). Download the checkpoint again.") from None


def is_library_error(problem: BaseException) -> bool:
    """Whether `problem` is an error of the `tokenizers` library: an Exception, or a panic, which is a BaseException."""
    return isinstance(problem, Exception) or type(problem).__name__ == "PanicException"


def _check(values: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError, naming the file, for anything that is not plain and deterministic byte-level BPE."""
    model, added = values.get("model"), values.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise ConfigError(f"{name} holds a model of the kind {shown(kind)}; this runtime reads BPE only.")
    if model.get("dropout"):
        raise ConfigError(
            f"{name} has a BPE dropout of {shown(model['dropout'])}, so a text would get other tokens each time. "
            "Set it to null."
        )
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
        raise ConfigError(f"{name} must have a list of at most {MAX_ADDED_TOKENS} added_tokens.")
    for step in _steps(values.get("normalizer"), "normalizers"):
        if step != {"type": "NFC"}:
            raise ConfigError(f"{name} has a normalizer other than NFC ({_kind(step)}), which is not supported.")
    steps = list(_steps(values.get("pre_tokenizer"), "pretokenizers"))
    if not steps or _kind(steps[-1]) != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        raise ConfigError(f"{name} must have a pre-tokenizer that ends with ByteLevel and adds no space in front.")
    for step in steps[:-1]:
        plain = _kind(step) == "Split" and step.get("behavior") == "Isolated" and step.get("invert") is False
        if not plain or step.get("pattern") not in [{"Regex": split} for split in SPLITS]:
            raise ConfigError(
                f"{name} has a pre-tokenizer ({_kind(step)}) that does not split words as Qwen2, Llama 3 or GPT-2 do; "
                "it is not supported."
            )
    for section in ("post_processor", "decoder"):  # neither is used, but the library compiles their regular expressions
        if any(expression not in SPLITS for expression in _expressions(values.get(section))):
            raise ConfigError(f"{name} has a {section} with an unknown regular expression, which is not supported.")


def _steps(value: Any, key: str) -> Iterator[Any]:
    """The steps of a normalizer or pre-tokenizer in order; nested sequences, under `key`, are flattened."""
    if isinstance(value, dict) and value.get("type") == "Sequence" and isinstance(value.get(key), list):
        for step in value[key]:
            yield from _steps(step, key)
    elif value is not None:
        yield value


def _kind(step: Any) -> str:
    return str(step.get("type"))[:40] if isinstance(step, dict) else shown(step)


def _expressions(value: Any) -> Iterator[Any]:
    """Every value under a key `Regex`, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex":
                yield inner
            yield from _expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _expressions(inner)


def _from_vocabulary(files: CheckpointFolder) -> tokenizers.Tokenizer:
    """The Qwen2 tokenizer of vocab.json, merges.txt and the added tokens in tokenizer_config.json."""
    names = [files.find(name) for name in ("vocab.json", "merges.txt")]
    if not all(map(files.has, names)):
        raise CheckpointError(
            f"there is no {FILE} in {files.path}, nor vocab.json with merges.txt. Download the checkpoint's."
        )
    vocabulary = dict(files.settings(names[0], MAX_TOKENIZER_BYTES))
    lines = (files.text(names[1], MAX_TOKENIZER_BYTES) or "").split("\n")
    merges = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except BaseException as problem:
        if not is_library_error(problem):
            raise
        raise CheckpointError(f"{' and '.join(names)} do not fit ({problem}). Download both again.") from None
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    name = files.find("tokenizer_config.json")
    listed = files.settings(name).get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not 0 < len(listed) <= MAX_ADDED_TOKENS:
        raise ConfigError(f"{name} must list 1 to {MAX_ADDED_TOKENS} added tokens under added_tokens_decoder.")
    for index, token in sorted(listed.items(), key=lambda item: (len(item[0]), item[0])):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content:
            raise ConfigError(f"{name} has an added token {shown(index)} without a content.")
        spaced = {flag: token.get(flag) is True for flag in ("lstrip", "rstrip", "single_word", "special")}
        backend.add_tokens([AddedToken(content, normalized=False, **spaced)])
        if str(backend.token_to_id(content)) != index:
            raise ConfigError(
                f"{name} gives {shown(content)} the id {shown(index)}, but after {names[0]} it is number "
                f"{backend.token_to_id(content)}. Use the files of one checkpoint."
            )
    return backend
