"""Weights, dense or packed, and the linear layer that holds them."""
