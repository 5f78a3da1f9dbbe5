"""Trains `afnext-tiny`, the small checkpoint that ships with the package. Nothing in the runtime imports this."""
