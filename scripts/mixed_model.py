"""Set a mixed-effects logistic model beside the test that tables use, at the primary endpoint of a study that was run.

python scripts/mixed_model.py results/demo

Whether an image is right, with normal effects on its log-odds: of the image and of the training (of a seed on a task),
and of either and of the compensator (of a seed) on what the second method changes. Fitted by lme4 (Bates et al. 2015),
which Rscript has to find (Debian: r-cran-lme4); its z takes the standard deviations of these effects as known.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from tocom.analysis.cells import records
from tocom.analysis.planned import Endpoint, endpoint, prediction_files
from tocom.analysis.run import Run, primary

MODEL = """
d <- read.csv(commandArgs(TRUE)[1]); d$seed <- factor(d$seed)
f <- right ~ after + task + (1|image) + (0+after|image) + (1|training) + (0+after|training) + (0+after|seed)
m <- lme4::glmer(f, data = d, family = binomial, control = lme4::glmerControl(optimizer = "bobyqa"))
print(lme4::VarCorr(m)); print(coef(summary(m)))
"""


def long_table(end: Endpoint, there: dict) -> pd.DataFrame:
    """Return a row for every image, seed and method of an endpoint, with what the model takes of it."""
    rows = []
    for task in end.scope.tasks:
        for after, (method, train) in enumerate(((end.before, end.point.before), (end.after, end.point.after))):
            for seed, right in there[end.backbone, method, task, train, end.point.infer].items():
                about = {"right": right.astype(int), "after": after, "task": task, "seed": seed}
                rows.append(pd.DataFrame(about | {"image": [f"{task} {n}" for n in range(len(right))]}))
    frame = pd.concat(rows, ignore_index=True)
    return frame.assign(training=frame.task + " " + frame.seed.astype(str))


def main(folder: Path) -> None:
    """Print the effects on the log-odds, and the gain in points with its t."""
    run = Run.read(folder)
    with TemporaryDirectory() as scratch:
        table = Path(scratch) / "long.csv"
        long_table(endpoint(run.study), records(prediction_files(run.study, folder))).to_csv(table, index=False)
        subprocess.run(["Rscript", "-e", MODEL, str(table)], check=True)
    row = primary(run)[1].test
    t = row.gain / row.error
    print(f"points gained {row.gain:+.2f}, standard error {row.error:.2f}: t = {t:.2f}, p = {row.p:.2g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
