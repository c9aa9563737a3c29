"""From cells to tables, figures, verdicts and headline figures, on made-up predictions with known answers."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.analysis import made_up
from tests.analysis.made_up import N
from tocom.analysis import headline, significance, tables, verify
from tocom.analysis.cells import correctness, gather, main_compensator, prediction_files, read_cells
from tocom.analysis.report import make_tables, write_figures, write_tables
from tocom.analysis.split import available_cores, split
from tocom.cli import app
from tocom.errors import TocomError
from tocom.timing import MARK

TASKS = {"digits": "real tasks", "mnist5k": "real tasks", "rotation": "generated tasks"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    made_up.make(root, TASKS)
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


@pytest.fixture(scope="module")
def drawn(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    write_figures(study, folder)
    return folder


def test_figures_are_the_same_bytes_twice(study, drawn, tmp_path):
    write_figures(study, tmp_path)
    made = sorted(path.name for path in drawn.iterdir())
    assert made == sorted(
        f"{name}.{kind}" for name in ("accuracy_vs_gflops", "gain_heatmap", "gap_transfer") for kind in ("pdf", "png")
    )
    for name in made:
        assert (drawn / name).read_bytes() == (tmp_path / name).read_bytes()


VARIANTS = made_up.VARIANTS


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablation")
    made_up.make(root, TASKS, variants=VARIANTS)
    return root


def test_each_variant_is_compared_and_corrected_as_if_it_were_alone(study, ablation):
    frame = pd.read_csv(ablation / "significance.csv")
    assert list(frame.compensator.unique()) == list(VARIANTS)
    alone = pd.read_csv(study / "significance.csv")
    pd.testing.assert_frame_equal(frame[frame.compensator == "tocom"].reset_index(drop=True), alone)
    at = frame[(frame.train_degree == 0) & (frame.infer_degree == 12) & (frame.scope == "real tasks")]
    gains = at[at.comparison == significance.TOCOM_VS_PLAIN].set_index("compensator").gain
    assert gains.to_dict() == pytest.approx({"tocom": 6.0, "rank1": 3.0})
    rivals = at[at.comparison == significance.RANDOM_VS_TOCOM].set_index("compensator").gain
    assert rivals.to_dict() == pytest.approx({"tocom": 4.0, "rank1": 7.0})


def test_cells_name_the_variant_and_the_first_is_the_main_one(ablation):
    cells = read_cells(ablation / "cells.csv")
    assert len(cells) == len(TASKS) * 3 * (2 * 3 * 3 + 3)
    assert (cells.compensated == (cells.compensator != "none")).all()
    assert main_compensator(cells) == "tocom"
    assert main_compensator(cells, "rank1") == "rank1"
    with pytest.raises(TocomError, match="no compensator 'rank2' was evaluated .did you mean 'rank1'"):
        main_compensator(cells, "rank2")


def test_main_tables_and_figures_show_one_variant(study, ablation, drawn, tmp_path):
    assert make_tables(ablation) == make_tables(study)
    write_figures(ablation, tmp_path)
    for path in sorted(drawn.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    tests, other = make_tables(ablation)["main"][0], make_tables(ablation, "rank1")["main"][0]
    assert "+6.0" in tests.markdown()
    assert "+6.0" not in other.markdown()
    assert "+3.0" in other.markdown()


def test_files_of_before_there_were_variants_are_read_as_before(study, tmp_path):
    old = gather("made_up", made_up.predictions(tmp_path / "p", [("vit", "tome")], TASKS, {"tocom": 1.0}, old=True))
    new = read_cells(study / "cells.csv")
    assert [row["compensator"] for row in old] == new.compensator.tolist()
    for name in ("cells", "significance", "throughput", "transfer"):
        frame = pd.read_csv(study / f"{name}.csv", keep_default_na=False)
        frame.drop(columns="compensator", errors="ignore").to_csv(tmp_path / f"{name}.csv", index=False)
    before = read_cells(tmp_path / "cells.csv")
    assert list(before.columns) == list(new.columns)
    pd.testing.assert_frame_equal(before, new)
    assert make_tables(tmp_path) == make_tables(study)
    reference = pd.read_csv(tmp_path / "cells.csv", dtype={"train_degree": str})
    assert verify.compare(new, reference, 5, 1, 1).identical


def test_verify_names_the_variant_whose_gain_differs(ablation):
    cells = read_cells(ablation / "cells.csv")
    hit = (cells.compensator == "rank1") & (cells.infer_degree == 12) & (cells.train_degree == "0")
    verdict = verify.compare(cells.assign(accuracy=cells.accuracy + 0.03 * hit), cells, 5, 5, 1)
    assert verdict.worst_gain == pytest.approx(3.0)
    assert len(verdict.problems) == 1
    assert "rank1" in verdict.problems[0]


def names(groups):
    return [(scope.name, len(scope.tasks)) for scope in significance.group_scopes(groups)]


def test_groups_keep_their_order_and_none_appears_twice():
    natural, special, structured = (f"VTAB-1k {part}" for part in ("natural", "specialised", "structured"))
    vtab = {"caltech": natural, "dtd": natural, "eurosat": special, "clevr": structured}
    parts = [(natural, 2), (special, 1), (structured, 1)]
    assert names(vtab) == [*parts, ("VTAB-1k", 4)]
    assert names({"cifar100": "CIFAR-100", **vtab}) == [("CIFAR-100", 1), *parts, ("VTAB-1k", 4), ("all tasks", 5)]
    assert names({"a": "FGVC", "b": "FGVC"}) == [("FGVC", 2)]
    assert names({"caltech": natural, "cub": "FGVC"}) == [(natural, 1), ("FGVC", 1), ("all tasks", 2)]
    assert [s.name for s in significance.scopes({"cifar100": "CIFAR-100"})] == ["CIFAR-100"]
    assert [s.is_group for s in significance.scopes({"a": "FGVC", "b": "FGVC"})] == [True, False, False]


def test_a_group_and_a_task_of_one_name_are_told_apart(tmp_path):
    groups = {"birds": "birds", "gulls": "birds"}
    made_up.make(tmp_path, groups)
    made = make_tables(tmp_path, groups=groups)
    assert [table.title for table in made["main"]] == ["Birds (vit, ToMe)"]
    assert [table.title for table in made["tasks"]] == ["Birds (vit, ToMe)", "Gulls (vit, ToMe)"]
    tests = pd.read_csv(tmp_path / "significance.csv")
    tests = tests[(tests.comparison == significance.TOCOM_VS_PLAIN) & (tests.scope == "birds")]
    tests = tests[(tests.train_degree == 0) & (tests.infer_degree == 12)].set_index("group")
    for kind, is_group in (("main", True), ("tasks", False)):
        assert made[kind][0].rows[2][-1].text == tables.gain_text(tests.loc[is_group])
    assert made["main"][0].rows[2][-1] != made["tasks"][0].rows[2][-1]


def test_the_table_of_a_study_with_one_task_is_the_main_one(tmp_path):
    made_up.make(tmp_path, {"cifar": "CIFAR-100"})
    write_tables(tmp_path, tmp_path / "tables", groups={"cifar": "CIFAR-100"})
    assert (tmp_path / "tables" / "main.md").read_text().count("### CIFAR-100 (vit, ToMe)") == 1
    assert "its table is the main one" in (tmp_path / "tables" / "tasks.md").read_text()
    write_figures(tmp_path, tmp_path / "figures", groups={"cifar": "CIFAR-100"})


def test_a_condition_that_one_task_lacks_is_not_compared_for_its_group(study, tmp_path):
    files = made_up.predictions(tmp_path, [("vit", "tome")], TASKS, {"tocom": 1.0})
    correct = correctness(files)
    del correct["vit", "tome", "digits", "0", 12, "tocom"]
    frame = significance.compare(correct, TASKS, resamples=50)
    at = frame[(frame.train_degree == "0") & (frame.infer_degree == 12)]
    assert set(at.scope) == {"generated tasks", "mnist5k", "rotation"}
    with pytest.raises(TocomError, match="nothing to compare"):
        significance.compare({key: value for key, value in correct.items() if key[5] == "none"}, TASKS)


def test_a_comparison_takes_the_seeds_that_all_its_tasks_have(tmp_path):
    files = made_up.predictions(tmp_path, [("vit", "tome")], TASKS, {"tocom": 1.0})
    correct = correctness(files)
    whole = significance.compare(correct, TASKS, resamples=50)
    left = {"digits": {0, 1}, "mnist5k": {1, 2}, "rotation": {0}}
    for (_, _, task, train, _, _), runs in correct.items():
        for seed in set(runs) - left[task] if train == "0" else ():
            del runs[seed]
    frame = significance.compare(correct, TASKS, resamples=50)
    frame, whole = (f[f.comparison == significance.TOCOM_VS_PLAIN] for f in (frame, whole))
    at = frame[(frame.train_degree == "0") & (frame.infer_degree == 12)].set_index("scope")
    # No seed is common to all tasks: that scope is left out.
    expected = {"real tasks": 1, "generated tasks": 1, "digits": 2, "mnist5k": 2, "rotation": 1}
    assert at.n_seeds.to_dict() == expected
    assert at.gain.to_list() == pytest.approx([6.0] * 5)
    assert at.gap_closed.to_list() == pytest.approx([0.5] * 5)
    # Models with all seeds are compared as before; they close no gap to matched models that are missing.
    raw = ["scope", "infer_degree", "n_seeds", "accuracy_before", "gain", "low", "high", "p_images", "p_seeds"]
    rest, same = (f.loc[f.train_degree == "12", raw].reset_index(drop=True) for f in (frame, whole))
    pd.testing.assert_frame_equal(rest, same)
    closed = frame[(frame.train_degree == "12") & (frame.infer_degree == 0)].set_index("scope").gap_closed
    assert closed.isna().to_dict() == {"all tasks": True} | dict.fromkeys(expected, False)


def test_a_study_that_was_run_in_part_has_all_its_tables(tmp_path):
    tasks = {"cub200": "FGVC", "dogs": "FGVC"}
    files = made_up.predictions(tmp_path / "predictions", [("vit", "tome")], tasks, {"tocom": 1.0})
    missing = ("dogs/train-12", "dogs/train-0_seed-2", "cub200/train-random", "dogs/train-random")
    gone = [path for _, path in files if any(name in str(path) for name in missing)]
    for path in gone:
        path.unlink()
    grid = {"backbone": ["vit"], "compressor": ["tome"], "task": tasks, "train-degree": [0, 12, "random"]}
    grid = [f"--{name}={value}" for name, values in (grid | {"seed": made_up.SEEDS}).items() for value in values]
    config = {
        **{"study": "made_up", "paper": "degrees", "backbones": [{"name": "vit", "checkpoint": "glyph_vit"}]},
        **{"tasks": list(tasks), "seeds": made_up.SEEDS, "train_degrees": [0, 12, "random"], "max_degree": 12},
        "infer_degrees": made_up.DEGREES,
    }

    def analyse(*words):
        return CliRunner().invoke(app, ["analyse", *map(str, words)], catch_exceptions=False)

    cells = ["cells", tmp_path / "predictions", "-o", tmp_path / "cells.csv", "--study", "made_up", *grid]
    with pytest.raises(TocomError, match="no such file"):
        analyse(*cells)
    assert not (tmp_path / "cells.csv").exists()
    assert "8 of 18 prediction files are there" in analyse(*cells, "--partial").output
    significant = tmp_path / "significance.csv"
    analyse("significance", tmp_path / "cells.csv", "--predictions", tmp_path / "predictions", "-o", significant)
    analyse("tables", tmp_path, "-o", tmp_path / "tables")
    result = analyse("paper-table", tmp_path, "--config", json.dumps(config), "-o", tmp_path / "tables")
    assert result.exit_code == 0

    for name in ("main", "paper"):
        lines = [line.split("|") for line in (tmp_path / "tables" / f"{name}.md").read_text().splitlines()]
        found = {line[1].strip(): [cell.strip(" *") for cell in line[3:6]] for line in lines if len(line) == 7}
        assert found["0"] == [f"{plain} ± 0.0 (2 of 3 seeds)" for plain in ("96.0", "96.0", "80.0")]
        assert found["12"] == ["not run"] * 3
        assert found.get("random", ["not run"] * 3) == ["not run"] * 3
        assert ("random" in found) == (name == "paper")  # only the config knows of it
    assert "not run" in (tmp_path / "tables" / "throughput.md").read_text()
    tests = pd.read_csv(significant)
    tests = tests[tests.infer_degree + tests.train_degree == 12].set_index(["scope", "train_degree"])
    assert tests.n_seeds.to_dict() == {("FGVC", 0): 2, ("cub200", 0): 3, ("cub200", 12): 3, ("dogs", 0): 2}
    assert tests.gain.to_dict() == pytest.approx({key: 6.0 if key[1] == 0 else 2.0 for key in tests.index})

    shutil.rmtree(tmp_path / "predictions")
    with pytest.raises(TocomError, match="no predictions of this grid"):
        analyse(*cells, "--partial")


def test_a_model_without_any_comparison_has_a_table_of_tests_that_says_so(study):
    empty = tables.significance_table(pd.read_csv(study / "significance.csv").iloc[:0])
    assert "not run" in empty.markdown()
    assert "not run" in empty.latex()


def test_throughput_shows_training_where_it_was_measured(study):
    plain = pd.read_csv(study / "throughput.csv")
    assert "training" not in tables.throughput_table(plain).markdown().lower()
    measured = plain.assign(train_images_per_second=321.4, train_speedup=[1.25, None] * 3)
    text = tables.throughput_table(measured).markdown()
    assert "training images/s" in text
    assert "321" in text
    assert "1.25×" in text
    assert text.splitlines()[5].rstrip(" |").endswith("–")
    assert "not run" in tables.throughput_table(plain.iloc[:0]).markdown()


def test_html_tables_escape_what_html_minds():
    table = tables.Table("a < b", "p < 0.05 & more", ["x", "y"], [[tables.Text("< 1"), tables.Text("2", True)]], "l")
    assert "<td>&lt; 1</td>" in table.html().replace(" </td>", "</td>")
    assert "<b>2</b>" in table.html()
    assert "p &lt; 0.05 &amp; more" in table.html()


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
