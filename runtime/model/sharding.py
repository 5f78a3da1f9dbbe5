"""Tensor parallelism: the part of the decoder that each rank holds, and the layers that combine the parts.

    q, k, v, gate, up   by rows: each rank has some of the heads, KV heads and inner channels
    o, down             by columns, those of the rank's heads and channels; the sum over ranks is the output
    embeddings, lm_head by rows, of the vocabulary; scores are gathered
    everything else     the same on every rank: norms, encoder, adaptor

A rank reads only its part of the vocabulary's matrices, which are an eighth of the weights read per token in int4.
Packed weights are cut with their scales and zero points and keep their values, so a cut must fall between two groups.

Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.linear_int8 import INPUT_MULTIPLE
from ...kernels.norm import add_rms_norm
from ...quant.linear import Embedding, Linear
from ...quant.scheme import PARTS, SchemeError
from ..errors import ConfigError
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .group import Group
from .quantized import expected_tensors

_MOST_RANKS = 64


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """The config of the part that each of `size` ranks holds.

    Raises ConfigError if the heads or channels cannot be divided, and SchemeError if the groups of packed weights
    cannot.
    """
    decoder = config.decoder
    parts = {
        "attention heads": decoder.heads,
        "KV heads": decoder.kv_heads,
        "inner channels of the MLP": decoder.intermediate_size,
    }
    misfits = [f"{count} {what}" for what, count in parts.items() if count % size]
    if misfits:
        fitting = [n for n in range(1, _MOST_RANKS + 1) if not any(count % n for count in parts.values())]
        raise ConfigError(
            f"{size} processes cannot share this model's {' and '.join(misfits)}; choose {_listed(fitting)}."
        )
    part = replace(
        decoder,
        heads=decoder.heads // size,
        kv_heads=decoder.kv_heads // size,
        intermediate_size=decoder.intermediate_size // size,
        vocab_size=-(-decoder.vocab_size // size),
    )
    sharded = replace(config, decoder=part)
    try:
        expected_tensors(sharded)
    except SchemeError as problem:
        raise SchemeError(f"{size} processes cannot share the weights: {problem}") from None
    return sharded


def column_bytes(part: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of a part, from `shard_config`, that are cut by columns and so cannot be views."""
    return sum(
        math.prod(stored.shape) * (stored.dtypes[0] if name.endswith(PARTS) else dtype).itemsize
        for name, stored in expected_tensors(part).items()
        if name.startswith("decoder.") and name.split(".")[-2] in ("o_proj", "down_proj")
    )


class Shard:
    """The part of a model that this process holds. config: its sizes, from `shard_config`."""

    def __init__(self, whole: ModelConfig, group: Group):
        """whole: the config of the whole model, quantization included. Raises what `shard_config` raises."""
        self.group = group
        self.config = shard_config(whole, group.size)
        self._vocabulary = whole.decoder.vocab_size
        self._whole = {name: stored.shape for name, stored in expected_tensors(whole).items()}
        self._parts = {name: stored.shape for name, stored in expected_tensors(self.config).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the whole model."""
        return self._whole[name]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The rank's part of the tensor `name`, contiguous; a view if only rows are cut.

        A vocabulary is padded to equal parts with rows of zeros.
        """
        return self._cut(tensor, self._parts[name]).contiguous()

    def cut_rows(self, rows: int, weight: Tensor) -> Tensor:
        """The rank's part, `rows` rows, of a dense weight."""
        return self._cut(weight, (rows, *weight.shape[1:]))

    def rows(self, layer: str) -> int:
        """Number of rows of a packed layer's weight that the rank has."""
        return self._parts[f"{layer}.weight_codes"][0]

    def elements(self, name: str, weight: Tensor, indices: Tensor) -> Tensor:
        """The elements of the flattened whole tensor at `indices` that the rank contributes, and zeros for the rest.

        weight: the rank's part. Rank 0 contributes all elements that every rank has.
        """
        whole, part = self._whole[name], self._parts[name]
        places = list(torch.unravel_index(indices, whole))
        mine = torch.full(indices.shape, whole != part or self.group.rank == 0)
        for dim, (all_of, ours) in enumerate(zip(whole, part, strict=True)):
            if all_of != ours:
                places[dim] = places[dim] - self.group.rank * ours
                mine &= (places[dim] >= 0) & (places[dim] < ours)
        taken = torch.zeros(indices.shape, dtype=weight.dtype)
        taken[mine] = weight[tuple(place[mine].to(weight.device) for place in places)].cpu()
        return taken

    def parallelize(self, decoder: Decoder) -> None:
        """Give an empty decoder of the shard's sizes the layers that combine the ranks' parts."""
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.o_proj = RowParallel(layer.self_attn.o_proj, self.group)
            layer.mlp.down_proj = RowParallel(layer.mlp.down_proj, self.group)
        decoder.embed_tokens = VocabularyEmbedding(decoder.embed_tokens, self.group, self._vocabulary)
        if decoder.lm_head is not None:
            decoder.lm_head = VocabularyHead(decoder.lm_head, self.group, self._vocabulary)

    def _cut(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        for dim, (all_of, ours) in enumerate(zip(tensor.shape, shape, strict=True)):
            if all_of != ours:
                start = min(self.group.rank * ours, all_of)
                tensor = tensor.narrow(dim, start, min(ours, all_of - start))
        if tensor.shape[0] < shape[0]:
            tensor = torch.cat([tensor, tensor.new_zeros(shape[0] - len(tensor), *tensor.shape[1:])])
        return tensor


class RowParallel(Linear):
    """y = x W^T, where each rank has some columns of W and the corresponding inputs."""

    def __init__(self, like: Linear, group: Group):
        """like: the empty layer of the rank's sizes, without a bias."""
        super().__init__(like.weight.shape[1], like.weight.shape[0], bias=False)
        self._group = group

    @property
    def _rounds_rows(self) -> bool:
        """Whether the product rounds each row of inputs with one scale."""
        return self.scheme is not None and self.scheme.rounds_inputs and self.packed.scales.ndim == 1

    def prepare(self, dtype: torch.dtype) -> None:
        """See `Linear`. If inputs are rounded with one scale per row, an extra input with weight zero holds the largest
        input of all ranks, so that every rank rounds with the same scale."""
        if self._rounds_rows:
            self.register_buffer("weight_codes", F.pad(self.packed.codes, (0, INPUT_MULTIPLE)))
        super().prepare(dtype)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, up: Linear | None = None) -> Tensor:
        """See `Linear`; without residual and up."""
        assert residual is None
        assert up is None
        if self._rounds_rows:
            largest = self._group.maximum(x.abs().amax(-1, keepdim=True))
            x = torch.cat([x, largest, x.new_zeros(*x.shape[:-1], INPUT_MULTIPLE - 1)], -1)
        return self._group.all_reduce(self._product(x, None))

    def add_norm(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Linear`."""
        return add_rms_norm(self(x), residual, norm, eps)


class VocabularyEmbedding(Embedding):
    """An embedding table; each rank has some of its rows."""

    def __init__(self, like: Embedding, group: Group, vocabulary: int):
        """like: the empty layer of the rank's sizes; vocabulary: rows of the whole table."""
        super().__init__(*like.weight.shape)
        self._rows = like.weight.shape[0]
        self._group = group
        self._vocabulary = vocabulary

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Embedding`."""
        local = ids - self._group.rank * self._rows
        elsewhere = (local < 0) | (local >= self._rows)
        x = super().forward(local.clamp(0, self._rows - 1), dtype)
        return self._group.all_reduce(x.masked_fill(elsewhere[..., None], 0))

    def scores(self, x: Tensor) -> Tensor:
        """See `Embedding`."""
        return _gathered(super().scores(x), self._group, self._vocabulary)


class VocabularyHead(Linear):
    """The language-model head; each rank has some of its rows."""

    def __init__(self, like: Linear, group: Group, vocabulary: int):
        """like: the empty layer of the rank's sizes; vocabulary: rows of the whole head."""
        super().__init__(like.weight.shape[1], like.weight.shape[0], bias=False)
        self._group = group
        self._vocabulary = vocabulary

    def forward(self, x: Tensor, *, residual: Tensor | None = None, up: Linear | None = None) -> Tensor:
        """See `Linear`; without residual and up."""
        assert residual is None
        assert up is None
        return _gathered(self._product(x, None), self._group, self._vocabulary)


def _gathered(scores: Tensor, group: Group, vocabulary: int) -> Tensor:
    return torch.cat(group.all_gather(scores), -1)[..., :vocabulary]


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
