"""What the commands of several modules share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.errors import TocomError

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write, whole or not at all.")]
Sets = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a part of the job, such as settings.epochs=5. Repeatable."),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="[JOB]", help="What is done, as JSON or a YAML file; see `tocom settings STAGE`.")
]
BackboneOption = Annotated[str, typer.Option("--backbone", help="A bundled backbone (`tocom models`) or a checkpoint.")]


def say(text: str) -> None:
    """Tell the user something, once for all processes; standard output stays free for tables."""
    from tocom.distributed import is_main  # imports torch, for which `tocom --help` does not wait

    if is_main():
        typer.echo(text, err=True)


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Return NAME=VALUE texts as a mapping.

    Raises:
        TocomError: a text has no "=", or a name has several values.
    """
    found = grouped(texts, option)
    for name, values in found.items():
        if len(set(values)) > 1:
            raise TocomError(f"{option} {name} is given {' and '.join(values)}; give one")
    return {name: values[0] for name, values in found.items()}


def grouped(texts: list[str] | None, option: str) -> dict[str, list[str]]:
    """Return NAME=VALUE texts as a mapping from names to their values.

    Raises:
        TocomError: a text has no "=".
    """
    found: dict[str, list[str]] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise TocomError(f"{option} {text!r}: write NAME=VALUE")
        found.setdefault(name, []).append(value)
    return found


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    result = Table(*header)
    for row in rows:
        result.add_row(*row)
    Console().print(result)
