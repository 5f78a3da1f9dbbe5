"""Spoken answers: an answer is spoken sentence by sentence while the model still generates the rest.

The AF-Next article describes a streaming speech model for voice chats, whose weights are not released. A `Speaker`
replaces it: Piper's voices, or any program that turns text into a WAV file.
"""

import asyncio
import io
import logging
import re
import shlex
import shutil
import wave
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr

from ..kernels.errors import AfnextError
from ..runtime.app.answer import Piece

_log = logging.getLogger("afnext.serve")
PCM_RATE = 24000  # Hz; the default of OpenAI's clients
_SHORTEST, _LONGEST = 12, 300  # characters that are spoken at once
_SENTENCE_SECONDS = 60.0
_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[”’」』）]*|\n\s*")
_PAUSE = re.compile(r"[,;:、，；：]\s*|\s+")
_TIME = r"\d{1,2}(?::\d{2}){1,2}(?:[.,]\d+)?"
_SILENT = re.compile(rf"\[\s*{_TIME}(?:\s*-+>?\s*{_TIME})?\s*\]|[*_#`<>\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CHECK = "Ready."


class SpeechError(AfnextError):
    """The speaker failed on a text."""


class Speaker(Protocol):
    """Turns text into sound."""

    @property
    def name(self) -> str:
        """The voice's name for clients."""

    async def speak(self, text: str) -> tuple[np.ndarray, int]:
        """The sound of a sentence: samples, int16 [n], and their rate in Hz. Raises SpeechError; may be cancelled."""


class CommandSpeaker:
    """A program that reads text from its standard input and writes a WAV file of 16 bits to its standard output, such
    as `espeak-ng --stdin --stdout`. It is started once per sentence."""

    def __init__(self, command: str):
        """command: the program and its arguments, quoted as for a shell, which is not used. Raises SpeechError if the
        program does not exist."""
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise SpeechError(f"the speaker's command {command!r} cannot be read: {error}") from None
        if not self._command or shutil.which(self._command[0]) is None:
            raise SpeechError(
                f"the speaker's command {command!r} does not start with a program of this machine;"
                " use one that is installed, or piper:VOICE.onnx"
            )

    @property
    def name(self) -> str:
        """See `Speaker`."""
        return Path(self._command[0]).stem

    async def speak(self, text: str) -> tuple[np.ndarray, int]:
        """See `Speaker`."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise SpeechError(f"{self.name} cannot be started: {error}") from None
        try:
            sound, said = await asyncio.wait_for(process.communicate(text.encode()), _SENTENCE_SECONDS)
        except asyncio.TimeoutError:
            raise SpeechError(f"{self.name} took more than {_SENTENCE_SECONDS:.0f} s for a sentence") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            reason = said.decode(errors="replace").strip()[-200:]
            raise SpeechError(f"{self.name} ended with status {process.returncode}: {reason}")
        return wav_samples(sound, self.name)


class PiperSpeaker:
    """A voice of Piper (package piper-tts), which runs on the CPU in this process."""

    def __init__(self, voice: Path):
        """voice: the .onnx file; its .onnx.json lies beside it. Raises SpeechError if it cannot be loaded."""
        try:
            from piper import PiperVoice
        except ImportError:
            raise SpeechError("speaking with Piper needs its package: pip install piper-tts") from None
        try:
            self._voice: Any = PiperVoice.load(voice)
        except Exception as error:
            raise SpeechError(f"the voice {voice} cannot be loaded: {error}") from None
        self.name = voice.stem
        self._turn = asyncio.Lock()  # one sentence at a time, which uses every core

    async def speak(self, text: str) -> tuple[np.ndarray, int]:
        """See `Speaker`."""
        async with self._turn:
            return await asyncio.to_thread(self._spoken, text)

    def _spoken(self, text: str) -> tuple[np.ndarray, int]:
        try:
            chunks = list(self._voice.synthesize(text))
        except Exception as error:
            raise SpeechError(f"{self.name} cannot say this sentence: {error}") from None
        parts = [np.frombuffer(chunk.audio_int16_bytes, "<i2").reshape(-1, chunk.sample_channels) for chunk in chunks]
        if not parts:
            return np.empty(0, np.int16), self._voice.config.sample_rate
        return _mono(np.concatenate(parts)), chunks[0].sample_rate


def speaker_of(description: str) -> Speaker:
    """The speaker that `--speaker` names: "piper:VOICE.onnx", or a command. Raises SpeechError."""
    kind, colon, voice = description.partition(":")
    if kind == "piper" and colon:
        return PiperSpeaker(Path(voice))
    return CommandSpeaker(description)


def check(speaker: Speaker) -> None:
    """Speak a word. Raises SpeechError if there is no sound."""
    samples, _ = asyncio.run(speaker.speak(_CHECK))
    if not samples.any():
        raise SpeechError(f"{speaker.name} answers {_CHECK!r} with silence")


def wav_samples(data: bytes, source: str) -> tuple[np.ndarray, int]:
    """Samples, int16 [n], mixed to one channel, and the rate of a WAV file. Its header may state too large a length, as
    programs that write to pipes do. Raises SpeechError for anything else."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise SpeechError(f"{source} did not write a WAV file to its standard output ({error})") from None
    if width != 2:
        raise SpeechError(f"{source} wrote samples of {8 * width} bits; 16 are needed")
    whole = len(content) - len(content) % (2 * channels)
    return _mono(np.frombuffer(content[:whole], "<i2").reshape(-1, channels)), rate


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file of one channel of samples, int16 [n]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _mono(samples: np.ndarray) -> np.ndarray:
    return samples.mean(axis=1).astype(np.int16) if samples.shape[1] > 1 else samples[:, 0].astype(np.int16)


class Sentences:
    """Splits text into sentences as it arrives. Their concatenation is the text."""

    def __init__(self) -> None:
        self._rest = ""

    def push(self, piece: str) -> list[str]:
        """The sentences that a further piece completes."""
        self._rest += piece
        found = []
        while (end := self._end()) is not None:
            found.append(self._rest[:end])
            self._rest = self._rest[end:]
        return found

    def rest(self) -> list[str]:
        """The remaining text at the end."""
        rest, self._rest = self._rest, ""
        return [rest] if rest else []

    def _end(self) -> int | None:
        for match in _END.finditer(self._rest):
            # White space at the end of the known text may continue in the next piece.
            if match.end() >= _SHORTEST and match.end() < len(self._rest):
                return match.end() if match.end() <= _LONGEST else self._pause()
        return self._pause() if len(self._rest) > _LONGEST else None

    def _pause(self) -> int:
        ends = [match.end() for match in _PAUSE.finditer(self._rest, 0, _LONGEST)]
        return ends[-1] if ends and ends[-1] >= _SHORTEST else _LONGEST


def speakable(text: str) -> str:
    """A text without times in brackets, Markdown and control characters, which nobody reads aloud. "" if nothing is
    left."""
    plain = " ".join(_SILENT.sub(" ", text).split())
    return plain if any(char.isalnum() for char in plain) else ""


@dataclass(frozen=True)
class Sound:
    """A spoken sentence: samples, int16 [n], and the text that is spoken."""

    samples: np.ndarray
    text: str


class Unspoken:
    """The rest of an answer is not spoken, because the speaker failed. The log has the error."""

    message = "the speaker failed; the answer goes on as text"


async def spoken(
    events: AsyncIterator[Piece | str], speaker: Speaker | None, rate: int
) -> AsyncGenerator[Piece | str | Sound | Unspoken, None]:
    """The events of an answer as they arrive and, if there is a speaker, between them the sound of its sentences at
    `rate` Hz.

    Thinking is not spoken. If the speaker fails, one `Unspoken` follows and the text continues. Closing the generator
    stops the speaker.
    """
    if speaker is None:
        async for event in events:
            yield event
        return
    coming: asyncio.Queue[Piece | str | Sound | Unspoken | None] = asyncio.Queue()
    sentences: asyncio.Queue[str | None] = asyncio.Queue()

    async def write() -> None:
        cutter = Sentences()
        try:
            async for event in events:
                coming.put_nowait(event)
                if isinstance(event, Piece) and not event.thinking:
                    for sentence in cutter.push(str(event)):
                        sentences.put_nowait(sentence)
            for sentence in cutter.rest():
                sentences.put_nowait(sentence)
        finally:
            sentences.put_nowait(None)

    async def speak() -> None:
        try:
            while (sentence := await sentences.get()) is not None:
                coming.put_nowait(await _sound(sentence, speaker, rate))
        except SpeechError as error:
            _log.error("an answer is not spoken to its end: %s", error)
            coming.put_nowait(Unspoken())

    tasks = [asyncio.create_task(write()), asyncio.create_task(speak())]
    both = asyncio.gather(*tasks)
    both.add_done_callback(lambda _: coming.put_nowait(None))
    try:
        while (item := await coming.get()) is not None:
            yield item
        await both
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sound(sentence: str, speaker: Speaker, rate: int) -> Sound:
    text = speakable(sentence)
    if not text:
        return Sound(np.empty(0, np.int16), sentence)
    samples, given = await speaker.speak(text)
    if given != rate and len(samples):
        samples = soxr.resample(samples, given, rate)
    return Sound(samples, sentence)
