"""A model run stage after stage, with the weights of one stage in memory at a time.

    waveforms -> stem -> encoder layers -> adaptor -> the decoder's input -> decoder layers -> head

Between stages the hidden states are stored in a file (`HiddenStates`), so a model can run, and be calibrated, in little
more memory than its largest stage takes. It is not meant to be fast.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.conv_stem import conv_length, conv_stem
from ...kernels.log_mel import log_mel, valid_frames
from ...kernels.norm import rms_norm
from ...kernels.rotary import Rotation, rope_frequencies
from ...kernels.rote import TimeEmbedding, pool_norm_rotate
from ...quant.awq import Fold, adaptor_folds, decoder_folds, encoder_folds, head_folds
from ...quant.calibrate import InputStatistics, gathering
from ...quant.linear import Linear
from ..model.adaptor import Adaptor
from ..model.config import ModelConfig
from ..model.decoder import DecoderLayer
from ..model.encoder import EncoderLayer, token_count
from ..model.weights import Norm
from .kv_cache import KVCache, page_table, pages_for

_CHUNK = 1024  # tokens of a prompt that go through a decoder layer at once
_PAGE = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Window:
    """A window of audio: its length in samples, and its index in its audio."""

    samples: int
    index: int


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt's token ids, and the positions where the audio tokens of each window begin."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


class HiddenStates:
    """Tensors [length, width] of one dtype, stored in a file in sequence and read one at a time."""

    def __init__(self, path: Path, lengths: tuple[int, ...], width: int, dtype: torch.dtype):
        self.path = path
        self.lengths = lengths
        self.width = width
        self.dtype = dtype

    @classmethod
    def write(cls, path: Path, states: Iterable[Tensor], progress: Progress, total: int) -> "HiddenStates":
        """Store some tensors [length, width], at least one; `progress` is called with (done, total)."""
        lengths, width, dtype = [], 0, torch.float32
        with path.open("wb") as file:
            for x in states:
                file.write(x.cpu().contiguous().view(torch.uint8).numpy().data)
                lengths.append(len(x))
                width, dtype = x.shape[1], x.dtype
                progress(len(lengths), total)
        return cls(path, tuple(lengths), width, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        size = self.width * self.dtype.itemsize
        with self.path.open("rb") as file:
            for length in self.lengths:
                yield torch.frombuffer(bytearray(file.read(length * size)), dtype=self.dtype).view(length, self.width)


class Stage(ABC):
    """Some layers of a model. `module` holds their parameters, by names that `canonical` maps to the model's."""

    name: str
    module: nn.Module
    folds: tuple[Fold, ...]

    @abstractmethod
    def canonical(self, name: str) -> str:
        """The model's name of a parameter or layer of the stage."""

    @abstractmethod
    def run(self, x: Tensor, number: int) -> Tensor:
        """Run the stage on the hidden states [length, width] of window or prompt `number`."""

    def gather(self, states: HiddenStates, statistics: Mapping[str, InputStatistics], progress: Progress) -> None:
        """Run all windows or prompts to collect statistics of the inputs of the stage's layers; see
        `quant.calibrate`."""
        device = next(self.module.buffers()).device
        with gathering(self.module, self.folds, statistics):
            for number, x in enumerate(states):
                self.run(x.to(device), number)
                progress(number + 1, len(states))

    def outputs(self, states: HiddenStates) -> Iterator[Tensor]:
        """The stage's output for each window or prompt, in order."""
        device = next(self.module.buffers()).device
        return (self.run(x.to(device), number) for number, x in enumerate(states))

    def input_tokens(self, states: HiddenStates) -> int:
        """Number of tokens that enter its layers."""
        return sum(states.lengths)


class EncoderStage(Stage):
    """An encoder layer, on windows."""

    def __init__(self, config: ModelConfig, index: int):
        self.name = f"encoder layer {index}"
        self.module = EncoderLayer(config.encoder)
        self.folds = encoder_folds()
        self._prefix = f"encoder.layers.{index}."

    def canonical(self, name: str) -> str:
        """See `Stage`."""
        return self._prefix + name

    def run(self, x: Tensor, number: int) -> Tensor:
        """See `Stage`."""
        return self.module(x[None], torch.tensor([len(x)], device=x.device))[0]


class _NormedAdaptor(Adaptor):
    """The adaptor, with the encoder's last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.encoder.hidden_size, config.decoder.hidden_size, bias=config.projector_bias)
        self.layer_norm = Norm(config.encoder.hidden_size, bias=True)


class AdaptorStage(Stage):
    """Pooling, the encoder's last norm, RoTE and the adaptor, on windows."""

    def __init__(self, config: ModelConfig, windows: tuple[Window, ...]):
        self.name = "adaptor"
        self.module = _NormedAdaptor(config)
        rote = config.rote
        self.folds = adaptor_folds(config.encoder.hidden_size, 0 if rote is None else 2 * rote.dim)
        self._windows = windows
        self._time: TimeEmbedding | None = None
        if rote is not None:
            self._time = TimeEmbedding(rote.theta, rote.dim, token_count(WINDOW_SAMPLES), rote.frame_seconds)

    def canonical(self, name: str) -> str:
        """See `Stage`."""
        return f"encoder.{name}" if name.startswith("layer_norm") else f"adaptor.{name}"

    def run(self, x: Tensor, number: int) -> Tensor:
        """See `Stage`."""
        window = self._windows[number]
        norm = self.module.get_buffer("layer_norm.weight"), self.module.get_buffer("layer_norm.bias")
        angles = indices = None
        if self._time is not None:
            angles = self._time.table(window.index + 1, x.device)
            indices = torch.tensor([window.index], device=x.device)
        pooled = pool_norm_rotate(x[None], *norm, angles=angles, windows=indices)[0]
        return self.module(pooled[: token_count(window.samples)])

    def input_tokens(self, states: HiddenStates) -> int:
        """See `Stage`."""
        return sum(token_count(window.samples) for window in self._windows)


class DecoderStage(Stage):
    """A decoder layer, on prompts. Hidden states are the residual stream, rounded to the dtype once per layer."""

    def __init__(self, config: ModelConfig, index: int):
        self.name = f"decoder layer {index}"
        self._config = replace(config.decoder, layers=1)
        self.module = DecoderLayer(self._config)
        self.folds = decoder_folds(config.decoder.heads, config.decoder.kv_heads, config.decoder.head_dim)
        self._prefix = f"decoder.layers.{index}."

    def canonical(self, name: str) -> str:
        """See `Stage`."""
        return self._prefix + name

    def run(self, x: Tensor, number: int) -> Tensor:
        """See `Stage`."""
        frequencies = rope_frequencies(self._config.head_dim, self._config.rope_theta, x.device)
        pages = pages_for(len(x), _PAGE)
        cache = KVCache(self._config, pages=pages, page_size=_PAGE, device=x.device, dtype=x.dtype)
        table = page_table([cache.allocate(len(x))], x.device)
        parts = []
        for start in range(0, len(x), _CHUNK):
            part = x[None, start : start + _CHUNK]
            positions = torch.arange(start, start + part.shape[1], device=x.device)[None]
            rotation = Rotation(positions.float(), frequencies, "half")
            view, norm = cache.view(table, positions), self.module.get_buffer("input_layernorm.weight")
            normed = rms_norm(part, norm, self._config.rms_norm_eps)
            parts.append(self.module(normed, part, rotation, view, 0, norm)[1][0])  # the next layer's norm is unknown
        return torch.cat(parts)


class _Head(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = Norm(config.decoder.hidden_size, bias=False)
        self.lm_head = Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)


class HeadStage(Stage):
    """The decoder's last norm, followed by lm_head."""

    def __init__(self, config: ModelConfig):
        self.name = "lm_head"
        self.module = _Head(config)
        self.folds = head_folds()
        self._eps = config.decoder.rms_norm_eps

    def canonical(self, name: str) -> str:
        """See `Stage`."""
        return f"decoder.{name}"

    def run(self, x: Tensor, number: int) -> Tensor:
        """The normed hidden states; scores of all tokens would take hundreds of times the memory."""
        return rms_norm(x, self.module.get_buffer("norm.weight"), self._eps)

    def gather(self, states: HiddenStates, statistics: Mapping[str, InputStatistics], progress: Progress) -> None:
        """See `Stage`."""
        for number, x in enumerate(self.outputs(states)):
            statistics["lm_head"].add(x)
            progress(number + 1, len(states))


@dataclass(frozen=True)
class Stem:
    """The encoder's convolutions, from waveforms to the first layer's input. weight: returns a parameter by its
    name."""

    mel_bins: int
    dtype: torch.dtype
    weight: Callable[[str], Tensor]

    @cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        names = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "embed_positions.weight")
        return tuple(self.weight(f"encoder.{name}") for name in names)

    def run(self, waveform: Tensor) -> Tensor:
        """waveform: 1-D float32, at most 30 s. Returns [positions, hidden]."""
        conv1, bias1, conv2, bias2, positions = self._weights
        mel = log_mel(waveform[None].to(conv1.device), mel_bins=self.mel_bins, dtype=self.dtype)
        length = conv_length(valid_frames(waveform.numel()))
        return conv_stem(mel, conv1, bias1, conv2, bias2, positions)[0, :length]


def decoder_inputs(
    prompts: Iterable[PlacedPrompt], audio: HiddenStates, embed: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """The hidden states that enter the first decoder layer, [tokens, hidden] for each prompt.

    audio: embeddings of every window, in the order of their use; embed: maps token ids [tokens] to embeddings.
    """
    tokens = iter(audio)
    for prompt in prompts:
        x = embed(torch.tensor(prompt.token_ids)).clone()
        for position in prompt.positions:
            window = next(tokens)
            x[position : position + len(window)] = window.to(x)
        yield x


def stages(config: ModelConfig, windows: tuple[Window, ...]) -> tuple[list[Stage], list[Stage]]:
    """The stages that run on windows, and those that run on prompts."""
    on_windows = [EncoderStage(config, index) for index in range(config.encoder.layers)]
    on_prompts: list[Stage] = [DecoderStage(config, index) for index in range(config.decoder.layers)]
    if not config.decoder.tie_word_embeddings:
        on_prompts.append(HeadStage(config))
    return [*on_windows, AdaptorStage(config, windows)], on_prompts
