"""Trains `afnext-tiny`, a small checkpoint that hears a closed vocabulary. Nothing in the runtime imports this."""
