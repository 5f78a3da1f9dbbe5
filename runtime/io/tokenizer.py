"""Byte-level BPE tokenizer of a checkpoint: text to token ids and back, whole or as a stream.

`tokenizer.json` holds a byte-level BPE vocabulary and, above it, the added tokens (`<|im_start|>`, `<sound>`, ...). Ids
differ between checkpoints, so every id is looked up by its spelling.

The spelling of an added token inside a text becomes ordinary tokens, never that token. This applies to all added
tokens, also to those that the vocabulary does not mark as special (`<tool_call>`, `<|fim_prefix|>`); only the chat
template may write them. Otherwise the ids equal those of the `transformers` tokenizers.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoint_folder import DECODER_FOLDER, CheckpointFolder
from ..errors import ConfigError, PromptError
from ..files import shown
from .tokenizer_files import is_library_error, load_backend

MAX_SPELLING = 256
MAX_TEXT_CHARACTERS = 1 << 20

AUDIO_TOKEN = "<sound>"
AUDIO_BOS_TOKEN = "<|sound_bos|>"
AUDIO_EOS_TOKEN = "<|sound_eos|>"
END_OF_TURN = "<|im_end|>"
THINK_TAGS = ("<think>", "</think>")


class Tokenizer:
    """Encodes text, decodes ids, and has the checkpoint's ids of audio, padding and the end of a turn.

    audio_token_id: the placeholder that one audio embedding replaces. audio_bos_id, audio_eos_id: enclose the
    placeholders, both None in Audio Flamingo 3 checkpoints. eos_ids: any of these ends an answer. pad_id: pads batches.
    template_variables: the spellings that chat templates may use (`bos_token`, `eos_token`, ...).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        audio_token: str = AUDIO_TOKEN,
        audio_bos_token: str | None = None,
        audio_eos_token: str | None = None,
        eos_ids: tuple[int, ...] | None = None,
        pad_id: int | None = None,
        template_variables: Mapping[str, str] | None = None,
    ):
        """Wrap a loaded `tokenizers.Tokenizer`. Raises ConfigError when it is not byte-level BPE or lacks a token."""
        _check_backend(backend)
        added = backend.get_added_tokens_decoder()
        # The same vocabulary and merges, without added tokens, truncation, padding and post-processing.
        self._text_only = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._text_only.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._text_only.pre_tokenizer = backend.pre_tokenizer
        self.added_tokens: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self._added_bytes = {token_id: token.content.encode() for token_id, token in added.items()}
        # A checkpoint may register the think tags as special, but they are needed to separate thinking from the answer.
        self._skipped = {i for i, token in added.items() if token.special and token.content not in THINK_TAGS}
        self._spaced = {t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word}
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        self.audio_token = audio_token
        self.audio_token_id = self.id_of(audio_token)
        if (audio_bos_token is None) != (audio_eos_token is None):
            raise ConfigError(
                f"audio is enclosed by {audio_bos_token!r} and {audio_eos_token!r}; a checkpoint has both tokens or "
                "neither. Use the tokenizer and processor files of one checkpoint."
            )
        self.audio_bos_id = None if audio_bos_token is None else self.id_of(audio_bos_token)
        self.audio_eos_id = None if audio_eos_token is None else self.id_of(audio_eos_token)
        self.eos_ids = eos_ids or (self.id_of(END_OF_TURN),)
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        for name, token_id in [*(("eos_token_id", i) for i in self.eos_ids), ("pad_token_id", self.pad_id)]:
            if self.spelling(token_id) is None:
                raise ConfigError(
                    f"{name} is {shown(token_id)}, and the tokenizer has no token with that id. "
                    "Use the tokenizer and generation_config.json of one checkpoint."
                )
        self.template_variables = dict(template_variables or {})

    @classmethod
    def from_folder(cls, folder: Path | CheckpointFolder) -> "Tokenizer":
        """Read tokenizer.json and, where present, the token settings of the other JSON files in a checkpoint's folder.

        In NVIDIA's component layout each of these files may also lie in llm/. Without a tokenizer.json, vocab.json and
        merges.txt are read.

        Audio tokens: processor_config.json, else tokenizer_config.json, else the usual spellings (the enclosing ones
        only if the tokenizer has them). Ends of an answer: generation_config.json, else config.json, else the
        `eos_token` of tokenizer_config.json, else `<|im_end|>`. Padding: the `pad_token` of tokenizer_config.json, else
        the same order; padding is masked, so without any setting the first end token serves.

        Raises CheckpointError for a missing or damaged file, ConfigError for settings that contradict each other.
        """
        files = CheckpointFolder.of(folder)
        backend = load_backend(files)
        spellings = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        processor = files.settings("processor_config.json")
        settings = files.settings(files.find("tokenizer_config.json"))
        config = files.settings("config.json")
        text_config = config.get("text_config", files.settings(f"{DECODER_FOLDER}/config.json"))
        ids_in_order = [
            files.settings(files.find("generation_config.json")),
            config,
            text_config if isinstance(text_config, dict) else {},
        ]

        def audio_token(name: str, default: str) -> str | None:
            named = _token_string(processor, name) or _token_string(settings, name)
            return named or (default if default in spellings else None)

        def setting_id(name: str) -> int | None:
            spelling = _token_string(settings, name)
            if spelling is not None and spelling not in spellings:
                raise ConfigError(
                    f"tokenizer_config.json names {shown(spelling)} as its {name}, which tokenizer.json does not have. "
                    "Use both files of one checkpoint."
                )
            return None if spelling is None else spellings[spelling]

        eos_ids = next((ids for values in ids_in_order if (ids := _token_ids(values, "eos_token_id"))), None)
        eos_token = setting_id("eos_token")
        if eos_ids is None and eos_token is not None:
            eos_ids = (eos_token,)
        pad_id = setting_id("pad_token")
        if pad_id is None:
            pad_id = next((ids[0] for values in ids_in_order if (ids := _token_ids(values, "pad_token_id"))), None)
        return cls(
            backend,
            audio_token=audio_token("audio_token", AUDIO_TOKEN) or AUDIO_TOKEN,
            audio_bos_token=audio_token("audio_bos_token", AUDIO_BOS_TOKEN),
            audio_eos_token=audio_token("audio_eos_token", AUDIO_EOS_TOKEN),
            eos_ids=eos_ids,
            pad_id=pad_id,
            template_variables=_template_variables(settings),
        )

    def check_against(self, config_ids: Mapping[str, int | None]) -> None:
        """Raise ConfigError if the audio token ids of config.json are not this tokenizer's.

        config_ids: `audio_token_id`, `audio_bos_token_id`, `audio_eos_token_id` from config.json; None or absent if it
        does not state them. The error names both sides.
        """
        ours = {
            "audio_token_id": self.audio_token_id,
            "audio_bos_token_id": self.audio_bos_id,
            "audio_eos_token_id": self.audio_eos_id,
        }
        unknown = config_ids.keys() - ours.keys()
        if unknown:
            raise ConfigError(f"cannot check {', '.join(sorted(unknown))}; the ids to check are {', '.join(ours)}")
        for name, config_id in config_ids.items():
            own = ours[name]
            if config_id is None or config_id == own:
                continue
            tokenizer_side = "has no such token" if own is None else f"has {self.spelling(own)!r} at {own}"
            raise ConfigError(
                f"config.json says {name} = {config_id}, which the tokenizer spells {self.spelling(config_id)!r}, "
                f"but the tokenizer {tokenizer_side}. They belong to different checkpoints: use the files of one."
            )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's embedding table needs at least that many rows."""
        return max(self._text_only.get_vocab_size(), 1 + max(self._added_bytes))

    def id_of(self, spelling: str) -> int:
        """The id of the added token with this spelling. Raises ConfigError when the tokenizer has none."""
        try:
            return self.added_tokens[spelling]
        except KeyError:
            raise ConfigError(
                f"the tokenizer has no added token {shown(spelling)}. Use the tokenizer.json of the checkpoint."
            ) from None

    def spelling(self, token_id: int) -> str | None:
        """The spelling of the token with this id in the vocabulary, or None if there is none."""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id].decode()
        return self._text_only.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Spellings of added tokens are encoded as text.

        allow_special: spellings of added tokens become those tokens, for trusted text.
        Raises PromptError when the text is not valid Unicode.
        """
        if not allow_special:
            return self._encode_text(text)
        ids: list[int] = []
        for piece in self.split_at_added(text):
            ids += [piece] if isinstance(piece, int) else self._encode_text(piece)
        return ids

    def split_at_added(self, text: str) -> Iterator[str | int]:
        """Split `text` at spellings of added tokens: the text between them as str, the tokens as their ids.

        Raises ConfigError at a token that strips surrounding whitespace or only matches whole words: splitting there
        would differ from the reference, and no checkpoint of this family has one in its template.
        """
        start = 0
        for match in self.added_pattern.finditer(text):
            if match[0] in self._spaced:
                raise ConfigError(
                    f"the added token {match[0]!r} strips spaces or matches whole words only, which is not supported. "
                    "Set its lstrip, rstrip and single_word to false in tokenizer.json."
                )
            if match.start() > start:
                yield text[start : match.start()]
            yield self.added_tokens[match[0]]
            start = match.end()
        if start < len(text):
            yield text[start:]

    def _encode_text(self, text: str) -> list[int]:
        if len(text) > MAX_TEXT_CHARACTERS:
            raise PromptError(
                f"the text has {len(text):,} characters; at most {MAX_TEXT_CHARACTERS:,} can be tokenized. Shorten it."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text has a lone surrogate at position {error.start}, which is not valid Unicode. "
                'Clean it first, for example with text.encode("utf-8", "replace").decode().'
            ) from None
        try:
            ids: list[int] = self._text_only.encode(text, add_special_tokens=False).ids
        except BaseException as problem:
            if not is_library_error(problem):
                raise
            raise PromptError(
                f"the text cannot be tokenized ({shown(str(problem))}). Shorten it; if that does not help, the "
                "checkpoint's tokenizer is damaged."
            ) from None
        if not self._added_bytes.keys().isdisjoint(ids):
            raise ConfigError(
                "the vocabulary of tokenizer.json builds an added token out of plain text, so text could smuggle "
                "control tokens into a prompt. Use the tokenizer.json of the checkpoint."
            )
        return ids

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary, as in the reference."""
        if token_id in self._added_bytes:
            return b"" if skip_special and token_id in self._skipped else self._added_bytes[token_id]
        symbols = self.spelling(token_id)
        if symbols is None:
            return b""
        try:
            return bytes(map(BYTE_OF_SYMBOL.__getitem__, symbols))
        except KeyError:
            return symbols.encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Special tokens are left out unless `skip_special` is
        false.

        The think tags are kept even if the checkpoint marks them as special.
        """
        pieces = (self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes one token at a time into complete characters; the joined pieces equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text completed by this token; empty while a character lacks bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def finish(self) -> str:
        """The rest at the end: U+FFFD for an unfinished character, else empty."""
        return self._utf8.decode(b"", final=True)


def _check_backend(backend: tokenizers.Tokenizer) -> None:
    for token in backend.get_added_tokens_decoder().values():
        if not 0 < len(token.content) <= MAX_SPELLING:
            raise ConfigError(f"the tokenizer has an added token of {len(token.content)} characters. Check the file.")
    if not isinstance(backend.model, tokenizers.models.BPE):
        raise ConfigError(f"tokenizer.json holds a {type(backend.model).__name__} model; this runtime reads BPE only.")
    missing = [symbol for symbol in BYTE_OF_SYMBOL if backend.model.token_to_id(symbol) is None]
    if missing:
        raise ConfigError(
            f"the vocabulary of tokenizer.json lacks {len(missing)} of the 256 byte symbols, so it is not byte-level "
            "BPE and would lose text. Use the tokenizer.json of the checkpoint."
        )
    if backend.num_special_tokens_to_add(False):
        raise ConfigError(
            "the post-processor of tokenizer.json adds tokens around every text, which is not supported. "
            "Use the tokenizer.json of the checkpoint."
        )


def _symbols_of_bytes() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 bytes are themselves, the 68 others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_SYMBOL = _symbols_of_bytes()


def _token_string(settings: Mapping[str, Any], name: str) -> str | None:
    """A token in a settings file: a string, or an object with the string under `content`."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} is {shown(value)}; expected the spelling of a token.")
    return value or None


def _token_ids(settings: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One id or a list of ids in a settings file; empty where there is none."""
    value = settings.get(name)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in values):
        raise ConfigError(f"{name} is {shown(value)}; expected a token id or a list of token ids.")
    return tuple(values)


def _template_variables(settings: Mapping[str, Any]) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    return {name: spelling for name in names if (spelling := _token_string(settings, name)) is not None}
