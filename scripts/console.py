#!/usr/bin/env python3
"""Record what a person sees of a command in a terminal, as text, in docs/console.md: `make console`.

python scripts/console.py                       # make reproduce
python scripts/console.py PAGE COMMAND [WORD...]
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 120, 60
#: How a terminal is told to go up a line and empty it; all other things that it is told; a bar.
UP, TOLD, BAR = re.compile(r"\x1b\[1A\x1b\[2K"), re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), re.compile(r"^[━╸╺ ]{10}")


def seen(raw: str, height: int = HEIGHT) -> list[str]:
    """Return the lines that a terminal shows in the end of what was sent to it, with the bar as it was half-way.

    Lines below the first two thirds that are more than ``height`` give way to a line that says so.
    """
    lines, bars = [], []
    for line in raw.replace("\r\n", "\n").split("\n"):
        if UP.search(line):  # the bar is taken away
            lines, bars = lines[:-1], bars[:-1]
        parts = [part.rstrip() for part in TOLD.sub("", line).split("\r") if part.strip()] or [""]
        painted = [part for part in parts if BAR.match(part)]
        lines.append(parts[-1])
        bars.append(painted[-1] if painted else "")
    while lines and not lines[-1]:
        lines.pop()
    painted = [number for number, bar in enumerate(bars[: len(lines)]) if bar]
    if painted:
        half = painted[len(painted) // 2]
        lines[half:half] = ["", bars[half], ""]
    more, first = len(lines) + 1 - height, 2 * height // 3
    return lines if more <= 1 else [*lines[:first], f"[... {more} more lines ...]", *lines[first + more :]]


def record(command: list[str]) -> str:
    """Run a command in a terminal of its own, while it is shown here, too; return all that it sent."""
    with tempfile.NamedTemporaryFile() as file:
        sized = f"stty cols {WIDTH} rows 40; {shlex.join(command)}"
        subprocess.run(["script", "--quiet", "--return", "--flush", "--command", sized, file.name], check=True)
        text = Path(file.name).read_bytes().decode(errors="replace")  # read_text would make newlines of repaints
    return text.partition("\n")[2].rpartition("\nScript done")[0]


def main(page: str = "docs/console.md", *command: str) -> None:
    """Put a recording between the marks of a page."""
    command = command or ("make", "reproduce")
    shown = [line for line in seen(record([*command])) if not line.startswith("make[")]  # of `make console` itself
    lines = [f"$ {shlex.join(command)}", *shown]
    path = ROOT / page
    block = "\n".join(["<!-- recorded -->", "```text", *lines, "```", "<!-- end -->"])
    marks = re.compile(r"<!-- recorded -->.*<!-- end -->", re.DOTALL)
    path.write_text(marks.sub(lambda _: block, path.read_text(encoding="utf-8"), count=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
