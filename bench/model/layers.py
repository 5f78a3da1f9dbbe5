"""Layers of the full width beside `transformers`, in every scheme, at depths of the KV cache without a recording.

encode     one window of 30 s through the encoder
prefill    a chunk of prompt after a prefix, without the head
decode     one token after a prefix, with the head: a step of the whole model, with fewer layers

The prefix consists of random keys and values on both sides, so any depth is available without computing it. All schemes
and the reference take turns in one process. `afnext int4+kv8` has an int8 KV cache, `afnext int4+kv4` one of int4, and
the reference one in its own dtype, bfloat16 or float32: on a CPU without bfloat16 instructions float32 is many times
faster.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from ...kernels.contention import Contention
from ...kernels.errors import AfnextError
from ...kernels.int4_cache import KeyBias, is_int4, quantize_int4
from ...kernels.quantize_rows import quantize_rows
from ...runtime.app.api import Model, load
from ...runtime.engine.kv_cache import QUANTIZED, KVCache, page_table, pages_for
from ...runtime.engine.repeated_calls import RepeatedCalls, repeatable
from ...runtime.model.decoder import Decoder, DecoderAttention
from ..core.ceilings import uncached_bytes
from ..core.machine import machine
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of
from ..core.timing import Call, Samples, clock_for, compare_outputs, measure_interleaved, speedup
from ..core.tolerances import tolerance
from .e2e import recording

ROUNDED = "+attention8"
KV = {
    "+kv8": QUANTIZED["int8"],
    "+kvfp8": QUANTIZED["fp8"],
    "+kv4": QUANTIZED["int4"],
    ROUNDED: QUANTIZED["int8"],
}
"""What may stand after a scheme, and the dtype of the KV cache that it means; ROUNDED also means attention="int8"."""
STAGES = ("encode", "prefill", "decode")
BASELINES = ("bf16", "fp32")
"""Those of SCHEMES whose dtype the reference can have."""
_WINDOW = 30.0  # seconds
_FURTHER_TOKENS = 64  # room after a prefix for decoded tokens


@dataclass(frozen=True)
class Case:
    """A timed case: `stage` ("encode", "prefill" or "decode") of `tokens` tokens after `depth` others."""

    stage: str
    depth: int = 0
    tokens: int = 1

    @property
    def label(self) -> str:
        """The case for display."""
        if self.stage == "encode":
            return "one window"
        return f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'} after {self.depth}"


class Subject(Protocol):
    """One implementation of the layers."""

    name: str

    def encode(self) -> Tensor:
        """The audio tokens of a window: [tokens, hidden]."""

    def hold(self, keys: list[Tensor], values: list[Tensor], room: int) -> None:
        """Store a prefix, [depth, kv_heads, head_dim] per layer, with room for `room` tokens after it."""

    def extend(self, x: Tensor) -> Tensor:
        """The last hidden states of embeddings [1, time, hidden] after the prefix, which stays unchanged."""

    def step(self, x: Tensor) -> Tensor:
        """The scores after one embedding [1, 1, hidden] that follows the prefix: [1, vocab] float32."""


class Afnext:
    """afnext in one scheme."""

    def __init__(self, name: str, model: Model, kv_dtype: torch.dtype, layers: int | None = None):
        """layers: compute only the first ones of the decoder."""
        self.name, self.network, self._page_size = name, model.network, model.options.page_size
        self._kv_dtype = kv_dtype
        self._decoder = self.network.decoder if layers is None else _first(self.network.decoder, layers)
        self._window = torch.from_numpy(recording(_WINDOW))
        self._mel = self.network.log_mel([self._window])

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """See `Subject`."""
        return self.network.encode(self._mel, [self._window.numel()], [0])[0]

    @torch.inference_mode()
    def hold(self, keys: list[Tensor], values: list[Tensor], room: int) -> None:
        """See `Subject`."""
        self._depth = len(keys[0])
        count, device = pages_for(self._depth + room, self._page_size), self.network.device
        config = self.network.config.decoder
        self._cache = KVCache(
            config,
            pages=count,
            page_size=self._page_size,
            device=device,
            dtype=self._kv_dtype,
            rounds_attention=self.name.endswith(ROUNDED),
        )
        self._table = page_table([self._cache.allocate(self._depth + room)], device)
        self._layers = RepeatedCalls(self._decoder) if repeatable(device) else self._decoder
        self._on_free_cores = Contention().step if device.type == "cpu" else nullcontext
        pools = (self._cache.keys, self._cache.k_scales), (self._cache.values, self._cache.v_scales)
        for held, (codes, scales) in zip((keys, values), pools, strict=True):
            for layer, x in enumerate(held):
                if scales is not None:
                    x, row_scales = self._quantized(x, layer, keys=held is keys)
                    scales[layer].flatten(0, 1)[: self._depth] = row_scales
                codes[layer].flatten(0, 1)[: self._depth] = x

    def _quantized(self, x: Tensor, layer: int, *, keys: bool) -> tuple[Tensor, Tensor]:
        """Codes and scales of a layer's keys or values, as the cache stores them."""
        if not is_int4(self._cache.keys[layer]):
            return quantize_rows(x, self._kv_dtype)
        if keys and self._cache.key_turns is not None:
            attending = self.network.decoder.layers[layer].self_attn
            assert isinstance(attending, DecoderAttention)
            x = x - KeyBias(attending.key_bias(), *self._cache.key_turns).rotated(len(x), x.dtype)
        return quantize_int4(x)

    @torch.inference_mode()
    def extend(self, x: Tensor) -> Tensor:
        """See `Subject`."""
        return self._through(self._decoder, x)

    @torch.inference_mode()
    def step(self, x: Tensor) -> Tensor:
        """See `Subject`; as the engine does it."""
        with self._on_free_cores():
            return self._decoder.logits(self._through(self._layers, x)[:, -1])

    def _through(self, layers: Decoder | RepeatedCalls, x: Tensor) -> Tensor:
        positions = torch.arange(self._depth, self._depth + x.shape[1], device=x.device)[None]
        return layers(x, positions, self._cache.view(self._table, positions))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads."""
        decoder = self._decoder
        head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
        return sum(buffer.nbytes for module in (decoder.layers, decoder.norm, head) for buffer in module.buffers())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that a decode step reads."""
        return self._cache.nbytes * self._depth // (self._cache.pool.pages * self._page_size)


def _first(decoder: Decoder, count: int) -> Decoder:
    """The first layers of a decoder, with its head."""
    few = copy(decoder)
    few._modules = {**decoder._modules, "layers": nn.ModuleList(list(decoder.layers)[:count])}
    return few


class Transformers:
    """The reference, with SDPA and its dynamic cache."""

    def __init__(self, name: str, folder: Path, dtype: str):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name = name
        self._model = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        extractor = transformers.WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
        self._inputs = extractor(
            recording(_WINDOW), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
        )
        self._ids = torch.full((1, 750), self._model.config.audio_token_id)

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """See `Subject`."""
        features = self._inputs["input_features"].to(self._model.dtype)
        output = self._model.get_audio_features(features, self._inputs["attention_mask"], input_ids=self._ids)
        return output.pooler_output.flatten(0, -2)

    @torch.inference_mode()
    def hold(self, keys: list[Tensor], values: list[Tensor], room: int) -> None:
        """See `Subject`."""
        from transformers import DynamicCache

        self._cache: Any = DynamicCache(config=self._model.config.text_config)
        for layer, held in enumerate(zip(keys, values, strict=True)):
            if len(held[0]):
                k, v = (x.to(self._model.dtype).transpose(0, 1)[None].contiguous() for x in held)
                self._cache.update(k, v, layer)

    @torch.inference_mode()
    def extend(self, x: Tensor) -> Tensor:
        """See `Subject`."""
        x = x.to(self._model.dtype)
        output = self._model.model.language_model(inputs_embeds=x, past_key_values=self._cache, use_cache=True)
        for layer in self._cache.layers:
            layer.crop(-x.shape[1])
        return output.last_hidden_state

    @torch.inference_mode()
    def step(self, x: Tensor) -> Tensor:
        """See `Subject`."""
        return self._model.lm_head(self.extend(x)[:, -1]).float()


def run_layers(
    out: Path,
    *,
    shape: str,
    schemes: Sequence[str],
    baselines: Sequence[str],
    stages: Sequence[str],
    chunk: int,
    prefixes: Sequence[int],
    depths: Sequence[int],
    repeats: int,
    quiet: bool = False,
) -> list[Record]:
    """Measure, append records to `out`, and return them.

    shape: of a random checkpoint, "full-width:ENC,DEC"; schemes: of SCHEMES, each with a suffix of KV for a quantized
    KV cache; baselines: of BASELINES, speedups are over the first; stages: of STAGES; chunk, prefixes: tokens of
    prefill, and numbers of tokens before them; depths: numbers of tokens before the decoded one. Raises AfnextError for
    an unknown scheme.
    """
    unknown = [scheme for scheme in schemes if scheme_parts(scheme)[0] not in SCHEMES]
    if unknown:
        raise AfnextError(
            f"unknown scheme {', '.join(unknown)}; choose from {', '.join(SCHEMES)}, also with {' or '.join(KV)}"
        )
    cases = [
        Case("encode"),
        *(Case("prefill", depth, chunk) for depth in prefixes),
        *(Case("decode", d) for d in depths),
    ]
    console = Console(stderr=True, quiet=quiet)
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_checkpoint(Path(temporary), shape)
        subjects = list(_subjects(folder, baselines, schemes))
        for case in (case for case in cases if case.stage in stages):
            console.print(f"{case.stage}, {case.label}")
            for record in _measured(case, subjects, shape, repeats):
                append(out, record)
                records.append(record)
    return records


def _subjects(folder: Path, baselines: Iterable[str], schemes: Iterable[str]) -> Iterator[Subject]:
    for name in baselines:
        yield Transformers(f"transformers {name}", folder, SCHEMES[name])
    models: dict[str, Model] = {}
    for name in schemes:
        scheme, kv_dtype = scheme_parts(name)
        if scheme not in models:
            models[scheme] = load(folder, device="cpu", dtype=SCHEMES[scheme], quant=recipe_of(scheme))
        model = models[scheme]
        yield Afnext(f"afnext {name}", model, kv_dtype or model.network.dtype)


def scheme_parts(name: str) -> tuple[str, torch.dtype | None]:
    """The scheme, and the dtype of the KV cache if it is not the model's."""
    for suffix, dtype in KV.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), dtype
    return name, None


def _measured(case: Case, subjects: list[Subject], shape: str, repeats: int) -> Iterator[Record]:
    calls = stage_calls(case.stage, case.depth, case.tokens, subjects)
    device = torch.device("cpu")
    read_bytes = uncached_bytes(device)
    if case.stage == "decode":
        # Memory bandwidth is measured in turn with the steps that it bounds, because it is shared and varies.
        calls["read"] = torch.ones(read_bytes // 8, dtype=torch.int64).sum
    outputs = {name: call() for name, call in calls.items()}
    samples = measure_interleaved(calls, repeats=repeats, warmup=0, max_time=120.0, clock=clock_for(device), watch=True)
    reference, where = subjects[0].name, machine()
    label = {"label": case.label, "model": shape, "depth": case.depth, "tokens": case.tokens}
    for subject in subjects:
        values: dict[str, Any] = samples[subject.name].values()
        if case.stage != "encode":
            values["tokens_per_s"] = case.tokens / samples[subject.name].median
        if isinstance(subject, Afnext):
            scheme, _ = scheme_parts(subject.name.removeprefix("afnext "))
            output = outputs[subject.name]
            bound = tolerance(scheme, "bfloat16")
            agreement = compare_outputs(outputs[reference].to(output.dtype), output, bound)
            gain = speedup(samples[reference], samples[subject.name], agreement)
            values |= {
                "error": agreement.error,
                "speedup": gain.ratio,
                "speedup_over": reference,
                "reason": gain.reason,
            }
            if case.stage == "decode":
                values |= _traffic(subject, samples[subject.name], read_bytes / samples["read"].median)
        yield Record("layers", case.stage, subject.name, label, values, machine=where)


def stage_calls(stage: str, depth: int, tokens: int, subjects: Sequence[Subject]) -> dict[str, Call]:
    """Functions that run one of STAGES, by the subject's name, on random embeddings after a random prefix of `depth`
    tokens.

    At least one subject is an `Afnext`.
    """
    if stage == "encode":
        return {subject.name: subject.encode for subject in subjects}
    network = next(subject for subject in subjects if isinstance(subject, Afnext)).network
    config, generator = network.config.decoder, torch.Generator().manual_seed(depth)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(network.dtype)

    keys, values = ([normal(depth, config.kv_heads, config.head_dim) for _ in range(config.layers)] for _ in range(2))
    x = normal(1, tokens, config.hidden_size)
    for subject in subjects:
        subject.hold(keys, values, tokens + _FURTHER_TOKENS)
    method = "extend" if stage == "prefill" else "step"
    return {subject.name: partial(getattr(subject, method), x) for subject in subjects}


def _traffic(subject: Afnext, samples: Samples, read: float) -> dict[str, float]:
    nbytes = subject.weight_bytes + subject.kv_bytes
    rate = nbytes / samples.median
    return {"bytes": nbytes, "bytes_per_s": rate, "read_bytes_per_s": read, "percent_of_read": 100 * rate / read}
