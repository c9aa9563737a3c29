"""The simulation: its truth is what it says it is, and the rates that matter are within their bounds."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tocom.analysis import simulate
from tocom.analysis.scores import METRICS
from tocom.analysis.simulate import Case
from tocom.analysis.simulate import simulate as simulated
from tocom.cli_analyse import app

CONDITIONS = {"tome": ("0", 14), "tocom": ("0", 14), "matched": ("14", 14), "random_degree": ("random", 14)}


def scores(case, repeats, seed=0):
    """Return the score in percent by method, [repeats, tasks, seeds] each."""
    rng, found, study = np.random.default_rng(seed), {}, simulate.study_of(case)
    for _ in range(repeats):
        records = simulate.draw(case, rng)
        for name, (train, infer) in CONDITIONS.items():
            method = "tome" if name == "matched" else name
            if method in study.methods:
                by = [[*records["vit", method, task, train, infer].values()] for task in study.task_names]
                values = [METRICS[study.metric].values(np.stack(runs)).mean(axis=1) for runs in by]
                found.setdefault(name, []).append(values)
    return {name: np.array(values) for name, values in found.items()}


def near(values, expected, errors=4):
    """Return whether a mean over independent values [n] is near what is expected of it."""
    return abs(values.mean() - expected) < errors * values.std(ddof=1) / np.sqrt(len(values))


# --- the truth ----------------------------------------------------------------------------------------------


def test_scores_and_effects_are_those_that_were_put_in():
    case = Case("gain", "tocom", "random_degree", 3, 2, seed_sd=4, compensator_sd=3, gain=6)
    found = scores(case, 300)
    for name, expected in (("tome", 75), ("tocom", 75), ("matched", 85), ("random_degree", 81)):
        assert near(found[name].mean(axis=(1, 2)), expected), name
    gain = found["tocom"] - found["tome"]  # of the same models: a training's effect, and the compensator's
    of_images = simulate.true_spreads(case._replace(before="tome", after="tocom", gain=0))
    sampling = (of_images.image**2 + of_images.rest**2) / simulate.IMAGES
    assert np.sqrt(gain.var(axis=0).mean()) == pytest.approx(np.sqrt(4**2 + 3**2 + sampling), rel=0.06)
    shared = np.mean([np.cov(gain[:, 0, seed], gain[:, 1, seed])[0, 1] for seed in range(3)])
    assert shared == pytest.approx(3**2, rel=0.25)  # tasks have the compensator in common, and nothing else
    others = np.mean([np.cov(found["random_degree"][:, 0, s], found["random_degree"][:, 1, s])[0, 1] for s in range(3)])
    assert abs(others) < 3


@pytest.mark.parametrize("after", ["tocom", "random_degree"])
def test_spreads_are_those_of_the_images(after):
    case = Case("gain", "tome", after, seeds=2, gain=5)
    rng, same, other = np.random.default_rng(1), [], []
    for _ in range(60):
        records = simulate.draw(case, rng)
        train = "random" if after == "random_degree" else "0"
        first, second = (records["vit", "tome", "digits", "0", 14], records["vit", after, "digits", train, 14])
        gains = [100.0 * second[seed] - 100.0 * first[seed] for seed in (0, 1)]
        same.append(np.var(gains))
        other.append(np.cov(gains)[0, 1])
    spread = simulate.true_spreads(case)
    assert np.mean(other) == pytest.approx(spread.image**2, rel=0.1)
    assert np.mean(same) == pytest.approx(spread.image**2 + spread.rest**2, rel=0.05)
    assert 0.05 < np.mean(same) / 1e4 < 0.2  # most images do not change


def test_the_truth_of_miou_is_that_of_many_images(monkeypatch):
    monkeypatch.setattr(simulate, "SCENES", 1_000)
    case = Case("segment, gain", seeds=4, seed_sd=2, compensator_sd=2, gain=5)
    found = scores(case, 80)
    gain = (found["tocom"] - found["tome"]).mean(axis=(1, 2))
    assert near(gain, simulate.true_gain(case))
    assert gain.std() / np.sqrt(len(gain)) < 0.25 < 5 < simulate.true_gain(case)
    assert simulate.true_gain(case._replace(gain=0, compensator_sd=0)) == 0
    assert simulate.true_gain(case._replace(gain=0)) > 0.01  # no null: the mean of mIoU grows with its spread


def test_models_at_their_own_degree_are_the_same_with_a_compensator():
    records = simulate.draw(Case("family", seeds=2, tasks=3, seed_sd=1, compensator_sd=1), np.random.default_rng(2))
    for train, infer in (("0", 0), ("14", 14), ("0", 14)):
        both = [records["vit", method, "digits", train, infer][1] for method in ("tome", "tocom")]
        assert (both[0] == both[1]).all() == (train == str(infer))


# --- rates --------------------------------------------------------------------------------------------------


def test_rates_stay_within_their_bounds():
    cases = [
        Case("no gain", seeds=3, tasks=1, seed_sd=2.5, compensator_sd=2.5),
        Case("no gain", "tocom", "random_degree", seeds=3, tasks=2, seed_sd=1, compensator_sd=1),
        Case("no gain", seeds=5, tasks=1),
        Case("segment, no gain", seeds=3, seed_sd=1),
        Case("harm", seeds=3, tasks=2, gain=-0.3),
    ]
    frame = simulated(cases, 150)
    bounded = simulate.bounded(frame)
    assert {"p < 0.05", "p < 0.01", "interval holds", "gap's interval holds", "one-sided p < 0.05"} <= {*bounded.figure}
    assert len(bounded) == 3 * 4 + 3 + 2
    assert bounded.beyond.max() < 3.5, bounded[bounded.beyond >= 3.5]
    # what is tested against is not: tests that take the trainings as given, and fewer degrees of freedom
    of_trainings = frame[(frame.part == "no gain") & (frame.seed_sd == 2.5)].set_index("figure").value
    assert of_trainings["p (images) < 0.05"] > 0.15


def test_a_plan_keeps_its_promise():
    case = Case("gain", seeds=5, tasks=2, seed_sd=1, compensator_sd=1)
    case = case._replace(gain=simulate.stats.detectable(simulate.expected(case)))
    found = simulated([case], 1200).set_index("figure").value
    assert 0.68 < found["p < 0.05"] < 0.92


def test_a_study_without_gains_has_no_stars():
    assert simulated([Case("family", seeds=3, tasks=3, seed_sd=1, compensator_sd=1)], 60).value.max() <= 0.5


def test_a_star_is_seen():
    case = Case("family", seeds=3, tasks=3, gain=8)
    assert (simulate.family(case, np.random.default_rng(0))["star in any table of main"]) is True


def test_scales_are_left_at_0_the_less_often_the_more_is_asked():
    cases = [Case("scale", effects=effects) for effects in ((0, 0, 0), (0, -3, -5), (0, 3, 5))]
    frame = simulated(cases, 400).set_index(["effects", "figure"]).value
    asked = [f"wrong scale, {errors:g} SE, by score" for errors in simulate.STANDARD_ERRORS]
    assert np.all(np.diff(frame["+0, +0, +0"][asked]) <= 0)
    assert np.all(np.diff(frame["+0, +3, +5"][[one.replace("wrong scale", "gain") for one in asked]]) <= 0)
    assert frame["+0, -3, -5"]["gain, 1 SE, by score"] > -0.1
    assert frame["+0, +3, +5"]["gain, 1 SE, by score"] > 3


def test_the_figures_do_not_depend_on_the_number_of_processes():
    cases = [Case("no gain", seed_sd=1), Case("scale", effects=(0, 1, 2))]
    one = simulated(cases, 30, processes=1, seed=5)
    pd.testing.assert_frame_equal(one, simulated(cases, 30, processes=2, seed=5))
    assert not one.equals(simulated(cases, 30, seed=6))


def test_command(tmp_path, monkeypatch):
    cases = [Case("no gain", seed_sd=1), Case("gain", gain=4), Case("scale", effects=(0, 1, 2))]
    monkeypatch.setattr(simulate, "grid", lambda: cases)
    result = CliRunner().invoke(app, ["simulate", "-o", str(tmp_path), "--repeats", "8"])
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(tmp_path / "simulation.csv")
    assert {*frame.part} == {"no gain", "gain", "scale"}
    assert (frame.repeats[frame.part == "no gain"] <= 8).all()
    text = (tmp_path / "simulation.md").read_text()
    assert "Monte Carlo standard error" in text
    assert "nan" not in text
