"""Files that are whole or absent, and what is refused on the way in."""

import hashlib
import json
import os
import pickle
import stat
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.data.disk import file_limit
from tests.small import refusal as refused_line
from tocom.errors import TocomError
from tocom.files import (
    atomic,
    digest,
    load_arrays,
    load_tensors,
    save_arrays,
    save_tensors,
    sha256,
    verify_tensors,
    write_text,
)

WRITERS = {
    "text": lambda path: write_text(path, "x" * 5000),
    "tensors": lambda path: save_tensors(path, {"t": torch.zeros(5000)}),
    "arrays": lambda path: save_arrays(path, {"t": np.zeros(5000)}),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def write(request):
    """Every function that writes a file of some kilobytes."""
    return request.param


# --- atomic ---------------------------------------------------------------------------------------------------


def test_the_file_appears_when_the_block_ends_and_not_before(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_no_temporary_and_the_old_file_if_any(tmp_path, error, existing):
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")

    def write_half():
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * existing


@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(tmp_path, write, existing):
    target = tmp_path / "file"
    if existing:
        target.write_text("old")
    with file_limit(1000), pytest.raises(TocomError, match="cannot write .*; free some space") as caught:
        write(target)
    assert "\n" not in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * existing


def test_a_folder_that_is_a_file_is_refused(tmp_path, write):
    (tmp_path / "results").write_text("")
    with pytest.raises(TocomError, match="cannot write .*; choose a folder that you may write to"):
        write(tmp_path / "results" / "file")


def test_a_result_is_as_readable_as_any_new_file(tmp_path, write):
    old = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


# --- what goes in comes out -----------------------------------------------------------------------------------


METADATA = {"kind": "model", "n": 3, "x": 0.1, "list": [1, None, True], "nested": {"b": "é", "a": {}}, "text": '"{'}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_tensors_and_metadata_come_back_as_they_went_in(tmp_path, dtype):
    tensors = {"a.weight": torch.arange(12).reshape(3, 4).T.to(dtype), "scalar": torch.ones((), dtype=dtype)}
    save_tensors(tmp_path / "t", tensors, METADATA)
    loaded, metadata = load_tensors(tmp_path / "t")
    assert metadata == METADATA
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype is dtype
        assert torch.equal(loaded[name], tensor)


def test_arrays_and_metadata_come_back_as_they_went_in(tmp_path):
    arrays = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1), "labels": np.array([1, -2])}
    save_arrays(tmp_path / "a", arrays, METADATA)
    loaded, metadata = load_arrays(tmp_path / "a")
    assert metadata == METADATA
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_the_same_contents_are_the_same_bytes(tmp_path):
    names = ["z", "a.b", "m"]
    for copy in range(8):
        order = names if copy % 2 else names[::-1]
        metadata = dict(sorted(METADATA.items(), reverse=copy % 2))
        save_tensors(tmp_path / f"t{copy}", {name: torch.full((3,), len(name)) for name in order}, metadata)
        save_arrays(tmp_path / f"a{copy}", {name: np.full(3, len(name)) for name in order}, metadata)
    assert len({sha256(path) for path in tmp_path.iterdir()}) == 1


def test_metadata_of_any_length_can_be_read_back(tmp_path):
    first_bytes = set()
    for length in range(0, 260, 8):
        save_tensors(tmp_path / "t", {"t": torch.ones(2)}, {"padding": "x" * length})
        first_bytes.add((tmp_path / "t").read_bytes()[0])
        assert load_tensors(tmp_path / "t")[1] == {"padding": "x" * length}
    assert 0x80 in first_bytes  # a header length that begins as a pickle does


def test_what_another_program_wrote_is_read_with_its_metadata_as_text(tmp_path):
    save_file({"t": torch.ones(2)}, tmp_path / "t", metadata={"format": "pt"})
    tensors, metadata = load_tensors(tmp_path / "t")
    assert torch.equal(tensors["t"], torch.ones(2))
    assert metadata == {"format": "pt"}


# --- what is refused ------------------------------------------------------------------------------------------


def refusal(path, load=load_tensors):
    message = refused_line(load, path)
    assert str(path) in message
    return message


@pytest.mark.parametrize("load", [load_tensors, load_arrays])
def test_a_missing_file_is_refused(tmp_path, load):
    assert "no such file" in refusal(tmp_path / "none", load)
    assert "no such file" in refusal(tmp_path, load)


@pytest.mark.parametrize("load", [load_tensors, load_arrays])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"GIF89a" + bytes(50), b"\xff" * 100, b"\x08" + bytes(7) + b"not json"]
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, load, content):
    (tmp_path / "f").write_bytes(content)
    assert "corrupt or not a safetensors file" in refusal(tmp_path / "f", load)


@pytest.mark.parametrize("load", [load_tensors, load_arrays])
def test_a_truncated_file_is_refused(tmp_path, load):
    save_tensors(tmp_path / "t", {"t": torch.ones(20)}, METADATA)
    content = (tmp_path / "t").read_bytes()
    for left in (3, 8, 20, len(content) - 81, len(content) - 1):
        (tmp_path / "t").write_bytes(content[:left])
        assert "corrupt" in refusal(tmp_path / "t", load)


def test_changed_metadata_are_refused(tmp_path):
    save_tensors(tmp_path / "t", {"t": torch.ones(2)}, {"scale": 0.1})
    content = (tmp_path / "t").read_bytes()
    assert content.count(b'"0.1"') == 1
    (tmp_path / "t").write_bytes(content.replace(b'"0.1"', b'"0.2"'))
    assert "metadata do not match their hash" in refusal(tmp_path / "t")


@pytest.mark.parametrize("load", [load_tensors, load_arrays, verify_tensors])
def test_no_bit_of_a_file_can_flip_unnoticed(tmp_path, load):
    save_tensors(tmp_path / "t", {"a.weight": torch.arange(5.0), "b": torch.zeros(2, 3)}, {"kind": "model", "x": "é"})
    content = (tmp_path / "t").read_bytes()
    assert len(content) < 500
    for place, bit in product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (tmp_path / "t").write_bytes(flipped)
        refusal(tmp_path / "t", load)


def test_a_file_from_before_tensors_had_a_hash_is_read(tmp_path):
    text = {"kind": '"model"'}
    checksum = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    save_file({"t": torch.ones(2)}, tmp_path / "t", metadata=text | {"checksum": json.dumps(checksum)})
    tensors, metadata = load_tensors(tmp_path / "t")
    assert torch.equal(tensors["t"], torch.ones(2))
    assert metadata == verify_tensors(tmp_path / "t") == {"kind": "model"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_as_what_it_is(tmp_path, protocol):
    (tmp_path / "p.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}, protocol))
    assert "is a Python pickle" in refusal(tmp_path / "p.safetensors")


def test_a_corrupt_file_that_begins_as_a_pickle_does_is_not_taken_for_one(tmp_path):
    for length in range(0, 260, 8):
        save_tensors(tmp_path / "t", {"t": torch.ones(2)}, {"padding": "x" * length})
        content = (tmp_path / "t").read_bytes()
        if content[0] == 0x80:
            break
    assert content[0] == 0x80
    (tmp_path / "t").write_bytes(content[:-1])
    assert "is corrupt or not a safetensors file" in refusal(tmp_path / "t")


def test_a_torch_archive_is_refused_as_what_it_is(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "p.safetensors")
    assert "is a zip archive, as torch.save writes" in refusal(tmp_path / "p.safetensors")


# --- hashes ---------------------------------------------------------------------------------------------------


def test_a_digest_depends_on_names_and_values_but_not_on_order_or_layout():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T}
    assert digest(tensors) == digest(same)
    assert digest(tensors) != digest({"a": tensors["a"], "c": tensors["b"]})
    assert digest(tensors) != digest({"a": tensors["a"], "b": torch.tensor([1.0, 1.0000001])})
