"""Fetching from a local server with faults: each ends with a whole data set, or with one line and nothing behind."""

import errno
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest
import yaml

from tests.data.disk import file_limit
from tests.data.server import serve
from tocom.data import fetch as module
from tocom.data.download import Patience
from tocom.data.fetch import check, fetch, folder_of, read_record, status
from tocom.errors import TocomError

QUICK = Patience(tries=2, wait=0, timeout=5)
NOISE = random.Random(0).randbytes(300_000)
CONTENT = {"images/cat/1.jpg": NOISE, "images/dog/2.jpg": b"dog" * 1000}
LABELS = b"1 cat\n2 dog\n"


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in ("TOCOM_MIRROR", "TOCOM_CATALOGUE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mirrors(tmp_path):
    """Two servers of the same two files: pets.tgz, and labels.txt, which is kept as it is."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with tarfile.open(folder / "pets.tgz", "w:gz") as tar:
        for name, content in CONTENT.items():
            (tmp_path / "member").write_bytes(content)
            tar.add(tmp_path / "member", name)
    (tmp_path / "member").unlink()
    (folder / "labels.txt").write_bytes(LABELS)
    with serve(folder) as first, serve(folder) as second:
        yield first, second


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def remote(mirrors, name, **changes):
    content = (mirrors[0].folder / name).read_bytes()
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    urls = [mirror.url(name) for mirror in mirrors]
    return {"name": name, "urls": urls, "checksum": checksum, "size": len(content)} | changes


def catalogue(tmp_path, *files, name="pets", **changes):
    about = {"family": "pets", "title": "Pets", "group": "FGVC", "classes": 2, "licence": "CC0", "split": "1 and 1"}
    entry = about | {"homepage": "https://pets.org", "unpacked_mb": 0.5, "files": list(files)} | changes
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump({name: entry}))
    return tmp_path / "catalogue.yaml"


@pytest.fixture
def archive_only(tmp_path, mirrors):
    return catalogue(tmp_path, remote(mirrors, "pets.tgz", unpack="."))


@pytest.fixture
def both(tmp_path, mirrors):
    return catalogue(tmp_path, remote(mirrors, "pets.tgz", unpack="."), remote(mirrors, "labels.txt"))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_records(folder):
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


def failure(*args, **options):
    with pytest.raises(TocomError) as caught:
        fetch(*args, **{"patience": QUICK} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


# --- a whole data set ---------------------------------------------------------------------------------------------


def test_a_data_set_is_unpacked_beside_its_plain_files_and_nothing_else_is_left(root, both):
    folder = fetch("pets", root, both, patience=QUICK)
    assert folder == root / "pets" == folder_of("pets", root, both)
    assert without_records(folder) == CONTENT | {"labels.txt": LABELS}
    assert [path.name for path in root.iterdir()] == ["pets"]
    assert status("pets", root, both) == "fetched"
    check("pets", root, both)


def test_the_records_say_what_was_fetched_and_from_where(root, both, mirrors):
    folder = fetch("pets", root, both, patience=QUICK)
    record = json.loads((folder / ".complete.json").read_text())
    assert [file["name"] for file in record["files"]] == ["pets.tgz", "labels.txt"]
    assert record["files"][1] == {
        "name": "labels.txt",
        "size": len(LABELS),
        "checksum": f"sha256:{sha256_of(LABELS)}",
        "verified": True,
        "url": mirrors[0].url("labels.txt"),
    }
    assert (record["count"], record["bytes"]) == (3, len(LABELS) + sum(map(len, CONTENT.values())))
    expected = sorted((name, sha256_of(content)) for name, content in (CONTENT | {"labels.txt": LABELS}).items())
    assert (folder / ".sha256sums").read_text() == "".join(f"{digest}  {name}\n" for name, digest in expected)
    assert record["digest"] == sha256_of((folder / ".sha256sums").read_bytes())


def test_the_folder_is_as_readable_as_any_new_folder(root, archive_only):
    old = os.umask(0o027)
    try:
        folder = fetch("pets", root, archive_only, patience=QUICK)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / ".complete.json").stat().st_mode & 0o777 == 0o640


def test_a_data_set_that_is_there_is_not_fetched_again_unless_it_is_forced(root, archive_only, mirrors):
    folder = fetch("pets", root, archive_only, patience=QUICK)
    fetch("pets", root, archive_only, patience=QUICK)
    assert len(mirrors[0].requests()) == 1
    (folder / "images" / "cat" / "1.jpg").write_bytes(b"changed")
    fetch("pets", root, archive_only, force=True, patience=QUICK)
    assert len(mirrors[0].requests()) == 2
    assert without_records(folder) == CONTENT
    assert [path.name for path in root.iterdir()] == ["pets"]


def test_archives_are_kept_if_asked(root, both, mirrors):
    fetch("pets", root, both, keep_archives=True, patience=QUICK)
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    assert contents(root / ".archives") == {"pets/pets.tgz": whole}
    assert without_records(root / "pets") == CONTENT | {"labels.txt": LABELS}


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_every_kind_of_checksum_is_compared(root, tmp_path, mirrors, algorithm):
    good = hashlib.new(algorithm, LABELS).hexdigest()
    bad = good[:-1] + ("0" if good[-1] != "0" else "1")
    path = catalogue(tmp_path, remote(mirrors, "labels.txt", checksum=f"{algorithm}:{bad}"))
    message = failure("pets", root, path)
    assert f"expected {algorithm}:{bad}" in message
    assert f"found {algorithm}:{good}" in message
    assert list(root.iterdir()) == []
    path = catalogue(tmp_path, remote(mirrors, "labels.txt", checksum=f"{algorithm}:{good}"))
    assert without_records(fetch("pets", root, path, patience=QUICK)) == {"labels.txt": LABELS}


def test_a_file_without_a_checksum_is_recorded_with_a_warning(root, tmp_path, mirrors, caplog):
    path = catalogue(tmp_path, remote(mirrors, "labels.txt", checksum=None, checksum_note="nobody publishes one"))
    fetch("pets", root, path, patience=QUICK)
    warning = f"labels.txt was not verified: nobody publishes one; it has sha256:{sha256_of(LABELS)}"
    assert [record.message for record in caplog.records] == [warning]
    (file,) = read_record(root / "pets").files
    assert (file.checksum, file.verified) == (f"sha256:{sha256_of(LABELS)}", False)


def test_a_data_set_whose_catalogue_entry_changed_is_not_taken_for_the_new_one(root, tmp_path, mirrors):
    fetch("pets", root, catalogue(tmp_path, remote(mirrors, "labels.txt")), patience=QUICK)
    (mirrors[0].folder / "labels.txt").write_bytes(b"second edition")
    path = catalogue(tmp_path, remote(mirrors, "labels.txt"))
    assert status("pets", root, path) == "outdated"
    assert "other files or checksums than the catalogue has now" in failure("pets", root, path)
    fetch("pets", root, path, force=True, patience=QUICK)
    assert without_records(root / "pets") == {"labels.txt": b"second edition"}
    assert status("pets", root, path) == "fetched"


def test_tasks_that_share_files_share_one_folder(root, tmp_path, archive_only, mirrors):
    entries = yaml.safe_load(archive_only.read_text())
    task = {key: value for key, value in entries["pets"].items() if key not in ("files", "unpacked_mb")}
    entries["task"] = task | {"same_files_as": "pets"}
    archive_only.write_text(yaml.safe_dump(entries))
    with pytest.raises(TocomError, match="'task' is not in .*; run `tocom data fetch pets"):
        folder_of("task", root, archive_only)
    assert fetch("task", root, archive_only, patience=QUICK) == root / "pets"
    assert fetch("pets", root, archive_only, patience=QUICK) == folder_of("task", root, archive_only)
    assert len(mirrors[0].requests()) == 1
    assert status("task", root, archive_only) == "fetched"


def test_an_unknown_data_set_is_named_with_the_closest_one(root, archive_only):
    assert "unknown data set 'pet' (did you mean 'pets'?)" in failure("pet", root, archive_only)
    assert not root.exists()


# --- mirrors ------------------------------------------------------------------------------------------------------


def test_the_next_mirror_is_asked_at_once_if_a_file_is_not_there_and_later_if_a_server_is_busy(
    root, archive_only, mirrors
):
    mirrors[0].fail("pets.tgz", status=404, times=None)
    fetch("pets", root, archive_only, patience=QUICK)
    assert [len(mirror.requests()) for mirror in mirrors] == [1, 1]
    mirrors[0].heal()
    mirrors[0].fail("pets.tgz", status=503, times=1)
    fetch("pets", root, archive_only, force=True, patience=QUICK)
    assert [len(mirror.requests()) for mirror in mirrors] == [3, 1]


def test_a_file_on_no_mirror_is_one_line_with_every_reason_and_the_ways_out(root, tmp_path, mirrors):
    entry = remote(mirrors, "pets.tgz", unpack=".")
    entry["urls"].append("http://127.0.0.1:9/pets.tgz")  # nobody listens there
    mirrors[0].fail("pets.tgz", status=404, times=None)
    mirrors[1].fail("pets.tgz", status=503, times=None)
    message = failure("pets", root, catalogue(tmp_path, entry))
    assert message.startswith("cannot fetch pets: pets.tgz: 127.0.0.1:")
    assert "404 Not Found; " in message
    assert "503 Service Unavailable; " in message
    assert "127.0.0.1:9: no connection; " in message
    assert "--mirror URL" in message
    assert [len(mirror.requests()) for mirror in mirrors] == [1, QUICK.tries]
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_an_institutions_mirror_is_tried_first(root, tmp_path, archive_only, mirrors, monkeypatch, how):
    with serve(tmp_path / "ours") as ours:
        (ours.folder / "pets").mkdir()
        (mirrors[0].folder / "pets.tgz").rename(ours.folder / "pets" / "pets.tgz")
        if how == "environment":
            monkeypatch.setenv("TOCOM_MIRROR", ours.base)
        fetch("pets", root, archive_only, mirror=f"{ours.base}/" if how == "argument" else None, patience=QUICK)
        assert len(ours.requests("pets/pets.tgz")) == 1
    assert mirrors[0].requests() == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_mirror_that_is_no_url_is_refused_before_anything_is_tried(root, archive_only, mirrors, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("TOCOM_MIRROR", "mirror.example.org/data")
    mirror = "mirror.example.org/data" if how == "argument" else None
    message = failure("pets", root, archive_only, mirror=mirror)
    assert message.startswith("the mirror 'mirror.example.org/data' is not a URL; write https://")
    assert not root.exists()
    assert mirrors[0].requests() == []


def test_a_folder_can_be_a_mirror(root, tmp_path, archive_only, mirrors):
    (tmp_path / "a b" / "pets").mkdir(parents=True)
    (mirrors[0].folder / "pets.tgz").rename(tmp_path / "a b" / "pets" / "pets.tgz")
    fetch("pets", root, archive_only, mirror=(tmp_path / "a b").as_uri(), patience=QUICK)
    assert without_records(root / "pets") == CONTENT
    assert mirrors[0].requests() == []


def test_the_proxy_of_the_environment_is_used(root, tmp_path, mirrors, monkeypatch):
    monkeypatch.setenv("http_proxy", mirrors[0].base)
    monkeypatch.setenv("no_proxy", "")
    entry = remote(mirrors, "labels.txt", urls=["http://nowhere.invalid/labels.txt"])
    fetch("pets", root, catalogue(tmp_path, entry), patience=QUICK)
    assert len(mirrors[0].requests("labels.txt")) == 1


# --- corrupted and cut --------------------------------------------------------------------------------------------


def test_a_corrupted_byte_sends_it_to_the_next_mirror(root, archive_only, mirrors):
    mirrors[0].fail("pets.tgz", corrupt=1000, times=None)
    fetch("pets", root, archive_only, patience=QUICK)
    assert without_records(root / "pets") == CONTENT
    assert [len(mirror.requests()) for mirror in mirrors] == [1, 1]
    assert read_record(root / "pets").files[0].url == mirrors[1].url("pets.tgz")


def test_a_wrong_checksum_on_every_mirror_names_both_checksums_and_leaves_nothing(root, archive_only, mirrors):
    whole = bytearray((mirrors[0].folder / "pets.tgz").read_bytes())
    expected = sha256_of(whole)
    for mirror in mirrors:
        mirror.fail("pets.tgz", corrupt=1000, times=None)
    whole[1000] ^= 0xFF
    message = failure("pets", root, archive_only)
    assert message.startswith(f"pets: pets.tgz has the wrong checksum on every mirror, expected sha256:{expected}")
    assert message.count(f"found sha256:{sha256_of(whole)}") == 2
    assert "https://pets.org" in message
    assert list(root.iterdir()) == []


def test_what_was_verified_stays_when_another_file_is_wrong(root, both, mirrors):
    for mirror in mirrors:
        mirror.fail("labels.txt", corrupt=0, times=None)
    assert "labels.txt has the wrong checksum on every mirror" in failure("pets", root, both)
    assert contents(root) == {".pets.download/pets.tgz": (mirrors[0].folder / "pets.tgz").read_bytes()}
    assert status("pets", root, both) == "partly"
    for mirror in mirrors:
        mirror.heal()
    fetch("pets", root, both, patience=QUICK)
    assert len(mirrors[0].requests("pets.tgz")) == 1
    assert [path.name for path in root.iterdir()] == ["pets"]


def test_a_cut_connection_is_resumed_in_the_same_run(root, archive_only, mirrors):
    size = (mirrors[0].folder / "pets.tgz").stat().st_size
    mirrors[0].fail("pets.tgz", cut=70_000)
    mirrors[0].fail("pets.tgz", cut=50_000)
    fetch("pets", root, archive_only, patience=QUICK)
    assert without_records(root / "pets") == CONTENT
    asked = mirrors[0].requests()
    assert [request.range for request in asked] == [None, "bytes=70000-", "bytes=120000-"]
    assert [request.status for request in asked] == [200, 206, 206]
    assert [request.sent for request in asked] == [70_000, 50_000, size - 120_000]
    assert mirrors[1].requests() == []


def test_a_cut_connection_leaves_only_the_hidden_part_which_the_next_run_goes_on_from(root, archive_only, mirrors):
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    mirrors[0].fail("pets.tgz", cut=70_000)
    for mirror in mirrors:
        mirror.fail("pets.tgz", cut=0, times=None)
    message = failure("pets", root, archive_only)
    assert f"connection cut after 70,000 of {len(whole):,} bytes" in message
    assert f"what arrived is kept in {root / '.pets.download'}" in message
    assert contents(root) == {".pets.download/.pets.tgz.part": whole[:70_000]}
    assert status("pets", root, archive_only) == "partly"
    for mirror in mirrors:
        mirror.heal()
    fetch("pets", root, archive_only, patience=QUICK)
    last = mirrors[0].requests()[-1]
    assert (last.range, last.status, last.sent) == ("bytes=70000-", 206, len(whole) - 70_000)
    assert without_records(root / "pets") == CONTENT
    assert [path.name for path in root.iterdir()] == ["pets"]


def test_a_download_goes_on_at_another_mirror_where_the_first_broke_off(root, archive_only, mirrors):
    mirrors[0].fail("pets.tgz", cut=70_000)
    mirrors[0].fail("pets.tgz", status=503, times=None)
    fetch("pets", root, archive_only, patience=QUICK)
    assert [request.range for request in mirrors[1].requests()] == ["bytes=70000-"]
    assert without_records(root / "pets") == CONTENT


def test_a_server_that_cannot_resume_sends_the_whole(root, archive_only, mirrors):
    mirrors[0].fail("pets.tgz", cut=70_000)
    mirrors[0].fail("pets.tgz", ignore_range=True)
    fetch("pets", root, archive_only, patience=QUICK)
    assert [request.status for request in mirrors[0].requests()] == [200, 200]
    assert without_records(root / "pets") == CONTENT


def test_a_server_that_cannot_resume_and_always_breaks_off_is_given_up(root, archive_only, mirrors):
    for mirror in mirrors:
        mirror.fail("pets.tgz", cut=70_000, ignore_range=True, times=None)
    assert "connection cut after 70,000" in failure("pets", root, archive_only)
    assert [len(mirror.requests()) for mirror in mirrors] == [1 + QUICK.tries, QUICK.tries]


@pytest.mark.parametrize("length", [100, 10**6])
def test_a_part_of_another_edition_costs_one_more_download_and_no_error(root, archive_only, mirrors, length):
    (root / ".pets.download").mkdir(parents=True)
    (root / ".pets.download" / ".pets.tgz.part").write_bytes(bytes(length))
    fetch("pets", root, archive_only, patience=QUICK)
    assert without_records(root / "pets") == CONTENT
    assert [request.range for request in mirrors[0].requests()] == [f"bytes={length}-", None]
    assert mirrors[1].requests() == []


def test_a_part_that_was_complete_is_only_hashed(root, archive_only, mirrors):
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    (root / ".pets.download").mkdir(parents=True)
    (root / ".pets.download" / ".pets.tgz.part").write_bytes(whole)
    fetch("pets", root, archive_only, patience=QUICK)
    assert [(request.status, request.sent) for request in mirrors[0].requests()] == [(416, 0)]
    assert without_records(root / "pets") == CONTENT


@pytest.fixture
def unverified(tmp_path, mirrors):
    return catalogue(
        tmp_path, remote(mirrors, "pets.tgz", unpack=".", checksum=None, checksum_note="nobody publishes one")
    )


def test_without_a_checksum_a_piece_is_continued_if_the_server_says_that_the_file_is_the_same(
    root, unverified, mirrors
):
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    mirrors[0].fail("pets.tgz", cut=70_000)
    mirrors[0].fail("pets.tgz", cut=0, times=2)
    mirrors[1].fail("pets.tgz", status=404)
    assert "connection cut after 70,000" in failure("pets", root, unverified)
    assert set(contents(root)) == {".pets.download/.pets.tgz.part", ".pets.download/.pets.tgz.part.tag"}
    fetch("pets", root, unverified, patience=QUICK)
    last = mirrors[0].requests()[-1]
    assert (last.range, last.status, last.sent) == ("bytes=70000-", 206, len(whole) - 70_000)
    assert last.if_range
    assert without_records(root / "pets") == CONTENT
    assert [path.name for path in root.iterdir()] == ["pets"]


def test_without_a_checksum_a_piece_of_another_edition_or_mirror_is_not_continued(root, unverified, mirrors):
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    (mirrors[0].folder / "pets.tgz").write_bytes(whole[::-1])
    mirrors[0].fail("pets.tgz", cut=70_000)
    mirrors[0].fail("pets.tgz", status=404)
    mirrors[1].fail("pets.tgz", status=404)
    failure("pets", root, unverified)
    assert mirrors[1].requests()[-1].range is None
    (mirrors[0].folder / "pets.tgz").write_bytes(whole)
    fetch("pets", root, unverified, patience=QUICK)
    last = mirrors[0].requests()[-1]
    assert (last.range, last.status, last.sent) == ("bytes=70000-", 200, len(whole))
    assert without_records(root / "pets") == CONTENT


def test_without_a_checksum_a_piece_of_unknown_origin_is_not_continued(root, unverified, mirrors):
    (root / ".pets.download").mkdir(parents=True)
    (root / ".pets.download" / ".pets.tgz.part").write_bytes(bytes(100))
    fetch("pets", root, unverified, patience=QUICK)
    assert [request.range for request in mirrors[0].requests()] == [None]
    assert without_records(root / "pets") == CONTENT


def test_a_mirror_that_sends_far_more_than_the_catalogue_says_is_cut_off(root, tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr("tocom.data.download._SLACK", 100_000)
    entry = remote(mirrors, "pets.tgz", unpack=".", size=100)
    message = failure("pets", root, catalogue(tmp_path, entry))
    assert message.count("sends far more than the 100 B that the catalogue says") == 2
    assert list(root.iterdir()) == []


def test_a_server_that_falls_silent_is_given_up_after_the_timeout(root, tmp_path, mirrors):
    path = catalogue(tmp_path, remote(mirrors, "labels.txt"))
    silence = threading.Event()
    for mirror in mirrors:
        mirror.fail("labels.txt", delay=silence, times=None)
    message = failure("pets", root, path, patience=Patience(tries=1, wait=0, timeout=0.1))
    silence.set()
    assert message.count("no answer for 0.1 s") == 2
    assert list(root.iterdir()) == []


# --- archives that are refused (test_unpack.py has all kinds) ----------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "zip", "link"])
def test_a_path_outside_the_folder_is_refused_and_leaves_nothing(root, tmp_path, mirrors, kind):
    name = "evil.zip" if kind == "zip" else "evil.tar"
    if kind == "zip":
        with zipfile.ZipFile(mirrors[0].folder / name, "w") as zipped:
            zipped.writestr("fine", "x")
            zipped.writestr("../../escaped", "x")
    else:
        with tarfile.open(mirrors[0].folder / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("fine"))
            member = tarfile.TarInfo("link" if kind == "link" else "../../escaped")
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "../../escaped"
            tar.addfile(member)
    path = catalogue(tmp_path, remote(mirrors, name, unpack="."))
    before = contents(tmp_path)
    message = failure("pets", root, path)
    assert message.startswith(f"pets: {name} is refused: ")
    assert "outside the folder" in message or "leads out of the folder" in message
    assert list(root.iterdir()) == []
    assert contents(tmp_path) == before


def test_an_archive_that_is_half_as_large_again_as_the_catalogue_says_is_refused(root, tmp_path, mirrors):
    size = sum(map(len, CONTENT.values()))
    entry = remote(mirrors, "pets.tgz", unpack=".")
    fits, tight = size / 1.5 / 1e6 + 0.001, size / 1.5 / 1e6 - 0.001
    message = failure("pets", root, catalogue(tmp_path, entry, unpacked_mb=tight))
    assert "far more bytes than the catalogue says" in message
    assert list(root.iterdir()) == []
    fetch("pets", root, catalogue(tmp_path, entry, unpacked_mb=fits), patience=QUICK)


def test_the_limit_is_for_all_archives_of_a_data_set_together(root, tmp_path, mirrors):
    entries = [remote(mirrors, "pets.tgz", unpack=folder) for folder in "ab"]
    (mirrors[0].folder / "again.tgz").write_bytes((mirrors[0].folder / "pets.tgz").read_bytes())
    entries[1] = remote(mirrors, "again.tgz", unpack="b")
    size = 2 * sum(map(len, CONTENT.values())) / 1e6
    message = failure("pets", root, catalogue(tmp_path, *entries, unpacked_mb=size / 1.5 - 0.001))
    assert message.startswith("pets: again.tgz is refused")
    assert list(root.iterdir()) == []
    fetch("pets", root, catalogue(tmp_path, *entries, unpacked_mb=size / 1.5 + 0.001), patience=QUICK)


def test_a_plain_file_that_an_archive_has_too_is_refused(root, tmp_path, mirrors):
    with tarfile.open(mirrors[0].folder / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("labels.txt"))
    path = catalogue(tmp_path, remote(mirrors, "a.tar", unpack="."), remote(mirrors, "labels.txt"))
    assert "labels.txt is a file of its own, and in one of the archives too" in failure("pets", root, path)
    assert list(root.iterdir()) == []


# --- the disk -----------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_anything_is_fetched(root, archive_only, mirrors, monkeypatch):
    size = (mirrors[0].folder / "pets.tgz").stat().st_size
    needed = size + 500_000  # the archive, and 0.5 MB unpacked
    usage = type(module.shutil.disk_usage("/"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed + 1, needed - 1))
    message = failure("pets", root, archive_only)
    assert message.startswith("fetching pets takes ")
    assert "free some space or choose another folder with --root" in message
    assert mirrors[0].requests() == []
    assert list(root.iterdir()) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed, needed))
    fetch("pets", root, archive_only, patience=QUICK)


def test_what_has_arrived_already_does_not_count_as_needed(root, archive_only, mirrors, monkeypatch):
    whole = (mirrors[0].folder / "pets.tgz").read_bytes()
    (root / ".pets.download").mkdir(parents=True)
    (root / ".pets.download" / ".pets.tgz.part").write_bytes(whole[:-10])
    usage = type(module.shutil.disk_usage("/"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 0, 500_010))
    fetch("pets", root, archive_only, patience=QUICK)
    assert without_records(root / "pets") == CONTENT


def test_a_disk_that_fills_up_while_downloading_leaves_nothing(root, archive_only):
    with file_limit(100_000):
        message = failure("pets", root, archive_only)
    assert message.startswith("cannot write ")
    assert "free some space or choose another folder with --root" in message
    assert list(root.iterdir()) == []


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(root, tmp_path, mirrors):
    with tarfile.open(mirrors[0].folder / "zeros.tgz", "w:gz") as tar:
        (tmp_path / "zeros").write_bytes(bytes(400_000))
        tar.add(tmp_path / "zeros", "zeros")
    path = catalogue(tmp_path, remote(mirrors, "zeros.tgz", unpack="."))
    with file_limit(100_000):  # the archive fits, what is in it does not
        assert failure("pets", root, path).startswith("cannot write ")
    assert list(root.iterdir()) == []


def test_a_disk_without_space_for_the_records_leaves_nothing(root, archive_only, monkeypatch):
    def full(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_dump", full)
    assert "No space left on device; free some space" in failure("pets", root, archive_only)
    assert list(root.iterdir()) == []


def test_a_root_that_cannot_be_a_folder_is_one_line(tmp_path, archive_only):
    (tmp_path / "file").write_text("")
    assert failure("pets", tmp_path / "file" / "data", archive_only).startswith("cannot write ")


# --- killed, and at the same time ---------------------------------------------------------------------------------


def run(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stderr=subprocess.PIPE, text=True)


KILLED = """
import os, signal, sys
from tocom.data import fetch as module

def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

name, root, catalogue, where = sys.argv[1:]
if where == "unpack":
    real = module.unpack
    module.unpack = lambda *args, **options: (real(*args, **options), kill())
elif where == "seal":
    module._dump = kill
elif where == "end":
    real = module.shutil.rmtree
    module.shutil.rmtree = kill
else:
    rename = module.Path.rename
    module.Path.rename = lambda path, to: kill() if path.name.endswith(where) else rename(path, to)
module.fetch(name, root, catalogue, force=where == ".unpack")
"""


@pytest.mark.parametrize("where", ["unpack", "seal", "end"])
def test_a_kill_leaves_no_half_of_a_data_set_and_the_next_run_clears_up(root, both, mirrors, where):
    process = run(KILLED, "pets", root, both, where)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (root / "pets").exists() == (where == "end")
    assert status("pets", root, both) == ("fetched" if where == "end" else "partly")
    assert fetch("pets", root, both, patience=QUICK) == root / "pets"
    assert without_records(root / "pets") == CONTENT | {"labels.txt": LABELS}
    assert [path.name for path in root.iterdir()] == ["pets"]
    assert len(mirrors[0].requests("pets.tgz")) == 1  # it was verified before the kill


def test_a_kill_while_a_data_set_is_replaced_keeps_the_old_one(root, archive_only, mirrors):
    fetch("pets", root, archive_only, patience=QUICK)
    process = run(KILLED, "pets", root, archive_only, ".unpack")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (root / "pets").exists()
    fetch("pets", root, archive_only, patience=QUICK)
    assert without_records(root / "pets") == CONTENT
    assert [path.name for path in root.iterdir()] == ["pets"]
    assert len(mirrors[0].requests()) == 2


def test_an_interrupt_keeps_what_can_be_resumed_and_no_more(root, archive_only, mirrors, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("pets", root, archive_only, patience=QUICK)
    assert contents(root) == {".pets.download/pets.tgz": (mirrors[0].folder / "pets.tgz").read_bytes()}
    monkeypatch.undo()
    fetch("pets", root, archive_only, patience=QUICK)
    assert len(mirrors[0].requests()) == 1


def test_two_processes_fetch_once_and_the_second_waits(root, archive_only, mirrors):
    go = threading.Event()
    mirrors[0].fail("pets.tgz", delay=go)
    code = "import sys; from tocom.data.fetch import fetch; fetch(*sys.argv[1:])"
    processes = [run(code, "pets", root, archive_only) for _ in range(2)]
    end = time.monotonic() + 30
    while not mirrors[0].requests() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1)  # the other one has long come to the lock, or would have asked the server too
    go.set()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("another process is fetching pets; waiting for it" in text for text in errors) == 1
    assert len(mirrors[0].requests()) == 1
    assert without_records(root / "pets") == CONTENT
    assert [path.name for path in root.iterdir()] == ["pets"]


def test_many_threads_fetch_once(root, archive_only, mirrors, caplog):
    caplog.set_level(logging.ERROR)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch("pets", root, archive_only, patience=QUICK)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [root / "pets"] * 6
    assert len(mirrors[0].requests()) == 1
    assert [path.name for path in root.iterdir()] == ["pets"]


# --- copies of one's own ------------------------------------------------------------------------------------------


def test_archives_of_ones_own_are_verified_and_used_first(root, tmp_path, both, mirrors):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pets.tgz").write_bytes((mirrors[0].folder / "pets.tgz").read_bytes())
    fetch("pets", root, both, source=mine, patience=QUICK)
    assert [request.path for request in mirrors[0].requests()] == ["labels.txt"]
    assert without_records(root / "pets") == CONTENT | {"labels.txt": LABELS}
    (mine / "pets.tgz").write_bytes(b"damaged")
    fetch("pets", root, both, source=mine / "pets.tgz", force=True, patience=QUICK)
    assert len(mirrors[0].requests("pets.tgz")) == 1
    assert (mine / "pets.tgz").read_bytes() == b"damaged"


def test_an_unpacked_folder_is_registered_where_it_lies(root, tmp_path, archive_only):
    mine = tmp_path / "mine"
    (mine / "images").mkdir(parents=True)
    (mine / "images" / "a.jpg").write_bytes(b"123")
    assert fetch("pets", root, archive_only, source=mine, patience=QUICK) == mine
    assert folder_of("pets", root, archive_only) == mine
    assert status("pets", root, archive_only) == "registered"
    assert list(contents(root)) == ["pets/.complete.json"]
    assert check("pets", root, archive_only).count == 1
    (mine / "images" / "b.jpg").write_bytes(b"4")
    with pytest.raises(TocomError, match="holds 2 files of 4 bytes, but 1 of 3 when it was registered"):
        check("pets", root, archive_only)
    mine.rename(tmp_path / "moved")
    with pytest.raises(TocomError, match="was registered as 'pets', is not there; mount it"):
        folder_of("pets", root, archive_only)


def test_a_copy_of_ones_own_that_is_not_used_is_said(root, tmp_path, archive_only, caplog):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"123")
    fetch("pets", root, archive_only, source=tmp_path / "mine")
    fetch("pets", root, archive_only, source=tmp_path / "mine")
    assert caplog.records == []
    assert fetch("pets", root, archive_only, source=tmp_path / "other") == tmp_path / "mine"
    warning = f"pets is there already, so --from {tmp_path / 'other'} was not used; --force replaces it"
    assert [record.message for record in caplog.records] == [warning]
    assert fetch("pets", root, archive_only, source=tmp_path / "other", force=True) == tmp_path / "other"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_place_of_the_data_set_is_replaced_if_forced_and_what_it_leads_to_stays(
    root, tmp_path, archive_only, dangling
):
    root.mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("mine")
    (root / "pets").symlink_to(tmp_path / ("gone" if dangling else "disk"))
    assert "was not made by `tocom data fetch`; move it away" in failure("pets", root, archive_only)
    for _ in range(2):
        fetch("pets", root, archive_only, force=True, patience=QUICK)
        assert without_records(root / "pets") == CONTENT
        assert not (root / "pets").is_symlink()
        assert [path.name for path in root.iterdir()] == ["pets"]
    assert contents(tmp_path / "disk") == {"mine.txt": b"mine"}


def test_a_link_that_an_earlier_run_could_not_remove_is_cleared(root, tmp_path, archive_only):
    root.mkdir()
    (root / ".pets.old").symlink_to(tmp_path)
    (root / "pets").mkdir()
    fetch("pets", root, archive_only, force=True, patience=QUICK)
    assert [path.name for path in root.iterdir()] == ["pets"]
    assert tmp_path.is_dir()


def test_a_data_set_behind_a_form_says_what_to_download_by_hand(root, tmp_path, mirrors):
    entry = remote(mirrors, "pets.tgz", unpack=".", urls=[])
    path = catalogue(tmp_path, entry, manual="register at https://pets.org and download pets.tgz")
    message = failure("pets", root, path)
    assert message.startswith("pets cannot be downloaded by a link: register at https://pets.org")
    assert f"tocom data fetch pets --root {root} --from FOLDER" in message
    assert list(root.iterdir()) == []
    fetch("pets", root, path, source=mirrors[0].folder / "pets.tgz", patience=QUICK)
    assert without_records(root / "pets") == CONTENT


def test_an_archive_of_ones_own_with_the_wrong_checksum_is_refused_and_not_deleted(root, tmp_path, mirrors):
    entry = remote(mirrors, "pets.tgz", unpack=".", urls=[])
    path = catalogue(tmp_path, entry, manual="register at https://pets.org and download pets.tgz")
    (tmp_path / "pets.tgz").write_bytes(b"half")
    message = failure("pets", root, path, source=tmp_path / "pets.tgz")
    assert f"{tmp_path / 'pets.tgz'}: found sha256:{sha256_of(b'half')}" in message
    assert (tmp_path / "pets.tgz").read_bytes() == b"half"
    assert list(root.iterdir()) == []


def test_a_source_that_cannot_be_one_is_refused(root, tmp_path, archive_only):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tgz").write_bytes(b"")
    assert "no such file or folder" in failure("pets", root, archive_only, source=tmp_path / "none")
    assert "holds no files" in failure("pets", root, archive_only, source=tmp_path / "empty")
    assert "is no file of pets; its files are: pets.tgz" in failure(
        "pets", root, archive_only, source=tmp_path / "other.tgz"
    )
    assert list(root.iterdir()) == []


def test_a_folder_that_somebody_made_is_not_overwritten(root, archive_only):
    (root / "pets").mkdir(parents=True)
    (root / "pets" / "mine.txt").write_text("mine")
    assert "was not made by `tocom data fetch`; move it away" in failure("pets", root, archive_only)
    message = failure("pets", root, archive_only, source=root / "pets", force=True)
    assert "move it elsewhere first" in message
    assert contents(root) == {"pets/mine.txt": b"mine"}


# --- check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "labels.txt").write_bytes(LABELS[::-1]), "labels.txt was changed"),
        (lambda folder: (folder / "images/cat/1.jpg").unlink(), "images/cat/1.jpg is missing"),
        (lambda folder: (folder / "images/cat/3.jpg").write_bytes(b""), "images/cat/3.jpg is no file of the data set"),
        (lambda folder: (folder / ".sha256sums").write_text(""), ".sha256sums is missing or was changed"),
        (lambda folder: (folder / ".sha256sums").unlink(), ".sha256sums is missing or was changed"),
    ],
)
def test_a_check_names_the_first_bad_file_and_the_fix(root, both, damage, message):
    folder = fetch("pets", root, both, patience=QUICK)
    check("pets", root, both)
    damage(folder)
    with pytest.raises(TocomError) as caught:
        check("pets", root, both)
    assert message in str(caught.value)
    assert f"`tocom data fetch pets --root {root} --force`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_check_of_what_is_not_there_says_how_to_fetch_it(root, both):
    with pytest.raises(TocomError, match=f"the data set 'pets' is not in {root}; run `tocom data fetch pets"):
        check("pets", root, both)


def test_a_damaged_record_is_one_line(root, both):
    folder = fetch("pets", root, both, patience=QUICK)
    (folder / ".complete.json").write_text("{")
    assert "is corrupt; fetch the data set again with --force" in failure("pets", root, both)
    fetch("pets", root, both, force=True, patience=QUICK)
    check("pets", root, both)


def test_the_sums_can_be_checked_without_this_project(root, both):
    folder = fetch("pets", root, both, patience=QUICK)
    result = subprocess.run(["sha256sum", "--check", "--quiet", ".sha256sums"], cwd=folder, capture_output=True)
    assert result.returncode == 0, result.stdout
