"""Every family: fetched from a local server in its true layout, checked, read, decoded, and broken."""

import gzip
import pickle
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.io import loadmat, savemat
from typer.testing import CliRunner

from tests import small
from tests.data import layouts
from tests.data.disk import file_limit
from tests.data.server import serve
from tocom.cli_data import data
from tocom.data.catalogue import read_catalogue
from tocom.data.families import imagenet, load_listing, vtab
from tocom.data.fetch import check, fetch
from tocom.data.images import decode
from tocom.data.pixels import load
from tocom.data.registry import prepare
from tocom.errors import TocomError

#: One of each family that classifies, and both layouts of Stanford Cars.
NAMES = ("cifar100", "fashion_mnist", "cub200", "flowers102", "cars", "cars_devkit", "dogs", "imagenet1k", "vtab.dtd")
#: Where Debian's package dataset-fashion-mnist puts Fashion-MNIST.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.filterwarnings("ignore:vtab.*not VTAB-1k's:UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All data sets, fetched: (root, catalogue, {name: truth})."""
    folder, root = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("data")
    with serve(folder) as server:
        catalogue = layouts.make_catalogue(folder, server.base, (*NAMES, "ade20k"))
        for name in (*NAMES, "ade20k"):
            fetch(name, root, catalogue)
    truth = {name: layouts.make_archives(name, folder)["truth"] for name in (*NAMES, "ade20k")}
    return root, catalogue, truth


@pytest.fixture
def copy(world, tmp_path):
    """Return a function that copies a fetched data set, so that a test can break it, and returns its folder."""
    return lambda name: Path(shutil.copytree(world[0] / name, tmp_path / name))


@pytest.fixture
def register(tmp_path, world):
    """Return a function that registers a folder as a data set."""
    return lambda name, folder: fetch(name, tmp_path / "data", world[1], source=folder)


def read(name, folder):
    family = read_catalogue()[name].family
    return import_module(f"tocom.data.families.{family}").listing(folder, name)


def refusal(name, folder):
    return small.refusal(read, name, folder)


def seen(items):
    return [layouts.label_of(image) for image in decode(items.images, 32)]


@pytest.mark.parametrize("name", [*NAMES, "ade20k"])
def test_a_fetched_data_set_has_the_labels_and_images_that_were_put_in(world, name):
    root, catalogue, truth = world
    check(name, root, catalogue)
    listing = load_listing(name, root, catalogue)
    assert (listing.classes, listing.group) == (layouts.CLASSES, read_catalogue()[name].group)
    for split, items in listing.splits.items():
        if name == "ade20k":
            assert [path.stem for path in items.files] == [path.stem for path in items.labels] == truth[name][split]
        else:
            assert seen(items) == items.labels.tolist() == truth[name][split]


def test_what_is_no_task_or_not_there_is_refused_and_says_what_to_do(tmp_path):
    with pytest.raises(TocomError, match=r"vtab-1k holds several tasks; name one, such as vtab\.dtd"):
        load_listing("vtab-1k", tmp_path)
    with pytest.raises(TocomError, match="tocom data fetch cub200"):
        load_listing("cub200", tmp_path)


def test_another_number_of_classes_than_the_catalogues_is_refused(world, tmp_path):
    root, catalogue, _ = world
    other = tmp_path / "other.yaml"
    other.write_text(catalogue.read_text().replace("classes: 4", "classes: 3"))
    with pytest.raises(TocomError, match=r"holds 4 classes, not the 3 of cub200"):
        load_listing("cub200", root, other)
    with pytest.raises(TocomError, match=r"outside 0\.\.2"):
        load_listing("vtab.dtd", root, other)
    other.write_text(catalogue.read_text().replace("classes: 4", "classes: 5"))
    assert load_listing("vtab.dtd", root, other).classes == 5  # its lists need not show all classes


def test_ade20k_is_a_task_whose_pixels_tell_their_class(world, tmp_path):
    root, catalogue, truth = world
    about = prepare("ade20k", tmp_path / "task", {"val": 8}, root=root, catalogue=catalogue)
    assert (about["task_kind"], about["classes"], about["group"]) == ("segment", layouts.CLASSES, "segmentation")
    assert about["sizes"] == {"train": 16, "val": 8, "test": 12}
    split = load(tmp_path / "task").splits["test"]
    for index in range(len(split)):
        image, labels = split[index]
        assert (labels[:, :14] == layouts.label_of(image[:, :, :14])).all()
        assert (labels[:, 18:] == 255).all()


# --- registered where it lies


@pytest.mark.parametrize("name", [name for name in (*NAMES, "ade20k") if name != "fashion_mnist"])
def test_what_is_unpacked_already_is_registered_and_anything_else_is_not(copy, register, world, tmp_path, name):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "paper.pdf").write_bytes(b"%PDF")
    message = small.refusal(register, name, tmp_path / "downloads")
    assert f"downloads is not {name} as it is unpacked, nor does it hold " in message
    assert list((tmp_path / "data").iterdir()) == []
    folder = copy(name)
    assert register(name, folder) == folder
    if name == "cub200":
        (folder / "CUB_200_2011" / "images.txt").rename(folder / "CUB_200_2011" / "IMAGES.TXT")
        with pytest.raises(TocomError, match=r"images\.txt is missing"):
            check(name, tmp_path / "data", world[1])


def test_files_that_torchvision_unpacked_are_registered_and_nothing_else_passes_for_them(copy, register, world):
    folder = copy("fashion_mnist")
    expected = read("fashion_mnist", folder)
    assert register("fashion_mnist", folder) != folder  # compressed files are copied, once they are verified
    check("fashion_mnist", folder.parent / "data", world[1])
    raw = folder.parent / "raw"
    raw.mkdir()
    for file in folder.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    found = read("fashion_mnist", raw)
    for split, items in expected.splits.items():
        assert (found.splits[split].images == items.images).all()
    shutil.rmtree(folder.parent / "data" / "fashion_mnist")
    assert register("fashion_mnist", raw) == raw
    for name, content, message in (
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\1\0\0\0\2\0\1", "has test images (12, 28, 28) for labels (2,)"),
        ("train-labels-idx1-ubyte", b"\0\0\x0c\1\0\0\0\1\0\0\0\1", "it holds no bytes"),
        ("train-labels-idx1-ubyte", None, "train-labels-idx1-ubyte.gz is missing"),
    ):
        before = (raw / name).read_bytes()
        (raw / name).unlink()
        if content is not None:
            (raw / name).write_bytes(content)
        assert message in refusal("fashion_mnist", raw)
        (raw / name).write_bytes(before)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_debians_copy_of_fashion_mnist_is_fetched_without_a_network_and_is_what_torchvision_reads(
    tmp_path, monkeypatch
):
    from torchvision.datasets import FashionMNIST

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    fetch("fashion_mnist", tmp_path / "data")
    listing = load_listing("fashion_mnist", tmp_path / "data")
    assert (listing.classes, listing.group, set(listing.splits)) == (10, "real tasks", {"train", "test"})
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in DEBIAN.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    for split, n in (("train", 60_000), ("test", 10_000)):
        items, reference = listing.splits[split], FashionMNIST(tmp_path, train=split == "train")
        assert items.images.shape == (n, 3, 28, 28)
        assert np.bincount(items.labels).tolist() == [n // 10] * 10
        assert (items.labels == reference.targets.numpy()).all()
        assert (items.images == reference.data.numpy()[:, None]).all()


def test_of_vtab_the_tasks_that_are_there_are_registered(copy, tmp_path):
    (tmp_path / "vtab").mkdir()
    copy("vtab.dtd").rename(tmp_path / "vtab" / "dtd")
    for wrong, message in ((tmp_path / "vtab" / "dtd", "is that of one task"), (Path(layouts.__file__).parent, "none")):
        with pytest.raises(TocomError, match=message):
            fetch("vtab-1k", tmp_path / "data", source=wrong)
    fetch("vtab-1k", tmp_path / "data", source=tmp_path / "vtab")
    assert len(load_listing("vtab.dtd", tmp_path / "data").splits["test"]) == 12
    with pytest.raises(TocomError, match=r"holds no cifar/train800\.txt"):
        load_listing("vtab.cifar", tmp_path / "data")


# --- broken lists


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(copy, tmp_path):
    folder, trap = copy("cifar100"), tmp_path / "trap"

    class Evil:
        def __reduce__(self):
            return (Path(trap).touch, ())

    (folder / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Evil(), "fine_labels": [0]}, 2))
    assert "could run code" in refusal("cifar100", folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar100", "cifar-100-python/train"),
        ("fashion_mnist", "train-images-idx3-ubyte.gz"),
        ("fashion_mnist", "t10k-labels-idx1-ubyte.gz"),
        ("cub200", "CUB_200_2011/images.txt"),
        ("cub200", "CUB_200_2011/train_test_split.txt"),
        ("flowers102", "imagelabels.mat"),
        ("flowers102", "setid.mat"),
        ("cars", "cars_annos.mat"),
        ("cars_devkit", "devkit/cars_train_annos.mat"),
        ("dogs", "test_list.mat"),
        ("vtab.dtd", "train800.txt"),
    ],
)
def test_a_damaged_list_gives_one_line_that_names_it(copy, name, file):
    folder = copy(name)
    content = (folder / file).read_bytes()
    noise = np.random.default_rng(0).bytes(len(content))
    for damaged in (b"", content[: len(content) // 2 - 3], noise, None):
        (folder / file).unlink()
        if damaged is not None:
            (folder / file).write_bytes(damaged)
        message = refusal(name, folder)
        assert Path(file).name in message or "cars_meta.mat" in message  # the other layout of Stanford Cars is tried
        assert "tocom data fetch" in message


@pytest.mark.parametrize("name", ["cub200", "flowers102", "cars", "cars_devkit", "dogs", "vtab.dtd"])
def test_an_image_that_is_missing_is_named(copy, name):
    folder = copy(name)
    gone = read(name, folder).splits["test"].files[1]
    gone.unlink()
    assert str(gone) in refusal(name, folder)


def test_numbers_that_lead_nowhere_are_refused(copy):
    folder = copy("cub200")
    lists = folder / "CUB_200_2011" / "train_test_split.txt"
    lists.write_text("\n".join(lists.read_text().splitlines()[:-1]) + "\n")
    assert "no label or split" in refusal("cub200", folder)
    folder = copy("flowers102")
    sets = {key: value for key, value in loadmat(folder / "setid.mat").items() if not key.startswith("_")}
    for number in (0, 9000):
        savemat(folder / "setid.mat", sets | {"valid": np.array([[1, number]])})
        assert "setid.mat" in refusal("flowers102", folder)


# --- VTAB-1k


def test_a_vtab_task_of_another_size_gives_a_warning_and_lists_that_share_an_image_are_refused(copy):
    folder = copy("vtab.dtd")
    with pytest.warns(UserWarning, match=r"24 \+ 12 images, not VTAB-1k's 800 \+ 200"):
        read("vtab.dtd", folder)
    train, val = ((folder / vtab.LISTS[split]).read_text() for split in ("train", "val"))
    (folder / vtab.LISTS["val"]).write_text(val + train.splitlines()[0] + "\n")
    assert "share images" in refusal("vtab.dtd", folder)


def test_all_vtab_tasks_are_found_in_one_archive(tmp_path):
    """As the real catalogue has it: vtab.X has the same files as vtab-1k."""
    names = ("vtab.dtd", "vtab.svhn")
    for name in names:
        layouts.make_archives(name, tmp_path / "made")
        shutil.unpack_archive(tmp_path / "made" / f"{name}.zip", tmp_path / "all" / name.removeprefix("vtab."))
    files = [path for path in sorted((tmp_path / "all").rglob("*")) if path.is_file()]
    members = {f"vtab-1k/{path.relative_to(tmp_path / 'all').as_posix()}": path.read_bytes() for path in files}
    layouts.write_zip(tmp_path / "vtab-1k.zip", members)
    made = {"files": {"vtab-1k.zip": "."}, "family": "collection", "classes": 1, "truth": {"train": [0]}}
    whole = layouts.entry_of(made | {"name": "vtab-1k", "group": "VTAB-1k natural"}, tmp_path, tmp_path.as_uri())
    shared = {key: value for key, value in whole.items() if key not in ("files", "unpacked_mb")}
    shared |= {"family": "vtab", "classes": 4, "same_files_as": "vtab-1k"}
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(yaml.safe_dump({"vtab-1k": whole} | dict.fromkeys(names, shared)))
    fetch("vtab.svhn", tmp_path / "data", catalogue)
    for name in names:
        assert len(load_listing(name, tmp_path / "data", catalogue).splits["val"]) == 12


# --- ImageNet-1k


def test_a_flat_validation_folder_gets_its_labels_from_the_development_kit(copy):
    folder = copy("imagenet1k")
    expected = read("imagenet1k", folder).splits["test"]
    # The kit numbers its classes in another order than the alphabet, and has synsets that are no classes.
    numbers = {wnid: 4 - place for place, wnid in enumerate(layouts.WNIDS)}
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in numbers.items()]
    rows.append((1001, "n00000001", "root", "all", 4))
    kit = folder / imagenet.DEVKIT
    kit.mkdir(parents=True)
    synsets = layouts.struct(rows, "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    savemat(kit / "meta.mat", {"synsets": synsets})
    order = np.random.default_rng(0).permutation(len(expected))
    lines = []
    for place, index in enumerate(order, start=1):
        file = expected.files[index]
        lines.append(str(numbers[file.parent.name]))
        file.rename(folder / "val" / f"ILSVRC2012_val_{place:08d}.JPEG")
    for wnid in layouts.WNIDS:
        (folder / "val" / wnid).rmdir()
    assert "ILSVRC2012_devkit_t12.tar.gz" in refusal("imagenet1k", folder)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("\n".join(lines) + "\n")
    found = read("imagenet1k", folder).splits["test"]
    assert found.labels.tolist() == expected.labels[order].tolist() == seen(found)
    (folder / "train" / layouts.WNIDS[0]).rename(folder / "train" / "n99999999")
    assert layouts.WNIDS[0] in refusal("imagenet1k", folder)
    (folder / "train" / "n99999999").rename(folder / "train" / layouts.WNIDS[0])
    truth.write_text("\n".join(lines[:-1]) + "\n")
    assert "has 11 lines for the 12 images" in refusal("imagenet1k", folder)


def write_shards(folder, split, images, labels, count):
    """Write parquet files as the Hub has them, with images {"bytes", "path"} and labels."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    for shard in range(count):
        rows = range(shard, len(images), count)
        data = {
            "image": [{"bytes": images[row], "path": f"{split}_{row}.JPEG"} for row in rows],
            "label": [labels[row] for row in rows],
        }
        pyarrow.parquet.write_table(pa.table(data), folder / f"{split}-{shard:05d}-of-{count:05d}.parquet")


@pytest.fixture
def parquet(tmp_path):
    train = [(layouts.picture(label, index), label * 7) for label in range(4) for index in range(5)]
    val = [(layouts.picture(label, 9), label * 7) for label in range(4)]
    for split, rows, count in (("train", train, 3), ("validation", val, 1)):
        write_shards(tmp_path / "parquet", split, *zip(*rows, strict=True), count)
    return tmp_path / "parquet"


def test_parquet_files_are_unpacked_byte_for_byte_with_their_labels(parquet, tmp_path):
    command = ["unpack-imagenet", str(parquet), str(tmp_path / "imagenet")]
    assert CliRunner().invoke(data, command, catch_exceptions=False).exit_code == 0
    listing = imagenet.listing(tmp_path / "imagenet", "imagenet1k")
    assert listing.classes == 22  # labels are numbers: those of classes without images are not given to others
    assert np.unique(listing.splits["train"].labels).tolist() == [0, 7, 14, 21]
    contents = {file.read_bytes() for file in listing.splits["train"].files}
    assert contents == {layouts.picture(label, index) for label in range(4) for index in range(5)}
    assert [label * 7 for label in seen(listing.splits["test"])] == [0, 7, 14, 21]
    with pytest.raises(TocomError, match="exists"):
        imagenet.unpack_parquet(parquet, tmp_path / "imagenet")


def test_a_full_disk_while_unpacking_leaves_only_whole_images_and_the_same_call_goes_on(parquet, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    write_shards(parquet, "validation", [layouts.picture(0, 0), layouts.encode(noise, "PNG")], [0, 7], 1)  # 120 kB
    with file_limit(50_000), pytest.raises(TocomError, match="cannot write "):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = [path.name for path in (tmp_path / "out.part" / "val").rglob("*") if path.is_file()]
    assert names == ["validation-00000-of-00001-000000.JPEG"]
    shards, rows = [], imagenet._rows
    monkeypatch.setattr(imagenet, "_rows", lambda shard: shards.append(shard.name) or rows(shard))
    imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert shards == ["validation-00000-of-00001.parquet"]
    splits = imagenet.listing(tmp_path / "out", "imagenet1k").splits
    assert {split: len(items) for split, items in splits.items()} == {"train": 20, "test": 2}


def test_missing_or_broken_shards_are_refused(parquet, tmp_path):
    shard = parquet / "train-00001-of-00003.parquet"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(TocomError, match=r"has 2 of 3 train-\*\.parquet"):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    shard.write_bytes(content[:-20])
    with pytest.raises(TocomError, match="train-00001"):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    write_shards(parquet, "validation", [layouts.picture(0, 0)], [-1], 1)
    shard.write_bytes(content)
    with pytest.raises(TocomError, match="no label"):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert not (tmp_path / "out").exists()
