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

    Lines in the middle that are more than ``height`` give way to a line that says so.
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
    middle = len(lines) // 2
    half = next((bar for bar in bars[middle:] + bars[:middle][::-1] if bar), None)
    now = [] if half is None else ["", half, ""]
    more = len(lines) + len(now) + 1 - height
    if more <= 0:
        return lines[:middle] + now + lines[middle:] if now else lines
    first = (height - len(now) - 1) // 3
    return [*lines[:first], *now, f"[... {more} more lines ...]", "", *lines[first + more + 1 :]]


def record(command: list[str]) -> str:
    """Run a command in a terminal of its own, while it is shown here, too; return all that it sent."""
    with tempfile.NamedTemporaryFile() as file:
        sized = f"stty cols {WIDTH} rows 40; {shlex.join(command)}"
        subprocess.run(["script", "--quiet", "--return", "--flush", "--command", sized, file.name], check=True)
        text = Path(file.name).read_text(encoding="utf-8", errors="replace")
    return text.partition("\n")[2].rpartition("\nScript done")[0]


def main(page: str = "docs/console.md", *command: str) -> None:
    """Put a recording between the marks of a page."""
    command = command or ("make", "reproduce")
    lines = [f"$ {shlex.join(command)}", *seen(record([*command]))]
    path = ROOT / page
    block = "\n".join(["<!-- recorded -->", "```text", *lines, "```", "<!-- end -->"])
    marks = re.compile(r"<!-- recorded -->.*<!-- end -->", re.DOTALL)
    path.write_text(marks.sub(lambda _: block, path.read_text(encoding="utf-8"), count=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
