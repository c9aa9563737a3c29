"""The catalogue: what an entry may say, how a mistake is named, and the table of the docs."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tocom.data.catalogue import BUNDLED, find, markdown, owner_of, read_catalogue, select, size_text
from tocom.errors import TocomError

ROOT = Path(__file__).parents[2]
FILE = {"name": "a.tgz", "urls": ["https://a.org/a.tgz"], "checksum": f"sha256:{'0' * 64}", "size": 10, "unpack": "."}
ENTRY = {
    "family": "cub",
    "title": "A set",
    "group": "FGVC",
    "classes": 3,
    "licence": "CC0",
    "homepage": "https://a.org",
    "split": "5 train, 5 test",
    "unpacked_mb": 1.5,
    "files": [FILE],
}
TASK = {key: value for key, value in ENTRY.items() if key not in ("files", "unpacked_mb")} | {"same_files_as": "a"}


@pytest.fixture
def write(tmp_path):
    def write_catalogue(**entries):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
        return tmp_path / "c.yaml"

    return write_catalogue


def mistake(path):
    with pytest.raises(TocomError) as caught:
        read_catalogue(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_an_entry_is_read_as_it_is_written(write):
    entries = read_catalogue(write(a=ENTRY, task=TASK))
    assert list(entries) == ["a", "task"]
    assert entries["a"].model_dump(exclude_defaults=True, mode="json") == ENTRY
    assert entries["a"].download_bytes == 10
    assert entries["a"].unpacked_bytes == 1_500_000


def test_the_file_is_the_one_that_is_named_or_the_environments_or_the_bundled(write, monkeypatch, tmp_path):
    assert "cub200" in read_catalogue()
    monkeypatch.setenv("TOCOM_CATALOGUE", str(write(mine=ENTRY)))
    assert list(read_catalogue()) == ["mine"]
    assert find("mine").title == "A set"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"other": ENTRY}))
    assert list(read_catalogue(tmp_path / "other.yaml")) == ["other"]


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
        ({"files": [FILE | {"urls": ["ftp://a.org/a"]}]}, "'ftp://a.org/a' is not an http, https or file URL"),
        ({"files": [FILE | {"name": "../a.tgz"}]}, "write a plain file name"),
        ({"files": [FILE | {"checksum": "sha256:123"}]}, "files.0.checksum = 'sha256:123': write sha256:"),
        ({"files": [FILE | {"checksum": None}]}, "files.0.checksum_note = None: give a checksum, or null with a note"),
        ({"files": [FILE | {"checksum_note": "x"}]}, "files.0.checksum_note = 'x': give a checksum, or null"),
        ({"files": [FILE | {"unpack": "../x"}]}, "files.0.unpack = '../x': write a folder below"),
        ({"files": [FILE | {"name": "a.rar"}]}, "'a.rar' has no ending of an archive"),
        ({"manual": "ask them"}, "a.tgz: give urls, or manual instructions for the data set, and not both"),
        ({"same_files_as": "b"}, "same_files_as stands in place of files"),
    ],
)
def test_a_mistake_is_named_in_one_line(write, change, message):
    assert message in mistake(write(a=ENTRY | change))


def test_a_key_that_is_missing_is_named(write):
    assert "a: key 'licence' is missing" in mistake(write(a={k: v for k, v in ENTRY.items() if k != "licence"}))


def test_files_can_only_be_shared_with_a_data_set_that_has_some(write):
    assert "did you mean 'abc'?" in mistake(write(abc=ENTRY, task=TASK | {"same_files_as": "abcd"}))
    assert "same_files_as = 'a'" in mistake(write(b=ENTRY, a=TASK | {"same_files_as": "b"}, task=TASK))


@pytest.mark.parametrize("text", ["", "- a\n", "a: 1\n", "a: [\n", "a b: {}\n", "../a: {}\n"])
def test_a_file_that_is_no_catalogue_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    mistake(tmp_path / "c.yaml")


def test_a_data_set_that_is_given_twice_is_refused(tmp_path):
    once = yaml.safe_dump({"a": ENTRY})
    (tmp_path / "c.yaml").write_text(once + once)
    assert "'a' is given twice" in mistake(tmp_path / "c.yaml")


def test_a_missing_catalogue_is_refused(tmp_path):
    with pytest.raises(TocomError, match=r"cannot read the catalogue .*none\.yaml: No such file"):
        read_catalogue(tmp_path / "none.yaml")


def test_an_unknown_data_set_is_named_with_the_closest_one(write):
    with pytest.raises(TocomError, match=r"unknown data set 'cub20' \(did you mean 'cub200'\?\); `tocom data list`"):
        find("cub20", write(cub200=ENTRY, other=ENTRY))


def test_a_task_that_shares_files_belongs_to_the_data_set_that_has_them(write):
    path = write(a=ENTRY, task=TASK)
    assert (owner_of("a", path), owner_of("task", path)) == ("a", "a")


def test_patterns_select_names_in_the_catalogues_order(write):
    entries = read_catalogue(write(**{"v.b": ENTRY, "c": ENTRY, "v.a": ENTRY}))
    assert select(["c", "v.*"], entries) == ["v.b", "c", "v.a"]
    with pytest.raises(TocomError, match=r"unknown data set 'w\.\*'"):
        select(["c", "w.*"], entries)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_150_585_339, "1.15 GB"), (999_600_000, "1 GB"), (2e12, "2 TB")],
)
def test_sizes_are_written_as_people_read_them(size, text):
    assert size_text(size) == text


def test_the_table_has_a_row_for_each_data_set_and_says_what_is_not_verified(write):
    entries = {
        "a": ENTRY | {"licence": "one | two", "fetched_for_real": True},
        "b": ENTRY | {"files": [FILE | {"checksum": None, "checksum_note": "none is published"}]},
        "hand": ENTRY | {"files": [], "manual": "register with them"},
        "task": TASK,
    }
    rows = [
        re.split(r" (?<!\\)\| ", row.strip("| ")) for row in markdown(read_catalogue(write(**entries))).splitlines()
    ]
    assert len({len(row) for row in rows}) == 1
    header, _, *rows = rows
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["name"] for row in rows] == ["`a`", "`b`", "`hand`", "`task`"]
    assert [row["download"] for row in rows] == ["10 B", "10 B", "by hand", "as `a`"]
    assert [row["checksums"] for row in rows] == ["sha256", "none yet", "", ""]
    assert [row["fetched here for real"] for row in rows] == ["yes", "no", "no", "no"]
    assert rows[0]["licence"] == r"one \| two"


def test_the_docs_hold_the_table_as_it_is_now(monkeypatch):
    monkeypatch.delenv("TOCOM_CATALOGUE", raising=False)
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    _, marker, table = text.partition("<!-- tocom data list --markdown -->\n\n")
    assert marker
    assert table == markdown(), "run `tocom data list --markdown` and put its table into docs/datasets.md"


def test_the_docs_name_the_data_sets_that_several_hosts_have():
    several = {
        name
        for name, entry in read_catalogue(BUNDLED).items()
        if entry.files and all(len({urlsplit(url).netloc for url in file.urls}) > 1 for file in entry.files)
    }
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    sentence = re.search(r"Several hosts are known for (.*?)\. For every", text, re.DOTALL)[1]
    assert set(re.findall(r"`(.*?)`", sentence)) == several


def test_the_example_of_the_docs_is_an_entry_in_the_layout_of_its_family(tmp_path):
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    (tmp_path / "c.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    ((name, entry),) = read_catalogue(tmp_path / "c.yaml").items()
    assert entry.family == "cub"
    assert f"below data/{name}/" in text
    assert "holds CUB_200_2011/images.txt" in text


def test_every_bundled_entry_verifies_what_it_downloads_or_says_why_not():
    for name, entry in read_catalogue().items():
        for file in entry.files:
            assert file.checksum or file.checksum_note, name
            assert file.size > 100, name


def test_reading_the_catalogue_waits_neither_for_torch_nor_for_the_network():
    code = "import sys, tocom.data.catalogue as c; c.read_catalogue(); print({'torch', 'requests'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
