"""Checkpoints saved by `transformers`, one a configuration, shared by the parity tests of a session."""

import functools
from collections.abc import Callable

import pytest
from support.checkpoints import SavedCheckpoint, save_checkpoint
from support.tokenizers import OTHER_ORDER

CONFIGURATIONS = {
    "gqa 4:2, theta 1200": {"scale": 2.0},
    "gqa 6:1, theta 1800, other ids": {
        "theta": 1800.0,
        "text_theta": 1_000_000.0,
        "added": OTHER_ORDER,
        "decoder": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 96, "num_hidden_layers": 2},
        "encoder": {"num_hidden_layers": 3, "num_attention_heads": 5},
        "scale": 2.0,
    },
    "mha, head_dim 32, partial 0.4": {
        "partial_rotary_factor": 0.4,
        "decoder": {"num_key_value_heads": 4, "head_dim": 32},
        "scale": 2.0,
    },
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedCheckpoint]:
    """The checkpoint of one of CONFIGURATIONS, saved once a session."""

    @functools.cache
    def save(name: str) -> SavedCheckpoint:
        return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=len(name), **CONFIGURATIONS[name])

    return save


@pytest.fixture(params=CONFIGURATIONS, scope="session")
def checkpoint(request: pytest.FixtureRequest, saved: Callable[[str], SavedCheckpoint]) -> SavedCheckpoint:
    """Every configuration in turn."""
    return saved(request.param)


@pytest.fixture(scope="session")
def one_checkpoint(saved: Callable[[str], SavedCheckpoint]) -> SavedCheckpoint:
    """One configuration, for tests that vary something else."""
    return saved("gqa 4:2, theta 1200")
