"""The whole model, or layers of it, beside other implementations."""
