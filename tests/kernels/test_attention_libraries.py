"""flash-attn and cuDNN as backends: what they are called with, and what they are not asked for.

The packages are stand-ins with the parameters of the real functions, which check what those ask of their arguments and
compute by the reference. The GPUs are those of `support/fake_cuda.py`.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.accuracy import paged
from support.fake_cuda import FakeCuda
from torch import Tensor
from torch.nn.attention import SDPBackend

from afnext import kernels
from afnext.kernels import attention_libraries as module
from afnext.kernels.attention import attention
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.errors import BackendError
from afnext.kernels.rotary import Rotation, rope_frequencies
from afnext.kernels.row_groups import row_invariant

GPU = torch.device("cuda", 0)

# The parameters of the functions called, as of flash-attn 2.8.4, 3.0.0 and 4 of August 2026.
VERSION_2 = {
    "flash_attn_func": "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None",
}
VERSION_3 = {
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
}
VERSION_4 = {
    "flash_attn_varlen_func": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, "
    "aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, "
    "disable_scheduler_metadata=False",
}


def computed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Any, pages: Any) -> Tensor:
    """What flash-attn documents, after checking what it demands."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for x in (lengths, pages):
        assert x is None or (x.dtype == torch.int32 and x.is_contiguous())
    with kernels.backend("reference"):
        return attention(q, k, v, causal=causal, scale=scale, key_lengths=lengths, page_table=pages)


def version_2(name: str, a: dict[str, Any]) -> Tensor:
    if name == "flash_attn_func":
        return computed(a["q"], a["k"], a["v"], a["causal"], a["softmax_scale"], None, None)
    if name == "flash_attn_with_kvcache":
        assert a["block_table"] is None, "looks at the longest sequence on the host"
        return computed(a["q"], a["k_cache"], a["v_cache"], a["causal"], a["softmax_scale"], a["cache_seqlens"], None)
    assert a["k"].shape[1] % 256 == 0
    starts, ends = a["cu_seqlens_q"], a["cu_seqlens_k"]
    assert starts.dtype == ends.dtype == torch.int32
    assert (starts.diff() == a["max_seqlen_q"]).all()
    assert ends.diff().max() <= a["max_seqlen_k"]
    q = a["q"].unflatten(0, (len(starts) - 1, -1))
    out = computed(q, a["k"], a["v"], a["causal"], a["softmax_scale"], ends.diff(), a["block_table"])
    return out.flatten(0, 1)


def version_3(_name: str, a: dict[str, Any]) -> Tensor:
    arguments = (a["causal"], a["softmax_scale"], a["cache_seqlens"], a["page_table"])
    return computed(a["q"], a["k_cache"], a["v_cache"], *arguments)


def version_4(_name: str, a: dict[str, Any]) -> tuple[Tensor, None]:
    assert a["page_table"] is None or a["seqused_k"].max() <= a["max_seqlen_k"]
    out = computed(a["q"], a["k"], a["v"], a["causal"], a["softmax_scale"], a["seqused_k"], a["page_table"])
    return out, None


class Package:
    """A stand-in for a package. calls: (function, arguments)."""

    def __init__(self, name: str, parameters: dict[str, str], compute: Callable[[str, dict[str, Any]], Any]):
        self.name = name
        self.module = ModuleType(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for function, text in parameters.items():
            signature = inspect.signature(eval(f"lambda {text}: None"))
            setattr(self.module, function, self._standing_in(function, signature, compute))

    def _standing_in(self, name: str, signature: inspect.Signature, compute: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            self.calls.append((name, bound.arguments))
            return compute(name, bound.arguments)

        return function


PACKAGES = {
    "flash_attn": (VERSION_2, version_2),
    "flash_attn_interface": (VERSION_3, version_3),
    "flash_attn.cute": (VERSION_4, version_4),
}
CHIPS = [  # the compute capability, what is installed there, and what runs
    ((8, 0), ("flash_attn", "flash_attn.cute"), "flash_attn"),
    ((9, 0), tuple(PACKAGES), "flash_attn_interface"),
    ((9, 0), ("flash_attn",), "flash_attn"),
    ((10, 0), ("flash_attn", "flash_attn.cute"), "flash_attn.cute"),
    ((12, 0), tuple(PACKAGES), "flash_attn"),
]


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """What runs on a GPU of CHIPS, among all that is installed."""
    capability, installed, runs = getattr(request, "param", CHIPS[1])
    packages = {name: Package(name, *PACKAGES[name]) for name in installed}
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, packages[name].module if name in packages else None)
    module._library.cache_clear()
    with FakeCuda(monkeypatch, capability=capability).active():
        yield packages[runs]
    module._library.cache_clear()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(GPU, dtype)


def problem(lengths: list[int], queries: int, page_size: int = 256) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Queries, and keys and values in pages."""
    k, v = torch.randn(2, len(lengths), max(lengths), 2, 64)
    k_pool, v_pool, table = paged(k, v, lengths, page_size)
    table = torch.where(table >= len(k_pool), 0, table)
    given = {"key_lengths": torch.tensor(lengths).to(GPU), "page_table": table.to(GPU, torch.int32)}
    return (random(len(lengths), queries, 6, 64), *(x.to(GPU, torch.bfloat16) for x in (k_pool, v_pool))), given


def same(operation: Callable[..., Tensor], *args: Any, backend: str = "flash_attn", **options: Any) -> None:
    """A backend gives what the reference does, up to rounding."""
    with kernels.backend("reference"):
        expected = operation(*args, **options)
    with kernels.backend(backend):
        torch.testing.assert_close(operation(*args, **options), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("chip", CHIPS, indirect=True, ids=str)
def test_each_use_of_flash_attn(chip: Package, seed: int) -> None:
    q, k, v = (random(2, 33, 4, 64) for _ in range(3))
    same(attention, q, k, v)
    same(attention, q, k, v, key_lengths=torch.tensor([33, 7]).to(GPU), scale=0.3)
    same(attention, q, k, v, causal=True)
    tensors, given = problem([300, 40], 17)
    same(attention, *tensors, causal=True, **given)
    for new in (1, 3):
        tensors, given = problem([300, 9, 256], new)
        same(decode_attention, *tensors, **given)
    assert len(chip.calls) == 6


def test_queries_are_rotated_first(chip: Package, seed: int) -> None:
    q, k, v = (random(1, 12, 2, 64) for _ in range(3))
    rotation = Rotation(torch.arange(12.0)[None].to(GPU), rope_frequencies(64, 1e4, GPU), "half")
    with kernels.backend("reference"):
        expected = attention(q, k, v, rotation=rotation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFNEXT_BACKEND", "reference,attention=flash_attn")
        torch.testing.assert_close(attention(q, k, v, rotation=rotation), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("chip", [CHIPS[0]], indirect=True)
def test_flash_attn_2_takes_pages_of_256_tokens(chip: Package, seed: int) -> None:
    tensors, given = problem([40], 17, page_size=64)
    with kernels.backend("flash_attn"), pytest.raises(BackendError, match="pages of 64 tokens, as flash-attn takes"):
        attention(*tensors, causal=True, **given)


def test_other_versions_take_any_pages(chip: Package, seed: int) -> None:
    tensors, given = problem([40], 17, page_size=16)
    same(attention, *tensors, causal=True, **given)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float32, 64, "queries and keys in float32"), (torch.bfloat16, 60, "head_dim 60"),
     (torch.float16, 512, "head_dim 512")],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["flash_attn", "cudnn"])
def test_what_is_not_covered_is_said(
    chip: Package, backend: str, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    x = random(1, 5, 2, head_dim, dtype=dtype)
    with kernels.backend(backend), pytest.raises(BackendError, match=f"{backend} .* does not cover {reason}"):
        attention(x, x, x)
    assert not chip.calls


def test_rounded_keys_and_invariant_batches_are_not_covered(chip: Package, seed: int) -> None:
    (q, k, v), given = problem([40], 3)
    scales = torch.ones(k.shape[:3]).to(GPU)
    with kernels.backend("flash_attn"), pytest.raises(BackendError, match="queries and keys in bfloat16 and int8"):
        decode_attention(q, k.to(torch.int8), v.to(torch.int8), k_scales=scales, v_scales=scales, **given)
    with kernels.backend("flash_attn"), row_invariant(), pytest.raises(BackendError, match="batch_invariant"):
        decode_attention(q, k, v, **given)


@pytest.mark.parametrize("chip", [((8, 0), ("flash_attn",), "flash_attn")], indirect=True)
def test_without_the_package(chip: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    x = random(1, 5, 2, 64)
    with kernels.backend("flash_attn"), pytest.raises(BackendError, match="machines without flash-attn; install it"):
        attention(x, x, x)


def test_libraries_run_only_where_they_are_named(chip: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(1, 5, 2, 64)
    attention(x, x, x)
    assert not chip.calls
    cpu = torch.randn(1, 5, 2, 64).bfloat16()
    with kernels.backend("flash_attn"), pytest.raises(BackendError, match="tensors on cpu"):
        attention(cpu, cpu, cpu)


def test_cudnn_computes_the_encoder_and_another_backend_the_rest(
    chip: Package, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    chosen: list[SDPBackend] = []

    class Kernel(SimpleNamespace):
        def __init__(self, backend: SDPBackend):
            chosen.append(backend)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(module, "sdpa_kernel", Kernel)
    q, k, v = (random(2, 33, 4, 64) for _ in range(3))
    same(attention, q, k, v, key_lengths=torch.tensor([33, 7]).to(GPU), backend="cudnn")
    same(attention, q, k, v, backend="cudnn")
    assert chosen == [SDPBackend.CUDNN_ATTENTION] * 2
    tensors, given = problem([40], 17)
    monkeypatch.setenv("AFNEXT_BACKEND", "attention=cudnn+flash_attn")
    with caplog.at_level(logging.INFO, "afnext.kernels"):
        attention(*tensors, causal=True, **given)
    assert len(chip.calls) == 1
    assert len(chosen) == 2
    with kernels.backend("cudnn"), pytest.raises(BackendError, match=r"cudnn .* does not cover keys in pages"):
        attention(*tensors, causal=True, **given)
