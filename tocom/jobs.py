"""The jobs of some studies: each is one validated object, which a command takes as JSON and a stage gets as it is.

A job says what is computed, not from which files (the workflow names those) nor how (workers, processes: profiles do).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from tocom.bundled import resolve
from tocom.data.catalogue import owner_of, read_catalogue
from tocom.data.listing import TaskKind
from tocom.errors import TocomError
from tocom.files import again, load_metadata, parse_json
from tocom.made import difference, how
from tocom.methods import DEFAULTS, ROLES
from tocom.parts import described
from tocom.settings import (
    AdaptSettings,
    EvaluateSettings,
    FinetuneSettings,
    LanguageSettings,
    LearnSettings,
    PretrainSettings,
    SegmentSettings,
    ServeSettings,
    Settings,
    ThroughputSettings,
    explain,
    shortened,
)
from tocom.study import (
    FINETUNE,
    Checkpoint,
    DataSettings,
    Spec,
    Study,
    check_pretraining,
    parse_study,
    read_config,
    read_mapping,
)

#: A part as :func:`tocom.parts.make_part` takes it: its name, or a mapping with its kind and options.
PartSpec = str | dict[str, Any]


class Job(Settings):
    """Base of all jobs."""

    def as_json(self) -> str:
        """Return all of the job as JSON, defaults included: another default makes another job."""
        return json.dumps(self.recipe())


class PrepareJob(Job):
    """Decode a task once and write its splits."""

    task: str = Field(description="a name from `tocom tasks` or `tocom data list`, or your own")
    source: dict[str, Any] = Field({}, description="your own images, such as {folder: data/pets}; see docs/own_data.md")
    data: DataSettings = DataSettings(image_size=32)
    decode_train: bool = Field(True, description="decode training images, too; augmentation by timm starts from files")


class ImportJob(Job):
    """Turn a timm model with its public weights, or with yours, into a backbone of this project."""

    architecture: str = Field(description="a timm ViT with its tag, such as deit_base_patch16_224.fb_in1k")
    weights: str | None = Field(None, description="file with its weights; null: timm's, downloaded")
    revision: str | None = Field(None, description="commit of the weights on the Hub")
    sha256: str | None = Field(None, description="what the file of weights must hash to")
    image_size: int | None = Field(None, description="side in pixels; position embeddings are resized")
    num_classes: int | None = Field(None, description="classes of the weights' classifier")
    kwargs: dict[str, Any] = Field({}, description="overrides of timm's arguments")
    proportional_attention: bool | None = Field(None, description="add log(token size) to attention; null: unless MAE")


class PretrainJob(Job):
    """Pre-train a backbone on procedural letters (the bundled one took this job), or a language model on text."""

    architecture: str = Field("vit_tiny_patch16_224", description="a timm ViT, or llama")
    kwargs: dict[str, Any] = Field({}, description="overrides of its arguments")
    compressor: PartSpec = Field(
        DEFAULTS["compressor"], description="what accuracy is reported with, and steps at random degrees run behind"
    )
    degrees: tuple[int, ...] = Field((0,), description="degrees to report accuracy at")
    max_degree: int = Field(0, ge=0, description="highest degree that a step may draw")
    seed: int = 0
    settings: PretrainSettings = PretrainSettings()

    @model_validator(mode="after")
    def _degrees_can_be_drawn(self):
        if self.settings.degree == "random" and not self.max_degree:
            raise ValueError("degree: random needs to know how far to draw; give max_degree")
        spec = Spec(role="compressor", **described("compressor", self.compressor))
        check_pretraining(self.settings, spec, self.max_degree, "settings")
        return self


class LearnJob(Job):
    """Learn a part on a frozen backbone with one seed, for all tasks."""

    compressor: PartSpec = Field(DEFAULTS["compressor"], description="what a block does at a degree")
    compensator: PartSpec | None = Field(
        DEFAULTS["compensator"], description="what is learned; null: the compressor itself"
    )
    max_degree: int = Field(ge=1, description="highest degree")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of its initial weights and of training")
    settings: LearnSettings = LearnSettings()
    data_root: str = Field("data", description="folder of the data sets that `tocom data fetch` downloads")


class FinetuneJob(Job):
    """Fine-tune a backbone for a task, at one or more train degrees and seeds."""

    compressor: PartSpec = Field(DEFAULTS["compressor"], description="what a block does at a degree")
    tuning: PartSpec = Field(DEFAULTS["tuning"], description="what is trained, at which degrees")
    checkpoints: tuple[Checkpoint, ...] = Field(
        (Checkpoint("0", 0),), min_length=1, description="[train degree, seed] of each, such as [[8, 0], [random, 1]]"
    )
    max_degree: int = Field(0, ge=0, description="highest degree that a tuning may draw")
    task_kind: TaskKind = Field("classify", description="what the task is")
    settings: dict[str, Any] = Field({}, description="see `tocom settings finetune`; those of the task's kind")
    fine_tuned: str | None = Field(None, description="tuning none: a model fine-tuned elsewhere; null: the backbone")

    @model_validator(mode="after")
    def _settings_are_valid(self):
        try:
            FINETUNE[self.task_kind].model_validate(self.settings)
        except ValidationError as error:
            raise ValueError(str(explain(error, "settings", {"": FINETUNE[self.task_kind]}))) from None
        return self

    @property
    def training(self) -> FinetuneSettings | SegmentSettings | LanguageSettings:
        """The validated settings."""
        return FINETUNE[self.task_kind].model_validate(self.settings)


class OfCheckpoints(Settings):
    """What is about checkpoints of one task, or about some of them."""

    train_degrees: tuple[str, ...] | None = Field(None, description="of the checkpoints that it is about; null: all")
    seeds: tuple[int, ...] | None = Field(None, description="of the checkpoints that it is about; null: all")

    def concerns(self, train_degree: str, seed: int) -> bool:
        """Return whether it is about the checkpoint of a train degree and seed."""
        return train_degree in (self.train_degrees or (train_degree,)) and seed in (self.seeds or (seed,))


class AdaptJob(OfCheckpoints, Job):
    """Adapt a compensator to the checkpoints of one task, on its images without labels."""

    compensator: PartSpec = Field(DEFAULTS["compensator"], description="what is adapted")
    max_degree: int = Field(ge=1, description="highest degree")
    settings: AdaptSettings = AdaptSettings()


class EvaluatedMethod(OfCheckpoints):
    """How one of the methods that share a checkpoint is evaluated."""

    compensated: bool = Field(False, description="whether it adds a compensator, whose file is given")
    infer_degrees: tuple[int, ...] = Field(min_length=1)
    scales: tuple[float, ...] | None = Field(
        None, min_length=1, description="candidate scales; null: those of the settings"
    )


class EvaluateJob(Job):
    """Evaluate every cell (method, inference degree) of the checkpoints of one task."""

    backbone: str = Field("", description="what tables call the backbone")
    methods: dict[str, EvaluatedMethod] = Field(min_length=1, description="methods that share these checkpoints")
    settings: EvaluateSettings = EvaluateSettings()


class TransferJob(Job):
    """Carry every task's gap between two train degrees to other tasks."""

    study: str = ""
    backbone: str = ""
    method: str = ""
    low: str = Field(description="label of the train degree that is left")
    high: str = Field(description="label of the train degree that is gone to, and run at")
    seeds: tuple[int, ...]
    settings: EvaluateSettings = EvaluateSettings()


class ThroughputJob(Job):
    """Measure images a second and memory at each degree, with and without compensators folded in, side by side."""

    study: str = ""
    backbone: str = ""
    methods: dict[str, bool] = Field(description="method -> whether it adds a compensator, whose file is given")
    compressor: PartSpec = Field(DEFAULTS["compressor"], description="what a block does at a degree")
    degrees: tuple[int, ...] = Field((0, 8, 16), min_length=1)
    image_size: int | None = Field(None, description="side in pixels; null: the backbone's own")
    settings: ThroughputSettings = ThroughputSettings()


class ServeJob(Job):
    """Replay a changing load against fixed degrees and against degrees that are chosen by it."""

    degrees: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 6, 10, 12, 14), min_length=1)
    settings: ServeSettings = ServeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


S = TypeVar("S", bound=Settings)


def read_job(kind: type[S], text: str = "{}", changes: Iterable[str] = ()) -> S:
    """Build settings from JSON or a YAML file, and from ``key=value`` changes whose keys may be dotted.

    Raises:
        TocomError: an unknown key, or a value of the wrong type or out of range.
    """
    values = read_mapping(text)
    for pair in changes:
        key, separator, value = pair.partition("=")
        if not separator:
            raise TocomError(f"--set {pair!r}: write key=value, for example --set settings.epochs=5")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise TocomError(f"--set {pair!r}: {parent} is {place!r}, of which nothing can be set; give a mapping")
        place[last] = _value(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fields = {name: field.annotation for name, field in kind.model_fields.items()}
        places = {name: of for name, of in fields.items() if isinstance(of, type) and issubclass(of, Settings)}
        raise explain(error, kind.__name__, {"": kind} | places) from None


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise TocomError(f"--set ...={shortened(text)}: {error}; give a plain value") from None


def read_studies(paths: Iterable[str | os.PathLike]) -> list[Study]:
    """Read configs of studies, and of lists of studies (``configs``)."""
    configs = {str(path): read_config(path) for path in paths}
    return [
        study
        for path, config in configs.items()
        for study in (Plan.of(config) if "configs" in config else Plan({path: config})).studies.values()
    ]


class Plan:
    """The studies of one run of the workflow, and the jobs and files behind its wildcards.

    Args:
        configs: what errors call a config -> its mapping.

    Raises:
        TocomError: a config is wrong; two studies have one name, or mean different things by one backbone of a store.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]):
        self.studies: dict[str, Study] = {}
        for path, config in configs.items():
            study = parse_study(config, path)
            if study.study in self.studies:
                raise TocomError(f"two configs are of a study {study.study!r}; give each its own name")
            self.studies[study.study] = study
        #: (store, name) -> the first study that has the backbone.
        self.backbones: dict[tuple[str, str], Study] = {}
        #: (store, backbone, name of the file) -> the job that learns the part.
        self.learned: dict[tuple[str, str, str], LearnJob] = {}
        #: The same key of a compensator -> the file of the learned compressor that it is learned behind.
        self.learned_behind: dict[tuple[str, str, str], str] = {}
        for study in self.studies.values():
            self._add_store(study)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Plan:
        """Return the plan of what Snakemake was given: one study, or ``configs``, a list of their files."""
        if "configs" not in config:
            return cls({"config": config})
        files = config["configs"]
        if (
            not isinstance(files, list | tuple)
            or not files
            or not all(isinstance(file, str | os.PathLike) for file in files)
        ):
            raise TocomError(f"configs = {shortened(files)}: give a list of the studies' files")
        return cls({path: read_config(path) for path in config["configs"]})

    def _add_store(self, study: Study) -> None:
        store = str(study.store_folder)
        for backbone in study.backbones:
            first = self.backbones.setdefault((store, backbone.name), study)
            if first.meaning_of(backbone.name) != study.meaning_of(backbone.name):
                raise TocomError(
                    f"{first.study} and {study.study} mean different things by the backbone {backbone.name!r} of their"
                    f" store {store}; give one of them another name"
                )
            pairs = [(method, seed) for method in study.methods for seed in study.seeds_of(method)]
            for (method, seed), role in product(pairs, ROLES):
                name = study.learned_name(backbone.name, method, seed, role)
                if name is not None:
                    key = (store, backbone.name, name)
                    self.learned.setdefault(key, learn_job(study, backbone.name, method, seed, role))
                    behind = study.learned_file(backbone.name, method, seed, "compressor")
                    if role == "compensator" and behind is not None:
                        self.learned_behind[key] = str(behind)

    # --- what the wildcards stand for ------------------------------------------------------------------------

    def study(self, wildcards: Any) -> Study:
        """Return the study of a job."""
        return self.studies[wildcards.study]

    @property
    def stores(self) -> list[str]:
        """The folders of backbones and learned parts."""
        return sorted({store for store, _ in self.backbones})

    @property
    def data_roots(self) -> list[str]:
        """The folders of downloaded data sets."""
        return sorted({study.data.root for study in self.studies.values()})

    def made(self, key: str) -> list[str]:
        """Return the names of the backbones that are imported ("timm") or pre-trained ("architecture")."""
        return sorted({name for (_, name), study in self.backbones.items() if getattr(study.backbone(name), key)})

    # --- jobs --------------------------------------------------------------------------------------------------

    def prepare(self, wildcards: Any) -> PrepareJob:
        """Return the job that writes a task's splits."""
        study, name = self.study(wildcards), wildcards.task
        entry = study.task(name)
        return PrepareJob(
            task=name,
            source=entry.source(),
            data=study.data_for(name).model_copy(update={"image_size": study.image_size_for(name)}),
            decode_train=study.decodes(name),
        )

    def import_backbone(self, wildcards: Any) -> ImportJob:
        """Return the job that imports a timm model."""
        study, name = self.backbones[wildcards.store, wildcards.backbone], wildcards.backbone
        entry = study.backbone(name)
        same = {key: getattr(entry, key) for key in ImportJob.model_fields if key != "architecture"}
        return ImportJob(architecture=entry.timm, **same)

    def pretrain(self, wildcards: Any) -> PretrainJob:
        """Return the job that pre-trains a backbone."""
        study, name = self.backbones[wildcards.store, wildcards.backbone], wildcards.backbone
        entry, highest = study.backbone(name), study.pretrained_to
        return PretrainJob(
            architecture=entry.architecture,
            kwargs=entry.kwargs,
            compressor=study.pretrained_behind.described(),
            degrees=tuple(range(highest + 1)),
            max_degree=highest,
            settings=study.pretrain_for(name),
        )

    def check_backbones(self) -> None:
        """Raise TocomError if a store's backbone was made by another job than the one that is planned for its name.

        A study that was planned apart may have made it; what Snakemake knows of it lies in that study's folder.
        """
        for (store, name), study in self.backbones.items():
            where, entry = SimpleNamespace(store=store, backbone=name), study.backbone(name)
            file = Path(self.backbone_file(where))
            made = load_metadata(file).get("made") if entry.is_made and file.is_file() else None
            if made is None:
                continue
            job = how((self.pretrain if entry.architecture else self.import_backbone)(where))
            if job.get("settings", {}).get("degree") == "fixed":  # then these say at which degrees it is scored alone
                job = {key: value for key, value in job.items() if key not in ("compressor", "degrees", "max_degree")}
            if changed := difference(made["job"], job):
                raise TocomError(
                    f"{file} is of another config than {study.study}'s: {changed}; give the backbone another name,"
                    f" or the study another store, or {again(file)}"
                )

    def learn(self, wildcards: Any) -> LearnJob:
        """Return the job that learns a part."""
        return self.learned[wildcards.store, wildcards.backbone, wildcards.part]

    def finetune(self, wildcards: Any) -> FinetuneJob:
        """Return the job that fine-tunes a batch of checkpoints."""
        study, tuned = self.study(wildcards), wildcards.tuned
        method, entry = study.methods[tuned], study.task(wildcards.task)
        return FinetuneJob(
            compressor=method.compressor.described(),
            tuning=method.tuning.described(),
            checkpoints=study.batches(tuned)[wildcards.batch],
            max_degree=study.max_degree_of(tuned),
            task_kind=study.task_kind,
            settings=study.finetune_for(entry.name, tuned).recipe(),
            fine_tuned=None if method.tuning.part.trains_anything else entry.fine_tuned,
        )

    def adapt(self, wildcards: Any) -> AdaptJob:
        """Return the job that adapts a method's compensator to a batch of checkpoints."""
        study, name = self.study(wildcards), wildcards.method
        return AdaptJob(
            compensator=study.methods[name].compensator.described(),
            train_degrees=study.train_degrees_of(name),
            seeds=study.seeds_of(name),
            max_degree=study.max_degree_of(name),
            settings=study.adapt_for(name),
        )

    def adapted_from(self, wildcards: Any) -> list[str]:
        """Return the files of the compensator that is adapted, one a seed of the batch; none: it starts from zero."""
        study = self.study(wildcards)
        seeds = self._seeds_of(wildcards, study.tuned_as(wildcards.method))
        return [file for _, file in self._files_of(study, wildcards.backbone, [wildcards.method], seeds)]

    def adapted_to(self, wildcards: Any, pattern: str) -> str:
        """Return the folder of checkpoints that a method's compensator is adapted to, from its pattern."""
        return _of_batch(wildcards, pattern, tuned=self.study(wildcards).tuned_as(wildcards.method))

    def evaluate(self, wildcards: Any) -> EvaluateJob:
        """Return the job that evaluates a batch of checkpoints."""
        study = self.study(wildcards)
        methods = {
            name: EvaluatedMethod(
                compensated=study.methods[name].compensator is not None,
                infer_degrees=study.infer_degrees_of(name),
                train_degrees=study.train_degrees_of(name),
                seeds=study.seeds_of(name),
                scales=study.methods[name].scales,
            )
            for name in study.sharing(wildcards.tuned)
        }
        return EvaluateJob(backbone=wildcards.backbone, methods=methods, settings=study.evaluate)

    def transfer(self, wildcards: Any) -> TransferJob:
        """Return the job that carries gaps between tasks."""
        study = self.study(wildcards)
        low, high = study.gap_degrees(wildcards.tuned)
        names = {"study": study.study, "backbone": wildcards.backbone, "method": wildcards.tuned}
        return TransferJob(**names, low=low, high=high, seeds=study.seeds_of(wildcards.tuned), settings=study.evaluate)

    def throughput(self, wildcards: Any) -> ThroughputJob:
        """Return the job that measures a method's compressor, plain and with each kind of compensator."""
        study, tuned = self.study(wildcards), wildcards.tuned
        sharing = self.measured_with(study, tuned)
        degrees = {0, *(degree for name in sharing for degree in study.infer_degrees_of(name))}
        size = study.image_size_for(study.tasks[0].name) if study.task_kind == "segment" else None
        return ThroughputJob(
            study=study.study,
            backbone=wildcards.backbone,
            methods={name: study.methods[name].compensator is not None for name in sharing},
            compressor=study.methods[tuned].compressor.described(),
            degrees=tuple(sorted(degrees)),
            image_size=size,
            settings=study.throughput,
        )

    # --- files -------------------------------------------------------------------------------------------------

    def backbone_file(self, wildcards: Any) -> str:
        """Return the bundled or given checkpoint of a backbone, or the one that the workflow makes."""
        name, of_study = wildcards.backbone, hasattr(wildcards, "study")  # else a job of the store
        study = self.study(wildcards) if of_study else self.backbones[wildcards.store, name]
        entry = study.backbone(name)
        return f"{study.store_folder}/backbones/{name}.safetensors" if entry.is_made else str(resolve(entry.checkpoint))

    def compensators(self, wildcards: Any) -> list[tuple[str, str]]:
        """Return (method, file) of the compensators that a batch of checkpoints is evaluated with, one a seed of it,
        but for those that are adapted to them (:meth:`adapted`)."""
        study = self.study(wildcards)
        sharing = [name for name in study.sharing(wildcards.tuned) if study.methods[name].adapt is None]
        return self._files_of(study, wildcards.backbone, sharing, self._seeds_of(wildcards))

    def adapted(self, wildcards: Any, pattern: str) -> list[tuple[str, str]]:
        """Return (method, folder) of the compensators that are adapted to a batch of checkpoints, by their pattern."""
        study = self.study(wildcards)
        methods = [name for name in study.sharing(wildcards.tuned) if study.methods[name].adapt is not None]
        return [(name, _of_batch(wildcards, pattern, method=name)) for name in methods]

    def timed_compensators(self, wildcards: Any) -> list[tuple[str, str]]:
        """Return (method, file) of the compensators that are timed beside ``tuned``: any seed costs the same."""
        study = self.study(wildcards)
        methods = self.measured_with(study, wildcards.tuned)
        found = [self._files_of(study, wildcards.backbone, [name], study.seeds_of(name)[:1]) for name in methods]
        return [file for files in found for file in files]

    @staticmethod
    def _files_of(
        study: Study, backbone: str, methods: Iterable[str], seeds: Iterable[int], role: str = "compensator"
    ) -> list[tuple[str, str]]:
        wanted = [(method, seed) for method, seed in product(methods, seeds) if seed in study.seeds_of(method)]
        files = [(method, study.learned_file(backbone, method, seed, role)) for method, seed in wanted]
        return [(method, str(path)) for method, path in files if path is not None]

    def _seeds_of(self, wildcards: Any, tuned: str | None = None) -> list[int]:
        batch = self.study(wildcards).batches(tuned or wildcards.tuned)[wildcards.batch]
        return sorted({checkpoint.seed for checkpoint in batch})

    def learned_before(self, wildcards: Any) -> list[str]:
        """Return the file of the learned compressor that a compensator is learned behind, if it is one."""
        key = (wildcards.store, wildcards.backbone, wildcards.part)
        return [self.learned_behind[key]] if key in self.learned_behind else []

    def compressors(self, wildcards: Any) -> list[str]:
        """Return the files of the compressor that a batch is fine-tuned with, one a seed of it, if it is learned."""
        return self._compressors(wildcards, self._seeds_of(wildcards))

    def timed_compressor(self, wildcards: Any) -> list[str]:
        """Return the file of the compressor that is timed, if it is learned."""
        return self._compressors(wildcards, self.study(wildcards).seeds_of(wildcards.tuned)[:1])

    def _compressors(self, wildcards: Any, seeds: Iterable[int]) -> list[str]:
        study, tuned = self.study(wildcards), [wildcards.tuned]
        return [file for _, file in self._files_of(study, wildcards.backbone, tuned, seeds, "compressor")]

    def fetched(self, name: str | None, root: str) -> list[str]:
        """Return the mark that a data set of the catalogue was downloaded; other names need none."""
        catalogue = read_catalogue()
        return [f"{root}/{owner_of(name, catalogue)}/.complete.json"] if name in catalogue else []

    def task_data(self, wildcards: Any) -> list[str]:
        """Return what has to be downloaded before a task is prepared."""
        study = self.study(wildcards)
        entry = study.task(wildcards.task)
        return self.fetched(entry.name if entry.is_downloaded else None, study.data.root)

    def learning_data(self, wildcards: Any) -> list[str]:
        """Return what has to be downloaded before a part is learned."""
        job = self.learn(wildcards)
        return self.fetched(job.settings.source, job.data_root)

    def gap_tasks(self, wildcards: Any) -> list[str]:
        """Return the task of each pair of :meth:`gap_files`."""
        study = self.study(wildcards)
        return [task for task in study.task_names for _ in study.batches(wildcards.tuned)]

    def gap_files(self, wildcards: Any, data: str, checkpoints: str) -> list[tuple[str, str]]:
        """Return (prepared file, folder of checkpoints) of every task and batch, from their patterns."""
        study, fixed = self.study(wildcards), {"backbone": wildcards.backbone, "tuned": wildcards.tuned}
        return [
            (
                data.format(study=study.study, task=task),
                checkpoints.format(study=study.study, task=task, batch=batch, **fixed),
            )
            for task in study.task_names
            for batch in study.batches(wildcards.tuned)
        ]

    def all_learned(self, wildcards: Any) -> list[str]:
        """Return the files of all that a study learns on its backbones."""
        study = self.study(wildcards)
        found = [
            self._files_of(study, backbone.name, [method], study.seeds_of(method), role)
            for backbone, method, role in product(study.backbones, study.methods, ROLES)
        ]
        return list(dict.fromkeys(file for files in found for _, file in files))

    @property
    def pretrained(self) -> list[str]:
        """The files of all backbones that are pre-trained."""
        return [
            f"{store}/backbones/{name}.safetensors"
            for store, name in self.backbones
            if name in self.made("architecture")
        ]

    def measured_with(self, study: Study, tuned: str) -> list[str]:
        """Return the methods that are timed side by side: the plain one of ``tuned``, and one with each kind of
        compensator that has its compressor; a variant of a compensator costs the same once it is folded in."""
        wanted, kinds = study.methods[tuned].compressor.described(), {}
        for name, method in study.methods.items():
            learned = study.learned_name(study.backbones[0].name, name, study.seeds_of(name)[0], "compensator")
            if learned is not None and method.compressor.described() == wanted:
                kinds.setdefault(method.compensator.kind, name)
        return [study.plain_of(tuned), *kinds.values()]

    def per_model(self, study: Study, pattern: str, of: str = "checkpoints") -> list[str]:
        """Return a pattern filled in for everything of a study that it stands for.

        Args:
            of: "checkpoints": every batch of checkpoints; "adapted": the batches that a method's compensator is adapted
                to; "gaps": methods whose gap is carried between tasks; "speed": the first method of every compressor.
        """
        chosen = {
            "checkpoints": study.tuned,
            "adapted": [name for name, method in study.methods.items() if method.adapt is not None],
            "gaps": [name for name in study.tuned if study.gap_degrees(name)],
            "speed": [name for name in study.tuned if self._first_of_compressor(study, name)],
        }
        found = dict.fromkeys(
            pattern.format(study=study.study, backbone=backbone.name, tuned=tuned, method=tuned, task=task, batch=batch)
            for backbone in study.backbones
            for tuned in chosen[of]
            for task in study.task_names
            for batch in study.batches(study.tuned_as(tuned))
        )
        return list(found)

    @staticmethod
    def _first_of_compressor(study: Study, name: str) -> bool:
        wanted = study.methods[name].compressor.described()
        return name == next(tuned for tuned in study.tuned if study.methods[tuned].compressor.described() == wanted)


def _of_batch(wildcards: Any, pattern: str, **other: str) -> str:
    """Return a pattern filled in for a batch of checkpoints, and something else that it names."""
    return pattern.format(
        **{name: getattr(wildcards, name) for name in ("study", "backbone", "task", "batch")}, **other
    )


def learn_job(study: Study, backbone: str, method: str, seed: int, role: str) -> LearnJob:
    """Return the job that learns the compressor or the compensator of a method on a backbone."""
    chosen, settings = study.methods[method], study.learn_for(method)
    source = settings.source or study.backbone(backbone).images
    return LearnJob(
        compressor=chosen.compressor.described(),
        compensator=chosen.compensator.described() if role == "compensator" else None,
        max_degree=study.max_degree_of(method),
        seed=seed,
        settings=settings.model_copy(update={"source": source}),
        **({} if source is None else {"data_root": study.data.root}),  # where letters are learned on, it is no matter
    )
