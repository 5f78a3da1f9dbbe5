"""Lending a module's tensors to another device."""

import torch
from support.configs import random_model

from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.weights import on_device

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "audioflamingo3",
        "audio_token_id": 3,
        "audio_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_mel_bins": 80,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 300,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
        },
    }
)


def test_a_module_that_is_there_already_is_not_copied() -> None:
    layer = random_model(CONFIG, torch.float32).encoder.layers[0]
    assert on_device(layer, torch.device("cpu")) is layer


def test_a_lent_module_has_every_tensor_there_and_the_lender_keeps_its_own() -> None:
    layer = random_model(CONFIG, torch.float32).encoder.layers[0]
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    lent = on_device(layer, torch.device("meta"))
    shapes = {name: buffer.shape for name, buffer in lent.named_buffers()}
    assert shapes == {name: buffer.shape for name, buffer in before.items()}
    assert all(buffer.is_meta for buffer in lent.buffers())
    assert lent.self_attn.k_proj.bias is None
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    back = on_device(on_device(layer, torch.device("cpu")), torch.device("cpu"))
    x, lengths = torch.randn(1, 5, 32), torch.tensor([5])
    assert torch.equal(back(x, lengths), layer(x, lengths))
