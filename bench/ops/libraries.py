"""Calls of other libraries for the lab's problems, each prepared once: packed weights, plans, dense copies of caches.

The calls follow the sources of flash-attn 2.8 (its interfaces 2, 3 and 4), FlashInfer 0.7, SageAttention 2.2, Marlin
and its descendant in vLLM, torchao 0.18, gemlite 0.6 and bitsandbytes 0.50. The last and torchao's int8 product are run
on a CPU by a test; the others need a GPU, and a test holds their calls against the signatures that those sources have.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ...kernels.attention import visible_keys
from . import baselines
from .inputs import Arguments
from .plain import dense_weight
from .problems import Problem

Call = Callable[[], Any]
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
_MARLIN_GROUP, _MARLIN_INPUTS, _MARLIN_OUTPUTS = 128, 128, 256
_VLLM_GROUPS, _VLLM_INPUTS, _VLLM_OUTPUTS = (32, 64, 128), 128, 64


@dataclass(frozen=True)
class Library:
    """A library. module: what must be importable; covers: problems on a GPU that it solves; prepare: makes its call."""

    name: str
    module: str
    covers: Callable[[Problem], bool]
    prepare: Callable[[Problem, Arguments], Call]


def available(module: str) -> bool:
    """Whether `module` can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def dense_cache(a: Arguments) -> tuple[Tensor, Tensor]:
    """Paged keys and values as [batch, keys, kv_heads, head_dim] in the dtype of q; sequences of one length."""
    table, length, dtype = a["page_table"].long(), int(a["key_lengths"][0]), a["q"].dtype
    dense = []
    for name in ("k", "v"):
        x = a[name][table].flatten(1, 2)[:, :length]
        if a.get(f"{name}_scales") is not None:
            x = x * a[f"{name}_scales"][table].flatten(1, 2)[:, :length, :, None]
        dense.append(x.to(dtype))
    return dense[0], dense[1]


def static_cache_attention(
    problem: Problem, a: Arguments, bias: Callable[[int, int, torch.device], Any] | None = None
) -> Call:
    """SDPA over a static cache [batch, kv_heads, keys, head_dim], as transformers has it.

    bias: makes another causal mask than one of numbers, from queries, keys and a device.
    """
    q = a["q"]
    if a.get("page_table") is None:
        keys, values = a["k"].transpose(1, 2), a["v"].transpose(1, 2)
        return lambda: baselines.sdpa(q, keys, values)
    keys, values = (x.transpose(1, 2).contiguous() for x in dense_cache(a))
    queries, length = q.shape[1], keys.shape[2]
    mask = None
    if queries > 1:
        mask = bias(queries, length, q.device) if bias else visible_keys(queries, length, True, q.device)
    return lambda: baselines.sdpa(q, keys, values, mask)


def _is_attention(problem: Problem) -> bool:
    return "attention" in problem.operation and problem.dtype != "float32" and not problem.shape.get("kv8")


def _is_prefill(problem: Problem) -> bool:
    return problem.operation == "attention" and "keys" in problem.shape


def _is_product(*operations: str) -> Callable[[Problem], bool]:
    return lambda problem: problem.operation in operations and problem.dtype != "float32"


def _flash(problem: Problem, a: Arguments, module: str, has_cache: bool) -> Call:
    """has_cache: whether the library has a function of its own for decoding."""
    library, q = importlib.import_module(module), a["q"]
    if a.get("page_table") is None:
        return lambda: _output(library.flash_attn_func(q, a["k"], a["v"], causal=False))
    k, v = dense_cache(a)
    if problem.operation == "decode_attention" and has_cache:
        lengths = a["key_lengths"].int()
        return lambda: _output(library.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True))
    return lambda: _output(library.flash_attn_func(q, k, v, causal=True))


def _output(returned: Any) -> Any:
    """The output of functions that may return their log-sum-exp besides."""
    return returned[0] if isinstance(returned, tuple) else returned


def _flashinfer_covers(problem: Problem) -> bool:
    """Decoding, and prompts of one sequence."""
    if not _is_attention(problem) or "keys" not in problem.shape:
        return False
    return problem.operation == "decode_attention" or problem.shape["batch"] == 1


def _flashinfer(problem: Problem, a: Arguments) -> Call:
    library, q = importlib.import_module("flashinfer"), a["q"]
    batch, _, heads, head_dim = q.shape
    if problem.operation == "attention":
        k, v = dense_cache(a)
        return lambda: library.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=True)[None]
    page_size = problem.shape["page_size"]
    pages = -(-problem.context // page_size)
    starts = torch.arange(0, (batch + 1) * pages, pages, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), (problem.context - 1) % page_size + 1, dtype=torch.int32, device=q.device)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    # Its kernel without tensor cores has no groups of seven heads.
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indices = a["page_table"][:, :pages].flatten().int()
    kv_heads = a["k"].shape[2]
    wrapper.plan(starts, indices, last, heads, kv_heads, head_dim, page_size, q_data_type=q.dtype)
    return lambda: wrapper.run(q[:, 0], (a["k"], a["v"]))[:, None]


def _sage_covers(problem: Problem) -> bool:
    """Its causal mask begins at the first key, so only prompts without a prefix are the same problem."""
    shape = problem.shape
    return _is_attention(problem) and problem.operation == "attention" and shape.get("keys", 0) in (0, shape["queries"])


def _sage(problem: Problem, a: Arguments) -> Call:
    library = importlib.import_module("sageattention")
    paged = a.get("page_table") is not None
    k, v = dense_cache(a) if paged else (a["k"], a["v"])
    return lambda: library.sageattn(a["q"], k, v, tensor_layout="NHD", is_causal=paged)


def _lower_right(queries: int, keys: int, _device: torch.device) -> Any:
    return causal_lower_right(queries, keys)


def _cudnn(problem: Problem, a: Arguments) -> Call:
    call = static_cache_attention(problem, a, bias=_lower_right)

    def run() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call()

    return run


def _dense_layer(a: Arguments) -> torch.nn.Linear:
    """What libraries quantize themselves: torch's layer with the problem's weight, made dense, and bias."""
    x, weight = a["x"], dense_weight(a, a["x"].dtype)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in a, device=x.device, dtype=x.dtype)
    layer.weight.data.copy_(weight)
    if "bias" in a:
        layer.bias.data.copy_(a["bias"])
    return layer.requires_grad_(False)


def _bitsandbytes(problem: Problem, a: Arguments) -> Call:
    """nf4 with scales that are not quantized again, as ours; or LLM.int8, which rounds activations to int8, too."""
    library = importlib.import_module("bitsandbytes")
    x, dense = a["x"], _dense_layer(a)
    sizes, bias = (dense.in_features, dense.out_features), dense.bias is not None
    product: torch.nn.Module
    weight = dense.weight.detach().cpu()
    if problem.operation == "linear_nf4":
        product = library.nn.Linear4bit(
            *sizes, bias=bias, compute_dtype=x.dtype, quant_type="nf4", compress_statistics=False
        )
        product.weight = library.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64
        )
    else:
        product = library.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        product.weight = library.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    if bias:
        product.bias = dense.bias
    product = product.to(x.device)
    return lambda: product(x)


def _torchao_covers(problem: Problem) -> bool:
    """int8, and int4 by tinygemm, which multiplies bfloat16 alone."""
    return _is_product("linear_int8")(problem) or (problem.operation == "linear_int4" and problem.dtype == "bfloat16")


def _torchao(problem: Problem, a: Arguments) -> Call:
    library = importlib.import_module("torchao.quantization")
    x, holder = a["x"], torch.nn.Sequential(_dense_layer(a))
    if problem.operation == "linear_int4":
        # The default format needs another package; this one is multiplied by torch itself.
        config = library.Int4WeightOnlyConfig(
            group_size=problem.shape["group"], int4_packing_format="tile_packed_to_4d"
        )
    else:
        config = library.Int8WeightOnlyConfig()
    library.quantize_(holder, config)
    return lambda: holder(x)


def _gemlite(problem: Problem, a: Arguments) -> Call:
    helper = importlib.import_module("gemlite.helper")
    x, layer = a["x"], _dense_layer(a)
    kind = helper.A8W8_int8_dynamic if problem.operation == "linear_w8a8" else helper.A16W8_INT8
    product = kind(device=x.device.type, dtype=x.dtype).from_linear(layer)
    return lambda: product(x)


def _marlin_covers(problem: Problem) -> bool:
    """float16 times int4 in groups of 128, for sizes that its tiles divide."""
    shape = problem.shape
    return (
        problem.operation == "linear_int4"
        and problem.dtype == "float16"
        and shape["group"] == _MARLIN_GROUP
        and shape["in_features"] % _MARLIN_INPUTS == 0
        and shape["out_features"] % _MARLIN_OUTPUTS == 0
    )


def _marlin(problem: Problem, a: Arguments) -> Call:
    """The product without bias, which is added afterwards."""
    library = importlib.import_module("marlin")
    x, dense = a["x"], _dense_layer(a)
    product = library.Layer(dense.in_features, dense.out_features, groupsize=_MARLIN_GROUP)
    product.pack(dense, a["weight"].scales.to(torch.float16))
    product = product.to(x.device)
    bias = a.get("bias")
    return lambda: product(x) if bias is None else product(x) + bias


def _vllm_marlin_covers(problem: Problem) -> bool:
    """int4 in groups, for sizes that its tiles divide."""
    shape = problem.shape
    return (
        _is_product("linear_int4")(problem)
        and shape["group"] in _VLLM_GROUPS
        and shape["in_features"] % _VLLM_INPUTS == 0
        and shape["out_features"] % _VLLM_OUTPUTS == 0
    )


def _vllm_marlin(problem: Problem, a: Arguments) -> Call:
    """The product of weights as GPTQ stores them, without bias, which is added afterwards."""
    operations = importlib.import_module("vllm._custom_ops")
    utilities = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
    x, bias, device = a["x"], a.get("bias"), a["x"].device
    inputs, outputs, group = (problem.shape[name] for name in ("in_features", "out_features", "group"))
    words = a["weight"].codes.view(torch.int32).T.contiguous()  # eight inputs in a word, the first in its lowest bits
    none = utilities.marlin_make_empty_g_idx(device)
    weight = operations.gptq_marlin_repack(words, none, inputs, outputs, 4)
    scales = utilities.marlin_permute_scales(a["weight"].scales.to(x.dtype).T.contiguous(), inputs, outputs, group)
    workspace = utilities.marlin_make_workspace_new(device)
    multiply = partial(
        utilities.apply_gptq_marlin_linear,
        input=x,
        weight=weight,
        weight_scale=scales,
        weight_zp=utilities.marlin_make_empty_zp(device),
        g_idx=none,
        g_idx_sort_indices=none,
        workspace=workspace,
        wtype=kind,
        output_size_per_partition=outputs,
        input_size_per_partition=inputs,
        is_k_full=True,
    )
    return multiply if bias is None else lambda: multiply() + bias


LIBRARIES = (
    Library("flash-attn", "flash_attn", _is_attention, partial(_flash, module="flash_attn", has_cache=True)),
    Library(
        "flash-attn-3",
        "flash_attn_interface",
        _is_attention,
        partial(_flash, module="flash_attn_interface", has_cache=True),
    ),
    Library(
        "flash-attn-4", "flash_attn.cute", _is_attention, partial(_flash, module="flash_attn.cute", has_cache=False)
    ),
    Library("flashinfer", "flashinfer", _flashinfer_covers, _flashinfer),
    Library("sageattention", "sageattention", _sage_covers, _sage),
    Library("cudnn", "torch", _is_attention, _cudnn),
    Library("torch-causal-bias", "torch", _is_prefill, partial(static_cache_attention, bias=_lower_right)),
    Library("bitsandbytes", "bitsandbytes", _is_product("linear_int8", "linear_w8a8", "linear_nf4"), _bitsandbytes),
    Library("torchao", "torchao", _torchao_covers, _torchao),
    Library("gemlite", "gemlite", _is_product("linear_int8", "linear_w8a8"), _gemlite),
    # Its kernels, as other packages are called marlin, too.
    Library("marlin", "marlin_cuda", _marlin_covers, _marlin),
    Library("vllm-marlin", "vllm", _vllm_marlin_covers, _vllm_marlin),
)
