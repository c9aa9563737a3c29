"""`tocom data`: fetch, check, list."""

import hashlib

import pytest
import yaml
from typer.testing import CliRunner

from tests.data.server import serve
from tocom.cli_data import data
from tocom.data.catalogue import markdown, read_catalogue
from tocom.errors import TocomError

FILES = {"a.one": b"1" * 1500, "a.two": b"2", "b": b"3"}


@pytest.fixture
def server(tmp_path):
    """A server of three data sets of one plain file each, a catalogue of them, and a task that shares one's file."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    about = {
        "family": "x",
        "group": "FGVC",
        "classes": 2,
        "licence": "CC0",
        "split": "all",
        "homepage": "https://x.org",
    }
    entries = {}
    with serve(folder) as running:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
            file = {"name": name, "urls": [running.url(name)], "size": len(content)}
            file["checksum"] = f"sha256:{hashlib.sha256(content).hexdigest()}"
            entries[name] = about | {"title": f"Set {name}", "unpacked_mb": 1, "files": [file]}
        entries["task"] = about | {"title": "Task", "same_files_as": "b"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(entries))
        yield running


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in this process; a TocomError comes through, as `tocom.cli.main` needs it."""
    monkeypatch.setenv("TOCOM_CATALOGUE", str(tmp_path / "c.yaml"))
    monkeypatch.setenv("TOCOM_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("TOCOM_MIRROR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words):
        result = CliRunner().invoke(data, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return invoke


def there(root):
    return sorted(path.name for path in root.iterdir())


def test_names_and_patterns_are_fetched_and_said_where(server, run, tmp_path):
    result = run("fetch", "a.*", "task")
    lines = [line for line in result.stderr.splitlines() if ", in " in line]
    assert [line.split(":")[0] for line in lines] == ["a.one", "a.two", "b"]
    assert f"a.one: 1 files, 1.5 kB, in {tmp_path / 'data' / 'a.one'}" in lines
    assert there(tmp_path / "data") == ["a.one", "a.two", "b"]


def test_every_option_reaches_the_fetch(server, run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "b").write_bytes(FILES["b"])
    run("fetch", "b", "--root", tmp_path / "other", "--from", mine)
    assert there(tmp_path / "other") == ["b"]
    assert server.requests == []
    run("fetch", "b", "--root", tmp_path / "other", "--force", "--keep-archives")
    assert server.requests == ["b"]
    run("fetch", "b", "--mirror", f"{server.base}/nothing")
    assert server.requests == ["b", "nothing/b/b", "b"]
    with pytest.raises(TocomError, match="--from is for one data set, and 2 are named"):
        run("fetch", "a.*", "--from", mine)


def test_a_check_is_of_all_that_is_there_unless_some_are_named(server, run, tmp_path):
    with pytest.raises(TocomError, match="no data set is in .*data; fetch one with `tocom data fetch NAME"):
        run("check")
    run("fetch", "a.*")
    lines = [line for line in run("check").stderr.splitlines() if "as they were fetched" in line]
    assert [line.split(":")[0] for line in lines] == ["a.one", "a.two"]
    (tmp_path / "data" / "a.two" / "a.two").write_bytes(b"?")
    with pytest.raises(TocomError, match=r"a\.two was changed"):
        run("check")
    run("check", "a.one")
    with pytest.raises(TocomError, match="the data set 'b' is not in"):
        run("check", "b")


def test_the_list_says_what_there_is_and_what_was_fetched(server, run):
    run("fetch", "b")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run("list").stdout.splitlines() if "│" in line]
    assert rows == [
        ["a.one", "FGVC", "2", "1.5 kB", "no", "CC0"],
        ["a.two", "FGVC", "2", "1 B", "no", "CC0"],
        ["b", "FGVC", "2", "1 B", "fetched", "CC0"],
        ["task", "FGVC", "2", "as `b`", "fetched", "CC0"],
    ]
    assert run("list", "--markdown").stdout == markdown(read_catalogue())
