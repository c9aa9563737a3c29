"""Settings of the segmentation study. Imports neither torch nor timm."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tocom.segmentation.scenes import CLASSES as SCENE_CLASSES
from tocom.settings import Fraction, Optimisation, Positive, Settings

#: Data sets by name -> number of classes.
CLASSES = {"scenes": len(SCENE_CLASSES), "ade20k": 150}


class SegmentationSizes(Settings):
    """Images in each split of generated scenes; of a folder, only ``val`` counts."""

    train: Positive = Field(400, description="scenes to train on; a folder gives all of its training images")
    val: Positive = Field(
        100, description="images to choose the epoch and the scale on; drawn from a folder's training images"
    )
    test: Positive = Field(200, description="test scenes; a folder gives all of its validation images")


class SegmentationTraining(Optimisation):
    """How a backbone and its head are trained to segment, all weights together."""

    # torch has no deterministic cross-entropy of images (nll_loss2d) on a GPU.
    deterministic: bool = Field(
        False,
        description="refuse GPU operations whose results vary from run to run, which the loss of pixels (nll_loss2d) is"
        " one of, so true works on a CPU alone; false: warn only",
    )
    head: Literal["linear", "conv"] = Field(
        "linear", description="a 1 x 1 convolution; or a 3 x 3 one, group norm and GELU before it"
    )
    min_scale: float = Field(0.5, gt=0, description="augmentation: smallest factor on the size of an image")
    max_scale: float = Field(2.0, gt=0, description="augmentation: largest factor on the size of an image")
    horizontal_flip: Fraction = Field(0.5, description="augmentation: probability of a horizontal flip")

    @model_validator(mode="after")
    def _scales_are_ordered(self):
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}; swap them")
        return self


class SegmentationSettings(Settings):
    """The segmentation section of a study's config: it stands in for ``tasks``, ``data`` and ``finetune``."""

    data: str = Field(
        "scenes",
        description="scenes (generated), ade20k, or a folder laid out so: {images,annotations}/{training,validation}",
    )
    folder: str | None = Field(
        None,
        description="of ade20k: the folder that holds ADEChallengeData2016; null: where `tocom data fetch` puts it",
    )
    classes: Annotated[int, Field(ge=2, le=255)] | None = Field(
        None, description="classes of a folder; of scenes and ade20k they are known"
    )
    image_size: Positive = Field(512, description="side of the square images that are segmented, in pixels")
    sizes: SegmentationSizes = SegmentationSizes()
    train: SegmentationTraining = SegmentationTraining()

    @model_validator(mode="after")
    def _classes_are_known(self):
        known = CLASSES.get(self.data)
        if known is None and self.classes is None:
            raise ValueError(f"data {self.data!r} is a folder; say how many classes it has")
        if known is not None and self.classes not in (None, known):
            raise ValueError(f"{self.data} has {known} classes, not {self.classes}; leave classes out")
        if self.data == "scenes" and self.folder is not None:
            raise ValueError("scenes are generated; leave folder out")
        return self

    @property
    def name(self) -> str:
        """What tables and folders call the task: the data set's name, or the folder's."""
        return self.data if self.data in CLASSES else re.sub(r"[^A-Za-z0-9_.]", "_", Path(self.data).name)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.classes or CLASSES[self.data]

    def prepare_options(self, root: str) -> str:
        """Return the arguments of `tocom segment prepare` but for its output, for a shell command.

        Args:
            root: the folder that `tocom data fetch` puts data sets into.
        """
        sizes = [part for name, n in self.sizes for part in (f"--{name}", str(n))]
        options = [self.name, "--classes", str(self.n_classes), "--image-size", str(self.image_size), *sizes]
        if self.data != "scenes":
            fetched = str(Path(root) / self.data)
            options += ["--folder", (self.folder or fetched) if self.data in CLASSES else self.data]
        return shlex.join(options)

    @property
    def is_downloaded(self) -> bool:
        """Whether the data are where `tocom data fetch` puts them."""
        return self.data == "ade20k" and self.folder is None
