"""Attention that also returns the log-weights of some pairs of query and key, with gradients.

    P = softmax(Q K^T + bias),  O = P V,  told[e] = log P[places[e]]

With gradients dO of O and g of `told`, and G[q] the sum of g over the entries of query q,

    dP = dO V^T,  dS = P * (dP - rowsum(dO * O) - G) + scatter(g),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO,

so P is the only tensor of its size that is kept, and all tensors of this size are bfloat16: on a CPU, memory bandwidth
bounds training here.
"""

from typing import Any

import torch
from torch import Tensor


class _WatchedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(-1, -2)).add_(bias)
        rows, heads, queries, keys = places
        watched = scores[rows, heads, queries].float()
        told = watched.gather(-1, keys[:, None]).squeeze(-1) - watched.logsumexp(-1)
        weights = scores.softmax(-1)
        out = weights @ v
        ctx.save_for_backward(q, k, v, weights, out, places)
        return out, told

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_told: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out, places = ctx.saved_tensors
        rows, heads, queries, _ = places
        drop = (grad_out.float() * out.float()).sum(-1)
        drop.index_put_((rows, heads, queries), grad_told.float(), accumulate=True)
        scores = grad_out @ v.transpose(-1, -2)
        scores.sub_(drop[..., None].to(scores.dtype)).mul_(weights)
        scores.index_put_(tuple(places), grad_told.to(scores.dtype), accumulate=True)
        grad_q, grad_k = scores @ k, scores.transpose(-1, -2) @ q
        return grad_q, grad_k, weights.transpose(-1, -2) @ grad_out, None, None


def watched_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q, already scaled, k and v, [batch, heads, time, head_dim], with a bias that broadcasts over the
    heads, in the dtype of q.

    places: [4, entries] of row, head, query and key. Returns the attention's output, and for every entry the logarithm
    of its weight, float32.
    """
    out, told = _WatchedAttention.apply(q, k, v, bias.to(q.dtype), places)  # type: ignore[no-untyped-call]
    return out, told
