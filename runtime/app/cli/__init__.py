"""The command line. Each command is a file; `options` declares shared options, `output` writes the output.

Answers go to stdout, everything else to stderr. Exit codes: 0 for success, 1 for an error with a message, 2 for wrong
usage, 130 when interrupted.
"""

from .main import app, run

__all__ = ["app", "run"]
