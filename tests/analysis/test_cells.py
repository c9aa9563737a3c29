"""From predictions to cells, comparisons, verdicts and headline figures, on made-up predictions with known answers."""

import shutil
from itertools import product

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from tests.analysis import made_up
from tests.analysis.made_up import config, significance_of
from tocom.analysis import planned, stats
from tocom.analysis.cells import COLUMNS, KEYS, gather, read_cells, records
from tocom.analysis.compare import MISMATCH_COLUMNS, PAIRWISE_COLUMNS, compare, corrected, harm, mismatch
from tocom.analysis.headline import headline
from tocom.analysis.planned import Point, group_scopes, points, task_scopes
from tocom.analysis.verify import verify
from tocom.cli_analyse import app
from tocom.errors import TocomError
from tocom.study import parse_study

HEADLINE, RIVAL = ("tome", "tocom"), ("tocom", "random_degree")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_up.make(tmp_path_factory.mktemp("study"), config())


@pytest.fixture
def copied(study, tmp_path):
    return shutil.copytree(study, tmp_path / "copy")


def analyse(*words):
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


# --- cells ----------------------------------------------------------------------------------------------------------


def test_cells_count_what_was_predicted_and_are_all_that_was_planned(study):
    cells = read_cells(study / "cells.csv")
    assert tuple(cells.columns) == COLUMNS
    assert len(cells) == 3 * 3 * (2 * 2 * 3 + 3)
    assert set(cells[list(KEYS)].itertuples(index=False, name=None)) == planned.cells(parse_study(config()))
    one = cells.query("task == 'digits' and train_degree == '0' and infer_degree == 12 and seed == 1")
    one = one.set_index("method")
    assert one.loc["tome", "correct"] == 320
    assert one.loc["tocom", "score"] == one.loc["tocom", "accuracy"] == pytest.approx(0.86)
    assert one.loc["tocom", ["compensated", "compensator", "metric"]].tolist() == [True, "tocom", "accuracy"]


def test_rows_are_sorted_and_equal_ones_keep_the_order_of_the_files(study):
    cells = read_cells(study / "cells.csv")
    order = ["backbone", "compressor", "task", "seed", "train_degree", "infer_degree", "compensated"]
    keys = [tuple(str(value).zfill(6) for value in row) for row in cells[order].itertuples(index=False)]
    assert keys == sorted(keys)
    files = sorted((study / "predictions").rglob("*.safetensors"))
    assert gather("made_up", files) == gather("made_up", files[::-1])


def test_a_cell_that_two_files_hold_is_refused(copied):
    path = next((copied / "predictions").rglob("*.safetensors"))
    with pytest.raises(TocomError, match="hold the same cell"):
        gather("made_up", [path, shutil.copy(path, path.with_name("batch-1.safetensors"))])
    # One that the study does not name was left by an earlier declaration, and is passed over.
    assert "135 of 135" in analyse("cells", copied, "-o", copied / "cells.csv").output


def test_a_table_of_before_is_refused(copied):
    read_cells(copied / "cells.csv").drop(columns="score").to_csv(copied / "cells.csv", index=False)
    with pytest.raises(TocomError, match="lacks the column 'score'"):
        read_cells(copied / "cells.csv")


# --- what is compared -----------------------------------------------------------------------------------------------


def test_which_degrees_are_compared_follows_from_the_methods():
    entries = made_up.DEMO | {
        "other": {"compressor": "evit"},
        "ratio": {"like": "other", "tuning": {"degree": "random"}},
    }
    study = parse_study(config(methods=entries | {"few": {"like": "other", "infer_degrees": [12]}}))
    off = [("0", 4), ("0", 12), ("12", 0), ("12", 4)]
    every = list(product(("0", "12"), made_up.DEGREES))
    assert points(study, *HEADLINE) == [Point(m, m, m, n) for m, n in off]
    assert points(study, *RIVAL) == [Point(m, m, "random", n) for m, n in off]
    assert points(study, "random_degree", "tocom") == [Point(m, "random", m, n) for m, n in off]
    assert points(study, "tome", "other") == [Point(m, m, m, n) for m, n in every]
    assert points(study, "tome", "random_degree") == [Point(m, m, "random", n) for m, n in every]
    assert points(study, "ratio", "random_degree") == [Point("random", "random", "random", n) for n in made_up.DEGREES]
    assert points(study, "tome", "few") == [Point(m, m, m, 12) for m in ("0", "12")]
    assert planned.families(study)[:2] == [("tome", "tocom"), ("random_degree",)]


@pytest.mark.parametrize("scope", ["real tasks", "generated tasks", "all tasks", "digits", "rotation"])
def test_gains_and_gaps_are_those_that_were_put_in(study, scope):
    found = significance_of(study).loc[(*HEADLINE, scope, "0", 12)]
    assert found.gain == pytest.approx(6.0)
    assert found.low <= 6.0 <= found.high
    assert found.score_matched == pytest.approx(92.0)
    assert found.gap_closed == pytest.approx(0.5)
    assert found.p < 1e-2
    assert found.primary == (scope == "all tasks")
    assert found.p_images < 1e-3
    assert significance_of(study).loc[(*HEADLINE, scope, "0", 4), ["gain", "p_images"]].tolist() == [0, 1]
    rival = significance_of(study).loc[(*RIVAL, scope, "0", 12)]
    assert (rival.gain, rival.gap_closed) == pytest.approx((4.0, 4 / 6))


def test_all_numbers_of_a_row_are_those_of_the_records():
    study = parse_study(config(("digits", "mnist5k")))
    rng, images, found = np.random.default_rng(3), {"digits": 50, "mnist5k": 80}, {}
    for backbone, method, task, seed, train, infer in sorted(planned.cells(study)):
        found.setdefault((backbone, method, task, train, infer), {})[seed] = rng.random(images[task]) < rng.random()
    frame = compare(study, found).set_index(["after", "scope", "train_degree", "infer_degree"])
    row = frame.loc[("tocom", "real tasks", "12", 4)]

    def runs_of(method, train):
        return [np.stack([found["vit", method, task, train, 4][seed] for seed in made_up.SEEDS]) for task in images]

    runs = [runs_of("tome", "12"), runs_of("tocom", "12")]
    gains = np.array([100 * (b.mean(axis=1) - a.mean(axis=1)) for a, b in zip(*runs, strict=True)])
    assert row.gain == pytest.approx(gains.mean())
    assert (row.score_before, row.score_after) == pytest.approx([100 * np.mean([r.mean() for r in of]) for of in runs])
    assert (row.n_tasks, row.n_seeds, row.n_images) == (2, 3, 130)
    differences = [b.astype(int) - a.astype(int) for a, b in zip(*runs, strict=True)]
    assert row.p_images == stats.sign_flip_test(differences)
    by_seed = gains.mean(axis=0)  # a compensator is shared by the tasks
    assert row.p_seeds == pytest.approx(scipy.stats.ttest_1samp(by_seed, 0).pvalue)
    assert row.p_tasks == pytest.approx(scipy.stats.wilcoxon(gains.mean(axis=1)).pvalue)
    assert row.effect == pytest.approx(row.gain / by_seed.std(ddof=1))
    # what a bootstrap over images finds, beside the spread of the trainings
    images_alone = [(100 * d.mean(axis=0)).var(ddof=1) / d.shape[1] - residual(100.0 * d) / d.size for d in differences]
    error = by_seed.var(ddof=1) / 3 + max(sum(images_alone), 0) / 4
    assert row.error == pytest.approx(np.sqrt(error))
    assert (row.low + row.high) / 2 == pytest.approx(row.gain)
    assert np.isnan(row.score_matched)  # no model was trained at degree 4
    alone = frame.loc[("tocom", "digits", "12", 4)]
    assert alone.p_images == pytest.approx(stats.sign_flip_test(differences[:1]))
    assert np.isnan(alone.p_tasks)
    # Random degrees are other trainings: their seeds are not paired with those of the first, which share a compensator.
    rival = frame.loc[("random_degree", "real tasks", "12", 4)]
    other = [100 * r.mean(axis=1) for r in runs_of("random_degree", "random")]
    shared = np.mean([100 * r.mean(axis=1) for r in runs[1]], axis=0).var(ddof=1)
    assert rival.effect == pytest.approx(rival.gain / np.sqrt(shared + sum(o.var(ddof=1) for o in other) / 4))


def test_what_a_mismatch_costs_is_the_difference_of_independent_trainings_at_one_inference_degree():
    entries = made_up.DEMO | {"learned": {"compressor": "evit"}, "one": {"like": "tome", "train_degrees": [4]}}
    study = parse_study(config(("digits", "mnist5k"), entries, infer_degrees=[0, 4, 12], seeds=[0, 1, 2, 3]))
    rng, images, found = np.random.default_rng(5), {"digits": 60, "mnist5k": 90}, {}
    for backbone, method, task, seed, train, infer in sorted(planned.cells(study)):
        found.setdefault((backbone, method, task, train, infer), {})[seed] = rng.random(images[task]) < rng.random()
    frame = mismatch(study, found)
    assert tuple(frame.columns) == MISMATCH_COLUMNS
    where, scopes = ["method", "scope", "train_degree", "infer_degree"], ("real tasks", "digits", "mnist5k")
    either, drawn = [("0", 12), ("12", 0)], [("random", 0), ("random", 12)]
    # Random degrees stand beside the fixed ones that they are otherwise like, and "one" has a single degree of its own.
    lines = [("tome", "tome", either), ("random_degree", "tome", drawn), ("learned", "learned", either)]
    lines += [("random_degree", "one", [("random", 4)])]
    expected = [(m, of, scope, *pair) for scope in scopes for m, of, degrees in lines for pair in degrees]
    assert list(frame[["method", "matched", *where[1:]]].itertuples(index=False, name=None)) == expected
    for task in images:
        drawn_at, own_at = (
            np.mean([right.mean() for right in found["vit", m, task, train, 12].values()])
            for m, train in (("random_degree", "random"), ("tome", "12"))
        )
        row = frame.set_index(where).loc[("random_degree", task, "random", 12)]
        assert row.loss == pytest.approx(100 * (own_at - drawn_at))
    row = frame.set_index(where).loc[("tome", "real tasks", "0", 12)]
    own, matched = (
        [np.stack([100.0 * found["vit", "tome", task, train, 12][seed] for seed in range(4)]) for task in images]
        for train in ("0", "12")
    )
    assert row.score == pytest.approx(np.mean([task.mean() for task in own]))
    assert row.score_matched == pytest.approx(np.mean([task.mean() for task in matched]))
    assert row.loss == pytest.approx(row.score_matched - row.score)
    assert (row.n_tasks, row.n_seeds, row.n_images) == (2, 4, 150)
    # Trainings of either degree, and of either task, are draws of their own: variances of means of four add.
    by_seed = [task.mean(axis=1).var(ddof=1) / 4 / 2**2 for task in own + matched]
    losses = [b - a for a, b in zip(own, matched, strict=True)]
    left = [(residual(a) + residual(b)) / 4 for a, b in zip(own, matched, strict=True)]
    by_image = [
        (loss.mean(axis=0).var(ddof=1) - rest) / loss.shape[1] / 2**2 for loss, rest in zip(losses, left, strict=True)
    ]
    assert row.error == pytest.approx(np.sqrt(sum(by_seed) + max(sum(by_image), 0)))
    # Cochran and Cox: critical values weighted by variances, which is at p where it equals the ratio.
    parts = [(sum(by_seed), welch(by_seed, [3] * 4))]
    parts += [(sum(by_image), welch(by_image, [n - 1 for n in images.values()]))] if sum(by_image) > 0 else []
    total = sum(variance for variance, _ in parts)
    for level, ratio in ((0.05, (row.high - row.low) / 2 / row.error), (row.p, abs(row.loss) / row.error)):
        assert ratio == pytest.approx(sum(v * scipy.stats.t.isf(level / 2, df) for v, df in parts) / total)
    assert (row.low + row.high) / 2 == pytest.approx(row.loss)


def test_every_two_methods_are_compared_at_the_endpoint_as_a_declared_pair_is(tmp_path):
    methods = made_up.DEMO | {"late": {"like": "tome", "train_degrees": [12]}}
    root = made_up.make(tmp_path, config(methods=methods, compare=[["tome", "random_degree"]]))
    frame = pd.read_csv(root / "pairwise.csv")
    assert tuple(frame.columns) == PAIRWISE_COLUMNS
    pairs = [("tome", "tocom"), ("tome", "random_degree"), ("tocom", "random_degree")]  # late was not trained at 0
    assert list(zip(frame.before, frame.after, strict=True)) == pairs
    row = frame.iloc[1]
    assert (str(row.train_before), row.train_after, row.infer_degree) == ("0", "random", 12)
    declared = significance_of(root).loc[("tome", "random_degree", "all tasks", "0", 12)]
    for name in ("n_tasks", "n_seeds", "n_images", "gain", "low", "high", "error", "effect", "p"):
        assert row[name] == pytest.approx(declared[name], nan_ok=True)


def welch(variances, dfs):
    """Return the degrees of freedom of a sum of estimated variances."""
    return sum(variances) ** 2 / sum(v**2 / df for v, df in zip(variances, dfs, strict=True))


def residual(values):
    """Return the mean square of what is left of [seeds, images] without the means of either."""
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return (left**2).sum() / (values.shape[0] - 1) / (values.shape[1] - 1)


def test_correction_is_for_what_is_shown_together_behind_the_primary_endpoint():
    frame = pd.DataFrame({"p": [0.02, 0.001, 0.03, np.nan, 0.01], "primary": [False, False, True, False, False]})
    rest = multipletests([0.02, 0.001, 0.01], method="holm")[1]
    expected = [max(rest[0], 0.03), max(rest[1], 0.03), 0.03, np.nan, max(rest[2], 0.03)]
    np.testing.assert_allclose(corrected(frame), expected)
    alone = frame[~frame.primary]
    np.testing.assert_allclose(corrected(alone), [rest[0], rest[1], np.nan, rest[2]])


def test_harm_is_the_mean_cost_over_conditions_without_need(study):
    frame = pd.read_csv(study / "harm.csv").set_index("scope")
    # A mismatch costs nothing from 0 to 4; from 12 to 4 it costs a point, which is not less than one.
    assert frame.n_conditions.to_dict() == {"real tasks": 2, "generated tasks": 1, "all tasks": 3}
    assert frame.cost.tolist() == frame.low.tolist() == [0, 0, 0]
    wide = parse_study(config(analysis={"harmless": 2.5}))
    found = harm(wide, records(sorted((study / "predictions").rglob("*.safetensors")))).set_index("scope")
    # From 12 to 0 (two points; gains two, differently by seed) and to 4, too.
    assert found.n_conditions.to_dict() == {"real tasks": 6, "generated tasks": 3, "all tasks": 9}
    assert found.cost.tolist() == pytest.approx([-2 / 3] * 3)
    gains = np.array([1.5, 2.0, 2.5]) / 3
    t = scipy.stats.ttest_1samp(gains, -0.3, alternative="greater")
    row = found.loc["all tasks"]
    assert row.low <= -2 / 3 <= row.high
    assert row.p == pytest.approx(t.pvalue, rel=0.5)  # images add a little
    assert row.p >= t.pvalue * 0.9


def test_a_comparison_takes_the_seeds_that_all_its_tasks_have(study):
    found = records(sorted((study / "predictions").rglob("*.safetensors")))
    whole, left = compare(parse_study(config()), found), {"digits": {0, 1}, "mnist5k": {1, 2}, "rotation": {0}}
    for (_, _, task, train, _), runs in found.items():
        for seed in set(runs) - left[task] if train == "0" else ():
            del runs[seed]
    frame = compare(parse_study(config()), found)
    frame, whole = (f[f.after == "tocom"] for f in (frame, whole))
    at = frame[(frame.train_degree == "0") & (frame.infer_degree == 12)].set_index("scope")
    # No seed is common to all tasks: that scope is left out.
    expected = {"real tasks": 1, "generated tasks": 1, "digits": 2, "mnist5k": 2, "rotation": 1}
    assert at.n_seeds.to_dict() == expected
    assert at.gain.to_list() == pytest.approx([6.0, 5.5, 5.75, 6.25, 5.5])
    # Models with all seeds are compared as before; they close no gap to matched models that are missing.
    raw = ["scope", "infer_degree", "n_seeds", "score_before", "gain", "low", "high", "p_images", "p_seeds"]
    rest, same = (f.loc[f.train_degree == "12", raw].reset_index(drop=True) for f in (frame, whole))
    pd.testing.assert_frame_equal(rest, same)
    closed = frame[(frame.train_degree == "12") & (frame.infer_degree == 0)].set_index("scope").gap_closed
    assert closed.notna().to_dict() == {"all tasks": False} | {name: seeds > 1 for name, seeds in expected.items()}


def test_predictions_of_different_images_are_not_compared(study):
    found = records(sorted((study / "predictions").rglob("*.safetensors")))
    for (_, method, *_), runs in found.items():
        if method == "random_degree":
            runs.update({seed: record[:-1] for seed, record in runs.items()})
    with pytest.raises(TocomError, match="different images"):
        compare(parse_study(config()), found)


def test_groups_keep_their_order_and_none_appears_twice():
    def names(groups):
        return [(scope.name, len(scope.tasks)) for scope in group_scopes(groups)]

    natural, special, structured = (f"VTAB-1k {part}" for part in ("natural", "specialised", "structured"))
    vtab = {"caltech": natural, "dtd": natural, "eurosat": special, "clevr": structured}
    parts = [(natural, 2), (special, 1), (structured, 1)]
    assert names(vtab) == [*parts, ("VTAB-1k", 4)]
    assert names({"cifar100": "CIFAR-100", **vtab}) == [("CIFAR-100", 1), *parts, ("VTAB-1k", 4), ("all tasks", 5)]
    assert names({"a": "FGVC", "b": "FGVC"}) == [("FGVC", 2)]
    assert names({"caltech": natural, "cub": "FGVC"}) == [(natural, 1), ("FGVC", 1), ("all tasks", 2)]
    assert task_scopes({"cifar100": "CIFAR-100"}) == []
    assert [s.is_group for s in task_scopes({"a": "FGVC", "b": "FGVC"})] == [False, False]


# --- commands -------------------------------------------------------------------------------------------------------


def test_the_commands_make_the_same_tables_as_the_functions_and_need_no_predictions_named(copied, study):
    assert "135 of 135 planned cells" in analyse("cells", copied, "-o", copied / "cells.csv").output
    analyse("compare", copied, "-o", copied)
    for name in ("harm", "mismatch"):
        one, other = (pd.read_csv(root / f"{name}.csv") for root in (copied, study))
        pd.testing.assert_frame_equal(one, other, check_dtype=False, check_exact=False)
    assert (copied / "cells.csv").read_bytes() == (study / "cells.csv").read_bytes()
    new, old = (pd.read_csv(root / "significance.csv") for root in (copied, study))
    pd.testing.assert_frame_equal(new, old, check_dtype=False)
    some = [path for path in (copied / "predictions").rglob("*.safetensors") if "digits" in path.parts]
    assert "45 of 135" in analyse("cells", copied, *some, "-o", copied / "cells.csv").output
    assert analyse("concat", copied / "cells.csv", copied / "cells.csv", "-o", copied / "all.csv").exit_code == 0
    assert len(pd.read_csv(copied / "all.csv")) == 90
    shutil.rmtree(copied / "predictions")
    with pytest.raises(TocomError, match="no predictions of this study"):
        analyse("compare", copied, "-o", copied)


def test_verify_tells_identical_close_and_different_runs_apart(copied):
    cells = read_cells(copied / "cells.csv")
    (copied / "reference").mkdir()

    def verdict(**columns):
        cells.assign(**columns).to_csv(copied / "reference" / "cells.csv", index=False)
        return verify(copied)

    made_up.change(copied, verify={"cell_points": 5, "mean_points": 2, "gain_points": 1})
    assert "135 cells are identical" in verdict()
    assert "0.00 in a cell" in verdict(scale=cells.scale + 1)
    near = cells.score.where(cells.index != 0, cells.score + 4 / made_up.N)
    assert "1.00 in a cell" in verdict(score=near)
    with pytest.raises(TocomError, match=r"cell of vit, .*: -6.00 points .and \d+ more"):
        verdict(score=cells.score + 0.06)
    with pytest.raises(TocomError, match=r"\bmean of vit, random_degree, random, 0: .3.00"):
        verdict(score=cells.score - 0.03 * (cells.method == "random_degree"))
    with pytest.raises(TocomError, match=r"mean gain of .*tocom.*, vit, 0, 12: -1.50"):
        verdict(score=cells.score + (cells.infer_degree == 12) * 0.015 * (cells.method == "tocom"))
    cells.iloc[1:].to_csv(copied / "reference" / "cells.csv", index=False)
    with pytest.raises(TocomError, match="one table only"):
        verify(copied)


def test_headline_figures_are_computed_from_the_tables(copied):
    gain, p, closed, cost, folding = headline(copied)
    assert gain.what == "gain of ToMe + ToCom over ToMe (all tasks, trained at 0, run at 12)"
    assert gain.measured.startswith("+6.00")
    assert closed.measured.startswith("50 %")
    assert "3 conditions" in cost.what
    harm = pd.read_csv(copied / "harm.csv")
    harm.assign(cost=0.1, low=0.0, high=0.2, p=0.01).to_csv(copied / "harm.csv", index=False)
    cost = headline(copied)[3]
    assert cost.measured == "+0.10 points, 95 % interval [+0.00, +0.20], p = 0.0100"
    assert all(figure.reached for figure in (gain, p, closed, cost, folding))
    assert analyse("headline", copied).exit_code == 0
    harm.assign(cost=0.1, low=-0.1, high=0.3, p=0.06).to_csv(copied / "harm.csv", index=False)
    speed = pd.read_csv(copied / "throughput.csv")
    speed.assign(ratio=speed.ratio * 1.05).to_csv(copied / "throughput.csv", index=False)
    assert [figure.reached for figure in headline(copied)] == [True, True, True, False, False]
    with pytest.raises(TocomError, match="a figure was missed"):
        analyse("headline", copied)
    made_up.change(copied, compare=[])
    with pytest.raises(TocomError, match="compares no methods"):
        headline(copied)


def test_headline_says_what_is_missing(copied):
    for name, message in (("harm", "lacks harm.csv;"), ("throughput", "lacks harm.csv and throughput.csv;")):
        (copied / f"{name}.csv").unlink()
        with pytest.raises(TocomError, match=message):
            headline(copied)
