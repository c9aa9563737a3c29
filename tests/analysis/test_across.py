"""Methods side by side: every printed number is the one that a loop over cells.csv finds."""

from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from tests.analysis import made_up
from tests.analysis.made_up import ABLATED, DEMO, SEVERAL, TASKS, TOCOM, TOME, config, significance_of
from tocom.analysis import across, figures, stats
from tocom.analysis.across import Entry, alike, critical_difference, improvement, iqm, profile, ranked, resampled
from tocom.analysis.report import make_tables
from tocom.analysis.run import Run

#: Demsar 2006, table 5 (a): critical values of Nemenyi's test at 0.05, by the number of methods.
NEMENYI = dict(enumerate((1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), 2))
RNG = np.random.default_rng(0)
PLAIN, ADDED, DRAWN, MATCHED = (
    Entry("tome", "0", 12),
    Entry("tocom", "0", 12),
    Entry("random_degree", "random", 12),
    Entry("tome", "12", 12, True),
)


def noisy(study):
    """Return the maker of arrays of a study in which every training of every task comes out otherwise."""
    labels = np.arange(made_up.N) % 5

    def arrays_of(task, points):
        found = []
        for method, train, infer, seed in points:
            rng = np.random.default_rng([sum(map(ord, task + method + train)), seed])
            right = rng.random(made_up.N) < made_up.share(study, method, train, infer, seed) + rng.normal(0, 0.02)
            found.append(np.where(right, labels, labels + 1))
        return {"predictions": np.stack(found).astype(np.int16), "labels": labels}

    return arrays_of


def made(root, config, keep=lambda **where: True):
    study = made_up.change(made_up.plan(root, config))
    return Run.read(made_up.make(root, config, noisy(study), keep))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return made(tmp_path_factory.mktemp("demo"), config())


def by_hand(run, entry, tasks=TASKS):
    """Return task -> scores in percent, by seed, from the rows of cells.csv."""
    rows = pd.read_csv(run.folder / "cells.csv", dtype={"train_degree": str}).itertuples()
    mine = [r for r in rows if (r.method, r.train_degree, r.infer_degree) == entry[:3]]
    return {
        task: [100 * r.correct / r.n for r in sorted(mine, key=lambda r: r.seed) if r.task == task] for task in tasks
    }


def texts(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (3, 4), (5, 19)])
def test_the_interquartile_mean_leaves_a_quarter_of_the_runs_out_at_either_end(shape):
    scores = RNG.normal(size=shape)
    runs, n = sorted(scores.ravel()), scores.size // 4
    assert iqm(scores) == pytest.approx(sum(runs[n : len(runs) - n]) / (len(runs) - 2 * n))
    assert iqm(np.stack([scores, 2 * scores])) == pytest.approx([iqm(scores), 2 * iqm(scores)])


def test_seeds_are_drawn_within_each_task_by_itself():
    scores = np.array([[1.0, 10.0], [2.0, 40.0]])
    draws = resampled(scores, 20_000)
    seen, counts = np.unique(draws.reshape(-1, 4), axis=0, return_counts=True)
    every = list(product((1, 2), (10, 40), (1, 2), (10, 40)))
    assert seen.tolist() == [list(map(float, one)) for one in every]
    assert np.abs(counts / 20_000 - 1 / 16).max() < 0.01
    assert np.array_equal(draws, resampled(scores, 20_000))
    exact = [sorted(a + b + c + d for a, b, c, d in every)[i] / 4 for i in (0, -1)]
    assert across.percentiles(draws.mean(axis=(1, 2))).tolist() == exact


def test_the_interval_is_that_of_scipys_bootstrap():
    scores = RNG.normal(size=(12, 1))
    theirs = distributions.bootstrap(
        (scores[:, 0],), lambda x, axis: distributions.trim_mean(x, 0.25, axis=axis), method="percentile", rng=1
    ).confidence_interval
    assert across.percentiles(iqm(resampled(scores, 9_999))) == pytest.approx(theirs, abs=0.03)


def test_a_profile_is_the_share_of_runs_above_a_threshold():
    scores, thresholds = RNG.integers(0, 5, size=(3, 4)).astype(float), np.arange(-1, 6)
    assert profile(scores, thresholds).tolist() == [sum(s > t for s in scores.ravel()) / 12 for t in thresholds]
    assert profile(np.stack([scores, -scores]), thresholds).shape == (2, 7)


def test_the_probability_of_improvement_is_that_of_all_pairs_of_runs_of_a_task():
    x, y = RNG.integers(0, 4, size=(3, 5)), RNG.integers(0, 4, size=(2, 5))
    won = [(a > b) + (a == b) / 2 for task in range(5) for a in x[:, task] for b in y[:, task]]
    assert improvement(x, y) == pytest.approx(sum(won) / len(won))
    u = distributions.mannwhitneyu(x, y, axis=0).statistic
    assert improvement(x, y) == pytest.approx((u / 6).mean())
    assert improvement(x, y) + improvement(y, x) == pytest.approx(1)
    assert np.isnan(improvement(x, y[:0]))


def test_ranks_and_their_test_are_those_of_demsar():
    scores = RNG.normal(size=(4, 14))
    found = ranked(list(scores))
    ranks = [[1 + sum(other > one for other in task) for one in task] for task in scores.T]
    means = np.mean(ranks, axis=0)
    assert found.means == pytest.approx(means)
    statistic = 12 * 14 / (4 * 5) * ((means**2).sum() - 4 * 25 / 4)
    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx(distributions.chi2.sf(statistic, 3))
    assert found.critical == pytest.approx(1.25, abs=0.005)  # his example
    tied = ranked([np.array([1.0, 1.0]), np.array([1.0, 2.0 + 1e-12]), np.array([0.0, 2.0])])
    assert tied.means.tolist() == [(1.5 + 3) / 2, (1.5 + 1.5) / 2, (3 + 1.5) / 2]
    assert ranked(list(scores[:2])) is ranked(list(scores[:, :1])) is ranked([]) is None


@pytest.mark.filterwarnings("error")
def test_methods_that_are_all_equal_have_no_p_value():
    assert np.isnan(ranked([np.ones(4)] * 3).p)


@pytest.mark.parametrize("k", NEMENYI)
def test_critical_differences_are_those_of_the_table(k):
    assert critical_difference(k, 6) == pytest.approx(NEMENYI[k] * (k * (k + 1) / 36) ** 0.5, abs=0.0006 * k)


@pytest.mark.parametrize("seed", range(20))
def test_bars_join_the_largest_groups_that_cannot_be_told_apart(seed):
    means, critical = np.random.default_rng(seed).choice(np.arange(1, 6, 0.25), 6), 1.1
    sets = [set(s) for n in range(2, 7) for s in combinations(sorted(set(means)), n) if max(s) - min(s) < critical]
    largest = [one for one in sets if not any(one < other for other in sets)]
    apart = np.abs(means[:, None] - means) >= critical
    assert alike(means, apart) == sorted((min(one), max(one)) for one in largest)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_tells_them_apart_bars_join_neighbours_that_all_tests_leave_together(seed):
    rng = np.random.default_rng(seed)
    means, k = rng.permutation(np.arange(1.0, 8.0)), 7
    apart = np.triu(rng.random((k, k)) < 0.3, 1)
    apart |= apart.T
    by_rank = means.argsort()
    rows = [by_rank[i:j] for i in range(k) for j in range(i + 2, k + 1)]
    together = [row for row in rows if not apart[np.ix_(row, row)].any()]
    largest = [r for r in together if not any(set(r) < set(other) for other in together)]
    assert alike(means, apart) == sorted((means[row[0]], means[row[-1]]) for row in largest)


# --- which entries ----------------------------------------------------------------------------------------------------


def test_entries_are_at_the_degrees_of_the_endpoint(demo):
    study = demo.study
    assert across.entries(study) == [PLAIN, ADDED, DRAWN, MATCHED]
    other = made_up.change(demo.folder, endpoint={"train_degree": 12, "infer_degree": 0})
    made_up.change(demo.folder, endpoint={})
    assert across.entries(other) == [
        *(Entry("tome", "12", 0), Entry("tocom", "12", 0), Entry("random_degree", "random", 0)),
        Entry("tome", "0", 0, True),
    ]


def test_without_pairs_they_are_the_lowest_and_the_highest_of_the_first_method(tmp_path):
    methods = TOME | {"lone": {"compressor": "evit", "train_degrees": [4], "infer_degrees": [4, 12]}}
    study = made_up.change(made_up.plan(tmp_path, config(methods=methods, compare=[])))
    assert across.entries(study) == [PLAIN, MATCHED]  # lone was not trained at 0
    study = made_up.change(tmp_path, methods=dict(reversed(methods.items())))
    assert across.entries(study) == [Entry("lone", "4", 12), MATCHED]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_all_methods_are_those_of_a_loop(demo):
    (table,) = make_tables(demo)["methods"]
    found = texts(table)
    runs = {name: by_hand(demo, entry) for name, entry in zip(found, (PLAIN, ADDED, DRAWN, MATCHED), strict=True)}
    assert list(found) == ["ToMe", "ToMe + ToCom", "ToMe, random degrees", "ToMe, matched"]
    assert [row[0] for row in found.values()] == ["0 → 12", "0 → 12", "random → 12", "12 → 12"]
    rivals = [np.mean(list(of.values()), axis=1) for of in list(runs.values())[:3]]  # [tasks] each
    ranks = [np.mean([1 + sum(o[t] > one[t] for o in rivals) for t in range(3)]) for one in rivals]
    for number, (name, (_, mean, median, middle, rank, above)) in enumerate(found.items()):
        scores = np.array(list(runs[name].values())).T
        assert mean == f"{scores.mean():.1f} ± {scores.mean(axis=1).std(ddof=1):.1f}"
        assert median == f"{sorted(scores.mean(axis=0))[1]:.1f}"
        low, high = np.percentile([iqm(draw) for draw in resampled(scores, 300)], [2.5, 97.5])
        assert middle == f"{np.mean(sorted(scores.ravel())[2:-2]):.1f} [{low:.1f}, {high:.1f}]"
        assert rank == (f"{ranks[number]:.2f}" if number < 3 else "–")
        over = zip(runs[name].values(), runs["ToMe"].values(), strict=True)
        won = [(a > b) + (a == b) / 2 for x, y in over for a, b in product(x, y)]
        assert above == (f"{np.mean(won):.2f}" if number else "–")
    p = distributions.friedmanchisquare(*rivals).pvalue
    differs = NEMENYI[3] * (12 / 18) ** 0.5
    assert f"Friedman's test of 3 methods on 3 tasks: p = {p:.4f}. With 3 tasks, two methods" in table.caption
    assert f"which are at most 2 apart, differ by {differs:.2f}." in table.caption
    assert "what a learned part does to all tasks alike is not in it" in table.caption


def test_what_was_not_run_says_so_and_takes_no_part_in_ranks(tmp_path):
    def keep(method, task, seed, **_):
        return method != "random_degree" and (method != "tocom" or task != "digits" or seed)

    run = made(tmp_path, config(), keep)
    (table,) = make_tables(run)["methods"]
    found = texts(table)
    assert found["ToMe, random degrees"][1:] == ["not run"] * 5
    assert found["ToMe + ToCom"][1].endswith(" (2 of 3 seeds)")
    assert [row[4] for row in found.values()] == ["–", "–", "not run", "–"]
    assert table.caption.endswith("No ranks: they take 3 methods and 2 tasks that were run.")
    whole = {task: scores[-2:] for task, scores in by_hand(run, ADDED).items()}
    assert found["ToMe + ToCom"][3].split()[0] == f"{iqm(np.array(list(whole.values()))):.1f}"


def test_too_many_for_too_few_tasks_cannot_be_told_apart(tmp_path):
    (table,) = make_tables(Run.read(made_up.make(tmp_path, ABLATED)))["methods"]
    assert "on 2 tasks: p = 0.1353" in table.caption
    assert table.caption.endswith(
        "differ by 2.34, so none can be; the figure of ranks takes the tests of pairwise.csv instead."
    )


def test_one_seed_has_no_intervals(tmp_path):
    run = made(tmp_path, config(seeds=[0]))
    methods, variance = (make_tables(run)[name][0] for name in ("methods", "variance"))
    assert not any("[" in row[3] for row in texts(methods).values())
    assert "none with one seed" in methods.caption
    assert {row[-2].text for row in variance.rows} == {"–"}


@pytest.mark.parametrize("config", [SEVERAL, config(methods=TOME, compare=[])], ids=["pairs", "none"])
def test_a_study_that_was_never_run_has_both_tables(config, tmp_path):
    run = Run.read(made_up.plan(tmp_path, config))
    for name in ("methods", "variance"):
        assert {cell.text for table in make_tables(run)[name] for row in table.rows for cell in row[2:]} == {"not run"}
    assert not figures.methods_compared(run, run.backbones[0])


def test_the_sources_of_errors_are_those_of_significance_csv(demo):
    (table,) = make_tables(demo)["variance"]
    tests = significance_of(demo.folder)
    pairs, groups = (("tome", "tocom"), ("tocom", "random_degree")), ("real tasks", "generated tasks", "all tasks")
    entered = {"tome": PLAIN, "tocom": ADDED, "random_degree": DRAWN}
    members = dict(zip(groups, (TASKS[:2], TASKS[2:], TASKS), strict=True))
    for (pair, group), row in zip(product(pairs, groups), table.rows, strict=True):
        test = tests.loc[(*pair, group, "0", 12)]
        name, where, gain, error, *others = [cell.text for cell in row]
        assert (name.split(" over ")[1], where) == (demo.title(pair[0]), f"{group}, 0 → 12")
        assert (gain, error) == (f"{test.gain:+.1f}", f"{test.error:.2f}")
        spreads = [test[f"sd_{source}"] for source in ("image", "seed", "compensator", "rest", "task")]
        written = ["–" if np.isnan(value) else f"{value:.2f}" for value in [*spreads, test.effect]]
        assert others[:6] == written
        before, after = (by_hand(demo, entered[method], members[group]) for method in pair)
        won = [(a > b) + (a == b) / 2 for t in members[group] for a, b in product(after[t], before[t])]
        assert others[-1] == f"{np.mean(won):.2f}"
        # A compensator takes part in all pairs: its spread is shared by all tasks, also where it was estimated as 0.
        n = len(members[group])
        own = (test.sd_seed**2 + test.sd_rest**2 / made_up.N) / n + np.nan_to_num(test.sd_compensator) ** 2
        images = test.sd_image**2 / n / made_up.N
        contrast = stats.Contrast(0.0, (stats.Part(own / 3, 2),), stats.Part(images, n * (made_up.N - 1)))
        gains = np.array([float(others[-2]) - 0.006, float(others[-2]) + 0.006])
        low, high = (stats.power(gain, contrast) for gain in gains)
        assert low <= 0.8 <= high


def test_a_pair_that_is_not_compared_at_the_endpoint_has_no_numbers(tmp_path):
    methods = DEMO | {"late": {"like": "tome", "train_degrees": [12], "compressor": "evit"}}
    methods |= {"later": {"like": "late", "compensator": "tocom"}}
    pairs = [["tome", "tocom"], ["late", "later"]]
    run = Run.read(made_up.plan(tmp_path, config(("digits",), methods, compare=pairs)))
    first, second = make_tables(run)["variance"][0].rows
    assert {cell.text for cell in first[2:]} == {"not run"}
    assert {cell.text for cell in second[2:]} == {"–"}
    assert second[1].text == "real tasks"


def test_images_are_shared_among_tasks_as_they_are_counted():
    cells = pd.DataFrame({"task": ["a", "b", "a", "c"], "n": [30, 10, 30, 7]})
    run, scope = SimpleNamespace(cells=cells), SimpleNamespace(tasks=("a", "b"))
    assert across.images_of(run, scope, 40).tolist() == [30, 10]
    assert across.images_of(run, scope, 8).tolist() == [6, 2]


def test_what_is_detectable_takes_shared_parts_and_seeds_into_account():
    spreads, images = stats.Spreads(0.0, 1.0, 0.0, 0.0, 0.0), [100.0] * 4
    learned, plain = (SimpleNamespace(learns=lambda method, one=one: one) for one in (True, False))
    pair = ("a", "b")

    def power(gain, df):  # of a t-test
        critical, away = distributions.t.isf(0.025, df), gain / (1 / 12**0.5)
        return distributions.nct.sf(critical, df, away) + distributions.nct.cdf(-critical, df, away)

    assert power(across.detectable(learned, pair, spreads, 3, images), 2) == pytest.approx(0.8, abs=1e-3)
    assert power(across.detectable(plain, pair, spreads, 3, images), 8) == pytest.approx(0.8, abs=1e-3)
    ignored = spreads._replace(compensator=5.0)
    assert across.detectable(plain, pair, ignored, 3, images) == across.detectable(plain, pair, spreads, 3, images)
    assert np.isnan(across.detectable(learned, pair, spreads, 1, images))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_profiles_are_shares_of_runs(demo):
    (axis,) = figures.methods_compared(demo, "vit")["profiles"].axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["ToMe, matched"].get_linestyle() == "--"
    for name, entry in {"ToMe": PLAIN, "ToMe + ToCom": ADDED, "ToMe, matched": MATCHED}.items():
        runs = sum(by_hand(demo, entry).values(), [])
        x, y = lines[name].get_data()
        assert y == pytest.approx([100 * sum(run > t + 1e-9 for run in runs) / 9 for t in x])
        assert (y[0], y[-1], lines[name].get_drawstyle()) == (100, 0, "steps-post")
    assert len(axis.collections) == 3  # a band each, and none of the ceiling


def test_the_diagram_of_ranks_names_every_method_and_the_critical_difference(demo, tmp_path):
    (axis,) = figures.methods_compared(demo, "vit")["ranks"].axes
    said = " ".join(text.get_text() for text in axis.texts)
    (table,) = make_tables(demo)["methods"]
    for name, row in list(texts(table).items())[:3]:
        assert f" {name}  {row[4]} " in said or f" {row[4]}  {name} " in said
    assert "critical difference 1.91" in said
    assert "tests over trainings" not in said
    alone = Run.read(made_up.make(tmp_path, config(methods=TOME | TOCOM)))
    assert list(figures.methods_compared(alone, "vit")) == ["profiles"]


def test_where_tasks_are_too_few_the_diagram_takes_the_tests_of_every_pair(tmp_path):
    root = made_up.make(tmp_path, config(("digits", "mnist5k")))
    frame = pd.read_csv(root / "pairwise.csv")
    frame["p"] = [0.03, 0.001, 0.02]  # Holm: 0.04, 0.003, 0.04
    frame.to_csv(root / "pairwise.csv", index=False)

    def bars():
        (axis,) = figures.methods_compared(Run.read(root), "vit")["ranks"].axes
        assert any("tests over trainings and images" in text.get_text() for text in axis.texts)
        return [len(line.get_xdata()) for line in axis.lines if line.get_linewidth() == 4]

    assert bars() == []
    frame.loc[0, "p"] = 0.2  # tome and tocom, the last by rank and its neighbour
    frame.to_csv(root / "pairwise.csv", index=False)
    assert bars() == [2]


def test_many_methods_have_a_panel_of_profiles_for_each_plain_one(tmp_path):
    more = {f"rank{n}": {"like": "tocom", "compensator": {"rank": n}, "title": f"rank {n}"} for n in range(3, 9)}
    run = Run.read(made_up.make(tmp_path, config(("digits",), DEMO | more | made_up.EVIT)))
    axes = figures.methods_compared(run, "vit")["profiles"].axes
    names = [[text.get_text() for text in axis.get_legend().texts] for axis in axes]
    own = ["ToMe", "ToMe + ToCom", "ToMe, random degrees", *(f"rank {n}" for n in range(3, 9)), "ToMe, matched"]
    assert names == [own, ["EViT", "EViT + ToCom", "EViT, matched"]]
