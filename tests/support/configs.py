"""Random small models: configs of every shape that the planners have to count right, and weights for them."""

from typing import Any

import torch
from hypothesis import strategies as st

from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.config import ModelConfig
from afnext.runtime.model.parameters import expected_shapes
from afnext.runtime.model.weights import fill


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Configs with every size varied on its own, with and without RoTE, tied and untied."""
    heads, head_dim = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([16, 32]))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 7]))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["musicflamingo", "audioflamingo3"])),
        "audio_token_id": 3,
        "audio_bos_token_id": 4,
        "audio_eos_token_id": 5,
        "rope_parameters": {"rope_theta": 1200.0, "rope_type": "default", "partial_rotary_factor": 0.25},
        "projector_bias": draw(st.booleans()),
        "audio_config": {
            "hidden_size": 16 * heads,
            "num_attention_heads": heads,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "intermediate_size": draw(st.integers(1, 200)),
            "num_mel_bins": draw(st.sampled_from([80, 128])),
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": draw(st.integers(300, 900)),
            "hidden_size": 2 * draw(st.integers(8, 100)),
            "head_dim": head_dim,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "intermediate_size": draw(st.integers(1, 300)),
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": draw(st.booleans()),
        },
    }
    return ModelConfig.from_dict(config)


def random_model(config: ModelConfig, dtype: torch.dtype) -> AudioFlamingo:
    """The model with small random weights."""
    model = AudioFlamingo(config)
    fill(model, ((name, 0.05 * torch.randn(shape).to(dtype)) for name, shape in expected_shapes(config).items()))
    return model
