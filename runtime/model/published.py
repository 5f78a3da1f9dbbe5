"""The config of the released Audio Flamingo Next checkpoints, for plans and random weights without them.

8 267 215 360 parameters in 830 tensors, 16 534 430 720 bytes in bfloat16.
Source: config.json of nvidia/audio-flamingo-next-hf as transformers 5 converts it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

AUDIO_FLAMINGO_NEXT: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["MusicFlamingoForConditionalGeneration"],
        "model_type": "musicflamingo",
        "dtype": "bfloat16",
        "audio_token_id": 151_667,
        "audio_bos_token_id": 151_670,
        "audio_eos_token_id": 151_671,
        "rope_parameters": {"rope_theta": 1200.0, "rope_type": "default", "partial_rotary_factor": 0.2},
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": 128,
            "max_source_positions": 1500,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 151_672,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "rope_parameters": {"rope_theta": 15_300_000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "eos_token_id": 151_645,
        },
    }
)
