"""`tocom benchmark`: each stage is a true step, the table says what the rows say, and no figure is lost."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.small import ARCHITECTURE, KWARGS
from tocom.distillation import distillation_loss
from tocom.errors import TocomError
from tocom.folding import is_folded
from tocom.models import create
from tocom.settings import BenchmarkSettings
from tocom.stages import benchmark as module
from tocom.stages import throughput, works
from tocom.stages.benchmark import COLUMNS, benchmark, table
from tocom.stages.works import STAGES, Subject

CPU = torch.device("cpu")
DEGREES = (0, 4, 6)
QUICK = BenchmarkSettings(batch_size=2, repeats=4, warmup=1, precision="fp32", device="cpu")
ON_GPU = QUICK.model_copy(update={"device": "cuda"})
FILES = ["benchmark.csv", "benchmark.md", "benchmark.tex"]
NUMBERS = [name for name in COLUMNS if name.startswith(("images_per", "speedup", "memory"))]
SUBJECTS = {
    "classifier": Subject(ARCHITECTURE, KWARGS),
    "segmenter": Subject(ARCHITECTURE, KWARGS, "tome_mlp", head=("conv", 5)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every backbone is one of two blocks and 17 tokens; the machine has no GPU."""
    monkeypatch.setattr(works, "create", lambda name, kwargs: create(ARCHITECTURE, KWARGS | kwargs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A run whose pieces of work take known times: the folder, its rows and the times."""
    clock = np.random.default_rng(3).uniform(0.001, 0.1, 100)
    ticks = iter(clock)
    monkeypatch.setattr(throughput, "seconds", lambda work, device: next(ticks))
    return tmp_path / "measured", benchmark(tmp_path / "measured", ["some_vit"], DEGREES, QUICK), clock


@pytest.fixture
def quick(monkeypatch):
    """Nothing is run: every degree takes 1 MB, and a second in each round; some (stage, degree) do not fit."""
    stages = {function: stage for stage, function in STAGES.items()}

    def install(*too_large):
        def memory(make, degree, device):
            if (stages[make.func], degree) in too_large:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1.0

        monkeypatch.setattr(module, "_memory_mb", memory)
        monkeypatch.setattr(
            module, "round_seconds", lambda subject, stage, degrees, *_: dict.fromkeys(degrees, np.ones(4))
        )

    return install


def make(stage, degree, subject="classifier"):
    torch.manual_seed(0)
    work = STAGES[stage](SUBJECTS[subject], 6, QUICK, CPU)
    work.set_degree(degree)
    return work


def changed(work):
    """Return the names of the parameters and buffers that one step changes."""
    before = {name: tensor.clone() for name, tensor in work.module.state_dict().items()}
    work.run()
    return {name for name, tensor in work.module.state_dict().items() if not torch.equal(tensor, before[name])}


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_fine_tuning_step_changes_every_weight(subject):
    work = make("fine-tuning", 4, subject)
    work.run()
    # The class and position embeddings start near zero, biases at zero: all of them have moved after two steps.
    assert changed(work) == set(dict(work.module.named_parameters()))


@pytest.mark.parametrize(("degree", "teacher"), [(0, 1), (4, 0), (6, 0)])
def test_a_distillation_step_learns_the_gap_between_two_degrees_that_differ(degree, teacher):
    work = make("distillation", degree)
    objective = work.module.eval()
    assert (objective.teacher.degree, objective.student.degree) == (teacher, degree)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loss, expected = objective(images), objective.teacher(images)
    # An independent way to the same loss: a student without branches, the update folded into its weights.
    student = SUBJECTS["classifier"].vit(CPU).eval()
    student.load_state_dict(objective.student.state_dict())
    student.source_degree = teacher
    student.attach(objective.compensator).set_degree(degree)
    torch.testing.assert_close(loss, distillation_loss(expected, student(images)))
    assert {name.partition(".")[0] for name in changed(work)} == {"compensator"}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_evaluation_has_the_compensator_folded_in_and_changes_nothing(subject):
    work = make("evaluation", 4, subject)
    vit = getattr(work.module, "vit", work.module)
    assert is_folded(vit.model)
    assert (vit.degree, work.module.training, changed(work)) == (4, False, set())
    work.set_degree(0)
    assert not is_folded(vit.model)  # at the degree that the model was trained at, there is nothing to add


def test_memory_is_that_of_the_weights_the_optimizer_and_the_gradients_at_least(measured):
    memory = measured[1].set_index(["stage", "degree"]).memory_mb
    weights = sum(parameter.nbytes for parameter in make("fine-tuning", 0).module.parameters()) / 1e6
    images = 2 * 3 * 32 * 32 * 4 / 1e6
    assert 4 * weights + images < memory["fine-tuning", 0] < 20 * weights  # AdamW keeps two numbers for each weight
    assert weights + images < memory["evaluation", 0] < memory["distillation", 0] < memory["fine-tuning", 0] + weights


def test_peak_memory_counts_what_is_held_and_the_largest_sum_of_what_comes_and_goes():
    def work():
        first = torch.zeros(1_000_000)
        del first
        second, third = torch.zeros(500_000), torch.zeros(750_000)
        return second, third

    assert throughput.peak_memory_mb(work, CPU, torch.zeros(250_000)) == pytest.approx(1 + 5)


# --- figures ------------------------------------------------------------------------------------------------------


def test_every_stage_and_degree_has_a_row_with_its_conditions(measured):
    folder, frame, _ = measured
    grid = [(stage, degree) for stage in ("fine-tuning", "distillation", "evaluation") for degree in DEGREES]
    assert list(zip(frame.stage, frame.degree, strict=True)) == grid
    assert frame.teacher_degree.fillna(-1).tolist() == [-1] * 3 + [1, 0, 0] + [-1] * 3
    row = frame.iloc[0]
    assert (row.backbone, row.image_size, row.batch_size, row.precision) == ("some_vit", 32, 2, "fp32")
    assert (row.torch, row.device[-8:], {*frame.status}) == (torch.__version__, "1 thread", {"measured"})
    assert sorted(path.name for path in folder.iterdir()) == FILES
    written = pd.read_csv(folder / "benchmark.csv")
    assert tuple(written.columns) == COLUMNS
    np.testing.assert_array_equal(written[NUMBERS], frame[NUMBERS])


def test_ratios_are_medians_over_rounds_of_the_ratio_within_a_round(measured):
    _, frame, clock = measured
    ticks = iter(clock)
    for number in range(3):
        order = np.random.default_rng(0)  # every stage has rounds of its own, in the same order
        times = {degree: [] for degree in DEGREES}
        for _ in range(QUICK.repeats):
            for degree in order.permutation(DEGREES):
                times[int(degree)].append(next(ticks))
        for place, degree in enumerate(DEGREES):
            row = frame.iloc[3 * number + place]
            ratios = sorted(zero / own for zero, own in zip(times[0], times[degree], strict=True))
            assert row.speedup == pytest.approx((ratios[1] + ratios[2]) / 2)
            assert row.speedup_low == pytest.approx(ratios[0] + 0.75 * (ratios[1] - ratios[0]))
            assert row.speedup_high == pytest.approx(ratios[2] + 0.25 * (ratios[3] - ratios[2]))
            rates = sorted(QUICK.batch_size / own for own in times[degree])
            assert row.images_per_second == pytest.approx((rates[1] + rates[2]) / 2)


def test_the_table_shows_the_numbers_of_the_csv_and_names_the_device(measured):
    folder, rows, _ = measured
    markdown = (folder / "benchmark.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"][2:]
    for cells, (_, row) in zip(lines, rows.iterrows(), strict=True):
        assert cells[:3] == ["some_vit", row.stage, str(row.degree)]
        assert float(cells[3].split()[0]) == pytest.approx(row.images_per_second, rel=0.01)
        assert float(cells[4].split("×")[0]) == pytest.approx(row.speedup, abs=0.005)
        assert float(cells[5]) == pytest.approx(row.memory_mb, abs=0.5)
    assert f"Measured on {rows.device[0]} with torch {torch.__version__}" in markdown
    latex = (folder / "benchmark.tex").read_text()
    assert (latex.count("some\\_vit & "), latex.count("\\midrule")) == (9, 3)


# --- what cannot be measured --------------------------------------------------------------------------------------


def test_a_degree_that_does_not_fit_says_so_and_the_others_are_measured(tmp_path, quick):
    quick(("fine-tuning", 4), ("evaluation", 0))
    frame = benchmark(tmp_path, ["some_vit"], DEGREES, QUICK).set_index(["stage", "degree"])
    assert frame.status.value_counts().to_dict() == {"measured": 7, "out of memory": 2}
    assert frame.loc[("fine-tuning", 4), NUMBERS].isna().all()
    assert frame.loc["fine-tuning", 6].speedup == 1
    assert np.isnan(frame.loc["evaluation", 6].speedup)  # its degree 0 is not there
    assert [row[4].text for row in table(frame.reset_index()).rows][-2:] == ["–", "–"]


def test_memory_that_fails_only_while_timing_is_out_of_memory_too(tmp_path, quick, monkeypatch):
    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(works, "side_by_side", too_much)
    frame = benchmark(tmp_path, ["some_vit"], [0, 4], QUICK)
    assert {*frame.status} == {"out of memory"}
    assert frame[NUMBERS].isna().all(axis=None)


def test_without_a_gpu_the_whole_grid_says_not_run(tmp_path):
    rows = benchmark(tmp_path, ["a", "b"], [6, 4, 6], ON_GPU)
    assert rows.degree.tolist() == [0, 4, 6] * 6  # 0 is always there to be compared with
    assert {*rows.status} == {"not run"}
    assert rows[[*NUMBERS, "device"]].isna().all(axis=None)
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown.count("| not run ") == 18 * 3
    assert "Not run: torch saw no GPU" in markdown


def test_measured_figures_are_replaced_by_those_of_the_same_device_alone(tmp_path, quick, monkeypatch):
    quick()
    benchmark(tmp_path, ["some_vit"], [4], ON_GPU)
    for _ in range(2):
        assert {*benchmark(tmp_path, ["some_vit"], [4], QUICK).status} == {"measured"}
    before = [(tmp_path / name).read_bytes() for name in FILES]
    with pytest.raises(TocomError, match=r"measured on .*1 thread, and torch sees no GPU here; .*another --output"):
        benchmark(tmp_path, ["some_vit"], DEGREES, ON_GPU)
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA something")
    with pytest.raises(TocomError, match="this is NVIDIA something; move them away"):
        benchmark(tmp_path, ["some_vit"], DEGREES, QUICK)
    assert [(tmp_path / name).read_bytes() for name in FILES] == before


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_foreign_csv_is_not_written_over(tmp_path, text):
    (tmp_path / "benchmark.csv").write_text(text)
    with pytest.raises(TocomError, match="is no table of `tocom benchmark`"):
        benchmark(tmp_path, ["some_vit"], [4], ON_GPU)
    assert (tmp_path / "benchmark.csv").read_text() == text


@pytest.mark.parametrize(
    ("degrees", "changes", "message"),
    [
        ([-1], {}, "-1"),
        ([4], {"image_size": 33}, "image size 33 is no multiple of the 8-pixel patches; use 32"),
        ([4], {"device": "cudo"}, "unknown device 'cudo'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(tmp_path, degrees, changes, message):
    with pytest.raises(TocomError, match=message):
        benchmark(tmp_path / "new", ["some_vit"], degrees, QUICK.model_copy(update=changes))
    assert not (tmp_path / "new").exists()
