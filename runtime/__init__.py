"""Runs the model: io (files to tensors), model (the network), engine (KV cache and generation), app (API and CLI)."""
