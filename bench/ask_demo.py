"""What `make ask` runs: a question about the bundled recording, answered by a small checkpoint made on the spot."""

import tempfile
from pathlib import Path

from rich.console import Console
from typer.main import get_command

from ..runtime.app.cli import app
from .random_checkpoint import write_random_checkpoint

RECORDING = Path(__file__).parent / "data" / "jfk.flac"
QUESTION = "Transcribe the input speech."


def main() -> None:
    """Write a random checkpoint, say so, and ask it about the recording."""
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        console.print(
            "[yellow]This checkpoint has random weights[/yellow]: it shows every step from the file to an answer, "
            "but the answer has no meaning. Give your own with AFNEXT_MODEL and `afnext ask`."
        )
        model = write_random_checkpoint(Path(folder))
        command = ["ask", str(RECORDING), QUESTION, "--model", str(model), "--max-new-tokens", "24"]
        console.print(f"$ afnext ask {RECORDING.name} '{QUESTION}' --model random-tiny")
        get_command(app)(command, standalone_mode=False)


if __name__ == "__main__":
    main()
