"""Each operation over the shapes of the real model."""
