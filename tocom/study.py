"""What a study's config may say, the grid of checkpoints and cells that it stands for, and its jobs.

A job is one validated object (see :mod:`tocom.jobs`); the workflow names its files and resources and runs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tocom.data.catalogue import read_catalogue
from tocom.data.families import FAMILIES, why_no_task
from tocom.data.images import Resize
from tocom.data.own import OPTIONS, OwnOptions
from tocom.data.registry import TASKS, groups_of, kind_of_task
from tocom.errors import TocomError, suggest
from tocom.files import parse_json, read_yaml
from tocom.made import check
from tocom.methods import DEFAULTS
from tocom.parts import check_options, part_class, source_degree
from tocom.settings import (
    PLAIN,
    AdaptSettings,
    DegreeSettings,
    EvaluateSettings,
    FinetuneSettings,
    LanguageSettings,
    LearnSettings,
    Positive,
    PretrainSettings,
    SegmentSettings,
    Settings,
    ThroughputSettings,
    explain,
    shortened,
)

#: What a method may set for itself.
OWN = ("seeds", "train_degrees", "infer_degrees")
#: Groups that tables make of others.
RESERVED_GROUPS = ("all tasks", "VTAB-1k")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
Degree = Annotated[int, Field(ge=0)]
#: Tables in the paper's form; see tocom.analysis.paper.
PaperTable = Literal["degrees", "backbones", "methods", "speedup", "ablation", "transfer", "segmentation"]
#: Kind of a task -> the settings of its fine-tuning, and what is measured on it.
FINETUNE: dict[str, type[Settings]] = {
    "classify": FinetuneSettings,
    "segment": SegmentSettings,
    "language": LanguageSettings,
}
METRICS = {"classify": "accuracy", "segment": "mIoU", "language": "bits saved"}


# --- what is studied --------------------------------------------------------------------------------------------------


class Backbone(Settings):
    """A pre-trained model: a bundled or own checkpoint, a timm model by name, or one that the workflow pre-trains."""

    name: str = Field(description="what tables and folders call it")
    checkpoint: str | None = Field(None, description="a bundled name (glyph_vit), or a checkpoint of this project")
    timm: str | None = Field(None, description="timm model by name and tag, with its public weights or `weights`")
    revision: str | None = Field(None, description="timm: commit of the weights on the Hub; null: the newest")
    weights: str | None = Field(None, description="timm: file with its weights (.safetensors, .pth, .npz), no download")
    sha256: str | None = Field(None, description="timm: what the file of weights must hash to; null: not checked")
    num_classes: Positive | None = Field(None, description="timm: classes of the weights' classifier, if not timm's")
    architecture: str | None = Field(
        None, description="timm model to pre-train on letters in the workflow, or llama on text"
    )
    pretrain: dict[str, Any] = Field({}, description="architecture: changes of the study's pretrain section for it")
    kwargs: dict[str, Any] = Field(
        {}, description="overrides of the timm model's arguments; of llama, the arguments of its config"
    )
    image_size: Positive = Field(32, description="side of the images it takes, in pixels")
    patch_size: Positive = Field(4, description="side of its patches, in pixels")
    proportional_attention: bool | None = Field(
        None, description="timm: add log(token size) to attention (ToMe); null: unless it is an MAE model"
    )
    images: str | None = Field(
        None, description="folder of images, or data set (imagenet1k), to learn parts on; null: the bundled letters"
    )

    @model_validator(mode="after")
    def _has_a_source(self):
        given = [name for name in ("checkpoint", "timm", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"backbone {self.name!r} needs one of checkpoint, timm and architecture; it has {given or 'none'}"
            )
        _check_images(self.images, f"backbone {self.name!r}")
        if self.timm is not None and not {"image_size", "patch_size"} <= self.model_fields_set:
            raise ValueError(
                f"backbone {self.name!r}: timm needs image_size and patch_size beside it, such as 224 and 16"
            )
        for option in ("revision", "weights", "sha256", "num_classes", "proportional_attention"):
            if getattr(self, option) is not None and self.timm is None:
                raise ValueError(f"backbone {self.name!r}: {option} goes with timm, not with {given[0]}")
        if self.pretrain and self.architecture is None:
            raise ValueError(f"backbone {self.name!r}: pretrain goes with architecture, not with {given[0]}")
        return self

    @property
    def is_made(self) -> bool:
        """Whether the workflow writes its checkpoint."""
        return self.checkpoint is None

    @property
    def patches(self) -> int:
        """Number of patches of one of its images."""
        return (self.image_size // self.patch_size) ** 2


def _check_images(images: str | None, where: str) -> None:
    catalogue = read_catalogue()
    if images in catalogue and catalogue[images].family not in FAMILIES:
        raise ValueError(f"{where}: cannot learn on {images}: it {why_no_task(catalogue[images].family)}")


class Spec(BaseModel):
    """What a config says of a part: its name alone, or a mapping with its ``kind`` and options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    role: str = Field(exclude=True)
    kind: str

    @model_validator(mode="after")
    def _options_are_valid(self):
        try:
            check_options(self.role, self.kind, self.__pydantic_extra__)
        except TocomError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def name(self) -> str:
        """The kind, without the module of a class of one's own."""
        return self.kind.rpartition(":")[2]

    @property
    def part(self) -> Any:
        """The part's class."""
        return part_class(self.role, self.kind)

    @property
    def options(self) -> Any:
        """The part's validated options."""
        return check_options(self.role, self.kind, self.__pydantic_extra__)

    def described(self) -> dict[str, Any]:
        """Return kind and all options, as :func:`tocom.parts.make_part` takes them."""
        return {"kind": self.kind} | self.options.recipe()

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.part.label(self.options) or ("" if self.role == "tuning" else self.name)


def _as_spec(role: str):
    def convert(value):
        if value is None or isinstance(value, Spec):
            return value
        if isinstance(value, str):
            return {"role": role, "kind": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"{role} {value!r}: give a name, or a mapping with its kind and options")
        return {"kind": DEFAULTS[role]} | dict(value) | {"role": role}

    return BeforeValidator(convert, json_schema_input_type=str | dict[str, Any])


def _schema_of_entry(schema: dict[str, Any]) -> None:
    """Have the schema of a method be that of its entry in a config: with `like`, which is replaced on reading."""
    del schema["properties"]["changes"]
    meaning = "a method above that this one copies, less what it changes"
    schema["properties"]["like"] = {"type": "string", "description": meaning}


class Method(Settings):
    """How tokens are compressed, what fine-tuning trains, and what is added when the degree changes."""

    model_config = ConfigDict(json_schema_extra=_schema_of_entry)

    title: str | None = Field(None, description="what tables call it; null: made of the titles of its parts")
    compressor: Annotated[Spec, _as_spec("compressor")] = Field(
        DEFAULTS["compressor"], validate_default=True, description="what a block does at a degree"
    )
    tuning: Annotated[Spec, _as_spec("tuning")] = Field(
        DEFAULTS["tuning"], validate_default=True, description="what fine-tuning trains, at which degrees"
    )
    compensator: Annotated[Spec | None, _as_spec("compensator")] = Field(
        None, description="changes of weights between two degrees; null: none"
    )
    learn: dict[str, Any] = Field({}, description="changes of the study's learn section for what this method learns")
    adapt: dict[str, Any] | None = Field(
        None,
        description="its compensator is adapted to every fine-tuned model on images without labels: changes of the"
        " study's adapt section, {} for none; null: it is not adapted",
    )
    finetune: dict[str, Any] = Field({}, description="changes of the study's finetune section for this method")
    scales: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="candidate scales of its compensator, which need not hold 0; null: those of evaluate",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="null: those of the study"
    )
    max_degree: Positive | None = Field(None, description="highest degree of its own; null: that of the study")
    train_degrees: tuple[Degree, ...] | None = Field(None, min_length=1, description="null: those of the study")
    infer_degrees: tuple[Degree, ...] | None = Field(None, min_length=1, description="null: those of the study")
    changes: dict[str, Any] = Field({}, description="made from `like`: what the entry changes")

    @model_validator(mode="after")
    def _compensator_has_a_use(self):
        if self.compensator is None and self.scales is not None:
            raise ValueError("scales are those of a compensator; name one, or leave them out")
        if self.compensator is None and self.adapt is not None:
            raise ValueError("adapt is for a compensator; name one, or leave it out")
        return self

    @model_validator(mode="after")
    def _has_a_title(self):
        if self.title is None:
            tuned = ", ".join(filter(None, (self.compressor.label, self.tuning.label)))
            added = self.compensator and self.compensator.label + (", adapted" if self.adapt is not None else "")
            title = " + ".join(filter(None, (tuned, added)))
            object.__setattr__(self, "title", title)
        return self


def _expanded(methods: Any) -> Any:
    """Return a config's methods with every ``like`` replaced by the entry that it names, less what is changed."""
    if not isinstance(methods, Mapping):
        return methods
    done: dict[str, Any] = {}
    for name, entry in methods.items():
        if isinstance(entry, Method) or not isinstance(entry, Mapping) or "like" not in entry:
            done[name] = entry
            continue
        if not isinstance(done.get(str(entry["like"])), Method | Mapping):
            raise ValueError(f"method {name!r}: like: {entry['like']!r} is no method above it")
        base = {key: value for key, value in dict(done[entry["like"]]).items() if key not in ("title", "changes")}
        changes = {key: value for key, value in entry.items() if key != "like"}
        done[name] = base | {key: _merged(key, base.get(key), value) for key, value in changes.items()}
        done[name]["changes"] = {key: value for key, value in changes.items() if key != "title"}
    return done


def _merged(role: str, base: Any, value: Any) -> Any:
    """Return what an entry changes of another's: options of the same part are changed one by one."""
    if role not in DEFAULTS or not isinstance(value, Mapping) or "kind" in value or base is None:
        return value
    return ({"kind": base} if isinstance(base, str) else dict(base)) | dict(value)


class TaskEntry(OwnOptions):
    """A downstream task: bundled or of the catalogue by name, or your own under a name of your own."""

    name: str = Field(description="a name from `tocom tasks` or `tocom data list`, or your own")
    data: dict[str, Any] = Field({}, description="changes of the study's data section for this task")
    finetune: dict[str, Any] = Field({}, description="changes of the study's finetune section for this task")
    fine_tuned: str | None = Field(
        None, description="a model fine-tuned elsewhere, used as it is by methods with tuning: none"
    )

    @model_validator(mode="after")
    def _known_or_own(self):
        if self.group in RESERVED_GROUPS:
            raise ValueError(f"task {self.name!r}: tables make the group {self.group!r} themselves; give another name")
        if self.group.startswith(("=", "+", "-", "@")):
            raise ValueError(f"task {self.name!r}: group {self.group!r} would be a formula in a spreadsheet; rename it")
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
    """Sizes of the splits and images, and where data sets are."""

    root: str = Field("data", description="folder of the data sets that `tocom data fetch` downloads")
    train: Positive | None = Field(None, description="images to fine-tune on; null: a bundled task's default, else all")
    val: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="images, or share of the training images, to choose the epoch and the scale on; null: a bundled"
        " task's default, else the source's own split or a tenth of the training images",
    )
    test: Positive | None = Field(None, description="test images; null: a bundled task's default, else all")
    resize: Resize = Field("crop", description="crop: scale the shorter side by 256/224, cut the centre out; or squash")
    image_size: Positive | None = Field(
        None, description="side in pixels, of tasks to segment; null: the backbone's own, as images to classify have"
    )

    @field_validator("val")
    @classmethod
    def _number_or_share(cls, value):
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("give a whole number of images, or a share below 1")
        return value if value is None or value < 1 else int(value)


class Endpoint(Settings):
    """The one comparison that a study is made for, named before it is run; all others are exploratory."""

    backbone: str | None = Field(None, description="null: the first one")
    compare: tuple[str, str] | None = Field(None, description="its methods [before, after]; null: the first pair")
    tasks: str | None = Field(None, description="a group of tasks, or a task; null: all tasks")
    train_degree: Degree | None = Field(None, description="null: the lowest one")
    infer_degree: Degree | None = Field(None, description="null: the highest one")


class ExpectedSpread(Settings):
    """Standard deviations of a gain, in points, that a study is planned with: about the demo's; each prints its own."""

    image: Annotated[float, Field(ge=0)] = Field(10.0, description="of an image, whatever the training")
    seed: Annotated[float, Field(ge=0)] = Field(2.0, description="of a training, on one task")
    compensator: Annotated[float, Field(ge=0)] = Field(1.0, description="of what is learned once for all tasks")
    rest: Annotated[float, Field(ge=0)] = Field(33.0, description="of an image under a training")


class AnalysisSettings(Settings):
    """Statistics, tables and figures."""

    resamples: Positive = Field(2_000, description="bootstrap resamples, for intervals of interquartile means")
    margin: float = Field(0.3, gt=0, description="points that a compensator may cost where it is not needed")
    harmless: float = Field(1.0, gt=0, description="points that a mismatch may cost for it not to be needed")
    expected: ExpectedSpread = ExpectedSpread()


class VerifySettings(Settings):
    """How far a fresh run may lie from the committed one; see the README."""

    cell_points: float = Field(8.0, gt=0, description="largest difference of one cell's score, in points")
    mean_points: float = Field(2.0, gt=0, description="largest difference of a mean over seeds and tasks, in points")
    gain_points: float = Field(1.5, gt=0, description="largest difference of a mean gain, in points")


class Checkpoint(NamedTuple):
    """A fine-tuned model of a task, less the task: the label of its train degree, and its seed."""

    train_degree: Annotated[str, BeforeValidator(str)]
    seed: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"train-{self.train_degree}_seed-{self.seed}.safetensors"


class Study(Settings):
    """One study: what is trained, and what is evaluated."""

    # The schema is for editors: what a config extends may hold all else that is needed.
    model_config = ConfigDict(json_schema_extra={"required": ["study"]})

    study: str = Field(description="name of the study and of its folder under results/")
    extends: str | None = Field(None, exclude=True, description="config whose sections this one changes key by key")
    paper: PaperTable | None = Field(None, description="table in the paper's form, beside the published figures")
    store: str | None = Field(
        None,
        description="folder of backbones and learned parts that studies share, in which a backbone's name has to mean"
        " the same to all of them; null: the study's own",
    )
    backbones: tuple[Backbone, ...] = Field(min_length=1)
    methods: Annotated[dict[str, Method], BeforeValidator(_expanded)] = Field(
        min_length=1, description="name -> its parts; `like: NAME` copies a method above, less what the entry changes"
    )
    compare: tuple[tuple[str, str], ...] = Field(
        (), description="pairs of methods [before, after] that are compared; the first pair is the headline"
    )
    endpoint: Endpoint = Endpoint()
    tasks: tuple[NamedTask, ...] = Field(min_length=1, description="names, or entries with a source of your own")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2),
        min_length=1,
        description="models are fine-tuned, and what they need is learned on the backbone, once with each of them",
    )
    train_degrees: tuple[Degree, ...] = Field(min_length=1)
    infer_degrees: tuple[Degree, ...] = Field(min_length=1)
    max_degree: Positive = Field(description="highest degree that parts are learned for and random degrees go to")
    transfer: bool = Field(
        False,
        description="also carry the weight difference between the lowest and the highest train degree over to every"
        " other task (tasks² evaluations for each seed)",
    )
    checkpoints_per_job: Positive = Field(
        1, description="checkpoints that one fine-tuning or evaluation job handles; more saves start-up time"
    )
    data: DataSettings = DataSettings()
    pretrain: PretrainSettings = PretrainSettings()
    learn: LearnSettings = LearnSettings()
    finetune: dict[str, Any] = Field({}, description="settings of fine-tuning; see `tocom settings finetune`")
    adapt: AdaptSettings = AdaptSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    throughput: ThroughputSettings = ThroughputSettings()
    analysis: AnalysisSettings = AnalysisSettings()
    verify: VerifySettings = VerifySettings()

    @model_validator(mode="after")
    def _makes_sense(self):
        self._names_are_fit()
        self._degrees_fit()
        self._methods_fit()
        self._endpoint_exists()
        self._overrides_are_valid()
        self._tables_can_be_made()
        return self

    def _names_are_fit(self) -> None:
        for name in [self.study, *(b.name for b in self.backbones), *self.task_names, *self.methods]:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a folder: use letters, digits, '_' and '.'")
            if len(name) > 100:
                raise ValueError(f"{name[:30]!r}... cannot name a folder: use 100 letters at most")
        listed = {what: getattr(self, what) for what in ("backbones", "tasks", "compare", *OWN)}
        for name, method in self.methods.items():
            listed |= {f"method {name!r}: {what}": getattr(method, what) or () for what in OWN}
        for what, items in listed.items():
            values = [getattr(item, "name", item) for item in items]
            if len(set(values)) < len(values):
                raise ValueError(f"{what} lists something twice: {values}")
        if PLAIN in self.methods:
            raise ValueError(f"no method can be called {PLAIN!r}, which tables call a cell without a compensator")
        paths = {"data.root": self.data.root}
        paths |= {f"backbone {it.name!r}: checkpoint": it.checkpoint for it in self.backbones if it.checkpoint}
        for what, path in paths.items():
            if re.search(r"[{}\x00-\x1f\x7f]", path):
                raise ValueError(
                    f"{what} {path!r}: Snakemake takes no path with braces or control characters; rename it"
                )
        if self.store is not None and not all(NAME.fullmatch(part) for part in self.store.strip("/").split("/")):
            raise ValueError(f"store {self.store!r}: use letters, digits, '_' and '.' between slashes")

    def _degrees_fit(self) -> None:
        for name, method in self.methods.items():
            fixed = [d for d in map(source_degree, self.train_degrees_of(name)) if d is not None]
            highest, most = max((*fixed, *self.infer_degrees_of(name))), self.max_degree_of(name)
            if highest > most:
                raise ValueError(f"degree {highest} is out of range: max_degree is {most}; raise it or drop {highest}")
            _check_drawn(method.tuning.options, most, f"method {name!r}")
            for backbone in self.backbones:
                limit = method.compressor.part.highest(method.compressor.options, backbone.patches)
                if most > limit:
                    raise ValueError(
                        f"max_degree {most} is out of range: {method.compressor.name} goes up to {limit}"
                        f" with {backbone.name}, which has {backbone.patches} patches"
                    )
        for backbone in self.backbones:
            settings, where = self.pretrain_for(backbone.name), f"backbone {backbone.name!r}: pretrain"
            if backbone.architecture:
                check_pretraining(settings, self.pretrained_behind, self.pretrained_to, where)
        sizes = {backbone.image_size for backbone in self.backbones}
        if len(sizes) > 1:
            raise ValueError(f"backbones take images of different sizes {sorted(sizes)}; give each size its own study")

    def _methods_fit(self) -> None:
        for pair in self.compare:
            for name in pair:
                if name not in self.methods:
                    raise ValueError(f"compare names {name!r}{suggest(name, self.methods)}, which is no method")
            if pair[0] == pair[1]:
                raise ValueError(f"compare sets {pair[0]!r} against itself")
        kinds = {task.name: kind_of_task(task.name, task) for task in self.tasks}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"tasks are of different kinds ({kinds}); give each kind its own study")
        for name, method in self.methods.items():
            if self.task_kind == "segment" and not method.compressor.part.restores:
                raise ValueError(
                    f"method {name!r}: {method.compressor.name} takes patches away that segmentation needs"
                )
            reads = "text" if self.task_kind == "language" else "images"
            for spec in filter(None, (method.compressor, method.tuning, method.compensator)):
                if reads not in spec.part.reads:
                    raise ValueError(f"method {name!r}: {spec.name} is not for models that read {reads}")
            self.learn_for(name)
            self.adapt_for(name)
            added = method.compensator
            if added is not None and not added.part.learns(added.options):
                raise ValueError(f"method {name!r}: {added.name} learns nothing, as a compensator has to")
            if added is not None and self.plain_of(name) is None:
                raise ValueError(
                    f"method {name!r} has a compensator; list the same method without one, which it starts from"
                )
            gaps = product(map(source_degree, self.train_degrees_of(name)), self.infer_degrees_of(name))
            if added is not None and all(source in (None, target) for source, target in gaps):
                raise ValueError(
                    f"method {name!r}: no train degree differs from an inference degree;"
                    f" {added.name} has no gap to close"
                )
            if not method.tuning.part.trains_anything and (
                len(self.seeds_of(name)) > 1
                or len(self.train_degrees_of(name)) > 1
                or method.tuning.options.degree != "fixed"
            ):
                raise ValueError("models that are used as they are were trained at one degree: give it, and one seed")

    def _endpoint_exists(self) -> None:
        end = self.endpoint
        there = {
            "backbone": [backbone.name for backbone in self.backbones],
            "compare": self.compare,
            "tasks": [*self.groups.values(), *self.task_names, *RESERVED_GROUPS],
            "train_degree": [source_degree(d) for name in self.methods for d in self.train_degrees_of(name)],
            "infer_degree": [degree for name in self.methods for degree in self.infer_degrees_of(name)],
        }
        for key, known in there.items():
            value = getattr(end, key)
            if value is not None and value not in known:
                listed = ", ".join(dict.fromkeys(map(str, known)))
                raise ValueError(f"endpoint.{key}: the study has no {value!r}; give one of {listed}")

    def _overrides_are_valid(self) -> None:
        untuned = [name for name, method in self.methods.items() if not method.tuning.part.trains_anything]
        for task in self.tasks:
            for method in self.methods:
                self.finetune_for(task.name, method)
            val = self.data_for(task.name).val
            if task.name in TASKS and task.kind is None and val is not None and val < 1:
                raise ValueError(f"task {task.name!r} is drawn anew, so data.val must be a number of images, not {val}")
            if task.fine_tuned is not None and not untuned:
                raise ValueError(f"task {task.name!r}: fine_tuned goes with a method that has tuning: none")

    def _tables_can_be_made(self) -> None:
        if self.transfer and (self.task_kind != "classify" or len(self.train_degrees) < 2):
            raise ValueError("transfer needs tasks to classify, and two train degrees")
        if self.paper == "transfer" and not self.transfer:
            raise ValueError("paper: transfer needs transfer: true")
        if self.paper == "speedup" and not self.throughput.training:
            raise ValueError("paper: speedup needs throughput: {training: true}")

    def as_json(self) -> str:
        """Return what the config states as JSON; :func:`read_study` reads it back."""
        return self.model_dump_json(exclude_unset=True)

    # --- the grid -------------------------------------------------------------------------------------------

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the config."""
        return tuple(task.name for task in self.tasks)

    @property
    def task_kind(self) -> str:
        """What its tasks are: "classify", "segment" or "language"."""
        return kind_of_task(self.tasks[0].name, self.tasks[0])

    @property
    def metric(self) -> str:
        """What is measured on its tasks: "accuracy", "mIoU" or "bits saved"."""
        return METRICS[self.task_kind]

    @property
    def groups(self) -> dict[str, str]:
        """Task -> group that tables average over."""
        return groups_of(self.task_names, {task.name: task.group for task in self.tasks if task.kind})

    def train_degrees_of(self, method: str) -> tuple[str, ...]:
        """Return the labels of a method's train degrees; of one that trains at no one degree, a word."""
        tuning, degrees = self.methods[method].tuning, self.methods[method].train_degrees or self.train_degrees
        return tuning.part.labels(tuning.options, degrees)

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """Return the seeds that a method's models are fine-tuned with, and that what it learns is learned with."""
        return self.methods[method].seeds or self.seeds

    @property
    def most_seeds(self) -> int:
        """How many seeds the method with the most of them has."""
        return max(len(self.seeds_of(method)) for method in self.methods)

    @property
    def seeds_text(self) -> str:
        """How many seeds methods have."""
        fewest = min(len(self.seeds_of(method)) for method in self.methods)
        return " to ".join(map(str, dict.fromkeys((fewest, self.most_seeds))))

    def infer_degrees_of(self, method: str) -> tuple[int, ...]:
        """Return a method's inference degrees."""
        return self.methods[method].infer_degrees or self.infer_degrees

    def max_degree_of(self, method: str) -> int:
        """Return the highest degree that a method's parts are learned for and its random degrees go to."""
        return self.methods[method].max_degree or self.max_degree

    def tuned_as(self, method: str) -> str:
        """Return the first method with the same compressor (learned alike) and tuning, and all train degrees and seeds.

        They share checkpoints.
        """
        return self.first_tuned[method]

    @cached_property
    def first_tuned(self) -> dict[str, str]:
        """What :meth:`tuned_as` returns, of every method."""
        recipes = {name: self._tuned(name) for name in self.methods}
        points = {name: {*product(self.train_degrees_of(name), self.seeds_of(name))} for name in self.methods}
        return {
            name: next(first for first in recipes if recipes[first] == recipes[name] and points[name] <= points[first])
            for name in recipes
        }

    def _tuned(self, name: str) -> tuple:
        method = self.methods[name]
        learned = method.compressor.part.learns(method.compressor.options) and self.learn_for(name)
        tuned = method.tuning.described(), method.finetune, self.max_degree_of(name)
        return method.compressor.described(), learned, *tuned

    def learns(self, method: str) -> bool:
        """Return whether a method has a part that is learned on the backbone, once for all tasks."""
        parts = self.methods[method].compressor, self.methods[method].compensator
        return any(spec is not None and spec.part.learns(spec.options) for spec in parts)

    def plain_of(self, method: str) -> str | None:
        """Return the method without a compensator that shares a method's checkpoints."""
        alike = (name for name in self.sharing(self.tuned_as(method)) if self.methods[name].compensator is None)
        return next(alike, None)

    def sharing(self, tuned: str) -> tuple[str, ...]:
        """Return the methods that share the checkpoints of ``tuned``."""
        return tuple(name for name in self.methods if self.tuned_as(name) == tuned)

    @property
    def tuned(self) -> tuple[str, ...]:
        """The methods under whose names checkpoints are kept."""
        return tuple(dict.fromkeys(map(self.tuned_as, self.methods)))

    def batches(self, tuned: str) -> dict[str, tuple[Checkpoint, ...]]:
        """Return the checkpoints of one task as they are shared out to jobs, by the batch's name."""
        every = tuple(Checkpoint(*point) for point in product(self.train_degrees_of(tuned), self.seeds_of(tuned)))
        size = self.checkpoints_per_job
        parts = [every[start : start + size] for start in range(0, len(every), size)]
        return {f"batch-{number}": part for number, part in enumerate(parts)}

    def gap_degrees(self, tuned: str) -> tuple[str, str] | None:
        """Return the lowest and the highest train degree, if their gap is to be carried between tasks."""
        fixed = sorted((label for label in self.train_degrees_of(tuned) if source_degree(label) is not None), key=int)
        return (fixed[0], fixed[-1]) if self.transfer and len(fixed) > 1 else None

    # --- settings of one task, method or backbone ---------------------------------------------------------------

    def data_for(self, task: str) -> DataSettings:
        """Return the data section with a task's changes."""
        return _changed(self.data, self.task(task).data, f"task {task!r}: data")

    def finetune_for(self, task: str, method: str) -> FinetuneSettings | SegmentSettings | LanguageSettings:
        """Return the finetune section with a task's changes, and with a method's."""
        section = _changed(FINETUNE[self.task_kind](), self.finetune, "finetune")
        section = _changed(section, self.task(task).finetune, f"task {task!r}: finetune")
        return _changed(section, self.methods[method].finetune, f"method {method!r}: finetune")

    def learn_for(self, method: str) -> LearnSettings:
        """Return the learn section with a method's changes."""
        changed = _changed(self.learn, self.methods[method].learn, f"method {method!r}: learn")
        _check_images(changed.source, f"method {method!r}: learn.source")
        return changed

    def pretrain_for(self, backbone: str) -> PretrainSettings:
        """Return the pretrain section with a backbone's changes."""
        return _changed(self.pretrain, self.backbone(backbone).pretrain, f"backbone {backbone!r}: pretrain")

    @property
    def pretrained_behind(self) -> Spec:
        """The compressor that backbones are pre-trained with, if their steps draw degrees, and scored with."""
        return next(iter(self.methods.values())).compressor

    @property
    def pretrained_to(self) -> int:
        """The highest degree that steps of pre-training draw."""
        return self.max_degree_of(next(iter(self.methods)))

    def meaning_of(self, backbone: str) -> tuple[Any, ...]:
        """Return all that a backbone's checkpoint depends on, which studies that share a store have to agree on."""
        entry, settings = self.backbone(backbone), self.pretrain_for(backbone)
        drawn = (self.pretrained_behind.described(), self.pretrained_to) if settings.degree == "random" else None
        made = (settings, drawn) if entry.architecture else None
        return entry.model_copy(update={"pretrain": {}}), made

    def adapt_for(self, method: str) -> AdaptSettings | None:
        """Return the adapt section with a method's changes, or None if it adapts nothing."""
        changes = self.methods[method].adapt
        return None if changes is None else _changed(self.adapt, changes, f"method {method!r}: adapt")

    def decodes(self, task: str) -> bool:
        """Return whether a task's training images are decoded once: timm's augmentation alone starts from files."""
        recipes = [self.finetune_for(task, method) for method in self.methods]
        recipes += filter(None, map(self.adapt_for, self.methods))
        return any(getattr(recipe, "augmentation", None) != "timm" for recipe in recipes)

    def image_size_for(self, task: str) -> int:
        """Return the side in pixels of a task's images."""
        return self.data_for(task).image_size or self.backbones[0].image_size

    def task(self, name: str) -> TaskEntry:
        """Return the task called ``name``."""
        return next(task for task in self.tasks if task.name == name)

    def backbone(self, name: str) -> Backbone:
        """Return the backbone called ``name``."""
        return next(backbone for backbone in self.backbones if backbone.name == name)

    # --- files ------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The study's folder."""
        return Path("results") / self.study

    @property
    def store_folder(self) -> Path:
        """Where its backbones and learned parts are kept."""
        return Path(self.store) if self.store else self.root

    def learned_name(self, backbone: str, method: str, seed: int, role: str) -> str | None:
        """Return what the file of a method's part is called that is learned with a seed, or None if it learns none.

        The name holds a hash of everything that the part depends on but the backbone and the seed, and the seed:
        studies that share a store share what they learn in the same way, and nothing else.
        """
        spec = getattr(self.methods[method], role)
        if spec is None or not spec.part.learns(spec.options):
            return None
        if role == "compensator" and (adapted := self.adapt_for(method)) and adapted.start == "zero":
            return None
        chosen = self.methods[method]
        recipe = self.learn_for(method)
        settings = {
            "compressor": chosen.compressor.described(),
            "part": spec.described(),
            "max_degree": self.max_degree_of(method),
            "recipe": recipe.recipe() | {"source": recipe.source or self.backbone(backbone).images},
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{spec.name}-{digest[:10]}_seed-{seed}"

    def learned_file(self, backbone: str, method: str, seed: int, role: str = "compensator") -> Path | None:
        """Return the file of a method's part that is learned with a seed, or None if it learns none."""
        name = self.learned_name(backbone, method, seed, role)
        return None if name is None else self.store_folder / "learned" / backbone / f"{name}.safetensors"


def _check_drawn(settings: DegreeSettings, max_degree: int, where: str) -> None:
    try:
        settings.drawn(max_degree)
    except TocomError as error:
        raise ValueError(f"{where}: {error}") from None


def check_pretraining(settings: PretrainSettings, compressor: Spec, max_degree: int, where: str) -> None:
    """Raise ValueError if steps are to draw degrees beyond the highest, or of a compressor that needs a backbone."""
    _check_drawn(settings, max_degree, where)
    if settings.degree == "random" and compressor.part.learns(compressor.options):
        raise ValueError(
            f"{where}: {compressor.name} is learned on a backbone, so none can be pre-trained behind it;"
            " put a method with another compressor first, or set degree: fixed"
        )


def _changed(settings: Settings, changes: dict[str, Any], where: str):
    """Return settings with some changes, checked.

    Raises:
        ValueError: an unknown key or a value out of range, in one line.
    """
    try:
        return type(settings).model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        raise ValueError(str(explain(error, where, {"": type(settings)}))) from None


def _sections() -> dict[str, type]:
    """Return the model behind every dotted place of a config, for suggestions."""
    places: dict[str, type] = {"": Study}
    for name, field in Study.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            places[name] = field.annotation
    for index in range(64):
        places[f"backbones.{index}"], places[f"tasks.{index}"] = Backbone, TaskEntry
    return places


def parse_study(config: Mapping[str, Any], where: str = "config") -> Study:
    """Validate a config.

    Raises:
        TocomError: an unknown key, a missing key or a value out of range, in one line.
    """
    config = extended(config)
    methods = config.get("methods")
    places = _sections() | {f"methods.{name}": Method for name in (methods if isinstance(methods, Mapping) else ())}
    try:
        return Study.model_validate(config)
    except ValidationError as error:
        raise explain(error, where, places) from None


def read_study(path: str | os.PathLike) -> Study:
    """Read and validate a YAML config, or the study.json of a study's folder; see :func:`parse_study`."""
    check(path)
    return parse_study(read_config(path), str(path))


def read_config(path: str | os.PathLike, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the mapping in a YAML file, with what it extends; see :func:`extended`.

    Raises:
        TocomError: it is missing, no YAML or no mapping.
    """
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        raise TocomError(f"no such config: {path}; see config/ for those that ship") from None
    except (OSError, ValueError) as error:
        raise TocomError(f"cannot read {path}: {getattr(error, 'strerror', error)}; give a YAML file") from None
    if not isinstance(config, dict):
        raise TocomError(f"{path} is empty or not a mapping; start from config/demo.yaml")
    return extended(config, (*within, os.path.realpath(path)))


def extended(config: Mapping[str, Any], within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a config with what the one that it ``extends`` says where it says nothing itself.

    Sections are merged key by key, methods are added to those above; anything else takes the place of what it was.

    Args:
        within: the files that the config is in or extends.

    Raises:
        TocomError: what it extends cannot be read, or extends it in turn.
    """
    extends = config.get("extends")
    if extends is None:
        return {key: value for key, value in config.items() if key != "extends"}
    if not isinstance(extends, str) or os.path.realpath(extends) in within:
        raise TocomError(f"extends: {extends!r} is no other config; name the file of one that does not extend this one")
    base = read_config(extends, within)  # like all paths of a config, from where the study is run
    own = {key: value for key, value in config.items() if key != "extends"}
    both = [key for key, value in own.items() if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)]
    return base | own | {key: {**base[key], **own[key]} for key in both}


def read_mapping(text: str) -> dict[str, Any]:
    """Return the mapping that a text is, as JSON, or the one in the YAML file that it names.

    Raises:
        TocomError: it is neither.
    """
    if not text.lstrip().startswith("{"):
        return read_config(text)
    try:
        return parse_json(text)
    except ValueError as error:
        raise TocomError(f"{shortened(text)} is no JSON ({error}); give JSON or a YAML file") from None
