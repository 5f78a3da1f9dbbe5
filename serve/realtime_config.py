"""The session objects of realtime clients: defaults, partial updates, and refused values."""

from typing import Any, Literal, TypeVar

import msgspec

from .chat import Sampling
from .errors import ApiError, unsupported
from .speech import PCM_RATE

T = TypeVar("T", bound=msgspec.Struct)

_LEAST_RATE, _MOST_RATE = 8000, 48000
_READ_ONLY = ("id", "object", "expires_at", "client_secret", "afnext")


class Format(msgspec.Struct, forbid_unknown_fields=True):
    """How audio is encoded. rate: in Hz; 24000 if it is not given, 8000 for G.711."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int | None = None

    @property
    def hertz(self) -> int:
        """Samples per second."""
        return self.rate or (PCM_RATE if self.type == "audio/pcm" else 8000)


class Transcription(msgspec.Struct, forbid_unknown_fields=True):
    """How committed audio is transcribed. With timestamps or speakers there are segment events, too; the other fields
    mean what they mean in /v1/audio/transcriptions."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    timestamps: bool | None = None
    speakers: bool | None = None


class TurnDetection(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["server_vad"] = "server_vad"
    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class Input(msgspec.Struct, forbid_unknown_fields=True):
    format: Format = msgspec.field(default_factory=Format)
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = None
    noise_reduction: None = None


class Output(msgspec.Struct, forbid_unknown_fields=True):
    """How answers are spoken. A server has one voice and uses it whatever voice the client requests."""

    format: Format = msgspec.field(default_factory=Format)
    voice: Any = None
    speed: float = 1.0


class SessionAudio(msgspec.Struct, forbid_unknown_fields=True):
    input: Input = msgspec.field(default_factory=Input)
    output: Output = msgspec.field(default_factory=Output)


class Session(msgspec.Struct, forbid_unknown_fields=True):
    """The settings of a session. A field that the model does not support has one allowed value."""

    type: Literal["realtime", "transcription"] = "realtime"
    model: str | None = None
    instructions: str = ""
    output_modalities: list[Literal["text", "audio"]] = msgspec.field(default_factory=lambda: ["text"])
    audio: SessionAudio = msgspec.field(default_factory=SessionAudio)
    max_output_tokens: int | Literal["inf"] = "inf"
    tools: list[None] = msgspec.field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"
    include: list[None] | None = None
    prompt: None = None
    truncation: Any = None
    tracing: Any = None
    reasoning: Any = None


class ResponseOptions(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Options of one response; `instructions` are added to the question."""

    instructions: str | None = None
    input: list[dict[str, Any]] | None = None
    conversation: Literal["auto", "none"] = "auto"
    max_output_tokens: int | Literal["inf"] | None = None
    output_modalities: list[Literal["text", "audio"]] | None = None
    metadata: dict[str, str] | None = None
    tools: list[None] | None = None
    tool_choice: Literal["auto", "none"] = "auto"
    audio: Any = None


def first_session(kind: Literal["realtime", "transcription"]) -> Session:
    """The settings before the client changes any. Transcription commits audio at pauses in the speech; a realtime
    session listens until the client asks for a response."""
    session = Session(type=kind)
    if kind == "transcription":
        session.audio.input.transcription = Transcription()
        session.audio.input.turn_detection = TurnDetection()
    return session


def updated(session: Session, changes: Any) -> Session:
    """A copy of the session with `changes` applied. Raises ApiError that names the wrong field."""
    if not isinstance(changes, dict):
        raise ApiError(400, "invalid_value", "session has to be an object", param="session")
    changes = {name: value for name, value in changes.items() if name not in _READ_ONLY}
    changed = converted(_merged(msgspec.to_builtins(session), changes), Session, "session")
    sound, detection = changed.audio.input.format, changed.audio.input.turn_detection
    for where, used in (("input", sound), ("output", changed.audio.output.format)):
        rates = (_LEAST_RATE, _MOST_RATE) if used.type == "audio/pcm" else (8000, 8000)
        if not rates[0] <= used.hertz <= rates[1]:
            problem = f"{used.type} has a rate from {rates[0]} to {rates[1]} Hz, not {used.hertz}"
            raise unsupported(f"session.audio.{where}.format.rate", problem)
    if detection is not None:
        for name, most in (("threshold", 1), ("prefix_padding_ms", 10_000), ("silence_duration_ms", 60_000)):
            if not 0 <= getattr(detection, name) <= most:
                raise unsupported(f"session.audio.input.turn_detection.{name}", f"{name} has to be from 0 to {most}")
    return changed


def converted(values: Any, kind: type[T], where: str) -> T:
    """Convert values to a struct. where: the field that holds them. Raises ApiError that names the wrong field."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = f"{where}{path.removesuffix('`')}"
        raise ApiError(400, "invalid_value", f"{param}: {message}", param=param) from None


def _merged(old: Any, new: Any) -> Any:
    """`new` over `old`, object by object. An object of another type replaces the old one."""
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("type", old.get("type")) != old.get("type"):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}
