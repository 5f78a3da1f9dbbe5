"""A fast, exact inference runtime for NVIDIA's Audio Flamingo Next.

>>> import afnext
>>> model = afnext.load("nvidia/audio-flamingo-next-hf")
>>> answer = model.ask("meeting.mp3", "Who speaks first, and about what?")
>>> print(answer.text)
"""

from afnext.kernels import backend
from afnext.kernels.errors import AfnextError
from afnext.runtime.app.answer import Answer, Piece, Usage
from afnext.runtime.app.api import Model, load
from afnext.runtime.app.context import Context
from afnext.runtime.app.live import Live
from afnext.runtime.app.responder import Stream
from afnext.runtime.app.transcribe import Transcript
from afnext.runtime.io.audio import Audio, load_audio
from afnext.runtime.io.segments import Segment

__version__ = "0.1.0"
__all__ = [
    "AfnextError",
    "Answer",
    "Audio",
    "Context",
    "Live",
    "Model",
    "Piece",
    "Segment",
    "Stream",
    "Transcript",
    "Usage",
    "backend",
    "load",
    "load_audio",
]
