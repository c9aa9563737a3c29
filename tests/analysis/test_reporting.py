"""From cells to tables, figures, verdicts and headline figures, on made-up predictions with known answers."""

import re
import shutil
import subprocess
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tocom.analysis import headline, significance, tables, verify
from tocom.analysis.cells import correctness, gather, prediction_file, prediction_files, read_cells, write_rows
from tocom.analysis.report import write_figures, write_tables
from tocom.analysis.split import available_cores, split
from tocom.errors import TocomError
from tocom.files import save_arrays
from tocom.timing import MARK

TASKS = {"digits": "real", "mnist5k": "real", "rotation": "generated"}
DEGREES = (0, 4, 12)
N = 400
#: Share of test images that a model trained at m and run at n gets right; ToCom adds to it where it drops.
PLAIN = {0: {0: 0.96, 4: 0.96, 12: 0.80}, 12: {0: 0.90, 4: 0.91, 12: 0.92}}
GAIN = {(0, 12): 0.06, (12, 0): 0.02}


def right(share, seed):
    return np.random.default_rng([7, seed]).permutation(N) < round(share * N)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    labels = np.arange(N) % 5
    files = []
    for task, train, seed in product(TASKS, (0, 12, "random"), range(3)):
        cells, predictions = [], []
        for infer, compensated in product(DEGREES, (False, True)):
            if train == "random" and compensated:
                continue
            share = 0.90 if train == "random" else PLAIN[train][infer] + compensated * GAIN.get((train, infer), 0)
            gflops = 0.02 - infer / 1000
            cells.append({"infer_degree": infer, "compensated": compensated, "scale": 0.5, "gflops": gflops})
            predictions.append(np.where(right(share, seed), labels, labels + 1))
        path = prediction_file(root / "predictions", "vit", "tome", task, train, seed)
        meta = {"task": task, "train_degree": train, "seed": seed, "compressor": "tome", "cells": cells}
        save_arrays(path, {"predictions": np.stack(predictions), "labels": labels}, meta)
        files.append(("vit", path))
    write_rows(gather("made_up", files), root / "cells.csv")
    result = significance.compare(correctness(files), TASKS, resamples=300)
    result.insert(0, "study", "made_up")
    result.to_csv(root / "significance.csv", index=False)
    speeds = [
        {"backbone": "vit", "compressor": "tome", "infer_degree": n, "compensated": c, "gflops": 0.02,
         "images_per_second": 1000.0, "speedup": 1.5, "ratio": 1.003 if c else 1.0, "ratio_low": 0.99,
         "ratio_high": 1.01, "memory_mb": 10.0, "batch_size": 64, "repeats": 9, "threads": 1, "device": "cpu"}
        for n, c in product(DEGREES, (False, True))
    ]  # fmt: skip
    write_rows(speeds, root / "throughput.csv")
    gaps = [
        {"backbone": "vit", "compressor": "tome", "source_task": s, "target_task": t, "seed": 0, "train_degree": 0,
         "infer_degree": 12, "n": N, "correct": 1, "accuracy": 0.8 + 0.01 * (s != "none")}
        for s, t in product(["none", *TASKS], TASKS)
    ]  # fmt: skip
    write_rows(gaps, root / "transfer.csv")
    return root


def row(study, scope, train, infer, comparison=significance.TOCOM_VS_PLAIN):
    frame = pd.read_csv(study / "significance.csv", dtype={"train_degree": str})
    chosen = frame[(frame.scope == scope) & (frame.train_degree == train) & (frame.infer_degree == infer)]
    return chosen[chosen.comparison == comparison].iloc[0]


def test_cells_count_what_was_predicted(study):
    cells = read_cells(study / "cells.csv")
    assert len(cells) == len(TASKS) * 3 * (2 * 6 + 3)
    one = cells.query("task == 'digits' and train_degree == '0' and infer_degree == 12 and seed == 1").set_index(
        "compensated"
    )
    assert one.loc[False, "correct"] == 320
    assert one.loc[True, "accuracy"] == pytest.approx(0.86)


def test_the_files_behind_a_table_are_found_again(study):
    files = prediction_files(study / "predictions", read_cells(study / "cells.csv"))
    assert len(files) == len(TASKS) * 9
    assert all(path.is_file() for _, path in files)


@pytest.mark.parametrize("scope", ["real tasks", "generated tasks", "all tasks", "digits", "rotation"])
def test_gains_and_gaps_are_those_that_were_put_in(study, scope):
    found = row(study, scope, "0", 12)
    assert found.gain == pytest.approx(6.0)
    assert found.low <= 6.0 <= found.high
    assert found.accuracy_matched == pytest.approx(92.0)
    assert found.gap_closed == pytest.approx(0.5)
    assert found.p_images_holm < 1e-3
    assert row(study, scope, "0", 4).gain == 0
    assert row(study, scope, "0", 4).p_images == 1


def test_the_rival_is_compared_with_tocom(study):
    assert row(study, "real tasks", "0", 12, significance.RANDOM_VS_TOCOM).gain == pytest.approx(4.0)


def test_correction_is_within_each_family_of_a_table(study):
    from statsmodels.stats.multitest import multipletests

    frame = pd.read_csv(study / "significance.csv")
    for _, family in frame.groupby(["comparison", "group"]):
        expected = multipletests(family.p_images, method="holm")[1]
        assert family.p_images_holm.to_numpy() == pytest.approx(expected)


def test_tables_show_every_condition_and_bold_the_better_of_a_pair(study, tmp_path):
    write_tables(study, tmp_path)
    text = (tmp_path / "main.md").read_text()
    block = text.split("### ")[1].splitlines()
    plain = next(line for line in block if line.startswith("| 0 "))
    ours = block[block.index(plain) + 1]
    gain = block[block.index(plain) + 2]
    assert "80.0 ± 0.0" in plain
    assert "**86.0 ± 0.0**" in ours
    assert "+6.0 [" in gain
    assert gain.rstrip("| ").endswith("***")
    assert "| matched" in text
    assert "not run" in text  # no model was trained at degree 4
    assert len(re.findall(r"^### ", (tmp_path / "tasks.md").read_text(), re.MULTILINE)) == len(TASKS)


def test_latex_tables_have_booktabs_rules_and_balanced_braces(study, tmp_path):
    write_tables(study, tmp_path)
    for path in tmp_path.glob("*.tex"):
        text = path.read_text()
        assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\begin{table}")
        unescaped = re.sub(r"\\[{}]", "", text)
        assert unescaped.count("{") == unescaped.count("}")
        columns = {line.count(" & ") for line in text.splitlines() if line.endswith("\\\\")}
        assert len(columns) == 1
        assert not re.search(r"(?<!\\)[%_#]", text.replace("{%\n", "{\n"))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_tables_compile(study, tmp_path):
    write_tables(study, tmp_path)
    names = sorted(path.stem for path in tmp_path.glob("*.tex"))
    body = "\n".join(f"\\input{{{name}}}" for name in names)
    packages = "\\usepackage{booktabs,graphicx}\\usepackage[T1]{fontenc}"
    (tmp_path / "paper.tex").write_text(
        f"\\documentclass{{article}}{packages}\\begin{{document}}\n{body}\n\\end{{document}}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-2000:]


def test_figures_are_the_same_bytes_twice(study, tmp_path):
    for name in "ab":
        write_figures(study, tmp_path / name)
    made = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert made == sorted(
        f"{name}.{kind}" for name in ("accuracy_vs_gflops", "gain_heatmap", "gap_transfer") for kind in ("pdf", "png")
    )
    for name in made:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_headline_figures_are_computed_from_the_tables(study):
    tests = pd.read_csv(study / "significance.csv", dtype={"train_degree": str})
    gain, p, closed = headline.effect(tests)
    assert gain.reached
    assert gain.measured.startswith("+6.00")
    assert p.reached
    assert closed.measured.startswith("50 %")
    cells = read_cells(study / "cells.csv")
    assert headline.cost_where_not_needed(cells).reached
    worse = cells.assign(accuracy=cells.accuracy - 0.02 * (cells.compensated & (cells.infer_degree == 4)))
    assert not headline.cost_where_not_needed(worse).reached
    speed = pd.read_csv(study / "throughput.csv")
    assert headline.cost_of_folding(speed).reached
    assert not headline.cost_of_folding(speed.assign(ratio=speed.ratio * 1.05)).reached


def test_verify_tells_identical_close_and_different_runs_apart(study):
    cells = read_cells(study / "cells.csv")
    same = verify.compare(cells, cells, 5, 1, 1)
    assert same.identical
    assert "identical" in verify.report(same, 5, 1, 1)
    near = cells.copy()
    near.loc[0, ["correct", "accuracy"]] += [4, 4 / N]
    assert "1.00 points in a cell" in verify.report(verify.compare(near, cells, 5, 1, 1), 5, 1, 1)
    with pytest.raises(TocomError, match="differs from the reference"):
        verify.report(verify.compare(near, cells, 0.5, 1, 1), 0.5, 1, 1)
    shifted = cells.assign(accuracy=cells.accuracy - 0.03)
    with pytest.raises(TocomError, match="mean of"):
        verify.report(verify.compare(shifted, cells, 5, 1, 1), 5, 1, 1)
    without_effect = cells.assign(
        accuracy=cells.accuracy + (cells.infer_degree == 12) * (0.01 - 0.02 * cells.compensated),
    )
    with pytest.raises(TocomError, match="mean gain at"):
        verify.report(verify.compare(without_effect, cells, 5, 1.5, 1), 5, 1.5, 1)
    assert not verify.compare(cells.assign(scale=cells.scale + 1), cells, 5, 1, 1).identical
    with pytest.raises(TocomError, match="one table only"):
        verify.compare(cells.iloc[1:], cells, 5, 1, 1)


def test_signed_numbers_have_no_negative_zero():
    assert [tables.signed(x) for x in (0.04, -0.04, 1.25, -3.0)] == ["+0.0", "+0.0", "+1.2", "-3.0"]


def test_time_is_split_into_useful_work_and_the_rest(tmp_path):
    import os

    (tmp_path / "logs").mkdir()
    line = MARK + '{"stage": "%s", "threads": 2, "memory_mb": %s, "start_up": 4.0, "files": 1.0, "compute": %s}\n'
    (tmp_path / "logs" / "a.log").write_text("progress\n" + line % ("finetune", 300, 20) + line % ("data", 200, 5))
    (tmp_path / "logs" / "old.log").write_text(line % ("evaluate", 9999, 1000))
    os.utime(tmp_path / "logs" / "old.log", (50, 50))
    os.utime(tmp_path / "logs" / "a.log", (150, 150))
    result = split(tmp_path, since=100, until=200, cores=2)
    assert result.core_seconds["training"] == 40
    assert result.core_seconds["data"] == 10
    assert sum(result.core_seconds.values()) == pytest.approx(200)
    assert result.share_elsewhere == pytest.approx(0.75)
    assert result.memory_mb == 500
    assert split(tmp_path, since=300, until=400, cores=2) is None
    assert available_cores("3") == 3
    with pytest.raises(TocomError, match="give a number"):
        available_cores("many")
