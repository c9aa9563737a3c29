"""Archives: what is unpacked, and all that is refused."""

import bz2
import gzip
import io
import random
import stat
import tarfile
import zipfile

import pytest

from tests.data.disk import file_limit
from tocom.data.unpack import kind_of, unpack
from tocom.errors import TocomError

FILES = {"set/a.txt": b"alpha", "set/deep/er/b.bin": bytes(range(256)), "set/empty": b""}
BYTES = sum(map(len, FILES.values()))


def entry(name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname, member.mode = len(content), kind, link, 0o644
    return member, io.BytesIO(content)


def write_tar(path, *entries, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for member, content in entries:
            tar.addfile(member, content)
    return path


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


def write(path, files=FILES):
    if kind_of(path.name) == "zip":
        return write_zip(path, files)
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz", ".tar": "w"}[path.suffix]
    return write_tar(path, *(entry(name, content) for name, content in files.items()), mode=mode)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(archive, folder, max_bytes=10_000, **options):
    with pytest.raises(TocomError) as caught:
        unpack(archive, folder, max_bytes, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(archive.name)
    return message


# --- what is unpacked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_every_format_gives_the_files_that_went_in_and_their_bytes(tmp_path, name):
    seen = []
    assert unpack(write(tmp_path / name), tmp_path / "out", BYTES, advance=seen.append) == BYTES
    assert contents(tmp_path / "out") == FILES
    assert sum(seen) == BYTES


def test_the_compression_of_a_tar_is_told_by_its_bytes_not_by_its_ending(tmp_path):
    archive = write(tmp_path / "a.tar.xz").rename(tmp_path / "a.tar.gz")
    unpack(archive, tmp_path / "out", BYTES)
    assert contents(tmp_path / "out") == FILES


def test_a_single_compressed_file_loses_its_ending(tmp_path):
    (tmp_path / "labels.mat.gz").write_bytes(gzip.compress(b"x" * 999))
    assert unpack(tmp_path / "labels.mat.gz", tmp_path / "out", 999) == 999
    assert contents(tmp_path / "out") == {"labels.mat": b"x" * 999}


def test_links_inside_the_folder_are_kept(tmp_path):
    archive = write_tar(
        tmp_path / "a.tgz",
        entry("set/a", b"alpha"),
        entry("set/deep/soft", kind=tarfile.SYMTYPE, link="../a"),
        entry("set/hard", kind=tarfile.LNKTYPE, link="set/a"),
    )
    unpack(archive, tmp_path / "out", 10_000)
    assert contents(tmp_path / "out") == {"set/a": b"alpha", "set/deep/soft": b"alpha", "set/hard": b"alpha"}


def test_permissions_are_those_of_ordinary_files(tmp_path):
    member, content = entry("tool", b"#!")
    member.mode = 0o6777
    unpack(write_tar(tmp_path / "a.tgz", (member, content)), tmp_path / "out", 10)
    assert stat.S_IMODE((tmp_path / "out" / "tool").stat().st_mode) & 0o6022 == 0


def test_two_archives_can_fill_one_folder_but_not_overwrite_each_other(tmp_path):
    unpack(write(tmp_path / "a.zip", {"one": b"1"}), tmp_path / "out", 10)
    unpack(write(tmp_path / "b.tgz", {"two": b"2"}), tmp_path / "out", 10)
    assert contents(tmp_path / "out") == {"one": b"1", "two": b"2"}
    for name in ("c.zip", "c.tgz"):
        assert "'one' is in it twice, or would overwrite" in refusal(
            write(tmp_path / name, {"one": b"x"}), tmp_path / "out"
        )
    (tmp_path / "one.gz").write_bytes(gzip.compress(b"x"))
    assert "'one' is in it twice, or would overwrite" in refusal(tmp_path / "one.gz", tmp_path / "out")
    assert contents(tmp_path / "out")["one"] == b"1"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize("path", ["../evil", "set/../../evil", "/tmp/tocom_evil", "..", "set/.."])
def test_a_path_outside_the_folder(tmp_path, name, path):
    folder = tmp_path / "in" / "out"
    assert f"{path!r} lies outside the folder" in refusal(write(tmp_path / name, {path: b"x"}), folder)
    assert list((tmp_path / "in").rglob("*")) == [folder]


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize("path", ["a\\b", "a\nb", "a\x7fb"])
def test_a_name_with_a_backslash_or_control_character(tmp_path, name, path):
    assert "backslash or control character" in refusal(write(tmp_path / name, {path: b"x"}), tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "target"), [("l", "/etc"), ("l", ".."), ("set/l", "../.."), ("set/l", "a/../../.."), ("l", "set/..")]
)
def test_a_link_that_leads_out_of_the_folder(tmp_path, path, target):
    archive = write_tar(tmp_path / "a.tar", entry(path, kind=tarfile.SYMTYPE, link=target), mode="w")
    assert "leads out of the folder" in refusal(archive, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_a_chain_of_links_that_are_harmless_one_by_one(tmp_path):
    # b is the folder itself; b/../evil is lexically "evil", but lies outside once b is followed.
    chain = [entry("b", kind=tarfile.SYMTYPE, link="."), entry("a", kind=tarfile.SYMTYPE, link="b/../evil")]
    assert "leads out of the folder" in refusal(write_tar(tmp_path / "a.tgz", *chain), tmp_path / "out")


def test_a_file_written_through_a_link_also_of_an_archive_before(tmp_path):
    link = entry("l", kind=tarfile.SYMTYPE, link=".")
    archive = write_tar(tmp_path / "a.tgz", link, entry("l/m", kind=tarfile.SYMTYPE, link="../evil"))
    assert "'l/m' would be written through a link" in refusal(archive, tmp_path / "one")
    unpack(write_tar(tmp_path / "b.tgz", entry("l", kind=tarfile.SYMTYPE, link=".")), tmp_path / "two", 10)
    for archive in (write(tmp_path / "c.tgz", {"l/m": b""}), write(tmp_path / "c.zip", {"l/m": b""})):
        assert "'l/m' would be written through a link" in refusal(archive, tmp_path / "two")


def test_a_hard_link_to_a_file_that_is_not_in_the_archive(tmp_path):
    (tmp_path / "secret").write_text("s")
    for i, target in enumerate((str(tmp_path / "secret"), "../secret", "none")):
        archive = write_tar(tmp_path / f"{i}.tgz", entry("h", kind=tarfile.LNKTYPE, link=target))
        assert "lies outside" in (message := refusal(archive, tmp_path / "out")) or "leads to no file" in message
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_a_device_or_pipe(tmp_path, kind):
    archive = write_tar(tmp_path / "a.tgz", entry("dev", kind=kind))
    assert "'dev' is a device or pipe" in refusal(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_a_link_or_encrypted_member_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("l")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_zip(tmp_path / "a.zip", {info: b"/etc"})
    assert "'l' is a link, device or pipe" in refusal(tmp_path / "a.zip", tmp_path / "out")
    content = bytearray(write_zip(tmp_path / "b.zip", {"x": b"x"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    (tmp_path / "b.zip").write_bytes(content)
    assert "'x' is encrypted" in refusal(tmp_path / "b.zip", tmp_path / "out")
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_a_member_that_is_in_it_twice_or_both_a_file_and_a_folder(tmp_path, name, recwarn):
    twice = [("a", b"1"), ("a", b"2")]
    clash = [("b", b"1"), ("b/c", b"2")]
    for i, files in enumerate((twice, clash)):
        archive = tmp_path / f"{i}{name}"
        if name.endswith("zip"):
            with zipfile.ZipFile(archive, "w") as zipped:
                for member, content in files:
                    zipped.writestr(member, content)
        else:
            write_tar(archive, *(entry(member, content) for member, content in files))
        assert "is in it twice" in (message := refusal(archive, tmp_path / f"out{i}")) or "both a file and" in message


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.xz", "a.zip"])
def test_more_bytes_or_files_than_expected(tmp_path, name):
    archive = write(tmp_path / name, {f"f{i}": bytes(1000) for i in range(10)})
    assert unpack(archive, tmp_path / "fits", 10_000, 10) == 10_000
    assert "far more bytes" in refusal(archive, tmp_path / "a", 9_999)
    assert "more files than expected" in refusal(archive, tmp_path / "b", 10_000, max_members=9)
    assert sum(map(len, contents(tmp_path / "a").values())) <= 9_999


def test_a_gzip_file_that_expands_without_end_is_stopped(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    assert (tmp_path / "bomb.gz").stat().st_size < 60_000
    assert "far more bytes" in refusal(tmp_path / "bomb.gz", tmp_path / "out", 1_000_000)
    assert sum(map(len, contents(tmp_path / "out").values())) <= 1_000_000


def test_a_tar_whose_stream_expands_beyond_its_members_is_stopped(tmp_path, monkeypatch):
    # The bytes are in the header of a member (its PAX records), which are no file's.
    monkeypatch.setattr("tocom.data.unpack._OVERHEAD", 100_000)
    member, content = entry("a", b"x")
    member.pax_headers = {"comment": "x" * 5_000_000}
    with tarfile.open(tmp_path / "a.tgz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, content)
    assert "its stream expands" in refusal(tmp_path / "a.tgz", tmp_path / "out", 1_000)


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar", "a.tar.bz2", "a.tar.xz", "a.gz"])
def test_what_is_not_an_archive_such_as_the_page_of_an_error(tmp_path, name):
    (tmp_path / name).write_text("<!doctype html><title>Quota exceeded</title>" * 50)
    assert "is corrupt, or not what its ending says" in refusal(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar", "a.tar.bz2", "a.tar.xz"])
def test_an_archive_that_was_cut_or_damaged(tmp_path, name):
    noise = random.Random(0).randbytes(60_000)
    whole = write(tmp_path / name, {"a": noise}).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert "is corrupt" in refusal(tmp_path / name, tmp_path / "cut", 100_000)
    if name == "a.tar":
        return  # it has no checksum over its files' contents
    damaged = bytearray(whole)
    for i in range(len(whole) // 2, len(whole) // 2 + 50):
        damaged[i] ^= 0x55
    (tmp_path / name).write_bytes(damaged)
    assert "is corrupt" in refusal(tmp_path / name, tmp_path / "damaged", 100_000)


def test_damage_that_bz2_reports_without_a_number(tmp_path):
    (tmp_path / "a.tar.bz2").write_bytes(bz2.compress(bytes(1000))[:20] + bytes(50))
    assert "is corrupt" in refusal(tmp_path / "a.tar.bz2", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.gz"])
def test_a_full_disk_stays_an_error_of_the_system(tmp_path, name):
    content = bytes(200_000)
    archive = tmp_path / name
    archive.write_bytes(gzip.compress(content)) if name == "a.gz" else write(archive, {"a": content})
    with file_limit(50_000), pytest.raises(OSError, match="File too large"):
        unpack(archive, tmp_path / "out", 1_000_000)
