"""A fast, exact inference runtime for NVIDIA's Audio Flamingo Next.

>>> import afnext
>>> model = afnext.load("nvidia/audio-flamingo-next-hf")
>>> answer = model.ask("meeting.mp3", "Who speaks first, and about what?")
>>> print(answer.text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afnext.kernels.devices import DeviceError
    from afnext.kernels.dispatch import backend
    from afnext.kernels.errors import AfnextError, BackendError
    from afnext.quant.importers import ImportFormatError
    from afnext.quant.scheme import SchemeError
    from afnext.runtime.app import prompts
    from afnext.runtime.app.answer import Answer, Piece, Usage
    from afnext.runtime.app.api import Model, load
    from afnext.runtime.app.async_model import AsyncListening, AsyncModel, AsyncStream
    from afnext.runtime.app.calibration import CalibrationError
    from afnext.runtime.app.context import Context
    from afnext.runtime.app.lifetime import CopyError
    from afnext.runtime.app.live import Live
    from afnext.runtime.app.responder import Stream
    from afnext.runtime.app.transcribe import Transcript, TranscriptStream
    from afnext.runtime.engine.options import EngineOptions
    from afnext.runtime.errors import (
        AudioError,
        AudioTooLongError,
        CheckpointError,
        ConfigError,
        ContextFileError,
        ContextLengthError,
        EngineDeadError,
        EngineError,
        GroupError,
        InsufficientMemoryError,
        MemoryPlanError,
        NonFiniteError,
        OutOfPagesError,
        OutputError,
        PromptError,
        RequestError,
        SamplingError,
        WorkerLostError,
    )
    from afnext.runtime.io.audio import Audio, load_audio
    from afnext.runtime.io.segments import Segment

__version__ = "0.1.0"
__all__ = [
    "AfnextError",
    "Answer",
    "AsyncListening",
    "AsyncModel",
    "AsyncStream",
    "Audio",
    "AudioError",
    "AudioTooLongError",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Context",
    "ContextFileError",
    "ContextLengthError",
    "CopyError",
    "DeviceError",
    "EngineDeadError",
    "EngineError",
    "EngineOptions",
    "GroupError",
    "ImportFormatError",
    "InsufficientMemoryError",
    "Live",
    "MemoryPlanError",
    "Model",
    "NonFiniteError",
    "OutOfPagesError",
    "OutputError",
    "Piece",
    "PromptError",
    "RequestError",
    "SamplingError",
    "SchemeError",
    "Segment",
    "Stream",
    "Transcript",
    "TranscriptStream",
    "Usage",
    "WorkerLostError",
    "backend",
    "load",
    "load_audio",
    "prompts",
]

# The module of each name above, imported when the name is first used: `afnext --help` then needs no torch.
_MODULES = {
    "AfnextError": "kernels.errors",
    "Answer": "runtime.app.answer",
    "AsyncListening": "runtime.app.async_model",
    "AsyncModel": "runtime.app.async_model",
    "AsyncStream": "runtime.app.async_model",
    "Audio": "runtime.io.audio",
    "AudioError": "runtime.errors",
    "AudioTooLongError": "runtime.errors",
    "BackendError": "kernels.errors",
    "CalibrationError": "runtime.app.calibration",
    "CheckpointError": "runtime.errors",
    "ConfigError": "runtime.errors",
    "Context": "runtime.app.context",
    "ContextFileError": "runtime.errors",
    "ContextLengthError": "runtime.errors",
    "CopyError": "runtime.app.lifetime",
    "DeviceError": "kernels.devices",
    "EngineDeadError": "runtime.errors",
    "EngineError": "runtime.errors",
    "EngineOptions": "runtime.engine.options",
    "GroupError": "runtime.errors",
    "ImportFormatError": "quant.importers",
    "InsufficientMemoryError": "runtime.errors",
    "Live": "runtime.app.live",
    "MemoryPlanError": "runtime.errors",
    "Model": "runtime.app.api",
    "NonFiniteError": "runtime.errors",
    "OutOfPagesError": "runtime.errors",
    "OutputError": "runtime.errors",
    "Piece": "runtime.app.answer",
    "PromptError": "runtime.errors",
    "RequestError": "runtime.errors",
    "SamplingError": "runtime.errors",
    "SchemeError": "quant.scheme",
    "Segment": "runtime.io.segments",
    "Stream": "runtime.app.responder",
    "Transcript": "runtime.app.transcribe",
    "TranscriptStream": "runtime.app.transcribe",
    "Usage": "runtime.app.answer",
    "WorkerLostError": "runtime.errors",
    "backend": "kernels.dispatch",
    "load": "runtime.app.api",
    "load_audio": "runtime.io.audio",
    "prompts": "runtime.app.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    value = module if _MODULES[name].endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
