"""The format of the model's audio. Does not import torch, which processes that only decode audio do not need."""

SAMPLE_RATE = 16_000  # Hz
WINDOW_SAMPLES = 30 * SAMPLE_RATE
