"""Tables and figures of made-up studies: what was put in comes out, and what is missing is not run."""

import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from tests.analysis import made_up
from tests.analysis.made_up import ABLATED, EVIT, FGVC, SEVERAL, TOCOM, TOME, config, significance_of
from tocom.analysis import figures, tables
from tocom.analysis.cells import read_cells
from tocom.analysis.curves import convergence, curves
from tocom.analysis.overview import ASKS, overview
from tocom.analysis.paper import FORMS, paper_tables
from tocom.analysis.planned import group_scopes
from tocom.analysis.published import read_published
from tocom.analysis.report import make_tables, show, write_figures, write_paper, write_tables
from tocom.analysis.run import Run
from tocom.cli_analyse import app
from tocom.errors import TocomError
from tocom.files import save_arrays, write_rows
from tocom.study import Study, parse_study

TWO_TASKS = config(FGVC, paper="degrees")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of some studies that were run."""
    root = tmp_path_factory.mktemp("made")
    configs = {"demo": config(transfer=True), "fgvc": TWO_TASKS, "ablation": ABLATED, "several": SEVERAL}
    return {name: made_up.make(root / name, entry) for name, entry in configs.items()}


@pytest.fixture
def study(made, tmp_path):
    """A study of two tasks that a test may change."""
    return shutil.copytree(made["fgvc"], tmp_path / "study")


@pytest.fixture
def ablation(made, tmp_path):
    return shutil.copytree(made["ablation"], tmp_path / "ablation")


def cut(root, **where):
    """Take the cells with these values out of a study's cells.csv; return how many there were."""
    cells = read_cells(root / "cells.csv")
    out = np.logical_and.reduce([cells[name] == value for name, value in where.items()])
    cells[~out].to_csv(root / "cells.csv", index=False)
    return int(out.sum())


def paper(root, form, **changes):
    made_up.change(root, paper=form, transfer=form == "transfer", throughput={"training": True}, **changes)
    return paper_tables(Run.read(root))


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def row(table, *start):
    return next(r for r in texts(table) if tuple(r[: len(start)]) == start)


# --- the main table -------------------------------------------------------------------------------------------------


def test_the_main_table_has_a_line_a_method_and_a_line_a_gain(made):
    main = make_tables(Run.read(made["demo"]))["main"]
    assert [table.title for table in main] == ["Real tasks (vit)", "Generated tasks (vit)", "All tasks (vit)"]
    table = main[0]
    assert table.header[2:] == ["0 (0.02 GFLOPs)", "4 (0.016 GFLOPs)", "12 (0.008 GFLOPs)"]
    assert [r[:2] for r in texts(table)] == [
        *(["0", "ToMe"], ["", "ToMe + ToCom"], ["", "gain"], ["12", "ToMe"], ["", "ToMe + ToCom"], ["", "gain"]),
        *(["matched", "ToMe"], ["random", "ToMe, random degrees"]),
    ]
    assert texts(table)[0][2:] == ["96.0 ± 0.0", "96.0 ± 0.0", "80.0 ± 0.0"]
    assert texts(table)[6][2:] == ["96.0 ± 0.0", "not run", "92.0 ± 0.0"]
    test = significance_of(made["demo"]).loc[("tome", "tocom", "real tasks", "0", 12)]
    family = significance_of(made["demo"]).xs("real tasks", level="scope")
    stars = tables.stars(multipletests(family.p.dropna(), method="holm")[1][list(family.p.dropna()).index(test.p)])
    assert stars
    assert texts(table)[2][2:] == ["–", "declined", f"+6.0 [{test.low:+.1f}, {test.high:+.1f}]{stars}"]
    # The endpoint is of all tasks: not corrected, and marked.
    first = significance_of(made["demo"]).loc[("tome", "tocom", "all tasks", "0", 12)]
    assert texts(main[2])[2][4] == f"+6.0 [{first.low:+.1f}, {first.high:+.1f}]{tables.stars(first.p)}†"
    assert tables.DECLINED_NOTE in table.caption
    assert [[cell.bold for cell in r[2:]] for r in table.rows[:2]] == [[False] * 3, [False, False, True]]
    assert table.rules == (3, 6, 7)
    assert "Test accuracy in %" in table.caption
    assert "mean over digits, mnist5k" in table.caption


def test_compressors_stand_below_each_other_and_their_pairs_have_gains(tmp_path):
    methods, pairs = TOME | TOCOM | EVIT, [["tome", "tocom"], ["evit", "evit_tocom"], ["tome", "evit"]]
    root = made_up.make(tmp_path, config(("cifar100",), methods, compare=pairs))
    (table,) = make_tables(Run.read(root))["main"]
    lines = [(r[0], r[1]) for r in texts(table)]
    block = [("0", "EViT"), ("", "gain over ToMe"), ("", "EViT + ToCom"), ("", "gain"), ("12", "EViT")]
    assert lines[7:12] == block
    assert lines[6] == ("matched", "ToMe")
    assert texts(table)[8][2:] == ["+0.0 [+0.0, +0.0]"] * 3  # no compensator takes part: also at the train degree


def test_only_what_is_declined_everywhere_is_said_to_be(study):
    cells = read_cells(study / "cells.csv")
    at = (cells.method == "tocom") & (cells.infer_degree == 12)

    def gains():
        run = Run.read(study)
        (main,), (tests, _) = (make_tables(run)[name] for name in ("main", "significance"))
        largest = paper_tables(run)[1]
        # Those are other models, whatever is added to the first.
        assert row(tests, "ToMe, random degrees over ToMe + ToCom")[2].startswith("+4.0 [")
        return texts(main)[2][4], texts(tests)[0][2], row(largest, "FGVC")[2], tables.DECLINED_NOTE in tests.caption

    cells.assign(scale=cells.scale.where(~at, 0)).to_csv(study / "cells.csv", index=False)
    assert gains() == ("declined",) * 3 + (True,)
    one = at & (cells.task == "dogs") & (cells.seed == 2) & (cells.train_degree == "0")
    cells.assign(scale=cells.scale.where(~at | one, 0)).to_csv(study / "cells.csv", index=False)
    assert [gain[:6] for gain in gains()[:3]] == ["+6.0 ["] * 3


def test_methods_of_one_title_are_told_apart(tmp_path):
    root = made_up.plan(tmp_path, config(methods=TOME | {"a": {"like": "tome", "compensator": "tocom"}} | TOCOM))
    run = Run.read(root)
    assert [run.title(name) for name in ("tome", "a", "tocom")] == ["ToMe", "ToMe + ToCom (a)", "ToMe + ToCom (tocom)"]


def test_a_cell_that_was_cut_is_not_run_in_its_place_alone(study):
    before, _ = paper(study, "degrees")
    assert cut(study, train_degree="0", infer_degree=12, method="tome", task="dogs") == 3
    after, gains = paper(study, "degrees")
    changed = np.argwhere(np.array(texts(before)) != np.array(texts(after)))
    assert changed.tolist() == [[0, 4], [2, 4]]  # the plain accuracy, and the gain over it
    assert texts(after)[0][4] == texts(after)[2][4] == "not run"
    assert row(gains, "FGVC")[3:6] == ["12 → 0", "+1.0 ± 0.2", "12"]  # the largest of those that were run


def test_seeds_that_are_missing_are_counted_and_planned_degrees_that_no_cell_has_are_not_run(study):
    cut(study, train_degree="12", infer_degree=0, method="tome", seed=1)
    table = paper(study, "degrees", infer_degrees=[0, 4, 8, 12], train_degrees=[0, 8, 12])[0]
    assert row(table, "12")[2] == "90.0 ± 0.0 (2 of 3 seeds)"
    assert row(table, "8")[2:] == ["not run"] * 4
    assert row(table, "0")[4] == row(table, "random")[4] == "not run"
    assert row(table, "0")[5] == "80.0 ± 0.0"


def test_a_study_that_was_run_in_part_has_all_its_tables(tmp_path):
    def keep(task, train_degree, seed, **_):
        return (task, train_degree) in {("cub200", "0"), ("cub200", "12")} or (train_degree == "0" and seed < 2)

    root = made_up.make(tmp_path, TWO_TASKS, keep=keep)
    (root / "throughput.csv").unlink()
    found = make_tables(Run.read(root))
    for table in (found["main"][0], paper_tables(Run.read(root))[0]):
        assert row(table, "0")[2] == "96.0 ± 0.0 (2 of 3 seeds)"
        assert row(table, "12")[2:] == row(table, "random")[2:] == ["not run"] * 3
    assert texts(found["throughput"][0]) == [["not run"] * 7]
    at = significance_of(root).query("infer_degree + train_degree.astype('int') == 12")
    seeds = {("FGVC", "0"): 2, ("cub200", "0"): 3, ("cub200", "12"): 3, ("dogs", "0"): 2}
    assert at.n_seeds.droplevel([0, 1, 4]).to_dict() == seeds


def test_a_group_and_a_task_of_one_name_are_told_apart(tmp_path):
    tasks = [{"name": name, "folder": "x", "group": "birds"} for name in ("birds", "gulls")]

    whole = made_up.classified(parse_study(config(tasks)))

    def arrays_of(task, points):  # half of the images of one task
        cut = made_up.N // 2 if task == "gulls" else made_up.N
        return {name: array[..., :cut] for name, array in whole(task, points).items()}

    made_up.make(tmp_path, config(tasks), arrays_of)
    found = make_tables(Run.read(tmp_path))
    assert [table.title for table in found["main"]] == ["Birds (vit)"]
    assert [table.title for table in found["tasks"]] == ["Birds (vit)", "Gulls (vit)"]
    assert found["main"][0].rows[2] != found["tasks"][0].rows[2]


def test_the_table_of_a_study_with_one_task_is_the_main_one(tmp_path):
    made_up.plan(tmp_path, config(("cifar100",)))
    write_tables(tmp_path, tmp_path / "tables")
    assert (tmp_path / "tables" / "main.md").read_text().count("### CIFAR-100 (vit)") == 1
    assert "its table is the main one" in (tmp_path / "tables" / "tasks.md").read_text()
    lines = show(tmp_path).splitlines()
    assert lines[0] == "### CIFAR-100 (vit)"
    assert [line.split(":")[0] for line in lines[-3:]] == ["Main table", "Figures", "Report, one page with everything"]
    assert f"Main table: {tmp_path}/tables/main.md" in lines[-3]
    assert lines[-1].endswith(f"(not there yet; snakemake --report {tmp_path}/report.html)")


# --- tests and throughput -------------------------------------------------------------------------------------------


def test_the_table_of_tests_has_the_largest_mismatch_of_every_pair(made):
    table, harm = make_tables(Run.read(made["fgvc"]))["significance"]
    assert [r[:2] for r in texts(table)][:4] == [
        [f"{pair}", f"FGVC, {degrees}"]
        for pair in ("ToMe + ToCom over ToMe", "ToMe, random degrees over ToMe + ToCom")
        for degrees in ("0 → 12", "12 → 0")
    ]
    assert len(table.rows) == 3 * 4
    test = significance_of(made["fgvc"]).loc[("tome", "tocom", "FGVC", "0", 12)]
    assert texts(table)[0][2].startswith("+6.0 [")
    names = ("p", "p", "p_images", "p_seeds", "p_tasks")  # the endpoint is corrected for nothing
    assert texts(table)[0][3:8] == [tables.p_text(test[name]) for name in names]
    assert texts(table)[0][8] == f"50 % [{100 * test.gap_low:.0f}, {100 * test.gap_high:.0f}]"
    shown = significance_of(made["fgvc"]).query(
        "train_degree == '0' and infer_degree == 12 or train_degree == '12' and infer_degree == 0"
    )
    rest = dict(
        zip(
            shown.index[~shown.primary],
            np.maximum(multipletests(shown.p[~shown.primary], method="holm")[1], test.p),
            strict=True,
        )
    )
    other = rest["tocom", "random_degree", "FGVC", "12", 0]
    assert row(table, "ToMe, random degrees over ToMe + ToCom", "FGVC, 12 → 0")[3] == tables.p_text(other)
    assert texts(harm)[0][:4] == ["ToMe + ToCom over ToMe", "FGVC", "2", "+0.00 [+0.00, +0.00]"]


def test_the_table_of_mismatches_has_every_loss_corrected_for_all_that_it_shows(made, study):
    frame = pd.read_csv(study / "mismatch.csv")
    assert frame.loss.tolist() == pytest.approx([12.0, 6.0, 6.0, 2.0] * 3)  # the group and its two tasks
    assert (frame.method + " " + frame.matched).tolist() == [*["tome tome"] * 2, *["random_degree tome"] * 2] * 3
    frame.loc[2:3, ["low", "high", "p"]] = [[5.0, 7.0, 1.0], [-1.0, 5.0, 1.0]]
    frame.loc[:1, ["low", "high", "p"]] = [[10.5, 13.5, 0.002], [-0.25, 12.25, 0.03]]
    frame.to_csv(study / "mismatch.csv", index=False)
    (table,) = make_tables(Run.read(study))["mismatch"]
    assert table.header == ["method", "trained at", "run at 0", "run at 12"]
    assert texts(table) == [
        ["ToMe", "0", "96.0 ± 0.0", "+12.0 [+10.5, +13.5]**"],
        ["", "12", "+6.0 [-0.2, +12.2]", "92.0 ± 0.0"],
        ["ToMe, random degrees", "random", "+6.0 [+5.0, +7.0]", "+2.0 [-1.0, +5.0]"],
    ]
    frame.loc[0, "p"] = 0.03  # Holm: four times that
    frame.to_csv(study / "mismatch.csv", index=False)
    assert [r[-1] for r in texts(make_tables(Run.read(study))["mismatch"][0])][0] == "+12.0 [+10.5, +13.5]"
    (study / "mismatch.csv").unlink()
    assert texts(make_tables(Run.read(study))["mismatch"][0])[0] == ["ToMe", "0", "96.0 ± 0.0", "not run"]
    assert [t.title for t in make_tables(Run.read(made["demo"]))["mismatch"]] == [
        f"What a mismatch costs, {scope} (vit)" for scope in ("real tasks", "generated tasks", "all tasks")
    ]


def test_a_study_that_compares_nothing_has_all_its_tables_and_figures(tmp_path):
    made_up.make(tmp_path, config(("digits",), TOME, paper="degrees"))
    write_tables(tmp_path, tmp_path / "tables")
    write_paper(tmp_path, tmp_path / "tables")
    write_figures(tmp_path, tmp_path / "figures")
    assert "not run" in (tmp_path / "tables" / "significance.md").read_text()


def test_throughput_shows_training_where_it_was_measured(made, study):
    (plain,) = make_tables(Run.read(made["fgvc"]))["throughput"]
    assert "training" not in plain.markdown().lower()
    assert row(plain, "0", "ToMe + ToCom")[5] == "1.003 [0.990, 1.010]"
    frame = pd.read_csv(study / "throughput.csv")
    frame = frame.assign(train_images_per_second=321.4, train_speedup=frame.infer_degree.map({0: 1.25}))
    frame.to_csv(study / "throughput.csv", index=False)
    (measured,) = make_tables(Run.read(study))["throughput"]
    assert measured.header[-2:] == ["training images/s", "training speed-up"]
    assert row(measured, "0")[-2:] == ["321", "1.25×"]
    assert row(measured, "4")[-2:] == ["321", "–"]


# --- how tables are written -----------------------------------------------------------------------------------------


def test_latex_tables_have_booktabs_rules_and_balanced_braces(made, tmp_path):
    write_tables(made["demo"], tmp_path)
    for path in tmp_path.glob("*.tex"):
        text = path.read_text()
        assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\begin{table}")
        unescaped = re.sub(r"\\[{}]", "", text)
        assert unescaped.count("{") == unescaped.count("}")
        for table in text.split("\\end{table}"):
            assert len({line.count(" & ") for line in table.splitlines() if line.endswith("\\\\")}) <= 1
        assert not re.search(r"(?<!\\)[%_#]", text.replace("{%\n", "{\n"))


@pytest.mark.parametrize("n", [tables.PAGE, tables.PAGE + 1])
def test_a_latex_table_that_a_page_cannot_hold_breaks_over_pages_with_all_rows_and_rules(n, tmp_path):
    rows = [[tables.Text(it) for it in (str(i), "a method with quite a long name", f"{i}.5")] for i in range(n)]
    text = tables.Table("T", "why <", ["degree", "method", "value"], rows, "all of it", rules=[2, n - 1]).latex()
    lines = text.splitlines()
    assert ("longtable" in text) == (n > tables.PAGE) != ("resizebox" in text)
    assert text.count("why $<$") == text.count(r"\label{tab:all-of-it}") == 1
    for number in (2, n - 1):  # a rule above each of these rows, and above no other
        assert lines[lines.index(rf"{number} & a method with quite a long name & {number}.5 \\") - 1] == r"\midrule"
    assert sum(line.endswith(r".5 \\") for line in lines) == n
    if pdflatex := shutil.which("pdflatex"):
        head = r"\documentclass{article}\usepackage{booktabs,graphicx,longtable}\begin{document}"
        (tmp_path / "t.tex").write_text(f"{head}\n{text}\n\\end{{document}}\n")
        command = [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)


def test_html_tables_escape_what_html_minds():
    table = tables.Table("a < b", "p < 0.05 & more", ["x", "y"], [[tables.Text("< 1"), tables.Text("2", True)]], "l")
    assert "<td>&lt; 1</td>" in table.html().replace(" </td>", "</td>")
    assert "<b>2</b>" in table.html()
    assert "p &lt; 0.05 &amp; more" in table.html()


def test_signed_numbers_have_no_negative_zero():
    assert [tables.signed(x) for x in (0.04, -0.04, 1.25, -3.0)] == ["+0.0", "+0.0", "+1.2", "-3.0"]


def test_an_interval_says_on_which_side_of_zero_its_ends_are():
    assert tables.with_interval(2.93, -0.02, 5.89) == "+2.9 [-0.0, +5.9]"
    assert tables.with_interval(-0.04, -1.0, 0.04) == "+0.0 [-1.0, +0.0]"
    assert tables.with_interval(0.0, -1e-15, -0.0) == "+0.0 [+0.0, +0.0]"
    assert tables.with_interval(0.012, -0.004, 0.028, 2) == "+0.01 [-0.00, +0.03]"


# --- published figures ----------------------------------------------------------------------------------------------


def test_published_figures_are_those_of_the_papers_abstract_and_its_segmentation():
    gains = {f.group: f for f in read_published() if f.of == "largest gain"}
    expected = {"CIFAR-100": (2.3, 1), "FGVC": (1.5, 4), "VTAB-1k": (2.0, 19)}
    assert {name: (f.value, f.tasks) for name, f in gains.items()} == expected
    assert {figure.source for figure in read_published()} == {"arXiv 2408.06798"}
    miou = {(f.infer_degree, f.compensator): f.value for f in read_published() if f.of == "miou"}
    assert miou[16, "tocom"] - miou[16, None] == pytest.approx(2.1)
    assert len(read_published()) == 3 + 7 + 4


@pytest.mark.parametrize(
    ("value", "groups", "compressor", "timm"),
    [
        (2.3, {"cifar100": "CIFAR-100"}, "tome", "deit_base_patch16_224.fb_in1k"),
        (2.0, dict.fromkeys(map(str, range(19)), "VTAB-1k"), "tome", "deit_base_patch16_224"),
        (None, {"cifar100": "CIFAR-100"}, "evit", "deit_base_patch16_224"),
        (None, {"cifar100": "CIFAR-100"}, "tome", "vit_tiny_patch16_224"),
        (None, {"cifar100": "CIFAR-100"}, "tome", "deit_base_distilled_patch16_224"),
        (None, {"cifar100": "CIFAR-100"}, "tome", None),
        (None, dict.fromkeys(FGVC, "FGVC"), "tome", "deit_base_patch16_224"),
        (None, {"digits": "real tasks"}, "tome", "deit_base_patch16_224"),
    ],
)
def test_a_published_gain_stands_beside_the_same_model_and_tasks_alone(value, groups, compressor, timm):
    (scope,) = group_scopes(groups)
    found = [f.value for f in read_published() if f.of == "largest gain" and f.is_of(scope, timm, compressor, "tocom")]
    assert found == ([] if value is None else [value])


# --- the forms ------------------------------------------------------------------------------------------------------


def test_every_kind_that_a_config_may_name_has_a_form_and_a_line_in_the_overview():
    assert set(Study.model_fields["paper"].annotation.__args__[0].__args__) == set(FORMS) == set(ASKS)


def test_degrees_come_with_the_largest_gain_beside_the_published_one(study):
    table, gains = paper(study, "degrees")
    assert table.title == "FGVC (vit)"
    test = significance_of(study).loc[("tome", "tocom", "FGVC", "0", 12)]
    # From 0: nothing at 4 and 6.0 at 12, 3.0 in the mean; from 12: 2.0 at 0 and nothing at 4. FGVC has four data sets.
    assert texts(gains) == [
        [
            "FGVC",
            "vit, ToMe + ToCom over ToMe",
            f"+6.0 [{test.low:+.1f}, {test.high:+.1f}]{tables.stars(test.p)}†",
            "0 → 12",
        ]
        + ["+3.0 ± 0.2", "0", "—"]
    ]
    for words in ("arXiv 2408.06798", "not corrected for having been picked", "is uncertain"):
        assert words in gains.caption


def test_backbones_have_a_block_each_with_every_method_and_train_degree(made, tmp_path):
    root = shutil.copytree(made["several"], tmp_path / "several")
    table, largest = paper(root, "backbones")
    assert table.header == ["backbone, train degree", "method", *(f"{n} ({g} GFLOPs)" for n, g in
                            ((0, 0.02), (4, 0.016), (12, 0.008)))]  # fmt: skip
    starts = ("0", "12", "matched")
    assert [r[0] for r in texts(table) if r[0]] == [f"{b}, {s}" for b in made_up.TIMM for _ in "12" for s in starts]
    assert len([r for r in texts(table) if r[1] == "gain"]) == 8
    of = [f"{b}, {c} + ToCom over {c}" for b in ("deit_b", "deit_s") for c in ("ToMe", "EViT")]
    assert [(r[1], r[-1]) for r in texts(largest)] == [*zip(of, ("+2.3", "—", "—", "—"), strict=True)]
    assert [table.title for table in paper(root, "methods")][:2] == ["CIFAR-100 (deit_b)", "CIFAR-100 (deit_s)"]


def test_speedup_shows_training_speed_and_accuracy_without_compression(study):
    (table,) = paper(study, "speedup")
    header = ["train degree", "method", "0 (0.02 GFLOPs)", "training images/s", "training speed-up"]
    assert table.header == header
    assert texts(table)[3:5] == [
        ["12", "ToMe", "90.0 ± 0.0", *["not run"] * 2],
        ["", "ToMe + ToCom", "92.0 ± 0.5", "", ""],
    ]
    assert texts(table)[5][2].startswith("+2.0 [")
    assert row(table, "matched")[2] == "96.0 ± 0.0"
    speed = pd.read_csv(study / "throughput.csv")
    speed["train_images_per_second"] = 100.0 + 10 * speed.infer_degree
    speed["train_speedup"] = 1 + speed.infer_degree / 10
    speed[speed.infer_degree != 0].to_csv(study / "throughput.csv", index=False)
    (table,) = paper(study, "speedup")
    assert row(table, "12")[3:] == ["220", "2.20×"]
    assert row(table, "0")[3:] == ["not run", "not run"]


def test_ablation_has_every_method_with_gain_p_and_kl(ablation):
    made_up.change(ablation, methods=ABLATED["methods"] | {"half": {"like": "tocom", "scales": [0.5, 1]}})
    for seed, kl in ((0, 0.12345), (2, 0.32345)):  # seed 1 was not learned
        file = Run.read(ablation).learned_file("vit", "tocom", seed)
        assert file.parent == ablation / "learned" / "vit"
        save_arrays(file, {"a": np.ones(1)}, {"held_out_kl": kl, "held_out_kl_without": 0.9})
    (table,) = paper(ablation, "ablation")
    assert table.header == ["method", "changes", "0 → 4", "0 → 12", "12 → 0", "12 → 4", "KL"]
    lines = {r[0]: r for r in texts(table) if r[0]}
    assert [lines["ToMe"][number] for number in (1, 3, 6)] == ["plain", "80.0 ± 0.0", "0.9000"]
    ours = lines["ToMe + ToCom (tocom)"]
    assert [ours[number] for number in (1, 2, 3, 6)] == ["rank = 2", "96.0 ± 0.0", "86.0 ± 0.5", "0.2235"]
    assert [lines["rank 1"][number] for number in (1, 3, 6)] == ["rank = 1", "83.0 ± 0.5", "not run"]
    # A method that was planned and not run; what it would use was learned for another.
    assert lines["ToMe + ToCom (half)"][1:] == ["scales = 0.5 1", *["not run"] * 4, "–"]
    gain = texts(table)[4][3]
    assert re.fullmatch(r"\+3\.0 \[\+\d\.\d, \+\d\.\d\], p = 0\.0\d+", gain)
    assert cut(ablation, method="rank1", train_degree="12") > 0
    assert row(paper(ablation, "ablation")[0], "rank 1")[4:6] == ["not run", "not run"]


def test_a_compensator_that_was_learned_in_vain_is_said_loudly(ablation):
    def captions():
        return make_tables(Run.read(ablation))["main"][0].caption, paper(ablation, "ablation")[0].caption

    run = Run.read(ablation)
    for method, seed, kl in (("tocom", 0, 0.2), ("tocom", 1, 0.3), ("rank1", 0, 0.2)):
        file = run.learned_file("vit", method, seed)
        save_arrays(file, {}, {"held_out_kl": kl, "held_out_kl_without": 0.3})
    for caption in captions():
        assert caption.count("WARNING") == 1
        assert caption.startswith(
            "WARNING: learning ToMe + ToCom on vit with seed 1 gained nothing: its loss on held-out images is 0.3,"
        )
    assert row(paper(ablation, "ablation")[0], "ToMe + ToCom")[-1] == "0.2500 (no better than without, with seed 1)"
    save_arrays(run.learned_file("vit", "tocom", 1), {}, {"held_out_kl": 0.2, "held_out_kl_without": 0.3})
    assert not any("WARNING" in caption for caption in captions())


def test_transfer_is_the_change_over_adding_no_gap(study):
    (table,) = paper(study, "transfer")
    assert texts(table) == [
        ["none", "accuracy", "80.0 ± 0.0", "80.0 ± 0.0"],
        ["cub200", "change", "+3.1 ± 0.1", "+1.1 ± 0.1"],
        ["dogs", "change", "+1.1 ± 0.1", "+3.1 ± 0.1"],
    ]
    frame = pd.read_csv(study / "transfer.csv", keep_default_na=False)
    gone = (frame.source_task == "cub200") & (frame.target_task == "dogs")
    gone |= (frame.source_task == "none") & (frame.target_task == "cub200") & (frame.seed == 2)
    frame[~gone].to_csv(study / "transfer.csv", index=False)
    (table,) = paper(study, "transfer")
    assert row(table, "cub200")[2:] == ["+3.1 ± 0.1 (2 of 3 seeds)", "not run"]
    assert row(table, "none")[2:] == ["80.0 ± 0.0 (2 of 3 seeds)", "80.0 ± 0.0"]


def test_a_form_that_does_not_fit_is_refused(tmp_path):
    made_up.plan(tmp_path, config(methods=TOME))
    with pytest.raises(TocomError, match="paper: ablation needs a method with a compensator"):
        paper(tmp_path, "ablation")


SEGMENTERS = {"tome": {"compressor": "tome_mlp"}, "tocom": {"like": "tome", "compensator": "tocom"}}


def test_a_segmentation_has_the_same_tables_of_miou_and_the_published_ones_below(tmp_path):
    entry = config(("ade20k",), SEGMENTERS, paper="segmentation", seeds=[0, 1])
    study = parse_study(entry)
    made_up.make(tmp_path, entry, made_up.segmented(study))
    cells = read_cells(tmp_path / "cells.csv")
    one = cells.query("method == 'tocom' and train_degree == '0' and infer_degree == 12 and seed == 1").iloc[0]
    tp = np.array([86 + image % 3 for image in range(12)]).sum()
    assert (one.n, one.correct, one.metric) == (2 * 12 * 100, 2 * tp, "mIoU")
    assert one.score == pytest.approx(tp / (1200 + 1200 - tp))
    table, gains = paper_tables(Run.read(tmp_path))
    name = study.methods["tome"].title
    lines = ["", ", published", ", GFLOPs published", " + ToCom", " + ToCom, published"]
    assert [r[1] for r in texts(table)][:5] == [name + line for line in lines]
    assert texts(table)[1][2:] == ["48.7", "–", "46.4"]
    assert texts(table)[2][2:] == ["106.2", "–", "84.5"]
    assert texts(table)[4][2:] == ["–", "–", "47.2"]
    assert re.search(r"Test mIoU in %.*not made here", table.caption)
    means = cells.query("train_degree == '0' and infer_degree == 12").groupby("method").score.mean()
    test = significance_of(tmp_path).loc[("tome", "tocom", "segmentation", "0", 12)]
    assert test.gain == pytest.approx(100 * (means.tocom - means.tome))
    assert texts(gains)[0][2].startswith(f"{test.gain:+.1f} [")
    assert texts(gains)[0][-1] == "+2.1 (0 → 16)"
    (line,) = overview(study, tmp_path)
    assert (line.published, line.status) == ("+2.1 (0 → 16)", "run")
    write_figures(tmp_path, tmp_path / "figures")
    other = made_up.plan(tmp_path / "scenes", config(("scenes",), SEGMENTERS, paper="segmentation"))
    assert "not made here" not in paper_tables(Run.read(other))[0].caption


@pytest.mark.parametrize("form", ["degrees", "backbones", "speedup", "ablation", "transfer"])
def test_a_study_that_was_never_run_has_its_whole_table(form, ablation, tmp_path):
    full = paper(ablation, form)
    never = paper(made_up.plan(tmp_path / "never", ABLATED), form)
    assert [table.title for table in never] == [table.title for table in full]
    for table, other in zip(never, full, strict=True):
        assert len(table.rows) == len(other.rows)
        measured = {cell for r in texts(table) for cell in r[2:] if cell not in ("", "–", "—")}
        assert measured == {"not run"}


# --- the overview ---------------------------------------------------------------------------------------------------


def test_the_overview_counts_what_was_run(made, study, tmp_path):
    n, gone = len(read_cells(study / "cells.csv")), cut(study, task="dogs", seed=2)
    fgvc = parse_study(TWO_TASKS)
    (first,), (half,) = overview(fgvc, made["fgvc"]), overview(fgvc, study)
    assert (first.what, first.published, first.mean) == ("largest average gain, FGVC", "—", "+3.0 (from 0)")
    assert re.fullmatch(r"\+6\.0 \[.*\]\*\*† \(0 → 12\)", first.ours)
    assert (first.n_run, first.n_planned, first.status) == (n, n, "run")
    assert (half.n_run, half.n_planned, half.status) == (n - gone, n, "partly run")
    (never,) = overview(parse_study(config(("cifar100",), backbones=("deit_b",))), tmp_path / "never")
    assert (never.published, never.ours, never.mean, never.status) == ("+2.3", "not run", "not run", "not run")
    (speed,) = overview(parse_study(TWO_TASKS | {"paper": "speedup", "throughput": {"training": True}}), made["fgvc"])
    assert speed.ours.endswith("(12 → 0)")
    (gap,) = overview(parse_study(TWO_TASKS | {"paper": "transfer", "transfer": True}), made["fgvc"])
    assert gap.ours.startswith("+1.1 [")  # other tasks' gaps only
    assert (gap.n_run, gap.n_planned) == (18, 18)
    (main,) = overview(parse_study(ABLATED | {"paper": "ablation"}), made["ablation"])
    assert "(0 → 12, vit, ToMe + ToCom over ToMe)" in main.ours


def test_the_published_gain_stands_beside_its_own_model_in_the_overview(made, tmp_path):
    root = shutil.copytree(made["several"], tmp_path / "several")
    frame = pd.read_csv(root / "significance.csv")
    frame.loc[frame.backbone == "deit_s", "gain"] += 50  # must not be picked: it is another model
    frame.to_csv(root / "significance.csv", index=False)
    study = made_up.change(root, tasks=["cifar100", {"name": "own", "folder": "x"}])
    first, rest = overview(study, root)
    assert (first.what, first.published) == ("largest average gain, CIFAR-100", "+2.3")
    assert first.ours.startswith("+6.0 [")
    assert first.ours.endswith("(0 → 12, deit_b, ToMe + ToCom over ToMe)")
    assert (first.mean, first.status) == ("+3.0 (from 0, deit_b, ToMe + ToCom over ToMe)", "run")
    assert (rest.what, rest.published, rest.ours) == ("largest average gain, all tasks", "—", "not run")
    assert rest.status == "partly run"


def test_the_commands_write_tables_and_a_line_for_each_study(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shutil.copy(study / "study.json", tmp_path / "mine.yaml")  # looked for in results/, and not there
    commands = [
        ["overview", study, config, "-o", "all.md"],
        *([w, study, "-o", "out"] for w in ("tables", "paper", "figures")),
    ]
    for command in commands:
        assert CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False).exit_code == 0
    text = re.sub(" +", " ", (tmp_path / "all.md").read_text())
    assert [line.rsplit("|")[-2].strip() for line in text.splitlines() if "| made_up" in line] == ["run", "not run"]
    assert (tmp_path / "all.tex").is_file()
    names = {path.stem for path in (tmp_path / "out").glob("*.tex")}
    names_wanted = {"main", "tasks", "significance", "mismatch", "methods", "variance", "costs", "throughput", "paper"}
    assert names == names_wanted
    made_up.change(study, paper=None)
    with pytest.raises(TocomError, match="names no form of table"):
        write_paper(study, tmp_path)


# --- figures and files ----------------------------------------------------------------------------------------------


def test_figures_are_the_same_bytes_twice(study, tmp_path):
    made_up.change(study, transfer=True)
    write_curves(study)
    for again in ("a", "b"):
        write_figures(study, tmp_path / again)
    names = ["accuracy_vs_gflops", "curves", "gain_heatmap", "gap_transfer", "mismatch", "profiles", "ranks"]
    found = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert found == ["SHA256SUMS", *(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))]
    for name in found:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_study_that_was_never_run_has_figures_of_nothing_with_the_names_of_its_backbones(tmp_path):
    made_up.plan(tmp_path, SEVERAL)
    write_figures(tmp_path, tmp_path / "figures")
    names = [
        f"{name}{suffix}.png"
        for name in ("accuracy_vs_gflops", "gain_heatmap", "mismatch")
        for suffix in ("", "_deit_s")
    ]
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.png")) == names


def written(axis):
    return [text.get_text() for text in axis.texts]


def test_the_panel_of_the_endpoint_names_its_gain_and_costs_are_shares(made, study):
    run = Run.read(made["demo"])
    real, generated, every = figures.score_against_cost(run, "vit").axes
    titles = [axis.get_title() for axis in (real, generated, every)]
    assert titles == ["real tasks: digits, mnist5k", "rotation", "all tasks"]
    assert real.get_xlabel() == "% of the uncompressed model's 0.02 GFLOPs"
    assert [round(run.share("vit", "tome", run.scopes[0], n)) for n in made_up.DEGREES] == [100, 80, 40]
    test = significance_of(made["demo"]).loc[("tome", "tocom", "all tasks", "0", 12)]
    assert written(every) == [
        "",
        f"ToMe + ToCom\n+6.0 points [{test.low:+.1f}, {test.high:+.1f}]{tables.stars(test.p)}†",
    ]
    assert written(real) == written(generated) == []
    made_up.change(study, infer_degrees=[4, 12])  # nothing to be a share of
    cut(study, infer_degree=0)
    (axis,) = figures.score_against_cost(Run.read(study), "vit").axes
    assert axis.get_xlabel() == "GFLOPs"


def test_gains_that_may_be_noise_are_pale_and_what_was_declined_has_no_colour(study):
    frame = pd.read_csv(study / "significance.csv")
    frame.loc[(frame.after == "tocom") & (frame.infer_degree == 0), "p"] = 0.2
    frame.to_csv(study / "significance.csv", index=False)
    axis = figures.gain_heatmap(Run.read(study), "vit").axes[0]
    assert written(axis) == ["–", "declined", "+6.0**", "+2.0", "declined", "–"]
    assert [text.get_color() for text in axis.texts][2:4] == ["white", "0.45"]
    colours = axis.images[0].get_array()
    assert (colours[0, 1] == 1).all()
    assert colours[1, 0].min() > 0.85 > colours[0, 2].min()
    cut(study, infer_degree=12, method="tome")
    assert written(figures.gain_heatmap(Run.read(study), "vit").axes[0])[2] == "not run"


def test_mismatches_are_mapped_with_all_that_is_made_of_a_method(study):
    run = Run.read(study)
    figure = figures.mismatch_maps(run, "vit")
    axis, bar = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        *("0", "0 + ToCom", "12", "12 + ToCom", "random degrees")
    ]
    cells = np.array(written(axis)).reshape(5, 3)
    assert cells[:, 2].tolist() == ["80.0", "86.0", "92.0", "92.0", "90.0"]
    assert bar.get_ylim()[1] == pytest.approx(12)  # 0 -> 12, below the best
    red = axis.images[0].get_array()[:, 2]
    assert red[:, 1].argsort().tolist()[:3] == [0, 1, 4]  # the further below, the redder
    assert red[2].tolist() == red[3].tolist()
    assert red[2].min() > 0.95
    assert [patch.get_xy() for patch in axis.patches] == [(0, 0), (2, 2)]  # trained at 0 run at 0, at 12 at 12
    cut(study, infer_degree=12, method="tome", train_degree="0")
    assert written(figures.mismatch_maps(Run.read(study), "vit").axes[0])[2] == "not run"
    one = made_up.change(study, train_degrees=[0])
    assert "mismatch" not in figures.draw(Run(one, study), "vit")


MANY = {
    **(TOME | TOCOM | {"rank1": {"like": "tocom", "compensator": {"rank": 1}, "title": "rank 1"}}),
    "again": {"like": "rank1", "learn": {"epochs": 9}},
    "fitted": {"like": "rank1", "adapt": {}, "title": "rank 1, fitted"},
    **(made_up.RIVAL | EVIT),
    "bytes": {"compressor": "quantise"},
    "bytes_tocom": {"like": "bytes", "compensator": "tocom"},
    "alone": {"compressor": "pitome"},
}


def test_many_compressors_share_a_panel_with_and_without_what_compensates_them(tmp_path, made):
    root = made_up.make(tmp_path, config(("cifar100",), MANY, compare=[["tome", "tocom"]]))
    run = Run.read(root)
    (axis,) = figures.draw(run, "vit")["accuracy_vs_gflops"].axes
    # A thin and a thick line for each compressor that saves GFLOPs, with what is declared last, the first of its kind.
    assert sorted(filter(None, written(axis))) == ["EViT", "EViT + ToCom", "ToMe", "rank 1", "rank 1, fitted"]
    lines = {(line.get_linestyle(), line.get_marker(), n): line for n, line in enumerate(axis.lines)}
    each = [("--", "None"), ("-", "None"), ("--", "None"), ("None", "*"), ("None", "D")]  # dashes of whatever length
    assert [key[:2] for key in lines] == each * 2
    plain, ours, fitted, star, random = [line.get_xydata().round(6).tolist() for line in axis.lines[:5]]
    assert plain == [[40, 80], [80, 96], [100, 96]]
    assert ours == [[40, 83], [80, 96], [100, 96]]
    assert fitted == [[40, 86], [80, 96], [100, 96]]
    assert star == [[40, 92]]
    assert random == [[40, 90], [80, 90], [100, 90]]
    assert not any(axis.lines[n].get_xydata().size for n in (7, 9))  # EViT: none is adapted, none has random degrees
    labels = [text.get_text() for text in axis.figure.legends[0].texts]
    assert labels == [
        *("without compensator", "with compensator", "with one adapted to each model"),
        *("trained at the degree it runs at", "trained at random degrees"),
    ]
    heights = sorted(text.xyann[1] for text in axis.texts)
    assert min(np.diff(heights)) > 0.04 * (axis.get_ylim()[1] - axis.get_ylim()[0])  # none over another
    assert len(figures.draw(Run.read(made["several"]), "deit_b")["accuracy_vs_gflops"].axes) == 2
    made_up.plan(tmp_path / "never", config(("cifar100",), MANY))
    write_figures(tmp_path / "never", tmp_path / "figures")


def test_learned_schedules_are_drawn_by_degree(tmp_path):
    root = made_up.make(tmp_path, config(("digits",), TOME | {"learned": {"compressor": "diffrate"}}))
    run = Run.read(root)
    assert "schedules" not in figures.draw(run, "vit")
    for seed in (0, 1, 2):
        kept = {"merge_kept_num": [9, 5 + seed], "prune_kept_num": [9, 8]}
        about = {"schedules": {"4": kept, "12": kept | {"merge_kept_num": [9, 2]}}}
        save_arrays(run.learned_file("vit", "learned", seed, "compressor"), {}, {"summary": about})
    (axis,) = figures.draw(Run.read(root), "vit")["schedules"].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert [lines[f"degree {n}"].get_ydata().tolist() for n in (4, 12)] == [[9, 6], [9, 2]]
    dashed = [
        line
        for line in axis.lines
        if line.get_linestyle() == "--" and line.get_linewidth() > 1 and len(line.get_xdata())
    ]
    assert [line.get_ydata().tolist() for line in dashed] == [[9, 8]] * 2
    assert (axis.get_title(), lines["degree 4"].get_xdata().tolist()) == ("DiffRate", [1, 2])


# --- curves ---------------------------------------------------------------------------------------------------------


def write_curves(root):
    """Write a curve for every fine-tuning of a study, and for the part that it learns with two of its seeds."""
    run = Run.read(root)
    for tuned, task in ((tuned, task) for tuned in run.study.tuned for task in run.study.task_names):
        for batch, checkpoints in run.study.batches(tuned).items():
            for one in checkpoints:
                rows = [{"epoch": n, "loss": 1 / n, "held_out": 0.2 * n + 0.1 * one.seed, "lr": 0.1} for n in (1, 2)]
                folder = root / "checkpoints" / "vit" / tuned / task / batch
                write_rows(rows, folder / f"train-{one.train_degree}_seed-{one.seed}.csv")
    for seed in (0, 1):
        part = run.learned_file("vit", "tocom", seed)
        rows = [{"epoch": n, "loss": 1 / n, "held_out": -(2 + seed) / n} for n in (1, 2)]
        write_rows(rows, part.with_suffix(".csv"))
        save_arrays(part, {}, {"held_out_kl_without": 3.0})


def test_curves_are_found_from_the_study_and_drawn_by_task_and_train_degree(study):
    assert curves(Run.read(study), "vit") == []
    assert "curves" not in figures.draw(Run.read(study), "vit")
    write_curves(study)
    found = curves(run := Run.read(study), "vit")
    of_dogs = [(curve.method, curve.train, curve.seed) for curve in found if curve.task == "dogs"]
    assert of_dogs == [
        *[("tome", train, seed) for train in ("0", "12") for seed in made_up.SEEDS],
        *[("random_degree", "random", seed) for seed in made_up.SEEDS],
    ]
    learned = [(curve.method, curve.seed, curve.without) for curve in found if curve.task is None]
    assert learned == [("tocom", 0, 3.0), ("tocom", 1, 3.0)]
    panels = {axis.get_title(): axis for axis in figures.training_curves(run, found).axes}
    of_0 = [line.get_ydata() for line in panels["dogs"].lines[:4]]  # three seeds and their mean
    np.testing.assert_allclose(of_0, [[20, 40], [30, 50], [40, 60], [30, 50]])
    lines = panels["learned parts"].lines
    expected = [[2, 1], [1, 0.5], [3, 3], [3, 1.5], [1, 0.5], [3, 3]]
    np.testing.assert_allclose([line.get_ydata() for line in lines], expected)
    assert len({line.get_color() for line in lines}) == len(panels["learned parts"].get_legend().texts) == 1
    found[0].file.write_text("epoch,loss\n1,2\n")
    with pytest.raises(TocomError, match="lacks the column 'held_out'"):
        found[0].read()


def test_convergence_compares_what_trainings_keep_with_what_longer_ones_do(study, tmp_path):
    longer = shutil.copytree(study, tmp_path / "longer")
    command = ["convergence", str(study), str(longer)]
    with pytest.raises(TocomError, match="no training in common"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    write_curves(study)
    write_curves(longer)
    for number, path in enumerate(sorted((longer / "checkpoints").rglob("*.csv"))):
        frame = pd.read_csv(path)
        rows = [{"epoch": 3, "loss": 0.1, "held_out": frame.held_out.max() + 0.001 * number, "lr": 0.1}]
        pd.concat([frame, pd.DataFrame(rows)]).to_csv(path, index=False)
    frame = convergence(Run.read(study), Run.read(longer)).set_index(["method", "train_degree"])
    best = {"0": [], "12": [], "random": []}
    for path in sorted((study / "checkpoints").rglob("*.csv")):
        more = pd.read_csv(longer / path.relative_to(study)).held_out.max() - pd.read_csv(path).held_out.max()
        best[re.search(r"train-(\w+)_", path.name)[1]].append(100 * more)
    for (_, train), row in frame.iterrows():
        assert row.change == pytest.approx(np.mean(best[train]))
        assert (row.trainings, row.epochs, row.epochs_longer) == (6, 2, 3)
        assert row.score == pytest.approx(100 * np.mean([0.4 + 0.1 * seed for seed in made_up.SEEDS]))
    assert max(map(np.mean, best.values())) > 1 > min(map(np.mean, best.values()))
    with pytest.raises(TocomError, match="more than 1 points; fine-tune longer"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert CliRunner().invoke(app, [*command, "--within", "2"], catch_exceptions=False).exit_code == 0
