"""Bundled texts: the pinned ones are what is installed, splits share no file and no sequence, another text says so."""

from dataclasses import replace
from importlib import metadata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.small import refusal
from tocom.data import registry, texts
from tocom.data.listing import SPLITS

each_corpus = pytest.mark.parametrize("name", texts.CORPORA)
ROOT = Path(__file__).parents[2]


@each_corpus
def test_the_text_is_the_pinned_one_where_the_pinned_package_is_installed(name):
    corpus, text = texts.CORPORA[name], texts.read(name)
    assert f"\n{corpus.package}=={corpus.version} \\\n" in (ROOT / "requirements" / "run.txt").read_text()
    if metadata.version(corpus.package) != corpus.version:
        pytest.skip(f"{corpus.package} {text.version} is installed")
    assert text.sha256 == corpus.sha256
    assert texts.described(name).endswith(f"{len(text.files)} files, SHA-256 {corpus.sha256}")


@each_corpus
def test_splits_share_no_file_and_no_sequence(name):
    files, found = texts.read(name).files, texts.sequences(name)
    of_split = {split: [place for place in files if texts.split_of(place) == split] for split in SPLITS}
    assert all(of_split.values())
    rows = {split: {row.tobytes() for row in found[split]} for split in SPLITS}
    assert all(len(rows[split]) == len(found[split]) for split in SPLITS)
    assert not any(rows[one] & rows[other] for one, other in combinations(SPLITS, 2))
    place = of_split["test"][0]
    pieces = [files[place][start : start + 256] for start in range(0, len(files[place]) - 255, 256)]
    assert set(pieces) <= rows["train"] | rows["val"] | rows["test"]
    assert not any("/tests/" in place for place in files)
    assert 0.5 < len(found["train"]) / sum(map(len, found.values())) < 0.85


@pytest.mark.parametrize("name", [name for name, task in registry.TASKS.items() if task.kind == "language"])
def test_a_prepared_text_names_its_hash_and_comes_out_the_same_twice(name, tmp_path):
    sizes = {"train": 20, "val": 5, "test": 10}
    about = registry.prepare(name, tmp_path / "one", sizes)
    assert (about["task_kind"], about["classes"], about["sizes"]) == ("language", 257, sizes)
    assert texts.read(name).sha256 in about["source"]
    arrays, _ = registry.read(tmp_path / "one")
    for split, n in sizes.items():
        text = arrays[f"{split}_text"]
        assert (text.shape, text.dtype) == ((n, 256), np.uint8)
        assert {row.tobytes() for row in text} <= {row.tobytes() for row in texts.sequences(name)[split]}
    registry.prepare(name, tmp_path / "two", sizes)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "sequences, not 10000000" in refusal(registry.prepare, name, tmp_path / "x", sizes | {"val": 10_000_000})


def test_what_is_held_out_of_pretraining_is_trained_on_by_nobody():
    train, held_out = texts.pretraining(200), texts.pretraining(50, held_out=True)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in held_out}
    assert texts.PRETRAINING not in registry.TASKS


def test_another_version_says_that_it_is_another_text(monkeypatch):
    corpus = texts.CORPORA["sympy"]
    monkeypatch.setitem(texts.CORPORA, "sympy", replace(corpus, version="1.0", sha256="0" * 64))
    assert "NOT the pinned text (version 1.0, SHA-256 " + "0" * 64 in texts.described("sympy")
    monkeypatch.setitem(texts.CORPORA, "gone", replace(corpus, package="no-such-package"))
    assert "which is not installed" in refusal(texts.read, "gone")
    monkeypatch.setitem(texts.CORPORA, "none", replace(corpus, suffix=".f90"))
    assert "lists no .f90 files" in refusal(texts.read, "none")
