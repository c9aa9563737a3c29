"""Studies of made-up predictions whose scores are known, through the real code from predictions to tables."""

import json
from itertools import product

import numpy as np
import pandas as pd

from tocom.analysis import cells, compare
from tocom.files import save_arrays, write_rows
from tocom.study import read_study

N = 400
SEEDS = (0, 1, 2)
DEGREES = (0, 4, 12)
#: Share of test images that a model trained at m and run at n gets right; ToCom adds to it where it drops.
PLAIN = {"0": {0: 0.96, 4: 0.96, 12: 0.80}, "12": {0: 0.90, 4: 0.91, 12: 0.92}}
RANDOM = 0.90
#: By how much a seed's share is beside that, where there is a gain and for random degrees.
WOBBLE = {0: -0.005, 1: 0.0, 2: 0.005}
GAIN = {("0", 12): 0.06, ("12", 0): 0.02}
#: How much of the gain a compensated method has; 1 for those that are not named.
PARTS = {"rank1": 0.5}
#: Backbones by name; of those that are timm's, what timm calls them.
TIMM = {"deit_b": "deit_base_patch16_224.fb_in1k", "deit_s": "deit_small_patch16_224.fb_in1k"}
TASKS = ("digits", "mnist5k", "rotation")
FGVC = ("cub200", "dogs")

TOME, TOCOM = {"tome": {}}, {"tocom": {"like": "tome", "compensator": {"kind": "tocom", "rank": 2}}}
RIVAL = {"random_degree": {"like": "tome", "tuning": {"degree": "random"}}}
DEMO = TOME | TOCOM | RIVAL
ABLATION = TOME | TOCOM | {"rank1": {"like": "tocom", "compensator": {"rank": 1}, "title": "rank 1"}}
EVIT = {"evit": {"compressor": "evit"}, "evit_tocom": {"like": "evit", "compensator": "tocom"}}


def config(tasks=TASKS, methods=DEMO, backbones=("vit",), **changes):
    """Return the config of a study; what is compared: the first two methods, and all others with the one before."""
    names = list(methods)
    return {
        "study": "made_up",
        "backbones": [
            {"name": b, "timm": TIMM[b], "image_size": 224, "patch_size": 16}
            if b in TIMM
            else {"name": b, "checkpoint": "glyph_vit"}
            for b in backbones
        ],
        "methods": methods,
        "compare": [list(pair) for pair in zip(names, names[1:], strict=False)],
        "tasks": list(tasks),
        "seeds": list(SEEDS),
        "train_degrees": [0, 12],
        "infer_degrees": list(DEGREES),
        "max_degree": 12,
        "checkpoints_per_job": 99,
        "analysis": {"resamples": 300},
    } | changes


ABLATED = config(FGVC, ABLATION, compare=[["tome", "tocom"], ["tome", "rank1"]])
SEVERAL = config(("cifar100",), TOME | TOCOM | EVIT, tuple(TIMM), compare=[["tome", "tocom"], ["evit", "evit_tocom"]])


def share(study, method, train, infer, seed):
    """Return the share of images that a method gets right under a seed; over all seeds, what is stated above."""
    if train == "random":
        return RANDOM + WOBBLE.get(seed, 0)
    if not study.methods[method].compensator or (train, infer) not in GAIN:
        return PLAIN[train][infer]
    return PLAIN[train][infer] + PARTS.get(method, 1.0) * GAIN[train, infer] + WOBBLE.get(seed, 0)


def right(share, seed):
    """Return which images are right [N] bool; those of a smaller share are among those of a larger one."""
    return np.random.default_rng([7, seed]).permutation(N) < round(share * N)


def write_predictions(root, study, arrays_of, keep=lambda **where: True):
    """Write the predictions of a study and return their files.

    Args:
        arrays_of: makes the arrays of a task from its list of (method, train degree, inference degree, seed).
        keep: tells from backbone, method, task, train_degree, infer_degree and seed whether a cell was run.
    """
    files = []
    for backbone, tuned, task in product(study.backbones, study.tuned, study.task_names):
        cells, points = [], []
        for seed, train, method in product(study.seeds, study.train_degrees_of(tuned), study.sharing(tuned)):
            for infer in study.infer_degrees_of(method):
                where = {"method": method, "train_degree": train, "seed": seed, "infer_degree": infer}
                if not keep(backbone=backbone.name, task=task, **where):
                    continue
                entry = study.methods[method]
                compensator = entry.compensator.name if entry.compensator else "none"
                # It is declined where it gains nothing.
                scale = 0.5 if compensator != "none" and (train, infer) in GAIN else 0.0
                about = {"compensated": compensator != "none", "compensator": compensator, "scale": scale}
                about |= {"compressor": entry.compressor.name, "gflops": 0.02 - infer / 1000}
                cells.append(where | about)
                points.append((method, train, infer, seed))
        if cells:
            path = root / "predictions" / backbone.name / tuned / task / "batch-0.safetensors"
            meta = {"kind": "predictions", "task": task, "backbone": backbone.name, "metric": study.metric}
            save_arrays(path, arrays_of(task, points), meta | {"cells": cells})
            files.append(path)
    return files


def classified(study):
    """Return the maker of arrays of a study that classifies."""
    labels = np.arange(N) % 5

    def arrays_of(task, points):
        found = [right(share(study, *point), point[-1]) for point in points]
        return {
            "predictions": np.stack([np.where(one, labels, labels + 1) for one in found]).astype(np.int16),
            "labels": labels,
        }

    return arrays_of


def segmented(study, images=12):
    """Return the maker of arrays of a study that segments: right pixels by the same shares, of two classes."""

    def arrays_of(task, points):
        tp = np.zeros((len(points), images, 2), np.int32)
        for number, (*where, seed) in enumerate(points):
            tp[number] = np.round(100 * share(study, *where, seed)) + np.arange(images)[:, None] % 3 - 1 + seed
        return {"tp": tp, "fp": (100 - tp)[..., ::-1], "fn": 100 - tp}

    return arrays_of


def make(root, config, arrays_of=None, keep=lambda **where: True):
    """Make all tidy tables of a study in ``root``; what ``keep`` refuses was not run."""
    study = read_study(plan(root, config) / "study.json")
    files = write_predictions(root, study, arrays_of or classified(study), keep)
    write_rows(cells.gather(study.study, files), root / "cells.csv")
    there = cells.records(files)
    compare.compare(study, there).to_csv(root / "significance.csv", index=False)
    compare.harm(study, there).to_csv(root / "harm.csv", index=False)
    compare.mismatch(study, there).to_csv(root / "mismatch.csv", index=False)
    compare.pairwise(study, there).to_csv(root / "pairwise.csv", index=False)
    models = list(product([backbone.name for backbone in study.backbones], study.methods))
    speeds = [
        {"backbone": b, "method": m, "infer_degree": n, "compensated": bool(study.methods[m].compensator),
         "gflops": 0.02, "images_per_second": 1000.0, "speedup": 1.5, "ratio": 1.003, "ratio_low": 0.99,
         "ratio_high": 1.01, "memory_mb": 10.0, "batch_size": 64, "repeats": 9, "threads": 1, "device": "cpu"}
        for (b, m), n in product(models, DEGREES)
    ]  # fmt: skip
    write_rows(speeds, root / "throughput.csv")
    gaps = [
        {"backbone": b, "method": m, "source_task": s, "target_task": t, "seed": seed, "train_degree": 0,
         "infer_degree": 12, "n": N, "correct": 1,
         "accuracy": 0.8 + 0.01 * (s != "none") + 0.02 * (s == t) + 0.001 * seed * (s != "none")}
        for (b, m), s, t, seed in product(models, ["none", *study.task_names], study.task_names, SEEDS)
    ]  # fmt: skip
    write_rows(gaps, root / "transfer.csv")
    return root


def plan(root, config):
    """Write the declaration of a study that was never run."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "study.json").write_text(json.dumps(config))
    return root


def significance_of(root):
    """Read significance.csv, by pair of methods, scope and degrees."""
    frame = pd.read_csv(root / "significance.csv", dtype={"train_degree": str})
    return frame.set_index(["before", "after", "scope", "train_degree", "infer_degree"]).sort_index()


def change(root, **changes):
    """Change the declaration of a study."""
    whole = json.loads((root / "study.json").read_text()) | changes
    (root / "study.json").write_text(json.dumps(whole))
    return read_study(root / "study.json")
