"""Ahead-of-time compilation of the kernels for chips that this machine lacks."""
