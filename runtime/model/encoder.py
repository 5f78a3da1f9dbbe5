"""The audio encoder: log-mel windows to one vector per 40 ms.

    mel -> convolution stem -> pre-LN transformer layers -> average pool by two -> LayerNorm -> RoTE

Windows are independent of each other. The batch is cut to its longest window; positions past a window's end are masked
as keys and dropped as outputs. Source: Radford et al. 2022; Goel et al. 2025,
arXiv:2507.08128 (AF-Whisper).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.activation import gelu
from ...kernels.attention import attention
from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.conv_stem import conv_length, conv_stem
from ...kernels.device_state import sent
from ...kernels.log_mel import valid_frames
from ...kernels.norm import add_layer_norm, layer_norm
from ...kernels.rote import TimeEmbedding, pool_norm_rotate, pooled_length
from ...quant.linear import Linear
from .config import EncoderConfig, RoteConfig
from .lending import LentLayers
from .weights import Conv, Embedding, Norm, on_device

_FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000


def token_count(samples: int) -> int:
    """Number of audio tokens of a window of `samples` samples (at most 30 s): 750 for a full one, 0 below 3 frames."""
    return pooled_length(conv_length(valid_frames(samples)))


def audio_token_count(samples: int) -> int:
    """Number of audio tokens of a whole recording of `samples` samples, cut into 30 s windows."""
    full, rest = divmod(samples, WINDOW_SAMPLES)
    return full * token_count(WINDOW_SAMPLES) + token_count(rest)


class EncoderAttention(nn.Module):
    """Bidirectional multi-head attention; k_proj has no bias."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def forward(self, x: Tensor, key_lengths: Tensor) -> Tensor:
        """x: [batch, positions, hidden]; key_lengths: [batch]. Returns like x."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, key_lengths=key_lengths).flatten(2))


class EncoderLayer(nn.Module):
    """x += attention(LN(x)); x += fc2(GELU(fc1(LN(x))))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.self_attn = EncoderAttention(config)
        self.self_attn_layer_norm = Norm(config.hidden_size, bias=True)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.final_layer_norm = Norm(config.hidden_size, bias=True)

    def forward(self, x: Tensor, key_lengths: Tensor) -> Tensor:
        """x: [batch, positions, hidden]; key_lengths: [batch]. Returns like x."""
        normed = layer_norm(x, self.self_attn_layer_norm.weight, self.self_attn_layer_norm.bias)
        attended = self.self_attn(normed, key_lengths)
        normed, x = add_layer_norm(attended, x, self.final_layer_norm.weight, self.final_layer_norm.bias)
        x = self.fc2(gelu(self.fc1(normed)), residual=x)
        # The reference clamps so that the residual stream does not overflow float16; other dtypes need no clamp.
        return x.clamp(-_FLOAT16_LIMIT, _FLOAT16_LIMIT) if x.dtype == torch.float16 else x


@dataclass(frozen=True)
class Windows:
    """What the encoder needs to know of a batch of windows. positions: of the longest window, before pooling;
    key_lengths: positions of each, [batch] int64 on the device; angles, indices: for RoTE, see `pool_norm_rotate`."""

    positions: int
    key_lengths: Tensor
    angles: Tensor | None
    indices: Tensor | None


class Encoder(nn.Module):
    """AF-Whisper with RoTE."""

    def __init__(self, config: EncoderConfig, rote: RoteConfig | None):
        super().__init__()
        self.conv1 = Conv(config.mel_bins, config.hidden_size, 3)
        self.conv2 = Conv(config.hidden_size, config.hidden_size, 3)
        self.embed_positions = Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.layer_norm = Norm(config.hidden_size, bias=True)
        self.time_embedding: TimeEmbedding | None = None
        if rote is not None:
            frames = token_count(WINDOW_SAMPLES)
            self.time_embedding = TimeEmbedding(rote.theta, rote.dim, frames, rote.frame_seconds)
        self._lent: LentLayers | None = None

    def _lent_to(self, device: torch.device) -> LentLayers:
        if self._lent is None:
            self._lent = LentLayers(list(self.layers), device)
        return self._lent

    def forward(self, mel: Tensor, samples: list[int], windows: list[int]) -> list[Tensor]:
        """Encode a batch of windows.

        mel: [batch, mel_bins, frames] from `log_mel`, in the model's dtype; samples: number of samples of each window,
        enough for one token; windows: index of each window in its own audio. Layers on another device are copied to
        that of `mel`, two at a time.
        Returns one [token_count(samples), hidden] tensor per window.
        """
        x = self.tokens(mel, self.windows(samples, windows, mel.device))
        return [row[: token_count(n)] for row, n in zip(x, samples, strict=True)]

    def windows(self, samples: list[int], windows: list[int], device: torch.device) -> Windows:
        """A batch of windows, as `forward` takes them, described for `tokens`."""
        lengths = [conv_length(valid_frames(n)) for n in samples]
        angles = indices = None
        if self.time_embedding is not None:
            angles = self.time_embedding.table(max(windows) + 1, device)
            indices = sent(torch.tensor(windows), device)
        return Windows(max(lengths), sent(torch.tensor(lengths), device), angles, indices)

    def tokens(self, mel: Tensor, batch: Windows) -> Tensor:
        """Encode windows as `forward` does. Returns [batch, tokens of the longest, hidden]."""
        stem = (self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias, self.embed_positions.weight)
        x = conv_stem(mel, *stem)[:, : batch.positions].contiguous()
        if x.device.type == "cuda" and x.device != next(self.layers.buffers()).device:
            x = self._lent_to(x.device)(x, batch.key_lengths)
        else:
            for layer in self.layers:
                x = on_device(layer, x.device)(x, batch.key_lengths)
        norm = self.layer_norm
        return pool_norm_rotate(x, norm.weight, norm.bias, angles=batch.angles, windows=batch.indices)
