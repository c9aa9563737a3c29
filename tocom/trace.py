"""Walk from a file back to all that it was made from, hash each on the way, and show it as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.tree import Tree

from tocom.bundled import resolve
from tocom.errors import TocomError
from tocom.files import FOLDER_SUMS, again, recorded_sums, understood, verify_tensors
from tocom.made import hashed, is_output, job_hash, located, sums_of

#: Lists of the images of a downloaded data set, of which every file is hashed but none is shown.
_IMAGES = ".sha256sums"


class Input(NamedTuple):
    """What a file was made from: as what, where it lies, and its SHA-256 then ("": not known)."""

    role: str
    path: Path
    sha256: str


class Traced:
    """What was found on the way.

    Attributes:
        tree: what it is made of, for rich; a file that several were made from is shown once. here: files that match.
        gone: files that are not there to be looked at. error: of the first that does not match, which ends the walk.
    """

    def __init__(self, title: str) -> None:
        self.tree, self.here, self.gone = Tree(title, hide_root=True), dict[Path, str](), dict[Path, None]()
        self.error: TocomError | None = None

    def add(self, file: Input, branch: Tree | None = None, of: Path | None = None) -> None:
        """Look at a file, and at all that it was made from.

        Args:
            of: what was made from it, and says so.

        Raises:
            TocomError: one is not what it says, or what was made from it says.
        """
        path, twig = file.path, (branch or self.tree).add(escape(f"{file.role}  {file.path}".lstrip()))
        if not path.is_file():
            if of is None:
                raise TocomError(f"{path} is missing; {again(path)}")
            self.gone[path] = None
            twig.label += "  [yellow]not here[/yellow]"
            return
        seen = path in self.here
        about, inputs = ("above", []) if seen else _said(path)
        found = self.here.setdefault(path, hashed(path))
        if file.sha256 not in ("", found):
            twig.label += f"  [red]{found[:12]}[/red]"
            raise TocomError(
                f"{path} is not what {of} was made from ({found[:12]}, not {file.sha256[:12]}); {again(of)}"
            )
        twig.label += f"  [green]{found[:12]}[/green]  [dim]{escape(about)}[/dim]"
        for item in inputs:
            self.add(item, twig, path)


def trace(path: str | Path) -> Traced:
    """Trace a file, or every file of a folder that says what made it, the last in the chain first.

    Raises:
        TocomError: there is nothing to trace.
    """
    path = Path(path)
    files = list(_recorded(path)) if path.is_dir() else [resolve(path)]
    if not files or not (path.is_dir() or files[0].is_file()):
        raise TocomError(f"no such file: {path}; give a table, a figure, a CSV, predictions or a checkpoint")
    traced = Traced(str(path))
    try:
        for file in files:
            if file not in traced.here:
                traced.add(Input("", file, ""))
    except TocomError as error:
        traced.error = error
    return traced


def _recorded(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that say what made them: tables and figures, CSV files, files of tensors."""
    lists = [place for place in sorted(folder.rglob("*")) if place.suffix == ".sha256" or place.name == FOLDER_SUMS]
    named = [place.parent / name for place in lists for name in recorded_sums(place) if is_output(place, name)]
    depth = [path for path in named if path.suffix != ".csv"] + [path for path in named if path.suffix == ".csv"]
    yield from dict.fromkeys([*depth, *sorted(folder.rglob("*.safetensors"))])


def _said(path: Path) -> tuple[str, list[Input]]:
    """Return what a file says of itself, in short, and of what it was made; check what it holds."""
    if path.suffix == ".safetensors":
        about = verify_tensors(path)
        with understood(path):
            return _of_tensors(path, about)
    if path.name == _IMAGES:
        sums = recorded_sums(path)
        for name, value in sums.items():
            file, fetched = path.parent / name, path.parent.name
            if not file.is_file() or hashed(file) != value:
                command = f"tocom data fetch {fetched} --root {path.parents[1]} --force"
                raise TocomError(f"{file} is missing or was changed; run `{command}`")
        return f"{len(sums)} files, all as they were fetched", []
    place = sums_of(path)
    if place is None:
        return "says nothing of what made it", []
    of = {name: value for name, value in recorded_sums(place).items() if not is_output(place, name)}
    return f"as {place.name} says", [Input("", located(place, name), value) for name, value in of.items()]


def _of_tensors(path: Path, about: Mapping[str, Any]) -> tuple[str, list[Input]]:
    told = [f"{key} {about[key]}" for key in ("kind", "task", "train_degree", "seed") if key in about]
    if about.get("kind") == "task":
        told += [", ".join(f"{n} {split}" for split, n in about["sizes"].items()) + f" images of {about['source']}"]
    made = about.get("made")
    if made is None:
        return "; ".join([*told, "says nothing of what made it"]), []
    told += [f"job {job_hash(made['job'])}", f"code {', '.join(map(' '.join, made['code'].items()))}"]
    return "; ".join(told), [Input(it["role"], located(path, it["file"]), it["sha256"]) for it in made["inputs"]]
