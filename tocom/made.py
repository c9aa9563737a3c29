"""What made a file: its job, the version of the code, and the hashes of what it was made from; checked as it is read.

Files of tensors carry it in their metadata, under ``made``. All others have a list of sums beside them, of themselves
and of what they were made from, which `sha256sum --check` reads, too: NAME.sha256, or SHA256SUMS of a folder that one
job makes. What says nothing of what made it, such as a file of another program, is taken as it is.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tocom import __version__
from tocom.bundled import BUNDLED, resolve
from tocom.errors import TocomError
from tocom.files import FOLDER_SUMS, Paths, again, listed, load_metadata, recorded_sums, sha256, write_sums

PACKAGE = Path(__file__).parent
#: What of the package makes no number of a model: another version of it makes no other checkpoints or predictions.
_APART = re.compile(
    r"(methods|analysis(?!/scores)|stages/(benchmark|eager|overheads|serve|works)|data/(fetch|store)|bundled|checks"
    r"|cli\w*|console|errors|exports|gpus|hub|jobs|made|plan|serving|starting|study|trace)[/.]"
)
#: Keys of jobs that say which models are meant, or where something lies, and not how anything is made.
_WHICH = {"checkpoints", "seeds", "train_degrees", "infer_degrees", "root", "data_root"}


# --- jobs and code --------------------------------------------------------------------------------------------------


def how(job: Any) -> Any:
    """Return what of a job says how something is made: its settings, but not which models and where."""
    job = job.recipe() if hasattr(job, "recipe") else job
    return {key: how(value) for key, value in job.items() if key not in _WHICH} if isinstance(job, Mapping) else job


def job_hash(job: Any) -> str:
    """Return 16 hexadecimal digits that tell jobs apart by :func:`how`."""
    return _short(json.dumps(how(job), sort_keys=True))


def difference(made: Any, wanted: Any, key: str = "") -> str | None:
    """Return the first setting that two jobs both have and that differs, as ``key is A, not B``; None: none does."""
    if isinstance(made, Mapping) and isinstance(wanted, Mapping):
        inner = (difference(made[k], wanted[k], f"{key}.{k}" if key else k) for k in sorted({*made} & {*wanted}))
        return next(filter(None, inner), None)
    return None if made == wanted else f"{key} is {json.dumps(made)}, not {json.dumps(wanted)}"


def code(parts: Iterable[Any] = ()) -> dict[str, str]:
    """Return module -> version of the code that makes numbers: the package as one, and the files of some parts.

    Comments and docstrings do not count, nor do the analysis and the command line.
    """
    modules = [base.__module__ for part in parts if part is not None for base in type(part).__mro__]
    found = {"package": f"{__version__}+{_core()}"}
    while modules:
        name = modules.pop()
        source = _apart(name)
        if source is not None and name not in found:
            found[name] = _essence(source)
            modules += re.findall(r"^from (tocom\.methods\.\w+) import", source.read_text(encoding="utf-8"), re.M)
    return dict(sorted(found.items()))


def _apart(module: str) -> Path | None:
    """Return the file of a part's module: of the registry, or of the user; not of the package or a library."""
    try:
        source = Path(inspect.getsourcefile(sys.modules.get(module)) or "")
    except TypeError:  # a notebook, for one
        return None
    if source.is_relative_to(PACKAGE):
        return source if module.startswith("tocom.methods.") else None
    foreign = {"site-packages", "dist-packages"} & {*source.parts} or source.is_relative_to(Path(os.__file__).parent)
    return None if foreign or not source.is_file() else source


@lru_cache
def _core() -> str:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    named = [f"{name} {_essence(path)}" for name, path in sorted(files.items()) if not _APART.match(name)]
    return _short("\n".join(named))


@lru_cache
def _essence(source: Path) -> str:
    """Return a hash of a module's lines without docstrings, comments of their own line and empty lines."""
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return _short("\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#")))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- in metadata ----------------------------------------------------------------------------------------------------


def made(job: Any, output: str | os.PathLike, inputs: Mapping[str, Paths | None], parts: Iterable[Any] = ()) -> dict:
    """Return what made a file of tensors, for its metadata.

    Args:
        job: the validated job, or a mapping. output: the file, relative to whose folder its inputs are named.
        inputs: role -> files, such as ``backbone`` or ``data``. parts: whose code takes part.

    Returns:
        ``job``, ``code`` (:func:`code`), and ``inputs``: role, file, sha256 of each, and what it says of itself: a hash
        of its job, its code, and ``from``: role -> sha256 of its own inputs.

    Raises:
        TocomError: an input is missing, or not what its job has left.
    """
    files = [(role, resolve(file)) for role, those in inputs.items() if those is not None for file in listed(those)]
    names = _names([file for _, file in files], Path(output).parent, lambda name: name == Path(output).name)
    named = [{"role": r, "file": n, "sha256": hashed(f)} | _said(f) for (r, f), n in zip(files, names, strict=True)]
    return {"job": how(job), "code": code(parts), "inputs": named}


def _sums_by_role(about: Mapping[str, Any]) -> dict[str, str]:
    return {item["role"]: item["sha256"] for item in about.get("made", {}).get("inputs", ())}


def _said(file: Path) -> dict[str, Any]:
    """Return what an input says of itself that has to agree with the other inputs."""
    about = load_metadata(file) if file.suffix == ".safetensors" else {}
    if not isinstance(about.get("made"), Mapping):
        return {}
    job, versions = about["made"]["job"], about["made"]["code"]
    return {"job": job_hash(job), "code": versions, "from": _sums_by_role(about)}


def hashed(file: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, which is hashed once while it stays as it is.

    Raises:
        TocomError: it is missing, or is not the one that the list of sums beside it names.
    """
    file = Path(file)
    if not file.is_file():
        raise TocomError(f"no such file: {file}; check the path, or run the stage that makes it")
    for wait in (0, 0.2, 1):  # another process may be about to write the list of sums of what it has just written
        time.sleep(wait)
        found = _hashed(file)
        if recorded(file) in (found, None):
            return found
    raise TocomError(f"{file} does not match the hash in {sums_of(file).name} beside it; {again(file)}")


def _hashed(file: Path) -> str:
    there = file.stat()
    if time.time_ns() - there.st_mtime_ns < 2e9:  # it might be written again before its clock has moved
        return sha256(file)
    return _hash_of(file.absolute(), there.st_size, there.st_mtime_ns, there.st_ino)


@lru_cache
def _hash_of(file: Path, *_) -> str:
    return sha256(file)


def _names(files: Sequence[Path], folder: Path, taken: Callable[[str], bool]) -> list[str]:
    """Return what files are called in a record: :func:`_name`, or where that is taken or another's, their path."""
    owners: dict[str, Path] = {}
    names = [_name(file, folder) for file in files]
    clear = [not taken(name) and owners.setdefault(name, file) == file for name, file in zip(names, files, strict=True)]
    paths = (os.path.relpath(file.absolute(), folder.absolute()) for file in files)
    return [name if it else path for name, it, path in zip(names, clear, paths, strict=True)]


def _name(file: Path, folder: Path) -> str:
    """Return what a file is called in another's record: no part of it depends on where the study's folder lies."""
    bundled = next((name for name, path in BUNDLED.items() if path == file), None)
    if bundled is not None:
        return bundled
    here, file, folder = Path.cwd(), *(Path(os.path.normpath(path.absolute())) for path in (file, folder))
    within = file.is_relative_to(here) and folder.is_relative_to(here)
    return os.path.relpath(file, folder) if within or file.is_relative_to(folder) else file.name


# --- lists of sums --------------------------------------------------------------------------------------------------


def sums_of(path: str | os.PathLike) -> Path | None:
    """Return the list of sums that names a file as one of those it is of, or None."""
    path = Path(path)
    places = path.with_suffix(".sha256"), path.parent / FOLDER_SUMS
    return next((it for it in places if path.name in recorded_sums(it) and is_output(it, path.name)), None)


def is_output(place: Path, name: str) -> bool:
    """Return whether a list of sums names a file as one of those it is of, not as one that they were made from."""
    return "/" not in name and (place.name == FOLDER_SUMS or Path(name).stem == place.stem)


def recorded(path: str | os.PathLike) -> str | None:
    """Return the SHA-256 that the list of sums beside a file has of it, or None."""
    place = sums_of(path)
    return None if place is None else recorded_sums(place)[Path(path).name]


def seal(outputs: Paths, inputs: Iterable[str | os.PathLike] = (), folder: bool = False) -> None:
    """Write the list of sums of some files that were just made, and of what they were made from.

    Args:
        folder: they are a whole folder's, whose list also keeps what it says of files that earlier calls made.
    """
    outputs = listed(outputs)
    place = outputs[0].parent / FOLDER_SUMS if folder else outputs[0].with_suffix(".sha256")
    earlier = {name: value for name, value in recorded_sums(place).items() if folder and is_output(place, name)}
    sums = {name: value for name, value in earlier.items() if (place.parent / name).exists()}
    sums |= {path.name: sha256(path) for path in outputs}
    inputs = [*map(Path, inputs)]
    names = _names(inputs, place.parent, lambda name: is_output(place, name))
    sums |= {name: hashed(path) for name, path in zip(names, inputs, strict=True)}
    write_sums(place, f"tocom {__version__}", sums)


def check(path: str | os.PathLike) -> None:
    """Raise TocomError if a file is not the one that the list of sums beside it names."""
    if Path(path).is_file():
        hashed(path)


def check_together(paths: Iterable[str | os.PathLike]) -> None:
    """Raise TocomError unless files are what their jobs left, from the same inputs, by one version of the package."""
    agreed = Agreed()
    for path in map(Path, paths):
        check(path)
        place = sums_of(path)
        if place is None:
            continue
        agreed.same("version", _version(place), [path], "by two versions of tocom")
        for name, value in recorded_sums(place).items():
            file = os.path.normpath(place.parent / name)
            agreed.same(file, value, [path], f"from two states of {file}")
        agreed.check()


def _version(place: Path) -> str:
    return place.read_text(encoding="utf-8").splitlines()[0].removeprefix("# tocom ")


class Agreed:
    """What some files say of how they were made, as far as it has to be the same."""

    def __init__(self) -> None:
        self._said: dict[Any, tuple[Any, list[Path]]] = {}
        self._first = ""
        self._stale: dict[Path, None] = {}

    def same(self, key: Any, value: Any, files: Sequence[Path], otherwise: str, now: Any = None) -> None:
        """Take down what a file says; :meth:`check` raises if an earlier one said something else.

        Args:
            files: the file, and what was made from it, which is to go with it: else nothing would need the file.
            otherwise: how the two were then made. now: what a file that is made now would say; the other is to go.
        """
        before, others = self._said.setdefault(key, (value, [*files]))
        if before != value:
            values = " and ".join(str(it)[:28] for it in (value, before))
            self._first = self._first or f"{files[0]} and {others[0]} were made {otherwise} ({values})"
            self._stale |= dict.fromkeys(others if value == now else files)

    def check(self) -> None:
        """Raise TocomError if not all files say the same; it names the first two, and all that are to go."""
        if self._stale:
            raise TocomError(f"{self._first}; {again(*self._stale)}")

    def same_code(self, role: str, versions: Mapping[str, str], files: Sequence[Path]) -> None:
        """Take down by which code a file of a role was made, module by module."""
        for module, version in versions.items():
            now = code()["package"] if module == "package" else None
            self.same((role, module), version, files, f"by two versions of the code ({module})", now)


def located(path: Path, name: str) -> Path:
    """Return where an input of a file is that its record calls ``name``."""
    return BUNDLED.get(name) or Path(os.path.normpath(path.parent / name))
