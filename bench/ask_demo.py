"""What `make ask` runs: questions about a bundled recording, answered by the small model that comes with afnext."""

import os
from pathlib import Path

from rich.console import Console
from typer.main import get_command

from ..runtime.app.cli import app
from ..runtime.model.hub import BUNDLED

RECORDING = Path(__file__).parent / "data" / "scene.flac"
QUESTIONS = (
    "Describe the audio with timestamps.",
    "What happens first? Please think and reason about the input audio before you respond.",
)


def main() -> None:
    """Ask each question as the command line would, and show the command."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    model = os.environ.get("AFNEXT_MODEL", BUNDLED)
    for number, question in enumerate(QUESTIONS):
        if number:
            console.print()
        console.print(f"[bold]$ afnext ask {RECORDING.name} '{question}'[/bold]")
        get_command(app)(["ask", str(RECORDING), question, "--model", model], standalone_mode=False)


if __name__ == "__main__":
    main()
