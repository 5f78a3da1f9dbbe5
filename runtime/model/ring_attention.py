"""Ring attention: a prompt divided by tokens among any number of ranks, across machines. For research only, with no
option to enable it: it computes a prompt's hidden states, but keeps no keys and values for decoding.

Each rank has every n-th token, and all heads. Its queries stay, while keys and values go around the ring, from each
rank to the next; the results for each block are merged by the logarithms of the sums. Ulysses (`sequence_parallel`)
sends less, but to every rank, and supports at most as many ranks as there are KV heads.

Every n-th token, rather than a run of tokens, gives each rank an equal share of a causal block's products.

Source: Liu et al. 2023, arXiv:2310.01889; Brandon et al. 2023, arXiv:2311.09431.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.rotary import Rotation, rotary
from ...quant.linear import Linear
from .decoder import Decoder, DecoderAttention, DecoderLayer
from .group import Group


class RingParallel:
    """Runs a prompt through the whole decoder, each rank with its share of the tokens."""

    def __init__(self, decoder: Decoder, group: Group):
        """decoder: with the whole weights; its attention is replaced."""
        self._decoder = decoder
        self._group = group
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn = RingAttention(layer.self_attn, group)  # type: ignore[assignment]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [1, time, hidden]; positions: [1, time] int64; all tokens, on every rank. Returns the normed hidden
        states, like x."""
        count, size, rank = x.shape[1], self._group.size, self._group.rank
        missing = -count % size
        own = F.pad(x, (0, 0, 0, missing))[:, rank::size].contiguous()
        rotation = self._decoder.rotation(F.pad(positions, (0, missing))[:, rank::size])
        no_cache: Any = None
        hidden = self._decoder.transformed(own, rotation, no_cache)
        return torch.stack(self._group.all_gather(hidden), 2).flatten(1, 2)[:, :count]


class RingAttention(nn.Module):
    """Causal attention of the rank's tokens to those of all ranks."""

    def __init__(self, attention: DecoderAttention, group: Group):
        """attention: with the weights of all heads."""
        super().__init__()
        self.attention = attention
        self._group = group

    @property
    def o_proj(self) -> Linear:
        """The product that follows."""
        return self.attention.o_proj

    def forward(self, x: Tensor, rotation: Rotation, cache: None, layer: int) -> Tensor:
        """x: [1, own tokens, hidden]; rotation: of these. Returns the inputs of `o_proj`."""
        q, k, v = self.attention.project(x)
        attended = ring_attention(rotary(q, rotation)[0], rotary(k, rotation)[0], v[0], self._group)
        return attended.flatten(1)[None]


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
    """Causal attention where token t of rank r is token t * ranks + r of the prompt, and ranks have equally many
    tokens.

    q: [time, heads, head_dim]; k, v: [time, KV heads, head_dim]. Returns like q, summed in float32.
    """
    block = torch.stack([k, v], 1)
    total, log_sum = _attended(q, k, v, strict=False)
    for step in range(1, group.size):
        block = group.rotate(block)
        source = (group.rank - step) % group.size
        part, log_part = _attended(q, block[:, 0], block[:, 1], strict=source > group.rank)
        both = torch.logaddexp(log_sum, log_part)
        total = total * (log_sum - both).exp()[..., None] + part * (log_part - both).exp()[..., None]
        log_sum = both
    return total.to(q.dtype)


def _attended(q: Tensor, k: Tensor, v: Tensor, *, strict: bool) -> tuple[Tensor, Tensor]:
    """Attention to one block, and the logarithms of its sums, [time, heads] float32, -inf where a query sees no key.

    strict: a query sees only the keys before its own index, otherwise also the key at that index.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("tkgd,skd->tkgs", grouped, k.float()) * q.shape[-1] ** -0.5
    unseen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(0 if strict else 1)
    scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    return torch.einsum("tkgs,skd->tkgd", weights, v.float()).flatten(1, 2), log_sum.flatten(1)
