"""The memory plan: the bytes that a model and its requests need, part by part, before any of them are allocated.

    device = weights + RoTE's table + KV pages + workspace + reserve

Weights, table and pages are counted exactly, from the shapes that the config gives. The workspace is an upper bound of
the temporary memory of encoding a batch of windows, prefilling a chunk or choosing a token; only the largest of the
three counts, because they run one after another, unless windows are encoded ahead, beside a chunk. The reserve covers
the driver, the libraries, recorded decode steps and the allocator's rounding. Nothing here is measured: a plan for a
device that is not present is a projection.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ...kernels.conv_stem import conv_length
from ...kernels.int4_cache import HEAD_DIMS
from ...kernels.log_mel import N_FFT, valid_frames
from ...kernels.native.attention import workspace_bytes
from ...quant.recipe import RECIPES, recipe
from ...quant.scheme import PARTS as PACKED_PARTS
from ...quant.scheme import Int4, SchemeError
from ..errors import MemoryPlanError
from ..files import shown
from ..model.config import ModelConfig
from ..model.encoder import audio_token_count, token_count
from ..model.parameters import ENCODER_LAYERS, PARTS, part_of
from ..model.quantized import expected_tensors, layer_schemes
from .kv_cache import KV_STORAGE, QUANTIZED, page_bytes, pages_for, turns_bytes

Place = Literal["device", "host", "file"]
RESERVE = 500_000_000
DENSE = "dense"
SCHEMES = (DENSE, *RECIPES)
_log = logging.getLogger("afnext.engine")
# Changes that free memory, the mildest first: the first three cost time, the others precision.
CHANGES: Mapping[str, dict[str, Any]] = {
    "encode_ahead=False": {"encode_ahead": False},
    "chunk_size=256, encode_batch=1": {"chunk_size": 256, "encode_batch": 1},
    "release_encoder": {"release_encoder": True},
    "kv=int8": {"kv": "int8"},
    "quant=int8": {"scheme": "int8"},
    "quant=int4": {"scheme": "int4"},
    "kv=int4": {"kv": "int4"},
    "quant=small": {"scheme": "small"},
}
# Changes that are suggested but never chosen: int3 needs calibrated weights.
LAST_RESORT: Mapping[str, dict[str, Any]] = {"quant=int3": {"scheme": "int3"}}
_INT3_LOSS = (
    "int3 is never chosen, because it loses the most: Whisper tiny.en errs in 6.7 % of words instead of 6.0 %, and "
    "diverges from the dense model seven times as far as with int4. Calibrate it: afnext quantize MODEL OUT "
    "--scheme int3 --calibrate RECORDINGS."
)


@dataclass(frozen=True)
class Part:
    """One line of a plan: its name, bytes and place. exact: counted rather than an upper bound."""

    name: str
    nbytes: int
    place: Place
    detail: str
    exact: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that `config` needs on a device with `memory` bytes, for one recording of `audio_seconds` and its
    answer.

    gpu: whether the device is a GPU; on a CPU the slower torch implementations need more temporary memory. dtype: of
    the computation. scheme: "dense", or the recipe that dense weights are packed by, as in `load(quant=...)`; a
    quantization in `config` takes precedence.
    kv, page_size, chunk_size, encode_batch, release_encoder, encode_ahead: see `EngineOptions`. text_tokens,
    new_tokens: room for the template with its system message and a question, and for the answer. mapped: the weights
    are read from the mapped file and not copied. reserve: bytes that are not used. Raises MemoryPlanError for values
    out of range, and SchemeError for a scheme that is unknown or does not fit a layer.
    """

    config: ModelConfig
    memory: int
    gpu: bool
    dtype: torch.dtype
    audio_seconds: float
    scheme: str = DENSE
    kv: str = "auto"
    page_size: int = 256
    chunk_size: int = 1024
    encode_batch: int = 4
    release_encoder: bool = False
    encode_ahead: bool = False
    text_tokens: int = 256
    new_tokens: int = 2048
    mapped: bool = False
    reserve: int = RESERVE

    def __post_init__(self) -> None:
        for name in ("page_size", "chunk_size", "encode_batch", "new_tokens"):
            if getattr(self, name) < 1:
                raise MemoryPlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        limit = self.config.max_audio_seconds
        if not 0 <= self.audio_seconds <= limit:
            raise MemoryPlanError(f"the plan is for {self.audio_seconds:g} s of audio; the model hears 0 to {limit} s")
        if self.kv not in KV_STORAGE:
            raise MemoryPlanError(f"keys and values are stored as one of {', '.join(KV_STORAGE)}, not {self.kv!r}")
        if self.kv == "int4" and self.config.decoder.head_dim not in HEAD_DIMS:
            raise MemoryPlanError(
                f"keys and values of {self.config.decoder.head_dim} channels cannot be stored as int4; use int8"
            )
        weight_bytes(self.stored, self.dtype)  # raises if the scheme does not fit
        if self.tokens > self.config.decoder.max_positions:
            raise MemoryPlanError(
                f"{self.audio_seconds:g} s of audio and {self.new_tokens} new tokens are {self.tokens} tokens, but the "
                f"model's context ends at {self.config.decoder.max_positions}. Plan for less audio or a shorter answer."
            )

    @property
    def tokens(self) -> int:
        """Tokens of the recording, the text around it, and the answer."""
        return audio_token_count(round(self.audio_seconds * SAMPLE_RATE)) + 2 + self.text_tokens + self.new_tokens

    @property
    def pages(self) -> int:
        """KV pages for `tokens`."""
        return pages_for(self.tokens, self.page_size)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype in which keys and values are stored."""
        return QUANTIZED.get(self.kv, self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one KV page of all layers."""
        return page_bytes(self.config.decoder, self.page_size, self.kv_dtype)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Every part of the plan; `total` is the sum of all but those in host memory."""
        return (*self._weights(), *self._copies(), *self._state(), *self._graphs(), self._workspace(), self._reserve())

    @property
    def total(self) -> int:
        """Bytes on the device, mapped files included."""
        return sum(part.nbytes for part in self.parts if part.place != "host")

    @property
    def weights(self) -> int:
        """Bytes of the weights in `total`."""
        return sum(part.nbytes for part in self._weights() if part.place != "host")

    @property
    def kv_room(self) -> int:
        """Tokens that the cache may hold beside the rest of the plan."""
        token = self.page_bytes + turns_bytes(self.config.decoder, self.page_size, self.kv_dtype)
        return (self.pages + self.spare // token) * self.page_size

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        names = ("scheme", "kv", "page_size", "chunk_size", "encode_batch", "release_encoder", "encode_ahead")
        return {
            "projected": True,
            "memory": self.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in names},
            "audio_seconds": self.audio_seconds,
            "tokens": self.tokens,
            "pages": self.pages,
            "page_bytes": self.page_bytes,
            "parts": [asdict(part) for part in self.parts],
            "workspace_by_stage": self.stages,
            "total": self.total,
            "spare": self.spare,
            "fits": self.fits,
            "longest_audio": self.longest_audio(),
            "savings": self.savings(),
            "remedy": list(self.remedy()),
        }

    @property
    def spare(self) -> int:
        """Bytes of the device that stay free, negative if the plan does not fit."""
        return self.memory - self.total

    @property
    def fits(self) -> bool:
        """Whether the plan fits on the device."""
        return self.spare >= 0

    @property
    def stored(self) -> ModelConfig:
        """The config with the quantization that the weights will have."""
        if self.scheme == DENSE or self.config.quantization is not None:
            return self.config
        return replace(self.config, quantization=recipe(self.scheme))

    def _weights(self) -> Iterator[Part]:
        for (part, layers), (nbytes, kinds) in weight_bytes(self.stored, self.dtype).items():
            name = f"{part} layers" if layers else part
            if layers and self._lends:
                yield Part(name, nbytes, "host", f"{kinds}, lent to the device two at a time")
            elif self.mapped:
                yield Part(name, nbytes, "file", f"{kinds}, mapped")
            else:
                yield Part(name, nbytes, "device", kinds)

    @property
    def _lends(self) -> bool:
        """Whether the encoder's layers are kept in host memory."""
        return self.release_encoder and self.gpu

    @property
    def _encodes_ahead(self) -> bool:
        """Whether windows are encoded while the decoder computes a chunk."""
        return self.encode_ahead and self.gpu

    def _state(self) -> Iterator[Part]:
        table = rote_table_bytes(self.config, self.audio_seconds)
        if table:
            yield Part("RoTE table", table, "device", "angles of every window, float32")
        kv = f"{self.kv} with float32 scales" if self.kv in QUANTIZED else str(self.dtype).removeprefix("torch.")
        detail = f"{self.pages} pages of {self.page_size} tokens, {kv}, {self.tokens:,} tokens"
        yield Part("KV pages", self.pages * self.page_bytes, "device", detail)
        if self._turns:
            yield Part("key angles", self._turns, "device", "cos and sin for each token of an int4 cache, float32")

    def _graphs(self) -> Iterator[Part]:
        if self._encodes_ahead and not self._lends and self.audio_seconds:
            detail = f"at most, to encode {self.encode_batch} whole windows"
            yield Part("encoder's CUDA graphs", self._encoding(), "device", detail, exact=False)

    @property
    def _turns(self) -> int:
        return turns_bytes(self.config.decoder, self.pages * self.page_size, self.kv_dtype)

    @property
    def stages(self) -> dict[str, int]:
        """Upper bounds of the temporary memory of each stage; the workspace is the largest."""
        encoding = self._encoding() if self.audio_seconds else 0
        beside = encoding if self._encodes_ahead else 0
        return {
            f"encoding {self.encode_batch} windows": encoding,
            f"prefilling {self.chunk_size} tokens{' beside that' if beside else ''}": self._prefilling() + beside,
            "choosing a token": 80 * self.config.decoder.vocab_size,
            "growing the KV cache by a pool at a time": self.pages * self.page_bytes // (2 * self.config.decoder.layers)
            + 2 * self._turns,
        }

    def _workspace(self) -> Part:
        stages = self.stages
        largest = max(stages, key=lambda stage: stages[stage])
        return Part("workspace", stages[largest], "device", f"at most, {largest}", exact=False)

    def _copies(self) -> Iterator[Part]:
        """On a CPU torch's int4 product keeps a second copy of the codes in its own order."""
        codes = 0 if self.gpu else int4_code_bytes(self.stored)
        if codes:
            yield Part("int4 codes again", codes, "device", "at most, in the order of torch's product", exact=False)

    def _reserve(self) -> Part:
        return Part("reserve", self.reserve, "device", "driver, libraries, recorded steps, rounding", exact=False)

    def _encoding(self) -> int:
        """An upper bound of the memory for encoding a batch: the largest of log-mel, stem, and one layer."""
        encoder, itemsize = self.config.encoder, self.dtype.itemsize
        frames = valid_frames(WINDOW_SAMPLES)
        positions, width = conv_length(frames), encoder.hidden_size
        spectrum = (frames + 1) * (4 * N_FFT + 8 * (N_FFT // 2 + 1) * 2)
        log_mel = 2 * 4 * WINDOW_SAMPLES + spectrum + 4 * 4 * encoder.mel_bins * frames
        stem = itemsize * (encoder.mel_bins + 3 * width) * frames
        layer = itemsize * positions * max(6 * width + 2 * encoder.intermediate_size, 10 * width)
        pooled = positions * width * (itemsize + 4 * 4)
        window = max(log_mel, stem, layer, pooled)
        # The previous batch may still wait for its chunk, and the chunk's embeddings exist. Ahead of the decoder, the
        # windows of three chunks may exist: one that is computed, one that is queued, and the next.
        waiting = 2 * self.encode_batch * token_count(WINDOW_SAMPLES) + self.chunk_size
        if self._encodes_ahead:
            waiting += 3 * self.chunk_size + token_count(WINDOW_SAMPLES)
        held = itemsize * self.config.decoder.hidden_size * waiting
        layers, _ = weight_bytes(self.stored, self.dtype)["encoder", True]
        lent = 2 * layers // encoder.layers if self._lends else 0  # one computes, the next is copied
        return self.encode_batch * window + held + rote_table_bytes(self.config, self.audio_seconds) * 2 + lent

    def _prefilling(self) -> int:
        """An upper bound of the memory for one chunk at the end of the prompt: the residual stream and one block."""
        decoder, itemsize = self.config.decoder, self.dtype.itemsize
        chunk = min(self.chunk_size, self.tokens)
        query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        stream = 6 * decoder.hidden_size
        mlp = chunk * itemsize * (stream + 4 * decoder.intermediate_size)
        norm = chunk * (itemsize * stream + 3 * 4 * decoder.hidden_size)
        attention = chunk * (itemsize * (stream + 4 * query + 2 * key) + 6 * query + 3 * 4 * key)
        if not self.gpu:
            native = workspace_bytes(chunk * decoder.heads // decoder.kv_heads, decoder.head_dim)
            attention += max(native, self._gathered_attention(chunk))
        encoded = self.encode_batch * token_count(WINDOW_SAMPLES) if self.audio_seconds else 0
        return max(mlp, norm, attention) + itemsize * decoder.hidden_size * (encoded + chunk)

    def _gathered_attention(self, chunk: int) -> int:
        """Memory that torch's attention adds: gathered and packed keys and values for every head, and the chunk's
        mask."""
        decoder, itemsize = self.config.decoder, self.dtype.itemsize
        unpacking = {"int4": 5, "fp8": 3}.get(self.kv, 2)  # copies of 4 bytes per element
        gathered = self.tokens * decoder.kv_heads * decoder.head_dim * (3 * itemsize + unpacking * 4)
        packed = self.tokens * decoder.heads * decoder.head_dim * 2 * itemsize
        return gathered + packed + chunk * self.tokens * (1 + max(itemsize, 4))

    def longest_audio(self) -> int | None:
        """The most whole seconds of audio with which this plan fits, or None if it does not fit without audio."""

        def fits(seconds: int) -> bool:
            return replace(self, audio_seconds=seconds).fits

        if not fits(0):
            return None
        low, high = 0, self.most_seconds()
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def most_seconds(self) -> int:
        """The most seconds that the model accepts and its context holds beside text and answer."""
        room = self.config.decoder.max_positions - replace(self, audio_seconds=0).tokens
        seconds_a_window = WINDOW_SAMPLES // SAMPLE_RATE
        return min(self.config.max_audio_seconds, room * seconds_a_window // token_count(WINDOW_SAMPLES))

    def largest(self) -> "MemoryPlan":
        """This plan for the longest audio that fits. Raises MemoryPlanError if it does not fit without audio.

        Mapped weights that do not fit beside the rest only cause a warning: the model works, but slowly, because the
        system reads parts of the file again and again.
        """
        longest = self.longest_audio()
        if longest is not None:
            return replace(self, audio_seconds=longest)
        bare = replace(self, audio_seconds=0)
        if bare.mapped and bare.total - bare.weights <= bare.memory:
            _log.warning(
                "the weights take %s and the memory is %s: parts of them will be read from the file for every token",
                shown_bytes(bare.weights),
                shown_bytes(bare.memory),
            )
            return replace(bare, memory=bare.memory + bare.weights).largest()
        raise MemoryPlanError(
            f"the model and a short question take {shown_bytes(bare.total)}, and {shown_bytes(self.memory)} are there. "
            f"{bare.advice()}"
        )

    def savings(self) -> dict[str, int]:
        """Bytes that each change of `CHANGES` would free on its own, for those that free any."""
        freed = {change: self.total - self.changed([change]).total for change in CHANGES}
        return {change: nbytes for change, nbytes in freed.items() if nbytes > 0}

    def remedy(self) -> tuple[str, ...]:
        """The mildest changes of `CHANGES` with which the plan fits, or none if it does not fit with all of them.

        Changes that only cost time come before those that round: all of the former before one of the latter.
        """
        useful = [] if self.fits else list(self.savings())
        for chosen in range(1, 1 << len(useful)):
            changes = [change for index, change in enumerate(useful) if chosen >> index & 1]
            if self.changed(changes).fits:
                return tuple(changes)
        return ()

    def changes_to_fit(self) -> tuple[str, ...]:
        """The mildest of `CHANGES` with which the plan fits; none if it does already.

        Raises MemoryPlanError, with advice on what would fit, if it does not fit with all of them.
        """
        changes = self.remedy()
        if not self.fits and not changes:
            raise MemoryPlanError(
                f"{self.audio_seconds:g} s of audio do not fit into {shown_bytes(self.memory)} with any settings "
                f"that are chosen automatically. {self.advice()}"
            )
        return changes

    def last_resort(self) -> tuple[str, ...]:
        """quant=int3 and the mildest of `CHANGES` with which the plan fits, or none if it does not fit with them."""
        changes = (*LAST_RESORT, *self.changed(LAST_RESORT).remedy())
        return changes if self.changed(changes).fits else ()

    def changed(self, changes: Iterable[str]) -> "MemoryPlan":
        """The plan after some of `CHANGES` and `LAST_RESORT`, except those that would need more memory."""
        plan = self
        for change in changes:
            try:
                candidate = replace(plan, **{**CHANGES, **LAST_RESORT}[change])
            except (SchemeError, MemoryPlanError):  # the change does not suit this model's shape
                continue
            plan = candidate if candidate.total < plan.total else plan
        return plan

    def advice(self) -> str:
        """Advice for a plan that does not fit, in a sentence or two."""
        remedy = self.remedy()
        changes = remedy or self.last_resort()
        if changes:
            fits = f"It fits with {' and '.join(changes)} ({shown_bytes(self.changed(changes).spare)} to spare)."
            return fits if remedy else f"{fits} {_INT3_LOSS}"
        everything = self.changed(CHANGES)
        longest = everything.longest_audio()
        if longest is None:
            silent = replace(everything, audio_seconds=0)
            least, packed = silent.total, silent.changed(LAST_RESORT).total
            int3 = f", or {shown_bytes(packed)} with {' and '.join(LAST_RESORT)}" if packed < least else ""
            return (
                f"No settings make it fit: the least it takes, and that without audio, is {shown_bytes(least)}{int3}."
            )
        used = [
            change
            for change in self.savings()
            if all(getattr(everything, name) == value for name, value in CHANGES[change].items())
        ]
        return f"With {' and '.join(used) or 'these settings'} it holds {longest} s of audio; cut the recording."


@lru_cache(maxsize=16)
def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> Mapping[tuple[str, bool], tuple[int, str]]:
    """Bytes and formats of the weights by part; the encoder's layers (True) separate from the rest of it (False).

    Raises SchemeError naming a layer that the config's quantization cannot store.
    """
    sizes: Counter[tuple[str, bool]] = Counter()
    for name, stored in expected_tensors(config).items():
        kind = stored.dtypes[0] if name.endswith(PACKED_PARTS) else dtype
        sizes[part_of(name), name.startswith(ENCODER_LAYERS)] += math.prod(stored.shape) * kind.itemsize
    schemes: dict[tuple[str, bool], set[str]] = {key: set() for key in sizes}
    for layer, scheme in layer_schemes(config).items():
        schemes[part_of(layer), layer.startswith(ENCODER_LAYERS)].add(str(scheme))
    dense = str(dtype).removeprefix("torch.")
    return MappingProxyType(
        {
            key: (sizes[key], ", ".join([*sorted(schemes[key]), f"the rest {dense}" if schemes[key] else dense]))
            for key in sorted(sizes, key=lambda key: (PARTS.index(key[0]), key[1]))
        }
    )


@lru_cache(maxsize=16)
def int4_code_bytes(config: ModelConfig) -> int:
    """Bytes of the codes of all weights in int4."""
    schemes = layer_schemes(config)
    return sum(
        math.prod(stored.shape)
        for name, stored in expected_tensors(config).items()
        if name.endswith(PACKED_PARTS[0]) and isinstance(schemes[name.rpartition(".")[0]], Int4)
    )


def rote_table_bytes(config: ModelConfig, audio_seconds: float) -> int:
    """Bytes of the table of RoTE's angles for audio of that length; see `TimeEmbedding.table`."""
    windows = -(-round(audio_seconds * SAMPLE_RATE) // WINDOW_SAMPLES)
    if config.rote is None or not windows:
        return 0
    return (1 << (windows - 1).bit_length()) * token_count(WINDOW_SAMPLES) * config.rote.dim * 4


def parse_bytes(text: str) -> int:
    """Parse a size such as "8GB" (10^9), "8GiB" (2^30), "512 MB". Raises MemoryPlanError for anything else."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([kmgt])(i?)b?", text.strip().lower())
    if match is None:
        raise MemoryPlanError(f'{shown(text)} is no amount of memory; write it as "8GB" or "7.5GiB"')
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit)))


def shown_bytes(nbytes: int) -> str:
    """A size for display, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if abs(nbytes) >= 1e9 else f"{nbytes / 1e6:.1f} MB"
