"""afnext-tiny through `transformers`: the same checkpoint, the reference's own processor, float32, greedy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .model import MELS


def reference_tokens(folder: Path, asked: list[tuple[np.ndarray, str]], max_new_tokens: int = 400) -> list[list[int]]:
    """The tokens that `transformers` answers, the end token included, for each (16 kHz samples, question)."""
    model = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = _processor(folder)
    eos = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = []
    for samples, question in asked:
        parts = [{"type": "audio", "audio": ""}, {"type": "text", "text": question}]
        conversation: Any = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], audio=[samples])
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
        answer = tokens[inputs["input_ids"].shape[1] :].tolist()
        out.append(answer[: answer.index(eos) + 1] if eos in answer else answer)
    return out


def _processor(folder: Path) -> transformers.MusicFlamingoProcessor:
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, return_attention_mask=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="[PAD]",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return transformers.MusicFlamingoProcessor(extractor, tokenizer, chat_template=template, max_audio_len=1800)
