"""Archives: what is unpacked, and all that is refused."""

import io
import random
import stat
import tarfile
import zipfile

import pytest

from tests import small
from tests.data.disk import contents
from tocom.data.unpack import unpack

FILES = {"set/a.txt": b"alpha", "set/deep/er/b.bin": bytes(range(256)), "set/empty": b""}
BYTES = sum(map(len, FILES.values()))
FORMATS = ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz")
LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


def entry(name, content=b"", kind=tarfile.REGTYPE, link="", mode=0o644):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname, member.mode = len(content), kind, link, mode
    return member, io.BytesIO(content)


def write(path, files=FILES):
    """Write an archive of files: {name: content}, or for a tar, entries."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in files.items() if isinstance(files, dict) else files:
                zipped.writestr(name, content)
        return path
    mode = {".tar": "w", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w:gz")
    with tarfile.open(path, mode) as tar:
        for member, content in (entry(*item) for item in files.items()) if isinstance(files, dict) else files:
            tar.addfile(member, content)
    return path


def refusal(archive, folder, max_bytes=10_000):
    message = small.refusal(unpack, archive, folder, max_bytes)
    assert message.startswith(archive.name)
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_files_that_went_in_and_their_bytes(tmp_path, name):
    seen = []
    assert unpack(write(tmp_path / name), tmp_path / "out", BYTES, advance=seen.append) == BYTES == sum(seen)
    assert contents(tmp_path / "out") == FILES
    assert "far more bytes" in refusal(tmp_path / name, tmp_path / "a", BYTES - 1)
    assert sum(map(len, contents(tmp_path / "a").values())) < BYTES


def test_links_inside_the_folder_are_kept_and_permissions_are_those_of_ordinary_files(tmp_path):
    links = [entry("set/deep/soft", kind=LINK, link="../a"), entry("set/hard", kind=HARD, link="set/a")]
    unpack(write(tmp_path / "a.tgz", [entry("set/a", b"alpha", mode=0o6777), *links]), tmp_path / "out", 10_000)
    assert contents(tmp_path / "out") == {"set/a": b"alpha", "set/deep/soft": b"alpha", "set/hard": b"alpha"}
    assert stat.S_IMODE((tmp_path / "out/set/a").stat().st_mode) & 0o6022 == 0


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_two_archives_can_fill_one_folder_but_not_overwrite_each_other(tmp_path, kind):
    for name in ("one", "two"):
        unpack(write(tmp_path / f"{name}.{kind}", {name: b"1"}), tmp_path / "out", 10)
    message = refusal(write(tmp_path / f"three.{kind}", {"one": b"x"}), tmp_path / "out")
    assert "'one' is in it twice, or would overwrite" in message
    assert contents(tmp_path / "out") == {"one": b"1", "two": b"1"}


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
@pytest.mark.parametrize(
    ("path", "message"),
    [("../evil", "outside"), ("set/../../evil", "outside"), ("/tmp/tocom_evil", "outside"), ("set/..", "outside")]
    + [(path, "backslash or control character") for path in ("a\\b", "a\nb", "a\x7fb")],
)
def test_a_name_that_leaves_the_folder_or_is_none(tmp_path, name, path, message):
    folder = tmp_path / "in" / "out"
    assert message in refusal(write(tmp_path / name, {path: b"x"}), folder)
    assert list((tmp_path / "in").rglob("*")) == [folder]


@pytest.mark.parametrize(
    "entries",
    [
        [entry("l", kind=LINK, link="/etc")],
        [entry("l", kind=LINK, link="..")],
        [entry("set/l", kind=LINK, link="a/../../..")],
        [entry("b", kind=LINK, link="."), entry("b/m", b"x")],
        [entry("b", kind=LINK, link="."), entry("b", b"x")],
        [entry("h", kind=HARD, link="../secret")],
        [entry("h", kind=HARD, link="none")],
        [entry("dev", kind=tarfile.CHRTYPE)],
        [entry("dev", kind=tarfile.FIFOTYPE)],
        [entry("a", b"1"), entry("a", b"2")],
        [entry("b", b"1"), entry("b/c", b"2")],
    ],
)
def test_a_tar_of_links_that_lead_out_devices_or_one_name_twice(tmp_path, entries):
    (tmp_path / "secret").write_text("s")
    assert " is refused: " in refusal(write(tmp_path / "a.tgz", entries), tmp_path / "out")
    inside = list((tmp_path / "out").rglob("*"))
    assert all(path.is_file() or path.readlink().name == "" for path in inside), inside
    assert {path.name for path in tmp_path.iterdir()} == {"a.tgz", "out", "secret"}


def test_a_file_that_is_written_through_a_link_of_an_archive_before(tmp_path):
    unpack(write(tmp_path / "b.tgz", [entry("l", kind=LINK, link=".")]), tmp_path / "out", 10)
    for name in ("c.tgz", "c.zip"):
        message = refusal(write(tmp_path / name, {"l/m": b""}), tmp_path / "out")
        assert "'l/m' would be written through a link" in message


def test_a_zip_with_a_link_an_encrypted_member_or_one_name_twice(tmp_path, recwarn):
    info = zipfile.ZipInfo("l")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "'l' is a link, device or pipe" in refusal(write(tmp_path / "a.zip", {info: b"/etc"}), tmp_path / "out")
    content = bytearray(write(tmp_path / "b.zip", {"x": b"x"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    (tmp_path / "b.zip").write_bytes(content)
    assert "'x' is encrypted" in refusal(tmp_path / "b.zip", tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    for number, names in enumerate(("aa", ("b", "b/c"))):
        archive = write(tmp_path / f"{number}.zip", [(name, b"1") for name in names])
        assert " is refused: " in refusal(archive, tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_archive_or_was_cut_or_damaged(tmp_path, name):
    (tmp_path / name).write_text("<!doctype html><title>Quota exceeded</title>" * 50)
    assert "is corrupt, or not what its ending says" in refusal(tmp_path / name, tmp_path / "page")
    whole = bytearray(write(tmp_path / name, {"a": random.Random(0).randbytes(60_000)}).read_bytes())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert "is corrupt" in refusal(tmp_path / name, tmp_path / "cut", 100_000)
    if name != "a.tar":  # it has no checksum over its files' contents
        whole[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
        (tmp_path / name).write_bytes(whole)
        assert "is corrupt" in refusal(tmp_path / name, tmp_path / "damaged", 100_000)
