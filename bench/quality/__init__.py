"""Quality of the answers, and the loss by quantization."""
