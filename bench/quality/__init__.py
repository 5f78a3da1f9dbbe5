"""How good the answers are, and what quantization costs."""
