"""What methods need: costs.csv against a walk through made-up folders, and its tables against sums done by hand."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.analysis import made_up
from tests.analysis.made_up import RIVAL, TOCOM, TOME, config
from tocom.analysis import costs
from tocom.analysis.costs import serving_table, trainings_table
from tocom.analysis.report import make_tables
from tocom.analysis.run import Run
from tocom.cli_analyse import app
from tocom.errors import TocomError
from tocom.files import save_arrays, write_rows

#: Training images of each task; images a step.
SIZES = {"digits": 100, "mnist5k": 50}
BATCH = 32
METHODS = TOME | TOCOM | RIVAL
METHODS |= {
    "tocom_1": {"like": "tocom", "scales": [1], "title": "scale 1"},
    "adapted": {"like": "tocom", "adapt": {"epochs": 1}, "title": "adapted"},
    "zero": {"like": "adapted", "adapt": {"start": "zero"}, "title": "adapted from zero"},
    "mixed": {"like": "tome", "finetune": {"mixup": 0.8}, "title": "mixed"},
    "rate": {"compressor": {"kind": "diffrate", "degrees": [4]}, "learn": {"images": 40}, "seeds": [0, 1]},
}
STUDY = config(
    tuple(SIZES), METHODS, compare=[["tome", "tocom"]], checkpoints_per_job=4,
    learn={"images": 70, "epochs": 2, "batch_size": BATCH},
    finetune={"epochs": 3, "batch_size": BATCH},
    adapt={"epochs": 3, "batch_size": BATCH},
)  # fmt: skip


def leave(path, minutes, size):
    """Leave what a training of so many minutes leaves: a file of so many bytes beside its curve."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    rows = [{"epoch": n, "loss": 1.0, "held_out": 0.0, "lr": 0.1, "seconds": 60 * minutes * n / 2} for n in (1, 2)]
    write_rows(rows, path.with_suffix(".csv"))


def trained(root, config, sizes, minutes, size=lambda folder: 1000):
    """Make the folder of a study whose trainings are done.

    Args:
        minutes, size: of a training, and of its file, by the folder ("learned", "checkpoints" or "adapted").
    """
    run = Run.read(made_up.plan(root, config))
    study = run.study
    for task, n in sizes.items():
        save_arrays(root / "data" / f"{task}.safetensors", {}, {"sizes": {"train": n, "val": 7, "test": 9}})
    for backbone in run.backbones:
        for method in study.methods:
            for seed in study.seeds_of(method):
                for role in ("compressor", "compensator"):
                    file = run.learned_file(backbone, method, seed, role)
                    if file is not None and not file.exists():
                        leave(file, minutes("learned"), size("learned"))
            kept = {"checkpoints": method in study.tuned, "adapted": study.methods[method].adapt is not None}
            for folder in [name for name, is_kept in kept.items() if is_kept]:
                for task in study.task_names:
                    for batch, checkpoints in study.batches(study.tuned_as(method)).items():
                        for one in checkpoints:
                            name = f"train-{one.train_degree}_seed-{one.seed}.safetensors"
                            leave(
                                root / folder / backbone / method / task / batch / name, minutes(folder), size(folder)
                            )
    return Run.read(root)


def gathered(root):
    """Run the command; return costs.csv."""
    result = CliRunner().invoke(app, ["costs", str(root), "-o", str(root / "costs.csv")], catch_exceptions=False)
    assert result.exit_code == 0
    return pd.read_csv(root / "costs.csv", dtype={"train_degree": str}, keep_default_na=False)


def walked(files):
    """Return how many files there are, and the mean of their minutes and of their bytes."""
    last = [float(path.with_suffix(".csv").read_text().split()[-1].split(",")[-1]) for path in files]
    return len(last), sum(last) / len(last) / 60, sum(len(path.read_bytes()) for path in files) / len(files)


def steps(n, epochs, whole=False):
    """Count the batches of some epochs one by one; whole: those that are full."""
    return epochs * len([start for start in range(0, n, BATCH) if not whole or start + BATCH <= n])


def tables(root):
    run = Run.read(root)
    return [serving_table(run, "vit"), trainings_table(run, "vit")]


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_every_row_is_what_a_walk_through_the_folder_finds(tmp_path):
    rng = np.random.default_rng(0)
    trained(tmp_path, STUDY, SIZES, lambda folder: rng.uniform(1, 9), lambda folder: int(rng.integers(50, 99)))
    found = {}
    for row in gathered(tmp_path).itertuples():
        assert (row.study, row.backbone) == ("made_up", "vit")
        seen = (row.images, row.labels, row.steps)
        found[row.method, row.what, row.task, row.train_degree] = (
            row.made_for,
            *seen,
            row.seeds,
            row.minutes,
            row.bytes,
        )
    kept_as = {"rate": "rate", "random_degree": "random_degree", "mixed": "mixed"}
    expected = {}
    for method in METHODS:
        tuned = kept_as.get(method, "tome")
        for task, n in SIZES.items():
            for train in ["random"] if method == "random_degree" else ["0", "12"]:
                name = f"vit/{{}}/{task}/batch-*/train-{train}_seed-*.safetensors"
                files = sorted((tmp_path / "checkpoints").glob(name.format(tuned)))
                of_all = n, n, steps(n, 3, method == "mixed")
                expected[method, "finetune", task, train] = (tuned, *of_all, *walked(files))
                if method in ("adapted", "zero"):
                    files = sorted((tmp_path / "adapted").glob(name.format(method)))
                    epochs = 1 if method == "adapted" else 3
                    expected[method, "adapt", task, train] = (method, n, 0, steps(n, epochs), *walked(files))
    learned = list((tmp_path / "learned" / "vit").glob("*.safetensors"))
    added, rates = ([path for path in learned if path.name.startswith(kind)] for kind in ("tocom", "diffrate"))
    assert (len(added), len(rates)) == (3, 2)
    for method in ("tocom", "tocom_1", "adapted"):
        expected[method, "learn compensator", "", ""] = ("tocom", 70, 0, steps(70, 2), *walked(added))
    expected["rate", "learn compressor", "", ""] = ("rate", 40, 0, steps(40, 2), *walked(rates))
    assert found.keys() == expected.keys()
    for key, (made_for, *figures) in expected.items():
        assert found[key][0] == made_for, key
        assert found[key][1:] == pytest.approx(figures), key


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    minutes = {"learned": 30.0, "checkpoints": 0.5, "adapted": 0.125}
    size = {"learned": 30_000, "checkpoints": 400_000, "adapted": 20_000}
    root = tmp_path_factory.mktemp("done")
    trained(root, STUDY, SIZES, minutes.get, size.get)
    gathered(root)
    return root


def test_the_table_says_what_it_takes_to_serve_every_degree(done):
    serving, each = tables(done)
    # 4 and 2 steps an epoch, 3 epochs; where images are mixed 3 and 1. 75 is the mean of 100 and 50.
    plain, once = ["–", "–", "–", "–", "75 / 75"], ["70", "6", "30", "0.03", "75 / 75"]
    assert serving.header[5:8] == ["MB, once", "images / labels", "steps"]
    assert texts(serving) == [
        ["ToMe", "1", *plain, "9", "0.5", "0.4"],
        ["ToMe, matched", "3", *plain, "27", "1.5", "1.2"],
        ["ToMe + ToCom", "1", *once, "9", "0.5", "0.4"],
        ["ToMe, random degrees", "1", *plain, "9", "0.5", "0.4"],
        ["scale 1", "1", *once, "9", "0.5", "0.4"],
        ["adapted", "1, adapted", *once, "12", "0.625", "0.42"],
        ["adapted from zero", "1, adapted", *plain, "18", "0.625", "0.42"],
        ["mixed", "1", *plain, "6", "0.5", "0.4"],
        ["mixed, matched", "3", *plain, "18", "1.5", "1.2"],
        ["DiffRate", "1", "40", "4", "30", "0.03", "75 / 75", "9", "0.5", "0.4"],
        ["DiffRate, matched", "3", "40", "4", "30", "0.03", "75 / 75", "27", "1.5", "1.2"],
    ]
    # What is shared stands once.
    assert [row[:2] for row in texts(each)] == [
        ["ToMe", "fine-tune, each task"],
        ["ToMe + ToCom", "learn compensator, once"],
        ["ToMe, random degrees", "fine-tune, each task"],
        ["adapted", "adapt, each task"],
        ["adapted from zero", "adapt, each task"],
        ["mixed", "fine-tune, each task"],
        ["DiffRate", "learn compressor, once"],
        ["DiffRate", "fine-tune, each task"],
    ]
    assert texts(each)[1][2:] == ["70", "0", "6", "30", "0.03"]
    assert texts(each)[3][2:] == ["75", "0", "3", "0.125", "0.02"]
    assert all("other machines take others" in table.caption for table in (serving, each))
    assert r"\begin{tabular}{llrrrrrrrr}" in serving.latex()


def test_the_tables_are_made_again_from_the_csv_alone(done, tmp_path):
    for name in ("study.json", "costs.csv"):
        shutil.copy(done / name, tmp_path / name)
    assert make_tables(Run.read(tmp_path))["costs"] == tables(done)


def test_what_is_not_there_is_said_and_what_is_there_is_counted(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "part")
    shutil.rmtree(root / "adapted" / "vit" / "adapted")
    shutil.rmtree(root / "checkpoints" / "vit" / "mixed" / "mnist5k")
    (root / "data" / "digits.safetensors").unlink()
    for path in (root / "checkpoints" / "vit" / "random_degree").rglob("*_seed-0.csv"):
        path.unlink()  # still being written
    frame = gathered(root).set_index(["method", "what", "task"]).sort_index()
    assert frame.loc[("random_degree", "finetune"), "seeds"].tolist() == [2, 2]
    assert frame.loc[("tome", "finetune", "digits"), "images"].tolist() == ["", ""]
    rows = {row[0]: row[1:] for row in texts(tables(root)[0])}
    assert rows["adapted"] == ["1, adapted", *["not run"] * 8]
    assert rows["adapted from zero"][5:] == ["– / –", "–", "0.625", "0.42"]
    assert rows["mixed"][5:] == ["– / –", "–", "0.5", "0.4"]
    made_up.plan(tmp_path / "never", STUDY)
    assert {text for table in tables(tmp_path / "never") for row in texts(table) for text in row[2:]} == {"not run"}
    with pytest.raises(TocomError, match=r"no training of this study in .*never; run some of it first"):
        gathered(tmp_path / "never")
    path = next((root / "checkpoints").rglob("*.csv"))
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(TocomError, match=re.escape(f"{path} lacks the column 'seconds'")):
        gathered(root)


def test_a_model_that_is_used_as_it_is_takes_nothing_but_its_bytes(tmp_path):
    methods = {"given": {"compressor": "tome", "tuning": "none"}, "added": {"like": "given", "compensator": "tocom"}}
    entry = config(("digits",), methods, seeds=[0], train_degrees=[0], learn={"images": 70, "epochs": 1})
    run = trained(tmp_path, entry, {"digits": 100}, lambda folder: 1.0)
    for path in (run.folder / "checkpoints").rglob("*.csv"):
        path.unlink()
    gathered(tmp_path)
    given, added = texts(tables(tmp_path)[0])
    assert given[1:] == ["1", *["–"] * 4, "0 / 0", "0", "0", "0.001"]
    assert added[1:] == ["1", "70", "1", "1", "0.001", "0 / 0", "0", "0", "0.001"]


def test_the_words_are_those_of_language_models_and_of_segmentation(tmp_path):
    language = config(
        ("sympy",), {"lorc": {"compressor": "lorc"}, "added": {"like": "lorc", "compensator": "tocom_lm"}},
        train_degrees=[0], learn={"images": 24, "batch_size": 8}, finetune={"epochs": 2, "batch_size": 8},
    )  # fmt: skip
    language["backbones"] = [{"name": "vit", "architecture": "llama"}]
    trained(tmp_path / "text", language, {"sympy": 32}, lambda folder: 1.0)
    gathered(tmp_path / "text")
    serving, each = tables(tmp_path / "text")
    assert texts(serving)[2][2:8] == ["24", "18", "1", "0.001", "32 / 0", "8"]
    assert (serving.header[6], each.header[2]) == ("sequences / labels", "sequences")
    assert "A text is its own label." in serving.caption
    scenes = config(
        ("scenes",), {"tome": {"compressor": "tome_mlp"}}, compare=[], finetune={"epochs": 2, "batch_size": 16}
    )
    trained(tmp_path / "scenes", scenes, {"scenes": 48}, lambda folder: 1.0)
    gathered(tmp_path / "scenes")
    assert texts(tables(tmp_path / "scenes")[0])[0][6:8] == ["48 / 48", "6"]


def test_a_table_of_an_earlier_version_that_is_about_to_be_made_again_is_not_looked_at(tmp_path):
    root = made_up.make(tmp_path, config(("digits",), made_up.TOME))
    (root / "mismatch.csv").write_text("study,loss\n")
    run = Run.read(root)
    assert costs.gather(run) == []
    with pytest.raises(TocomError, match="mismatch.csv lacks the column 'backbone'; make it again with this version"):
        run.mismatch  # noqa: B018
