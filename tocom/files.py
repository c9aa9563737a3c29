"""Files that are either whole or absent, and tensors that come back as they went in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tocom.errors import TocomError

_log = logging.getLogger(__name__)
#: One file, or several.
Paths = str | os.PathLike | Sequence[str | os.PathLike]
#: First bytes of the formats that hide code: zip (torch.save), pickle protocols 2 to 5.
_FOREIGN = {b"PK": "a zip archive, as torch.save writes", b"\x80": "a Python pickle"}


#: In a folder whose files one job makes together: the SHA-256 of each, as `sha256sum --check` reads them.
FOLDER_SUMS = "SHA256SUMS"


def listed(paths: Paths) -> list[Path]:
    """Return one path, or several, as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def checkpoint_files(checkpoints: Paths) -> list[Path]:
    """Return the checkpoints in a folder, by name, or those that were named.

    Raises:
        TocomError: the folder holds none.
    """
    named = listed(checkpoints)
    if len(named) != 1 or not named[0].is_dir():
        return named
    files = sorted(named[0].glob("*.safetensors"))
    missing = [file for file in recorded_sums(named[0] / FOLDER_SUMS) if not (named[0] / file).exists()]
    if missing:
        raise TocomError(f"{named[0] / missing[0]} is missing; {again(named[0] / missing[0])}")
    if not files:
        raise TocomError(f"{named[0]} holds no checkpoints; fine-tune some first (`tocom finetune`)")
    return files


def again(*paths: str | os.PathLike) -> str:
    """Return, for an error, how files are made again: one that a job made with a whole folder, with that folder."""
    whole = {path: path.name in recorded_sums(path.parent / FOLDER_SUMS) for path in map(Path, paths)}
    units = list(dict.fromkeys(path.parent if together else path for path, together in whole.items()))
    more = f" (and {len(units) - 20} more)" if len(units) > 20 else ""
    return f"delete {' '.join(map(str, units[:20]))}{more} and make it again"


def write_sums(path: str | os.PathLike, title: str, sums: dict[str, str]) -> None:
    """Write name -> SHA-256 of some files as `sha256sum --check` reads it, and at the end a sum of the list itself."""
    lines = [f"# {title}", *(f"{value}  {name}" for name, value in sums.items())]
    write_text(path, "\n".join([*lines, f"# {_sum_of(lines)}", ""]))


def _sum_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def recorded_sums(path: str | os.PathLike) -> dict[str, str]:
    """Return name -> SHA-256 of the files that a list of sums names, in its order; nothing if there is no such list.

    Raises:
        TocomError: it is not what :func:`write_sums` wrote, or, of another program, no such list.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines[:-1] if not line.startswith("#")]
    whole = not lines[0].startswith("#") or (len(lines) > 2 and lines[-2] == f"# {_sum_of(lines[:-2])}")
    if lines[-1] or not whole or not found or not all(found):
        all_of_it = path.parent if path.name == FOLDER_SUMS else path.with_suffix(".*")
        raise TocomError(f"{path} is corrupt: its lines do not match their hash; delete {all_of_it} and make it again")
    return {match[2]: match[1] for match in found}


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place only if the block succeeds.

    Raises:
        TocomError: the disk is full or the folder cannot be written to; nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp and safetensors make private files; results are to be shared
        temporary.replace(path)
    except OSError as error:
        # Without a number: what libraries that report a full disk in a type of their own are turned into.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
        fix = "free some space, or choose another folder" if full else "choose a folder that you may write to"
        raise TocomError(f"cannot write {path}: {error.strerror or error}; {fix}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: str | os.PathLike, busy: str, wait: bool = True) -> Iterator[None]:
    """Hold a lock for the block, which the system frees however the process ends; the file is gone afterwards.

    Args:
        path: the file of the lock. busy: what is said while another process holds it. wait: until it is free.

    Raises:
        TocomError: another process holds it, and ``wait`` is off.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a file system without locks
        _log.warning("%s: no locks here; do not start the same work twice at once", path.parent)
    except Timeout:
        if not wait:
            raise TocomError(busy) from None
        _log.warning("%s", busy)
        lock.acquire()
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for the removed file notices that and takes a new one.
        path.unlink(missing_ok=True)
        lock.release()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` to ``path``, all of it or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


#: Most bytes that a YAML file may have, and most values that it may stand for once its aliases are written out: it is a
#: config, not data.
_YAML_BYTES, _YAML_VALUES = 1 << 20, 100_000


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file.

    Raises:
        TocomError: it is no YAML, names a key twice (of which YAML would drop the first), is larger or stands for more
            (by its aliases) than any config, or holds what no setting is: a number of more than 64 bits, a zero byte.
            OSError: it cannot be read.
    """
    import yaml

    with Path(path).open("rb") as stream:
        text = stream.read(_YAML_BYTES + 1)
    if len(text) > _YAML_BYTES:
        raise TocomError(f"{path} has more than {_YAML_BYTES:,} bytes, which no config needs; give a YAML file")
    try:
        loader = _yaml_loader()(text.decode("utf-8"))
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        if _size(value, {}) > _YAML_VALUES:
            raise TocomError(f"{path} stands for more than {_YAML_VALUES:,} values; write it without so many aliases")
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # bytes that are no text are a ValueError
        raise TocomError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    return value


def parse_json(text: str) -> Any:
    """Return what JSON stands for.

    Raises:
        ValueError: it is none, names a key twice (of which JSON would drop the first), is nested too deep, or holds
            what no setting is: a number of more than 64 bits, a zero byte.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once_each)
        _size(value, {})
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} is given twice")
    return found


def _size(value: Any, known: dict[int, int]) -> int:
    """Return how many values one is made of, its aliases written out; one that holds itself is endless.

    Raises:
        ValueError: one of them is a text with a zero byte, which ends a path early, or a number beyond 64 bits.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a text has a zero byte in it")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"a number of {value.bit_length():,} bits is no setting")
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _YAML_VALUES  # until it is known: a value that holds itself stays too large
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _yaml_loader() -> type:
    """Return a safe loader that refuses a key given twice or no plain text, and merging (<<) without end."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node):
            super().flatten_mapping(node)
            if len(node.value) > _YAML_VALUES:
                raise yaml.constructor.ConstructorError(
                    None, None, "it merges too much into a mapping", node.start_mark
                )

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is no plain text", key.start_mark)
                if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    return Loader


def write_rows(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Write rows as CSV; floats read back exactly, the same rows give the same bytes."""
    import pandas as pd

    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def read_rows(path: str | os.PathLike, numbers: Sequence[str] = (), **options: Any) -> Any:
    """Read CSV in UTF-8, with or without a byte order mark, as a pandas frame.

    Args:
        numbers: columns that hold numbers, as far as they are there. options: of :func:`pandas.read_csv`.

    Raises:
        TocomError: it is missing, no CSV, has a column twice, or text where numbers have to be.
    """
    import csv
    import io

    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise TocomError(f"no such file: {path}; check the path, or run the stage that makes it")
    content = path.read_bytes()
    try:
        if b"\0" in content:
            raise ValueError("it has a zero byte in it")
        frame = pd.read_csv(io.BytesIO(content), encoding="utf-8-sig", **options)
        header = [name.strip() for name in next(csv.reader(io.StringIO(content.decode("utf-8-sig"))))]
        if not isinstance(frame.index, pd.RangeIndex):  # of rows that are longer than it, the first cells are taken
            raise ValueError(f"its rows have more cells than the {len(header)} columns of its header")
    except (ValueError, csv.Error) as error:  # pandas' own errors and those of decoding are ValueErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;")
        raise TocomError(f"{path} is not a readable CSV ({reason}); save it as UTF-8 with commas") from None
    for name in header:
        if name and header.count(name) > 1:
            raise TocomError(f"{path} has the column {name!r} twice; rename or remove one")
    for name in numbers:
        if len(frame) and name in frame.columns and frame[name].dtype.kind not in "iuf":
            raise TocomError(f"{path} has text in the column {name!r}, which holds numbers; mend it or make it again")
    return frame


def save_tensors(path: str | os.PathLike, tensors: dict, metadata: dict[str, Any] | None = None) -> None:
    """Write named torch tensors and JSON-able metadata as safetensors, all of it or nothing.

    The same tensors and metadata always give the same bytes.
    """
    from safetensors.torch import save_file

    kept, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        kept[name] = tensor.clone() if tensor.data_ptr() in places else tensor  # tied weights, which it would refuse
        places.add(tensor.data_ptr())
    _write(path, save_file, kept, metadata)


def _write(path: str | os.PathLike, save_file: Callable, tensors: dict, metadata: dict[str, Any] | None) -> None:
    from safetensors import SafetensorError

    text = {key: json.dumps(value, sort_keys=True) for key, value in (metadata or {}).items()}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=text | dict.fromkeys((_TENSORS, _METADATA), json.dumps("0" * 64)))
        except SafetensorError as error:  # safetensors reports a full disk in its own type
            raise OSError(str(error)) from error
        _finish_header(temporary)


#: Under which metadata keep the hash of all tensors, and that of all other metadata.
_TENSORS, _METADATA = "tensors_checksum", "checksum"


def _checksum(text: dict[str, str]) -> str:
    return json.dumps(hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest())


def _header(stream: BinaryIO) -> tuple[dict, int]:
    size = int.from_bytes(stream.read(8), "little")
    return json.loads(stream.read(size)), size


def _tensors_checksum(header: dict, stream: BinaryIO) -> str:
    """Return a hash of all tensors' names, types, shapes, places and bytes; the stream is where the header ends."""
    about = {name: place for name, place in header.items() if name != "__metadata__"}
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    while block := stream.read(2**20):
        total.update(block)
    return json.dumps(total.hexdigest())


def _finish_header(path: Path) -> None:
    """Put the checksums in, and sort: safetensors writes metadata in random order, and the same file has the same
    bytes."""
    with path.open("r+b") as stream:
        header, size = _header(stream)
        text = header["__metadata__"]
        text[_TENSORS] = _tensors_checksum(header, stream)
        text[_METADATA] = _checksum({key: value for key, value in text.items() if key != _METADATA})
        stream.seek(8)
        stream.write(json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


#: How often a file is read anew that was replaced while it was read.
_REPLACED = 100


def _read(
    path: str | os.PathLike, framework: str, check: bool = True, keep: bool = True
) -> tuple[dict, dict[str, Any]]:
    path = Path(path)
    for left in reversed(range(_REPLACED)):
        before = _identity(path)
        try:
            found = _read_once(path, framework, check, keep)
        except TocomError:
            if not left or _identity(path) == before:
                raise
        else:
            if not left or _identity(path) == before:
                return found
    raise AssertionError("the last time returns or raises")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from one that was renamed into its place; None if there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _read_once(path: Path, framework: str, check: bool, keep: bool) -> tuple[dict, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TocomError(f"no such file: {path}; check the path, or run the stage that makes it")
    try:
        with safe_open(path, framework=framework) as file:
            metadata, checksum = _decode(file.metadata() or {})
            if check and checksum is not None:
                _check_tensors(path, checksum)
            return {name: file.get_tensor(name) for name in file.keys() if keep}, metadata  # noqa: SIM118, no dict
    # TypeError, AttributeError: a type of numbers that NumPy has not
    except (SafetensorError, ValueError, TypeError, AttributeError, MemoryError) as error:
        _refuse_pickle(path)
        reason = (str(error).splitlines() or ["it takes too much memory"])[0]
        raise TocomError(f"{path} is corrupt or not a safetensors file ({reason}); {again(path)}") from None


def _check_tensors(path: Path, checksum: str) -> None:
    with path.open("rb") as stream:
        header, _ = _header(stream)
        if _tensors_checksum(header, stream) != checksum:
            raise ValueError("its tensors do not match their hash")


def _decode(text: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """Return metadata as they were given to :func:`save_tensors`, and the hash of the tensors, if they have one.

    What another program wrote may stay text.
    """
    checksum, text = text.get(_METADATA), {key: value for key, value in text.items() if key != _METADATA}
    if checksum is not None and checksum != _checksum(text):
        raise ValueError("its metadata do not match their hash")
    of_tensors = text.pop(_TENSORS, None)
    if checksum is None and of_tensors is not None:
        raise ValueError("the hash of its metadata is gone")
    metadata = dict(text)
    for key, value in text.items():
        try:
            metadata[key] = json.loads(value)
        except json.JSONDecodeError:
            continue
        except RecursionError:
            raise ValueError(f"its metadata are nested too deep: {key}") from None
    return metadata, of_tensors


@contextlib.contextmanager
def understood(path: str | os.PathLike) -> Iterator[None]:
    """Turn what goes wrong where metadata are not in the form in which this version writes them into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        lacks = f"they lack {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:200]
        raise TocomError(
            f"{path} holds metadata that this version cannot read ({lacks}); make it again, or take it from its source"
        ) from None


def _refuse_pickle(path: Path) -> None:
    """Say so if a file that is not safetensors is in a format that hides code."""
    with path.open("rb") as stream:
        start = stream.read(9)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) and start[8:] != b"{":  # the header of safetensors may begin with the same bytes
            raise TocomError(
                f"{path} is {what}, not a safetensors file; pickles can run code and are refused:"
                " convert it with safetensors, or a public ToCom checkpoint with `tocom import`"
            )


def load_tensors(path: str | os.PathLike) -> tuple[dict, dict[str, Any]]:
    """Read a safetensors file into torch tensors and its metadata.

    Raises:
        TocomError: the file is missing, corrupt, or a pickle in disguise.
    """
    return _read(path, "pt")


def save_arrays(path: str | os.PathLike, arrays: dict, metadata: dict[str, Any] | None = None) -> None:
    """:func:`save_tensors` for NumPy arrays; does not import torch."""
    import numpy as np
    from safetensors.numpy import save_file

    _write(path, save_file, {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def load_arrays(path: str | os.PathLike) -> tuple[dict, dict[str, Any]]:
    """:func:`load_tensors` for NumPy arrays; does not import torch."""
    return _read(path, "np")


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a safetensors file, without reading what else it holds.

    Raises:
        TocomError: see :func:`load_tensors`.
    """
    return _read(path, "np", check=False, keep=False)[1]


def verify_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """Return the metadata of a safetensors file whose tensors match their hash; they are not kept in memory.

    Raises:
        TocomError: see :func:`load_tensors`.
    """
    return _read(path, "np", keep=False)[1]


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_bomb(path: str | os.PathLike) -> None:
    """Refuse a zip, as torch.save and np.savez write, that unpacks to far more than weights ever do; or no file at all.

    Raises:
        TocomError: it is one, or there is no such file.
    """
    import zipfile

    path = Path(path)
    if not path.is_file():  # a pipe would wait for ever
        raise TocomError(f"no such file: {path}; check the path")
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as zipped:
            size = sum(member.file_size for member in zipped.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return  # it is for the one who reads it to say what is wrong
    if size > 8 * path.stat().st_size + (1 << 20):
        raise TocomError(f"{path} is refused: {path.stat().st_size:,} bytes unpack to {size:,}; save it uncompressed")


def check_plain(tensors: dict, path: str | os.PathLike) -> None:
    """Raise TocomError if a torch tensor that was read from ``path`` is no array of the numbers that are in it."""
    import torch

    numbers = torch.float64, torch.float32, torch.float16, torch.bfloat16
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        plain = plain and (tensor.dtype in numbers or not tensor.is_floating_point())
        # One number that stands for any number of them takes no room until it is used.
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise TocomError(f"{path} is refused: {name} is no plain tensor; save it dense and contiguous, on the CPU")


def check_finite(tensors: dict, path: str | os.PathLike) -> None:
    """Raise TocomError if a torch tensor that was read from ``path`` is not plain, or holds NaN or infinity."""
    check_plain(tensors, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise TocomError(f"{path} holds NaN or infinite values ({name}); what made it has failed: use another")


def digest(tensors: dict) -> str:
    """Return a SHA-256 over named tensors that does not depend on file layout or device."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().float().contiguous().numpy()
        total.update(name.encode())
        total.update(array.tobytes())
    return total.hexdigest()
