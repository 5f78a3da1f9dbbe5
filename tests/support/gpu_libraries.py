"""Stand-ins for libraries that need a GPU: the signatures and refusals of their sources, computed by torch.

Signatures: flash-attn 2.8.4 (its interfaces 2, 3 and 4), FlashInfer 0.7, SageAttention 2.2, gemlite 0.6, torchao 0.18,
Marlin. A call that the library would refuse fails here, too.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def module(name: str, **members: Any) -> ModuleType:
    """A module with these members."""
    made = ModuleType(name)
    vars(made).update(members)
    return made


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Attention of [batch, length, heads, head_dim] in float32; a causal mask ends at the last key."""
    assert q.dtype in HALF
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] % k.shape[2] == 0
    groups = q.shape[2] // k.shape[2]
    wide_q, wide_k, wide_v = (
        x.float().transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    )
    scores = wide_q @ wide_k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if causal:
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ wide_v).transpose(1, 2).to(q.dtype)


def flash_attn() -> ModuleType:
    """flash-attn 2."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: Any = 0.0, softmax_scale: Any = None, causal: Any = False,
        window_size: Any = (-1, -1), softcap: Any = 0.0, alibi_slopes: Any = None, deterministic: Any = False,
        return_attn_probs: Any = False,
    ) -> Any:  # fmt: skip
        return attend(q, k, v, causal, softmax_scale)

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, rotary_cos: Any = None,
        rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
        block_table: Any = None, softmax_scale: Any = None, causal: Any = False, window_size: Any = (-1, -1),
        softcap: Any = 0.0, rotary_interleaved: Any = True, alibi_slopes: Any = None, num_splits: Any = 0,
        return_softmax_lse: Any = False,
    ) -> Any:  # fmt: skip
        return _cached(q, k_cache, v_cache, cache_seqlens, causal)

    return module("flash_attn", flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def flash_attn_interface() -> ModuleType:
    """flash-attn 3."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False, qv: Any = None, q_descale: Any = None,
        k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: Any = 0,
        softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, sm_margin: Any = 0,
        return_attn_probs: Any = False,
    ) -> Any:  # fmt: skip
        return attend(q, k, v, causal, softmax_scale)

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
        rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
        page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
        rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        softmax_scale: Any = None, causal: Any = False, window_size: Any = (-1, -1), attention_chunk: Any = 0,
        softcap: Any = 0.0, rotary_interleaved: Any = True, scheduler_metadata: Any = None, num_splits: Any = 0,
        pack_gqa: Any = None, sm_margin: Any = 0, return_softmax_lse: Any = False,
    ) -> Any:  # fmt: skip
        return _cached(q, k_cache, v_cache, cache_seqlens, causal)

    return module(
        "flash_attn_interface", flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )


def flash_attn_cute() -> ModuleType:
    """flash-attn 4, which returns the log-sum-exp besides."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: Any = None,
        causal: Any = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: Any = 0.0,
        num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, return_lse: Any = False,
    ) -> Any:  # fmt: skip
        return attend(q, k, v, causal, softmax_scale), None

    return module("flash_attn.cute", flash_attn_func=flash_attn_func)


def _cached(q: Tensor, k: Tensor, v: Tensor, lengths: Any, causal: bool) -> Tensor:
    assert lengths.dtype == torch.int32
    assert lengths.shape == (len(q),)
    rows = [attend(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], causal) for i, n in enumerate(map(int, lengths))]
    return torch.cat(rows)


class BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's decoding."""

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Any = None, paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None, backend: str = "auto", jit_args: Any = None,
    ) -> None:  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any(), "the workspace must be zero at first"
        assert kv_layout == "NHD"
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE", window_left: int = -1,
        logits_soft_cap: Any = None, q_data_type: Any = "float16", kv_data_type: Any = None, o_data_type: Any = None,
        data_type: Any = None, sm_scale: Any = None, rope_scale: Any = None, rope_theta: Any = None,
        non_blocking: bool = True, block_tables: Any = None, seq_lens: Any = None,
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indices) == int(indptr[-1])
        group = num_qo_heads // num_kv_heads
        assert self.use_tensor_cores or group in (1, 2, 3, 4, 6, 8), f"Unsupported group_size: {group}"
        self.planned = indptr, indices, last_page_len, page_size, q_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, q_scale: Any = None, out: Any = None) -> Tensor:
        indptr, indices, last, page_size, dtype = self.planned
        assert (q.ndim, q.dtype) == (3, dtype)
        rows = []
        for i in range(len(q)):
            pages = indices[indptr[i] : indptr[i + 1]].long()
            length = (len(pages) - 1) * page_size + int(last[i])
            k, v = (cache[pages].flatten(0, 1)[None, :length] for cache in paged_kv_cache)
            rows.append(attend(q[i][None, None], k, v, causal=False)[0])
        return torch.cat(rows)


def flashinfer() -> ModuleType:
    """FlashInfer."""

    def single_prefill_with_kv_cache(
        q: Any, k: Any, v: Any, scale_q: Any = None, scale_k: Any = None, scale_v: Any = None, o_dtype: Any = None,
        custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False, kv_layout: str = "NHD",
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: Any = None,
        window_left: int = -1, logits_soft_cap: Any = None, rope_scale: Any = None, rope_theta: Any = None,
        backend: str = "auto", return_lse: bool = False,
    ) -> Any:  # fmt: skip
        assert q.ndim == k.ndim == v.ndim == 3
        return attend(q[None], k[None], v[None], causal, sm_scale)[0]

    return module(
        "flashinfer",
        single_prefill_with_kv_cache=single_prefill_with_kv_cache,
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    )


def sageattention() -> ModuleType:
    """SageAttention."""

    def sageattn(
        q: Any, k: Any, v: Any, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: Any = None,
        return_lse: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert not kwargs, "it ignores arguments that it does not know"
        assert tensor_layout == "NHD"
        assert not is_causal or q.shape[1] == k.shape[1], "its causal mask begins at the first key"
        return attend(q, k, v, is_causal, sm_scale)

    return module("sageattention", sageattn=sageattn)


@dataclass
class Int4WeightOnlyConfig:
    """torchao's."""

    group_size: int = 128
    set_inductor_config: bool = True
    int4_packing_format: str = "plain"
    int4_choose_qparams_algorithm: str = "tinygemm"
    int4_tile_packed_ntile: int = 8
    version: int = 2


@dataclass
class Int8WeightOnlyConfig:
    """torchao's."""

    group_size: int | None = None
    granularity: Any = None
    set_inductor_config: bool = True
    version: int = 2


def torchao_quantization() -> ModuleType:
    """torchao.quantization."""

    def quantize_(model: Any, config: Any, filter_fn: Any = None, device: Any = None) -> None:
        assert not isinstance(model, nn.Linear), "it replaces the layers inside of a model"
        if isinstance(config, Int4WeightOnlyConfig):
            assert config.group_size in (32, 64, 128, 256)
            assert config.int4_packing_format == "tile_packed_to_4d", "other formats need other packages"
            assert all(part.weight.dtype == torch.bfloat16 for part in model)

    return module(
        "torchao.quantization",
        Int4WeightOnlyConfig=Int4WeightOnlyConfig,
        Int8WeightOnlyConfig=Int8WeightOnlyConfig,
        quantize_=quantize_,
    )


class _Gemlite:
    def __init__(self, device: str = "cuda:0", dtype: Any = None) -> None:
        assert dtype in (None, *HALF, torch.float32)

    def from_linear(self, linear_layer: nn.Linear, del_orig: bool = True) -> Any:
        weight, bias = linear_layer.weight.detach().clone(), linear_layer.bias
        if del_orig:
            del linear_layer.weight, linear_layer.bias
        return lambda x: nn.functional.linear(x, weight, bias)


def gemlite_helper() -> ModuleType:
    """gemlite.helper."""
    return module("gemlite.helper", A16W8_INT8=_Gemlite, A8W8_int8_dynamic=_Gemlite)


class Layer(nn.Module):
    """Marlin's, which holds codes and scales as they are."""

    codes: Tensor
    s: Tensor

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int = -1) -> None:
        super().__init__()
        assert groupsize in (-1, 128)
        assert infeatures % 128 == 0
        assert outfeatures % 256 == 0
        self.groupsize = groupsize

    def pack(self, linear: nn.Linear, scales: Tensor) -> None:
        assert linear.weight.dtype == scales.dtype == torch.half
        assert scales.shape == (linear.out_features, linear.in_features // self.groupsize)
        self.s = scales
        by_group = linear.weight.data.unflatten(1, (scales.shape[1], -1))
        self.codes = (torch.round(by_group / scales[..., None]).int() + 8).clamp(0, 15)

    def forward(self, x: Tensor) -> Tensor:
        weight = ((self.codes - 8) * self.s[..., None]).flatten(1)
        return nn.functional.linear(x, weight)


def marlin() -> ModuleType:
    """Marlin."""
    return module("marlin", Layer=Layer)


def vllm_custom_ops() -> ModuleType:
    """vllm._custom_ops."""

    def gptq_marlin_repack(
        b_q_weight: Any, perm: Any, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
    ) -> Any:
        assert b_q_weight.dtype == perm.dtype == torch.int32
        assert b_q_weight.shape == (size_k // 8, size_n)
        assert b_q_weight.is_contiguous()
        assert num_bits == 4
        shifts = torch.arange(0, 32, 4)[None, :, None]
        return (b_q_weight[:, None] >> shifts & 15).flatten(0, 1)

    return module("vllm._custom_ops", gptq_marlin_repack=gptq_marlin_repack)


def vllm_marlin_utils() -> ModuleType:
    """vllm.model_executor.layers.quantization.utils.marlin_utils, with weights and scales in their own order."""

    def marlin_permute_scales(s: Any, size_k: int, size_n: int, group_size: int, is_a_8bit: bool = False) -> Any:
        assert s.shape == (size_k // group_size, size_n)
        return s

    def apply_gptq_marlin_linear(
        input: Any, weight: Any, weight_scale: Any, weight_zp: Any, g_idx: Any, g_idx_sort_indices: Any,
        workspace: Any, wtype: Any, output_size_per_partition: int, input_size_per_partition: int, is_k_full: bool,
        input_global_scale: Any = None, bias: Any = None, use_fp32_reduce: bool = True, input_dtype: Any = None,
    ) -> Any:  # fmt: skip
        assert wtype == "uint4b8"
        assert input.dtype == weight_scale.dtype
        assert weight_zp.numel() == g_idx.numel() == g_idx_sort_indices.numel() == 0
        assert not workspace.any()
        by_group = (weight.float() - 8).unflatten(0, (len(weight_scale), -1)) * weight_scale[:, None].float()
        return (input.float() @ by_group.flatten(0, 1)).to(input.dtype)

    def empty(device: Any) -> Any:
        return torch.empty(0, dtype=torch.int32)

    return module(
        "marlin_utils",
        marlin_permute_scales=marlin_permute_scales,
        apply_gptq_marlin_linear=apply_gptq_marlin_linear,
        marlin_make_empty_g_idx=empty,
        marlin_make_empty_zp=empty,
        marlin_make_workspace_new=lambda device, max_blocks_per_sm=1: torch.zeros(8, dtype=torch.int32),
    )


MODULES = {
    "flash_attn": flash_attn,
    "flash_attn_interface": flash_attn_interface,
    "flash_attn.cute": flash_attn_cute,
    "flashinfer": flashinfer,
    "sageattention": sageattention,
    "torchao.quantization": torchao_quantization,
    "gemlite.helper": gemlite_helper,
    "marlin": marlin,
    "vllm._custom_ops": vllm_custom_ops,
    "vllm.scalar_type": lambda: module("scalar_type", scalar_types=module("scalar_types", uint4b8="uint4b8")),
    "vllm.model_executor.layers.quantization.utils.marlin_utils": vllm_marlin_utils,
}
