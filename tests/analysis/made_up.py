"""A study of made-up predictions whose accuracies are known, through the real code from predictions to tables."""

from itertools import product

import numpy as np

from tocom.analysis import significance
from tocom.analysis.cells import correctness, gather, prediction_file, read_cells, write_rows
from tocom.files import save_arrays

N = 400
SEEDS = (0, 1, 2)
DEGREES = (0, 4, 12)
#: Share of test images that a model trained at m and run at n gets right; ToCom adds to it where it drops.
PLAIN = {0: {0: 0.96, 4: 0.96, 12: 0.80}, 12: {0: 0.90, 4: 0.91, 12: 0.92}}
GAIN = {(0, 12): 0.06, (12, 0): 0.02}
#: What timm calls the backbones, as far as it has them.
TIMM = {"deit_b": "deit_base_patch16_224.fb_in1k", "deit_s": "deit_small_patch16_224.fb_in1k"}
#: How much of the gain each variant of the compensator has.
VARIANTS = {"tocom": 1.0, "rank1": 0.5}


def right(share, seed):
    """Return which images are right [N] bool; those of a smaller share are among those of a larger one."""
    return np.random.default_rng([7, seed]).permutation(N) < round(share * N)


def cells_of(train, variants):
    """Return (inference degree, compensator, share of right images) of a checkpoint, as evaluation orders them."""
    if train == "random":
        return [(infer, "none", 0.90) for infer in DEGREES]
    plain = [(infer, "none", PLAIN[train][infer]) for infer in DEGREES]
    return plain + [
        (infer, name, PLAIN[train][infer] + part * GAIN.get((train, infer), 0))
        for (name, part), infer in product(variants.items(), DEGREES)
    ]


def predictions(root, models, tasks, variants, old=False):
    """Write predictions files and return (backbone, file) pairs; old files do not name the compensator."""
    labels = np.arange(N) % 5
    files = []
    for (backbone, compressor), task, train, seed in product(models, tasks, (0, 12, "random"), SEEDS):
        cells = [
            {"infer_degree": n, "compensated": name != "none", "compensator": name, "scale": 0.5,
             "gflops": 0.02 - n / 1000}
            for n, name, _ in cells_of(train, variants)
        ]  # fmt: skip
        if old:
            cells = [{key: value for key, value in cell.items() if key != "compensator"} for cell in cells]
        predicted = [np.where(right(share, seed), labels, labels + 1) for _, _, share in cells_of(train, variants)]
        path = prediction_file(root, backbone, compressor, task, train, seed)
        meta = {"task": task, "train_degree": train, "seed": seed, "compressor": compressor, "cells": cells}
        save_arrays(path, {"predictions": np.stack(predicted), "labels": labels}, meta)
        files.append((backbone, path))
    return files


def make(root, groups, models=(("vit", "tome"),), variants=None):
    """Make all tables of a study in ``root``; ``groups`` is task -> its group's name."""
    files = predictions(root / "predictions", models, groups, variants or {"tocom": 1.0})
    write_rows(gather("made_up", files), root / "cells.csv")
    result = significance.compare(correctness(files), groups, resamples=300)
    result.insert(0, "study", "made_up")
    result.to_csv(root / "significance.csv", index=False)
    speeds = [
        {"backbone": b, "compressor": c, "infer_degree": n, "compensated": on, "gflops": 0.02,
         "images_per_second": 1000.0, "speedup": 1.5, "ratio": 1.003 if on else 1.0, "ratio_low": 0.99,
         "ratio_high": 1.01, "memory_mb": 10.0, "batch_size": 64, "repeats": 9, "threads": 1, "device": "cpu"}
        for (b, c), n, on in product(models, DEGREES, (False, True))
    ]  # fmt: skip
    write_rows(speeds, root / "throughput.csv")
    gaps = [
        {"backbone": b, "compressor": c, "source_task": s, "target_task": t, "seed": seed, "train_degree": 0,
         "infer_degree": 12, "n": N, "correct": 1,
         "accuracy": 0.8 + 0.01 * (s != "none") + 0.02 * (s == t) + 0.001 * seed * (s != "none")}
        for (b, c), s, t, seed in product(models, ["none", *groups], groups, SEEDS)
    ]  # fmt: skip
    write_rows(gaps, root / "transfer.csv")
    return files


def config(groups, backbones=("vit",), compressors=("tome",), variants=("tocom",), degrees=DEGREES):
    """Return the config that asks for exactly such a study."""
    return {
        "backbones": [{"name": name, "timm": TIMM.get(name)} for name in backbones],
        "compressors": list(compressors),
        "tasks": list(groups),
        "seeds": list(SEEDS),
        "train_degrees": [0, 12, "random"],
        "infer_degrees": list(degrees),
        "compensators": {name: {} if name == "tocom" else {"rank": 1} for name in variants},
    }


def cut(root, **where):
    """Take the cells with these values out of a study's cells.csv; return how many there were."""
    cells = read_cells(root / "cells.csv")
    out = np.logical_and.reduce([cells[name] == value for name, value in where.items()])
    cells[~out].to_csv(root / "cells.csv", index=False)
    return int(out.sum())
