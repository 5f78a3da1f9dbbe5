"""Sequence parallelism (Ulysses) for the prefill of long chunks: each rank computes some of the tokens.

Every rank has the whole weights. Products, norms and MLPs of a chunk are computed for a rank's own tokens. Before
attention the ranks exchange tokens for heads, so that each has all tokens for its own heads, as in tensor parallelism:
the KV cache is the same, and decoding uses the ranks' parts of the same weights.

    q, k, v of own tokens, all heads -> all-to-all -> all tokens, own heads -> cache, attention -> all-to-all -> o

A rank sends (2 heads + 2 KV heads) * head_dim elements per layer for each of its own tokens, (n - 1) / n of them to
other ranks; tensor parallelism sums 2 * hidden for every token.

Source: Jacobs et al. 2023, arXiv:2309.14509; Hidayetoglu et al. 2025, arXiv:2509.16495.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.rotary import Rotation
from ...quant.linear import Linear
from .decoder import CacheView, Decoder, DecoderAttention, DecoderLayer
from .group import Group

LONG = 512
"""Minimal length of a chunk that is divided by tokens; shorter ones are computed as in tensor parallelism."""


class SequenceParallel:
    """Runs chunks through the whole decoder, each rank with its share of the tokens."""

    def __init__(self, decoder: Decoder, group: Group):
        """decoder: with the whole weights; its attention is replaced by one that exchanges tokens for heads."""
        self._decoder = decoder
        self._group = group
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn = UlyssesAttention(layer.self_attn, group)  # type: ignore[assignment]

    def __call__(self, x: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
        """Like `decoder(x, positions, cache)`, with the cache of the rank's KV heads. x, positions: of all tokens of
        one sequence. Returns the hidden states of all tokens."""
        count, size, rank = x.shape[1], self._group.size, self._group.rank
        share = -(-count // size)
        own = F.pad(x, (0, 0, 0, share * size - count))[:, rank * share : (rank + 1) * share].contiguous()
        hidden = self._decoder.transformed(own, self._decoder.rotation(positions), cache)
        return torch.cat(self._group.all_gather(hidden), 1)[:, :count]


class UlyssesAttention(nn.Module):
    """Attention over all tokens of a chunk with the rank's heads, between products of the rank's tokens."""

    def __init__(self, attention: DecoderAttention, group: Group):
        """attention: with the weights of all heads."""
        super().__init__()
        self.attention = attention
        self._group = group

    @property
    def o_proj(self) -> Linear:
        """The product that follows."""
        return self.attention.o_proj

    def forward(self, x: Tensor, rotation: Rotation, cache: CacheView, layer: int) -> Tensor:
        """x: [1, own tokens, hidden]; rotation, cache: of all tokens. Returns the inputs of `o_proj` for own tokens."""
        size, count = self._group.size, cache.slots.shape[1]
        projected = self.attention.project(x)
        heads = [part.shape[2] // size for part in projected]
        # [own tokens, heads] -> [ranks, own tokens, heads of that rank], q, k and v beside each other
        grouped = [part[0].unflatten(1, (size, -1)).transpose(0, 1) for part in projected]
        whole = self._group.exchange(torch.cat(grouped, 2)).flatten(0, 1)[None, :count]
        q, k, v = (part.contiguous() for part in whole.split(heads, 2))
        key_bias = self.attention.key_bias().unflatten(0, (size, -1))[self._group.rank]
        attended = self.attention.attend(q, k, v, key_bias, rotation, cache, layer)[0]
        padded = F.pad(attended, (0, 0, 0, 0, 0, x.shape[1] * size - count)).unflatten(0, (size, -1))
        own = self._group.exchange(padded.contiguous()).transpose(0, 1)
        return own.flatten(1)[None]
