"""Checkpoints with random weights, saved by `transformers` itself: what the parity tests hold the runtime against."""

import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support.tokenizers import AFNEXT_ORDER, CHAT_TEMPLATE, write_checkpoint_texts
from tokenizers import Tokenizer

transformers.logging.set_verbosity_error()

SMALL_ENCODER = {"num_mel_bins": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 80}
SMALL_ENCODER |= {"intermediate_size": 96, "max_source_positions": 1500}
SMALL_DECODER = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL_DECODER |= {"num_key_value_heads": 2, "max_position_embeddings": 60_000}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder that `transformers` saved, and the reference that it loads from there."""

    folder: Path

    def reference(self, dtype: torch.dtype = torch.float32) -> Any:
        """The `transformers` model of the folder, in eval mode."""
        return _reference(self.folder, dtype)

    @cached_property
    def processor(self) -> Any:
        """The `transformers` processor: Whisper features, tokenizer, chat template."""
        extractor = transformers.WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(self.folder / "tokenizer.json"),
            pad_token="[PAD]",
            eos_token="<|im_end|>",
            clean_up_tokenization_spaces=False,
        )
        template = (self.folder / "chat_template.jinja").read_text()
        return transformers.MusicFlamingoProcessor(extractor, tokenizer, chat_template=template, max_audio_len=1800)

    def inputs(self, audio: list[np.ndarray], questions: list[str]) -> dict[str, torch.Tensor]:
        """The reference's inputs for one recording and question a row, left-padded."""
        parts = [[{"type": "audio", "audio": ""}, {"type": "text", "text": question}] for question in questions]
        conversations = [[{"role": "user", "content": part}] for part in parts]
        texts = [
            self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            for conversation in conversations
        ]
        return dict(self.processor(text=texts, audio=audio))

    @torch.inference_mode()
    def assert_same_answer(
        self, answer: Any, inputs: dict[str, torch.Tensor], row: int = 0, *, noise: float = 1e-4, **options: Any
    ) -> None:
        """Fail unless the answer's tokens are those that the reference generates greedily for `row` of `inputs`.

        Where the two part, the reference's own best two scores must lie within `noise` of each other, as then either
        choice is right; what follows such a tie is not compared.
        """
        reference = self.reference()
        generated = reference.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=len(answer.token_ids),
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        expected = generated.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        for step, (ours, theirs) in enumerate(zip(answer.token_ids, expected, strict=False)):
            if ours != theirs:
                best, second = generated.scores[step][row].topk(2).values.tolist()
                assert best - second <= noise, (
                    f"step {step}: token {ours} instead of {theirs}, ahead by {best - second}"
                )
                return
        eos = reference.generation_config.eos_token_id
        length = expected.index(eos) + 1 if eos in expected else len(expected)
        assert len(answer.token_ids) == length, "the answer ends elsewhere"


@functools.lru_cache(maxsize=4)
def _reference(folder: Path, dtype: torch.dtype) -> Any:
    model = transformers.MusicFlamingoForConditionalGeneration
    return model.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def save_checkpoint(
    folder: Path,
    *,
    encoder: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    theta: float = 1200.0,
    text_theta: float = 15_300_000.0,
    partial_rotary_factor: float = 0.2,
    added: tuple[str, ...] = AFNEXT_ORDER,
    template: str = CHAT_TEMPLATE,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> SavedCheckpoint:
    """Save a randomly initialized model in `folder`, with tokenizer and template. `scale` multiplies the usual weights'
    standard deviation, so that attention is not uniform and tokens differ."""
    torch.manual_seed(seed)
    write_checkpoint_texts(folder, added, template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    text = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ids["<|im_end|>"], "bos_token_id": None}
    text |= {"rope_parameters": {"rope_theta": text_theta, "rope_type": "default"}, "tie_word_embeddings": False}
    config = transformers.MusicFlamingoConfig(
        audio_config=transformers.AudioFlamingo3EncoderConfig(**{**SMALL_ENCODER, **(encoder or {})}),
        text_config=transformers.Qwen2Config(**{**text, **SMALL_DECODER, **(decoder or {})}),
        audio_token_id=ids["<sound>"],
        audio_bos_token_id=ids["<|sound_bos|>"],
        audio_eos_token_id=ids["<|sound_eos|>"],
        rope_parameters={
            "rope_theta": theta,
            "rope_type": "default",
            "partial_rotary_factor": partial_rotary_factor,
        },
    )
    model = transformers.MusicFlamingoForConditionalGeneration(config)
    randomize(model.to(dtype), scale)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["[PAD]"], max_new_tokens=64
    )
    model.save_pretrained(folder)
    return SavedCheckpoint(folder)


def randomize(model: torch.nn.Module, scale: float) -> None:
    """Give every parameter random values, biases and norms included, which a fresh model has at 0 and 1."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif parameter.ndim < 2:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, scale * parameter[0].numel() ** -0.5)


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of what was expected, in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
