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

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from tocom.data.catalogue import read_catalogue
from tocom.data.families import FAMILIES, why_no_task
from tocom.data.images import Resize
from tocom.data.own import OPTIONS, OwnOptions
from tocom.data.registry import TASKS, groups_of
from tocom.errors import TocomError, suggest
from tocom.segmentation.settings import SegmentationSettings, SegmentationSizes, SegmentationTraining
from tocom.settings import (
    PLAIN,
    RANDOM,
    TOCOM,
    DistilSettings,
    EvaluateSettings,
    FinetuneSettings,
    Optimisation,
    Positive,
    PretrainSettings,
    Settings,
    ThroughputSettings,
    TuningSettings,
    explain,
)

#: Compressors by name; kept equal to tocom.compress.COMPRESSORS (which imports torch) by a test.
COMPRESSOR_NAMES = ("tome", "evit", "evit_fuse", "tome_mlp")
#: Highest degree of tome_mlp, whose degrees are 32nds of the patches.
TOME_MLP_MAX = 16
#: Groups that tables make of others; kept equal to tocom.analysis.significance (which imports pandas) by a test.
RESERVED_GROUPS = ("all tasks", "VTAB-1k")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
Degree = Annotated[int, Field(ge=0)]
#: Tables in the paper's form; see tocom.analysis.paper.
PaperTable = Literal["degrees", "backbones", "compressors", "speedup", "ablation", "transfer"]


class Backbone(Settings):
    """A pre-trained model: a bundled or own checkpoint, a timm model by name, or one that the workflow pre-trains."""

    name: str = Field(description="what tables and folders call it")
    checkpoint: str | None = Field(None, description="a bundled name (glyph_vit), or a checkpoint of this project")
    timm: str | None = Field(None, description="timm model by name and tag, with its public weights or `weights`")
    revision: str | None = Field(None, description="timm: commit of the weights on the Hub; null: the newest")
    weights: str | None = Field(None, description="timm: file with its weights (.safetensors, .pth, .npz), no download")
    sha256: str | None = Field(None, description="timm: what the file of weights must hash to; null: not checked")
    num_classes: Positive | None = Field(None, description="timm: classes of the weights' classifier, if not timm's")
    architecture: str | None = Field(None, description="timm model to pre-train on letters in the workflow")
    kwargs: dict[str, Any] = Field({}, description="overrides of the timm model's arguments")
    image_size: Positive = Field(32, description="side of the images it takes, in pixels")
    patch_size: Positive = Field(4, description="side of its patches, in pixels")
    proportional_attention: bool | None = Field(
        None, description="timm: add log(token size) to attention (ToMe); null: unless it is an MAE model"
    )
    distil_images: str | None = Field(
        None, description="folder of images, or data set (imagenet1k), to distil ToCom on; null: the bundled letters"
    )

    @model_validator(mode="after")
    def _has_a_source(self):
        given = [name for name in ("checkpoint", "timm", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"backbone {self.name!r} needs one of checkpoint, timm and architecture; it has {given or 'none'}"
            )
        _check_distil_images(self.distil_images, f"backbone {self.name!r}")
        if self.timm is not None and not {"image_size", "patch_size"} <= self.model_fields_set:
            raise ValueError(
                f"backbone {self.name!r}: timm needs image_size and patch_size beside it, such as 224 and 16"
            )
        for option in ("revision", "weights", "sha256", "num_classes", "proportional_attention"):
            if getattr(self, option) is not None and self.timm is None:
                raise ValueError(f"backbone {self.name!r}: {option} goes with timm, not with {given[0]}")
        return self

    @property
    def is_made(self) -> bool:
        """Whether the workflow writes its checkpoint."""
        return self.checkpoint is None


def _check_distil_images(images: str | None, where: str) -> None:
    catalogue = read_catalogue()
    if images in catalogue and catalogue[images].family not in FAMILIES:
        raise ValueError(f"{where}: cannot distil on {images}: it {why_no_task(catalogue[images].family)}")


class TaskEntry(OwnOptions):
    """A downstream task: bundled or of the catalogue by name, or your own under a name of your own."""

    name: str = Field(description="a name from `tocom tasks` or `tocom data list`, or your own")
    data: dict[str, Any] = Field({}, description="changes of the study's data section for this task")
    finetune: dict[str, Any] = Field({}, description="changes of the study's finetune section for this task")
    fine_tuned: str | None = Field(
        None, description="a model fine-tuned elsewhere, used as it is (finetune: {tuning: {mode: none}})"
    )

    @model_validator(mode="after")
    def _known_or_own(self):
        if self.group in RESERVED_GROUPS:
            raise ValueError(f"task {self.name!r}: tables make the group {self.group!r} themselves; give another name")
        if self.kind is None and "group" in self.model_fields_set:
            raise ValueError(f"task {self.name!r}: group is for your own images; this task has its group")
        if "root" in self.data:
            raise ValueError(f"task {self.name!r}: data.root is one for all tasks; set it in the study's data section")
        if self.kind is None and self.name not in TASKS:
            catalogue = read_catalogue()
            known = [*TASKS, *(name for name, entry in catalogue.items() if entry.family in FAMILIES)]
            if self.name in catalogue and self.name not in known:
                raise ValueError(f"{self.name} cannot be a task: it {why_no_task(catalogue[self.name].family)}")
            if self.name not in known:
                raise ValueError(
                    f"unknown task {self.name!r}{suggest(self.name, known)}; see `tocom tasks` and `tocom data list`,"
                    f" or give one of {', '.join(OPTIONS)}"
                )
        return self

    @property
    def is_downloaded(self) -> bool:
        """Whether it is a data set of the catalogue."""
        return self.kind is None and self.name not in TASKS

    def source(self) -> dict[str, Any]:
        """Return the options of an own source that differ from their defaults."""
        own = self.model_dump(mode="json", include=set(OwnOptions.model_fields), exclude_defaults=True)
        return own if self.kind else {}


#: A task in a config: an entry, or its name alone.
NamedTask = Annotated[
    TaskEntry,
    BeforeValidator(
        lambda value: {"name": value} if isinstance(value, str) else value, json_schema_input_type=str | TaskEntry
    ),
]


class DataSettings(Settings):
    """Sizes of the splits, and where data sets are."""

    root: str = Field("data", description="folder of the data sets that `tocom data fetch` downloads")
    train: Positive | None = Field(None, description="images to fine-tune on; null: 800 of a bundled task, else all")
    val: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="images, or share of the training images, to choose the epoch and the scale on; null: 200 of a"
        " bundled task, else the source's own split or a tenth of the training images",
    )
    test: Positive | None = Field(None, description="test images; null: 2,000 of a bundled task, else all")
    resize: Resize = Field("crop", description="crop: scale the shorter side by 256/224, cut the centre out; or squash")

    @field_validator("val")
    @classmethod
    def _number_or_share(cls, value):
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("give a whole number of images, or a share below 1")
        return value if value is None or value < 1 else int(value)


class StageResources(Settings):
    """What one job of a stage asks for; memory and time grow with every retry."""

    mem_mb: Positive = Field(description="main memory in MB")
    runtime: Positive = Field(description="minutes")
    gpu: Annotated[int, Field(ge=0)] | None = Field(
        None, description="GPUs on each node; null: one for every process if the stage's device is cuda"
    )
    processes: Positive = Field(1, description="processes on each node that train one model together (torchrun)")
    nodes: Positive = Field(1, description="nodes that train one model together (under Slurm)")


#: What a variant of ToCom may change beside the distil section.
OWN_OF_VARIANTS = ("scales", "distil_images")
#: Stages that several processes can share.
SHARED_STAGES = ("distil", "finetune")


class Resources(Settings):
    """What the jobs of each stage ask a cluster for."""

    fetch: StageResources = StageResources(mem_mb=1000, runtime=600)
    prepare: StageResources = StageResources(mem_mb=1000, runtime=10)
    backbone: StageResources = StageResources(mem_mb=3000, runtime=120)
    distil: StageResources = StageResources(mem_mb=2000, runtime=60)
    finetune: StageResources = StageResources(mem_mb=2000, runtime=120)
    evaluate: StageResources = StageResources(mem_mb=2000, runtime=60)
    throughput: StageResources = StageResources(mem_mb=2000, runtime=30)
    analysis: StageResources = StageResources(mem_mb=2000, runtime=30)

    @model_validator(mode="after")
    def _only_training_is_shared(self):
        for stage, wanted in self:
            if stage not in SHARED_STAGES and (wanted.processes, wanted.nodes) != (1, 1):
                raise ValueError(f"{stage} runs in one process; processes and nodes are for {', '.join(SHARED_STAGES)}")
            if wanted.gpu and wanted.gpu < wanted.processes:
                raise ValueError(f"{stage}: {wanted.processes} processes need as many GPUs, not {wanted.gpu}")
        return self


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
    paper: PaperTable | None = Field(None, description="table in the paper's form, beside the published figures")
    store: str | None = Field(
        None,
        description="folder of backbones and compensators that studies share, in which a name has to mean the same to"
        " all of them; null: the study's own",
    )
    backbones: tuple[Backbone, ...] = Field(min_length=1)
    compressors: tuple[str, ...] = Field(("tome",), min_length=1)
    compensators: dict[str, dict[str, Any]] = Field(
        {TOCOM: {}},
        min_length=1,
        description="variants of ToCom: name -> changes of the distil section, scales of its own, or distil_images in"
        " place of the backbone's; the first is that of the main tables, the others are compared with it",
    )
    tasks: tuple[NamedTask, ...] = Field((), description="names, or entries with a source of your own")
    segmentation: SegmentationSettings | None = Field(None, description="segment images instead of classifying tasks")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    train_degrees: tuple[Degree | Literal[RANDOM], ...] = Field(min_length=1)
    infer_degrees: tuple[Degree, ...] = Field(min_length=1)
    max_degree: Positive = Field(description="highest degree that ToCom is distilled for")
    transfer: bool = Field(
        False,
        description="also carry the weight difference between the lowest and the highest train degree over to every"
        " other task (tasks² evaluations for each seed)",
    )
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
    resources: Resources = Resources()
    analysis: AnalysisSettings = AnalysisSettings()
    verify: VerifySettings = VerifySettings()

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
        if bool(self.tasks) == bool(self.segmentation):
            raise ValueError("give tasks to classify, or a segmentation section, and not both")
        names = [self.study, *(b.name for b in self.backbones), *self.task_names, *self.compensators]
        if self.segmentation:
            names.append(self.segmentation.name)
            if set(self.compressors) != {"tome_mlp"} or RANDOM in self.train_degrees:
                raise ValueError("a segmentation study has compressors: [tome_mlp], and no random train degree")
            if len(self.compensators) > 1 or "scales" in next(iter(self.compensators.values())):
                raise ValueError("a segmentation study has one compensator, and takes its scales from evaluate")
            for section in ("finetune", "paper", "checkpoints_per_job"):
                if section in self.model_fields_set:
                    raise ValueError(f"a segmentation study has no {section}; its training is in segmentation.train")
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a folder: use letters, digits, '_' and '.'")
        for what in ("backbones", "tasks", "seeds", "train_degrees", "infer_degrees", "compressors"):
            values = [getattr(item, "name", item) for item in getattr(self, what)]
            if len(set(values)) < len(values):
                raise ValueError(f"{what} lists something twice: {values}")
        if PLAIN in self.compensators:
            raise ValueError(f"no compensator can be called {PLAIN!r}, which tables call a cell without one")
        if self.store is not None and not all(NAME.fullmatch(part) for part in self.store.strip("/").split("/")):
            raise ValueError(f"store {self.store!r}: use letters, digits, '_' and '.' between slashes")
        highest = max(d for d in (*self.fixed_train_degrees, *self.infer_degrees))
        if highest > self.max_degree:
            raise ValueError(
                f"degree {highest} is out of range: max_degree is {self.max_degree}; raise it or drop {highest}"
            )
        if not any(train != infer for train in self.fixed_train_degrees for infer in self.infer_degrees):
            raise ValueError("no train degree differs from an inference degree; ToCom has no gap to close")
        sizes = {backbone.image_size for backbone in self.backbones}
        if len(sizes) > 1:
            raise ValueError(f"backbones take images of different sizes {sorted(sizes)}; give each size its own study")
        self._degrees_fit()
        self._overrides_are_valid()
        self._tables_can_be_made()
        return self

    def _tables_can_be_made(self) -> None:
        if self.transfer and (self.segmentation or len(self.fixed_train_degrees) < 2):
            raise ValueError("transfer needs tasks to classify, and two fixed train degrees")
        if self.transfer and any(self.finetune_for(n).tuning != self.finetune.tuning for n in self.task_names):
            raise ValueError("transfer needs tasks that are tuned alike; leave tuning to the study's finetune section")
        if self.paper == "transfer" and not self.transfer:
            raise ValueError("paper: transfer needs transfer: true")
        if self.paper == "speedup" and not self.throughput.training:
            raise ValueError("paper: speedup needs throughput: {training: true}")

    def _degrees_fit(self) -> None:
        for backbone in self.backbones:
            patches = (backbone.image_size // backbone.patch_size) ** 2
            if self.max_degree > patches // 2 and set(self.compressors) != {"tome_mlp"}:
                raise ValueError(
                    f"max_degree {self.max_degree} is out of range: {backbone.name} has {patches} patches,"
                    f" and a block removes at most half of them"
                )
        if "tome_mlp" in self.compressors and self.max_degree > TOME_MLP_MAX:
            raise ValueError(f"max_degree {self.max_degree} is out of range: tome_mlp goes up to {TOME_MLP_MAX}")

    def _overrides_are_valid(self) -> None:
        for task in self.tasks:
            val = self.data_for(task.name).val
            if task.name in TASKS and task.kind is None and val is not None and val < 1:
                raise ValueError(f"task {task.name!r} is drawn anew, so data.val must be a number of images, not {val}")
            mode = self.finetune_for(task.name).tuning.mode
            if task.fine_tuned is not None and mode != "none":
                raise ValueError(f"task {task.name!r}: fine_tuned goes with finetune: {{tuning: {{mode: none}}}}")
            if mode == "none" and (len(self.train_degrees) > 1 or RANDOM in self.train_degrees or len(self.seeds) > 1):
                raise ValueError("models that are used as they are were trained at one degree: give it, and one seed")
        for variant in self.compensators:
            self.distil_for(variant)
            self.scales_for(variant)
            images = self.compensators[variant].get("distil_images")
            if images is not None and not isinstance(images, str):
                raise ValueError(f"compensator {variant!r}: distil_images = {images!r}: name a folder or a data set")
            _check_distil_images(images, f"compensator {variant!r}")

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
    def groups(self) -> dict[str, str]:
        """Task -> group that tables average over."""
        return groups_of(self.task_names, self.own_groups)

    @property
    def own_groups(self) -> dict[str, str]:
        """The groups that the config gives to its own tasks."""
        return {task.name: task.group for task in self.tasks if task.kind}

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
        """The lowest and the highest train degree, if their gap is to be carried between tasks."""
        return (min(self.fixed_train_degrees), max(self.fixed_train_degrees)) if self.transfer else None

    # --- what the workflow builds and asks for ----------------------------------------------------------------

    @property
    def csv_names(self) -> tuple[str, ...]:
        """The tidy tables of the study."""
        if self.segmentation:
            return ("segmentation", "throughput")
        return ("cells", "throughput", "significance", *(["transfer"] if self.gap_degrees else []))

    @property
    def table_names(self) -> tuple[str, ...]:
        """The tables of a paper, without their endings."""
        if self.segmentation:
            return ("segmentation",)
        return ("main", "tasks", "significance", "throughput", *(["paper"] if self.paper else []))

    @property
    def figure_names(self) -> tuple[str, ...]:
        """The figures of a paper, without their endings."""
        return tuple(self.figure_kinds)

    @property
    def figure_kinds(self) -> dict[str, str]:
        """Every figure's name and what it shows; with several models, all but the first have theirs in the name."""
        if self.segmentation:
            return {}
        kinds = ("accuracy_vs_gflops", "gain_heatmap", *(["gap_transfer"] if self.gap_degrees else []))
        models = sorted(product([backbone.name for backbone in self.backbones], self.compressors))
        suffixes = [
            f"_{backbone}_{compressor}" if number else "" for number, (backbone, compressor) in enumerate(models)
        ]
        return {kind + suffix: kind for suffix in suffixes for kind in kinds}

    def data_for(self, task: str) -> DataSettings:
        """Return the data section with a task's changes."""
        return _changed(self.data, self.task(task).data, f"task {task!r}: data")

    def finetune_for(self, task: str) -> FinetuneSettings:
        """Return the finetune section with a task's changes."""
        return _changed(self.finetune, self.task(task).finetune, f"task {task!r}: finetune")

    def distil_for(self, variant: str) -> DistilSettings:
        """Return the distil section with a variant's changes."""
        changes = {key: value for key, value in self.compensators[variant].items() if key not in OWN_OF_VARIANTS}
        return _changed(self.distil, changes, f"compensator {variant!r}")

    def distil_images_for(self, backbone: str, variant: str) -> str | None:
        """Return the images that a variant is distilled on: its own, or the backbone's."""
        return self.compensators[variant].get("distil_images", self.backbone(backbone).distil_images)

    def scales_for(self, variant: str) -> tuple[float, ...] | None:
        """Return the candidate scales of a variant that has its own, as multiples of the trained scale."""
        if "scales" not in self.compensators[variant]:
            return None
        changes = {"scales": self.compensators[variant]["scales"], "may_decline": False}
        return _changed(self.evaluate, changes, f"compensator {variant!r}").scales

    def distilled_as(self, variant: str) -> str:
        """Return the first variant that is distilled in the same way; variants that differ in scales alone share it."""

        def way(name: str) -> tuple:
            images = tuple(self.distil_images_for(backbone.name, name) for backbone in self.backbones)
            return self.distil_for(name), images

        return next(name for name in self.compensators if way(name) == way(variant))

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of ToCom, the main one first."""
        return tuple(self.compensators)

    # --- command lines --------------------------------------------------------------------------------------

    def prepare_options(self, task: str) -> str:
        """Return the options with which `tocom prepare` makes a task."""
        entry, data = self.task(task), self.data_for(task)
        sizes = {"train": data.train, "val": data.val, "test": data.test}
        words = [f"--{name} {value}" for name, value in sizes.items() if value is not None]
        words += [f"--image-size {self.backbones[0].image_size}", f"--resize {data.resize}"]
        words += [f"--data-root {shlex.quote(data.root)}"]
        if self.finetune_for(task).augmentation == "timm":
            words.append("--no-decode-train")
        if entry.kind:
            words.append(f"--source {shlex.quote(json.dumps(entry.source()))}")
        return " ".join(words)

    def distil_options(self, backbone: str, variant: str) -> str:
        """Return the options that name the images that a variant is distilled on, if they are not the letters."""
        images = self.distil_images_for(backbone, variant)
        return f"--images {shlex.quote(images)} --data-root {shlex.quote(self.data.root)}" if images else ""

    def pretrain_options(self, backbone: str) -> str:
        """Return the options with which `tocom pretrain` builds a backbone."""
        entry = self.backbone(backbone)
        return f"--architecture {entry.architecture} --kwargs {shlex.quote(json.dumps(entry.kwargs))}"

    def import_options(self, backbone: str) -> str:
        """Return the arguments with which `tocom backbone` fetches or reads a timm model."""
        entry = self.backbone(backbone)
        words = [shlex.quote(entry.timm), f"--image-size {entry.image_size}"]
        if entry.kwargs:
            words.append(f"--kwargs {shlex.quote(json.dumps(entry.kwargs))}")
        for option in ("revision", "weights", "sha256", "num_classes"):
            value = getattr(entry, option)
            if value is not None:
                words.append(f"--{option.replace('_', '-')} {shlex.quote(str(value))}")
        if entry.proportional_attention is not None:
            words.append(f"--{'' if entry.proportional_attention else 'no-'}proportional-attention")
        return " ".join(words)

    def fine_tuned_option(self, task: str) -> str:
        """Return the option that names a model which is used as it is."""
        entry = self.task(task)
        return f"--fine-tuned {shlex.quote(entry.fine_tuned)}" if entry.fine_tuned else ""

    def throughput_options(self) -> str:
        """Return how `tocom throughput` measures: images of the size that a study segments, or the backbone's."""
        size = f" --image-size {self.segmentation.image_size}" if self.segmentation else ""
        return self.throughput.options() + size

    def scales_options(self) -> str:
        """Return the candidate scales of the variants that have their own, for `tocom evaluate`."""
        own = {name: self.scales_for(name) for name in self.compensators}
        return " ".join(f"--scales {name}={','.join(map(str, scales))}" for name, scales in own.items() if scales)

    def group_options(self) -> str:
        """Return the groups of the config's own tasks, for the analysis."""
        return " ".join(f"--group {shlex.quote(f'{task}={group}')}" for task, group in self.own_groups.items())

    def as_json(self) -> str:
        """Return the config as JSON, without what has its default; :func:`parse_study` reads it back."""
        return self.model_dump_json(exclude_defaults=True)

    def launcher(self, stage: str) -> str:
        """Return the command that starts a stage: tocom itself, or torchrun with several processes of it.

        On one node they first get GPUs that no other job has; a single process sees to that itself.
        """
        wanted: StageResources = getattr(self.resources, stage)
        each = f"--nproc-per-node {wanted.processes} -m tocom.cli"
        if wanted.nodes > 1:
            # The step that this runs in has one node; what it says of itself must not reach the step of all nodes.
            hide = "export -n $(compgen -e SLURM_ | grep -vx -e SLURM_JOB_ID -e SLURM_CONF)"
            step = f"srun --overlap --nodes={wanted.nodes} --ntasks-per-node=1"
            meet = '--rdzv-backend c10d --rdzv-endpoint "$(hostname):$((29500 + SLURM_JOB_ID % 1000))"'
            return f'{hide} && {step} torchrun --nnodes {wanted.nodes} --rdzv-id "$SLURM_JOB_ID" {meet} {each}'
        if wanted.processes == 1:
            return "tocom"
        train = self.segmentation.train if self.segmentation and stage == "finetune" else getattr(self, stage)
        gpus = self.gpus(stage, train.device)
        claim = f"python -m tocom.gpus --count {gpus} -- " if gpus else ""
        return f"{claim}torchrun --standalone {each}"

    def threads(self, stage: str, training: Optimisation) -> int:
        """Return the CPU cores on each node that a training job of a stage keeps busy: torch's, and image loaders'."""
        return getattr(self.resources, stage).processes * (training.threads + training.workers)

    def gpus(self, stage: str, device: str) -> int:
        """Return the GPUs on each node that a job of a stage asks for."""
        wanted: StageResources = getattr(self.resources, stage)
        return wanted.processes * int(device.startswith("cuda")) if wanted.gpu is None else wanted.gpu

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


def _changed(settings: Settings, changes: dict[str, Any], where: str):
    """Return settings with some changes, checked; nested sections are changed key by key.

    Raises:
        ValueError: an unknown key or a value out of range, in one line.
    """
    merged = settings.model_dump()
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if nested else value
    try:
        return type(settings).model_validate(merged)
    except ValidationError as error:
        raise ValueError(str(explain(error, where, {"": type(settings)}))) from None


def _sections() -> dict[str, type]:
    """Return the model behind every dotted place of a config, for suggestions."""
    places: dict[str, type] = {"": Study}
    for name, field in Study.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            places[name] = field.annotation
    places["segmentation"], places["finetune.tuning"] = SegmentationSettings, TuningSettings
    places["segmentation.train"], places["segmentation.sizes"] = SegmentationTraining, SegmentationSizes
    places |= {f"resources.{stage}": StageResources for stage in Resources.model_fields}
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
