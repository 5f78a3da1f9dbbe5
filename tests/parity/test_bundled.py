"""The bundled model gives the same tokens through `transformers`."""

import numpy as np
import pytest
import soundfile

import afnext
from afnext.bench.ask_demo import QUESTIONS, RECORDING
from afnext.runtime.model.hub import BUNDLED, resolve
from training.reference import reference_tokens


@pytest.mark.parametrize("question", [*QUESTIONS, "Transcribe the input speech with timestamps."])
def test_tokens_equal_the_references(question: str) -> None:
    samples, rate = soundfile.read(RECORDING, dtype="float32")
    answer = afnext.load(dtype="float32").ask((samples, rate), question)
    assert list(answer.token_ids) == reference_tokens(resolve(BUNDLED), [(np.asarray(samples), question)])[0]
