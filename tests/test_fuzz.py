"""Every reader of files that the project owns, on files that are damaged, made up or meant to do harm.

Whatever is in a file, its reader gives a result or refuses it in one line; it starts no program, writes nowhere else,
and takes bounded time and memory. Inputs are valid files with a few edits, or random bytes. `make test` tries a few,
the same ones every time; `make fuzz` tries new ones, FUZZ of them for each reader, and writes results/fuzz/fuzz.md.
"""

import contextlib
import gzip
import io
import os
import platform
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.confined import confined
from tests.data.layouts import cell, mat, python2_pickle
from tests.small import ARCHITECTURE, KWARGS, build
from tocom.analysis.cells import concatenate, read_cells
from tocom.analysis.run import Run
from tocom.analysis.scores import read_predictions
from tocom.data.families.cifar import read_batch
from tocom.data.families.idx import read_idx
from tocom.data.families.reading import read_mat, read_table
from tocom.data.images import decode
from tocom.data.own import read_own
from tocom.data.registry import prepare, read
from tocom.data.store import RECORD, read_record
from tocom.data.unpack import unpack
from tocom.errors import TocomError
from tocom.files import load_arrays, load_metadata, load_tensors, save_arrays, save_tensors
from tocom.jobs import EvaluateJob, FinetuneJob, LearnJob, Plan, PrepareJob, read_job
from tocom.models import import_backbone, load_model, save_model
from tocom.parts import Shape, load_part, make_part, part_class, save_part
from tocom.study import read_config, read_study

ROOT = Path(__file__).parents[1]
#: Inputs for each reader; set by `make fuzz`.
FUZZ = int(os.environ.get("FUZZ", 0))
TINY, DEMO = ROOT / "tests" / "configs" / "tiny.yaml", ROOT / "results" / "demo"
TOCOM = part_class("compensator", "tocom")
tried: dict[str, dict] = {}


def survives(name, run, folder, what):
    """Have a reader read; count what comes of it."""
    count = tried.setdefault(name, {"inputs": 0, "refused": 0, "seconds": 0.0})
    before, started = sorted(path.name for path in folder.parent.iterdir()), time.monotonic()
    said = ""
    try:
        with confined(folder):
            run()
    except TocomError as error:
        said = str(error)
    assert said.isprintable(), ascii(said)
    assert len(said) < 3_000, what
    count["refused"] += bool(said)
    count["inputs"] += 1
    count["seconds"] += time.monotonic() - started
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def fuzzed(test):
    """Give a test as many inputs as are asked for."""
    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    if FUZZ:
        return settings(max_examples=FUZZ, **options)(test)
    return settings(max_examples=20, derandomize=True, phases=[Phase.explicit, Phase.generate], **options)(test)


# --- what is tried ----------------------------------------------------------------------------------------------------

NUMBERS = [b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"-1", b"1e999", b"9" * 30]
WORDS = {
    "yaml": [b"&a ", b"*a", b"<<: *a", b"? [", b"!!python/object/apply:os.system [touch x]", b"\n---\n", b": ", b"- ",
             b"[" * 3000, b"0x" + b"f" * 5000, b"{a: b}: c", b'"\\0"', b"~", b".nan", b"\t", b"2001-99-99", b"!!set {",
             b"extends: x.yaml\n", b"tocom.cli:main", b"os:system", b"$(touch x)", b"../"],
    "json": [b"[" * 3000, b"9" * 5000, b"NaN", b"null", b'"a": 1, "a": 2', b"{", b"}", b'"', b"\\u0000", b"1e999"],
    "csv": [b",", b'"', b"\n", b"\r", b"\0", b"nan", b"=1+1", b"\xef\xbb\xbf", b"label", b"../", b";", b"9" * 5000],
    "pickle": [b"cos\nsystem\n", b"(S'touch x'\ntR",
               b"r\xff\xff\xff\x7f", b"\x96" + b"\xff" * 4 + b"\0" * 4, b"\x82\x01",
               b"]" * 3000, b"\x85" * 3000, b"R", b"b", b"."],
    "tar": [b"../", b"/etc/", b"2", b"1", b"3", b"x", b"g", b"L", b"77777777777", b"\0"],
    "zip": [b"PK\x01\x02", b"PK\x03\x04", b"../", b"/etc/", b"\0"],
}  # fmt: skip


@st.composite
def contents(draw, seeds, words=()):
    """A valid file with a few edits, or bytes of any kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 1, 2, 4, 8, 50]))
        kind = draw(st.sampled_from(["put", "put", "cut", "end", "again", "bit"]))
        if kind == "put":
            content[place : place + length] = draw(st.sampled_from([*NUMBERS, *words]) | st.binary(max_size=8))
        elif kind == "cut":
            del content[place : place + length]
        elif kind == "end":
            del content[place:]
        elif kind == "again":
            content[place:place] = content[place : place + 30 * length] * draw(st.sampled_from([1, 2, 100]))
        elif place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


@dataclass
class Target:
    """A reader: valid files, what reads one, what its file is called, words that mean something to it; and whether it
    may refuse one of the files, because of what is missing beside it.
    """

    seeds: Callable[[Path], list[bytes]]
    run: Callable[[Path], object]
    file: str = "file"
    words: list | tuple = ()
    refuses: bool = False


def written(folder, *writers):
    """Return what some functions of a path write."""
    found = []
    for writer in writers:
        writer(folder / "seed")
        found.append((folder / "seed").read_bytes())
        (folder / "seed").unlink()
    return found


def tensors(folder):
    values = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    return written(
        folder,
        lambda path: save_tensors(path, values, {"kind": "model", "n": [1, 2], "text": "é"}),
        lambda path: save_arrays(path, {"x": np.arange(5, dtype=np.uint8)}, {"kind": "task"}),
    )


def load_each_way(path):
    for load in (load_metadata, load_arrays, load_tensors):
        try:
            load(path)
        except TocomError as error:
            last = error
        else:
            last = None
    if last:
        raise last


def archives(kind):
    def seeds(folder):
        files = {"set/a.txt": b"alpha", "set/b/c.bin": bytes(range(256)), "set/empty": b""}
        stream = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.pax_headers = len(content), {"comment": "é" * 20}
                    archive.addfile(member, io.BytesIO(content))
                for name, type_, link in (("set/soft", tarfile.SYMTYPE, "a.txt"), ("h", tarfile.LNKTYPE, "set/a.txt")):
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = type_, link
                    archive.addfile(member)
        return [stream.getvalue()]

    return seeds


def unpack_beside(path):
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    unpack(path, path.parent / "out", 100_000)


def public(folder):
    part = make_part("compensator", {"kind": "tocom", "rank": 2}, Shape(2, 4, 1, 5, 1), 3)
    return written(folder, lambda path: torch.save({"model": part.to_public()}, path))


def weights(folder):
    return written(folder, lambda path: torch.save(build(num_classes=3, depth=1).state_dict(), path))


def job(path):
    text, _, changes = path.read_bytes().decode("utf-8", "replace").partition("\n")
    for kind in (FinetuneJob, EvaluateJob, LearnJob, PrepareJob):
        try:
            read_job(kind, "{" + text, changes.split("\n") if changes else [])
        except TocomError as error:
            last = error
    raise last


def images_of(folder):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    found = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        stream = io.BytesIO()
        picture.save(stream, kind)
        found.append(stream.getvalue())
    return [*found, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"]


def own_csv(path):
    for split in ("train", "test"):
        (path.parent / f"{split}.png").write_bytes(b"")
    listing = read_own("x", {"csv": str(path)}, path.parent / "cache")
    assert all(file.is_file() for items in listing.splits.values() for file in items.files)


def analysed(path):
    shutil.copy(DEMO / "study.json", path.parent / "study.json")
    Run.read(path.parent)


OWN = b"path,label,split\ntrain.png,cat,train\ntest.png,cat,test\n"
SETS = b'"max_degree": 4, "settings": {"epochs": 2, "lr": 0.001}}\nsettings.epochs=5\ncheckpoints=[["0", 0]]'
TARGETS = {
    "safetensors": Target(tensors, load_each_way, "x.safetensors", WORDS["json"]),
    "config (YAML)": Target(lambda _: [TINY.read_bytes()], read_study, "x.yaml", WORDS["yaml"]),
    "configs (YAML)": Target(
        lambda _: [b"configs: [a.yaml, b.yaml]\n"],
        lambda path: Plan.of(read_config(path)), "x.yaml", WORDS["yaml"], True,
    ),
    "job (JSON) and --set": Target(lambda _: [SETS], job, "job", WORDS["json"], True),
    "cells.csv": Target(
        lambda _: [b"".join((DEMO / "cells.csv").read_bytes().splitlines(keepends=True)[:5])],
        read_cells, "cells.csv", WORDS["csv"],
    ),
    "significance.csv": Target(
        lambda _: [b"".join((DEMO / "significance.csv").read_bytes().splitlines(keepends=True)[:5])],
        analysed, "significance.csv", WORDS["csv"],
    ),
    "tables that are joined (CSV)": Target(
        lambda _: [b"a,b\n1,2\n"], lambda path: concatenate([path, path], path.parent / "o.csv"), "t.csv", WORDS["csv"]
    ),
    "own images (CSV)": Target(lambda _: [OWN], own_csv, "own.csv", WORDS["csv"], True),
    "lists of data sets (text)": Target(
        lambda _: [b"images/a.jpg 0\nimages/b.jpg 1\n"], lambda path: read_table(path, "path", "label"), "l.txt"
    ),
    "IDX": Target(lambda _: [b"\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x03" + bytes(12)], read_idx, "x-ubyte"),
    "IDX (gz)": Target(
        lambda _: [gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde")],
        lambda path: read_idx(path.with_suffix("")), "x-ubyte.gz",
    ),
    "CIFAR's pickles": Target(
        lambda _: [python2_pickle({"data": np.zeros((2, 9), np.uint8), "fine_labels": [0, 1]})],
        lambda path: read_batch(path, "data", "fine_labels"), "train", WORDS["pickle"],
    ),
    "MATLAB 5": Target(
        lambda _: [mat(labels=np.array([1, 2]), files=cell(["a", "b"]))],
        lambda path: read_mat(path, "labels", "files"), "x.mat",
    ),
    "archives (tar)": Target(archives("tar"), unpack_beside, "x.tar", WORDS["tar"]),
    "archives (tar.gz)": Target(
        lambda folder: [gzip.compress(it) for it in archives("tar")(folder)], unpack_beside, "x.tar.gz"
    ),
    "archives (zip)": Target(archives("zip"), unpack_beside, "x.zip", WORDS["zip"]),
    "record of a data set (JSON)": Target(
        lambda _: [b'{"data_set": "a", "files": [], "count": 1, "bytes": 2, "digest": null, "folder": null}'],
        lambda path: read_record(path.parent), RECORD, WORDS["json"],
    ),
    "tocom import": Target(public, lambda path: TOCOM.from_public(path, 3), "x.pth", WORDS["pickle"]),
    "tocom backbone": Target(
        weights,
        lambda path: import_backbone(path.parent / "out", ARCHITECTURE, weights=path, kwargs=KWARGS | {"depth": 1}),
        "x.pth", WORDS["pickle"],
    ),
    "images": Target(images_of, lambda path: decode([path], 16), "x.png", (), True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_in_a_file_its_reader_gives_a_result_or_one_line(name, tmp_path, monkeypatch):
    target, folder = TARGETS[name], tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    seeds = target.seeds(tmp_path)
    for seed in seeds:  # imports what it needs, and shows that most of a file is right
        (folder / target.file).write_bytes(seed)
        with contextlib.suppress(*([TocomError] if target.refuses else [])):
            target.run(folder / target.file)

    @fuzzed
    @given(content=contents(seeds, target.words))
    def read_it(content):
        (folder / target.file).write_bytes(content)
        survives(name, lambda: target.run(folder / target.file), folder, content)

    read_it()


# --- metadata: files that are whole, and say what they should not -----------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["tome", "tocom", "full", "os:system", "antigravity:x", "../x", "classify", "accuracy"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "rank", "depth", "a"]), inner),
    max_leaves=5,
)  # fmt: skip


def described(folder):
    """Return whole files of every kind, with what reads them."""
    save_model(folder / "model", build(), ARCHITECTURE, KWARGS, tuning={"kind": "full"}, train_degree="0")
    save_part(folder / "compensator", make_part("compensator", "tocom", Shape(2, 16, 2, 17, 1), 3))
    prepare("digits", folder / "task", {"train": 20, "val": 10, "test": 10})
    about = {"method": "tome", "seed": 0, "train_degree": "0", "infer_degree": 0, "compressor": "tome", "scale": 0.0}
    about |= {"compensated": False, "compensator": None, "gflops": 1.0}
    right = {"predictions": np.zeros((1, 4), np.uint8), "labels": np.zeros(4, np.uint8)}
    meta = {"kind": "predictions", "metric": "accuracy", "backbone": "b", "task": "t", "cells": [about]}
    save_arrays(folder / "predictions", right, meta)
    readers = {"model": load_model, "compensator": lambda path: load_part(path, "compensator")}
    return readers | {"task": read, "predictions": read_predictions}


@pytest.mark.parametrize("kind", ["model", "compensator", "task", "predictions"])
def test_whatever_a_whole_file_says_of_itself_its_reader_gives_a_result_or_one_line(kind, tmp_path, monkeypatch):
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    reader = described(folder)[kind]
    values, metadata = load_tensors(folder / kind)
    reader(folder / kind)
    keys = st.sampled_from(sorted(metadata.keys() - {"kind"}))

    @fuzzed
    @given(changes=st.dictionaries(keys, VALUES | st.just("gone"), min_size=1))
    def read_it(changes):
        said = {key: value for key, value in (metadata | changes).items() if value != "gone"}
        save_tensors(folder / "changed", values, said)
        survives(f"metadata of a {kind}", lambda: reader(folder / "changed"), folder, changes)

    read_it()


# --- the table --------------------------------------------------------------------------------------------------------


def machine():
    """Return what the table was made with, on one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    names = ("hypothesis", "safetensors", "torch", "numpy", "pandas", "pillow", "scipy", "PyYAML", "pydantic")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; {versions}"


@pytest.fixture(scope="module", autouse=True)
def table():
    """Write what was tried, if `make fuzz` asked for it."""
    yield
    if not FUZZ:
        return
    rows = [f"| {name} | {it['inputs']:,} | {it['refused']:,} | {it['seconds']:.0f} |" for name, it in tried.items()]
    total = {key: sum(it[key] for it in tried.values()) for key in ("inputs", "refused", "seconds")}
    rows.append(f"| **all** | {total['inputs']:,} | {total['refused']:,} | {total['seconds']:.0f} |")
    text = "\n".join(
        [
            "### Inputs tried on every reader of files",
            "",
            "`make fuzz`: valid files with a few edits, or random bytes. Each gave a result or one line, started no",
            "program, wrote nowhere else and stayed within 20 seconds of the processor and 1.5 GB.",
            "",
            "| reader | inputs tried | of them refused | seconds |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            f"Machine: {machine()}.",
            "",
        ]
    )
    (ROOT / "results" / "fuzz").mkdir(parents=True, exist_ok=True)
    (ROOT / "results" / "fuzz" / "fuzz.md").write_text(text)
    print(f"\n{text}")
