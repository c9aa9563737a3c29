"""Set a mixed-effects logistic model beside the test that tables use, at the primary endpoint of a study that was run.

python scripts/mixed_model.py results/demo 300

The number is of test images a task: the model has two effects for every image, which takes time. Whether
an image is right, with normal effects on its log-odds: of the image, and of the image, the training (of a seed on a
task) and the compensator (of a seed) on what the second method changes; fitted by variational Bayes (statsmodels).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

from tocom.analysis.cells import records
from tocom.analysis.compare import Models
from tocom.analysis.planned import Endpoint, endpoint, prediction_files
from tocom.study import read_study


def long_table(end: Endpoint, there: dict) -> pd.DataFrame:
    """Return a row for every image, seed and method of an endpoint: right, after (0 or 1), image, training, seed."""
    rows = []
    for task in end.scope.tasks:
        for after, (method, train) in enumerate(((end.before, end.point.before), (end.after, end.point.after))):
            for seed, right in there[end.backbone, method, task, train, end.point.infer].items():
                about = {"right": right.astype(int), "after": after, "task": task, "seed": seed}
                rows.append(pd.DataFrame(about | {"image": [f"{task} {n}" for n in range(len(right))]}))
    frame = pd.concat(rows, ignore_index=True)
    return frame.assign(training=frame.task + " " + frame.seed.astype(str))


def main(folder: Path, images: int) -> None:
    """Print the effect on the log-odds with its z, beside the gain in points with its t, on the same images."""
    study = read_study(folder / "study.json")
    end = endpoint(study)
    there = {
        key: {seed: right[:images] for seed, right in runs.items()}
        for key, runs in records(prediction_files(study, folder)).items()
    }
    effects = {
        "image": "0 + C(image)",
        "image, changed": "0 + C(image):after",
        "training": "0 + C(training)",
        "training, changed": "0 + C(training):after",
        "compensator": "0 + C(seed):after",
    }
    model = BinomialBayesMixedGLM.from_formula("right ~ after + C(task)", effects, long_table(end, there))
    n_fixed, n_sources, n_effects = model.k_fep, model.k_vcp, model.k_vc
    start = np.random.default_rng(0).normal(size=n_fixed + n_sources + n_effects)
    fit = model.fit_vb(mean=start, sd=np.exp(-0.5 + 0.1 * np.abs(start)))
    place = model.exog_names.index("after")
    mean, sd = fit.fe_mean[place], fit.fe_sd[place]
    print(
        f"log-odds changed by {mean:+.3f}, posterior sd {sd:.3f}: z = {mean / sd:.2f}, p = {2 * norm.sf(mean / sd):.2g}"
    )
    for name, log_sd in zip(effects, fit.vcp_mean, strict=True):
        print(f"  standard deviation of {name}: {np.exp(log_sd):.3f}")
    found = Models(study, there).compared(end.backbone, end.before, end.after, end.scope, end.point)
    gain, error = found["gain"], found["error"]
    print(f"points gained {gain:+.2f}, standard error {error:.2f}: t = {gain / error:.2f}, p = {found['p']:.2g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
