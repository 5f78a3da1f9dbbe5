"""The parts of a model that ranks hold: together they are the whole, and what cannot be divided is refused."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.ranks import thread_groups

from afnext.kernels.packed_weight import Packed
from afnext.quant.linear import Embedding, Linear
from afnext.quant.recipe import recipe
from afnext.quant.scheme import SchemeError, parse_scheme
from afnext.runtime.errors import ConfigError, GroupError
from afnext.runtime.model.checkpoint import load_weights
from afnext.runtime.model.group import Group
from afnext.runtime.model.hub import resolve
from afnext.runtime.model.opened import open_checkpoint
from afnext.runtime.model.quantized import layer_schemes, to_quantize
from afnext.runtime.model.sharding import RowParallel, Shard, VocabularyEmbedding, VocabularyHead, shard_config

CPU = torch.device("cpu")
SCHEMES = (
    *("dense", "int8", "int8-w8a8", "fp8", "int8-g32-zeros", "int4-g32", "int4-g64-zeros", "int4-g64-w4a8", "nf4"),
    *("nvfp4", "mxfp4"),
)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve("afnext-tiny", revision=None)


def rank_of(rank: int, size: int) -> Group:
    return SimpleNamespace(rank=rank, size=size)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "size"), [("dense", 2), *((name, 4) for name in SCHEMES)])
def test_the_parts_of_all_ranks_are_the_whole(tiny: Path, name: str, size: int) -> None:
    """Packed weights are never packed anew: the parts have the codes, scales and zero points of the whole."""
    checkpoint = open_checkpoint(tiny)
    quant = None if name == "dense" else recipe(name)
    config = to_quantize(checkpoint.config, quant)
    load = {"device": CPU, "dtype": torch.float32, "quant": quant}
    whole = dict(load_weights(checkpoint.weights, checkpoint.config, **load))
    shards = [Shard(config, rank_of(rank, size)) for rank in range(size)]
    parts = [dict(load_weights(checkpoint.weights, checkpoint.config, shard=shard, **load)) for shard in shards]
    by_rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    for layer in {name.rpartition(".")[0] for name in whole}:

        def weight(tensors: dict[str, torch.Tensor], layer: str = layer) -> torch.Tensor:
            scheme = layer_schemes(config).get(layer)
            if scheme is None:
                return tensors[f"{layer}.weight"]
            stored = [tensors.get(f"{layer}.weight_{part}") for part in ("codes", "scales", "zeros")]
            return scheme.dequantize(Packed(*stored), torch.float32)

        ours = [weight(part) for part in parts]
        if layer.startswith("decoder.") and layer.endswith(by_rows):
            together = torch.cat(ours, 0)
        elif layer.startswith("decoder.") and layer.endswith(("o_proj", "down_proj")):
            together = torch.cat(ours, 1)
        else:
            assert all(torch.equal(other, ours[0]) for other in ours)
            together = ours[0]
        assert torch.equal(together, weight(whole)), layer


def test_what_cannot_be_divided_is_refused(tiny: Path) -> None:
    config = open_checkpoint(tiny).config
    with pytest.raises(ConfigError, match=r"3 processes .* 4 attention heads .*choose 1, 2 or 4"):
        shard_config(config, 3)
    packed = dataclasses.replace(config, quantization=recipe("int4-g128"))
    with pytest.raises(SchemeError, match=r"4 processes .*layers\.0\.self_attn\.o_proj cannot be int4-g128: 64 inputs"):
        shard_config(packed, 4)


@pytest.mark.parametrize("vocabulary", [7, 5])
def test_a_vocabulary_need_not_be_divisible(vocabulary: int, seed: int) -> None:
    """With 4 ranks, the last has one of 7 rows, and none of 5."""
    table, x, ids = torch.randn(vocabulary, 16), torch.randn(3, 16), torch.arange(vocabulary)

    def rank(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        rows = -(-vocabulary // group.size)
        part = torch.zeros(rows, 16)
        mine = table[group.rank * rows : (group.rank + 1) * rows]
        part[: len(mine)] = mine
        embedding = VocabularyEmbedding(Embedding(rows, 16), group, vocabulary)
        head = VocabularyHead(Linear(16, rows, bias=False), group, vocabulary)
        for layer in (embedding, head):
            layer.register_buffer("weight", part)
        return embedding(ids, torch.float32), head(x)

    for embedded, scores in thread_groups(4, rank):
        assert torch.equal(embedded, table)
        torch.testing.assert_close(scores, x @ table.T)


@pytest.mark.parametrize(("name", "rows"), [("int8-w8a8", 5), ("fp8", 5), ("fp8", 70)])
def test_rounded_inputs_have_one_scale_on_all_ranks(name: str, rows: int, seed: int) -> None:
    """Each rank rounds its inputs with the scale of the whole row: the sum is the product of the whole."""
    scheme = parse_scheme(name)
    x, packed = torch.randn(rows, 64), scheme.quantize(torch.randn(24, 64))
    x[:, 40] *= 30  # the largest input is in the second half

    def rank(group: Group) -> torch.Tensor:
        part = slice(32 * group.rank, 32 * (group.rank + 1))
        like = Linear(32, 24, bias=False)
        layer = RowParallel(like, group)
        layer.use(scheme)
        layer.register_buffer("weight_codes", packed.codes[:, part].contiguous())
        layer.register_buffer("weight_scales", packed.scales)
        layer.prepare(torch.float32)
        return layer(x[:, part].contiguous())

    expected = scheme.linear(x, packed, None)
    for y in thread_groups(2, rank):
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-4 if name == "fp8" else 1e-5)


def test_a_lost_rank_is_a_group_error() -> None:
    """A collective whose partner is gone raises instead of waiting."""
    gone = threading.Event()

    def rank(group: Group) -> str:
        if group.rank == 1:
            del group._backend
            gone.set()
            return ""
        assert gone.wait(60)
        with pytest.raises(GroupError, match="another rank ended"):
            group.all_reduce(torch.ones(4))
        return "raised"

    assert list(thread_groups(2, rank)) == ["raised", ""]
