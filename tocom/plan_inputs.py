"""What a plan has to know before anything is downloaded or decoded: the sizes of splits, and of models.

Imports neither torch nor timm until a model is described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tocom.config import Backbone, DataSettings, Study, TaskEntry
from tocom.data.catalogue import DataSet
from tocom.data.registry import DEFAULT_SIZES, DEFAULT_VAL, GENERATED, TASKS
from tocom.errors import TocomError
from tocom.rates import Head, label
from tocom.segmentation.settings import SegmentationSettings


class Sizes(NamedTuple):
    """Images in each split of a task; None: not known before it is downloaded or prepared."""

    train: int | None
    val: int | None
    test: int | None


UNKNOWN = Sizes(None, None, None)


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a backbone.

    Attributes:
        architecture, kwargs: what timm builds. parameters: how many numbers its weights are, classifier included.
        proportional_attention: whether ToMe's log(token size) is added, which takes time.
        segmenter_parameters: the same for the model with a head that labels pixels in place of the classifier.
    """

    architecture: str
    kwargs: dict[str, Any]
    parameters: int
    proportional_attention: bool = True
    segmenter_parameters: int = 0

    def label(self, head: Head | None = None) -> str:
        """Return its name in a CSV of rates."""
        return label(self.architecture, self.kwargs, head)


def split_sizes(train: int, val: int | None, test: int, data: DataSettings) -> Sizes:
    """Return the sizes of a task's splits as :func:`tocom.data.registry.downloaded` makes them.

    Args:
        train, val, test: images in the source's splits; val is None if it has none.
    """
    if val is None:
        wanted = DEFAULT_VAL if data.val is None else data.val
        val = round(wanted * train) if wanted < 1 else int(wanted)
        train -= val
    limits = (data.train, None if (data.val or 0) < 1 else data.val, data.test)
    counts = (train, val, test)
    return Sizes(*(n if limit is None else min(n, limit) for n, limit in zip(counts, limits, strict=True)))


def task_sizes(study: Study, task: TaskEntry, catalogue: Mapping[str, DataSet]) -> Sizes:
    """Find out how many images a task has without decoding or downloading any.

    Downloaded data, folders and CSV files are counted; of a data set that is not there, the catalogue states the
    splits. Hub data sets and Python functions are known once the task is prepared.
    """
    data = study.data_for(task.name)
    if task.kind in ("folder", "csv"):
        from tocom.data.own import read_own

        counts = {split: len(items) for split, items in read_own(task.name, task, Path(data.root)).splits.items()}
    elif task.kind:
        return _prepared_sizes(Path("results") / study.study / "data" / f"{task.name}.safetensors")
    elif task.name in TASKS:
        return _bundled_sizes(task.name, data)
    else:
        counts = _downloaded_counts(task.name, data.root, catalogue)
    if not {"train", "test"} <= counts.keys():
        return UNKNOWN
    return split_sizes(counts["train"], counts.get("val"), counts["test"], data)


def segmentation_sizes(study: Study, catalogue: Mapping[str, DataSet]) -> Sizes:
    """Find out how many images a study has to segment; ``val`` of them come from the training images of a folder.

    Raises:
        TocomError: the folder has no more training images than that.
    """
    wanted, folder = study.segmentation.sizes, study.segmentation.folder or study.segmentation.data
    if study.segmentation.data == "scenes":
        return Sizes(wanted.train, wanted.val, wanted.test)
    if study.segmentation.is_downloaded:
        counts = _downloaded_counts(study.segmentation.data, study.data.root, catalogue)
    else:
        from tocom.segmentation.ade20k import listing

        try:
            counts = {split: len(images) for split, (images, _) in listing(folder).items()}
        except TocomError:  # the folder is not there yet
            return UNKNOWN
    left = counts["train"] - wanted.val
    if left < 1:
        raise TocomError(f"{folder} has too few training images to keep {wanted.val} to choose on; lower sizes.val")
    return Sizes(left, wanted.val, counts["test"])


def _prepared_sizes(path: Path) -> Sizes:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return UNKNOWN
    try:
        with safe_open(path, framework="np") as file:
            sizes = json.loads((file.metadata() or {}).get("sizes", "{}"))
    except (SafetensorError, ValueError):
        return UNKNOWN
    return Sizes(*(sizes.get(split) for split in Sizes._fields))


def _bundled_sizes(name: str, data: DataSettings) -> Sizes:
    wanted = {split: getattr(data, split) or DEFAULT_SIZES[split] for split in Sizes._fields}
    if TASKS[name].group != GENERATED:
        left = len(TASKS[name].load()[1]) - wanted["train"] - wanted["val"]
        wanted["test"] = min(wanted["test"], left)
    return Sizes(**wanted)


def _downloaded_counts(name: str, root: str, catalogue: Mapping[str, DataSet]) -> dict[str, int]:
    """Count the images of a data set that is there; otherwise read the catalogue's statement ("800 train, ...")."""
    from tocom.data.families import load_listing

    try:
        return {split: len(items) for split, items in load_listing(name, root, catalogue).splits.items()}
    except TocomError:  # not downloaded, or only in part
        stated = re.findall(r"([\d,]+) (train|val|test)\b", catalogue[name].split)
        return {split: int(number.replace(",", "")) for number, split in stated}


def distillation_images(name: str | None, root: str, catalogue: Mapping[str, DataSet]) -> int | None:
    """Return how many images a folder or data set has to distil ToCom on, those that will be held out included.

    None: not known, or without end, as for generated letters (name None).
    """
    if name is None:
        return None
    if name in catalogue:
        return _downloaded_counts(name, root, catalogue).get("train")
    from tocom.data.registry import pretraining_files

    try:
        return len(pretraining_files(name, root))
    except TocomError:  # the folder is not there yet
        return None


def describe(backbone: Backbone, segmentation: SegmentationSettings | None = None) -> Model:
    """Return what a plan needs to know of a backbone; builds it, without memory for its weights.

    Args:
        segmentation: what else it is trained for, if it is.

    Raises:
        TocomError: the checkpoint is missing, or timm cannot build the model.
    """
    import torch

    from tocom.models import create, default_proportional_attention

    architecture = backbone.timm or backbone.architecture
    kwargs, attention = backbone.kwargs, backbone.proportional_attention
    if architecture is None:
        metadata = _checkpoint_metadata(backbone.checkpoint)
        architecture, kwargs = metadata["architecture"], metadata["kwargs"]
        attention = metadata.get("proportional_attention", True)
    elif attention is None:
        attention = default_proportional_attention(architecture)
    with torch.device("meta"):
        model = create(architecture, kwargs | {"img_size": backbone.image_size})
        segmenter = _segmenter_parameters(architecture, kwargs, segmentation) if segmentation else 0
    return Model(architecture, kwargs, _count(model), attention, segmenter)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _segmenter_parameters(architecture: str, kwargs: dict[str, Any], segmentation: SegmentationSettings) -> int:
    from tocom.models import create
    from tocom.segmentation.model import make_head

    model = create(architecture, kwargs | {"img_size": segmentation.image_size, "num_classes": 0})
    return _count(model) + _count(make_head(segmentation.train.head, model.embed_dim, segmentation.n_classes))


def _checkpoint_metadata(checkpoint: str) -> dict[str, Any]:
    from tocom.bundled import resolve
    from tocom.files import load_arrays

    metadata = load_arrays(resolve(checkpoint))[1]
    if "architecture" not in metadata:
        raise TocomError(f"{checkpoint} is not a model's checkpoint; check the path")
    return metadata
