"""Every family: fetched from a local server, checked, read, decoded, and trained on for one step."""

import gzip
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tests.data import layouts
from tests.data.disk import file_limit
from tests.data.server import serve
from tocom.data.catalogue import read_catalogue
from tocom.data.families import FAMILIES, imagenet, load_listing, vtab
from tocom.data.fetch import check, fetch
from tocom.data.listing import with_validation
from tocom.errors import TocomError

#: One of each family, and both layouts of Stanford Cars.
NAMES = ("cifar100", "cub200", "flowers102", "cars", "cars_devkit", "dogs", "imagenet1k", "vtab.dtd")


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

    def make(name: str) -> Path:
        return Path(shutil.copytree(world[0] / name, tmp_path / name))

    return make


def load(name: str, root: Path, catalogue: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the small VTAB-1k
        return load_listing(name, root, catalogue)


def pixels(items, size: int = 32) -> np.ndarray:
    from tocom.data.images import decode

    return decode(items.files if items.arrays is None else items.arrays, size)


@pytest.mark.parametrize("name", NAMES)
def test_a_fetched_data_set_has_the_labels_and_images_that_were_put_in(world, name):
    root, catalogue, truth = world
    check(name, root, catalogue)
    listing = load(name, root, catalogue)
    assert {split: items.labels.tolist() for split, items in listing.splits.items()} == truth[name]
    assert listing.classes == layouts.CLASSES
    assert listing.group == read_catalogue(catalogue)[name].group
    for items in listing.splits.values():
        assert [layouts.label_of(image) for image in pixels(items)] == items.labels.tolist()
        if items.files is not None:
            assert len(set(items.files)) == len(items)


@pytest.mark.parametrize("name", NAMES)
def test_one_training_step_on_a_fetched_data_set_moves_every_weight(world, name):
    import torch
    from torch.nn import functional as F

    from tests.small import build

    train = with_validation(load(name, *world[:2]), 0.3).splits["train"].take(np.arange(0, 12, 2))
    images = torch.from_numpy(pixels(train)).float().div(127.5).sub(1)
    model = build(num_classes=layouts.CLASSES).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(images), torch.from_numpy(train.labels))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters())


def test_ade20k_is_fetched_checked_read_and_trained_on_for_one_step(world, tmp_path):
    import torch

    from tests.small import ARCHITECTURE, KWARGS, build
    from tocom.models import save_model
    from tocom.segmentation.data import load as load_prepared
    from tocom.segmentation.data import prepare
    from tocom.segmentation.model import load as load_segmenter
    from tocom.segmentation.settings import SegmentationSizes, SegmentationTraining
    from tocom.segmentation.stage import train

    root, catalogue, truth = world
    assert check("ade20k", root, catalogue).count == 2 * 24 + 2 * 12 + 1
    prepare("ade20k", tmp_path / "task", 32, SegmentationSizes(val=8), root / "ade20k")
    splits = load_prepared(tmp_path / "task").splits
    assert sorted(path.stem for split in ("train", "val") for path in splits[split].images) == truth["ade20k"]["train"]
    assert [path.stem for path in splits["test"].images] == truth["ade20k"]["test"]
    for index in range(12):
        image, labels = splits["test"][index]
        assert (labels[:, :14] == layouts.label_of(image[:, :, :14])).all()
        assert (labels[:, 18:] == 255).all()
    save_model(tmp_path / "backbone", build(), ARCHITECTURE, KWARGS)
    heads = []
    for epochs in (1, 2):  # 16 images: one step an epoch
        settings = SegmentationTraining(epochs=epochs, batch_size=16, lr=1e-2, device="cpu")
        path = tmp_path / f"{epochs}.safetensors"
        train(tmp_path / "backbone", tmp_path / "task", path, 0, 0, settings=settings)
        heads.append(load_segmenter(path)[0].head.weight)
    assert all(torch.isfinite(head).all() for head in heads)
    assert not torch.equal(*heads)


def test_every_family_is_tested_and_every_entry_has_a_reader():
    entries = read_catalogue(None)
    assert set(FAMILIES) <= {entry.family for entry in entries.values()}
    assert {entry.family for entry in entries.values()} - set(FAMILIES) == {"ade20k", "collection", "source"}
    assert {name for name in NAMES if "." not in name} <= set(entries)
    assert set(layouts.GROUP_OF) == {name for name in entries if name.startswith("vtab.")}
    assert all(entries[name].group == group for name, group in layouts.GROUP_OF.items())


def test_the_bundled_catalogue_names_a_checksum_for_every_file_but_one():
    without = [name for name, entry in read_catalogue(None).items() if any(not f.checksum for f in entry.files)]
    assert without == ["vtab-1k"]


@pytest.mark.parametrize(("name", "what"), [("source.dtd", "build-vtab"), ("vtab-1k", "vtab.dtd"), ("ade20k", "segm")])
def test_what_is_no_task_is_refused_and_says_what_to_do(tmp_path, name, what):
    with pytest.raises(TocomError, match=what):
        load_listing(name, tmp_path)


def test_a_data_set_that_was_not_fetched_is_refused_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(TocomError, match="tocom data fetch cub200"):
        load_listing("cub200", tmp_path)


def test_another_number_of_classes_than_the_catalogues_is_refused(world, tmp_path):
    root, catalogue, _ = world
    other = tmp_path / "other.yaml"
    other.write_text(catalogue.read_text().replace("classes: 4", "classes: 3"))
    with pytest.raises(TocomError, match=r"holds 4 classes, not the 3 of cub200"):
        load("cub200", root, other)
    with pytest.raises(TocomError, match=r"outside 0\.\.2"):
        load("vtab.dtd", root, other)
    other.write_text(catalogue.read_text().replace("classes: 4", "classes: 5"))
    assert load("vtab.dtd", root, other).classes == 5  # its lists need not show all classes
    with pytest.raises(TocomError, match=r"holds 4 classes, not the 5 of imagenet1k"):
        load("imagenet1k", root, other)


# --- registered where it lies


@pytest.fixture
def mine(copy, tmp_path, world):
    """Return a function that registers a folder as a data set, and the catalogue's path."""

    def register(name: str, folder: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return fetch(name, tmp_path / "data", world[1], source=folder)

    return register


@pytest.mark.parametrize("name", [*NAMES, "ade20k"])
def test_what_is_unpacked_already_is_read_and_registered(copy, mine, name):
    folder = copy(name)
    assert mine(name, folder) == folder


def test_a_check_of_a_registered_folder_reads_its_lists(copy, mine, world, tmp_path):
    folder = mine("cub200", copy("cub200"))
    check("cub200", tmp_path / "data", world[1])
    (folder / "CUB_200_2011" / "images.txt").rename(folder / "CUB_200_2011" / "IMAGES.TXT")
    with pytest.raises(TocomError, match=r"images\.txt is missing"):
        check("cub200", tmp_path / "data", world[1])


@pytest.mark.parametrize("name", [*NAMES, "ade20k"])
def test_a_folder_with_anything_else_is_not_registered(mine, tmp_path, name):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "CUB_200_2011 (1).tgz").write_bytes(b"an archive by another name")
    (downloads / "paper.pdf").write_bytes(b"%PDF")
    with pytest.raises(TocomError, match=f"downloads is not {name} as it is unpacked, nor does it hold ") as caught:
        mine(name, downloads)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_an_imagenet_without_some_class_folders_is_not_registered(copy, mine):
    folder = copy("imagenet1k")
    for split in ("train", "val"):
        shutil.rmtree(folder / split / layouts.WNIDS[1])
    with pytest.raises(TocomError, match="holds 3 classes, not the 4 of imagenet1k"):
        mine("imagenet1k", folder)


def test_of_vtab_the_tasks_that_are_there_are_registered_and_others_named_with_what_builds_them(copy, tmp_path):
    folder = copy("vtab.dtd")
    (tmp_path / "vtab").mkdir()
    folder.rename(tmp_path / "vtab" / "dtd")
    for wrong, message in ((tmp_path / "vtab" / "dtd", "is that of one task"), (Path(layouts.__file__).parent, "none")):
        with pytest.raises(TocomError, match=message):
            fetch("vtab-1k", tmp_path / "data", source=wrong)
    with pytest.warns(UserWarning, match="not VTAB-1k's"):
        fetch("vtab-1k", tmp_path / "data", source=tmp_path / "vtab")
    with pytest.raises(TocomError) as caught:
        load_listing("vtab.cifar", tmp_path / "data")
    assert "holds no cifar/train800.txt (`tocom data build-vtab cifar` builds it)" in str(caught.value)
    assert "delete" not in str(caught.value)
    (tmp_path / "vtab" / "dtd" / vtab.LISTS["val"]).unlink()
    with pytest.raises(TocomError, match=r"val200\.txt is missing; mend the folder or, if it was downloaded, run"):
        fetch("vtab-1k", tmp_path / "data", source=tmp_path / "vtab", force=True)


def read(name: str, folder: Path):
    from importlib import import_module

    family = {"cifar100": "cifar", "cub200": "cub", "flowers102": "flowers", "cars_devkit": "cars"}.get(name, name)
    return import_module(f"tocom.data.families.{family.partition('.')[0]}").listing(folder, name)


def read_quietly(name: str, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return read(name, folder)


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(TocomError) as caught:
        read_quietly(name, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(copy, tmp_path):
    folder, trap = copy("cifar100"), tmp_path / "trap"

    class Evil:
        def __reduce__(self):
            return (Path(trap).touch, ())

    (folder / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Evil(), "fine_labels": [0]}, 2))
    message = refusal("cifar100", folder)
    assert "could run code" in message
    assert not trap.exists()


def test_the_pickle_of_a_newer_numpy_is_read_as_well(copy):
    folder = copy("cifar100")
    data = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    (folder / "cifar-100-python" / "test").write_bytes(pickle.dumps({"data": data, "fine_labels": [1, 0]}))
    assert np.array_equal(read("cifar100", folder).splits["test"].arrays.reshape(2, 3072), data)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar100", "cifar-100-python/train"),
        ("cifar100", "cifar-100-python/meta"),
        ("cub200", "CUB_200_2011/images.txt"),
        ("cub200", "CUB_200_2011/image_class_labels.txt"),
        ("cub200", "CUB_200_2011/train_test_split.txt"),
        ("flowers102", "imagelabels.mat"),
        ("flowers102", "setid.mat"),
        ("cars", "cars_annos.mat"),
        ("cars_devkit", "devkit/cars_train_annos.mat"),
        ("cars_devkit", "cars_test_annos_withlabels.mat"),
        ("dogs", "train_list.mat"),
        ("dogs", "test_list.mat"),
        ("vtab.dtd", "train800.txt"),
        ("vtab.dtd", "test.txt"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_damaged_list_gives_one_line_that_names_it(copy, name, file, damage):
    folder = copy(name)
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2 - 3])
    else:
        path.write_bytes(b"" if damage == "empty" else np.random.default_rng(0).bytes(len(content)))
    message = refusal(name, folder)
    assert Path(file).name in message or "cars_meta.mat" in message  # the other layout of Stanford Cars is tried
    assert "tocom data fetch" in message


@pytest.mark.parametrize("name", ["cub200", "flowers102", "cars", "cars_devkit", "dogs", "vtab.dtd"])
def test_an_image_that_is_missing_is_named(copy, name):
    folder = copy(name)
    gone = read_quietly(name, folder).splits["test"].files[1]
    gone.unlink()
    assert str(gone) in refusal(name, folder)


def test_a_bird_without_a_split_is_refused(copy):
    folder = copy("cub200")
    lists = folder / "CUB_200_2011" / "train_test_split.txt"
    lists.write_text("\n".join(lists.read_text().splitlines()[:-1]) + "\n")
    assert "no label or split" in refusal("cub200", folder)


def test_flower_numbers_outside_the_labels_are_refused(copy):
    folder = copy("flowers102")
    sets = {key: value for key, value in loadmat(folder / "setid.mat").items() if not key.startswith("_")}
    for number in (0, 9000):
        savemat(folder / "setid.mat", sets | {"valid": np.array([[1, number]])})
        assert "setid.mat" in refusal("flowers102", folder)


def test_cars_are_found_in_the_doubled_folders_of_one_public_copy(copy):
    folder = copy("cars_devkit")
    expected = read("cars_devkit", folder).splits["train"]
    (folder / "cars_train").rename(folder / "inner")
    (folder / "cars_train").mkdir()
    (folder / "inner").rename(folder / "cars_train" / "cars_train")
    found = read("cars_devkit", folder).splits["train"]
    assert [file.name for file in found.files] == [file.name for file in expected.files]


# --- VTAB-1k


def test_a_small_vtab_task_is_read_with_a_warning_that_tells_its_size(copy):
    with pytest.warns(UserWarning, match=r"24 \+ 12 images, not VTAB-1k's 800 \+ 200"):
        read("vtab.dtd", copy("vtab.dtd"))


def test_a_vtab_task_of_the_right_size_gives_no_warning(tmp_path, recwarn):
    rows = [f"images/{number}.jpg {number % 3}" for number in range(1010)]
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / row.split()[0]).touch()
    lists = {vtab.LISTS["train"]: rows[:800], vtab.LISTS["val"]: rows[800:1000], vtab.LISTS["test"]: rows[1000:]}
    for file, lines in (lists | {vtab.UNION: rows[:1000][::-1]}).items():
        (tmp_path / file).write_text("\n".join(lines))
    listing = vtab.listing(tmp_path, "vtab.dtd")
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 800, "val": 200, "test": 10}
    assert listing.classes == 3
    assert not recwarn.list


def test_vtab_lists_that_share_an_image_or_do_not_add_up_are_refused(copy):
    folder = copy("vtab.dtd")
    train, val = (folder / vtab.LISTS[split] for split in ("train", "val"))
    original = val.read_text()
    val.write_text(original + train.read_text().splitlines()[0] + "\n")
    assert "share images" in refusal("vtab.dtd", folder)
    val.write_text("\n".join(original.splitlines()[:-1]))
    assert "is not the union" in refusal("vtab.dtd", folder)
    # A list of the same images, not of copies, is compared by paths.
    val.write_text(original)
    both = (train.read_text() + original).splitlines()
    (folder / vtab.UNION).write_text("\n".join(both[::-1]))
    assert len(read_quietly("vtab.dtd", folder).splits["val"]) == 12
    (folder / vtab.UNION).write_text("\n".join(both[:-1] + both[:1]))
    assert "is not the union" in refusal("vtab.dtd", folder)


def test_a_vtab_list_of_copies_with_other_labels_gives_a_warning(copy):
    folder = copy("vtab.dtd")
    lines = (folder / vtab.UNION).read_text().splitlines()
    lines[0] = f"{lines[0].split()[0]} 3"
    (folder / vtab.UNION).write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read("vtab.dtd", folder)
    assert sum("has other labels" in str(warning.message) for warning in caught) == 1


def test_a_vtab_path_may_hold_blanks(copy):
    folder = copy("vtab.dtd")
    for file in (*vtab.LISTS.values(), vtab.UNION):
        (folder / file).write_text((folder / file).read_text().replace("images/", "all images/"))
    (folder / "images").rename(folder / "all images")
    assert len(read_quietly("vtab.dtd", folder).splits["test"]) == 12


def test_all_vtab_tasks_are_found_in_one_archive(tmp_path):
    """As the real catalogue has it: vtab.X has the same files as vtab-1k."""
    import yaml

    names = ("vtab.dtd", "vtab.svhn")
    members = {}
    for name in names:
        layouts.make_archives(name, tmp_path / "made")
        shutil.unpack_archive(tmp_path / "made" / f"{name}.zip", tmp_path / "all" / name.removeprefix("vtab."))
    for path in sorted((tmp_path / "all").rglob("*")):
        if path.is_file():
            members[f"vtab-1k/{path.relative_to(tmp_path / 'all').as_posix()}"] = path.read_bytes()
    layouts.write_zip(tmp_path / "vtab-1k.zip", members)
    made = {"files": {"vtab-1k.zip": "."}, "family": "collection", "classes": 1, "truth": {"train": [0]}}
    with serve(tmp_path) as server:
        whole = layouts.entry_of(made | {"name": "vtab-1k", "group": "VTAB-1k natural"}, tmp_path, server.base)
        shared = {key: value for key, value in whole.items() if key not in ("files", "unpacked_mb")}
        shared |= {"family": "vtab", "classes": 4, "same_files_as": "vtab-1k"}
        catalogue = tmp_path / "catalogue.yaml"
        catalogue.write_text(yaml.safe_dump({"vtab-1k": whole} | dict.fromkeys(names, shared)))
        fetch("vtab.svhn", tmp_path / "data", catalogue)
    for name in names:
        assert len(load(name, tmp_path / "data", catalogue).splits["val"]) == 12


# --- ImageNet-1k


def test_a_flat_validation_folder_gets_its_labels_from_the_development_kit(copy):
    folder = copy("imagenet1k")
    expected = read_quietly("imagenet", folder).splits["test"]
    # The kit numbers its classes in another order than the alphabet, and has synsets that are no classes.
    numbers = {wnid: 4 - place for place, wnid in enumerate(layouts.WNIDS)}
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in numbers.items()]
    fields = [(field, object) for field in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    kit = folder / imagenet.DEVKIT
    kit.mkdir(parents=True)
    savemat(kit / "meta.mat", {"synsets": np.array([*rows, (1001, "n00000001", "root", "all", 4)], dtype=fields)})
    order = np.random.default_rng(0).permutation(len(expected))
    lines = []
    for place, index in enumerate(order, start=1):
        file = expected.files[index]
        lines.append(str(numbers[file.parent.name]))
        file.rename(folder / "val" / f"ILSVRC2012_val_{place:08d}.JPEG")
    for wnid in layouts.WNIDS:
        (folder / "val" / wnid).rmdir()
    assert "ILSVRC2012_devkit_t12.tar.gz" in refusal("imagenet", folder)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("\n".join(lines) + "\n")
    found = read("imagenet", folder).splits["test"]
    assert found.labels.tolist() == expected.labels[order].tolist()
    assert [layouts.label_of(image) for image in pixels(found)] == found.labels.tolist()
    truth.write_text("\n".join(lines[:-1]) + "\n")
    assert "has 11 lines for the 12 images" in refusal("imagenet", folder)


def test_a_validation_class_that_training_lacks_is_refused(copy):
    folder = copy("imagenet1k")
    (folder / "val" / layouts.WNIDS[0]).rename(folder / "val" / "n99999999")
    assert "n99999999" in refusal("imagenet", folder)


def write_shards(folder: Path, split: str, images: list[bytes], labels: list[int], count: int) -> None:
    """Write parquet files as the Hub has them, through the library that the Hub's are written with."""
    from datasets import ClassLabel, Dataset, Features, Image

    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=1000)})
    for shard in range(count):
        rows = range(shard, len(images), count)
        data = {
            "image": [{"bytes": images[row], "path": f"{split}_{row}.JPEG"} for row in rows],
            "label": [labels[row] for row in rows],
        }
        name = f"{split}-{shard:05d}-of-{count:05d}.parquet"
        Dataset.from_dict(data, features=features).to_parquet(folder / name)


@pytest.fixture
def parquet(tmp_path):
    train = [(layouts.picture(label, index), label * 7) for label in range(4) for index in range(5)]
    val = [(layouts.picture(label, 9), label * 7) for label in range(4)]
    for split, rows, count in (("train", train, 3), ("validation", val, 1)):
        write_shards(tmp_path / "parquet", split, [row[0] for row in rows], [row[1] for row in rows], count)
    return tmp_path / "parquet"


def test_parquet_files_are_unpacked_byte_for_byte_with_their_labels(parquet, tmp_path):
    folder = imagenet.unpack_parquet(parquet, tmp_path / "imagenet")
    listing = imagenet.listing(folder, "imagenet1k")
    assert listing.classes == 22  # labels are numbers: those of classes without images are not given to others
    assert np.bincount(listing.splits["train"].labels).nonzero()[0].tolist() == [0, 7, 14, 21]
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 20, "test": 4}
    contents = {file.read_bytes() for file in listing.splits["train"].files}
    assert contents == {layouts.picture(label, index) for label in range(4) for index in range(5)}
    assert [layouts.label_of(image) * 7 for image in pixels(listing.splits["test"])] == [0, 7, 14, 21]
    with pytest.raises(TocomError, match="exists"):
        imagenet.unpack_parquet(parquet, tmp_path / "imagenet")


def test_an_interrupted_unpacking_goes_on_where_it_was(parquet, tmp_path, monkeypatch):
    seen, rows = [], imagenet._rows

    def cut(shard):
        seen.append(shard.name)
        for number, row in enumerate(rows(shard)):
            if len(seen) == 2 and number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(imagenet, "_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert seen[2:] == seen[1:2] + ["train-00002-of-00003.parquet", "validation-00000-of-00001.parquet"]
    assert len(imagenet.listing(tmp_path / "out", "imagenet1k").splits["train"]) == 20
    assert not list((tmp_path / "out" / "train").rglob(".*"))


def test_a_full_disk_while_unpacking_leaves_only_whole_images_and_the_same_call_goes_on(parquet, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    write_shards(parquet, "validation", [layouts.picture(0, 0), layouts.encode(noise, "PNG")], [0, 7], 1)  # 120 kB
    with file_limit(50_000), pytest.raises(TocomError, match="cannot write .*free some space or choose another folder"):
        imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = [path.name for path in (tmp_path / "out.part" / "val").rglob("*") if path.is_file()]
    assert names == ["validation-00000-of-00001-000000.JPEG"]
    imagenet.unpack_parquet(parquet, tmp_path / "out")
    assert len(imagenet.listing(tmp_path / "out", "imagenet1k").splits["test"]) == 2


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


# --- the layouts themselves


def test_the_small_cifar_has_the_opcodes_of_python_2():
    """torchvision reads the real files with encoding="latin1"; so it must be with these."""
    content = pickle.loads(layouts.python2_pickle({"data": np.eye(2, dtype=np.uint8), "x": ["a"]}), encoding="latin1")
    assert np.array_equal(content["data"], np.eye(2))
    raw = layouts.python2_pickle({"data": np.eye(2, dtype=np.uint8)})
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert pickle.loads(raw, encoding="bytes").keys() == {b"data"}


def test_torchvision_reads_the_small_cars(world):
    from torchvision.datasets import StanfordCars

    root, _, truth = world
    base = root / "as_torchvision" / "stanford_cars"
    base.parent.mkdir(exist_ok=True)
    base.symlink_to(root / "cars_devkit")
    for split in ("train", "test"):
        assert [label for _, label in StanfordCars(base.parent, split)] == truth["cars_devkit"][split]


def test_archives_are_of_the_kinds_that_their_names_say(tmp_path):
    for name in NAMES:
        layouts.make_archives(name, tmp_path)
    assert tarfile.is_tarfile(tmp_path / "CUB_200_2011.tgz")
    with gzip.open(tmp_path / "102flowers.tgz") as stream:
        assert stream.read(3) == b"jpg"
