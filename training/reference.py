"""afnext-tiny through `transformers`: the same checkpoint, the reference's own processor, float32, greedy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def reference_tokens(folder: Path, asked: list[tuple[np.ndarray, str]], max_new_tokens: int = 400) -> list[list[int]]:
    """The tokens that `transformers` answers, the end token included, for each (16 kHz samples, question)."""
    model = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
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
