"""Replay a changing load against fixed degrees, and against degrees that are chosen by it (`tocom serve-bench`).

Requests of one image each arrive at random (Poisson), wait in one queue and are answered first come first served, in
batches. The clock is one of the replay's own: it stands still but for arrivals, which are seeded, and for what batches
take, which is measured as each is computed, or read off a given curve.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tocom.analysis.serving import ADAPTIVE, write_report
from tocom.errors import TocomError
from tocom.files import write_rows
from tocom.jobs import EvaluatedMethod, EvaluateJob, ServeJob
from tocom.models import pick_device
from tocom.seeds import derive_seed
from tocom.serving import Curve, Server, load_compressed
from tocom.settings import PLAIN
from tocom.stages.evaluate import evaluate_checkpoint
from tocom.stages.throughput import device_name, seconds
from tocom.tasks import load_task
from tocom.training import bar, make_deterministic

#: Into so many parts of equal length the timeline divides a replay.
_PARTS = 60

#: What is left [waiting] of each request's time, the oldest first -> the degree of the batch that begins.
Policy = Callable[[NDArray], int]
#: A degree and which requests -> seconds that the batch takes.
Serve = Callable[[int, range], float]


@dataclass(frozen=True)
class Replayed:
    """What became of each request.

    Attributes:
        arrived, finished: seconds [requests]. degree: at which it was answered [requests].
        batches: how many. busy: seconds that they took.
    """

    arrived: NDArray
    finished: NDArray
    degree: NDArray
    batches: int
    busy: float


def arrivals(phases: Sequence[tuple[float, float]], seed: int) -> NDArray:
    """Return the times of a Poisson process whose rate changes, ascending.

    Args:
        phases: (seconds, requests a second) of each, one after the other.
    """
    generator, start, times = np.random.default_rng(derive_seed(seed, "arrivals")), 0.0, []
    for length, rate in phases:
        count = generator.poisson(length * rate)  # given how many, a Poisson process's times are uniform
        times.append(start + np.sort(generator.uniform(0, length, count)))
        start += length
    return np.concatenate(times)


def replay(times: NDArray, deadline: float, batch_size: int, choose: Policy, serve: Serve) -> Replayed:
    """Answer requests in batches, each of all that wait when it begins, up to a size.

    Args:
        times: when they arrive, ascending. deadline: seconds that each may take.
    """
    finished, degrees = np.empty(len(times)), np.empty(len(times), dtype=np.int64)
    clock, busy, batches, first = 0.0, 0.0, 0, 0
    while first < len(times):
        clock = max(clock, times[first])
        waiting = times[first : np.searchsorted(times, clock, side="right")]
        end = first + min(len(waiting), batch_size)
        degree = choose(waiting + deadline - clock)
        took = serve(degree, range(first, end))
        clock, busy, batches = clock + took, busy + took, batches + 1
        finished[first:end], degrees[first:end] = clock, degree
        first = end
    return Replayed(times, finished, degrees, batches, busy)


def fixed(degree: int) -> Policy:
    """Return the policy that runs at one degree."""
    return lambda left: degree


def adaptive(curve: Curve, batch_size: int) -> Policy:
    """Return the policy that takes the best degree at which all that waits is answered in time, batch after batch."""

    def choose(left: NDArray) -> int:
        oldest = left[::batch_size]  # of each batch that will be made of what waits
        budget = min(oldest / np.arange(1, len(oldest) + 1))
        return curve.degree_for(min(len(left), batch_size), latency=float(budget))

    return choose


def on_paper(curve: Curve) -> Serve:
    """Return what batches take by a curve."""
    return lambda degree, which: curve.time(degree, len(which))


def computed(server: Server, asked: torch.Tensor, device: torch.device) -> Serve:
    """Return what batches take as they are computed; ``asked`` [requests, 3, H, W] is what the model gets of each."""
    return lambda degree, which: seconds(lambda: server(asked[which.start : which.stop], degree), device)


def summary(replayed: Replayed, deadline: float, right: NDArray) -> dict:
    """Return the figures of a replay; ``right`` [requests] says which answers are."""
    took = replayed.finished - replayed.arrived
    met = took <= deadline
    return {
        "requests": len(took),
        "batches": replayed.batches,
        "met": met.mean(),
        "accuracy": right.mean(),
        "right_in_time": (right & met).mean(),
        "mean_degree": replayed.degree.mean(),
        "p50_ms": 1e3 * np.quantile(took, 0.5),
        "p99_ms": 1e3 * np.quantile(took, 0.99),
        "busy": replayed.busy / replayed.finished[-1],
    }


def timeline(replayed: Replayed, deadline: float, length: float) -> list[dict]:
    """Return arrivals a second, the mean degree and the share answered in time, by the time of arrival."""
    width = length / _PARTS
    met = replayed.finished - replayed.arrived <= deadline
    part = np.minimum((replayed.arrived / width).astype(int), _PARTS - 1)
    return [
        {
            "time": number * width,
            "rate": (part == number).sum() / width,
            "degree": replayed.degree[part == number].mean(),
            "met": met[part == number].mean(),
        }
        for number in np.unique(part)
    ]


@dataclass(frozen=True)
class _Served:
    """One model as it is served: with one compensator or none."""

    name: str
    server: Server
    scores: Mapping[int, float]  # degree -> on validation images
    right: NDArray  # [degrees, test images]
    model_mb: float  # of all weights (10^6 bytes)
    degree_mb: float  # of those that one more degree holds
    prepare_ms: float  # that one more degree takes, the median
    switch_us: float  # that a degree takes that is prepared, the median

    def costs(self) -> dict[str, float]:
        """Return what it takes to serve it at several degrees."""
        return {name: getattr(self, name) for name in ("model_mb", "degree_mb", "prepare_ms", "switch_us")}


def serve_bench(
    job: ServeJob,
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    compensators: Mapping[str, str | os.PathLike],
    output: Path,
    curve: str | os.PathLike | None = None,
) -> list[dict]:
    """Replay the same requests at each fixed degree and adaptively, without and with each compensator.

    A request is for a test image that is drawn. Scales of compensators, and which degree is better than which, are
    taken from validation images.

    Args:
        checkpoint: a fine-tuned classifier. data: its prepared task. compensators: name -> file.
        output: folder for serving.csv (a row for each replay), timeline.csv (of the first seed), curve.csv, and for
            serving.md and the figure that are made of them.
        curve: what batches take, to replay on paper: nothing is timed, and the same curve gives the same bytes.

    Returns:
        The rows of serving.csv: compensator, policy, seed, requests, batches, met and accuracy and right_in_time
        (shares of requests), mean_degree, p50_ms and p99_ms (from arrival to answer), busy (share of the time), the
        conditions, and where no curve was given, what a further degree takes (:class:`_Served`).

    Raises:
        TocomError: a file is missing, corrupt or does not fit the others; the task is not one of classification; a
            degree is out of range; or so little load was asked for that nothing arrives.
    """
    settings, degrees = job.settings, sorted(set(job.degrees))
    make_deterministic(job.evaluate.threads)
    device = pick_device(job.evaluate.device)
    served, images = _prepare(job, degrees, checkpoint, data, compensators, device)
    sizes = sorted({1, *(2**n for n in range(settings.batch_size.bit_length())), settings.batch_size})
    if curve is None:
        times = served[0].server.measure(degrees, sizes, settings.repeats, settings.quantile)
    else:
        times = _read(curve, degrees)
    is_paper = curve is not None or settings.times == "curve"
    full = times.time(degrees[0], settings.batch_size)
    deadline, capacity = settings.deadline * full, settings.batch_size / full
    phases = [(length, load * capacity) for length, load in settings.phases]
    conditions = {
        "task": Path(data).stem,
        "deadline_ms": 1e3 * deadline,
        "capacity": capacity,
        "batch_size": settings.batch_size,
        "phases": "; ".join(f"{length:g} s at {load:g}" for length, load in settings.phases),
        "times": "given" if curve is not None else settings.times,
        "device": device_name(device),
    }
    rows, lines = [], []
    policies = {str(degree): degree for degree in degrees} | {ADAPTIVE: None}
    requests = {seed: _requests(phases, len(images), seed) for seed in settings.seeds}
    with bar(None, "serve", total=len(settings.seeds) * len(policies) * len(served)) as progress:
        for seed, policy, one in product(settings.seeds, policies, served):
            arriving, drawn = requests[seed]
            best = adaptive(Curve(times.seconds, one.scores), settings.batch_size)
            choose = best if policy == ADAPTIVE else fixed(policies[policy])
            serve = on_paper(times) if is_paper else computed(one.server, images[torch.from_numpy(drawn)], device)
            replayed = replay(arriving, deadline, settings.batch_size, choose, serve)
            right = one.right[np.searchsorted(degrees, replayed.degree), drawn]
            about = {"compensator": one.name, "policy": policy, "seed": seed}
            costs = one.costs() if curve is None else {}
            rows.append(about | summary(replayed, deadline, right) | conditions | costs)
            if seed == settings.seeds[0]:
                length = sum(length for length, _ in phases)
                lines += [about | line for line in timeline(replayed, deadline, length)]
            progress.update()
    write_rows(rows, output / "serving.csv")
    write_rows(lines, output / "timeline.csv")
    times.write(output / "curve.csv")
    write_report(output)
    return rows


def _prepare(
    job: ServeJob,
    degrees: Sequence[int],
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    compensators: Mapping[str, str | os.PathLike],
    device: torch.device,
) -> tuple[list[_Served], torch.Tensor]:
    """Return what is served, without a compensator first, and the test images as the model takes them."""
    if PLAIN in compensators:
        raise TocomError(f"no compensator can be called {PLAIN!r}, which stands for none; give it another name")
    task = load_task(data, device)
    if task.kind != "classify":
        raise TocomError(f"{task.name} is a task to {task.kind}; only classification is served")
    methods = {
        name: EvaluatedMethod(infer_degrees=degrees, compensated=name != PLAIN) for name in (PLAIN, *compensators)
    }
    with bar(None, "evaluate", total=len(methods) * len(degrees)) as progress:
        found = evaluate_checkpoint(
            checkpoint, task, EvaluateJob(methods=methods, settings=job.evaluate), compensators, progress
        )
    labels, served = task.labels()["labels"], []
    for name in methods:
        of_it = [(cell, record["predictions"] == labels) for cell, record in found if cell["method"] == name]
        if not of_it:
            raise TocomError(f"{checkpoint} was trained at no one degree, so that there is nothing to compensate from")
        model = load_compressed(checkpoint, compensators.get(name), job.evaluate.device)
        scales = {cell["infer_degree"]: cell["scale"] for cell, _ in of_it} | {model.source_degree: 0.0}
        server = Server(model, scales, keep=len(degrees) + 1, precision=job.evaluate.precision)
        costs = _costs(server, [degree for degree in degrees if degree != model.source_degree], device)
        scores = {
            degree: task.validate(server.at(degree), job.evaluate.batch_size, job.evaluate.precision).score
            for degree in degrees
        }
        served.append(_Served(name, server, scores, np.stack([right for _, right in of_it]), *costs))
    model = served[0].server.at(degrees[0])
    return served, model.inputs(task.test_split.images.to(device), model.model)


def _requests(phases: Sequence[tuple[float, float]], n_images: int, seed: int) -> tuple[NDArray, NDArray]:
    """Return when requests arrive, and which image each is for."""
    arriving = arrivals(phases, seed)
    if not len(arriving):
        raise TocomError(f"no request arrives with seed {seed}; give phases that are longer or of more load")
    return arriving, np.random.default_rng(derive_seed(seed, "images")).integers(n_images, size=len(arriving))


def _costs(server: Server, degrees: Sequence[int], device: torch.device) -> tuple[float, float, float, float]:
    """Return what degrees that are not prepared yet take; see :class:`_Served`."""
    before = server.nbytes
    first, again = ([seconds(partial(server.at, degree), device) for degree in degrees] for _ in range(2))
    held = (server.nbytes - before) / max(len(degrees), 1)
    return before / 1e6, held / 1e6, 1e3 * float(np.median(first or 0)), 1e6 * float(np.median(again or 0))


def _read(path: str | os.PathLike, degrees: Sequence[int]) -> Curve:
    """Return what a curve's file says of some degrees."""
    curve = Curve.read(path)
    if missing := [degree for degree in degrees if degree not in curve.seconds]:
        raise TocomError(f"{path} has no degree {missing[0]}; measure a curve of all, or replay fewer degrees")
    return Curve({degree: curve.seconds[degree] for degree in degrees})
