"""The training model of afnext-tiny: AF-Next's architecture in plain torch, fast on short crops of long recordings.

It computes the same function as the runtime, with two options for training: tokens have given positions, so that a few
crops can represent a recording of 30 minutes, and an additive attention bias lets one silent token count as many. It
also returns attention weights of some heads, so that training can supervise them. Parameters have the names of the flat
checkpoint layout, so exporting is `state_dict()`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afnext.kernels.rotary import rope_frequencies
from afnext.kernels.rote import TimeEmbedding

from .watched_attention import watched_attention

Watched = dict[tuple[int, int], Tensor]

MELS = 80
ENCODER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
DECODER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
# So large that half of a head's channels hardly rotate over the 45 000 tokens of 30 minutes: attention can match their
# contents at any distance.
ROPE_THETA = 1e12
ROTE = TimeEmbedding(theta=1200.0, dim=int(ENCODER["hidden_size"] * 0.2), frames=750, frame_seconds=0.04)


def storage_dtype(name: str, parameter: Tensor) -> torch.dtype:
    """How the checkpoint stores a parameter.

    In float16, but the matrices of the encoder's layers, half of all parameters, in 8-bit floats: everything in float16
    would exceed 16 MB.
    """
    eight = name.startswith("audio_tower.layers.") and parameter.ndim == 2
    return torch.float8_e4m3fn if eight else torch.float16


class EncoderAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        # For crops this short the backward pass of the plain formula is faster than that of the fused one.
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.self_attn = EncoderAttention(width, heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """Log-mel crops to tokens: convolutions, positions, layers, pooling, LayerNorm, RoTE."""

    def __init__(self) -> None:
        super().__init__()
        width = ENCODER["hidden_size"]
        self.conv1 = nn.Conv1d(MELS, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(1500, width)
        self.layers = nn.ModuleList(
            EncoderLayer(width, ENCODER["intermediate_size"], ENCODER["num_attention_heads"])
            for _ in range(ENCODER["num_hidden_layers"])
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, windows: Tensor) -> Tensor:
        """mel: [windows, mels, frames], windows from their beginning, two frames a position; windows: [windows] index
        of each. Returns [windows, tokens, width]."""
        x = self.heard(mel)
        return rotated(x, windows, torch.arange(x.shape[1]).expand(x.shape[:2]))

    def heard(self, mel: Tensor) -> Tensor:
        """The result of `forward` before RoTE."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.embed_positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(F.avg_pool1d(x.float().transpose(1, 2), 2).transpose(1, 2))


def rotated(x: Tensor, windows: Tensor, tokens: Tensor) -> Tensor:
    """RoTE. x: [rows, time, width]; windows: [rows] or [rows, time] index of the window; tokens: [rows, time] place in
    the window."""
    windows = windows[:, None] if windows.ndim == 1 else windows
    angles = ROTE.table(60, x.device)[windows, tokens].double()
    cos, sin = angles.cos().float(), angles.sin().float()
    width = 2 * angles.shape[-1]
    a, b = x[..., 0:width:2], x[..., 1:width:2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., width:]), dim=-1)


class DecoderAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.head_dim) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the values to add to x, and the log-weights that `watched_attention` returns for the places."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        q, k = (_turn(y, cos, sin) for y in (q * self.head_dim**-0.5, k))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        attended, told = watched_attention(q, k, v, bias, places)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), told


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class DecoderMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.self_attn = DecoderAttention(width, heads, kv_heads)
        self.mlp = DecoderMLP(width, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        attended, told = self.self_attn(self.input_layernorm(x), cos, sin, bias, places)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), told


class DecoderBody(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        width = DECODER["hidden_size"]
        self.embed_tokens = nn.Embedding(vocabulary, width)
        sizes = (width, DECODER["intermediate_size"], DECODER["num_attention_heads"], DECODER["num_key_value_heads"])
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(DECODER["num_hidden_layers"]))
        self.norm = nn.RMSNorm(width, eps=1e-6)


class TinyModel(nn.Module):
    """The whole model. `forward` also returns the inputs of the auxiliary losses."""

    def __init__(self, vocabulary: int):
        super().__init__()
        width = DECODER["hidden_size"]
        self.audio_tower = Encoder()
        self.multi_modal_projector = nn.ModuleDict(
            {"linear_1": nn.Linear(ENCODER["hidden_size"], width), "linear_2": nn.Linear(width, width)}
        )
        head = nn.Linear(width, vocabulary, bias=False)
        self.language_model = nn.ModuleDict({"model": DecoderBody(vocabulary), "lm_head": head})
        self._initialize()

    def _initialize(self) -> None:
        decoder = self.decoder
        for name, parameter in (*decoder.named_parameters(), *self.language_model["lm_head"].named_parameters()):
            if parameter.ndim == 2:
                scale = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, 0.0, scale * (0.5 if "embed" in name else parameter.shape[1] ** -0.5))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # RoTE rotates the first channels of every token by angles that encode its time. Channels that are constant
        # before RoTE reach the adaptor as the cosine and sine of those angles.
        norm = self.audio_tower.layer_norm
        width = 4 * ROTE.dim // 2
        with torch.no_grad():
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            norm.weight[:width] = 0.0
            norm.bias[0:width:2] = 1.0

    @torch.no_grad()
    def round_as_stored(self, part: str = "") -> None:
        """Round the parameters whose names begin with `part` to the precision of the checkpoint."""
        for name, parameter in self.named_parameters():
            if name.startswith(part):
                parameter.copy_(parameter.to(storage_dtype(name, parameter)))

    @property
    def decoder(self) -> DecoderBody:
        """The decoder without its head."""
        return cast(DecoderBody, self.language_model["model"])

    def adapted(self, x: Tensor) -> Tensor:
        """The decoder's inputs for the encoder's tokens after RoTE: [..., hidden]."""
        projector = self.multi_modal_projector
        return projector["linear_2"](F.gelu(projector["linear_1"](x)))

    def decode(
        self, x: Tensor, positions: Tensor, bias: Tensor, watched: Watched | None = None
    ) -> tuple[Tensor, dict[tuple[int, int], Tensor], list[Tensor]]:
        """x: [batch, time, hidden]; positions: [batch, time]; bias: [batch, 1, time, time], added to the scores;
        watched: for some heads (layer, head) the places of which to tell, [3, entries] of row, query and key.
        Returns the normed hidden states, for each head watched the logarithms of the weights there, and the hidden
        states after each layer."""
        decoder, watched = self.decoder, watched or {}
        angles = positions.float()[:, None, :, None] * rope_frequencies(64, ROPE_THETA)
        cos, sin = angles.cos(), angles.sin()
        told, after = dict[tuple[int, int], Tensor](), list[Tensor]()
        for index, layer in enumerate(decoder.layers):
            own = {head: places for head, places in watched.items() if head[0] == index}
            places = [torch.cat((p[:1], torch.full_like(p[:1], head), p[1:])) for (_, head), p in own.items()]
            x, found = layer(x, cos, sin, bias, torch.cat([torch.zeros(4, 0, dtype=torch.long), *places], 1))
            told |= dict(zip(own, found.split([places.shape[1] for places in own.values()]), strict=True))
            after.append(x)
        return decoder.norm(x), told, after
