"""Measures the runtime."""
