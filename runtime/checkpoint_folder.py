"""The settings and text files of a checkpoint folder, each opened at most once."""

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError
from .files import parse_json_object, read_bytes

MAX_SETTINGS_BYTES = 1 << 22
MAX_TOKENIZER_BYTES = 1 << 26
MODELOPT_FILE = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt describes its quantization, beside config.json or in place of its quantization_config."""
DECODER_FOLDER = "llm"
"""The folder of the decoder, the tokenizer and its settings in NVIDIA's component layout."""


class CheckpointFolder:
    """Reads the JSON and text files of one checkpoint folder and keeps what it has read.

    path: the folder. One object is meant for one load, so that config, tokenizer, template and weights are read from
    the same state of the files. Returned mappings are shared: do not change them.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._contents: dict[str, bytes] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, folder: "str | PathLike[str] | CheckpointFolder") -> "CheckpointFolder":
        """`folder` itself if it is one already, else a new object for that path."""
        return folder if isinstance(folder, CheckpointFolder) else cls(folder)

    def has(self, name: str) -> bool:
        """Whether the folder has an entry of this name, of any kind; a broken link counts."""
        return name in self._contents or os.path.lexists(self.path / name)

    def find(self, name: str) -> str:
        """`name`, or `llm/name` where only that exists: the component layout keeps some files beside its decoder."""
        inner = f"{DECODER_FOLDER}/{name}"
        return inner if not self.has(name) and self.has(inner) else name

    def text(self, name: str, max_bytes: int) -> str | None:
        """The UTF-8 text of a file, None if there is no such file.

        Raises CheckpointError if it is not a regular file, cannot be read, is longer than `max_bytes`, or not UTF-8.
        """
        data = self._read(name, max_bytes, CheckpointError)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise CheckpointError(f"{name} is not UTF-8 text ({problem}); download or save it again.") from None

    def settings(self, name: str, max_bytes: int = MAX_SETTINGS_BYTES) -> Mapping[str, Any]:
        """The JSON object in a file, empty if there is no such file.

        Raises ConfigError if it cannot be read, as for `text`, or is not one JSON object without repeated keys.
        """
        if name not in self._settings:
            data = self._read(name, max_bytes, ConfigError)
            self._settings[name] = {} if data is None else parse_json_object(data, name, ConfigError)
        return self._settings[name]

    def without(self, name: str, key: str) -> "CheckpointFolder":
        """This folder, as if the JSON object in the file `name` had no such key."""
        folder = CheckpointFolder(self.path)
        folder._settings[name] = {other: value for other, value in self.settings(name).items() if other != key}
        return folder

    def _read(self, name: str, max_bytes: int, error: type[CheckpointError]) -> bytes | None:
        if name not in self._contents:
            if not self.has(name):
                return None
            self._contents[name] = read_bytes(self.path / name, name, error, max_bytes)
        return self._contents[name]


class EmbeddedFiles(CheckpointFolder):
    """The settings and texts that are embedded in a single file.

    path: that file; contents: by name.
    """

    def __init__(self, path: str | PathLike[str], contents: Mapping[str, bytes]) -> None:
        super().__init__(path)
        self.contents = contents

    def has(self, name: str) -> bool:
        """Whether the file has an entry of this name."""
        return name in self.contents

    def _read(self, name: str, max_bytes: int, error: type[CheckpointError]) -> bytes | None:
        data = self.contents.get(name)
        if data is not None and len(data) > max_bytes:
            raise error(
                f"{name} in {self.path.name} is longer than {max_bytes:,} bytes, more than such a file ever needs."
            )
        return data
