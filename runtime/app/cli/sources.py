"""Recordings named on the command line, which are checked before a model is downloaded or loaded."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from ...errors import AudioError

if TYPE_CHECKING:
    from ...io.audio import AudioSource

STDIN = "-"
_PROBED_SECONDS = 1.0


def standard_input() -> BinaryIO:
    """The bytes of standard input. Raises AudioError when it is closed or a terminal."""
    if sys.stdin is None:
        raise AudioError("standard input is closed; pipe the audio to it, or give a file.")
    if sys.stdin.isatty():
        raise AudioError("standard input is a terminal; pipe the audio to it, or give a file.")
    return sys.stdin.buffer


def open_sources(names: Sequence[str], *, truncate: bool = False) -> "list[AudioSource]":
    """The audio sources for `names`: paths, or - for standard input.

    One second of each file is decoded to check it; standard input and pipes, which can be read only once, are decoded
    completely. Raises AudioError for sources that cannot be decoded.
    """
    if Counter(names)[STDIN] > 1:
        raise AudioError("standard input can be read only once; name it once.")
    return [_checked(name, truncate) for name in names]


def _checked(name: str, truncate: bool) -> "AudioSource":
    from ...io.audio import load_audio

    if name == STDIN:
        try:
            return load_audio(standard_input(), truncate=truncate)
        except AudioError as error:
            raise type(error)(str(error).replace("<file>", "standard input", 1)) from None
    if not name:
        raise AudioError("the name of the recording is empty; give a path, or - for standard input.")
    if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
        return load_audio(name, truncate=truncate)
    load_audio(name, max_seconds=_PROBED_SECONDS, truncate=True)
    return name
