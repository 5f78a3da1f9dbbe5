"""Computes the beginning of a prompt while the rest of its audio is being decoded.

The thread that decodes gives each window to `heard` as soon as it is complete. `heard` does not wait: if the engine has
done the part before, it submits the next one, of whole chunks. Each part is a request for keys and values only, which
continues the part before, its `beginning`. The request for the whole prompt continues the last one.

    calling thread    decode windows 0-3 | 4-7          | 8-11           | ... | the end | whole prompt
    engine's thread                      | chunks 0, 1  | chunks 2, 3, 4 | ...           | the rest, answer

Chunks, and batches of windows, are those of a prompt whose audio is all there, so the results are, too. If a
part fails, or the engine closes its prefix because other requests need the pages, the request for the whole prompt
computes everything, and raises the error if it is still one.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ...kernels.errors import AfnextError
from ..engine.engine import Engine
from ..engine.options import EngineOptions
from ..engine.prefill import AudioInput, PlacedWindow, placed_windows, window_key
from ..engine.request import Request, SequenceState
from ..engine.timings import Timings
from ..io.audio import windows
from ..io.prompt import Prompt
from ..model.encoder import audio_token_count, token_count

if TYPE_CHECKING:
    from typing_extensions import Self

_SLACK_TOKENS = 256  # beyond the stated length
_log = logging.getLogger("afnext")


@dataclass(frozen=True)
class Early:
    """Where and how to compute the beginnings of prompts.

    engine: returns the engine, or raises AfnextError if there is none any more; longest: tokens of the longest prompt;
    answer: tokens to expect after the prompt; how: further fields of `Request`.
    """

    engine: Callable[[], Engine]
    options: EngineOptions
    longest: int
    answer: int
    how: Mapping[str, Any]


class EarlyPrefill:
    """The beginning of one prompt. For one thread; use it in a `with` statement, which leaves nothing in the engine
    after an exception."""

    def __init__(self, early: Early | None, build: Callable[[list[int]], Prompt], recordings: int, timings: Timings):
        """early: None computes nothing early; build: the prompt with so many tokens of each of `recordings`
        recordings; timings: of the prompt's request."""
        self._early = early
        self._build = build
        self._recordings = recordings
        self._timings = timings
        self._tokens: list[int] = []  # of each recording that has ended
        self._windows: list[list[Tensor]] = [[]]
        self._keys: list[list[bytes]] = [[]]
        self._prompt: Prompt | None = None  # with one token for each recording that has not ended
        self._part: SequenceState | None = None  # the last part

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop()

    def heard(self, samples: np.ndarray, stated: float | None) -> None:
        """The next window of the current recording, which states a length of `stated` seconds. See `load_audio`."""
        if self._early is None:
            return
        waveform = torch.from_numpy(samples)
        self._keys[-1].append(window_key(waveform, len(self._windows[-1])))
        self._windows[-1].append(waveform)
        try:
            self._continue(self._early, stated or 0.0)
        except Exception as error:
            _log.info("nothing more is computed before the audio is decoded (%s)", error)
            self._stop()

    def end(self, samples: np.ndarray) -> None:
        """All samples of the current recording; what is heard next belongs to another one."""
        self._windows[-1] = [torch.from_numpy(window) for window in windows(samples)]
        self._tokens.append(audio_token_count(len(samples)))
        self._windows.append([])
        self._keys.append([])
        self._prompt = None

    def inputs(self, prompt: Prompt) -> tuple[AudioInput, ...]:
        """The audio of `prompt` so far, in the engine's format."""
        return tuple(
            AudioInput(span.position, tuple(waveforms), keys=tuple(keys))
            for span, waveforms, keys in zip(prompt.audio, self._windows, self._keys, strict=False)
        )

    def beginning(self, token_ids: list[int]) -> SequenceState | None:
        """The last part, for `Request.beginning` of the whole prompt `token_ids`, or None if there is none."""
        part = self._part
        if part is not None and token_ids[: len(part.request.token_ids)] != part.request.token_ids:
            self._stop()  # the template puts other text before the audio
            return None
        return part

    def _continue(self, early: Early, stated: float) -> None:
        """Submit the next part if the one before has ended and enough has been heard."""
        part = self._part
        if part is not None and not part.ended:
            return
        if part is not None and part.prefix is None:
            raise AfnextError(part.error or f"a part has ended: {part.finish_reason}")
        if self._prompt is None:
            self._prompt = self._build([*self._tokens, *[1] * (self._recordings - len(self._tokens))])
        audio = self.inputs(self._prompt)
        start = 0 if part is None else len(part.request.token_ids)
        stop = _part_end(start, placed_windows(audio), early.options)
        if stop <= start:
            return
        token_ids, first = self._prompt.token_ids, self._prompt.audio[len(self._tokens)].position
        whole = first + audio_token_count(round(stated * SAMPLE_RATE))
        if max(whole, stop) > early.longest:
            raise AfnextError("the whole prompt may not fit")
        request = Request(
            [*token_ids[:first], *[token_ids[first]] * (stop - first)][:stop],
            audio,
            sampling=None,
            beginning=part,
            expected=max(whole, stop) + early.answer + _SLACK_TOKENS,
            timings=self._timings,
            **early.how,
        )
        engine = early.engine()
        self._part = engine.submit(request)
        engine.start()

    def _stop(self) -> None:
        """Compute nothing more early, and release what has been computed."""
        part, self._part, self._early = self._part, None, None
        if part is not None:
            abandon(part)


def abandon(part: SequenceState) -> None:
    """Let the engine end a part that no request continues, and release what it has computed."""
    part.end_requested = part.end_requested or "cancelled"  # before its next step
    if part.prefix is not None:
        part.prefix.close()


def _part_end(start: int, windows: list[PlacedWindow], options: EngineOptions) -> int:
    """The token before which the part from `start` on ends, so that it has whole chunks and pages of tokens, whole
    batches of windows, and at most about two of those. Not above `start` if that is not possible yet."""
    batch, multiple = options.windows_at_once, math.lcm(options.chunk_size, options.page_size)
    whole = len(windows) - len(windows) % batch
    stop = windows[whole - 1].stop if whole else 0
    most = max(multiple, 2 * batch * token_count(WINDOW_SAMPLES))
    return min(stop, start + most) // multiple * multiple
