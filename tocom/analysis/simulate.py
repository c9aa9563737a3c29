"""Studies whose truth is known, through the functions that make the tables: how often are these wrong?

Images are as hard as a normal number, made of a part that all conditions share, one of the condition, one of the
training and one of its own; a model is right where that is below the quantile of its share of right images, so that
the share is exact. Trainings are better or worse than it by normal numbers of points. Sizes are like the demo's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import multivariate_normal, t
from tqdm import tqdm

from tocom.analysis import cells, compare, stats
from tocom.analysis.planned import endpoint, is_compensated, task_scopes
from tocom.analysis.run import Run
from tocom.analysis.tables import Table, Text, degree_tables, significance_table
from tocom.bundled import ASSETS
from tocom.files import read_yaml, save_arrays, write_rows
from tocom.seeds import derive_seed
from tocom.settings import PLAIN
from tocom.study import Study, parse_study

#: What is declared of every study, and the pairs of methods that it names.
_DECLARED = read_yaml(ASSETS / "simulated.yaml")
_SEGMENTER = _DECLARED.pop("segmenter")
SAME, RIVAL, PLAIN_RIVAL = map(tuple, _DECLARED["compare"])
#: Right images in % of a model away from its train degree, and how many points it has more there.
BASE, GAP = 75.0, 10.0
#: Shares of the variance of how hard an image is: for all, for a condition, for a training, for a condition of one.
HARD = (0.70, 0.08, 0.14, 0.08)
#: Test images of a task, validation images of one, images of a small task to segment.
IMAGES, VALIDATION, SCENES = 800, 200, 60
#: Pixels of an image by class, as Dirichlet's parameters; how many; how far images differ in the share of right ones.
CLASSES, PIXELS, EASIER = (7.0, 2.0, 1.0), 1000, 0.15
TASKS = ("digits", "mnist5k", "rotation", "counting")
SCALES, STANDARD_ERRORS = (0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 2.0)
LEVELS = (0.05, 0.01)
#: The largest rate of a false claim, where every claim is false, and the smallest of intervals that hold the truth.
HIGHEST = {"p < 0.05": 0.06, "p < 0.01": 0.015, "one-sided p < 0.05": 0.06, "one-sided p < 0.01": 0.015}
HIGHEST |= {f"star in a table of {name}": 0.06 for name in ("main", "tasks", "significance")}
LOWEST = {"interval holds": 0.94, "gap's interval holds": 0.94}
_CHUNK = 25


class Case(NamedTuple):
    """A point of the grid: what is studied, and its truth in points.

    Attributes:
        part: of the simulation. before, after: the methods that are compared. seeds, tasks: how many.
        seed_sd, compensator_sd: standard deviations of a training's effect, and of what is learned for all tasks.
        gain: of ``after`` over ``before`` in right images. effects: of :data:`SCALES`, where these are chosen.
    """

    part: str
    before: str = SAME[0]
    after: str = SAME[1]
    seeds: int = 3
    tasks: int = 1
    seed_sd: float = 0.0
    compensator_sd: float = 0.0
    gain: float = 0.0
    effects: tuple[float, ...] = ()

    @property
    def is_segmented(self) -> bool:
        """Whether the score is mIoU, of one task."""
        return self.part.startswith("segment")


# --- the truth --------------------------------------------------------------------------------------------------------


@cache
def study_of(case: Case) -> Study:
    """Return the declaration of a case's study."""
    wide = case.part in ("family", "harm")
    compared = [(case.before, case.after)] + [RIVAL] * (case.part == "family")
    needed = {SAME[0]}.union(*compared)
    methods = {name: method for name, method in _DECLARED["methods"].items() if name in needed}
    if case.is_segmented:
        methods[SAME[0]] = _SEGMENTER
    return parse_study(
        {
            **_DECLARED,
            "methods": methods,
            "compare": compared,
            "tasks": ["scenes"] if case.is_segmented else TASKS[: case.tasks],
            "seeds": list(range(case.seeds)),
            "infer_degrees": _DECLARED["infer_degrees"] if wide else [_DECLARED["max_degree"]],
        }
    )


@cache
def _conditions(case: Case) -> list[tuple[str, str, int, str, str]]:
    """Return method, train and inference degree of every condition, whose checkpoints it has, and what it adds."""
    study = study_of(case)
    return [
        (method, train, infer, study.tuned_as(method), added)
        for method in study.methods
        for train, infer in product(study.train_degrees_of(method), study.infer_degrees_of(method))
        for added in [method if is_compensated(study, method) and train != str(infer) else ""]
    ]


class _Draws(dict):
    """What is drawn when it is asked for first, by key."""

    def __init__(self, draw: Callable[[], NDArray | float]):
        self.draw = draw

    def __missing__(self, key):
        self[key] = self.draw()
        return self[key]


def draw(case: Case, rng: Generator) -> dict[cells.Condition, cells.BySeed]:
    """Return the records of a study, as :func:`tocom.analysis.cells.records` does."""
    study, found = study_of(case), {}
    images = SCENES if case.is_segmented else IMAGES
    learned = _Draws(lambda: case.compensator_sd * rng.standard_normal())
    for task in study.task_names:
        hard = _Draws(lambda: rng.standard_normal(images, dtype=np.float32))
        better = _Draws(lambda: case.seed_sd * sqrt(0.5) * rng.standard_normal())
        record = _segmenter(images, rng) if case.is_segmented else lambda hard, share: hard < ndtri(share)
        for method, train, infer, tuned, added in _conditions(case):
            by_seed = found.setdefault(("vit", method, task, train, infer), {})
            for seed in study.seeds_of(method):
                model, cell = (tuned, train, seed), (tuned, train, infer, added)
                keys = (), cell, model, (*cell, seed)
                of_image = sum(sqrt(part) * hard[key] for part, key in zip(HARD, keys, strict=True))
                share = _percent(case, method, train, infer) + better[model] + better[*cell, seed]
                share += learned[added, seed] if added else 0.0
                by_seed[seed] = record(of_image, np.clip(share / 100, 0, 1))
    return found


def _percent(case: Case, method: str, train: str, infer: int) -> float:
    """Return what the models of a condition get right in %, on average over trainings."""
    if train == str(infer):
        return BASE + GAP * (case.part != "harm")
    return BASE + case.gain * (method == case.after)


def _segmenter(images: int, rng: Generator) -> Callable[[NDArray, float], NDArray]:
    """Return what makes records of the same images [images, 3, classes] from how hard they are and a share."""
    pixels = rng.multinomial(PIXELS, rng.dirichlet(CLASSES, images))

    def record(hard: NDArray, share: float) -> NDArray:
        shares = np.clip(share - EASIER * (2 * ndtr(hard) - 1), 0, 1)
        right = rng.binomial(pixels, shares[:, None])
        first = rng.binomial(pixels - right, 0.5)  # wrong ones are given to either of the other two classes
        given = np.roll(first, 1, axis=1) + np.roll(pixels - right - first, 2, axis=1)
        return np.stack([right, given, pixels - right], axis=1)

    return record


def true_gain(case: Case) -> float:
    """Return the gain in points of the study's score, on average over trainings."""
    if not case.is_segmented:
        return case.gain
    sizes = np.array(CLASSES)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)

    def miou(percent: float, sd: float) -> float:
        share = (percent + sd * nodes[:, None]) / 100
        union = sizes + (sizes.sum() - sizes) * (1 - share) / 2
        return 100 * float(weights @ (sizes * share / union).mean(axis=1) / weights.sum())

    return miou(BASE + case.gain, np.hypot(case.seed_sd, case.compensator_sd)) - miou(BASE, case.seed_sd)


def true_spreads(case: Case) -> stats.Spreads:
    """Return the standard deviations behind a gain in accuracy; the seeds' effect on those of images is left out."""
    shares = BASE / 100, (BASE + case.gain) / 100
    same = study_of(case).tuned_as(case.before) == study_of(case).tuned_as(case.after)
    for_all, condition, training, _ = HARD

    def variance(own: float, both: float) -> float:
        """Return the variance of the gain if an image is as hard to either condition, and to both, as correlated so."""
        first, second, mixed = [
            multivariate_normal.cdf(ndtri(pair), cov=[[1, r], [r, 1]], allow_singular=True) - pair[0] * pair[1]
            for pair, r in (((shares[0],) * 2, own), ((shares[1],) * 2, own), (shares, both))
        ]
        return 1e4 * (first + second - 2 * mixed)

    image = variance(for_all + condition, for_all)
    rest = variance(1.0, for_all + training * same) - image
    return stats.Spreads(sqrt(image), case.seed_sd * (1 if same else sqrt(2)), case.compensator_sd, sqrt(rest), np.nan)


def expected(case: Case) -> stats.Contrast:
    """Return the errors that a study of the case is planned to have."""
    tied = any(map(study_of(case).learns, (case.before, case.after)))
    return stats.planned(true_spreads(case), case.seeds, [IMAGES] * case.tasks, tied)


# --- what is made of it -----------------------------------------------------------------------------------------------


def satterthwaite(contrast: stats.Contrast) -> float:
    """Return the p-value with one effective number of degrees of freedom: the alternative that was not taken."""
    variances, dfs = np.array([*contrast.trainings, contrast.images]).T
    df = variances.sum() ** 2 / (variances**2 / dfs).sum()
    return float(2 * t.sf(abs(contrast.value) / contrast.error, df))


def pair(case: Case, rng: Generator) -> dict[str, float]:
    """Compare two methods once."""
    study, true = study_of(case), true_gain(case)
    models, end = compare.Models(study, draw(case, rng)), endpoint(study)
    row = models.compared(*end)
    both = (end.before, end.point.before, end.point.infer), (end.after, end.point.after, end.point.infer)
    means = stats.Means.of(models.values(end.backbone, end.scope.tasks, both), models.trained(both))
    p_values = {
        "p": row["p"],
        "p (images)": row["p_images"],
        "p (seeds)": row["p_seeds"],
        "p (images) and p (seeds)": max(row["p_images"], row["p_seeds"]),
        "Satterthwaite's p": satterthwaite(means.contrast([-1, 1])),
    }
    shown = not np.isnan(row["gap_closed"])
    known = shown and not case.is_segmented
    return {
        **{f"{name} < {level}": p < level for (name, p), level in product(p_values.items(), LEVELS)},
        "interval holds": row["low"] <= true <= row["high"],
        "gap is shown": shown,
        "gap's interval holds": row["gap_low"] <= case.gain / GAP <= row["gap_high"] if known else np.nan,
    }


def harm(case: Case, rng: Generator) -> dict[str, float]:
    """Ask once whether a compensator costs less than the margin."""
    p = compare.harm(study_of(case), draw(case, rng)).p.iloc[-1]
    return {f"one-sided p < {level}": p < level for level in LEVELS}


def family(case: Case, rng: Generator) -> dict[str, float]:
    """Write the predictions of a study, make its tables, and look for stars."""
    study = study_of(case)
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = [*_predictions(study, draw(case, rng), folder)]
        there = cells.records(files)
        write_rows(cells.gather(study.study, files), folder / "cells.csv")
        compare.compare(study, there).to_csv(folder / "significance.csv", index=False, float_format="%.10g")
        run = Run(study, folder)
        tables = {
            "main": degree_tables(run, run.scopes),
            "tasks": degree_tables(run, task_scopes(study.groups)),
            "significance": [significance_table(run, name) for name in run.backbones],
        }

    def is_starred(table: Table) -> bool:
        return any("*" in cell.text for row in table.rows for cell in row)

    stars = {name: [*map(is_starred, some)] for name, some in tables.items()}
    each = {f"star in a table of {name}": np.mean(found) for name, found in stars.items()}
    return each | {f"star in any table of {name}": any(found) for name, found in stars.items()}


def _predictions(study: Study, records: dict[cells.Condition, cells.BySeed], folder: Path) -> Iterator[Path]:
    """Write the predictions files of a study, and yield their paths."""
    for task in study.task_names:
        mine = [(key, seed, right) for key, by in records.items() if key[2] == task for seed, right in by.items()]
        about = [
            {
                **{"method": method, "train_degree": train, "seed": seed, "infer_degree": infer, "gflops": 0.02},
                **{"compressor": study.methods[method].compressor.name, "compensator": added.name if added else PLAIN},
                **{"compensated": bool(added), "scale": float(bool(added) and train != str(infer))},
            }
            for (_, method, _, train, infer), seed, _ in mine
            for added in [study.methods[method].compensator]
        ]
        predictions = np.stack([right for *_, right in mine]).astype(np.int16)
        arrays = {"predictions": predictions, "labels": np.ones(IMAGES, np.int64)}
        meta = {"kind": "predictions", "task": task, "backbone": "vit", "metric": study.metric, "cells": about}
        save_arrays(folder / f"{task}.safetensors", arrays, meta)
        yield folder / f"{task}.safetensors"


def scale(case: Case, rng: Generator) -> dict[str, float]:
    """Choose a compensator's scale on validation images once, by every rule."""
    from tocom.stages.evaluate import chosen  # these import torch
    from tocom.tasks.base import Validated

    own = HARD[-1]
    shared, *ends = rng.standard_normal((3, VALIDATION))
    found = {}
    for at, effect in zip(SCALES, case.effects, strict=True):
        moved = (ends[0] * (1 - at) + ends[1] * at) / np.hypot(at, 1 - at)  # one end is no scale, the other is 1
        above = ndtri((BASE + effect) / 100) - sqrt(1 - 2 * own) * shared - sqrt(2 * own) * moved
        by_image = {"score": 100.0 * (above > 0), "loss": -np.logaddexp(0, -2 * above)}
        found[at] = Validated(by_image["score"].mean(), by_image["loss"].mean(), by_image)
    effects, outcome = dict(zip(SCALES, case.effects, strict=True)), {}
    for by, errors in product(("score", "loss"), STANDARD_ERRORS):
        choice, rule = chosen(found, by, errors), f"{errors:g} SE, by {by}"
        outcome |= {f"gain, {rule}": effects[choice], f"wrong scale, {rule}": choice != max(SCALES, key=effects.get)}
    return outcome


# --- the grid ---------------------------------------------------------------------------------------------------------

#: Part -> what is done once, and how many repeats it takes of those that are asked for.
PARTS: dict[str, tuple[Callable[[Case, Generator], dict[str, float]], float]] = {
    "no gain": (pair, 1.0),
    "gain": (pair, 1 / 2),
    "segment, no gain": (pair, 1 / 2),
    "segment, gain": (pair, 1 / 4),
    "scale": (scale, 1.0),
    "harm": (harm, 1 / 2),
    "family": (family, 1 / 8),
}


def grid() -> list[Case]:
    """Return every case."""
    same = [(*SAME, sd, other) for sd, other in ((0, 0), (1, 0), (1, 1), (2.5, 0), (2.5, 2.5))]
    rivals = [(*RIVAL, sd, other) for sd, other in ((0, 0), (1, 1), (2.5, 2.5), (1, 2.5))]
    rivals += [(*PLAIN_RIVAL, 1, 0)]
    points = [*product((3, 5), (1, 2, 4), same), *product((10,), (1, 4), same[::2]), *product((3, 5), (1, 4), rivals)]
    null = [Case("no gain", *kind[:2], seeds, tasks, *kind[2:]) for seeds, tasks, kind in points]
    gain = [case._replace(part="gain", gain=round(stats.detectable(expected(case)), 2)) for case in null]
    # mIoU is no line in the share of right pixels: a spread that one method has alone would change its mean, too
    segment = [Case("segment, no gain", seeds=seeds, seed_sd=1) for seeds in (3, 5)]
    segment += [case._replace(part="segment, gain", gain=3) for case in segment]
    effects = (0, 0, 0), (0, -1, -1), (0, -3, -5), (0, 1, 2), (0, 3, 5), (0, 2, -2)
    scale = [Case("scale", effects=some) for some in effects]
    family = [Case("family", *SAME, seeds, 3, sd, sd) for seeds, sd in product((3, 5), (0, 1, 2.5))]
    harm = [case._replace(part="harm", gain=-study_of(case).analysis.margin) for case in family]
    return [*null, *gain, *segment, *scale, *harm, *family]


def _chunk(job: tuple[Case, SeedSequence, int]) -> pd.DataFrame:
    """Return the outcomes of some repeats of a case, a row each."""
    case, seeds, repeats = job
    rng = np.random.default_rng(seeds)
    return pd.DataFrame([PARTS[case.part][0](case, rng) for _ in range(repeats)]).astype(float)


def simulate(cases: Sequence[Case], repeats: int, processes: int = 1, seed: int = 0) -> pd.DataFrame:
    """Repeat studies of some cases; what comes out of one depends neither on the others nor on how many processes.

    Args:
        repeats: of the cases that take most; others take a share of it, see :data:`PARTS`.

    Returns:
        A row for each case and figure: the mean over repeats, its Monte Carlo error, and of how many repeats.
    """
    jobs = []
    for case in cases:
        wanted = max(2, round(repeats * PARTS[case.part][1]))
        sizes = [min(_CHUNK, wanted - start) for start in range(0, wanted, _CHUNK)]
        own = SeedSequence(derive_seed(seed, repr(case))).spawn(len(sizes))
        jobs += [(case, stream, size) for stream, size in zip(own, sizes, strict=True)]
    outcomes: dict[Case, list[pd.DataFrame]] = {case: [] for case in cases}
    with tqdm(total=sum(size for *_, size in jobs), desc="studies", dynamic_ncols=True) as progress:
        for (case, _, size), outcome in zip(jobs, _mapped(_chunk, jobs, processes), strict=True):
            outcomes[case].append(outcome)
            progress.update(size)
    rows = []
    for case, chunks in outcomes.items():
        effects = ", ".join(f"{effect:+g}" for effect in case.effects)
        about = case._asdict() | {"gain": true_gain(case), "effects": effects}
        for figure, values in pd.concat(chunks).items():
            of = {"value": values.mean(), "error": values.sem(), "repeats": values.count()}
            rows.append(about | {"figure": figure} | of)
    return pd.DataFrame(rows)


def _mapped(do: Callable, jobs: Sequence, processes: int) -> Iterator:
    """Yield what is made of every job, in order."""
    if processes < 2:
        yield from map(do, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(do, jobs)


# --- what came out ----------------------------------------------------------------------------------------------------


def bounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the figures that have a bound, with it and with the Monte Carlo errors by which they are beyond it."""
    false = frame.figure.isin(list(HIGHEST)) & ((frame.gain == 0) | (frame.part == "harm"))
    mine = frame[(false | frame.figure.isin(list(LOWEST))) & (frame.repeats > 0)]
    bound = mine.figure.map(HIGHEST | LOWEST).astype(float)
    over = np.where(mine.figure.isin(list(LOWEST)), bound - mine.value, mine.value - bound)
    return mine.assign(bound=bound, beyond=over / np.sqrt(bound * (1 - bound) / mine.repeats))


#: Title of a table, part of the simulation, figures, rows and columns, and what its numbers are multiplied by.
_TRUTH, _STUDY = ["before", "after", "seed_sd", "compensator_sd"], ["seeds", "tasks"]
_SATTERTHWAITE = "with Satterthwaite's degrees of freedom, which were not taken"
_TABLES = (
    ("False claims of p < 0.05", "no gain", r"p < 0.05", _TRUTH, _STUDY),
    ("False claims of p < 0.01", "no gain", r"p < 0.01", _TRUTH, _STUDY),
    (f"False claims of p < 0.05 {_SATTERTHWAITE}", "no gain", r"Satterthwaite's p < 0.05", _TRUTH, _STUDY),
    (f"False claims of p < 0.01 {_SATTERTHWAITE}", "no gain", r"Satterthwaite's p < 0.01", _TRUTH, _STUDY),
    ("False claims of p (images) < 0.05 alone", "no gain", r"p \(images\) < 0.05", _TRUTH, _STUDY),
    ("False claims of both p (images) and p (seeds) < 0.05", "no gain", r"p.*and p.* < 0.05", _TRUTH, _STUDY),
    ("The gain in points that a plan says is found in 80 %", "gain", r"planned", _TRUTH, _STUDY),
    ("How often that gain is found, p < 0.05", "gain", r"p < 0.05", _TRUTH, _STUDY),
    ("How often its interval holds it", "gain", r"interval holds", _TRUTH, _STUDY),
    ("How often the share of the gap that is closed is shown", "gain", r"gap is shown", _TRUTH, _STUDY),
    ("How often its interval holds it, if it is shown", "gain", r"gap's interval holds", _TRUTH, _STUDY),
    (f"mIoU of {SCENES} images", "segment.*", r"p < .*|Satt.*|interval holds", ["figure"], ["gain", "seeds"]),
    ("Claims that a cost of the margin is less", "harm", r".*", ["figure"], ["seeds", "seed_sd"]),
    ("Stars in the tables of a study without any gain", "family", r".*", ["figure"], ["seeds", "seed_sd"]),
    ("Scales chosen wrongly, by validation images", "scale", r"wrong scale.*", ["figure"], ["effects"]),
    ("Mean true gain in points of the chosen scale", "scale", r"gain.*", ["figure"], ["effects"]),
)


def report(frame: pd.DataFrame) -> list[Table]:
    """Return the tables of a simulation, figures beyond their bounds in bold."""
    plans = frame[(frame.part == "gain") & (frame.figure == "p < 0.05")]
    frame = pd.concat([frame, plans.assign(figure="planned", value=plans.gain, error=0.0)], ignore_index=True)
    frame = frame.join(bounded(frame)[["bound", "beyond"]])
    found = [
        (title, frame[frame.part.str.fullmatch(part) & frame.figure.str.fullmatch(figure)], *axes)
        for title, part, figure, *axes in _TABLES
    ]
    return [_table(title, mine, *axes) for title, mine, *axes in found if not mine.empty]


def _table(title: str, mine: pd.DataFrame, rows: list[str], columns: list[str]) -> Table:
    in_points = "points" in title
    factor, unit = (1, "points") if in_points else (100, "%")
    found = {
        (tuple(row[rows]), tuple(row[columns])): Text(f"{factor * row.value:.{1 + in_points}f}", row.beyond > 0)
        for _, row in mine.iterrows()
    }
    across = sorted({column for _, column in found})
    body = [
        [Text(_heading(rows, name)), *(found.get((name, column), Text("–")) for column in across)]
        for name in dict.fromkeys(row for row, _ in found)
    ]
    studies = " to ".join(f"{number:,}" for number in sorted({mine.repeats.min(), mine.repeats.max()}))
    caption = f"In {unit}, of {studies} studies; Monte Carlo standard error at most {factor * mine.error.max():.2f}."
    if mine.bound.notna().any():
        bounds = " and ".join(f"{factor * bound:g}" for bound in sorted(mine.bound.dropna().unique()))
        beyond = f"{(mine.beyond > 0).sum()} are beyond (bold), {(mine.beyond > 3).sum()} by more than 3 errors"
        caption += f" Bound: {bounds}; {beyond}."
    return Table(title, caption, ["", *(_heading(columns, column) for column in across)], body, "simulation")


def _heading(names: list[str], values: Sequence) -> str:
    """Return what a row or a column stands for: numbers with their names, words as they are."""
    numbers = [
        f"{name} {_text(value)}" for name, value in zip(names, values, strict=True) if not isinstance(value, str)
    ]
    return ", ".join([*filter(None, [" → ".join(value for value in values if isinstance(value, str))]), *numbers])


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
