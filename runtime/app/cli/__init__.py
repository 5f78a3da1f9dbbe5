"""The command line. Each command is a file; `options` declares what they share, `output` writes what they print.

Answers go to stdout, everything else to stderr. Exit codes: 0 for success, 1 for an error that the message explains, 2
for wrong usage, 130 when interrupted.
"""

from .main import app, run

__all__ = ["app", "run"]
