"""The kernels compiled for chips that are not here."""
