"""Fetching from a local server with faults: each ends with a whole data set, or with one line and nothing behind."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from types import SimpleNamespace

import pytest
import yaml

from tests.data.disk import contents, file_limit
from tests.data.server import serve
from tests.small import refusal
from tocom.data import fetch as module
from tocom.data.fetch import check, fetch
from tocom.data.store import folder_of, read_record, status
from tocom.errors import TocomError

CONTENT = {"images/cat/1.jpg": random.Random(0).randbytes(300_000), "images/dog/2.jpg": b"dog" * 1000}
LABELS = b"1 cat\n2 dog\n"
WHOLE = CONTENT | {"labels.txt": LABELS}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "TRIES", 2)
    monkeypatch.setattr(module, "WAIT", 0)


@pytest.fixture
def mirrors(tmp_path):
    """Two servers of the same two files: pets.tgz, and labels.txt, which is kept as it is."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with tarfile.open(folder / "pets.tgz", "w:gz") as tar:
        for name, content in CONTENT.items():
            (tmp_path / "member").write_bytes(content)
            tar.add(tmp_path / "member", name)
    (folder / "labels.txt").write_bytes(LABELS)
    with serve(folder) as first, serve(folder) as second:
        yield first, second


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def remote(mirrors, name, **changes):
    content = (mirrors[0].folder / name).read_bytes()
    urls = [mirror.url(name) for mirror in mirrors]
    return {"name": name, "urls": urls, "checksum": f"sha256:{digest(content)}", "size": len(content)} | changes


def catalogue(tmp_path, *files, **changes):
    about = {"family": "pets", "title": "Pets", "group": "FGVC", "classes": 2, "licence": "CC0", "split": "1 and 1"}
    entry = about | {"homepage": "https://pets.org", "unpacked_mb": 0.5, "files": list(files)} | changes
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump({"pets": entry}))
    return tmp_path / "catalogue.yaml"


@pytest.fixture
def archive(tmp_path, mirrors):
    return catalogue(tmp_path, remote(mirrors, "pets.tgz", unpack="."))


@pytest.fixture
def both(tmp_path, mirrors):
    return catalogue(tmp_path, remote(mirrors, "pets.tgz", unpack="."), remote(mirrors, "labels.txt"))


def images(folder):
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


def names(root):
    return [path.name for path in root.iterdir()]


def digest(content, algorithm="sha256"):
    return hashlib.new(algorithm, content).hexdigest()


def failure(*args, **options):
    return refusal(fetch, *args, **options)


# --- a whole data set ---------------------------------------------------------------------------------------------


def test_a_data_set_is_unpacked_beside_its_plain_files_with_records_and_nothing_else_is_left(root, both, mirrors):
    mirrors[0].fail("pets.tgz", encoding="x-gzip")  # some servers say so of a .tgz; it is to stay one
    old = os.umask(0o027)
    try:
        folder = fetch("pets", root, both)
    finally:
        os.umask(old)
    assert folder == root / "pets" == folder_of("pets", root, both)
    assert images(folder) == WHOLE
    assert names(root) == ["pets"]
    assert status("pets", root, both) == "fetched"
    assert check("pets", root, both).count == 3
    for path in (folder / "labels.txt", folder / "images/cat/1.jpg", folder / ".complete.json"):
        assert path.stat().st_mode & 0o777 == 0o640, path  # as any new file
    record = json.loads((folder / ".complete.json").read_text())
    assert (record["count"], record["bytes"]) == (3, sum(map(len, WHOLE.values())))
    about = {"size": len(LABELS), "checksum": f"sha256:{digest(LABELS)}", "verified": True}
    assert record["files"][1] == about | {"name": "labels.txt", "url": mirrors[0].url("labels.txt")}
    result = subprocess.run(["sha256sum", "--check", "--quiet", ".sha256sums"], cwd=folder, capture_output=True)
    assert result.returncode == 0, result.stdout


def test_a_data_set_that_is_there_is_not_fetched_again_unless_it_is_forced(root, archive, mirrors):
    folder = fetch("pets", root, archive)
    fetch("pets", root, archive)
    assert mirrors[0].requests == ["pets.tgz"]
    (folder / "images/cat/1.jpg").write_bytes(b"changed")
    fetch("pets", root, archive, force=True, keep_archives=True)
    assert mirrors[0].requests == ["pets.tgz"] * 2
    assert images(folder) == CONTENT
    assert contents(root / ".archives") == {"pets/pets.tgz": (mirrors[0].folder / "pets.tgz").read_bytes()}


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_every_kind_of_checksum_is_compared(root, tmp_path, mirrors, algorithm):
    good = digest(LABELS, algorithm)
    bad = good[:-1] + ("0" if good[-1] != "0" else "1")
    message = failure("pets", root, catalogue(tmp_path, remote(mirrors, "labels.txt", checksum=f"{algorithm}:{bad}")))
    assert message.count(f"wrong checksum {good}, expected {algorithm}:{bad}") == 2
    assert "https://pets.org" in message
    assert names(root) == []
    fetch("pets", root, catalogue(tmp_path, remote(mirrors, "labels.txt", checksum=f"{algorithm}:{good}")))
    assert images(root / "pets") == {"labels.txt": LABELS}


def test_a_changed_catalogue_entry_or_a_damaged_record_needs_force(root, tmp_path, mirrors, caplog):
    unverified = remote(mirrors, "labels.txt", checksum=None, checksum_note="nobody publishes one")
    fetch("pets", root, catalogue(tmp_path, unverified))
    warning = f"labels.txt was not verified: nobody publishes one; it has sha256:{digest(LABELS)}"
    assert [record.message for record in caplog.records] == [warning]
    (mirrors[0].folder / "labels.txt").write_bytes(b"second edition")
    path = catalogue(tmp_path, remote(mirrors, "labels.txt"))
    assert status("pets", root, path) == "outdated"
    assert "other files or checksums than the catalogue has now" in failure("pets", root, path)
    fetch("pets", root, path, force=True)
    assert images(root / "pets") == {"labels.txt": b"second edition"}
    (root / "pets" / ".complete.json").write_text("{")
    assert "is corrupt; fetch the data set again with --force" in failure("pets", root, path)


# --- mirrors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 404}, {"corrupt": 1000}, {"status": 503}, {"cut": 70_000}])
def test_the_second_mirror_helps_when_the_first_does_not(root, archive, mirrors, fault):
    mirrors[0].fail("pets.tgz", times=None, **fault)
    fetch("pets", root, archive)
    assert images(root / "pets") == CONTENT
    assert [len(mirror.requests) for mirror in mirrors] == [1, 1]
    assert read_record(root / "pets").files[0].url == mirrors[1].url("pets.tgz")


def test_a_file_on_no_mirror_is_one_line_with_every_reason_and_the_ways_out(root, tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    entry = remote(mirrors, "pets.tgz", unpack=".")
    silence = threading.Event()
    with serve(mirrors[0].folder) as busy, serve(mirrors[0].folder) as silent:
        entry["urls"] += [busy.url("pets.tgz"), silent.url("pets.tgz"), "http://127.0.0.1:9/pets.tgz"]
        mirrors[0].fail("pets.tgz", status=404, times=None)
        mirrors[1].fail("pets.tgz", cut=1000, times=None)
        busy.fail("pets.tgz", status=503, times=None)
        silent.fail("pets.tgz", delay=silence, times=None)
        message = failure("pets", root, catalogue(tmp_path, entry))
        silence.set()
        assert message.startswith("cannot fetch pets: pets.tgz: 127.0.0.1:")
        for part in (": 404 Not Found; ", "Chunked", ": 503 Service", ": ReadTimeout; ", ":9: Connection"):
            assert part in message
        assert "--mirror URL" in message
        assert [len(mirror.requests) for mirror in (*mirrors, busy)] == [1, 2, 2]
    assert names(root) == []


@pytest.mark.parametrize("how", ["argument", "environment", "folder"])
def test_an_institutions_mirror_is_tried_first(root, tmp_path, archive, mirrors, monkeypatch, how):
    (tmp_path / "ours here" / "pets").mkdir(parents=True)
    (mirrors[0].folder / "pets.tgz").rename(tmp_path / "ours here" / "pets" / "pets.tgz")
    with serve(tmp_path / "ours here") as ours:
        if how == "environment":
            monkeypatch.setenv("TOCOM_MIRROR", ours.base)
        mirror = {"argument": f"{ours.base}/", "folder": (tmp_path / "ours here").as_uri()}.get(how)
        fetch("pets", root, archive, mirror=mirror)
        assert ours.requests == ([] if how == "folder" else ["pets/pets.tgz"])
    assert images(root / "pets") == CONTENT
    assert mirrors[0].requests == []
    assert failure("pets", root, archive, mirror="mirror.org/data").startswith("the mirror 'mirror.org/data' is not a")


def test_files_that_were_verified_stay_when_another_is_wrong_and_are_not_fetched_again(root, both, mirrors):
    for mirror in mirrors:
        mirror.fail("labels.txt", corrupt=0, times=None)
    assert failure("pets", root, both).count("wrong checksum") == 2
    assert contents(root) == {".pets.download/pets.tgz": (mirrors[0].folder / "pets.tgz").read_bytes()}
    assert status("pets", root, both) == "partly"
    for mirror in mirrors:
        mirror.heal()
    fetch("pets", root, both)
    assert mirrors[0].requests.count("pets.tgz") == 1
    assert names(root) == ["pets"]


# --- archives that are refused (test_unpack.py has all kinds), and the disk ---------------------------------------


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../../escaped", "evil.tar is refused: '../../escaped' lies outside"),
        ("labels.txt", "labels.txt is a file of its own, and in an archive too"),
    ],
)
def test_an_archive_with_what_it_should_not_hold_leaves_nothing(root, tmp_path, mirrors, member, message):
    with tarfile.open(mirrors[0].folder / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("fine"))
        tar.addfile(tarfile.TarInfo(member))
    path = catalogue(tmp_path, remote(mirrors, "evil.tar", unpack="."), remote(mirrors, "labels.txt"))
    before = contents(tmp_path)
    assert message in failure("pets", root, path)
    assert names(root) == []
    assert contents(tmp_path) == before


def test_archives_that_together_are_half_as_large_again_as_the_catalogue_says_are_refused(root, tmp_path, mirrors):
    (mirrors[0].folder / "again.tgz").write_bytes((mirrors[0].folder / "pets.tgz").read_bytes())
    files = [remote(mirrors, name, unpack=name[0]) for name in ("pets.tgz", "again.tgz")]
    fits = 2 * sum(map(len, CONTENT.values())) / 1e6 / 1.5
    message = failure("pets", root, catalogue(tmp_path, *files, unpacked_mb=fits - 0.001))
    assert message.startswith("pets: again.tgz is refused: it unpacks to far more")
    assert names(root) == []
    fetch("pets", root, catalogue(tmp_path, *files, unpacked_mb=fits + 0.001))


def test_too_little_space_is_seen_before_anything_is_fetched(root, archive, mirrors, monkeypatch):
    needed = (mirrors[0].folder / "pets.tgz").stat().st_size + 500_000  # the archive, and 0.5 MB unpacked
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    message = failure("pets", root, archive)
    assert message.startswith("fetching pets takes ")
    assert "free some space or choose another folder with --root" in message
    assert mirrors[0].requests == names(root) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    fetch("pets", root, archive)


@pytest.mark.parametrize("limit", [100_000, 310_000])  # while downloading, and while unpacking
def test_a_disk_that_fills_up_leaves_nothing(root, tmp_path, mirrors, limit):
    with tarfile.open(mirrors[0].folder / "zeros.tgz", "w:gz") as tar:
        (tmp_path / "zeros").write_bytes(random.Random(1).randbytes(200_000) + bytes(200_000))
        tar.add(tmp_path / "zeros", "zeros")
    path = catalogue(tmp_path, remote(mirrors, "zeros.tgz", unpack="."))
    with file_limit(limit):
        message = failure("pets", root, path)
    assert message.startswith("cannot write ")
    assert "free some space or choose another folder with --root" in message
    assert names(root) == []
    (tmp_path / "file").write_text("")
    assert failure("pets", tmp_path / "file" / "data", path).startswith("cannot write ")


# --- killed, and at the same time ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tocom.data import fetch as module

def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

name, root, catalogue, where = sys.argv[1:]
if where == "unpack":
    real = module.unpack
    module.unpack = lambda *args, **options: (real(*args, **options), kill())
elif where == "end":
    module.shutil.rmtree = kill
else:
    rename = module.Path.rename
    module.Path.rename = lambda path, to: kill() if path.name.endswith(".unpack") else rename(path, to)
module.fetch(name, root, catalogue, force=where == "replace")
"""


def run(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("where", ["unpack", "end", "replace"])
def test_a_kill_leaves_no_half_of_a_data_set_and_the_next_run_clears_up(root, both, mirrors, where):
    if where == "replace":
        fetch("pets", root, both)
    process = run(KILLED, "pets", root, both, where)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (root / "pets").exists() == (where == "end")
    assert status("pets", root, both) == ("fetched" if where == "end" else "partly")
    assert fetch("pets", root, both) == root / "pets"
    assert images(root / "pets") == WHOLE
    assert names(root) == ["pets"]
    assert mirrors[0].requests.count("pets.tgz") == (2 if where == "replace" else 1)


def test_two_processes_fetch_once_and_the_second_waits(root, archive, mirrors):
    go = threading.Event()
    mirrors[0].fail("pets.tgz", delay=go)
    code = "import sys; from tocom.data.fetch import fetch; fetch(*sys.argv[1:])"
    processes = [run(code, "pets", root, archive) for _ in range(2)]
    end = time.monotonic() + 30
    while not mirrors[0].requests and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1)  # the other one has long come to the lock, or would have asked the server too
    go.set()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("another process is fetching pets; waiting for it" in text for text in errors) == 1
    assert mirrors[0].requests == ["pets.tgz"]
    assert images(root / "pets") == CONTENT
    assert names(root) == ["pets"]


# --- copies of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mirror", "own"])
def test_a_file_that_was_compressed_anew_is_known_by_its_content(root, tmp_path, mirrors, how):
    published, anew, other = gzip.compress(LABELS), gzip.compress(LABELS, 1, mtime=5), gzip.compress(LABELS + b"x")
    file = mirrors[0].folder / "labels.gz"
    file.write_bytes(published)
    entry = remote(mirrors, file.name, content=f"sha256:{digest(LABELS)}")
    path = catalogue(tmp_path, entry)
    options = {"source": mirrors[0].folder} if how == "own" else {}
    for wrong in (other, anew[:-9], LABELS):
        file.write_bytes(wrong)
        assert "labels.gz: " in failure("pets", root, path, **options)
        assert not (root / "pets").exists()
    file.write_bytes(anew)
    folder = fetch("pets", root, path, **options)
    assert (folder / "labels.gz").read_bytes() == anew != published
    assert (status("pets", root, path), check("pets", root, path).count) == ("fetched", 1)
    assert [(it.checksum, it.verified) for it in read_record(folder).files] == [(entry["content"], True)]
    strict = catalogue(tmp_path, {key: value for key, value in entry.items() if key != "content"})
    assert status("pets", root, strict) == "outdated"
    assert "wrong checksum" in failure("pets", root, strict, force=True, **options)
    file.write_bytes(published)
    fetch("pets", root, strict, force=True, **options)
    assert (folder / "labels.gz").read_bytes() == published
    assert status("pets", root, catalogue(tmp_path, entry)) == "fetched"


def test_archives_of_ones_own_are_verified_and_used_first(root, tmp_path, both, mirrors):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pets.tgz").write_bytes((mirrors[0].folder / "pets.tgz").read_bytes())
    fetch("pets", root, both, source=mine)
    assert mirrors[0].requests == ["labels.txt"]
    assert images(root / "pets") == WHOLE
    (mine / "pets.tgz").write_bytes(b"damaged")
    fetch("pets", root, both, source=mine / "pets.tgz", force=True)
    assert mirrors[0].requests.count("pets.tgz") == 1
    assert (mine / "pets.tgz").read_bytes() == b"damaged"


def test_an_unpacked_folder_is_registered_where_it_lies(root, tmp_path, archive, caplog):
    for name in ("mine", "other"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "a.jpg").write_bytes(b"123")
    mine = tmp_path / "mine"
    for _ in range(2):
        assert fetch("pets", root, archive, source=mine) == mine == folder_of("pets", root, archive)
    assert status("pets", root, archive) == "registered"
    assert list(contents(root)) == ["pets/.complete.json"]
    assert check("pets", root, archive).count == 1
    assert caplog.records == []
    assert fetch("pets", root, archive, source=tmp_path / "other") == mine
    warning = f"pets is there already, so --from {tmp_path / 'other'} was not used; --force replaces it"
    assert [record.message for record in caplog.records] == [warning]
    (mine / "images" / "b.jpg").write_bytes(b"4")
    with pytest.raises(TocomError, match="holds 2 files of 4 bytes, but 1 of 3 when it was registered"):
        check("pets", root, archive)
    mine.rename(tmp_path / "moved")
    with pytest.raises(TocomError, match="was registered as 'pets', is not there; mount it"):
        folder_of("pets", root, archive)
    assert fetch("pets", root, archive, source=tmp_path / "other", force=True) == tmp_path / "other"


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link"])
def test_what_somebody_put_in_the_place_is_replaced_only_if_forced_and_no_link_is_followed(
    root, tmp_path, archive, kind
):
    root.mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("mine")
    if kind == "folder":
        (root / "pets").mkdir()
        (root / "pets" / "mine.txt").write_text("mine")
        assert "move it elsewhere first" in failure("pets", root, archive, source=root / "pets", force=True)
    else:
        (root / "pets").symlink_to(tmp_path / ("disk" if kind == "link" else "gone"))
    assert "was not made by `tocom data fetch`; move it away" in failure("pets", root, archive)
    for _ in range(2):
        fetch("pets", root, archive, force=True)
        assert images(root / "pets") == CONTENT
        assert not (root / "pets").is_symlink()
        assert names(root) == ["pets"]
    assert contents(tmp_path / "disk") == {"mine.txt": b"mine"}


def test_a_data_set_behind_a_form_says_what_to_download_by_hand(root, tmp_path, mirrors):
    entry = remote(mirrors, "pets.tgz", unpack=".", urls=[])
    path = catalogue(tmp_path, entry, manual="register at https://pets.org and download pets.tgz")
    message = failure("pets", root, path)
    assert message.startswith("pets cannot be downloaded by a link: register at https://pets.org")
    assert f"tocom data fetch pets --root {root} --from FOLDER" in message
    (tmp_path / "pets.tgz").write_bytes(b"half")
    message = failure("pets", root, path, source=tmp_path / "pets.tgz")
    assert f"{tmp_path / 'pets.tgz'}: wrong checksum {digest(b'half')}" in message
    assert names(root) == []
    fetch("pets", root, path, source=mirrors[0].folder / "pets.tgz")
    assert images(root / "pets") == CONTENT


def test_a_source_that_cannot_be_one_is_refused(root, tmp_path, archive):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tgz").write_bytes(b"")
    for name, part in (
        ("none", "no such file or folder"),
        ("empty", "holds no files"),
        ("other.tgz", "is no file of pets; its files are: pets.tgz"),
    ):
        assert part in failure("pets", root, archive, source=tmp_path / name)
    assert names(root) == []


# --- check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "labels.txt").write_bytes(LABELS[::-1]), "labels.txt was changed"),
        (lambda folder: (folder / "images/cat/1.jpg").unlink(), "images/cat/1.jpg is missing"),
        (lambda folder: (folder / "images/cat/3.jpg").write_bytes(b""), "images/cat/3.jpg is no file of the data set"),
        (lambda folder: (folder / ".sha256sums").write_text(""), ".sha256sums is missing or was changed"),
    ],
)
def test_a_check_names_the_first_bad_file_and_the_fix(root, both, damage, message):
    damage(fetch("pets", root, both))
    found = refusal(check, "pets", root, both)
    assert message in found
    assert f"`tocom data fetch pets --root {root} --force`" in found
