"""Build tasks of VTAB-1k from their public sources, in the layout that :mod:`tocom.data.families.vtab` reads.

Labels are those of VTAB (arXiv 1910.04867, section 2 and appendix A) and of its public code
(github.com/google-research/task_adaptation): counts and distances in bins, sixteen bins of place and of orientation.
So are the splits where the sources have official ones. Where they have none, VTAB cuts TensorFlow's own shuffled order
in parts of the shares given here; the parts are drawn anew here, with a fixed seed.

The 800 images to train on and the 200 to choose on are drawn regardless of class, with a seed that is given. They are
*not the same images* as in the lists that the adapter-tuning community shares, so results agree only within the noise
of such a draw. Nor are images encoded again: the community's are all JPEG of Pillow's standard quality, these are the
sources' own files, or PNG. To compare single tasks with published numbers, use the community's archive:
`tocom data fetch vtab-1k`.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tocom.data.families import cifar as cifar100
from tocom.data.families import flowers as flowers102
from tocom.data.families import vtab
from tocom.data.families.reading import by_class, malformed, read_mat, read_table, reading
from tocom.data.listing import Items
from tocom.errors import TocomError, suggest

#: Draws the parts of sources that have no official split, so that every seed gives the same test images.
PARTS_SEED = 0
#: Limits of the classes, in the units of the scenes: a distance belongs to the last limit that it exceeds.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
NO_VEHICLE = 1000.0  # metres: beyond the last limit
NOTE = "built.json"  # in a task's folder: from what it was built
BLOCK = 23_040  # images of dSprites that are compressed together
Image = Path | bytes | np.ndarray  # a file, a file's content, or pixels [H, W] or [H, W, 3] uint8


@dataclass(frozen=True)
class Pool:
    """The images of one part of a source.

    Attributes:
        n: their number. get: returns the image and label of one of them; nothing is decoded before.
    """

    n: int
    get: Callable[[int], tuple[Image, int]]

    def take(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """Return the images at ``indices``, in that order."""
        return Pool(len(indices), lambda index: self.get(int(indices[index])))


Pools = dict[str, Pool]  # "train", "test" and, where VTAB chooses on other images than it trains on, "val"


def build(
    task: str,
    sources: str | os.PathLike,
    output: str | os.PathLike,
    seed: int = 0,
    *,
    sizes: tuple[int, int] = (800, 200),
    catalogue=None,
) -> Path:
    """Write ``output/TASK`` with its images and lists.

    Args:
        task: a task of VTAB-1k, with or without ``vtab.`` before it.
        sources: the folder of downloaded data sets, with the task's source in it (`tocom data fetch source.dtd`).
        output: a folder for all tasks, which `tocom data fetch vtab-1k --from OUTPUT` registers.
        seed: draws the images to train and to choose on.
        sizes: how many of them. catalogue: as read, or its path; the usual one by default.

    Returns:
        The task's folder.

    Raises:
        TocomError: the task is unknown or cannot be built, its source is missing or malformed, it exists, or the disk
            is full. Nothing half-written is left.
    """
    from tocom.data.fetch import folder_of

    task = task.removeprefix("vtab.")
    if task in REFUSED:
        raise TocomError(f"{task} cannot be built: {REFUSED[task]}")
    if task not in TASKS:
        raise TocomError(f"unknown VTAB-1k task {task!r}{suggest(task, TASKS)}; it can be one of {', '.join(TASKS)}")
    source, read = TASKS[task]
    target = Path(output) / task
    if target.exists():
        raise TocomError(f"{target} exists; remove it to build it again")
    splits = draw(read(folder_of(source, sources, catalogue)), sizes, seed, source)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{task}.build-", dir=output) as staging:
            made = Path(staging) / task
            made.mkdir()
            _write(made, splits, task)
            (made / NOTE).write_text(_note(task, seed), encoding="utf-8")
            made.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise TocomError(f"cannot write {target}: {reason}; free some space or choose another folder") from error
    return target


def _note(task: str, seed: int) -> str:
    about = {"task": task, "source": TASKS[task][0], "seed": seed}
    return json.dumps(about | {"images": "drawn by tocom, not the community's lists"}, indent=2) + "\n"


def is_built(task: str, output: str | os.PathLike, seed: int) -> bool:
    """Return whether :func:`build` has written a task (without ``vtab.``) with this seed before."""
    note = Path(output) / task / NOTE
    return note.is_file() and note.read_text(encoding="utf-8") == _note(task, seed)


def draw(pools: Pools, sizes: tuple[int, int], seed: int, source: str) -> Pools:
    """Return pools of the images to train on, to choose on (from "val", if there is one) and to test on.

    Raises:
        TocomError: there are too few images.
    """
    n_train, n_val = sizes
    random = np.random.default_rng(seed)
    order = random.permutation(pools["train"].n)
    if "val" in pools:
        others, from_val = random.permutation(pools["val"].n), pools["val"]
    else:
        others, from_val = order[n_train:], pools["train"]
    if len(order) < n_train or len(others) < n_val or not pools["test"].n:
        raise TocomError(
            f"{source} has {len(order)} images to draw {n_train} to train on from, {len(others)} to draw {n_val} to"
            f" choose on from, and {pools['test'].n} to test on; check that its folder is complete"
        )
    return {
        "train": pools["train"].take(np.sort(order[:n_train])),
        "val": from_val.take(np.sort(others[:n_val])),
        "test": pools["test"],
    }


def _write(folder: Path, splits: Pools, title: str) -> None:
    """Write images and lists."""
    from tqdm import tqdm

    lines: dict[str, list[str]] = {}
    for split, pool in splits.items():
        place = f"images/{Path(vtab.LISTS[split]).stem}"
        (folder / place).mkdir(parents=True)
        lines[split] = []
        for index in tqdm(range(pool.n), desc=f"{title} {split}", mininterval=5, leave=False):
            image, label = pool.get(index)
            content, ending = _encode(image)
            name = f"{place}/{index:06d}{ending}"
            (folder / name).write_bytes(content)
            lines[split].append(f"{name} {label}")
    texts = {file: lines[split] for split, file in vtab.LISTS.items()}
    for file, rows in (texts | {vtab.UNION: lines["train"] + lines["val"]}).items():
        (folder / file).write_text("\n".join(rows) + "\n", encoding="utf-8")


def _encode(image: Image) -> tuple[bytes, str]:
    """Return a file's content and ending: files stay as they are, pixels become PNG, which loses nothing."""
    import io

    from PIL import Image as PillowImage

    if isinstance(image, Path):
        return image.read_bytes(), image.suffix.lower()
    if isinstance(image, bytes):
        return image, ".png" if image.startswith(b"\x89PNG") else ".jpg"
    stream = io.BytesIO()
    PillowImage.fromarray(image).convert("RGB").save(stream, "PNG")
    return stream.getvalue(), ".png"


# --- what several sources share


def parts(n: int, **shares: int) -> dict[str, np.ndarray]:
    """Cut 0..n-1, shuffled with the fixed seed, into parts by their shares in percent; the last takes the rest.

    Returns:
        Sorted indices of each part.
    """
    order = np.random.default_rng(PARTS_SEED).permutation(n)
    ends = np.cumsum([n * share // 100 for share in shares.values()])[:-1]
    return {name: np.sort(part) for name, part in zip(shares, np.split(order, ends), strict=True)}


def cut(pool: Pool, **shares: int) -> Pools:
    """Cut a pool by :func:`parts`."""
    return {name: pool.take(indices) for name, indices in parts(pool.n, **shares).items()}


def bin_of(value: float, limits: Sequence[float]) -> int:
    """Return the index of the last limit that is below ``value``; limits ascend."""
    return int(np.searchsorted(limits, value, side="left")) - 1


def pool_of(items: Items) -> Pool:
    """Return the images of a listing as a pool."""
    if items.files is not None:
        return Pool(len(items), lambda index: (items.files[index], int(items.labels[index])))
    return Pool(len(items), lambda index: (items.arrays[index].transpose(1, 2, 0), int(items.labels[index])))


def _torchvision(name: str, folder: Path, **options: Any):
    """Open a torchvision data set; its complaints about missing files become one line."""
    from torchvision import datasets

    with reading(folder, RuntimeError):
        return getattr(datasets, name)(folder, **options)


def _paths(dataset) -> Pool:
    """Return the files of a torchvision data set whose loader returns the path that it is given, sorted by path."""
    pairs = sorted((Path(path), int(label)) for path, label in (dataset[index] for index in range(len(dataset))))
    return Pool(len(pairs), lambda index: pairs[index])


def _as_it_is(path):
    return path


def _hdf5(path: Path):
    """Open an HDF5 file to read.

    Raises:
        TocomError: h5py is not installed, or the file is missing or malformed.
    """
    try:
        import h5py
    except ImportError:
        raise TocomError("this source is an HDF5 file; install what reads it: pip install h5py") from None
    with reading(path):
        return h5py.File(path, "r")


# --- natural tasks


def caltech101(folder: Path) -> Pools:
    """30 images of each of 102 classes (background included) to train on, the others to test on."""
    archive = folder / "caltech-101" / "101_ObjectCategories.tar.gz"
    with reading(archive, tarfile.TarError), tarfile.open(archive) as stream:
        members = [member for member in stream if member.isfile() and Path(member.name).match("[!.]*.jpg")]
        members.sort(key=lambda member: member.name.lower())
        contents = [stream.extractfile(member).read() for member in members]
    names = [Path(member.name).parent.name.lower() for member in members]
    classes = {name: label for label, name in enumerate(sorted(set(names)))}
    pool = Pool(len(names), lambda index: (contents[index], classes[names[index]]))
    random, labels = np.random.default_rng(PARTS_SEED), np.array([classes[name] for name in names])
    train = [random.permutation(np.flatnonzero(labels == label))[:30] for label in range(len(classes))]
    chosen = np.sort(np.concatenate(train)) if train else np.empty(0, dtype=int)
    return {"train": pool.take(chosen), "test": pool.take(np.setdiff1d(np.arange(pool.n), chosen))}


def cifar(folder: Path) -> Pools:
    """CIFAR-100 with its official splits."""
    return {split: pool_of(items) for split, items in cifar100.listing(folder, "cifar100").splits.items()}


def dtd(folder: Path) -> Pools:
    """The first of the ten official splits."""
    return {split: _paths(_torchvision("DTD", folder, split=split, loader=_as_it_is)) for split in vtab.LISTS}


def oxford_flowers102(folder: Path) -> Pools:
    """The official splits: ten images of each class to train and to choose on."""
    return {split: pool_of(items) for split, items in flowers102.listing(folder, "flowers102").splits.items()}


def oxford_iiit_pet(folder: Path) -> Pools:
    """The official splits; classes are the 37 breeds."""
    folder = folder / "oxford-iiit-pet"
    splits = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        lists = folder / "annotations" / file
        with reading(lists):
            rows = [(folder / "images" / f"{row[0]}.jpg", int(row[1]) - 1) for row in read_table(lists, 4)]
        splits[split] = Pool(len(rows), rows.__getitem__)
    return splits


def svhn(folder: Path) -> Pools:
    """Cropped digits, official splits; the source calls the digit 0 class 10."""
    splits = {}
    for split in ("train", "test"):
        images, labels = read_mat(folder / f"{split}_32x32.mat", "X", "y")
        splits[split] = _svhn_pool(images, labels.astype(int) % 10)
    return splits


def _svhn_pool(images: np.ndarray, labels: np.ndarray) -> Pool:
    return Pool(len(labels), lambda index: (images[..., index], int(labels[index])))


def sun397(folder: Path) -> Pools:
    """10 and 20 % of all images to choose and to test on, the others to train on, as in TensorFlow's splits."""
    return cut(_paths(_torchvision("SUN397", folder, loader=_as_it_is)), val=10, test=20, train=70)


# --- specialised tasks


def patch_camelyon(folder: Path) -> Pools:
    """The official splits; 1: the patch's centre has tumour tissue."""
    _hdf5(folder / "pcam" / "camelyonpatch_level_2_split_train_x.h5").close()
    return {split: _decoded(_torchvision("PCAM", folder, split=split)) for split in vtab.LISTS}


def _decoded(dataset) -> Pool:
    def get(index: int) -> tuple[Image, int]:
        image, label = dataset[index]
        return np.asarray(image), int(label)

    return Pool(len(dataset), get)


def eurosat(folder: Path) -> Pools:
    """RGB images, 60, 20 and 20 % of them."""
    return cut(_paths(_torchvision("EuroSAT", folder, loader=_as_it_is)), train=60, val=20, test=20)


def resisc45(folder: Path) -> Pools:
    """60, 20 and 20 % of all images."""
    return cut(pool_of(by_class(folder / "NWPU-RESISC45")), train=60, val=20, test=20)


# --- structured tasks


def clevr_count(folder: Path) -> Pools:
    """How many objects there are, from 3 to 10."""
    return _clevr(folder, lambda objects: len(objects) - 3)


def clevr_dist(folder: Path) -> Pools:
    """In which of six bins the distance of the closest object lies."""
    return _clevr(folder, lambda objects: bin_of(min(o["pixel_coords"][2] for o in objects), CLEVR_DISTANCES))


def _clevr(folder: Path, label_of: Callable[[list[dict]], int]) -> Pools:
    """Official training images; the official validation images to test on, for the test images have no scenes."""
    folder, splits = folder / "clevr" / "CLEVR_v1.0", {}
    for split, official in (("train", "train"), ("test", "val")):
        path = folder / "scenes" / f"CLEVR_{official}_scenes.json"
        with reading(path):
            scenes = json.loads(path.read_text(encoding="utf-8"))["scenes"]
            rows = sorted(
                (folder / "images" / official / scene["image_filename"], label_of(scene["objects"])) for scene in scenes
            )
        splits[split] = Pool(len(rows), rows.__getitem__)
    return splits


def dmlab(folder: Path) -> Pools:
    """Frames of DeepMind Lab, official splits: (close, far, very far) objects of positive or negative reward."""
    files = {"train": "train", "val": "validation", "test": "test"}
    return {split: _records(sorted(folder.rglob(f"dmlab-{file}.tfrecord*")), folder) for split, file in files.items()}


def kitti(folder: Path) -> Pools:
    """In which of four bins the distance of the closest car, van or truck lies; the last is that there is none.

    Split by drive, so that neighbouring frames are on the same side: 10 % of the drives to choose on, 10 % to test on.
    """
    data = _torchvision("Kitti", folder)
    order = np.argsort(data.images)
    drives = _kitti_drives(folder / "devkit" / "mapping")
    names = sorted(set(drives))
    share = max(1, len(names) // 10)
    shuffled = np.random.default_rng(PARTS_SEED).permutation(names)
    chosen = {"val": set(shuffled[share : 2 * share]), "test": set(shuffled[:share])}
    chosen["train"] = set(names) - chosen["val"] - chosen["test"]

    def get(index: int) -> tuple[Image, int]:
        path = Path(data.images[order[index]])
        with reading(path):
            image, objects = data[order[index]]
            image.close()
        return path, kitti_label(objects)

    with reading(folder / "devkit" / "mapping" / "train_rand.txt"):
        drive_of = np.array([drives[int(Path(data.images[index]).stem)] for index in order])
    pool = Pool(len(order), get)
    return {split: pool.take(np.flatnonzero(np.isin(drive_of, list(chosen[split])))) for split in vtab.LISTS}


def kitti_label(objects: list[dict]) -> int:
    """Return the class of a frame from its objects, as torchvision gives them (location: x, y, z in metres)."""
    distances = [item["location"][2] for item in objects if item["type"] in ("Car", "Van", "Truck")]
    return bin_of(min(distances, default=NO_VEHICLE), KITTI_DISTANCES)


def _kitti_drives(mapping: Path) -> list[str]:
    """Return the drive of each training image: train_rand.txt names, for each, a line of train_mapping.txt."""
    lines = read_table(mapping / "train_mapping.txt", 3)
    path = mapping / "train_rand.txt"
    with reading(path):
        return [lines[int(number) - 1][1] for number in path.read_text(encoding="ascii").split(",")]


def dsprites_loc(folder: Path) -> Pools:
    """The shape's horizontal place, in 16 bins of 2 of the 32 places."""
    return _dsprites(folder, factor=4, values=32)


def dsprites_ori(folder: Path) -> Pools:
    """The shape's orientation, in 16 bins of 2.5 of the 40 orientations."""
    return _dsprites(folder, factor=3, values=40)


def _dsprites(folder: Path, factor: int, values: int, bins: int = 16) -> Pools:
    """80, 10 and 10 % of all images; ``factor``: column of (colour, shape, scale, orientation, x, y)."""
    path = folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5"
    with _hdf5(path) as file, reading(path):
        labels = file["latents"]["classes"][:, factor].astype(int) * bins // values
        n, height, width = file["imgs"].shape
        # A bit a pixel: the images are masks of 0 and 1, and all of them in bytes would be 3 GB.
        blocks = (file["imgs"][start : start + BLOCK] for start in range(0, n, BLOCK))
        packed = np.concatenate([np.packbits(block.reshape(len(block), -1), axis=1) for block in blocks])

    def get(index: int) -> tuple[Image, int]:
        mask = np.unpackbits(packed[index], count=height * width).reshape(height, width)
        return mask * np.uint8(255), int(labels[index])

    return cut(Pool(n, get), train=80, val=10, test=10)


def smallnorb_azi(folder: Path) -> Pools:
    """From which of 18 sides the object is seen."""
    return _smallnorb(folder, column=2, step=2)


def smallnorb_ele(folder: Path) -> Pools:
    """From which of 9 heights the object is seen."""
    return _smallnorb(folder, column=1, step=1)


def _smallnorb(folder: Path, column: int, step: int) -> Pools:
    """Official training images (left camera); half of the official test images to choose on, half to test on."""
    pools = {}
    for part, name in (("train", "5x46789x9x18x6x2x96x96-training"), ("test", "5x01235x9x18x6x2x96x96-testing")):
        images = read_matrix(folder / f"smallnorb-{name}-dat.mat")
        info = read_matrix(folder / f"smallnorb-{name}-info.mat")
        if images.ndim != 4 or info.ndim != 2 or len(images) != len(info) or info.shape[1] <= column:
            raise malformed(folder / f"smallnorb-{name}-info.mat", "does not fit the images")
        pools[part] = _norb_pool(images, info[:, column] // step)
    return {"train": pools["train"]} | cut(pools["test"], val=50, test=50)


def _norb_pool(images: np.ndarray, labels: np.ndarray) -> Pool:
    return Pool(len(labels), lambda index: (np.array(images[index, 0]), int(labels[index])))


# --- formats that no library here reads


def read_matrix(path: Path) -> np.ndarray:
    """Return a matrix of NORB's own format, mapped into memory.

    A magic number for the type, the number of dimensions, at least three sizes (all int32, little-endian), the data.

    Raises:
        TocomError: the file is missing, of an unknown type, or too short.
    """
    types = {0x1E3D4C55: np.uint8, 0x1E3D4C54: np.dtype("<i4")}
    with reading(path, struct.error), path.open("rb") as stream:
        magic, dimensions = struct.unpack("<ii", stream.read(8))
        sizes = struct.unpack(f"<{max(3, dimensions)}i", stream.read(4 * max(3, dimensions)))[:dimensions]
        return np.memmap(path, types[magic], "r", stream.tell(), sizes)


def _records(files: list[Path], folder: Path) -> Pool:
    """Return the examples of TFRecord files with features "image" (a file's content) and "label"."""
    if not files:
        raise malformed(folder, "holds no dmlab-*.tfrecord files")
    places = [(path, *place) for path in files for place in _record_places(path)]

    def get(index: int) -> tuple[Image, int]:
        path, start, size = places[index]
        with reading(path), path.open("rb") as stream:
            stream.seek(start)
            example = parse_example(stream.read(size))
            return example["image"], example["label"]

    return Pool(len(places), get)


def _record_places(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (start, size) of every record: a size (8 bytes), its CRC (4), the data, their CRC (4)."""
    end = path.stat().st_size
    with path.open("rb") as stream:
        while header := stream.read(12):
            if len(header) < 12 or stream.tell() + int.from_bytes(header[:8], "little") + 4 > end:
                raise malformed(path, "ends in the middle of a record")
            size = int.from_bytes(header[:8], "little")
            yield stream.tell(), size
            stream.seek(size + 4, os.SEEK_CUR)


def parse_example(content: bytes) -> dict[str, bytes | int]:
    """Return the features of a serialised tf.train.Example that hold one byte string or one integer.

    In protocol buffers' terms: Example {features: 1}, Features {map: 1}, entry {key: 1, value: 2}, Feature
    {bytes_list: 1, int64_list: 3}, either list {value: 1}.
    """
    features = {}
    for _, entry in (pair for _, part in _fields(content) for pair in _fields(part)):
        pair = dict(_fields(entry))
        for kind, values in _fields(pair[2]):
            found = [value for _, value in _fields(values)]
            if kind == 1:
                features[pair[1].decode()] = found[0]
            elif kind == 3:  # packed or not
                features[pair[1].decode()] = found[0] if isinstance(found[0], int) else _varint(found[0], 0)[0]
    return features


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a message's fields; only integers and byte strings occur."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        value, place = _varint(content, place)
        if key & 7 == 2:
            value, place = content[place : place + value], place + value
        elif key & 7 != 0:
            raise ValueError(f"a field of the unexpected wire type {key & 7}")
        yield key >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


#: Task -> the data set that it is built from, and its reader.
TASKS: dict[str, tuple[str, Callable[[Path], Pools]]] = {
    "caltech101": ("source.caltech101", caltech101),
    "cifar": ("cifar100", cifar),
    "dtd": ("source.dtd", dtd),
    "oxford_flowers102": ("flowers102", oxford_flowers102),
    "oxford_iiit_pet": ("source.oxford_iiit_pet", oxford_iiit_pet),
    "svhn": ("source.svhn", svhn),
    "sun397": ("source.sun397", sun397),
    "patch_camelyon": ("source.patch_camelyon", patch_camelyon),
    "eurosat": ("source.eurosat", eurosat),
    "resisc45": ("source.resisc45", resisc45),
    "clevr_count": ("source.clevr", clevr_count),
    "clevr_dist": ("source.clevr", clevr_dist),
    "dmlab": ("source.dmlab", dmlab),
    "kitti": ("source.kitti", kitti),
    "dsprites_loc": ("source.dsprites", dsprites_loc),
    "dsprites_ori": ("source.dsprites", dsprites_ori),
    "smallnorb_azi": ("source.smallnorb", smallnorb_azi),
    "smallnorb_ele": ("source.smallnorb", smallnorb_ele),
}
REFUSED = {
    "diabetic_retinopathy": "its images need a Kaggle account and the preprocessing of that competition's winner;"
    " take it from the community's archive: `tocom data fetch vtab-1k`"
}
