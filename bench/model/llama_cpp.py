"""llama.cpp beside afnext, called through its C API: the backbone of the same shape, and the encoder without RoTE.

The library is that of the package `xllamacpp`, whose wheels are built for AVX2; AFNEXT_LLAMA_CPP names another, such as
the one that `make llama-cpp` builds for this machine from source. The structures passed by value are those of BUILD; a
library with other structures is refused.
"""

import ctypes
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import AfnextError

BUILD = 11549  # of llama.cpp, in xllamacpp 2026.10.11549
LIBRARY_VARIABLE = "AFNEXT_LLAMA_CPP"
_PREFIX_CHUNK = 512  # tokens
# llama.cpp computes in its own thread: it configures the AMX tiles once per thread and relies on them, while torch and
# afnext's kernels configure the tiles themselves.
_THREAD = ThreadPoolExecutor(1, "llama.cpp")


class _ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = (
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", c_bool),
    )


class _ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int32) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c_int32),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("moe_cache_size", c_size_t),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(ctypes.Structure):
    """llama_batch. Without positions and sequences its tokens are appended to sequence 0; the last one has scores."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        *((name, c_void_p) for name in ("pos", "n_seq_id", "seq_id")),
        ("logits", POINTER(c_int8)),
    )


class _AudioParams(ctypes.Structure):
    """mtmd_context_params."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int32),
        *((name, c_char_p) for name in ("image_marker", "media_marker")),
        ("flash_attn_type", c_int32),
        ("warmup", c_bool),
        *((name, c_int32) for name in ("image_min_tokens", "image_max_tokens")),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        ("batch_max_tokens", c_int32),
        *((name, c_void_p) for name in ("progress_callback", "progress_callback_user_data")),
    )


class _Text(ctypes.Structure):
    """mtmd_input_text."""

    _fields_ = (("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_context_default_params": (_ContextParams, []),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_free": (None, [c_void_p]),
    "mtmd_log_set": (None, [c_void_p, c_void_p]),
    "mtmd_context_params_default": (_AudioParams, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, _AudioParams]),
    "mtmd_bitmap_init_from_audio": (c_void_p, [c_size_t, POINTER(c_float)]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(_Text), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
    "mtmd_free": (None, [c_void_p]),
}
_AUDIO_CHUNK = 2  # MTMD_INPUT_CHUNK_TYPE_AUDIO
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


_ignore = _LOG(lambda level, text, data: None)  # discards llama.cpp's messages


@cache
def library() -> ctypes.CDLL:
    """llama.cpp with its functions declared. Raises AfnextError if it is missing or has other structures."""
    path = os.environ.get(LIBRARY_VARIABLE) or _packaged_library()
    try:
        loaded = ctypes.CDLL(path)
        for name, (returned, taken) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = returned, taken
    except (OSError, AttributeError) as error:
        raise AfnextError(f"{path} is no llama.cpp: {error}") from None
    model, context = loaded.llama_model_default_params(), loaded.llama_context_default_params()
    # If the first and last fields of each structure are in place, so are all fields between them.
    found = (model.n_gpu_layers, model.use_extra_bufts, context.n_ubatch, context.type_k, context.type_v)
    if found != (-1, True, 512, 1, 1) or not context.offload_kqv or context.samplers or context.n_samplers:
        raise AfnextError(f"{path} has other structures than build {BUILD} of llama.cpp")
    loaded.llama_log_set(_ignore, None)
    loaded.mtmd_log_set(_ignore, None)
    return loaded


def description() -> dict[str, str | None]:
    """The version of the llama.cpp package, and the CPU features that it was compiled for."""
    try:
        version: str | None = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        version = None
    return {"xllamacpp": version, "compiled_for": library().llama_print_system_info().decode().strip(" |")}


def _packaged_library() -> str:
    spec = importlib.util.find_spec("xllamacpp")
    found = [path for place in (spec and spec.submodule_search_locations) or () for path in Path(place).glob("*.so")]
    if not found:
        raise AfnextError(
            "llama.cpp is not installed here; run `pip install '.[llama-cpp]'` in a checkout of afnext, "
            f"or name its library in {LIBRARY_VARIABLE}"
        )
    return str(found[0])


class LlamaCppModel:
    """A GGUF file of a backbone in memory. Several subjects can share it."""

    def __init__(self, path: Path):
        self._library = library()
        self.handle = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self.handle:
            raise AfnextError(f"llama.cpp cannot load {path}")
        self.hidden_size: int = self._library.llama_model_n_embd(self.handle)
        self.vocab_size: int = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self.handle))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.llama_model_free(self.handle)


class LlamaCppEncoder:
    """A GGUF file of an encoder and adaptor in memory, with one recording of at most 30 s."""

    def __init__(self, path: Path, model: LlamaCppModel, waveform: np.ndarray, *, flash: bool = True):
        """model: a backbone as wide as the adaptor's output; waveform: mono, 16 kHz."""
        self._library, self._model = library(), model
        params = self._library.mtmd_context_params_default()
        params.n_threads, params.warmup, params.flash_attn_type = torch.get_num_threads(), False, int(flash)
        self._context = self._library.mtmd_init_from_file(str(path).encode(), model.handle, params)
        if not self._context:
            raise AfnextError(f"llama.cpp cannot load {path}")
        samples = np.ascontiguousarray(waveform, dtype=np.float32)
        audio = c_void_p(
            self._library.mtmd_bitmap_init_from_audio(samples.size, samples.ctypes.data_as(POINTER(c_float)))
        )
        chunks = self._library.mtmd_input_chunks_init()
        marker = b"<__media__>"
        text = _Text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        if self._library.mtmd_tokenize(self._context, chunks, ctypes.byref(text), ctypes.byref(audio), 1):
            raise AfnextError("llama.cpp cannot take the recording")
        every = (self._library.mtmd_input_chunks_get(chunks, i) for i in range(self._chunk_count(chunks)))
        self._chunk = next(chunk for chunk in every if self._library.mtmd_input_chunk_get_type(chunk) == _AUDIO_CHUNK)
        self._shape = self._library.mtmd_input_chunk_get_n_tokens(self._chunk), model.hidden_size

    def _chunk_count(self, chunks: int) -> int:
        return self._library.mtmd_input_chunks_size(chunks)

    def encode(self) -> Tensor:
        """The audio tokens of the recording, from its log-mel features on: [tokens, hidden] float32."""
        code = _THREAD.submit(self._library.mtmd_encode_chunk, self._context, self._chunk).result()
        if code:
            raise AfnextError(f"llama.cpp's mtmd_encode_chunk failed with code {code}")
        output = np.ctypeslib.as_array(self._library.mtmd_get_output_embd(self._context), self._shape)
        return torch.from_numpy(output.copy())


class LlamaCpp:
    """llama.cpp as a subject of `layers.py`. It computes in as many threads as torch does.

    llama.cpp accepts no keys and values, so the prefix is made of random embeddings, which it has to compute. The KV
    cache is float16.
    """

    def __init__(
        self,
        name: str,
        model: LlamaCppModel,
        encoder: LlamaCppEncoder | None = None,
        *,
        flash: bool = True,
        prefixes: LlamaCppModel | None = None,
    ):
        """flash: use its flash attention, which is its default but not always faster. prefixes: a narrow model with as
        many layers and the same KV heads, which computes the prefix instead: otherwise that takes as long as prefill.
        """
        self.name, self._model, self._encoder, self._flash = name, model, encoder, flash
        self._prefixes = prefixes or model
        self._library = library()
        self._context: int | None = None

    def encode(self) -> Tensor:
        """The audio tokens of a window, [tokens, hidden] float32, without RoTE."""
        if self._encoder is None:
            raise AfnextError(f"{self.name} has no encoder")
        return self._encoder.encode()

    def hold(self, keys: list[Tensor], values: list[Tensor], room: int) -> None:
        """Compute a prefix as long as `keys`, [depth, ...] per layer, with room for `room` tokens after it."""
        self._depth = len(keys[0])
        self.close()
        maker = self._new_context(self._prefixes, self._depth + room)
        generator = torch.Generator().manual_seed(0)
        prefix = torch.randn(_PREFIX_CHUNK, self._prefixes.hidden_size, generator=generator)
        for start in range(0, self._depth, _PREFIX_CHUNK):
            self._decode(maker, prefix[: self._depth - start])
        self._context = maker
        if self._prefixes is not self._model:
            self._context = self._new_context(self._model, self._depth + room)
            if self._depth:
                self._copy_prefix(maker)
            self._library.llama_free(maker)

    def _new_context(self, model: LlamaCppModel, tokens: int) -> int:
        params = self._library.llama_context_default_params()
        params.n_ctx = tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = int(self._flash)
        context: int | None = self._library.llama_init_from_model(model.handle, params)
        if context is None:
            raise AfnextError(f"llama.cpp has no memory for {tokens} tokens")
        return context

    def _copy_prefix(self, maker: int) -> None:
        size = self._library.llama_state_seq_get_size(maker, 0)
        state = (c_uint8 * size)()
        copied = self._library.llama_state_seq_get_data(maker, state, size, 0)
        if copied != size or not self._library.llama_state_seq_set_data(self._context, state, size, 0):
            raise AfnextError("llama.cpp cannot copy the prefix: the two models have different KV caches")

    def extend(self, x: Tensor) -> Tensor:
        """The scores after the last of the embeddings [1, time, hidden], [1, vocab] float32; the prefix is unchanged.

        llama.cpp computes the last layer's feed-forward network and the head for that row alone.
        """
        assert self._context is not None
        self._decode(self._context, x[0])
        scores = np.ctypeslib.as_array(
            self._library.llama_get_logits_ith(self._context, -1), (self._model.vocab_size,)
        ).copy()
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, self._depth, -1)
        return torch.from_numpy(scores)[None]

    def step(self, x: Tensor) -> Tensor:
        """The scores after one embedding [1, 1, hidden]: [1, vocab] float32."""
        return self.extend(x)

    def _decode(self, context: int, x: Tensor) -> None:
        x = x.float().contiguous()
        batch = _Batch(n_tokens=len(x), embd=ctypes.cast(x.data_ptr(), POINTER(c_float)))
        code = _THREAD.submit(self._library.llama_decode, context, batch).result()
        if code:
            raise AfnextError(f"llama.cpp's llama_decode failed with code {code}")

    def close(self) -> None:
        """Free the memory of the prefix."""
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None

    __del__ = close
