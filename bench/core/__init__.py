"""What every benchmark uses: timing, the machine, records, ceilings, random checkpoints."""
