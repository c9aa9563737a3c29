"""From predictions to cells, comparisons, verdicts and headline figures, on made-up predictions with known answers."""

import shutil
from itertools import product

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from tests.analysis import made_up
from tests.analysis.made_up import config, significance_of
from tocom.analysis import planned, stats
from tocom.analysis.cells import COLUMNS, KEYS, gather, read_cells, records
from tocom.analysis.compare import compare
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
    assert found.p_images_holm < 1e-3
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
    runs = [
        [np.stack([found["vit", method, task, train, 4][seed] for seed in made_up.SEEDS]) for task in images]
        for method, train in (("tome", "12"), ("tocom", "12"))
    ]
    gains = np.array([100 * (b.mean(axis=1) - a.mean(axis=1)) for a, b in zip(*runs, strict=True)])
    assert row.gain == pytest.approx(gains.mean())
    assert (row.score_before, row.score_after) == pytest.approx([100 * np.mean([r.mean() for r in of]) for of in runs])
    assert (row.n_tasks, row.n_seeds, row.n_images) == (2, 3, 130)
    differences = [b.astype(int) - a.astype(int) for a, b in zip(*runs, strict=True)]
    assert row.p_images == stats.pooled_sign_flip_test(differences)
    assert row.p_seeds == pytest.approx(stats.seed_test(gains.mean(axis=0)))
    assert row.p_tasks == pytest.approx(stats.task_test(gains.mean(axis=1)))
    draws = stats.crossed_bootstrap([difference[None] for difference in differences], 300, 0)
    assert (row.low, row.high) == pytest.approx(stats.interval(100 * draws[:, 0]))
    assert np.isnan(row.score_matched)  # no model was trained at degree 4
    alone = frame.loc[("tocom", "digits", "12", 4)]
    assert alone.p_images == pytest.approx(stats.sign_flip_test(differences[0]))
    assert np.isnan(alone.p_tasks)


def test_correction_is_within_each_family_of_a_table(study):
    frame = pd.read_csv(study / "significance.csv")
    families = frame.groupby(["before", "after", "group"])
    assert len(families) == 4
    for _, family in families:
        expected = multipletests(family.p_images, method="holm")[1]
        assert family.p_images_holm.to_numpy() == pytest.approx(expected)


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
    assert at.gain.to_list() == pytest.approx([6.0] * 5)
    # Models with all seeds are compared as before; they close no gap to matched models that are missing.
    raw = ["scope", "infer_degree", "n_seeds", "score_before", "gain", "low", "high", "p_images", "p_seeds"]
    rest, same = (f.loc[f.train_degree == "12", raw].reset_index(drop=True) for f in (frame, whole))
    pd.testing.assert_frame_equal(rest, same)
    closed = frame[(frame.train_degree == "12") & (frame.infer_degree == 0)].set_index("scope").gap_closed
    assert closed.isna().to_dict() == {"all tasks": True} | dict.fromkeys(expected, False)


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
    analyse("compare", copied, "-o", copied / "significance.csv")
    assert (copied / "cells.csv").read_bytes() == (study / "cells.csv").read_bytes()
    new, old = (pd.read_csv(root / "significance.csv") for root in (copied, study))
    pd.testing.assert_frame_equal(new, old, check_dtype=False)
    some = [path for path in (copied / "predictions").rglob("*.safetensors") if "digits" in path.parts]
    assert "45 of 135" in analyse("cells", copied, *some, "-o", copied / "cells.csv").output
    assert analyse("concat", copied / "cells.csv", copied / "cells.csv", "-o", copied / "all.csv").exit_code == 0
    assert len(pd.read_csv(copied / "all.csv")) == 90
    shutil.rmtree(copied / "predictions")
    with pytest.raises(TocomError, match="no predictions of this study"):
        analyse("compare", copied, "-o", copied / "significance.csv")


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
    assert gain.what == "gain of ToMe + ToCom over ToMe (real tasks, trained at 0, run at 12)"
    assert gain.measured.startswith("+6.00")
    assert closed.measured.startswith("50 %")
    # 0 -> 4 costs nothing and ToCom changes nothing; 12 -> 4 costs a point.
    assert "3 conditions" in cost.what
    assert all(figure.reached for figure in (gain, p, closed, cost, folding))
    assert analyse("headline", copied).exit_code == 0
    cells = read_cells(copied / "cells.csv")
    hit = (cells.method == "tocom") & (cells.infer_degree == 4)
    cells.assign(score=cells.score - 0.02 * hit).to_csv(copied / "cells.csv", index=False)
    speed = pd.read_csv(copied / "throughput.csv")
    speed.assign(ratio=speed.ratio * 1.05).to_csv(copied / "throughput.csv", index=False)
    assert [figure.reached for figure in headline(copied)] == [True, True, True, False, False]
    with pytest.raises(TocomError, match="a figure was missed"):
        analyse("headline", copied)
    made_up.change(copied, compare=[])
    with pytest.raises(TocomError, match="two methods to compare"):
        headline(copied)


def test_headline_says_what_is_missing(copied):
    for name, message in (("throughput", "lacks throughput.csv;"), ("cells", "lacks cells.csv and throughput.csv;")):
        (copied / f"{name}.csv").unlink()
        with pytest.raises(TocomError, match=message):
            headline(copied)
