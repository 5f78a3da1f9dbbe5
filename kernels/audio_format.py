"""The audio that the model hears. Without torch, so that processes which only decode audio need none."""

SAMPLE_RATE = 16_000  # Hz
WINDOW_SAMPLES = 30 * SAMPLE_RATE
