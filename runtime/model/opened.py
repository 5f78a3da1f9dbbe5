"""A checkpoint, opened once: a folder of safetensors files, or GGUF files."""

from collections.abc import Container
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from ...quant.recipe import Recipe
from ..checkpoint_folder import MODELOPT_FILE, CheckpointFolder
from ..errors import ConfigError
from .bitsandbytes_checkpoint import from_bitsandbytes, is_bitsandbytes
from .checkpoint import Checkpoint
from .config import ModelConfig
from .gguf_checkpoint import gguf_files, open_gguf

LM_HEAD = ("decoder.lm_head.weight", "decoder.lm_head.weight_codes")
"""Tensors that a tied model does not store."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """Settings and texts of a checkpoint, its weights, and the config of the model. imported: whether another program
    packed the weights."""

    files: CheckpointFolder
    weights: Checkpoint
    config: ModelConfig
    imported: bool = False

    @property
    def folder(self) -> Path:
        """The folder, or the GGUF file."""
        return self.files.path


def open_checkpoint(path: str | PathLike[str]) -> OpenCheckpoint:
    """Read the config and the headers of the weights of a folder or GGUF file.

    See `gguf_checkpoint` and `bitsandbytes_checkpoint` for weights that other programs packed. Raises CheckpointError
    or ConfigError. The config is that of `with_stored_head`.
    """
    found = gguf_files(Path(path))
    if found:
        package = open_gguf(Path(path), found)
        return _imported(package.files, package.weights, package.recipe)
    files = CheckpointFolder(path)
    weights = Checkpoint.open(path)
    if is_bitsandbytes(files):
        return _imported(files.without("config.json", "quantization_config"), *from_bitsandbytes(weights))
    if files.has(MODELOPT_FILE) and "quantization_config" not in files.settings("config.json"):
        raise ConfigError(
            f"{path} has weights quantized by ModelOpt, as its {MODELOPT_FILE} says; `afnext quantize` imports those "
            "in fp8 and nvfp4, for others use the dense ones"
        )
    return OpenCheckpoint(files, weights, with_stored_head(ModelConfig.from_folder(files), weights))


def _imported(files: CheckpointFolder, weights: Checkpoint, recipe: Recipe | None) -> OpenCheckpoint:
    config = replace(ModelConfig.from_folder(files), quantization=recipe)
    return OpenCheckpoint(files, weights, with_stored_head(config, weights), recipe is not None)


def stored_config(path: str | PathLike[str]) -> ModelConfig:
    """The config of a folder, which need not have weights, or of a GGUF file. Raises the errors of
    `open_checkpoint`."""
    folder = Path(path)
    if folder.is_dir() and not gguf_files(folder) and not is_bitsandbytes(CheckpointFolder(folder)):
        return ModelConfig.from_folder(folder)
    return open_checkpoint(path).config


def with_stored_head(config: ModelConfig, stored: Container[str]) -> ModelConfig:
    """The config, untied if a separate head is stored: the reference uses that head whatever the flag says."""
    if not config.decoder.tie_word_embeddings or not any(name in stored for name in LM_HEAD):
        return config
    return replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
