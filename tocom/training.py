"""The one training loop: micro-batches over one or several processes, best epoch on held-out data, exact resume."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from tocom import distributed
from tocom.errors import TocomError, suggest
from tocom.files import alone, atomic
from tocom.seeds import random_state, seed_everything, set_random_state
from tocom.settings import Optimisation

#: Seconds of training after which the state is saved within an epoch, too; and how many states are kept, of which one
#: that cannot be read gives way to an older.
SAVE_SECONDS, KEEP_STATES = 600.0, 2
#: Environment variable that names a folder for TensorBoard's files; without it none are written.
TENSORBOARD = "TOCOM_TENSORBOARD"
#: Settings' names of the autocast types.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS repeats its results, says NVIDIA.
REPEATABLE_CUBLAS = (":4096:8", ":16:8")


def normalise(images: Tensor, model: nn.Module) -> Tensor:
    """Turn uint8 images [B, 3, H, W] into what the model was pre-trained on: (pixel / 255 - mean) / std.

    The mean and std are those of timm's ``pretrained_cfg``; a model built with ``pretrained_cfg_overlay`` brings
    its own.
    """
    mean, std = (
        torch.tensor(model.pretrained_cfg[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std")
    )
    return (images.float() / 255.0 - mean) / std


def make_deterministic(threads: int, strict: bool = False) -> None:
    """Make torch give the same numbers for the same seed, whatever else runs on the machine.

    To be called before anything is put on a GPU.

    Args:
        strict: refuse GPU operations whose results vary from run to run, instead of warning of them. Only then does
            torch also take the backward pass of attention that repeats its results.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPEATABLE_CUBLAS:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPEATABLE_CUBLAS[0]
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and guards against nothing here


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's refusal of an operation whose results vary into a TocomError; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise TocomError(
            f"{operation.splitlines()[-1]} gives results that vary from run to run on this device;"
            " use another device, or set deterministic: false (--set deterministic=false) to train all the same"
        ) from error


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Shift each image [B, C, H, W] by up to ``pixels`` in x and y, repeating its edge."""
    if not pixels:
        return images
    batch, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, batch)) - pixels
    rows = (dy[:, None] + torch.arange(height)).clamp(0, height - 1)[:, None, :, None]
    columns = (dx[:, None] + torch.arange(width)).clamp(0, width - 1)[:, None, None, :]
    first = torch.arange(batch)[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return images[first, channels, rows, columns]


def bar(items: Iterable, title: str, total: int | None = None, done: int = 0) -> tqdm:
    """Show progress with the time left; in a log file, one update every few seconds; on the main process alone.

    Args:
        done: steps of an earlier run, which count for progress but not for the rate.
    """
    interval = 0.2 if sys.stderr.isatty() else 10
    hidden = not distributed.is_main()
    options = {"initial": done, "mininterval": interval, "dynamic_ncols": True, "disable": hidden}
    return tqdm(items, desc=title, total=total, **options)


def autocast(precision: str, device: torch.device):
    """Return a context in which torch computes in "bf16" or "fp16" where that is safe; "fp32" changes nothing."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)


@contextmanager
def inference(module: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision as :func:`autocast` does, without gradients, and cast weights once, not in every pass.

    Linear layers and convolutions then hold the weights that autocast would make of theirs; the results are the same.
    """
    own = cast_weights(module, precision)
    try:
        with torch.inference_mode(), autocast(precision, device):
            yield
    finally:
        for parameter, data in own:
            parameter.data = data


def cast_weights(module: nn.Module, precision: str) -> list[tuple[nn.Parameter, Tensor]]:
    """Put the weights of linear layers and convolutions into the type of a precision, for good; return what was there.

    What other modules share (tied embeddings) stays as it is.
    """
    if precision not in DTYPES:
        return []
    parameters: dict[bool, dict[int, nn.Parameter]] = {True: {}, False: {}}
    for layer in module.modules():
        cast = isinstance(layer, nn.Linear | nn.Conv2d)
        parameters[cast] |= {id(parameter): parameter for parameter in layer.parameters(recurse=False)}
    own = [(p, p.data) for key, p in parameters[True].items() if key not in parameters[False]]
    for parameter, data in own:
        parameter.data = data.to(DTYPES[precision])
    return own


def compiled(module: nn.Module, settings: Optimisation) -> Callable:
    """Return the module, compiled if the settings say so.

    Every degree is a program of its own, so torch is allowed more of them than it is by default: with 17 degrees,
    teacher and student, training and scoring, and partial batches, distillation needs more than a hundred.

    Raises:
        TocomError: torch has no such backend.
    """
    if settings.compile is None:
        return module
    if settings.compile not in torch.compiler.list_backends(()):
        known = torch.compiler.list_backends()
        raise TocomError(
            f"compile {settings.compile!r}: torch has no such backend{suggest(settings.compile, known)};"
            f" it has {', '.join(known)}; null compiles nothing"
        )
    torch.compiler.reset()  # what an earlier run of this process compiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(module, backend=settings.compile, dynamic=False)


def check_pairs(settings: Optimisation) -> None:
    """Raise TocomError if a micro-batch whose images are to be mixed in pairs would be of odd size."""
    size = _micro_batch_size(settings, distributed.world_size())
    if settings.mixes and (size % 2 or settings.batch_size % size):
        raise TocomError(
            f"mixup and cutmix mix pairs: batch_size {settings.batch_size} must be a multiple of the micro-batch's"
            f" {size} images, and that even"
        )


def _micro_batch_size(settings: Optimisation, processes: int) -> int:
    return settings.micro_batch_size or math.ceil(settings.batch_size / processes)


def pieces_of(batch: Tensor, settings: Optimisation, processes: int) -> tuple[Tensor, ...]:
    """Split the indices of a batch into micro-batches, of sizes that differ by one at most.

    The number of them is that of a full batch, so that a partial one, too, is shared by all processes; some may then
    be empty.

    Raises:
        TocomError: the micro-batches of a full batch cannot be shared out evenly among the processes.
    """
    size = _micro_batch_size(settings, processes)
    number = math.ceil(settings.batch_size / size)
    if number % processes:
        raise TocomError(
            f"{number} micro-batches (batch_size {settings.batch_size}, micro_batch_size {size}) cannot be shared out"
            f" evenly among {processes} processes; change one of the three"
        )
    return batch.tensor_split(number)


def fit(
    step: Callable[[Any], Tensor],
    module: nn.Module,
    n_images: int,
    settings: Optimisation,
    seed: int,
    score: Callable[[], tuple[float, ...]],
    title: str,
    identity: dict,
    resume: Path | None = None,
    begin: Callable[[], None] | None = None,
    feed: Callable[[int, list[Tensor]], Iterator] | None = None,
) -> dict:
    """Train ``module`` in place and leave it with the parameters and buffers of its best epoch.

    A step adds up the gradients of its micro-batches, whichever process computes them; each of several micro-batches
    has a random state of its own, from (seed, epoch, step, micro-batch). So one process that accumulates and several
    that share give the same parameters, but for the order of sums. A step of one micro-batch draws from the stream
    that is seeded with (seed, epoch). A run that was killed and resumed gives the parameters of one that was not.

    Args:
        step: maps what ``feed`` yields for a micro-batch to its mean loss; draws from global generators.
        module: what is trained; only its parameters that require gradients.
        score: called after each epoch; larger tuples are better.
        identity: JSON-able values that name all inputs of the run (hashes, degrees); a state that was left by a
            run with other inputs or settings is not resumed.
        resume: where the state is kept; removed by :func:`forget` once the result is written.
        begin: called at the start of every step with the same random state in all processes: draws degrees.
        feed: (epoch, pieces) -> an iterator with an item for each of these index tensors [B]; by default the
            indices themselves.

    Returns:
        ``best_epoch`` (from 1), ``score`` of it, ``losses`` by epoch, ``seconds`` (those before an interruption
        included) and ``epochs``: a row for each, with loss, held-out figures, learning rate (at its end) and seconds.

    Raises:
        TocomError: the loss or a held-out figure is NaN or infinite (no state is left to resume from), there are too
            few images for one batch, or the micro-batches do not fit the processes.
    """
    begin, feed = begin or (lambda: None), feed or (lambda epoch, pieces: iter(pieces))
    with _alone(resume, title):
        return _fit(_Trainer(module, n_images, settings, title, resume), step, seed, score, identity, begin, feed)


@contextmanager
def _alone(resume: Path | None, title: str) -> Iterator[None]:
    """Have no other run keep its states in the same place; one that comes second goes on from those of the first."""
    with ExitStack() as stack:
        if resume is not None and distributed.is_main():
            busy = f"{title}: another process is at it; waiting for it"
            stack.enter_context(alone(resume.with_name(f"{resume.name}.lock"), busy))
        distributed.wait_for_all()
        yield


def _fit(
    trainer: _Trainer, step: Callable, seed: int, score: Callable, identity: dict, begin: Callable, feed: Callable
) -> dict:
    module, n_images, settings, title = trainer.module, trainer.n_images, trainer.settings, trainer.title
    # Random states follow micro-batches, of which there is one for every process unless their size is stated.
    processes = distributed.world_size() if settings.micro_batch_size is None else None
    fingerprint = [title, seed, n_images, settings.recipe(), identity, processes]
    trainer.load(json.dumps(fingerprint, sort_keys=True))
    with bar(None, title, total=trainer.per_epoch * settings.epochs, done=trainer.steps_done) as progress:
        while trainer.epoch < settings.epochs:
            module.train()
            trainer.run_epoch(step, begin, feed, seed, progress)
            module.eval()
            with trainer.averaged():
                trainer.end_epoch(list(score()))
            last = trainer.state
            progress.set_postfix(loss=f"{last['losses'][-1]:.3f}", held_out=f"{last['latest'][0]:.3f}", refresh=False)
    trainer.put_back(trainer.state["best"])
    return {key: trainer.state[key] for key in ("best_epoch", "score", "losses", "seconds", "epochs")}


class _Trainer:
    """The state of one run of :func:`fit` and what a step does to it."""

    def __init__(self, module, n_images: int, settings: Optimisation, title: str, resume: Path | None):
        self.settings, self.n_images, self.title, self.resume = settings, n_images, title, resume
        self.module = module
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.per_epoch = settings.steps(n_images)
        if not self.per_epoch:
            raise TocomError(
                f"{title}: {n_images} images do not fill a batch of {settings.batch_size}; make it smaller"
            )
        self.optimizer = make_optimizer(module, settings)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            "cosine",
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.peak_lr / 1000,
            min_lr=min(settings.min_lr, settings.peak_lr),
            step_on_epochs=settings.schedule == "epoch",
            updates_per_epoch=self.per_epoch,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        # The average is over the parameters alone, not over a copy of everything that hangs on the module.
        self.trained = nn.ParameterList(self.parameters.values())
        self.average = ModelEmaV3(self.trained, decay=settings.ema) if settings.ema else None
        self.state = {"epoch": 0, "step": 0, "total": 0.0, "best": None, "best_epoch": 0, "score": [], "losses": []}
        self.state |= {"seconds": 0.0, "random": None, "latest": [], "epochs": []}
        self.fingerprint = ""
        self.started = self.saved = time.monotonic()

    @property
    def epoch(self) -> int:
        """The epoch that is under way or next, from 0."""
        return self.state["epoch"]

    @property
    def steps_done(self) -> int:
        """Steps done since the start of the first epoch."""
        return self.epoch * self.per_epoch + self.state["step"]

    # --- one epoch ------------------------------------------------------------------------------------------

    def run_epoch(self, step: Callable, begin: Callable, feed: Callable, seed: int, progress: tqdm) -> None:
        """Do the steps of the present epoch that are still to be done."""
        epoch, start = self.epoch, self.state["step"]
        seed_everything(seed, "epoch", epoch)
        if self.settings.schedule == "epoch":
            self.scheduler.step(max(epoch - 1, 0))
        else:
            self.scheduler.step_update(epoch * self.per_epoch + start)
        batches = torch.randperm(self.n_images).split(self.settings.batch_size)[: self.per_epoch]
        processes, rank = distributed.world_size(), distributed.rank()
        plan = [[(k, piece) for k, piece in enumerate(pieces_of(batch, self.settings, processes))] for batch in batches]
        mine = [[(k, piece) for k, piece in pieces if k % processes == rank and len(piece)] for pieces in plan]
        items = feed(epoch, [piece for pieces in mine[start:] for _, piece in pieces])
        if start and self.state["random"] is not None:
            set_random_state(self.state["random"])
        for number in range(start, self.per_epoch):
            several = len(plan[number]) > 1
            if several:
                seed_everything(seed, "step", epoch, number)
            begin()
            value = torch.zeros((), device=self.device)
            self.optimizer.zero_grad()
            for k, piece in mine[number]:
                if several:
                    seed_everything(seed, "micro-batch", epoch, number, k)
                with autocast(self.settings.precision, self.device):
                    loss = step(next(items)) * (len(piece) / len(batches[number])) if several else step(next(items))
                value += loss.detach()
                self.scaler.scale(loss).backward()
            self._update(distributed.sum_values(value).item(), number, len(batches[number]))
            progress.update()

    def _update(self, loss: float, number: int, n_images: int) -> None:
        """Change the parameters by the gradients that the step has gathered."""
        self.check_finite("the loss", loss)
        parameters = list(self.parameters.values())
        distributed.sum_gradients(parameters)
        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.settings.schedule == "step":
            self.scheduler.step_update(self.epoch * self.per_epoch + number + 1)
        if self.average is not None:
            self.average.update(self.trained)
        self.state["total"] += loss * n_images
        self.state["step"] = number + 1
        if time.monotonic() - self.saved >= SAVE_SECONDS and number + 1 < self.per_epoch:
            self.save()

    def _figures(self, figures: list[float]) -> dict[str, float]:
        """Return what the curve of a training says of the present epoch."""
        held_out = dict(zip(("held_out", "minus_loss"), figures, strict=False))
        rate, seconds = self.optimizer.param_groups[0]["lr"], round(time.monotonic() - self.started, 3)
        return {"epoch": self.epoch + 1, "loss": self.state["losses"][-1], **held_out, "lr": rate, "seconds": seconds}

    def _show(self, figures: dict[str, float]) -> None:
        """Write an epoch's figures for TensorBoard, if the environment variable names a folder for it."""
        folder = os.environ.get(TENSORBOARD)
        if not folder or not distributed.is_main():
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise TocomError(f"{TENSORBOARD} is set, but there is no tensorboard; pip install tensorboard") from None
        # Trainings that share a title (of other methods, backbones, studies) must not share a curve.
        name = f"{self.title.replace(' ', '_')}_{hashlib.sha256(self.fingerprint.encode()).hexdigest()[:8]}"
        with SummaryWriter(str(Path(folder) / name)) as writer:
            for name in figures.keys() - {"epoch"}:
                writer.add_scalar(name, figures[name], figures["epoch"])

    def end_epoch(self, figures: list[float]) -> None:
        """Record an epoch whose held-out figures are given; keep its parameters if they are the best so far."""
        for figure in figures:
            self.check_finite("a held-out figure", figure)
        state = self.state
        seen = min(self.n_images, self.per_epoch * self.settings.batch_size)
        state["losses"].append(state["total"] / seen)
        state["epochs"].append(self._figures(figures))
        self._show(state["epochs"][-1])
        if not state["score"] or tuple(figures) > tuple(state["score"]):
            state |= {"score": figures, "best_epoch": self.epoch + 1, "best": self.copies()}
        state |= {"epoch": self.epoch + 1, "step": 0, "total": 0.0, "latest": figures}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Score, and keep, the moving average of the parameters if there is one; then save the whole state."""
        own = _copies(self.parameters) if self.average is not None else None
        if own is not None:
            _copy_into(self.parameters, dict(zip(own, self.average.module.parameters(), strict=True)))
        yield
        if own is not None:
            _copy_into(self.parameters, own)
        self.save()

    def check_finite(self, what: str, value: float) -> None:
        """Raise TocomError, and drop all saved states, if a figure is NaN or infinite."""
        if math.isfinite(value):
            return
        if self.resume is not None and distributed.is_main():
            _remove(states(self.resume) + torn(self.resume))
        raise TocomError(
            f"{self.title}: {what} became {value} in epoch {self.epoch + 1};"
            f" lower the learning rate (now {self.settings.peak_lr:g}) or check the data"
        )

    # --- saving and loading ---------------------------------------------------------------------------------

    def copies(self) -> dict[str, Tensor]:
        """Return copies of what training changes: the trained parameters, and all buffers, persistent or not."""
        return _copies(self.parameters | dict(self.module.named_buffers()))

    def put_back(self, values: dict[str, Tensor]) -> None:
        """Undo what was done since :meth:`copies`; a buffer may have got another shape."""
        _copy_into(self.parameters, values)
        for name in values.keys() - self.parameters.keys():
            owner, _, buffer = name.rpartition(".")
            if (old := self.module.get_buffer(name)).shape == values[name].shape:
                old.copy_(values[name])
            else:
                setattr(self.module.get_submodule(owner), buffer, values[name].to(self.device, copy=True))

    def save(self) -> None:
        """Write everything that the rest of the run depends on; older states move one place down.

        Raises:
            TocomError: the disk is full; the states that were there stay.
        """
        self.saved = time.monotonic()
        self.state["seconds"] = self.saved - self.started
        if self.resume is None or not distributed.is_main():
            return
        saved = self.state | {
            "fingerprint": self.fingerprint,
            "random": random_state(),
            "parameters": self.copies(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        _remove(torn(self.resume))
        with atomic(self.resume) as temporary:
            _write_state(saved, temporary)
            for number in range(KEEP_STATES - 1, 0, -1):
                older = numbered(self.resume, number - 1)
                if older.exists():
                    older.replace(numbered(self.resume, number))

    def load(self, fingerprint: str) -> None:
        """Go on from the newest state that can be read and was left by a run with the same ``fingerprint``."""
        self.fingerprint = fingerprint
        buffers = [buffer for buffer in self.module.buffers() if buffer.numel()]
        distributed.broadcast([*self.parameters.values(), *buffers])
        read = ((path, _read_state(path, fingerprint)) for path in states(self.resume))
        path, saved = next((found for found in read if found[1] is not None), (None, None))
        if len(set(distributed.gather([None if saved is None else (saved["epoch"], saved["step"])]))) > 1:
            raise TocomError(
                f"{self.title}: not every process can read the same saved state; put {self.resume.parent} on a file"
                " system that all nodes share"
            )
        if saved is None:
            return
        self.put_back(saved["parameters"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.state = {key: saved[key] for key in self.state}
        self.started = time.monotonic() - saved["seconds"]
        if distributed.is_main():  # tocom.console shows this, too
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
            step = f" and {self.state['step']} of {self.per_epoch} steps" if self.state["step"] else ""
            of = f"epoch {self.epoch} of {self.settings.epochs}{step}, saved {when}"
            print(f"{self.title} goes on after {of}", file=sys.stderr, flush=True)


def make_optimizer(module: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """Return timm's optimizer of what is trained in a module, at the peak learning rate.

    Raises:
        TocomError: timm has no such optimizer.
    """
    try:
        return create_optimizer_v2(module, settings.optimizer, lr=settings.peak_lr, weight_decay=settings.weight_decay)
    except (ValueError, ImportError, AssertionError) as error:  # unknown, or of a package that is not installed
        hint = suggest(settings.optimizer, list_optimizers())
        raise TocomError(f"optimizer {settings.optimizer!r} cannot be had from timm ({error}){hint}") from error


def _write_state(state: dict, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch reports a full disk in its own type
        raise OSError(f"torch could not write all of it ({str(error).splitlines()[0]})") from error


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def _copy_into(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _read_state(path: Path, fingerprint: str) -> dict | None:
    """Return the state of an interrupted run, or None if it cannot be read or is of another run."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # a state that cannot be read is only lost time: use an older one, or start again
        return None
    return state if state.pop("fingerprint", None) == fingerprint else None


def resume_path(output: str | os.PathLike) -> Path:
    """Return where an interrupted run that will write ``output`` keeps its newest state."""
    output = Path(output)
    return output.with_name(f".{output.name}.resume")


def numbered(resume: Path, number: int) -> Path:
    """Return where the state saved ``number`` saves before the newest one is kept."""
    return resume.with_name(f"{resume.name}.{number}") if number else resume


def states(resume: Path | None) -> list[Path]:
    """Return the states of an interrupted run, the newest first."""
    if resume is None or not resume.parent.is_dir():
        return []
    older = resume.parent.glob(f"{glob.escape(resume.name)}.[0-9]*")
    return [path for path in (resume, *sorted(older, key=lambda path: int(path.suffix[1:]))) if path.exists()]


def torn(resume: Path) -> list[Path]:
    """Return what runs that were killed while they saved a state left of it."""
    return list(resume.parent.glob(glob.escape(f".{resume.name}.") + "*" + glob.escape(resume.suffix)))


def forget(output: str | os.PathLike) -> None:
    """Remove the states of a run whose output has been written."""
    if distributed.is_main():
        _remove(states(resume_path(output)) + torn(resume_path(output)))
