"""Files and configs that are meant to do harm: each is refused in one line, quickly, with nothing run and nothing left.

What tests of single readers hold is not here again: archives (data/test_unpack.py), damaged images
(data/test_images.py), pickles in disguise (test_files.py), keys given twice (test_checks.py). test_fuzz.py tries what
nobody thought of.
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.confined import confined
from tests.data.layouts import python2_pickle
from tests.small import ARCHITECTURE, KWARGS, build, refusal
from tocom.analysis.cells import concatenate, read_cells
from tocom.analysis.scores import read_predictions
from tocom.data.families import cifar
from tocom.data.families.idx import read_idx
from tocom.data.families.reading import read_mat
from tocom.data.images import decode, open_image
from tocom.data.own import read_own
from tocom.data.registry import prepare, read
from tocom.data.unpack import unpack
from tocom.errors import TocomError
from tocom.files import digest, load_arrays, load_metadata, load_tensors, read_yaml, save_tensors
from tocom.jobs import FinetuneJob, Plan, read_job
from tocom.models import import_backbone, load_model, save_model
from tocom.parts import load_part, part_class
from tocom.study import parse_study, read_study

DEMO = yaml.safe_load((Path(__file__).parents[1] / "config" / "demo.yaml").read_text())
CELLS = Path(__file__).parents[1] / "results" / "demo" / "cells.csv"
TOCOM = part_class("compensator", "tocom")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder in which to work."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(function, *arguments, **options):
    """Return the line with which something is refused, in bounded time and memory."""
    with confined(Path.cwd(), seconds=10, megabytes=1000):
        return refusal(function, *arguments, **options)


# --- what is named is not run -----------------------------------------------------------------------------------------


def test_a_file_of_weights_does_not_have_a_script_run_that_lies_about(here):
    (here / "clean_up.py").write_text("open('run', 'w')\nEverything = object\n")
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("open('run', 'w')")
    (here / "pack" / "inner.py").write_text("open('run', 'w')")
    tensors = {"t": torch.zeros(2)}
    about = {"format": 2, "sha256": digest(tensors), "shape": None, "max_degree": 1, "compressor": None}
    for kind in ("clean_up:Everything", "pack.inner:Part", "antigravity:x", "os:system"):
        save_tensors("part", tensors, {"kind": "compensator", "part": {"kind": kind}} | about)
        assert "is not run" in refused(load_part, "part", "compensator") or kind.startswith("os")
        save_model("model", build(), ARCHITECTURE, KWARGS, tuning={"kind": kind})
        refused(load_model, "model")
        method = {"mine": {"compressor": kind}}
        refused(parse_study, DEMO | {"methods": method, "compare": [], "endpoint": {}})
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("def (", "invalid syntax"), ("class Mine: pass\n1 / 0", "division by zero"),
     ("class Mine: pass\nimport sys; sys.exit(3)", "cannot be imported"), ("class Mine: pass", "is no compressor")],
)  # fmt: skip
def test_a_class_of_ones_own_that_cannot_be_imported(here, content, message):
    name = f"own_{abs(hash(content))}"
    (here / f"{name}.py").write_text(content)
    methods = {"mine": {"compressor": f"{name}:Mine"}}
    assert message in refusal(parse_study, DEMO | {"methods": methods, "compare": [], "endpoint": {}})


def test_a_function_that_leaves_the_program_is_one_line(here):
    (here / "leaves.py").write_text("import sys\ndef images(): sys.exit(3)")
    assert "raised SystemExit" in refusal(read_own, "x", {"python": "leaves:images"}, here)


# --- configs, jobs and CSV --------------------------------------------------------------------------------------------

MERGED = "a0: &a0 {k: v, l: w}\n" + "\n".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGED, "merges too much"),
        ("? [a, b]\n: c", "a key is no plain text"),
        ("study: 0x" + "f" * 10_000, "40,000 bits is no setting"),
        ("study: " + ":".join("1" * 20_000), "bits is no setting"),
        ('extends: "a\\0b"', "a zero byte"),
        ("a: [" + "1, " * 600_000 + "]", "more than 1,048,576 bytes"),
        ("study: !!python/object/apply:os.system ['touch run']", "could not determine a constructor"),
        ("[" * 100_000, "is not YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_a_config_with_surprises(here, text, message):
    (here / "x.yaml").write_text(text)
    assert message in refused(read_yaml if "bits" in message else read_study, "x.yaml")
    assert [path.name for path in here.iterdir()] == ["x.yaml"]


def test_a_config_without_end_is_not_read_to_it():
    assert "more than 1,048,576 bytes" in refused(read_study, "/dev/zero")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ('{"max_degree": 1, "max_degree": 2}', (), "'max_degree' is given twice"),
        ('{"settings": ' + "[" * 100_000, (), "nested too deep"),
        ('{"max_degree": ' + "1" * 5_000 + "}", (), "is no JSON"),
        ('{"max_degree": ' + "1" * 30 + "}", (), "bits is no setting"),
        ("{}", ["max_degree=" + "[" * 100_000], "nested too deep"),
        ("{}", ["max_degree=" + "1" * 5_000], "give a plain value"),
        ("{" + "x" * 100_000, (), "is no JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_job_with_surprises(text, changes, message):
    said = refused(read_job, FinetuneJob, text, changes)
    assert message in said
    assert len(said) < 500


@pytest.mark.parametrize("configs", [[3], ["a\0b"], [{}], "x.yaml", [[]]])
def test_a_list_of_configs_that_is_none(configs):
    refused(Plan.of, {"configs": configs})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "a" * 300}, "100 letters at most"),
        ({"data": {"root": "da{ta}"}}, "no path with braces"),
        ({"data": {"root": "a\nb"}}, "no path with braces or control characters"),
        ({"backbones": [DEMO["backbones"][0] | {"checkpoint": "g{x}.safetensors"}]}, "no path with braces"),
        ({"tasks": [{"name": "mine", "folder": "x", "group": "=HYPERLINK(1)"}]}, "a formula in a spreadsheet"),
        *[
            ({"study": name}, "cannot name a folder")
            for name in ("$(x)", "a b", "-rf", "a;b", "'a'", "..", "a{b}", "a\n")
        ],
        *[({"tasks": [{"name": name, "folder": "x"}]}, "cannot name a folder") for name in ("$(x)", "-rf", "a/../b")],
    ],
    ids=str,
)
def test_names_and_paths_that_a_shell_or_snakemake_would_take_for_more(changes, message):
    assert message in refused(parse_study, DEMO | {"endpoint": {}} | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: b"", "No columns"),
        (lambda it: it.replace(b"tome", b"to\0me", 3), "a zero byte"),
        (lambda it: it.replace(b",scale,", b",seed,"), "'seed' twice"),
        (lambda it: it.replace(b",accuracy,0.", b",accuracy,=1+", 3), "text in the column 'score'"),
        (lambda it: it.replace(b"\n", b'\n"', 1), "not a readable CSV"),
        (lambda it: b"\xff\xfe" + it, "not a readable CSV"),
    ],
)
def test_a_table_of_cells_with_surprises(here, change, message):
    content = CELLS.read_bytes()
    (here / "cells.csv").write_bytes(change(content))
    assert message in refused(read_cells, here / "cells.csv")
    (here / "cells.csv").write_bytes(b"\xef\xbb\xbf" + content)
    assert len(read_cells(here / "cells.csv")) == len(read_cells(CELLS))


def test_tables_of_other_columns_are_not_joined(here):
    (here / "a.csv").write_text("a\n1\n")
    (here / "b.csv").write_text("b\n1\n")
    assert "other columns" in refused(concatenate, ["a.csv", "b.csv"], "out.csv")
    assert "no such file" in refused(concatenate, ["none.csv"], "out.csv")
    assert not (here / "out.csv").exists()


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_tensors, load_arrays, load_metadata])
def test_metadata_that_are_nested_without_end(here, load):
    header = {"__metadata__": {"a": "[" * 200_000}, "t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (here / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "nested too deep" in refused(load, "x")


def test_metadata_that_are_not_those_of_this_version(here):
    readers = {"model": load_model, "compensator": lambda path: load_part(path, "compensator"), "task": read}
    readers["predictions"] = read_predictions
    for kind, reader in readers.items():
        said = {"kind": kind, "format": 2, "task_kind": "classify", "metric": "accuracy"}
        save_tensors("x", {"t": torch.zeros(2)}, said)
        assert "metadata that this version cannot read (they lack" in refused(reader, "x")


def test_a_small_file_that_describes_a_large_model_or_part_is_not_built(here):
    for kwargs in ({"depth": 10**6}, {"embed_dim": 10**5, "num_heads": 1}, {"mlp_ratio": 1e6}):
        save_model("model", build(), ARCHITECTURE, KWARGS | kwargs)
        assert "far larger than its weights" in refused(load_model, "model")
    tensors = {"t": torch.zeros(2)}
    about = {"kind": "compensator", "format": 2, "sha256": digest(tensors), "part": "tocom", "compressor": None}
    save_tensors("part", tensors, about | {"shape": [10**5, 10**5, 1, 1, 1], "max_degree": 1})
    assert "far larger than its parameters" in refused(load_part, "part", "compensator")


def imported(path):
    import_backbone("out", ARCHITECTURE, weights=path, kwargs=KWARGS)


STEM = "blocks.0.attn.q_tocom.adapter_down.weight"
STRANGE = {
    "one number that stands for many": torch.zeros(1).expand(10**11),
    "sparse": torch.zeros(4, 4).to_sparse(),
    "without values": torch.zeros(4, 4, device="meta"),
    "8 bits": torch.zeros(4, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("reader", [imported, TOCOM.from_public])
def test_a_tensor_that_is_no_plain_one(here, reader, value):
    torch.save({"head.weight": value, STEM: value}, "w.pth")
    assert "is no plain tensor" in refused(reader, "w.pth")
    assert [path.name for path in here.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("reader", [imported, TOCOM.from_public])
def test_weights_that_unpack_without_end(here, reader):
    torch.save({"head.weight": torch.zeros(5 * 10**6)}, "w.pth")
    with zipfile.ZipFile("w.pth") as source, zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert "bytes unpack to" in refused(reader, "bomb.pth")
    np.savez_compressed("bomb.npz", **{"head/bias": np.zeros(10**7)})
    assert "bytes unpack to" in refused(imported, "bomb.npz")


@pytest.mark.parametrize("reader", [imported, TOCOM.from_public, open_image, load_tensors, read_cells])
def test_a_pipe_is_not_waited_for(here, reader):
    os.mkfifo("pipe.pth")
    refused(reader, "pipe.pth")


# --- images and data sets ---------------------------------------------------------------------------------------------


def png(width, height):
    """Return an image of black pixels, of one bit each."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(height * (1 + -(-width // 8)), 10**7)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "message"),
    [((100_000, 100_000), "bomb"), ((1, 100_000), "a strip of 1 x 100,000"), ((100_000, 1), "a strip")],
)
def test_images_of_100_000_pixels_a_side(here, size, message):
    (here / "x.png").write_bytes(png(*size))
    assert message in refused(decode, [here / "x.png"], 224)


def test_a_picture_that_is_a_program_is_not_run(here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    (here / "gs").write_text("#!/bin/sh\ntouch run\n")
    (here / "gs").chmod(0o755)
    (here / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    refused(open_image, "x.png")
    assert not (here / "run").exists()


def pictures(folder):
    for split in ("train", "test"):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8), (ord(label), 0, ord(split[1]))).save(
                folder / split / label / f"{split}{label}.png"
            )


@pytest.mark.parametrize("target", ["/dev/zero", "/nonexistent", "x.png", "/etc/hostname"])
def test_a_link_in_a_folder_of_images_to_what_is_no_image(here, target):
    pictures(here / "d")
    (here / "d/train/a/x.png").symlink_to(target)
    message = refused(prepare, "mine", here / "out", {"val": 0.5}, 32, {"folder": "d"})
    assert "x.png" in message
    assert not (here / "out").exists()


@pytest.mark.parametrize("place", ["train/a/x.png", "train/a", "train"])
def test_a_link_out_of_a_folder_of_images(here, place):
    pictures(here / "d")
    pictures(here / "elsewhere")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(here / "elsewhere/train/a/x.png")
    if (here / "d" / place).exists():
        shutil.rmtree(here / "d" / place)
    (here / "d" / place).symlink_to(here / "elsewhere" / place)
    assert "leads out of d, to " in refused(prepare, "mine", here / "out", {"val": 0.5}, 32, {"folder": "d"})
    assert not (here / "out").exists()
    followed = prepare("mine", here / "out", {"val": 0.5}, 32, {"folder": "d", "links": "follow"})
    assert sum(followed["sizes"].values()) >= 4


def test_a_pipe_in_a_folder_of_images(here):
    pictures(here / "d")
    os.mkfifo(here / "d/train/a/x.png")
    assert "there is no file" in refused(prepare, "mine", here / "out", {"val": 0.5}, 32, {"folder": "d"})


def test_names_of_images_are_no_commands(here):
    pictures(here / "d")
    for number, name in enumerate(["-rf", "$(touch run)", "a{b}", "a b", "a\nb", "'q'", "`x`"]):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(here / "d/train/a" / f"{name}.png")
    with confined(here):
        assert prepare("mine", here / "out", {"val": 0.5}, 32, {"folder": "d"})["sizes"]["train"] == 5
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label,label,split", "a.png,x,y,train"], "'label' twice"),
        (["path,label,split", "a" * 5_000 + ",x,train", "b.png,x,test"], "there is no file"),
        (["path,label,split", "a.png," + "9" * 5_000 + ",train", "b.png,1,test"], "is no label"),
        (["path,label,split", "a.png,x\0y,train", "b.png,x,test"], "a zero byte"),
    ],
)
def test_lists_of_images_with_surprises(here, lines, message):
    for name in ("a.png", "b.png"):
        (here / name).touch()
    (here / "own.csv").write_text("\n".join(lines))
    assert message in refused(read_own, "x", {"csv": "own.csv"}, here)


def test_pickles_of_a_data_set_that_are_meant_to_fill_memory_or_to_crash(here):
    nested = [0]
    for _ in range(9):
        nested = [nested] * 10
    right = {"data": np.zeros((1, 4), np.uint8), "fine_labels": [1]}
    attacks = {
        b"\x80\x02}r\xff\xff\xff\x7f.": "LONG_BINPUT",
        b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".": "",
        b"\x80\x02cos\nsystem\nU\x07touch xR.": "os.system",
        python2_pickle(right | {"fine_labels": nested}): "lists of numbers",
        python2_pickle(right | {"data": np.zeros(3, "f8")}): "other than bytes",
        python2_pickle(right | {"data": np.array([None])}): "",
    }
    for content, message in attacks.items():
        (here / "train").write_bytes(content)
        assert message in refused(cifar.read_batch, here / "train", "data", "fine_labels")
    (here / "train").write_bytes(python2_pickle(right))
    data, labels = cifar.read_batch(here / "train", "data", "fine_labels")
    assert (data.tolist(), labels) == ([[0, 0, 0, 0]], [1])
    assert b"os" not in pickle.dumps(right)  # the right one asks for nothing else


def test_lists_of_matlab_that_are_nested_without_end_or_unpack_so(here):
    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    content = b""
    for _ in range(10_000):  # a cell in a cell in a cell
        flags, sizes = element(6, struct.pack("<II", 1, 0)), element(5, struct.pack("<ii", 1, 1))
        content = (
            struct.pack("<II", 14, len(flags + sizes) + 8 + len(content)) + flags + sizes + element(1, b"") + content
        )
        if len(content) > 2_000_000:
            break
    header = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    (here / "x.mat").write_bytes(header + content)
    assert "cells and structs" in refused(read_mat, here / "x.mat", "x")
    packed = zlib.compress(bytes(100 << 20))
    (here / "x.mat").write_bytes(header + struct.pack("<II", 15, len(packed)) + packed)
    assert "unpacks to more than" in refused(read_mat, here / "x.mat", "x")


def test_a_file_of_bytes_that_says_it_holds_more_than_there_are(here):
    (here / "x").write_bytes(b"\0\0\x08\x03" + struct.pack(">III", *[2**31] * 3))
    assert "it says that it holds" in refused(read_idx, here / "x")
    (here / "x").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 9) + b"abc")
    assert "fewer than the 9 bytes" in refused(read_idx, here / "x")


# --- archives ---------------------------------------------------------------------------------------------------------


def write_tar(path, *headers, then=b""):
    path.write_bytes(b"".join(header.tobuf() for header in headers) + then + bytes(1024))
    return path


def member(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_of_a_member_without_end(here, kind, first):
    before = [] if first else [member("a")]
    write_tar(here / "x.tar", *before, member("p", 10**8, kind), then=bytes(10**8))
    assert "a header of 100,000,000 bytes" in refused(unpack, here / "x.tar", here / "out", 10**9)


def test_files_without_end_or_names_without_end(here):
    write_tar(here / "x.tar", *(member(f"f{number}") for number in range(1_100)))
    assert "far more files" in refused(unpack, here / "x.tar", here / "out", 1_000)
    with zipfile.ZipFile(here / "x.zip", "w") as zipped:
        for name in ("d/" * 600 + "x",):
            zipped.writestr(name, b"")
    assert "is too long" in refused(unpack, here / "x.zip", here / "out2", 1_000)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(member("n" * 300))
    (here / "y.tar").write_bytes(stream.getvalue())
    assert "is too long" in refused(unpack, here / "y.tar", here / "out3", 1_000)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_quoted_breaks_no_line_and_reaches_no_terminal():
    said = str(TocomError("no file a\nb\x1b[31m\udcff é; remove it"))
    assert said == r"no file a b\x1b[31m\udcff é; remove it"
    assert len(str(TocomError("no column " + "9" * 100_000))) < 500
