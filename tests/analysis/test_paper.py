"""Tables in the paper's form on made-up studies: what was put in comes out, and what is missing is not run."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.analysis import made_up
from tocom.analysis.cells import read_cells
from tocom.analysis.grid import Grid
from tocom.analysis.overview import ASKS, joint, overview, write_joint
from tocom.analysis.paper import FORMS, paper_table, write_paper
from tocom.analysis.published import Published, largest_gain, read_published
from tocom.analysis.significance import group_scopes
from tocom.cli import app
from tocom.config import PaperTable
from tocom.errors import TocomError
from tocom.files import save_arrays

ROOT = Path(__file__).parents[2]
FGVC = {"cub": "FGVC", "dogs": "FGVC"}
CIFAR = {"c": "CIFAR-100"}
MODELS = [("deit_b", "tome"), ("deit_b", "evit"), ("deit_s", "tome"), ("deit_s", "evit")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    made_up.make(root, FGVC, variants=made_up.VARIANTS)
    return root


@pytest.fixture
def study(made, tmp_path):
    """A copy that a test may cut."""
    return shutil.copytree(made, tmp_path / "study", ignore=shutil.ignore_patterns("predictions"))


CONFIG = made_up.config(FGVC, variants=made_up.VARIANTS)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def row(table, *start):
    return next(r for r in texts(table) if tuple(r[: len(start)]) == start)


def test_every_kind_that_a_config_may_name_has_a_form_and_a_line_in_the_overview():
    assert set(PaperTable.__args__) - {"segmentation"} == set(FORMS)
    assert set(FORMS) <= set(ASKS)


# --- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_of_a_config_is_that_of_the_cells_it_leads_to(made):
    cells = read_cells(made / "cells.csv")
    grid = Grid.of_config(CONFIG)
    assert grid.progress(cells) == (len(cells), len(cells))
    keys = list(grid.cells().columns)
    planned = {tuple(values) for values in grid.cells().itertuples(index=False)}
    assert planned == {tuple(values) for values in cells[keys].itertuples(index=False)}
    assert grid.progress(cells.iloc[5:]) == (len(cells) - 5, len(cells))
    assert grid.progress(cells.assign(task="other")) == (0, len(cells))
    assert grid.progress(pd.concat([cells, cells])) == (len(cells), len(cells))
    assert grid.mismatches == (("0", 4), ("0", 12), ("12", 0), ("12", 4))
    assert Grid.of_cells(cells).mismatches == grid.mismatches


def test_a_config_without_a_part_of_the_grid_is_refused():
    with pytest.raises(TocomError, match="lacks the key 'infer_degrees'"):
        Grid.of_config({name: value for name, value in CONFIG.items() if name != "infer_degrees"})


def test_the_grid_of_a_real_config_counts_what_the_workflow_evaluates():
    from tocom.config import read_study

    grid = Grid.of_config(read_study(ROOT / "config/demo.yaml").model_dump())
    committed = read_cells(ROOT / "results/demo/cells.csv")
    assert grid.progress(committed) == (len(committed), len(committed))


# --- published figures ----------------------------------------------------------------------------------------------


DEIT_B = "deit_base_patch16_224.fb_in1k"


def test_published_figures_are_those_of_the_papers_abstract_and_its_segmentation():
    from tocom.config import read_study

    gains = {f.group: f for f in read_published() if f.of == "largest gain"}
    assert {name: f.value for name, f in gains.items()} == {"CIFAR-100": 2.3, "FGVC": 1.5, "VTAB-1k": 2.0}
    groups = group_scopes(read_study(ROOT / "config/full.yaml").groups)
    assert {name: f.tasks for name, f in gains.items()} == {s.name: len(s.tasks) for s in groups if s.name in gains}
    assert len(gains) == 3
    assert {figure.source for figure in read_published()} == {"arXiv 2408.06798"}
    miou = {(f.infer_degree, f.compensated): f.value for f in read_published() if f.of == "miou"}
    assert miou[16, True] - miou[16, False] == pytest.approx(2.1)
    assert len(read_published()) == 3 + 7 + 4


@pytest.mark.parametrize(
    ("value", "group", "tasks", "compressor", "timm"),
    [
        (2.3, "CIFAR-100", 1, "tome", DEIT_B),
        (2.0, "VTAB-1k", 19, "tome", "deit_base_patch16_224"),
        (None, "CIFAR-100", 1, "evit", DEIT_B),
        (None, "CIFAR-100", 1, "tome", "vit_tiny_patch16_224"),
        (None, "CIFAR-100", 1, "tome", "deit_base_distilled_patch16_224"),
        (None, "CIFAR-100", 1, "tome", None),
        (None, "FGVC", 2, "tome", DEIT_B),
        (None, "real tasks", 1, "tome", DEIT_B),
    ],
)
def test_a_published_gain_stands_beside_the_same_model_and_tasks_alone(value, group, tasks, compressor, timm):
    found = largest_gain(group, tasks, compressor, timm)
    assert (found and found.value) == value


def test_a_figure_that_is_not_one_is_refused(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text("- {of: largest gain, what: x, group: FGVC, value: many, unit: points, source: y}\n")
    with pytest.raises(TocomError, match="value"):
        read_published(path)
    with pytest.raises(TocomError, match="cannot read"):
        read_published(tmp_path / "none.yaml")
    assert Published(of="largest gain", what="x", group="y", value=2, unit="points", source="z").text() == "+2.0"


# --- the forms ------------------------------------------------------------------------------------------------------


def test_degrees_come_with_the_largest_gain_beside_the_published_one(study):
    table, gains = paper_table("degrees", study, CONFIG, FGVC)
    assert table.title == "FGVC (vit, ToMe)"
    assert row(table, "0")[2:] == ["96.0 ± 0.0", "96.0 ± 0.0", "80.0 ± 0.0"]
    found = row(gains, "FGVC")
    tests = pd.read_csv(study / "significance.csv")
    tests = tests[(tests.scope == "FGVC") & (tests.compensator == "tocom") & (tests.comparison == "tocom_vs_plain")]
    best = tests.loc[tests.gain.idxmax()]
    assert found[2] == f"{best.gain:+.1f} [{best.low:+.1f}, {best.high:+.1f}]***"
    assert found[2].startswith("+6.0 [")
    # From 0: nothing at 4 and 6.0 at 12, 3.0 in the mean; from 12: 2.0 at 0 and nothing at 4. FGVC has four data sets.
    assert found[3:] == ["0 → 12", "+3.0 ± 0.0", "0", "—"]
    assert gains.header[-1] == "published"
    for words in ("arXiv 2408.06798", "not corrected for having been picked", "is uncertain"):
        assert words in gains.caption


def test_the_average_over_vtab1k_is_explained(tmp_path):
    vtab = {"a": "VTAB-1k natural", "b": "VTAB-1k specialised"}
    *tables, gains = paper_table("degrees", tmp_path / "never", made_up.config(vtab), vtab)
    note = "VTAB-1k is the mean of its tasks, 19 in all; other papers average the means of its three groups"
    assert [note in table.caption for table in tables] == [False, False, True]
    assert note in gains.caption
    joined = [joint(overview("s", "degrees", tmp_path, made_up.config(g), g)).caption for g in (vtab, FGVC)]
    assert [note in caption for caption in joined] == [True, False]


def test_a_cell_that_was_cut_is_not_run_in_its_place_alone(study):
    before = paper_table("degrees", study, CONFIG, FGVC)[0]
    assert made_up.cut(study, train_degree="0", infer_degree=12, compensator="none", task="dogs") == 3
    after, gains = paper_table("degrees", study, CONFIG, FGVC)
    changed = [
        (number, column)
        for number, (old, new) in enumerate(zip(texts(before), texts(after), strict=True))
        for column, (a, b) in enumerate(zip(old, new, strict=True))
        if a != b
    ]
    assert changed == [(0, 4), (2, 4)]  # the plain accuracy, and the gain over it
    assert texts(after)[0][4] == texts(after)[2][4] == "not run"
    assert row(gains, "FGVC")[3:6] == ["12 → 0", "+1.0 ± 0.0", "12"]  # the largest of those that were run


def test_seeds_that_are_missing_are_counted(study):
    made_up.cut(study, train_degree="12", infer_degree=0, compensator="none", seed=1)
    table = paper_table("degrees", study, CONFIG, FGVC)[0]
    assert row(table, "12")[2] == "90.0 ± 0.0 (2 of 3 seeds)"


def test_planned_degrees_that_no_cell_has_are_not_run(study):
    config = CONFIG | {"infer_degrees": [0, 4, 8, 12], "train_degrees": [0, 8, 12, "random"]}
    table = paper_table("degrees", study, config, FGVC)[0]
    assert row(table, "8")[2:] == ["not run"] * 4
    assert row(table, "0")[4] == "not run"
    assert row(table, "random")[4] == "not run"
    assert row(table, "0")[5] == "80.0 ± 0.0"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    made_up.make(root, CIFAR, models=MODELS)
    return root


def several_config():
    return made_up.config(CIFAR, backbones=("deit_b", "deit_s"), compressors=("tome", "evit"))


def test_backbones_and_compressors_have_a_block_each_with_every_train_degree(several):
    by_backbone, largest = paper_table("backbones", several, several_config(), CIFAR)
    assert by_backbone.header == ["backbone, train degree", "method", "0", "4", "12"]
    lines = ("0", "12", "random", "matched")
    blocks = [f"{name}, {line}" for name in ("deit_b", "deit_b", "deit_s", "deit_s") for line in lines]
    assert [r[0] for r in texts(by_backbone) if r[0]] == blocks
    gains = [r for r in texts(by_backbone) if r[1] == "gain"]
    assert len(gains) == 8
    for at_0, at_12 in zip(gains[::2], gains[1::2], strict=True):
        assert at_0[2] == at_12[4] == "–"
        assert at_0[4].startswith("+6.0 [")
        assert at_12[2].startswith("+2.0 [")
    assert row(by_backbone, "deit_s, 12")[2:] == ["90.0 ± 0.0", "91.0 ± 0.0", "92.0 ± 0.0"]
    assert row(by_backbone, "deit_s, matched")[2:] == ["96.0 ± 0.0", "not run", "92.0 ± 0.0"]
    assert by_backbone.rules == tuple(start + rule for start in (0, 8, 16, 24) for rule in (0, 3, 6) if start + rule)
    assert [(r[1], r[-1]) for r in texts(largest)] == [
        ("deit_b, ToMe", "+2.3"),
        ("deit_b, EViT", "—"),
        ("deit_s, ToMe", "—"),
        ("deit_s, EViT", "—"),
    ]
    by_compressor, largest = paper_table("compressors", several, several_config(), CIFAR)
    names = [(r[0], r[1]) for r in texts(by_compressor) if r[0].endswith(", 12")]
    assert names == [
        ("merging (deit_b), 12", "ToMe"),
        ("pruning (deit_b), 12", "EViT"),
        ("merging (deit_s), 12", "ToMe"),
        ("pruning (deit_s), 12", "EViT"),
    ]
    assert [r[-1] for r in texts(largest)] == ["+2.3", "—", "—", "—"]


def test_a_backbone_that_was_not_run_is_shown_so(several):
    config = made_up.config(CIFAR, backbones=("deit_b", "mae"))
    table, largest = paper_table("backbones", several, config, CIFAR)
    block = texts(table)[8:]
    assert block[0] == ["mae, 0", "ToMe", *["not run"] * 3]
    assert block[7] == ["mae, matched", "ToMe", *["not run"] * 3]
    assert row(largest, "CIFAR-100", "mae, ToMe")[2:] == [*["not run"] * 4, "—"]


def test_speedup_shows_training_speed_and_accuracy_without_compression(study):
    (table,) = paper_table("speedup", study, CONFIG, FGVC)
    assert table.header == [
        *("train degree", "training images/s", "training speed-up", "ToMe", "ToMe + ToCom", "gain", "trained at 0"),
        "published",
    ]
    assert row(table, "12")[1:5] == ["not run", "not run", "90.0 ± 0.0", "92.0 ± 0.0"]
    assert row(table, "12")[5].startswith("+2.0 [")
    assert row(table, "12")[6] == "96.0 ± 0.0"
    assert row(table, "0")[5] == "–"
    speed = pd.read_csv(study / "throughput.csv")
    speed["train_images_per_second"] = 100.0 + 10 * speed.infer_degree
    speed["train_speedup"] = 1 + speed.infer_degree / 10
    speed[speed.infer_degree != 0].to_csv(study / "throughput.csv", index=False)
    (table,) = paper_table("speedup", study, CONFIG, FGVC)
    assert row(table, "12")[1:3] == ["220", "2.20×"]
    assert row(table, "0")[1:3] == ["not run", "not run"]


def test_ablation_has_every_variant_with_gain_p_and_kl(study, tmp_path):
    save_arrays(tmp_path / "c.safetensors", {"a": pd.Series([1.0]).to_numpy()}, {"held_out_kl": 0.12345})
    save_arrays(
        tmp_path / "t.safetensors", {"a": pd.Series([1.0]).to_numpy()}, {"held_out_kl": 0.1, "held_out_kl_without": 0.9}
    )
    files = {("vit", "tome", "rank1"): tmp_path / "c.safetensors"}
    (table,) = paper_table("ablation", study, CONFIG, FGVC, compensators=files)
    assert table.header == ["compensator", "changes", "0 → 4", "0 → 12", "12 → 0", "12 → 4", "KL"]
    assert row(table, "none", "plain")[3] == "80.0 ± 0.0"
    assert row(table, "tocom")[1:4] == ["as configured", "96.0 ± 0.0", "86.0 ± 0.0"]
    assert row(table, "tocom")[-1] == "not run"
    assert row(table, "rank1")[1:4] == ["rank = 1", "96.0 ± 0.0", "83.0 ± 0.0"]
    assert row(table, "none")[-1] == "not run"
    assert row(table, "rank1")[-1] == "0.1235"
    # A variant that shares the file of another has no KL of its own.
    shared = {("vit", "tome", name): tmp_path / "t.safetensors" for name in ("tocom", "rank1")}
    (other,) = paper_table("ablation", study, CONFIG, FGVC, compensators=shared)
    assert [row(other, name)[-1] for name in ("none", "tocom", "rank1")] == ["0.9000", "0.1000", "–"]
    gain = texts(table)[4][3]
    assert re.fullmatch(r"\+3\.0 \[\+\d\.\d, \+\d\.\d\]\*\*\*, p (< 0\.0001|= 0\.000\d)", gain)
    assert made_up.cut(study, compensator="rank1", train_degree="12") > 0
    (table,) = paper_table("ablation", study, CONFIG, FGVC)
    assert row(table, "rank1")[4:6] == ["not run", "not run"]
    assert row(table, "tocom")[4] == "92.0 ± 0.0"


def test_a_variant_that_the_config_plans_and_nobody_ran_is_shown_so(study):
    config = CONFIG | {"compensators": {**CONFIG["compensators"], "longer": {"epochs": 20, "scales": [0.5, 1]}}}
    (table,) = paper_table("ablation", study, config, FGVC)
    assert row(table, "longer") == ["longer", "epochs = 20, scales = 0.5 1", *["not run"] * 4, "–"]


def test_transfer_is_the_change_over_adding_no_gap(study):
    (table,) = paper_table("transfer", study, CONFIG, FGVC)
    assert texts(table) == [
        ["none", "accuracy", "80.0 ± 0.0", "80.0 ± 0.0"],
        ["cub", "change", "+3.1 ± 0.1", "+1.1 ± 0.1"],
        ["dogs", "change", "+1.1 ± 0.1", "+3.1 ± 0.1"],
    ]
    frame = pd.read_csv(study / "transfer.csv", keep_default_na=False)
    gone = (frame.source_task == "cub") & (frame.target_task == "dogs")
    gone |= (frame.source_task == "none") & (frame.target_task == "cub") & (frame.seed == 2)
    frame[~gone].to_csv(study / "transfer.csv", index=False)
    (table,) = paper_table("transfer", study, CONFIG, FGVC)
    assert row(table, "cub")[2:] == ["+3.1 ± 0.1 (2 of 3 seeds)", "not run"]
    assert row(table, "none")[2:] == ["80.0 ± 0.0 (2 of 3 seeds)", "80.0 ± 0.0"]


def test_another_variant_can_be_the_main_one(study):
    table = paper_table("degrees", study, CONFIG, FGVC, main="rank1")[-1]
    assert row(table, "FGVC")[2].startswith("+3.0 [")
    with pytest.raises(TocomError, match="no compensator 'rank7'"):
        paper_table("degrees", study, CONFIG, FGVC, main="rank7")


def test_kinds_that_do_not_exist_or_do_not_fit_are_refused(study):
    with pytest.raises(TocomError, match="unknown kind of study 'degree' .did you mean 'degrees'"):
        paper_table("degree", study, CONFIG, FGVC)
    with pytest.raises(TocomError, match="two fixed train degrees"):
        paper_table("transfer", study, CONFIG | {"train_degrees": [0]}, FGVC)
    with pytest.raises(TocomError, match="needs a fixed train degree"):
        paper_table("backbones", study, CONFIG | {"train_degrees": ["random"]}, FGVC)


# --- studies that were never run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
def test_a_study_that_was_never_run_has_its_whole_table(kind, made, tmp_path):
    never = paper_table(kind, tmp_path / "never", CONFIG, FGVC)
    full = paper_table(kind, made, CONFIG, FGVC)
    assert [table.title for table in never] == [table.title for table in full]
    for table, other in zip(never, full, strict=True):
        assert len(table.rows) == len(other.rows)
        measured = [cell for r in texts(table) for cell in r[2:] if cell not in ("", "–", "—")]
        assert measured
        assert set(measured) == {"not run"}


# --- the overview ---------------------------------------------------------------------------------------------------


def line(table, name):
    return dict(zip(table.header, row(table, name), strict=True))


def test_the_overview_counts_what_was_run(made, study, tmp_path):
    n = len(read_cells(study / "cells.csv"))
    gone = made_up.cut(study, task="dogs", seed=2)
    table = joint(
        [
            *overview("fgvc", "degrees", made, CONFIG, FGVC),
            *overview("fgvc_half", "degrees", study, CONFIG, FGVC),
            *overview("cifar", "degrees", tmp_path / "never", made_up.config(CIFAR, ("deit_b",)), CIFAR),
            *overview("speed", "speedup", made, CONFIG, FGVC),
            *overview("gap", "transfer", made, CONFIG, FGVC),
        ]
    )
    first = line(table, "fgvc")
    assert first["published"] == "—"  # of FGVC's four data sets there are two, and the model is not DeiT-B
    assert first["mean gain (ours)"] == "+3.0 (from 0)"
    assert first["ours"].startswith("+6.0 [")
    assert first["ours"].endswith("(0 → 12)")
    assert (first["cells"], first["status"]) == (f"{n} of {n}", "run")
    half = line(table, "fgvc_half")
    assert (half["cells"], half["status"]) == (f"{n - gone} of {n}", "partly run")
    never = line(table, "cifar")
    assert (never["published"], never["ours"], never["status"]) == ("+2.3", "not run", "not run")
    assert never["mean gain (ours)"] == "not run"
    for words in ("DeiT-B with ToMe", "not corrected for having been picked", "is uncertain"):
        assert words in table.caption
    assert never["cells"] == f"0 of {3 * (2 * 3 * 2 + 3)}"
    assert line(table, "speed")["ours"].endswith("(12 → 0)")
    assert line(table, "speed")["published"] == "—"
    gap = line(table, "gap")
    assert gap["ours"].startswith("+1.1 [")  # other tasks' gaps only
    assert gap["cells"] == "18 of 18"


def test_the_overview_names_the_model_where_there_are_several(several):
    (found,) = overview("backbones", "backbones", several, several_config(), CIFAR)
    assert re.search(r"\(0 → 12, deit_[bs], (ToMe|EViT)\)$", found.ours)


def test_the_published_gain_stands_beside_its_own_model_in_the_overview(several):
    significance = pd.read_csv(several / "significance.csv")
    significance.loc[significance.backbone == "deit_s", "gain"] += 50  # must not be picked: it is another model
    groups = CIFAR | {"own": "own tasks"}
    config = several_config() | {"tasks": list(groups)}
    first, rest = overview("s", "degrees", several, config, groups)
    assert (first.what, first.published) == ("largest average gain, CIFAR-100", "+2.3")
    assert first.ours.startswith("+6.0 [")
    assert first.ours.endswith("(0 → 12, deit_b, ToMe)")
    assert (first.mean, first.status) == ("+3.0 (from 0, deit_b, ToMe)", "run")
    assert (rest.what, rest.published, rest.ours) == ("largest average gain, all tasks", "—", "not run")
    assert rest.status == "partly run"


def test_the_command_gives_the_largest_study_a_line_for_each_published_group(tmp_path):
    configs = [ROOT / "config" / f"{name}.yaml" for name in ("full", "backbones")]
    command = ["analyse", "overview", *map(str, configs), "-o", str(tmp_path / "all"), "--results", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    lines = [line.split("|")[1:4] for line in (tmp_path / "all.md").read_text().splitlines() if "not run" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["full", "largest average gain, CIFAR-100", "+2.3"],
        ["full", "largest average gain, FGVC", "+1.5"],
        ["full", "largest average gain, VTAB-1k", "+2.0"],
        ["backbones", "largest gain of any backbone, CIFAR-100", "—"],
    ]
    assert "Folder for" not in CliRunner().invoke(app, ["analyse", "overview", "--help"]).output


def test_the_overview_shows_a_segmentation_beside_the_published_miou(tmp_path):
    from tocom.segmentation.tables import COLUMNS

    config = made_up.config({}) | {"segmentation": {"data": "scenes"}, "train_degrees": [0], "seeds": [0, 1]}
    (other,) = overview("ade20k", "segmentation", tmp_path, config | {"segmentation": {"data": "ade20k"}})
    assert (other.published, other.ours) == ("41.3 → 43.4 % (0 → 16)", "not run")
    (never,) = overview("scenes", "segmentation", tmp_path, config)
    assert (never.published, never.ours, never.n_run, never.n_planned) == ("—", "not run", 0, 12)
    rows = [
        {"backbone": "vit", "compressor": "tome", "task": "scenes", "seed": seed, "train_degree": 0, "infer_degree": n,
         "compensated": name != "none", "compensator": name, "miou": 50 - n + seed + (n / 4) * (name != "none")}
        for seed in (0, 1) for n in (0, 4, 12) for name in ("none", "tocom")
    ]  # fmt: skip
    pd.DataFrame(rows).reindex(columns=list(COLUMNS)).to_csv(tmp_path / "segmentation.csv", index=False)
    (found,) = overview("scenes", "segmentation", tmp_path, config)
    assert (found.ours, found.status) == ("38.5 → 41.5 % (0 → 12)", "run")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_all_forms_are_written_and_compile(made, tmp_path):
    groups = {"cub_200 & co": "100 %_group", "dogs": "FGVC"}
    for kind in FORMS:
        write_paper(kind, made, CONFIG, FGVC, tmp_path / kind)
        write_paper(kind, tmp_path / "never", made_up.config(groups), groups, tmp_path / f"{kind}_never")
    write_joint(overview("fgvc_1 & 100 %", "degrees", made, CONFIG, FGVC), tmp_path / "all.md")
    sources = sorted(tmp_path.glob("*/paper.tex")) + [tmp_path / "all.tex"]
    assert len(sources) == 2 * len(FORMS) + 1
    body = "\n".join(f"\\input{{{path.relative_to(tmp_path)}}}\\clearpage" for path in sources)
    packages = "\\usepackage{booktabs,graphicx}\\usepackage[T1]{fontenc}"
    document = f"\\documentclass{{article}}{packages}\\begin{{document}}\n{body}\n\\end{{document}}"
    (tmp_path / "main.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-2000:]
    for path in sources:
        assert path.with_suffix(".md").read_text().startswith("### ")
        assert "<table>" in path.with_suffix(".html").read_text()
