"""Every task of VTAB-1k, built from a small copy of its source in the source's own layout."""

import gzip
import hashlib
import json
import struct
import tarfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from tests.data import layouts
from tests.data.disk import file_limit
from tests.data.layouts import draw, encode, picture
from tests.data.server import serve
from tocom.data import vtab_build
from tocom.data.catalogue import BUNDLED
from tocom.data.families import vtab
from tocom.data.fetch import fetch
from tocom.data.vtab_build import TASKS, build
from tocom.errors import TocomError

SIZES = (8, 3)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- the sources, each with images whose colour or pixels tell the label


def make_caltech101(folder: Path) -> None:
    names = ("BACKGROUND_Google", "Faces", "accordion")  # in lower case: accordion, background_google, faces
    labels = {"accordion": 0, "BACKGROUND_Google": 1, "Faces": 2}
    inner = {
        f"101_ObjectCategories/{name}/image_{index:04d}.jpg": picture(labels[name], index)
        for name in names
        for index in range(1, 36)
    }
    inner |= {"101_ObjectCategories/BACKGROUND_Google/tmp": b"x", "101_ObjectCategories/Faces/._image_0001.jpg": b"x"}
    layouts.write_tar(put(folder / "caltech-101" / "101_ObjectCategories.tar.gz", b""), inner)


def unpacked(name: str):
    def make(folder: Path) -> None:
        made = layouts.make_archives(name, folder)
        for file, place in made["files"].items():
            if place is not None:
                with tarfile.open(folder / file) as archive:
                    archive.extractall(folder / place, filter="data")

    return make


def make_dtd(folder: Path) -> None:
    rows = {"train": [], "val": [], "test": []}
    for split, label, index in layouts.numbered("train", "val", "test"):
        name = f"texture{label}/texture{label}_{index:04d}.jpg"
        put(folder / "dtd" / "dtd" / "images" / name, picture(label, index))
        rows[split].append(name)
    for split, names in rows.items():
        put(folder / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(names).encode())


def make_oxford_iiit_pet(folder: Path) -> None:
    rows = {"train": [], "test": []}
    for split, label, index in layouts.numbered("train", "test"):
        put(folder / "oxford-iiit-pet" / "images" / f"Breed{label}_{index}.jpg", picture(label, index))
        rows[split].append(f"Breed{label}_{index} {label + 1} {label % 2 + 1} 1")
    for split, file in (("train", "trainval"), ("test", "test")):
        put(folder / "oxford-iiit-pet" / "annotations" / f"{file}.txt", "\n".join(rows[split]).encode())


def make_svhn(folder: Path) -> None:
    for split in ("train", "test"):
        items = [(label, index) for which, label, index in layouts.numbered("train", "test") if which == split]
        images = np.stack([draw(label, index, (32, 32)) for label, index in items], axis=-1)
        labels = np.array([[label or 10] for label, _ in items], dtype=np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        savemat(folder / f"{split}_32x32.mat", {"X": images, "y": labels})


def make_sun397(folder: Path) -> None:
    names = ("a/abbey", "b/bow_window/indoor", "b/bow_window/outdoor", "z/zoo")
    put(folder / "SUN397" / "ClassName.txt", "\n".join(f"/{name}" for name in names).encode())
    for _, label, index in layouts.numbered("train", "test"):
        put(folder / "SUN397" / names[label] / f"sun_{label}{index:06d}.jpg", picture(label, index))


def make_patch_camelyon(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (folder / "pcam").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        labels = np.arange(16) % 2
        images = np.stack([draw(label, index, (96, 96)) for index, label in enumerate(labels)])
        for part, key, array in (("x", "x", images), ("y", "y", labels.reshape(-1, 1, 1, 1).astype(np.uint8))):
            with h5py.File(folder / "pcam" / f"camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
                file[key] = array


def in_folders(*parts: str):
    def make(folder: Path) -> None:
        for _, label, index in layouts.numbered("train", "test"):
            put(folder.joinpath(*parts, f"class_{label}", f"class_{label}_{index}.jpg"), picture(label, index))

    return make


def make_clevr(folder: Path) -> None:
    folder = folder / "clevr" / "CLEVR_v1.0"
    random = np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 8)):
        scenes = []
        for number in range(n):
            # Distances in the middle of the bins, the closest decides: 7.75, 8.25, 8.75, 9.25, 9.75, 10.25
            count, closest = 3 + number % 8, 7.75 + number % 6 * 0.5
            distances = random.permutation([closest, *random.uniform(closest, 14, count - 1)])
            objects = [{"pixel_coords": [100, 100, distance], "shape": "cube"} for distance in distances]
            name = f"CLEVR_{split}_{number:06d}.png"
            scenes.append({"image_filename": name, "objects": objects})
            # The colour tells both labels: red the count, green the bin.
            image = np.full((32, 48, 3), (number % 8 * 10, number % 6 * 10, 0), dtype=np.uint8)
            put(folder / "images" / split / name, encode(image, "PNG"))
        put(folder / "scenes" / f"CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes[::-1]}).encode())


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def example(packed: bool, features: dict[str, int | bytes]) -> bytes:
    """Serialise a tf.train.Example by the definition of protocol buffers."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, int):
            feature = field(3, field(1, varint(value)) if packed else varint(1 << 3) + varint(value))
        else:
            feature = field(1, field(1, value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def record(content: bytes) -> bytes:
    return struct.pack("<QI", len(content), 0) + content + struct.pack("<I", 0)


def make_dmlab(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        for shard in range(2):
            items = [(label, 2 * shard + index) for label in range(4) for index in range(2)]
            records = [
                record(example(index % 2 == 0, {"image": picture(label, index), "filename": b"f.jpg", "label": label}))
                for label, index in items
            ]
            put(folder / f"dmlab-{split}.tfrecord-0000{shard}-of-00002", b"".join(records))


def make_kitti(folder: Path) -> None:
    raw = folder / "Kitti" / "raw" / "training"
    random = np.random.default_rng(0)
    n, per_drive = 60, 3
    numbers = random.permutation(n)  # the images are a shuffle of the drives' frames
    for image, frame in enumerate(numbers):
        label = int(frame % 4)
        put(raw / "image_2" / f"{image:06d}.png", encode(draw(label, int(frame)), "PNG"))
        near = (4.0, 12.0, 40.0)
        vehicles = [] if label == 3 else [("Van", near[label]), ("Car", near[label] + 9)]
        others = [("Pedestrian", 2.0), ("DontCare", -1000.0), ("Tram", 3.0)]
        lines = [f"{kind} 0.0 0 0.1 1 1 9 9 1.5 1.6 3.7 0.5 1.6 {z} 0.2" for kind, z in vehicles + others]
        put(raw / "label_2" / f"{image:06d}.txt", "\n".join(lines).encode())
    mapping = [f"2011_09_26 2011_09_26_drive_{frame // per_drive:04d}_sync {frame:010d}" for frame in range(n)]
    put(folder / "devkit" / "mapping" / "train_mapping.txt", "\n".join(mapping).encode())
    put(folder / "devkit" / "mapping" / "train_rand.txt", ",".join(str(frame + 1) for frame in numbers).encode())


def make_dsprites(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True)
    classes = np.array([(0, 0, 0, orientation, x, 0) for orientation in range(40) for x in range(0, 32, 5)])
    images = np.zeros((len(classes), 64, 64), dtype=np.uint8)
    for image, row in zip(images, classes, strict=True):
        image[row[3], row[4]] = 1  # the one white pixel tells orientation (its row) and place (its column)
    with h5py.File(folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5", "w") as file:
        file["imgs"] = images
        file["latents/classes"] = classes


def norb(array: np.ndarray) -> bytes:
    magic = {np.dtype(np.uint8): 0x1E3D4C55, np.dtype(np.int32): 0x1E3D4C54}[array.dtype]
    sizes = (*array.shape, *[1] * max(0, 3 - array.ndim))
    return struct.pack(f"<ii{len(sizes)}i", magic, array.ndim, *sizes) + array.tobytes()


def make_smallnorb(folder: Path) -> None:
    for name in ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing"):
        info = np.array([(4, number % 9, number * 5 % 18 * 2, 1) for number in range(40)], dtype=np.int32)
        images = np.zeros((40, 2, 96, 96), dtype=np.uint8)
        images[:, 0] = (info[:, 1] * 10 + 5)[:, None, None]  # the left camera's brightness tells the elevation
        images[:, 0, 0] = info[:, 2, None] * 5  # and that of its first row the azimuth
        put(folder / f"smallnorb-{name}-dat.mat", norb(images))
        put(folder / f"smallnorb-{name}-info.mat", norb(info))


SOURCES = {
    "source.caltech101": make_caltech101,
    "cifar100": unpacked("cifar100"),
    "source.dtd": make_dtd,
    "flowers102": unpacked("flowers102"),
    "source.oxford_iiit_pet": make_oxford_iiit_pet,
    "source.svhn": make_svhn,
    "source.sun397": make_sun397,
    "source.patch_camelyon": make_patch_camelyon,
    "source.eurosat": in_folders("eurosat", "2750"),
    "source.resisc45": in_folders("NWPU-RESISC45"),
    "source.clevr": make_clevr,
    "source.dmlab": make_dmlab,
    "source.kitti": make_kitti,
    "source.dsprites": make_dsprites,
    "source.smallnorb": make_smallnorb,
}
#: What an image [H, W, 3] shows, where it is not `layouts.label_of`.
SHOWS = {
    "clevr_count": lambda image: round(image[..., 0].mean() / 10),
    "clevr_dist": lambda image: round(image[..., 1].mean() / 10),
    "dsprites_loc": lambda image: int(np.argwhere(image[..., 0] == 255)[0, 1] / 2),
    "dsprites_ori": lambda image: int(np.argwhere(image[..., 0] == 255)[0, 0] / 2.5),
    "smallnorb_azi": lambda image: round(image[0].mean() / 10),
    "smallnorb_ele": lambda image: round(image[1:].mean() / 10 - 0.5),
}
#: Sizes of test splits: the official ones, or the share that VTAB takes.
TESTS = {
    "caltech101": 15,
    "sun397": 7,
    "patch_camelyon": 16,
    "eurosat": 8,
    "resisc45": 8,
    "clevr_count": 8,
    "clevr_dist": 8,
    "dmlab": 16,
    "kitti": 6,
    "dsprites_loc": 28,
    "dsprites_ori": 28,
    "smallnorb_azi": 20,
    "smallnorb_ele": 20,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a function that registers a task's source and returns (root, catalogue)."""
    folder = tmp_path_factory.mktemp("sources")
    entry = {
        "family": "source",
        "title": "a small copy",
        "group": "VTAB-1k natural",
        "classes": 4,
        "licence": "none",
        "homepage": "none",
        "split": "any",
        "unpacked_mb": 1,
        "manual": "made by the tests",
    }
    catalogue = folder / "catalogue.yaml"
    catalogue.write_text(yaml.safe_dump(dict.fromkeys(SOURCES, entry)))

    def get(task: str) -> tuple[Path, Path]:
        name, _ = TASKS[task]
        if not (folder / name).exists():
            SOURCES[name](folder / name)
            fetch(name, folder / "data", catalogue, source=folder / name)
        return folder / "data", catalogue

    return get


def read(folder: Path, task: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return vtab.listing(folder, f"vtab.{task}")


def make(world, task: str, output: Path, seed: int = 0) -> Path:
    root, catalogue = world(task)
    return build(task, root, output, seed, sizes=SIZES, catalogue=catalogue)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_built_with_the_labels_that_its_images_show(world, task, tmp_path):
    folder = make(world, task, tmp_path)
    assert folder == tmp_path / task
    listing = read(tmp_path, task)
    sizes = {split: len(items) for split, items in listing.splits.items()}
    assert sizes == {"train": 8, "val": 3, "test": TESTS.get(task, 12)}
    for items in listing.splits.values():
        for file, label in zip(items.files, items.labels, strict=True):
            image = np.asarray(Image.open(file).convert("RGB"))
            shown = SHOWS[task](image) if task in SHOWS else layouts.label_of(image.transpose(2, 0, 1))
            assert shown == label, file
    assert [path.name for path in tmp_path.iterdir()] == [task]
    about = json.loads((folder / "built.json").read_text())
    assert about["seed"] == 0
    assert "not the community's" in about["images"]


def test_every_task_of_vtab_is_built_or_refused_with_a_reason(tmp_path):
    names = {name.removeprefix("vtab.") for name in layouts.GROUP_OF}
    assert set(TASKS) | set(vtab_build.REFUSED) == names
    assert not set(TASKS) & set(vtab_build.REFUSED)
    with pytest.raises(TocomError, match="Kaggle account.*tocom data fetch vtab-1k"):
        build("diabetic_retinopathy", tmp_path, tmp_path / "out")
    with pytest.raises(TocomError, match="did you mean 'kitti'"):
        build("kity", tmp_path, tmp_path / "out")


def test_every_source_is_in_the_bundled_catalogue():
    from tocom.data.catalogue import read_catalogue

    entries = read_catalogue(None)
    sources = {name for name, _ in TASKS.values()}
    assert sources <= set(entries)
    assert {name for name in entries if name.startswith("source.")} <= sources
    assert set(SOURCES) == sources


def lists(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}


def contents(folder: Path, split: str) -> set[bytes]:
    return {path.read_bytes() for path in (folder / "images" / Path(vtab.LISTS[split]).stem).iterdir()}


@pytest.mark.parametrize("task", ["dtd", "kitti", "cifar"])
def test_a_seed_draws_the_training_images_and_nothing_else_does(world, task, tmp_path):
    first = make(world, task, tmp_path / "a")
    again = make(world, task, tmp_path / "b")
    other = make(world, task, tmp_path / "c", seed=1)
    assert lists(first) == lists(again)
    assert all(contents(first, split) == contents(again, split) for split in vtab.LISTS)
    assert contents(first, "train") != contents(other, "train")
    assert contents(first, "test") == contents(other, "test")


def test_train_val_and_test_images_are_different_ones(world, tmp_path):
    for task in ("cifar", "caltech101", "eurosat", "dtd"):
        folder = make(world, task, tmp_path)
        found = [contents(folder, split) for split in vtab.LISTS]
        assert sum(map(len, found)) == len(set.union(*found))


def test_frames_of_one_drive_are_in_one_split(world, tmp_path):
    root, _ = world("kitti")
    folder = make(world, "kitti", tmp_path)
    source = root.parent / "source.kitti"
    numbers = [int(n) - 1 for n in (source / "devkit/mapping/train_rand.txt").read_text().split(",")]
    images = {(source / f"Kitti/raw/training/image_2/{i:06d}.png").read_bytes(): n // 3 for i, n in enumerate(numbers)}
    drives = {split: {images[content] for content in contents(folder, split)} for split in vtab.LISTS}
    assert not drives["test"] & (drives["train"] | drives["val"])
    assert not drives["train"] & drives["val"]
    assert len(drives["test"]) == 2


def test_caltech_trains_on_thirty_of_each_class(world):
    pools = vtab_build.caltech101(world("caltech101")[0].parent / "source.caltech101")
    assert pools["train"].n == 90
    assert np.bincount([pools["train"].get(index)[1] for index in range(90)]).tolist() == [30, 30, 30]


def test_sun397_has_as_many_images_in_its_parts_as_in_the_catalogue(monkeypatch, tmp_path):
    from tocom.data.catalogue import read_catalogue

    entries, pool = read_catalogue(BUNDLED), vtab_build.Pool(108_754, lambda index: index)
    monkeypatch.setattr(vtab_build, "_torchvision", lambda *args, **options: None)
    monkeypatch.setattr(vtab_build, "_paths", lambda dataset: pool)
    pools = vtab_build.sun397(tmp_path)
    assert f"{pools['test'].n:,} test" in entries["vtab.sun397"].split
    assert {split: part.n for split, part in pools.items()} == {"val": 10_875, "test": 21_750, "train": 76_129}


def test_too_few_images_are_refused_and_leave_nothing(world, tmp_path):
    root, catalogue = world("dtd")
    with pytest.raises(TocomError, match="source.dtd has 24 images to draw 800 to train on"):
        build("dtd", root, tmp_path / "out", catalogue=catalogue)
    assert not (tmp_path / "out").exists()


def test_a_source_that_was_not_fetched_is_refused_with_the_command(tmp_path):
    with pytest.raises(TocomError, match=r"tocom data fetch source\.sun397"):
        build("sun397", tmp_path, tmp_path / "out")


def test_a_task_that_exists_is_not_overwritten(world, tmp_path):
    make(world, "dtd", tmp_path)
    with pytest.raises(TocomError, match="exists; remove it"):
        make(world, "dtd", tmp_path)


@pytest.mark.parametrize("where", ["an image", "a list"])
def test_a_full_disk_during_a_build_leaves_nothing(world, tmp_path, where, monkeypatch):
    # The lists become long by the names: 12 lines of 200 characters and more.
    content, ending, limit = (bytes(50_000), ".jpg", 20_000) if where == "an image" else (b"", "." + 200 * "x", 2400)
    monkeypatch.setattr(vtab_build, "_encode", lambda image: (content, ending))
    world("dtd")
    with (
        file_limit(limit),
        pytest.raises(TocomError, match="cannot write .*too large; free some space or choose another folder"),
    ):
        make(world, "dtd", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_build_leaves_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(vtab_build, "_encode", lambda image: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(TocomError, match="No space left.*free some space"):
        make(world, "dtd", tmp_path)
    assert list(tmp_path.iterdir()) == []


#: Archives of the public sources: what each is made of, as (folder of the small copy, folder in the archive).
ARCHIVES = {
    "caltech101": {"caltech-101.zip": ("caltech-101", "caltech-101")},
    "dtd": {"dtd-r1.0.1.tar.gz": ("dtd/dtd", "dtd")},
    "oxford_iiit_pet": {
        "images.tar.gz": ("oxford-iiit-pet/images", "images"),
        "annotations.tar.gz": ("oxford-iiit-pet/annotations", "annotations"),
    },
    "sun397": {"SUN397.tar.gz": ("SUN397", "SUN397")},
    "eurosat": {"EuroSAT.zip": ("eurosat/2750", "2750")},
    "resisc45": {"NWPU-RESISC45.zip": ("NWPU-RESISC45", "NWPU-RESISC45")},
    "clevr_count": {"CLEVR_v1.0.zip": ("clevr/CLEVR_v1.0", "CLEVR_v1.0")},
    "kitti": {
        "data_object_image_2.zip": ("Kitti/raw/training/image_2", "training/image_2"),
        "data_object_label_2.zip": ("Kitti/raw/training/label_2", "training/label_2"),
        "devkit_object.zip": ("devkit/mapping", "mapping"),
    },
    "dmlab": {"dmlab.tar.gz": (".", ".")},
}


@pytest.mark.parametrize("task", [*ARCHIVES, "svhn", "smallnorb_azi"])
def test_a_source_is_fetched_by_its_bundled_entry_and_unpacked_where_the_builder_looks(tmp_path, task):
    """Only addresses, checksums and sizes are those of the small copies; names and folders are the catalogue's."""
    name, _ = TASKS[task]
    copy, served = tmp_path / "copy", tmp_path / "served"
    SOURCES[name](copy)
    served.mkdir()
    bundled = yaml.safe_load(BUNDLED.read_text())[name]
    for file in bundled["files"]:
        if task in ARCHIVES:
            place, inside = ARCHIVES[task][file["name"]]
            found = [path for path in sorted((copy / place).rglob("*")) if path.is_file()]
            members = {str(Path(inside) / path.relative_to(copy / place)): path.read_bytes() for path in found}
            write = layouts.write_zip if file["name"].endswith(".zip") else layouts.write_tar
            write(served / file["name"], members)
        else:
            plain = copy / file["name"].removesuffix(".gz")
            content = plain.read_bytes() if plain.is_file() else b"categories, which no task needs"
            content = gzip.compress(content) if file["name"].endswith(".gz") else content
            (served / file["name"]).write_bytes(content)
        content = (served / file["name"]).read_bytes()
        file["checksum"], file["size"] = f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)
    with serve(served) as server:
        for file in bundled["files"]:
            file["urls"] = [server.url(file["name"])]
        catalogue = tmp_path / "catalogue.yaml"
        catalogue.write_text(yaml.safe_dump({name: bundled | {"unpacked_mb": 20}}))
        fetch(name, tmp_path / "data", catalogue)
    listing = read(build(task, tmp_path / "data", tmp_path / "out", sizes=SIZES, catalogue=catalogue).parent, task)
    assert len(listing.splits["test"]) == TESTS.get(task, 12)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("caltech101", "caltech-101/101_ObjectCategories.tar.gz"),
        ("oxford_iiit_pet", "oxford-iiit-pet/annotations/test.txt"),
        ("svhn", "train_32x32.mat"),
        ("clevr_dist", "clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json"),
        ("dmlab", "dmlab-train.tfrecord-00000-of-00002"),
        ("kitti", "devkit/mapping/train_rand.txt"),
        ("smallnorb_azi", "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat"),
        ("smallnorb_ele", "smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat"),
    ],
)
def test_a_broken_source_gives_one_line_that_names_the_file(tmp_path, task, file):
    name, reader = TASKS[task]
    SOURCES[name](tmp_path / name)
    path = tmp_path / name / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 4])
    with pytest.raises(TocomError) as caught:
        [pool.get(index) for pool in reader(tmp_path / name).values() for index in range(pool.n)]
    assert Path(file).name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["dtd", "sun397", "eurosat", "kitti", "resisc45", "dmlab"])
def test_an_empty_source_gives_one_line(tmp_path, task):
    with pytest.raises(TocomError) as caught:
        TASKS[task][1](tmp_path)
    assert "\n" not in str(caught.value)


@given(st.floats(-50, 150, allow_nan=False))
def test_a_value_is_in_the_bin_of_the_last_limit_below_it(value):
    below = [index for index, limit in enumerate(vtab_build.KITTI_DISTANCES) if limit < value]
    assert vtab_build.bin_of(value, vtab_build.KITTI_DISTANCES) == max(below)


def test_kitti_labels_are_those_of_vtab():
    def at(*places):
        return vtab_build.kitti_label([{"type": kind, "location": [0, 0, z]} for kind, z in places])

    assert [at(("Car", z)) for z in (-3, 7.9, 8.0, 8.1, 20, 20.1, 900)] == [0, 0, 0, 1, 1, 2, 2]
    assert at() == at(("Pedestrian", 1), ("DontCare", -1000)) == 3
    assert at(("Truck", 30), ("Van", 15), ("Cyclist", 2)) == 1


@given(st.integers(1, 300))
def test_parts_are_disjoint_and_complete(n):
    found = vtab_build.parts(n, train=60, val=20, test=20)
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(n))
    assert len(found["train"]) == n * 60 // 100
    assert len(found["val"]) == n * 20 // 100


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 2**40) | st.binary(max_size=300)), st.booleans())
def test_an_example_is_parsed_into_what_was_serialised(features, packed):
    assert vtab_build.parse_example(example(packed, features)) == features


def test_built_tasks_are_registered_in_place_of_the_communitys_archive(world, tmp_path):
    from tocom.data.families import load_listing

    built = make(world, "dtd", tmp_path / "built").parent
    make(world, "svhn", built)
    fetch("vtab-1k", tmp_path / "data", source=built)
    with pytest.warns(UserWarning, match="not VTAB-1k's"):
        listing = load_listing("vtab.svhn", tmp_path / "data")
    assert listing.classes == 10
    assert listing.group == "VTAB-1k natural"
    assert len(listing.splits["train"]) == 8


def test_pictures_of_files_keep_their_bytes(world, tmp_path):
    folder = make(world, "resisc45", tmp_path)
    originals = {picture(label, index) for _, label, index in layouts.numbered("train", "test")}
    assert contents(folder, "train") <= originals
    assert all(Image.open(BytesIO(content)).format == "JPEG" for content in contents(folder, "test"))
