"""What the commands of several modules share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.errors import TocomError
from tocom.timing import is_main

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write, whole or not at all.")]
Sets = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting of this stage; see `tocom settings`. Repeatable."
    ),
]
BackboneArgument = Annotated[str, typer.Argument(help="A bundled backbone (`tocom models`) or a checkpoint's path.")]


def say(text: str) -> None:
    """Tell the user something, once for all processes; standard output stays free for tables."""
    if is_main():
        typer.echo(text, err=True)


def check_outputs(checkpoints: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise TocomError unless there is an output for each checkpoint."""
    if len(outputs) != len(checkpoints):
        raise TocomError(f"{len(checkpoints)} checkpoints but {len(outputs)} outputs; give --output once for each")
