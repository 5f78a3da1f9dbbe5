"""Shared by all benchmarks: timing, the machine, records, ceilings, random checkpoints."""
