"""Small archives in the true layout of every data set, and a catalogue of them, for tests and tiny studies.

    with serve(folder) as server:                       # all of them, for `tocom data fetch` and whole studies
        catalogue = make_catalogue(folder, server.base)

File and folder names, list formats, .mat structs and pickles are those of the real archives; only the images are
few (six of each of four classes to train on, three to test on) and small. An image's colour tells its class (see
`label_of`), so a test can compare a decoded image with its label, and a tiny model can learn it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack as struct_pack

import numpy as np
import yaml
from PIL import Image

from tocom.data.catalogue import BUNDLED, read_catalogue

CLASSES = 4
PER_CLASS = {"train": 6, "val": 3, "test": 3}
LEVELS = (40, 128, 216)  # of one colour channel: 27 colours, for as many classes
GREYS = (30, 90, 150, 210)  # of the classes of a data set without colours

GROUP_OF = {name: entry.group for name, entry in read_catalogue(BUNDLED).items() if name.startswith("vtab.")}
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def colour_of(label: int) -> np.ndarray:
    """Return the colour of a class (0..26) as [3] floats."""
    return np.array([LEVELS[label % 3], LEVELS[label // 3 % 3], LEVELS[label // 9 % 3]], dtype=float)


def label_of(image: np.ndarray) -> int:
    """Return the class of a decoded image [3, H, W] by its mean colour, or by its brightness if all of it is grey."""
    mean = image.reshape(3, -1).mean(axis=1)
    if (image == image[:1]).all():
        return int(np.argmin(np.abs(mean[0] - np.array(GREYS))))
    return int(np.argmin([np.abs(mean - colour_of(label)).sum() for label in range(27)]))


def draw(label: int, index: int, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    """Return a noisy image [H, W, 3] uint8 of a class; each index gives another one. ``size``: (width, height)."""
    random = np.random.default_rng([label, index])
    noise = random.uniform(-12, 12, (size[1], size[0], 3)) + random.uniform(-6, 6)
    return np.clip(colour_of(label) + noise, 0, 255).astype(np.uint8)


def encode(array: np.ndarray, kind: str = "JPEG") -> bytes:
    """Return an image [H, W, 3] or [H, W] as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return stream.getvalue()


def picture(label: int, index: int, kind: str = "JPEG") -> bytes:
    """Return `draw` as the bytes of a file, 40 to 64 pixels wide and high."""
    return encode(draw(label, index, (40 + index * 5 % 25, 40 + index * 7 % 25)), kind)


def numbered(*splits: str) -> Iterator[tuple[str, int, int]]:
    """Yield (split, label, index) of every image; the index is new in each class and the splits come class by class."""
    for label in range(CLASSES):
        index = 0
        for split in splits:
            for _ in range(PER_CLASS[split]):
                yield split, label, index
                index += 1


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar archive; a name that ends in gz is compressed."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def mat(**arrays) -> bytes:
    """Return MATLAB 5 bytes."""
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, arrays)
    return stream.getvalue()


def cell(values) -> np.ndarray:
    """Return a MATLAB cell array as a column [n, 1] of objects."""
    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    return column


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote (protocol 2): every string is a byte string, and NumPy has its old module names."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__qualname__}\n".encode())

    dispatch[str] = save_string
    dispatch[bytes] = save_string
    dispatch[type] = save_global


def python2_pickle(value) -> bytes:
    """Return the pickle of a value as Python 2 would have written it."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def cifar100(folder: Path) -> dict:
    members, truth = {}, {}
    for split in ("train", "test"):
        items = [(label, index) for which, label, index in numbered("train", "test") if which == split]
        truth[split] = [label for label, _ in items]
        data = np.stack([draw(label, index, (32, 32)).transpose(2, 0, 1).reshape(-1) for label, index in items])
        batch = {
            "filenames": [f"thing_s_{index:06d}.png" for _, index in items],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": truth[split],
            "coarse_labels": [label // 2 for label in truth[split]],
            "data": data,
        }
        members[f"cifar-100-python/{split}"] = python2_pickle(batch)
    names = [f"class_{label}" for label in range(CLASSES)]
    meta = {"fine_label_names": names, "coarse_label_names": ["even", "odd"]}
    members["cifar-100-python/meta"] = python2_pickle(meta)
    write_tar(folder / "cifar-100-python.tar.gz", members)
    return {"files": {"cifar-100-python.tar.gz": "."}, "truth": truth, "family": "cifar", "group": "CIFAR-100"}


def fashion_mnist(folder: Path) -> dict:
    """Big-endian numbers (magic, sizes), then bytes: http://yann.lecun.com/exdb/mnist/."""
    files, truth = {}, {"train": [], "test": []}
    images = {"train": b"", "test": b""}
    for split, label, index in numbered("train", "test"):
        noise = np.random.default_rng([label, index]).uniform(-12, 12, (28, 28))
        images[split] += np.round(GREYS[label] + noise).astype(np.uint8).tobytes()
        truth[split].append(label)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        n = len(truth[split])
        files[f"{prefix}-images-idx3-ubyte.gz"] = struct_pack(">4I", 2051, n, 28, 28) + images[split]
        files[f"{prefix}-labels-idx1-ubyte.gz"] = struct_pack(">2I", 2049, n) + bytes(truth[split])
    for name, content in files.items():
        (folder / name).write_bytes(gzip.compress(content))
    return {"files": dict.fromkeys(files), "truth": truth, "family": "idx", "group": "real tasks"}


def cub200(folder: Path) -> dict:
    members, truth = {}, {"train": [], "test": []}
    images, labels, split_of = [], [], []
    names = [f"{label + 1:03d}.Bird_{label}" for label in range(CLASSES)]
    for number, (split, label, index) in enumerate(numbered("train", "test"), start=1):
        path = f"{names[label]}/Bird_{label}_{index:04d}_{1000 + number}.jpg"
        members[f"CUB_200_2011/images/{path}"] = picture(label, index)
        images.append(f"{number} {path}")
        labels.append(f"{number} {label + 1}")
        split_of.append(f"{number} {int(split == 'train')}")
        truth[split].append(label)
    classes = [f"{label + 1} {name}" for label, name in enumerate(names)]
    lists = {
        "images.txt": images,
        "image_class_labels.txt": labels,
        "train_test_split.txt": split_of,
        "classes.txt": classes,
    }
    members |= {f"CUB_200_2011/{name}": ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}
    write_tar(folder / "CUB_200_2011.tgz", members)
    return {"files": {"CUB_200_2011.tgz": "."}, "truth": truth, "family": "cub", "group": "FGVC"}


def flowers102(folder: Path) -> dict:
    members, labels, ids = {}, [], {"train": [], "val": [], "test": []}
    for number, (split, label, index) in enumerate(numbered("train", "val", "test"), start=1):
        members[f"jpg/image_{number:05d}.jpg"] = picture(label, index)
        labels.append(label + 1)
        ids[split].append(number)
    ids = {split: numbers[::-1] for split, numbers in ids.items()}  # the real lists are not sorted either
    write_tar(folder / "102flowers.tgz", members)
    (folder / "imagelabels.mat").write_bytes(mat(labels=np.array([labels], dtype=np.uint8)))
    sets = {"trnid": "train", "valid": "val", "tstid": "test"}
    arrays = {key: np.array([ids[split]], dtype=np.uint16) for key, split in sets.items()}
    (folder / "setid.mat").write_bytes(mat(**arrays))
    truth = {split: [labels[number - 1] - 1 for number in numbers] for split, numbers in ids.items()}
    files = {"102flowers.tgz": ".", "imagelabels.mat": None, "setid.mat": None}
    return {"files": files, "truth": truth, "family": "flowers", "group": "FGVC"}


def struct(rows: list[tuple], *fields: str) -> np.ndarray:
    """Return a MATLAB struct array."""
    return np.array([rows], dtype=[(field, object) for field in fields])


BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
CAR_NAMES = cell([f"Make Model {label}" for label in range(CLASSES)]).T


def cars(folder: Path) -> dict:
    members, truth, rows = {}, {"train": [], "test": []}, []
    for number, (split, label, index) in enumerate(numbered("train", "test"), start=1):
        path = f"car_ims/{number:06d}.jpg"
        members[path] = picture(label, index)
        rows.append((path, 2, 2, 30, 30, label + 1, int(split == "test")))
        truth[split].append(label)
    annotations = struct(rows, "relative_im_path", *BOX, "class", "test")
    write_tar(folder / "car_ims.tgz", members)
    (folder / "cars_annos.mat").write_bytes(mat(annotations=annotations, class_names=CAR_NAMES))
    return {"files": {"car_ims.tgz": ".", "cars_annos.mat": None}, "truth": truth, "family": "cars", "group": "FGVC"}


def cars_devkit(folder: Path) -> dict:
    images, rows, truth = {"train": {}, "test": {}}, {"train": [], "test": []}, {"train": [], "test": []}
    for split, label, index in numbered("train", "test"):
        name = f"{len(rows[split]) + 1:05d}.jpg"
        images[split][f"cars_{split}/{name}"] = picture(label, index)
        rows[split].append((2, 2, 30, 30, label + 1, name))
        truth[split].append(label)
    annotations = {split: struct(rows[split], *BOX, "class", "fname") for split in rows}
    unlabelled = struct([row[:4] + row[5:] for row in rows["test"]], *BOX, "fname")
    devkit = {
        "devkit/cars_meta.mat": mat(class_names=CAR_NAMES),
        "devkit/cars_train_annos.mat": mat(annotations=annotations["train"]),
        "devkit/cars_test_annos.mat": mat(annotations=unlabelled),
    }
    write_tar(folder / "car_devkit.tgz", devkit)
    for split, members in images.items():
        write_tar(folder / f"cars_{split}.tgz", members)
    (folder / "cars_test_annos_withlabels.mat").write_bytes(mat(annotations=annotations["test"]))
    files = dict.fromkeys(("car_devkit.tgz", "cars_train.tgz", "cars_test.tgz"), ".")
    files["cars_test_annos_withlabels.mat"] = None
    return {"files": files, "truth": truth, "family": "cars", "group": "FGVC"}


def dogs(folder: Path) -> dict:
    members, paths, truth = {}, {"train": [], "test": []}, {"train": [], "test": []}
    for split, label, index in numbered("train", "test"):
        wnid = f"n0208562{label}"
        path = f"{wnid}-Breed_{label}/{wnid}_{100 + index}.jpg"
        members[f"Images/{path}"] = picture(label, index)
        paths[split].append(path)
        truth[split].append(label)
    lists = {}
    for split in ("train", "test"):
        labels = np.array(truth[split], dtype=np.uint8)[:, None] + 1
        annotations = cell([path.removesuffix(".jpg") for path in paths[split]])
        lists[f"{split}_list.mat"] = mat(file_list=cell(paths[split]), annotation_list=annotations, labels=labels)
    write_tar(folder / "images.tar", members)
    write_tar(folder / "lists.tar", lists)
    return {"files": {"images.tar": ".", "lists.tar": "."}, "truth": truth, "family": "dogs", "group": "FGVC"}


def imagenet1k(folder: Path) -> dict:
    members, truth = {}, {"train": [], "test": []}
    for split, label, index in numbered("train", "test"):
        wnid = WNIDS[label]
        place = f"train/{wnid}/{wnid}_{index}.JPEG" if split == "train" else f"val/{wnid}/ILSVRC_{label}_{index}.JPEG"
        members[place] = picture(label, index)
        truth[split].append(label)
    write_tar(folder / "imagenet1k.tar", members)
    return {"files": {"imagenet1k.tar": "."}, "truth": truth, "family": "imagenet", "group": "ImageNet-1k"}


def ade20k(folder: Path) -> dict:
    """Its truth is the names of the images; an annotation has class k + 1 on the left, of colour k, and 0 elsewhere."""
    members, truth = {}, {"train": [], "test": []}
    for split, label, index in numbered("train", "test"):
        source, letters = ("training", "train") if split == "train" else ("validation", "val")
        stem = f"ADE_{letters}_{len(truth[split]) + 1:08d}"
        image, values = draw(label, index), np.zeros((48, 48), dtype=np.uint8)
        values[:, :24], image[:, 24:] = label + 1, 0
        members[f"ADEChallengeData2016/images/{source}/{stem}.jpg"] = encode(image)
        members[f"ADEChallengeData2016/annotations/{source}/{stem}.png"] = encode(values, "PNG")
        truth[split].append(stem)
    members["ADEChallengeData2016/objectInfo150.txt"] = b"Idx\tRatio\n"
    write_zip(folder / "ADEChallengeData2016.zip", members)
    return {"files": {"ADEChallengeData2016.zip": "."}, "truth": truth, "family": "ade20k", "group": "segmentation"}


def vtab(folder: Path, name: str) -> dict:
    images = {"train": [], "val": [], "test": []}
    for split, label, index in numbered("train", "val", "test"):
        images[split].append((picture(label, index), label))
    lists = {
        "train800": images["train"],
        "val200": images["val"],
        "test": images["test"],
    }
    members = {}
    for title, pairs in lists.items():
        lines = []
        for number, (content, label) in enumerate(pairs):
            path = f"images/{title}/{number:06d}.jpg"
            members[path] = content
            lines.append(f"{path} {label}\n")
        members[f"{title}.txt"] = "".join(lines).encode()
    write_zip(folder / f"{name}.zip", members)
    truth = {split: [label for _, label in pairs] for split, pairs in images.items()}
    return {"files": {f"{name}.zip": "."}, "truth": truth, "family": "vtab", "group": GROUP_OF[name]}


MAKERS: dict[str, Callable[[Path], dict]] = {
    "cifar100": cifar100,
    "fashion_mnist": fashion_mnist,
    "cub200": cub200,
    "flowers102": flowers102,
    "cars": cars,
    "cars_devkit": cars_devkit,
    "dogs": dogs,
    "imagenet1k": imagenet1k,
    "ade20k": ade20k,
}
NAMES = (*MAKERS, *GROUP_OF)


def make_archives(name: str, folder: Path) -> dict:
    """Write the archives of one data set (a name of `NAMES`) into a folder.

    Returns:
        name, classes, family and group as in the catalogue; files: {archive: the folder that it unpacks into, or
        None}; truth: {split: labels in the order that the data set lists them}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = vtab(folder, name) if name in GROUP_OF else MAKERS[name](folder)
    return made | {"name": name, "classes": CLASSES}


def entry_of(made: dict, folder: Path, base_url: str) -> dict:
    """Return the catalogue entry of what `make_archives` wrote, served at ``base_url``."""
    files = []
    for file, unpack in made["files"].items():
        content = (Path(folder) / file).read_bytes()
        about = {"name": file, "urls": [f"{base_url}/{file}"], "size": len(content)}
        about["checksum"] = f"sha256:{hashlib.sha256(content).hexdigest()}"
        files.append(about | ({"unpack": unpack} if unpack else {}))
    return {
        "family": made["family"],
        "title": f"{made['name']}, a small copy",
        "group": made["group"],
        "classes": made["classes"],
        "licence": "none: made by the tests",
        "homepage": f"{base_url}/",
        "split": ", ".join(f"{len(labels)} {split}" for split, labels in made["truth"].items()),
        "unpacked_mb": 1,
        "files": files,
    }


def make_catalogue(folder: Path, base_url: str, names=NAMES) -> Path:
    """Write the archives of all data sets into a folder, and a catalogue of them that points at ``base_url``.

    Returns:
        The catalogue's path, ``folder/datasets.yaml``.
    """
    entries = {name: entry_of(make_archives(name, folder), folder, base_url) for name in names}
    path = Path(folder) / "datasets.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return path
