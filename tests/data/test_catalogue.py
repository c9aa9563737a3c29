"""The catalogue: what an entry may say, how a mistake is named, and the table of the docs."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.small import refusal
from tocom.data.catalogue import BUNDLED, find, markdown, owner_of, read_catalogue, select, size_text
from tocom.data.families import FAMILIES
from tocom.errors import TocomError

DOCS = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
FILE = {"name": "a.tgz", "urls": ["https://a.org/a.tgz"], "checksum": f"sha256:{'0' * 64}", "size": 10, "unpack": "."}
TASK = {"family": "cub", "title": "A set", "group": "FGVC", "classes": 3, "licence": "CC0", "homepage": "https://a.org"}
TASK |= {"split": "5 train, 5 test", "same_files_as": "a"}
ENTRY = {k: v for k, v in TASK.items() if k != "same_files_as"} | {"unpacked_mb": 1.5, "files": [FILE]}


@pytest.fixture
def write(tmp_path):
    def write_catalogue(text=None, **entries):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(entries, sort_keys=False) if text is None else text)
        return tmp_path / "c.yaml"

    return write_catalogue


def mistake(path):
    message = refusal(read_catalogue, path)
    assert str(path) in message
    return message


def test_an_entry_is_read_as_it_is_written_from_the_file_that_is_named(write, monkeypatch):
    assert "cub200" in read_catalogue()
    path = write(a=ENTRY, task=TASK)
    monkeypatch.setenv("TOCOM_CATALOGUE", str(path))
    for entries in (read_catalogue(), read_catalogue(path)):
        assert list(entries) == ["a", "task"]
        assert entries["a"].model_dump(exclude_defaults=True, mode="json") == ENTRY
        assert (entries["a"].download_bytes, entries["a"].unpacked_bytes) == (10, 1_500_000)
    assert (owner_of("a", path), owner_of("task", path)) == ("a", "a")
    with pytest.raises(TocomError, match=r"unknown data set 'tasks' \(did you mean 'task'\?\); `tocom data list`"):
        find("tasks", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "x"}, "a: unknown key 'licens' (did you mean 'licence'?)"),
        ({"group": "FGCV"}, "a: group = 'FGCV'"),
        ({"classes": 0}, "a: classes = 0"),
        ({"unpacked_mb": None}, "unpacked_mb is missing"),
        ({"files": []}, "give files, manual or same_files_as"),
        ({"files": [FILE, FILE]}, "two files have the same name"),
        ({"files": [FILE | {"url": "x"}]}, "unknown key 'files.0.url' (did you mean 'urls'?)"),
        ({"files": [FILE | {"urls": []}]}, "a.tgz: give urls, or manual instructions"),
        ({"files": [FILE | {"urls": ["ftp://a.org/a"]}]}, "files.0.urls.0 = 'ftp://a.org/a'"),
        ({"files": [FILE | {"name": "../a.tgz"}]}, "files.0.name = '../a.tgz'"),
        ({"files": [FILE | {"checksum": "sha256:123"}]}, "files.0.checksum = 'sha256:123'"),
        ({"files": [FILE | {"checksum": None}]}, "give a checksum, or null with a note"),
        ({"files": [FILE | {"checksum_note": "x"}]}, "give a checksum, or null"),
        ({"files": [FILE | {"unpack": "../x"}]}, "unpack '../x': write a folder below"),
        ({"files": [FILE | {"name": "a.rar"}]}, "'a.rar' has no ending of an archive"),
        ({"files": [FILE | {"name": "a.zip", "content": FILE["checksum"]}]}, "content goes with the checksum of a .gz"),
        ({"files": [FILE | {"content": "md5:1"}]}, "files.0.content = 'md5:1'"),
        ({"manual": "ask them"}, "a.tgz: give urls, or manual instructions for the data set, and not both"),
        ({"same_files_as": "b"}, "same_files_as stands in place of files"),
    ],
)
def test_a_mistake_is_named_in_one_line(write, change, message):
    assert message in mistake(write(a=ENTRY | change))


def test_a_mistake_of_the_whole_is_named_in_one_line(write, tmp_path):
    assert "a: key 'licence' is missing" in mistake(write(a={k: v for k, v in ENTRY.items() if k != "licence"}))
    assert "did you mean 'abc'?" in mistake(write(abc=ENTRY, task=TASK | {"same_files_as": "abcd"}))
    assert "same_files_as = 'a'" in mistake(write(b=ENTRY, a=TASK | {"same_files_as": "b"}, task=TASK))
    for text in (2 * yaml.safe_dump({"a": ENTRY}), "", "- a\n", "a: 1\n", "a: [\n", "a b: {}\n", "../a: {}\n"):
        mistake(write(text))
    assert "No such file" in mistake(tmp_path / "none.yaml")


def test_patterns_select_names_in_the_catalogues_order(write):
    entries = read_catalogue(write(**{"v.b": ENTRY, "c": ENTRY, "v.a": ENTRY}))
    assert select(["c", "v.*"], entries) == ["v.b", "c", "v.a"]
    with pytest.raises(TocomError, match=r"unknown data set 'w\.\*'"):
        select(["c", "w.*"], entries)


def test_sizes_are_written_as_people_read_them():
    assert [size_text(n) for n in (0, 999, 1000, 1_150_585_339, 2e12)] == ["0 B", "999 B", "1 kB", "1.15 GB", "2 TB"]


def test_the_page_shows_the_table_the_hosts_and_an_example_as_they_are(write):
    table = DOCS.partition("<!-- tocom data list --markdown -->\n\n")[2]
    assert table == markdown(), "run `tocom data list --markdown` and put its table into docs/datasets.md"
    sentence = re.search(r"Several hosts are known for (.*?)\. For every", DOCS, re.DOTALL)[1]
    assert set(re.findall(r"`(.*?)`", sentence)) == {
        name
        for name, entry in read_catalogue(BUNDLED).items()
        if entry.files and all(len({urlsplit(url).netloc for url in file.urls}) > 1 for file in entry.files)
    }
    ((name, entry),) = read_catalogue(write(re.search(r"```yaml\n(.*?)```", DOCS, re.DOTALL)[1])).items()
    assert entry.family == "cub"
    assert f"below data/{name}/" in DOCS


def test_checksums_of_fashion_mnist_go_with_those_that_torchvision_knows():
    from torchvision.datasets import FashionMNIST

    files = {file.name: file for file in read_catalogue(BUNDLED)["fashion_mnist"].files}
    assert files.keys() == {name for name, _ in FashionMNIST.resources}
    for name, file in files.items():
        assert f"{FashionMNIST.mirrors[0]}{name}" in file.urls
        packed = Path(urlsplit(file.urls[0]).path)
        header = b"\x1f\x8b\x08\x08" + (1504176606 if name.startswith("train") else 1504176627).to_bytes(4, "little")
        header += b"\0\3" + name.removesuffix(".gz").encode() + b"\0"
        # Debian's differ from those that were published by the time and the name in this header alone.
        if packed.is_file() and len(header) + packed.stat().st_size - 10 == file.size:
            published = header + packed.read_bytes()[10:]
            assert hashlib.md5(published).hexdigest() == dict(FashionMNIST.resources)[name]
            assert f"sha256:{hashlib.sha256(published).hexdigest()}" == file.checksum


def test_every_bundled_entry_has_a_reader_and_a_checksum_but_for_the_archive_of_vtab():
    entries = read_catalogue()
    assert {entry.family for entry in entries.values()} == {*FAMILIES, "collection"}
    assert [name for name, entry in entries.items() if any(not f.checksum for f in entry.files)] == ["vtab-1k"]


def test_reading_the_catalogue_waits_neither_for_torch_nor_for_the_network():
    code = "import sys, tocom.data.registry as r; r.kind_of_task('cub200')\n"
    code += "print({'torch', 'requests', 'pandas', 'datasets', 'sklearn'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
