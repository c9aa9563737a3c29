"""segmentation.csv and its table: complete, equal to the counts, with the paper's figures marked as published."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.segmentation.conftest import DEGREES, SEEDS
from tocom.analysis.tables import NOT_RUN
from tocom.cli_segment import app
from tocom.errors import TocomError
from tocom.files import load_arrays
from tocom.segmentation.metrics import Counts, miou
from tocom.segmentation.tables import COLUMNS, HEADER, Condition, degree_table, gather, make_tables


@pytest.fixture(scope="module")
def gathered(evaluated):
    return gather("small", [("tiny", path) for path in evaluated[1]], resamples=200)


def test_the_csv_has_a_row_for_each_cell_and_the_figures_of_its_counts(gathered, evaluated):
    frame, _ = gathered
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == len(SEEDS) * len(DEGREES) * 2
    assert set(frame.compensator) == {"none", "tocom"}
    arrays, meta = load_arrays(evaluated[1][1])
    for number, cell in enumerate(meta["cells"]):
        row = frame[
            (frame.seed == 1)
            & (frame.infer_degree == cell["infer_degree"])
            & (frame.compensator == cell["compensator"])
        ]
        tp, fp, fn = (arrays[part][number] for part in ("tp", "fp", "fn"))
        assert row.miou.item() == pytest.approx(float(miou(Counts(tp, fp, fn))))
        assert row.pixel_accuracy.item() == pytest.approx(100 * tp.sum() / (tp.sum() + fn.sum()))
        assert row.miou_low.item() < row.miou.item() < row.miou_high.item()
        assert row.n.item() == 24


def test_the_table_is_complete_and_has_the_published_figures_beside_ours(gathered):
    (table,) = make_tables(gathered[1], "scenes", [("tiny", "tome_mlp")], [0], DEGREES, resamples=200)
    text = [[cell.text for cell in row] for row in table.rows]
    assert [row[1] for row in text] == ["0", "8", "12", "16"]
    assert [row[-3:] for row in text] == [
        ["106.2", "48.7", "–"],
        ["91.8", "48.0", "48.3"],
        ["84.5", "46.4", "47.2"],
        ["77.3", "41.3", "43.4"],
    ]
    assert text[2][2:6] == [NOT_RUN] * 4  # degree 12 was published, but is not in this study
    assert text[0][4:6] == ["–", "–"]
    assert all(NOT_RUN not in row for row in (text[0], text[1], text[3]))
    assert all("published" in name for name in HEADER[-3:])
    assert "not made here and of other data than ours" in table.caption


def test_figures_in_the_table_are_means_over_seeds(gathered):
    frame, conditions = gathered
    (table,) = make_tables(conditions, "scenes", [("tiny", "tome_mlp")], [0], DEGREES, resamples=200)
    for row, degree in ((table.rows[1], 8), (table.rows[3], 16)):
        means = frame[frame.infer_degree == degree].groupby("compensator").miou.mean()
        assert float(row[3].text.split()[0]) == pytest.approx(means["none"], abs=0.051)
        assert float(row[4].text.split()[0]) == pytest.approx(means["tocom"], abs=0.051)
        assert float(row[5].text.split()[0]) == pytest.approx(means["tocom"] - means["none"], abs=0.051)
        assert row[4].bold == (means["tocom"] > means["none"])


def test_a_gain_has_a_sign_and_its_paired_interval():
    # 30 equal images: intersection over union of 6/10 and 5/15 without ToCom, 8/10 and 5/15 with it
    plain, ours = (
        Condition(1.0, {0: Counts(*(np.tile([[a, 5]], (30, 1)) for a in values))}) for values in ((6, 4, 0), (8, 2, 0))
    )
    table = degree_table({(0, 8, "none"): plain, (0, 8, "tocom"): ours}, "t", "l", "ade20k", [0], [8])
    row = next(row for row in table.rows if row[1].text == "8")
    assert row[5].text == "+10.0 [+10.0, +10.0]"
    assert [cell.bold for cell in row[3:5]] == [False, True]
    assert "of other data" not in table.caption


def test_a_condition_with_fewer_seeds_than_planned_is_marked():
    counts = Counts(*(np.tile([[a, 5]], (30, 1)) for a in (6, 4, 0)))
    found = {
        (0, n, name): Condition(1.0, dict.fromkeys(range(1 if n == 8 else 2), counts))
        for n in (0, 8, 16)
        for name in ("none", "tocom")
    }
    for given, partly, whole in ((None, "(1 of 2 seeds)", ""), (3, "(1 of 3 seeds)", " (2 of 3 seeds)")):
        tables = make_tables({("a", "b"): found}, "ade20k", [("a", "b")], [0], [0, 8, 16], n_seeds=given)
        rows = {row[1].text: [cell.text for cell in row] for row in tables[0].rows}
        figure = f"{100 * (6 / 10 + 5 / 15) / 2:.1f}"
        assert rows["8"][3:5] == [f"{figure} [{figure}, {figure}] {partly}"] * 2
        assert rows["0"][3] == rows["16"][3] == f"{figure} [{figure}, {figure}]{whole}"
        assert f"mean over {given or 2} seed(s)" in tables[0].caption


def test_another_train_degree_has_no_published_figures(gathered):
    table = degree_table(gathered[1]["tiny", "tome_mlp"], "t", "l", "scenes", [0, 8], [0, 16])
    text = [[cell.text for cell in row] for row in table.rows]
    assert [row[:2] for row in text[4:]] == [["8", "0"], ["8", "16"]]
    assert all(row[2:] == [NOT_RUN] * 4 + ["–"] * 3 for row in text[4:])
    assert table.rules == (4,)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def table_command(predictions, tmp_path, seeds):
    return [
        "table", predictions, "-o", tmp_path / "segmentation.csv", "--tables", tmp_path / "tables",
        "--study", "small", "--task", "scenes", "--backbone", "tiny", "--compressor", "tome_mlp",
        "--train-degree", 0, *[a for d in DEGREES for a in ("--infer-degree", d)],
        *[a for s in seeds for a in ("--seed", s)], "--resamples", 100,
    ]  # fmt: skip


def test_the_command_writes_the_csv_and_all_kinds_of_table(evaluated, tmp_path):
    assert run(*table_command(evaluated[0], tmp_path, SEEDS)).exit_code == 0
    assert len(pd.read_csv(tmp_path / "segmentation.csv")) == 12
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == [
        f"segmentation.{e}" for e in ("html", "md", "tex")
    ]
    markdown = (tmp_path / "tables" / "segmentation.md").read_text()
    assert "mIoU + ToCom (published)" in markdown
    assert "mean over 2 seed(s)" in markdown
    latex = (tmp_path / "tables" / "segmentation.tex").read_text()
    assert latex.count(r"\\") == 5  # the header and four degrees
    first = (tmp_path / "segmentation.csv").read_bytes()
    run(*table_command(evaluated[0], tmp_path, SEEDS))
    assert (tmp_path / "segmentation.csv").read_bytes() == first


def test_a_study_of_which_nothing_was_run_is_a_table_that_says_so(tmp_path):
    assert run(*table_command(tmp_path / "none", tmp_path, SEEDS)).exit_code == 0
    assert (tmp_path / "tables" / "segmentation.md").read_text().count(NOT_RUN) == 16
    assert (tmp_path / "segmentation.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_other_files_are_refused(scenes):
    with pytest.raises(TocomError, match="holds no counts"):
        gather("small", [("tiny", scenes)])


def test_the_commands_make_scenes_and_train_and_evaluate_a_segmenter(backbone, compensator, tmp_path):
    data, model, counts = (tmp_path / name for name in ("data", "model", "counts"))
    sizes = ("--train", 16, "--val", 8, "--test", 8)
    assert run("prepare", "scenes", "-o", data, "--image-size", 32, *sizes).exit_code == 0
    sets = ("--set", "epochs=1", "--set", "batch_size=8", "--set", "device=cpu")
    assert run("train", backbone, data, "-o", model, "--degree", 8, "--seed", 3, *sets).exit_code == 0
    evaluation = ("--compensator", compensator, "-o", counts, "--degree", 0, "--degree", 8, "--set", "scales=[0, 1]")
    assert run("evaluate", data, "--checkpoint", model, *evaluation).exit_code == 0
    frame, _ = gather("small", [("tiny", counts)], 50)
    assert len(frame) == 4
    assert set(frame.seed) == {3}
    assert set(frame.train_degree) == {8}
    with pytest.raises(TocomError, match="1 checkpoints but 2 outputs"):
        run("evaluate", data, "--checkpoint", model, "-o", counts, *evaluation)
