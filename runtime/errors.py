"""Errors of the runtime, all subclasses of `AfnextError`; each message says what was wrong and what to do."""

from ..kernels.errors import AfnextError


class AudioError(AfnextError):
    """The audio cannot be read, is empty, or does not fit the model."""


class AudioTooLongError(AudioError):
    """The audio is longer than the model can hear, and truncation was not asked for."""


class CheckpointError(AfnextError):
    """A file of the checkpoint is missing, damaged, unsafe, or does not fit the config."""


class ConfigError(CheckpointError):
    """config.json describes no model that this runtime knows, or contradicts itself or the tokenizer."""


class PromptError(AfnextError):
    """The messages cannot be turned into a prompt."""


class ContextLengthError(AfnextError):
    """Prompt and answer together do not fit the model's context."""


class ContextFileError(AfnextError):
    """A saved context cannot be read or written, is damaged, or belongs to another model."""


class OutOfPagesError(AfnextError):
    """The KV cache has too few free pages."""


class SamplingError(AfnextError):
    """A sampling parameter is out of its range."""


class MemoryPlanError(AfnextError):
    """A memory plan asks for what no device or model has, or the model does not fit the memory that is there."""
