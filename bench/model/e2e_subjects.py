"""The two sides of the end-to-end benchmark: afnext and `transformers`, divided into the same stages.

    log-mel    waveform to features           [windows, mel_bins, frames]
    encode     features to audio tokens       [tokens, hidden]
    prefill    prompt to the first scores     [vocab]
    decode     one further token each         [batch, vocab]
    first token    log-mel, encode and prefill
    total      all of these, `new_tokens` long

Each stage returns its result, so that results can be compared before times. A stage starts from the state that the
previous one left; `prepare` runs them once in order.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.errors import AfnextError
from ...runtime.app.api import Model
from ...runtime.engine.decode_graph import DecodeStep
from ...runtime.engine.encoder_stream import Queued
from ...runtime.engine.kv_cache import KVCache, pages_for
from ...runtime.engine.prefill import PlacedWindow, PromptEmbeddings, prefill
from ...runtime.engine.timings import Timings
from ...runtime.io.audio import windows
from ...runtime.io.prompt import Prompt, build_prompt
from ...runtime.model.encoder import audio_token_count

PROBE = 0  # the token that both sides decode next, because their own choices could differ by rounding
QUESTION = "Describe what you hear, with the time of each event."


class Subject(Protocol):
    """One implementation of the model, working on one recording."""

    name: str

    def begin(self, audio: np.ndarray, batch: int, new_tokens: int) -> None:
        """Take a mono 16 kHz recording; the stages are then to be run in order."""

    def log_mel(self) -> Tensor:
        """Features of every window."""

    def encode(self) -> Tensor:
        """Audio tokens of the recording."""

    def prefill(self) -> Tensor:
        """Scores of the first new token, float32; fills the cache."""

    def decode(self) -> Tensor:
        """Scores that follow the token PROBE after the prompt, for each sequence of the batch, float32."""

    def first_token(self) -> Tensor:
        """Everything from the waveform to the first scores."""

    def total(self) -> Tensor:
        """Everything from the waveform to `new_tokens` tokens; returns the first scores."""


class AfnextSubject:
    """afnext. The recording's prompt is prefilled once; a batch decodes copies of it."""

    def __init__(self, name: str, model: Model):
        self.name = name
        self._model = model
        self._network = model.network

    @torch.inference_mode()
    def begin(self, audio: np.ndarray, batch: int, new_tokens: int) -> None:
        """See `Subject`."""
        self._batch, self._new_tokens = batch, new_tokens
        self._windows = [torch.from_numpy(window) for window in windows(audio)]
        self._prompt = _prompt(self._model, audio)
        self._length = len(self._prompt.token_ids)
        page_size = self._model.options.page_size
        count = pages_for(self._length + new_tokens, page_size)
        self._cache = KVCache(
            self._network.config.decoder,
            pages=batch * count,
            page_size=page_size,
            device=self._network.device,
            dtype=self._network.dtype,
        )
        self._pages = [self._cache.pool.allocate(count) for _ in range(batch)]
        self._decode_step = self._new_decode_step()
        self._features = self._mel_batches()

    def _new_decode_step(self) -> DecodeStep:
        """The engine's decode step, which may repeat a recording of the present layers."""
        width, cuda_graph = len(self._pages[0]), self._model.options.cuda_graphs
        return DecodeStep(self._network, self._cache, rows=self._batch, width=width, cuda_graph=cuda_graph)

    def _mel_batches(self) -> list[Tensor]:
        size = self._model.options.encode_batch
        return [self._network.log_mel(self._windows[i : i + size]) for i in range(0, len(self._windows), size)]

    @torch.inference_mode()
    def log_mel(self) -> Tensor:
        """See `Subject`."""
        self._features = self._mel_batches()
        return torch.cat([_padded(features) for features in self._features])

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """See `Subject`."""
        size, tokens = self._model.options.encode_batch, []
        for index, features in enumerate(self._features):
            batch = self._windows[index * size : (index + 1) * size]
            places = list(range(index * size, index * size + len(batch)))
            tokens += self._network.encode(features, [window.numel() for window in batch], places)
        self._tokens = torch.cat(tokens)
        return self._tokens

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """See `Subject`."""
        logits = prefill(
            self._network,
            self._cache,
            self._pages[0],
            _Encoded(self),
            self._length,
            chunk_size=self._model.options.chunk_size,
            timings=Timings(),
        )
        for pages in self._pages[1:]:
            for pool in (*self._cache.keys, *self._cache.values):
                pool[pages] = pool[self._pages[0]]
        self._next = logits.argmax(-1, keepdim=True).expand(self._batch, 1)
        return logits[0]

    def decode(self) -> Tensor:
        """See `Subject`."""
        return self._step(torch.full_like(self._next, PROBE), self._length)

    @torch.inference_mode()
    def _step(self, tokens: Tensor, position: int) -> Tensor:
        return self._decode_step(tokens.tolist(), [position] * self._batch, self._pages)[:, -1]

    def first_token(self) -> Tensor:
        """See `Subject`."""
        self._features = self._mel_batches()
        self.encode()
        return self.prefill()

    def total(self) -> Tensor:
        """See `Subject`."""
        logits = self.first_token()
        tokens = self._next
        for offset in range(self._new_tokens - 1):
            tokens = self._step(tokens, self._length + offset).argmax(-1, keepdim=True)
        return logits

    @contextmanager
    def layers(self, encoder: int, decoder: int) -> Iterator[None]:
        """Only the first layers of each stack inside the block."""
        with first_layers(self._network.encoder, encoder), first_layers(self._network.decoder, decoder):
            all_layers, self._decode_step = self._decode_step, self._new_decode_step()
            try:
                yield
            finally:
                self._decode_step = all_layers


class _Encoded(PromptEmbeddings):
    """A prompt whose audio is already encoded, so that only prefill is timed."""

    def __init__(self, subject: AfnextSubject):
        prompt, network = subject._prompt, subject._network
        super().__init__(network, prompt.token_ids, (), encode_batch=1, timings=Timings())
        whole = PlacedWindow(prompt.audio[0].position, len(subject._tokens), torch.empty(0), 0)
        self._encoded.append(([whole], Queued([subject._tokens])))


class TransformersSubject:
    """The reference: `transformers`, SDPA (flash-attn where it is installed on a GPU), its own dynamic cache, or a
    static one with the step of decode compiled."""

    def __init__(self, name: str, folder: Path, model: Model, *, compiled: bool = False, **options: Any):
        """`model` is the same checkpoint loaded by afnext: its tokenizer builds the prompt for both."""
        transformers = _transformers()
        self.name = name
        self._ours = model
        flash = model.network.device.type == "cuda" and transformers.utils.is_flash_attn_2_available()
        self._reference = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(
            folder,
            dtype=model.network.dtype,
            attn_implementation="flash_attention_2" if flash else "sdpa",
            **options,
        ).eval()
        if not options:
            self._reference.to(model.network.device)
        self._compiled = self._reference.get_compiled_call(transformers.CompileConfig()) if compiled else None
        self._extractor = transformers.WhisperFeatureExtractor(
            feature_size=model.network.config.encoder.mel_bins, return_attention_mask=True
        )

    @torch.inference_mode()
    def begin(self, audio: np.ndarray, batch: int, new_tokens: int) -> None:
        """See `Subject`."""
        self._batch, self._new_tokens = batch, new_tokens
        self._windows = windows(audio)
        prompt = _prompt(self._ours, audio)
        self._ids = torch.tensor([prompt.token_ids], device=self._reference.device)
        self.log_mel()

    def log_mel(self) -> Tensor:
        """See `Subject`."""
        extracted = self._extractor(
            self._windows, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
        ).to(self._reference.device)
        self._mask = extracted["attention_mask"]
        self._features = extracted["input_features"].to(self._reference.dtype)
        return self._features

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """See `Subject`."""
        output = self._reference.get_audio_features(self._features, self._mask, input_ids=self._ids)
        self._tokens: Tensor = output.pooler_output
        return self._tokens

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """See `Subject`."""
        from transformers import DynamicCache

        embeddings = self._reference.get_input_embeddings()(self._ids)
        embeddings[self._ids == self._reference.config.audio_token_id] = self._tokens.to(embeddings.dtype)
        self._cache: Any = DynamicCache(config=self._reference.config.text_config)
        logits = self._forward(self._reference, inputs_embeds=embeddings)
        if self._batch > 1:
            self._cache.batch_repeat_interleave(self._batch)
        if self._compiled is not None:
            self._cache = self._static(self._cache)
        self._next = logits.argmax(-1, keepdim=True).expand(self._batch, 1)
        return logits[0]

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """See `Subject`."""
        logits = self._step(torch.full_like(self._next, PROBE))
        for layer in self._cache.layers[: len(self._reference.model.language_model.layers)]:
            if self._compiled is None:
                layer.crop(-1)
            else:
                layer.cumulative_length.sub_(1)
        return logits

    def _step(self, tokens: Tensor) -> Tensor:
        return self._forward(self._compiled or self._reference, input_ids=tokens)

    def _forward(self, call: Callable[..., Any], **inputs: Tensor) -> Tensor:
        output = call(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()

    def _static(self, filled: Any) -> Any:
        """A static cache with the contents of a dynamic one, and room for the answer."""
        from transformers import StaticCache

        length = self._ids.shape[1]
        cache: Any = StaticCache(config=self._reference.config.text_config, max_cache_len=length + self._new_tokens)
        for layer, source in zip(cache.layers, filled.layers, strict=False):
            if source.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
                layer.keys[:, :, :length] = source.keys
                layer.values[:, :, :length] = source.values
                layer.cumulative_length.fill_(length)
        return cache

    @torch.inference_mode()
    def greedy(self, audio: np.ndarray, new_tokens: int) -> tuple[list[int], list[Tensor]]:
        """The tokens that `generate` answers with, and the scores that chose each, [vocab] float32."""
        self.begin(audio, 1, new_tokens)
        generated = self._reference.generate(
            input_ids=self._ids,
            attention_mask=torch.ones_like(self._ids),
            input_features=self._features,
            input_features_mask=self._mask,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=new_tokens,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return generated.sequences[0, self._ids.shape[1] :].tolist(), [scores[0].float() for scores in generated.scores]

    def first_token(self) -> Tensor:
        """See `Subject`."""
        self.log_mel()
        self.encode()
        return self.prefill()

    @torch.inference_mode()
    def total(self) -> Tensor:
        """See `Subject`."""
        logits = self.first_token()
        tokens = self._next
        for _ in range(self._new_tokens - 1):
            tokens = self._step(tokens).argmax(-1, keepdim=True)
        return logits

    @contextmanager
    def layers(self, encoder: int, decoder: int) -> Iterator[None]:
        """Only the first layers of each stack inside the block."""
        model = self._reference.model
        with first_layers(model.audio_tower, encoder), first_layers(model.language_model, decoder):
            yield


@contextmanager
def first_layers(stack: nn.Module, count: int) -> Iterator[None]:
    """Only the first `count` of a stack's layers inside the block."""
    every = stack.layers
    stack.layers = nn.ModuleList(list(every)[:count])  # type: ignore[arg-type]
    try:
        yield
    finally:
        stack.layers = every


def variants() -> dict[str, Callable[[], dict[str, Any]]]:
    """Further baselines: name to the options of `TransformersSubject`, created on demand.

    compiled: static cache and torch.compile; int8, nf4: bitsandbytes; hqq: 4 bits; torchao: int4 weights. A baseline
    whose library is not installed raises ImportError.
    """
    return {
        "compiled": lambda: {"compiled": True},
        "int8": lambda: _bitsandbytes(load_in_8bit=True),
        "nf4": lambda: _bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "hqq": lambda: _quantized(_transformers().HqqConfig(nbits=4, group_size=64)),
        "torchao": lambda: _quantized(_transformers().TorchAoConfig(_torchao_int4())),
    }


def _bitsandbytes(**options: Any) -> dict[str, Any]:
    return _quantized(_transformers().BitsAndBytesConfig(**options))


def _quantized(config: Any) -> dict[str, Any]:
    return {"quantization_config": config, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}


def _torchao_int4() -> Any:
    return importlib.import_module("torchao.quantization").Int4WeightOnlyConfig(group_size=128)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise AfnextError(
            "the baseline needs transformers: pip install transformers==5.23.0, or pass --baseline none"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _prompt(model: Model, audio: np.ndarray) -> Prompt:
    message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QUESTION}]}
    return build_prompt([message], [audio_token_count(len(audio))], model.tokenizer, model.template)


def _padded(features: Tensor) -> Tensor:
    """Features of 30 s: frames of padding hold the floor, 8 decades below the window's maximum but at least 1e-10."""
    missing = 3000 - features.shape[-1]
    floor = (features.amax(dim=(1, 2), keepdim=True) - 2.0).clamp_min(-1.5)
    return torch.cat((features, floor.expand(-1, features.shape[1], missing)), dim=-1)
