"""What a study's config may say, and the grid of checkpoints and cells that it stands for.

Imports neither torch nor timm: the workflow reads it to plan jobs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from tocom.data.glyphs import SIZE as GLYPH_SIZE
from tocom.data.registry import TASKS
from tocom.errors import TocomError, suggest
from tocom.settings import (
    RANDOM,
    DistilSettings,
    EvaluateSettings,
    FinetuneSettings,
    Positive,
    PretrainSettings,
    Settings,
    ThroughputSettings,
    explain,
)

#: Compressors by name; kept equal to tocom.compress.COMPRESSORS (which imports torch) by a test.
COMPRESSOR_NAMES = ("tome", "evit", "evit_fuse")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
Degree = Annotated[int, Field(ge=0)]


class Backbone(Settings):
    """A pre-trained model."""

    name: str = Field(description="what tables and folders call it")
    checkpoint: str | None = Field(
        None, description="a bundled name (glyph_vit) or a path; null pre-trains it in the workflow"
    )
    architecture: str | None = Field(None, description="timm model to pre-train, if checkpoint is null")
    kwargs: dict[str, Any] = Field({}, description="overrides of the timm model's arguments, likewise")
    image_size: Positive = Field(32, description="side of the images it takes, in pixels")
    patch_size: Positive = Field(4, description="side of its patches, in pixels")
    distil_images: str | None = Field(
        None, description="folder of pre-training images to distil ToCom on; null: the bundled letters"
    )

    @model_validator(mode="after")
    def _has_a_source(self):
        if self.checkpoint is None and self.architecture is None:
            raise ValueError(f"backbone {self.name!r} needs a checkpoint, or an architecture to pre-train")
        return self


class TaskEntry(Settings):
    """A downstream task: a registered one by name, or a folder of images under a name of your own."""

    name: str = Field(description="a name from `tocom tasks`, or your own")
    folder: str | None = Field(None, description="folder/{train,val,test}/CLASS/*.png")

    @model_validator(mode="after")
    def _known_or_folder(self):
        if self.folder is None and self.name not in TASKS:
            raise ValueError(
                f"unknown task {self.name!r}{suggest(self.name, TASKS)}; known: {', '.join(TASKS)}; or give a folder"
            )
        return self


class DataSettings(Settings):
    """Sizes of the splits of registered tasks."""

    train: Positive = Field(800, description="images to fine-tune on")
    val: Positive = Field(200, description="images to choose the epoch and the scale on")
    test: Positive = Field(2_000, description="test images, or as many as there are")


class AnalysisSettings(Settings):
    """Statistics, tables and figures."""

    resamples: Positive = Field(2_000, description="bootstrap resamples")


class VerifySettings(Settings):
    """How far a fresh run may lie from the committed one; see the README."""

    cell_points: float = Field(8.0, gt=0, description="largest difference of one cell's accuracy, in points")
    mean_points: float = Field(2.0, gt=0, description="largest difference of a mean over seeds and tasks, in points")
    gain_points: float = Field(1.5, gt=0, description="largest difference of a mean gain of ToCom, in points")


class Checkpoint(NamedTuple):
    """A fine-tuned model of a task, less the task."""

    train_degree: int | str
    seed: int


class Study(Settings):
    """One study: what is trained, and what is evaluated."""

    study: str = Field(description="name of the study and of its folder under results/")
    backbones: tuple[Backbone, ...] = Field(min_length=1)
    compressors: tuple[str, ...] = Field(("tome",), min_length=1)
    tasks: tuple[str | TaskEntry, ...] = Field(min_length=1, description="registered names, or entries with a folder")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    train_degrees: tuple[Degree | Literal[RANDOM], ...] = Field(min_length=1)
    infer_degrees: tuple[Degree, ...] = Field(min_length=1)
    max_degree: Positive = Field(description="highest degree that ToCom is distilled for")
    distil_seed: Annotated[int, Field(ge=0)] = 0
    checkpoints_per_job: Positive = Field(
        1, description="checkpoints that one fine-tuning or evaluation job handles; more saves start-up time"
    )
    data: DataSettings = DataSettings()
    pretrain: PretrainSettings = PretrainSettings()
    distil: DistilSettings = DistilSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    throughput: ThroughputSettings = ThroughputSettings()
    analysis: AnalysisSettings = AnalysisSettings()
    verify: VerifySettings = VerifySettings()

    @field_validator("tasks")
    @classmethod
    def _names_are_tasks(cls, value):
        return tuple(TaskEntry(name=item) if isinstance(item, str) else item for item in value)

    @field_validator("compressors")
    @classmethod
    def _compressors_exist(cls, value):
        for name in value:
            if name not in COMPRESSOR_NAMES:
                hint = suggest(name, COMPRESSOR_NAMES)
                raise ValueError(f"unknown compressor {name!r}{hint}; known: {', '.join(COMPRESSOR_NAMES)}")
        return value

    @model_validator(mode="after")
    def _grid_makes_sense(self):
        names = [self.study, *(b.name for b in self.backbones), *(t.name for t in self.tasks)]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a folder: use letters, digits, '_' and '.'")
        for what in ("backbones", "tasks", "seeds", "train_degrees", "infer_degrees", "compressors"):
            values = [getattr(item, "name", item) for item in getattr(self, what)]
            if len(set(values)) < len(values):
                raise ValueError(f"{what} lists something twice: {values}")
        highest = max(d for d in (*self.fixed_train_degrees, *self.infer_degrees))
        if highest > self.max_degree:
            raise ValueError(
                f"degree {highest} is out of range: max_degree is {self.max_degree}; raise it or drop {highest}"
            )
        if not any(train != infer for train in self.fixed_train_degrees for infer in self.infer_degrees):
            raise ValueError("no train degree differs from an inference degree; ToCom has no gap to close")
        self._images_fit()
        for backbone in self.backbones:
            patches = (backbone.image_size // backbone.patch_size) ** 2
            if self.max_degree > patches // 2:
                raise ValueError(
                    f"max_degree {self.max_degree} is out of range: {backbone.name} has {patches} patches,"
                    f" and a block removes at most half of them"
                )
        return self

    def _images_fit(self) -> None:
        sizes = {backbone.image_size for backbone in self.backbones}
        if len(sizes) > 1:
            raise ValueError(f"backbones take images of different sizes {sorted(sizes)}; give each size its own study")
        if sizes != {GLYPH_SIZE} and any(task.folder is None for task in self.tasks):
            raise ValueError(
                f"registered tasks have {GLYPH_SIZE} x {GLYPH_SIZE} images, the backbones take {sizes.pop()};"
                " use folders of images"
            )

    # --- the grid -------------------------------------------------------------------------------------------

    @property
    def fixed_train_degrees(self) -> tuple[int, ...]:
        """Train degrees less the rival that draws them at random."""
        return tuple(degree for degree in self.train_degrees if isinstance(degree, int))

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the config."""
        return tuple(task.name for task in self.tasks)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint of one task."""
        return tuple(Checkpoint(degree, seed) for degree, seed in product(self.train_degrees, self.seeds))

    @property
    def batches(self) -> tuple[tuple[Checkpoint, ...], ...]:
        """The checkpoints of one task, as they are shared out to jobs."""
        size = self.checkpoints_per_job
        return tuple(self.checkpoints[start : start + size] for start in range(0, len(self.checkpoints), size))

    @cached_property
    def gap_degrees(self) -> tuple[int, int] | None:
        """The lowest and the highest train degree, whose gap is carried between tasks; None if there is one."""
        degrees = sorted(self.fixed_train_degrees)
        return (degrees[0], degrees[-1]) if len(degrees) > 1 else None

    # --- what the workflow builds and asks for ----------------------------------------------------------------

    @property
    def csv_names(self) -> tuple[str, ...]:
        """The tidy tables of the study."""
        return ("cells", "throughput", "significance", *(["transfer"] if self.gap_degrees else []))

    @property
    def table_names(self) -> tuple[str, ...]:
        """The tables of a paper, without their endings."""
        return ("main", "tasks", "significance", "throughput")

    @property
    def figure_names(self) -> tuple[str, ...]:
        """The figures of a paper, without their endings."""
        return tuple(self.figure_kinds)

    @property
    def figure_kinds(self) -> dict[str, str]:
        """Every figure's name and what it shows; with several models, all but the first have theirs in the name."""
        kinds = ("accuracy_vs_gflops", "gain_heatmap", *(["gap_transfer"] if self.gap_degrees else []))
        models = sorted(product([backbone.name for backbone in self.backbones], self.compressors))
        suffixes = [
            f"_{backbone}_{compressor}" if number else "" for number, (backbone, compressor) in enumerate(models)
        ]
        return {kind + suffix: kind for suffix in suffixes for kind in kinds}

    def folder_option(self, task: str) -> str:
        """Return the options with which `tocom prepare` finds a task that is a folder of images."""
        folder = self.task(task).folder
        return f"--folder {shlex.quote(folder)} --image-size {self.backbones[0].image_size}" if folder else ""

    def distil_options(self, backbone: str) -> str:
        """Return the option that names the images that ToCom is distilled on, if they are not the letters."""
        folder = self.backbone(backbone).distil_images
        return f"--images {shlex.quote(folder)}" if folder else ""

    def pretrain_options(self, backbone: str) -> str:
        """Return the options with which `tocom pretrain` builds a backbone."""
        entry = self.backbone(backbone)
        return f"--architecture {entry.architecture} --kwargs {shlex.quote(json.dumps(entry.kwargs))}"

    def gap_options(self, pattern: str, backbone: str, compressor: str, **_: str) -> list[str]:
        """Return TASK:SEED:LOW:HIGH for every task and seed, from the checkpoints' path pattern."""
        low, high = self.gap_degrees
        where = {"backbone": backbone, "compressor": compressor}
        return [
            ":".join(
                [task, str(seed), *(pattern.format(task=task, seed=seed, train_degree=d, **where) for d in (low, high))]
            )
            for task, seed in product(self.task_names, self.seeds)
        ]

    def task(self, name: str) -> TaskEntry:
        """Return the task called ``name``."""
        return next(task for task in self.tasks if task.name == name)

    def backbone(self, name: str) -> Backbone:
        """Return the backbone called ``name``."""
        return next(backbone for backbone in self.backbones if backbone.name == name)


def _sections() -> dict[str, type]:
    """Return the model behind every dotted place of a config, for suggestions."""
    places: dict[str, type] = {"": Study}
    for name, field in Study.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            places[name] = field.annotation
    for index in range(64):
        places[f"backbones.{index}"], places[f"tasks.{index}"] = Backbone, TaskEntry
    return places


def parse_study(config: dict[str, Any], where: str = "config") -> Study:
    """Validate a config.

    Raises:
        TocomError: an unknown key, a missing key or a value out of range, in one line.
    """
    try:
        return Study.model_validate(config)
    except ValidationError as error:
        raise explain(error, where, _sections()) from None


def read_study(path: str | os.PathLike) -> Study:
    """Read and validate a YAML config; see :func:`parse_study`."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TocomError(f"no such config: {path}; see config/ for those that ship") from None
    except yaml.YAMLError as error:
        raise TocomError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise TocomError(f"{path} is empty or not a mapping; start from config/demo.yaml")
    return parse_study(config, str(path))


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config, for editors; workflow/schemas/study.schema.json holds it."""
    return Study.model_json_schema()
