"""Errors of the runtime, all subclasses of `AfnextError`; each message says what was wrong and what to do."""

from ..kernels.errors import AfnextError


class AudioError(AfnextError):
    """The audio cannot be read, is empty, or does not fit the model."""


class AudioTooLongError(AudioError):
    """The audio is longer than the model accepts, and truncation was not requested."""


class CheckpointError(AfnextError):
    """A file of the checkpoint is missing, damaged, unsafe, or does not fit the config."""


class ConfigError(CheckpointError):
    """config.json describes no model that this runtime knows, or contradicts itself or the tokenizer."""


class PromptError(AfnextError):
    """The messages cannot be turned into a prompt."""


class RequestError(AfnextError):
    """A request of a batch is malformed, or the model cannot serve it."""


class ContextLengthError(AfnextError):
    """Prompt and answer together do not fit the model's context."""


class ContextFileError(AfnextError):
    """A saved context cannot be read or written, is damaged, or belongs to another model."""


class OutputError(AfnextError):
    """A file, a folder or standard output cannot be written."""


class OutOfPagesError(AfnextError):
    """The KV cache has too few free pages."""


class SamplingError(AfnextError):
    """A sampling parameter is out of its range."""


class MemoryPlanError(AfnextError):
    """A memory plan has values that no device or model has, or the model does not fit the available memory."""


class InsufficientMemoryError(AfnextError):
    """An allocation failed while a request was computed."""


class NonFiniteError(AfnextError):
    """The model computed scores that are NaN or infinite."""


class EngineError(AfnextError):
    """A step of the engine failed for a reason other than the request. The request may be sent again."""


class EngineDeadError(EngineError):
    """The engine cannot compute any more in this process."""


class GroupError(EngineError):
    """Another process of a model that runs in several processes has ended, or did not answer."""


class WorkerLostError(AfnextError):
    """The processes that worked on an item of a batch have ended."""
