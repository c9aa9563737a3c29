"""Fine-tune a backbone for one task at some train degrees and seeds."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from tocom import distributed
from tocom.bundled import resolve
from tocom.compressed import Compressed
from tocom.errors import TocomError
from tocom.files import Paths, sha256, write_rows
from tocom.jobs import FinetuneJob
from tocom.made import made, seal
from tocom.models import compress, family_of, load_fine_tuned, load_model, pick_device, save_model
from tocom.parts import (
    Compressor,
    Tuning,
    check_backbone,
    describe,
    described,
    file_of_seed,
    load_part,
    make_part,
    source_degree,
)
from tocom.seeds import derive_seed
from tocom.study import Checkpoint
from tocom.tasks import Task, load_task
from tocom.training import explained, fit, forget, make_deterministic, resume_path

#: Images a forward pass when validation images are scored.
SCORE_BATCH = 250


@explained()
def finetune(
    job: FinetuneJob,
    backbone: str | os.PathLike,
    data: str | os.PathLike,
    output: str | os.PathLike,
    learned: Paths | None = None,
    workers: int = 0,
) -> list[dict]:
    """Fine-tune a backbone at every train degree and seed of a job, and write the best epoch of each as a checkpoint.

    The best epoch is the one with the highest validation score (ties: the lowest validation loss) at the train degree;
    the test images are not looked at. Under torchrun, all processes train one model at a time.

    Args:
        backbone: a bundled name or a checkpoint. data: a prepared task.
        output: folder of the checkpoints, ``train-DEGREE_seed-SEED.safetensors`` each, beside the curve of its
            training as CSV.
        learned: the compressor's parameters, if it is one that is learned on the backbone; of several files, a model
            starts from the one that was learned with its seed.
        workers: processes that decode and augment images; they change no result.

    Returns:
        What is stored with each checkpoint.

    Raises:
        TocomError: an input is missing, corrupt or of no seed that is needed, a degree is out of range, the loss turns
            NaN, or an operation's results vary from run to run and ``deterministic`` is set.
    """
    tuning = make_part("tuning", job.tuning, max_degree=job.max_degree)
    _check(job, tuning)
    make_deterministic(job.training.threads, job.training.deterministic)
    device = distributed.own_device(pick_device(job.training.device))
    with distributed.processes(device):
        task = load_task(data, device)
        if task.kind != job.task_kind:
            raise TocomError(f"{data} is a task to {task.kind}, the job is one to {job.task_kind}; set task_kind")
        run = _Run(job, tuning, backbone, data, task, Path(output), learned, workers)
        written = [run.write(checkpoint) for checkpoint in job.checkpoints]
        # Kept until all are there: a job that is killed before it is done makes the first ones again at once.
        for checkpoint in job.checkpoints:
            forget(run.state(checkpoint))
        if distributed.is_main():
            of_job = [run.output / checkpoint.file for checkpoint in job.checkpoints]
            seal([file for path in of_job for file in (path, path.with_suffix(".csv")) if file.exists()], folder=True)
    return written


def _check(job: FinetuneJob, tuning: Tuning) -> None:
    """Refuse, before anything is trained, what a tuning cannot do or would do under another name."""
    if job.fine_tuned is not None and tuning.trains_anything:
        raise TocomError("fine_tuned goes with a tuning that trains nothing (tuning: none); leave one of them out")
    for label, _ in job.checkpoints:
        source = source_degree(label)
        if not tuning.trains_anything:
            continue
        if label not in tuning.labels(tuning.options, () if source is None else (source,)):
            fitting = ", ".join(tuning.labels(tuning.options, ())) or "a whole number"
            raise TocomError(f"train degree {label!r} does not go with the tuning {describe(tuning)}; give {fitting}")
        if source is None and not job.max_degree:
            raise TocomError(f"train degree {label!r} needs to know how far to draw; give max_degree")
        tuning.options.drawn(job.max_degree)  # refuses what is beyond it


class _Run:
    """What the checkpoints of one job share."""

    def __init__(
        self, job: FinetuneJob, tuning: Tuning, backbone, data, task: Task, output: Path, learned, workers: int
    ):
        self.job, self.tuning, self.settings, self.task = job, tuning, job.training, task
        self.backbone, self.data, self.output, self.learned, self.workers = backbone, data, output, learned, workers

    def state(self, checkpoint: Checkpoint) -> Path:
        """Return the path beside which an interrupted training keeps its state: not in a folder that is made anew."""
        return self.output.with_name(f"{self.output.name}.{checkpoint.file}")

    def learned_with(self, seed: int) -> Path | None:
        """Return the file of the compressor's parameters for models of a seed, if it is one that is learned."""
        return file_of_seed(self.learned, seed) if self.learned else None

    def compressor(self, model: nn.Module, about: dict, seed: int) -> Compressor:
        """Return the job's compressor for models of a seed, on a backbone of which its metadata are given."""
        file = self.learned_with(seed)
        if file is not None:
            part = load_part(file, "compressor")
            check_backbone(part, file, about["sha256"])
            return part
        return make_part("compressor", self.job.compressor, family_of(model).shape_of(model), self.job.max_degree)

    def write(self, checkpoint: Checkpoint) -> dict:
        """Train, or take over, one model and write it."""
        train = self.train if self.tuning.trains_anything else self.take_over
        module, vit, about, record = train(checkpoint)
        epochs = record.pop("epochs", None)
        path = self.output / checkpoint.file
        inputs = {"backbone": self.backbone, "data": self.data, "compressor": self.learned_with(checkpoint.seed)}
        inputs["model"] = self.job.fine_tuned
        metadata = {
            "task": self.task.name,
            "group": self.task.group,
            "train_degree": checkpoint.train_degree,
            "seed": checkpoint.seed,
            "compressor": describe(vit.compressor),
            "max_degree": self.job.max_degree,
            "backbone_sha256": about["sha256"],
            **vit.how(about),
            "recipe": self.settings.recipe(),
            **self.task.about(self.settings),
            **record,
            "made": made(self.job, path, inputs, [vit.compressor, self.tuning]),
        }
        if distributed.is_main():
            beside = {"compressor": vit.compressor} | self.task.beside(module)
            save_model(path, vit.model, about["architecture"], about["kwargs"], beside, **metadata)
            if epochs:
                write_rows(epochs, path.with_suffix(".csv"))
        distributed.wait_for_all()
        return metadata

    def train(self, checkpoint: Checkpoint) -> tuple[nn.Module, Compressed, dict, dict]:
        """Fine-tune one model; return it, its ViT, the backbone's metadata and the record of the training."""
        task, settings, tuning = self.task, self.settings, self.tuning
        label, seed = checkpoint
        model, about = task.backbone(self.backbone, settings)
        task.check(model)
        run_seed = derive_seed(seed, task.name, label)
        torch.manual_seed(derive_seed(run_seed, "initial weights"))
        tuning.prepare(model)
        vit = compress(model, about, self.compressor(model, about, seed), source_degree(label) or 0).to(task.device)
        module = task.module(vit, settings)

        def score() -> tuple[float, float]:
            results, trained_at = [], vit.degree
            for degree in tuning.score_degrees(label):
                vit.set_degree(degree)
                results.append(task.validate(module, SCORE_BATCH, settings.precision, self.workers)[:2])
            vit.set_degree(trained_at)  # for tunings that leave it as it is
            return tuple(sum(values) / len(values) for values in zip(*results, strict=True))

        task_loss, loader = task.training(module, vit, settings, run_seed, self.workers)

        def step(batch) -> torch.Tensor:
            return task_loss(batch) + vit.compressor.penalty()  # in this order: it may be about this forward pass

        record = fit(
            step,
            module,
            task.n_train,
            settings,
            run_seed,
            score,
            f"finetune {task.name} degree {label} seed {seed}",
            self.identity(vit, seed),
            resume_path(self.state(checkpoint)),
            lambda: tuning.begin(vit),
            loader,
        )
        tuning.finish(model)
        kept = {"best_epoch": record["best_epoch"], "val_score": record["score"][0], "epochs": record["epochs"]}
        return module, vit, about, kept | {"tuning": describe(tuning)}

    def identity(self, vit: Compressed, seed: int) -> dict:
        """Return what names all inputs of a training."""
        learned = self.learned_with(seed)
        return {
            "backbone": sha256(resolve(self.backbone)),  # its metadata, too, decide how it is run
            "data": sha256(self.data),
            "compressor": describe(vit.compressor),
            "learned": None if learned is None else sha256(learned),
            "tuning": describe(self.tuning),
            "max_degree": self.job.max_degree,
        }

    def take_over(self, checkpoint: Checkpoint) -> tuple[nn.Module, Compressed, dict, dict]:
        """Load a model that was fine-tuned elsewhere, and score it; return what :meth:`train` does."""
        task, label = self.task, checkpoint.train_degree
        degree = source_degree(label)
        if degree is None:
            raise TocomError("a model that is used as it is was trained at one degree; name it")
        given = self.job.fine_tuned or self.backbone
        compressor = described("compressor", self.job.compressor)
        model, about = load_fine_tuned(given, self.backbone, task.classes, label, compressor)
        task.check(model)
        torch.manual_seed(derive_seed(checkpoint.seed, task.name, label, "initial weights"))  # of the compressor
        reference = load_model(self.backbone)  # what a compressor takes from a model, it takes from the backbone
        fitted = compress(*reference, self.compressor(model, about, checkpoint.seed)).compressor
        vit = compress(model, about, fitted, degree).to(task.device)
        module = task.restore(vit, about)
        score = task.validate(module, SCORE_BATCH, self.settings.precision).score
        record = {"best_epoch": 0, "val_score": score, "fine_tuned": about["fine_tuned"]}
        return module, vit, about, record | ({"tuning": about["tuning"]} if "tuning" in about else {})
