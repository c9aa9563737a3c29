"""`tocom benchmark`: each stage is a true step, the table says what the rows say, and no figure is lost."""

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tests.small import ARCHITECTURE, KWARGS
from tocom.cli import app
from tocom.compensator import is_folded
from tocom.errors import TocomError
from tocom.models import create
from tocom.settings import BenchmarkSettings
from tocom.stages import benchmark as module
from tocom.stages import throughput
from tocom.stages.benchmark import COLUMNS, benchmark, table
from tocom.stages.distil import distillation_loss

CPU = torch.device("cpu")
DEGREES = (0, 4, 6)
QUICK = BenchmarkSettings(batch_size=2, repeats=4, warmup=1, precision="fp32", device="cpu")
ON_GPU = QUICK.model_copy(update={"device": "cuda"})
FILES = ["benchmark.csv", "benchmark.md", "benchmark.tex"]
NUMBERS = [name for name in COLUMNS if name.startswith(("images_per", "speedup", "memory"))]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every backbone is one of two blocks and 17 tokens; the machine has no GPU."""
    monkeypatch.setattr(module, "create", lambda name, kwargs: create(ARCHITECTURE, KWARGS | kwargs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run whose pieces of work take known times: the folder and its rows."""
    folder, patch = tmp_path_factory.mktemp("measured"), pytest.MonkeyPatch()
    patch.setattr(module, "create", lambda name, kwargs: create(ARCHITECTURE, KWARGS | kwargs))
    clock = np.random.default_rng(3).uniform(0.001, 0.1, 100)
    ticks = iter(clock)
    patch.setattr(throughput, "seconds", lambda work, device: next(ticks))
    frame = benchmark(folder, ["some_vit"], DEGREES, QUICK)
    patch.undo()
    return folder, frame, clock


@pytest.fixture
def quick(monkeypatch):
    """Nothing is run: every degree takes 1 MB, and a second in each round; some (stage, degree) do not fit."""
    stages = {function: stage for stage, function in module.STAGES.items()}

    def install(*too_large):
        def memory(make, degree, device):
            if (stages[make.func], degree) in too_large:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1.0

        monkeypatch.setattr(module, "_memory_mb", memory)
        monkeypatch.setattr(module, "_times", lambda make, degrees, *_: dict.fromkeys(degrees, np.ones(4)))

    return install


def make(stage, degree):
    torch.manual_seed(0)
    job = module.STAGES[stage](ARCHITECTURE, 6, QUICK, CPU)
    job.set_degree(degree)
    return job


def changed(job):
    """Return the names of the parameters and buffers that one step changes."""
    before = {name: tensor.clone() for name, tensor in job.module.state_dict().items()}
    job.work()
    return {name for name, tensor in job.module.state_dict().items() if not torch.equal(tensor, before[name])}


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", DEGREES)
def test_a_fine_tuning_step_changes_every_weight(degree):
    job = make("fine-tuning", degree)
    assert job.module.degree == degree
    job.work()
    # The class and position embeddings start near zero, biases at zero: all of them have moved after two steps.
    assert changed(job) == set(dict(job.module.named_parameters()))


@pytest.mark.parametrize("degree", DEGREES)
def test_a_distillation_step_changes_the_compensator_alone(degree):
    job = make("distillation", degree)
    assert changed(job) == {"compensator.down", "compensator.up"}


@pytest.mark.parametrize(("degree", "teacher"), [(0, 1), (4, 0), (6, 0)])
def test_the_distillation_step_learns_the_gap_between_two_degrees_that_differ(degree, teacher):
    distiller = make("distillation", degree).module.eval()
    assert (distiller.teacher.degree, distiller.student.degree) == (teacher, degree)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loss = distiller(images)
    for vit in (distiller.teacher, distiller.student):
        vit.set_live_update(None)
    # An independent way to the same loss: the student's model with the update folded into its weights.
    expected = distiller.teacher(images)
    student = distiller.student
    student.source_degree = teacher
    torch.testing.assert_close(loss, distillation_loss(expected, student.attach(distiller.compensator)(images)))
    distiller.set_degrees(teacher, degree)(images).backward()
    reached = distiller.compensator.up.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [min(teacher, degree) <= step < max(teacher, degree) for step in range(6)]


def test_an_evaluation_has_tocom_folded_in_and_changes_nothing():
    job = make("evaluation", 4)
    assert is_folded(job.module.model)
    assert job.module.degree == 4
    assert not job.module.training
    assert changed(job) == set()
    job.set_degree(0)
    assert not is_folded(job.module.model)  # at the degree that the model was trained at, there is nothing to add


def test_memory_is_that_of_the_weights_the_optimizer_and_the_gradients_at_least(measured):
    memory = measured[1].set_index(["stage", "degree"]).memory_mb
    vit = make("fine-tuning", 0).module
    weights = sum(parameter.nbytes for parameter in vit.parameters()) / 1e6
    images = 2 * 3 * 32 * 32 * 4 / 1e6
    assert 4 * weights + images < memory["fine-tuning", 0] < 20 * weights  # AdamW keeps two numbers for each weight
    assert weights + images < memory["evaluation", 0] < memory["distillation", 0] < memory["fine-tuning", 0] + weights


def test_peak_memory_counts_what_is_held_and_the_largest_sum_of_what_comes_and_goes():
    held = torch.zeros(250_000)

    def work():
        first = torch.zeros(1_000_000)
        del first
        second, third = torch.zeros(500_000), torch.zeros(750_000)
        return second, third

    assert throughput.peak_memory_mb_of(work, CPU, held) == pytest.approx(1 + 5)


# --- figures ------------------------------------------------------------------------------------------------------


def test_degree_0_is_always_there_to_be_compared_with(tmp_path):
    assert benchmark(tmp_path, ["some_vit"], [6, 4, 6], ON_GPU).degree.tolist() == [0, 4, 6] * 3


def test_every_stage_and_degree_has_a_row_with_its_conditions(measured):
    folder, frame, _ = measured
    assert tuple(frame.columns) == COLUMNS
    grid = [(stage, degree) for stage in ("fine-tuning", "distillation", "evaluation") for degree in DEGREES]
    assert list(zip(frame.stage, frame.degree, strict=True)) == grid
    assert frame.teacher_degree.astype(object).where(frame.teacher_degree.notna(), None).tolist() == (
        [None] * 3 + [1, 0, 0] + [None] * 3
    )
    assert frame[NUMBERS].notna().all(axis=None)
    assert {*frame.status} == {"measured"}
    row = frame.iloc[0]
    assert (row.backbone, row.image_size, row.batch_size, row.precision) == ("some_vit", 32, 2, "fp32")
    assert row.torch == torch.__version__
    assert row.device.endswith("1 thread")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    written = pd.read_csv(folder / "benchmark.csv")
    np.testing.assert_array_equal(written[NUMBERS], frame[NUMBERS])


def test_ratios_are_medians_over_rounds_of_the_ratio_within_a_round(measured):
    _, frame, clock = measured
    order, ticks = np.random.default_rng(0), iter(clock)
    for number, stage in enumerate(("fine-tuning", "distillation", "evaluation")):
        order = np.random.default_rng(0)  # every stage has rounds of its own, in the same order
        times = {degree: [] for degree in DEGREES}
        for _ in range(QUICK.repeats):
            for degree in order.permutation(DEGREES):
                times[int(degree)].append(next(ticks))
        for place, degree in enumerate(DEGREES):
            row = frame.iloc[3 * number + place]
            assert (row.stage, row.degree) == (stage, degree)
            ratios = sorted(zero / own for zero, own in zip(times[0], times[degree], strict=True))
            assert row.speedup == pytest.approx((ratios[1] + ratios[2]) / 2)
            assert row.speedup_low == pytest.approx(ratios[0] + 0.75 * (ratios[1] - ratios[0]))
            assert row.speedup_high == pytest.approx(ratios[2] + 0.25 * (ratios[3] - ratios[2]))
            rates = sorted(QUICK.batch_size / own for own in times[degree])
            assert row.images_per_second == pytest.approx((rates[1] + rates[2]) / 2)
            assert row.images_per_second_low <= row.images_per_second <= row.images_per_second_high


def test_the_table_shows_the_numbers_of_the_csv_and_names_the_device(measured):
    folder, _, _ = measured
    markdown = (folder / "benchmark.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"][2:]
    rows = pd.read_csv(folder / "benchmark.csv")
    for cells, (_, row) in zip(lines, rows.iterrows(), strict=True):
        assert cells[:3] == ["some_vit", row.stage, str(row.degree)]
        assert float(cells[3].split()[0]) == pytest.approx(row.images_per_second, rel=0.01)
        assert float(cells[4].split("×")[0]) == pytest.approx(row.speedup, abs=0.005)
        assert float(cells[5]) == pytest.approx(row.memory_mb, abs=0.5)
    assert f"Measured on {rows.device[0]} with torch {torch.__version__}" in markdown
    assert "batches of 2 random images of 32 × 32 pixels, fp32" in markdown
    latex = (folder / "benchmark.tex").read_text()
    assert latex.count("some\\_vit & ") == 9
    assert latex.count("\\midrule") == 3


def test_each_degree_really_works_at_that_degree_and_in_that_precision_in_every_round(monkeypatch):
    seen, real = [], module.inference_work

    def watched(vit, images, precision):
        work = real(vit, images, precision)
        return lambda: seen.append((vit.degree, is_folded(vit.model), precision)) or work()

    monkeypatch.setattr(module, "inference_work", watched)
    figures = module.measure("some_vit", "evaluation", [0, 4], QUICK.model_copy(update={"precision": "bf16"}), CPU)
    assert all(each["images_per_second"] > 0 for each in figures)
    each = 2 + QUICK.warmup + QUICK.repeats  # twice for the memory
    assert sorted(seen) == [(0, False, "bf16")] * each + [(4, True, "bf16")] * each


# --- what cannot be measured --------------------------------------------------------------------------------------


def test_a_degree_that_does_not_fit_says_so_and_the_others_are_measured(tmp_path, quick):
    quick(("fine-tuning", 4))
    frame = benchmark(tmp_path, ["some_vit"], DEGREES, QUICK).set_index(["stage", "degree"])
    assert frame.status.value_counts().to_dict() == {"measured": 8, "out of memory": 1}
    lost = frame.loc["fine-tuning", 4]
    assert lost.status == "out of memory"
    assert lost[NUMBERS].isna().all()
    assert frame.loc["fine-tuning", 6].speedup == 1
    line = next(line for line in (tmp_path / "benchmark.md").read_text().splitlines() if "| 4 " in line)
    assert line.count("out of memory") == 3


def test_without_its_degree_0_a_stage_has_no_ratios(tmp_path, quick):
    quick(*((stage, 0) for stage in module.STAGES))
    frame = benchmark(tmp_path, ["some_vit"], [0, 4], QUICK)
    assert frame.status.tolist() == ["out of memory", "measured"] * 3
    assert frame.speedup.isna().all()
    assert [row[4].text for row in table(frame).rows] == ["out of memory", "–"] * 3


def test_memory_that_fails_only_while_timing_is_out_of_memory_too(tmp_path, quick, monkeypatch):
    quick()

    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_times", too_much)
    frame = benchmark(tmp_path, ["some_vit"], [0, 4], QUICK)
    assert {*frame.status} == {"out of memory"}
    assert frame[NUMBERS].isna().all(axis=None)


def test_without_a_gpu_the_whole_grid_says_not_run(tmp_path):
    result = CliRunner().invoke(app, ["benchmark", "--output", str(tmp_path)])
    assert result.exit_code == 0
    line = f"{tmp_path}/benchmark.md: of 18 lines, 18 not run; torch sees no GPU for --device cuda\n"
    assert result.stderr == line
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    rows = pd.read_csv(tmp_path / "benchmark.csv")
    assert [*rows.backbone.unique()] == ["deit_small_patch16_224", "deit_base_patch16_224"]
    assert rows.degree.tolist() == [0, 8, 16] * 6
    assert {*rows.status} == {"not run"}
    assert rows[[*NUMBERS, "device"]].isna().all(axis=None)
    assert {*rows.precision} == {"bf16"}
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown.count("| not run ") == 18 * 3
    assert "Not run: torch saw no GPU" in markdown
    assert (tmp_path / "benchmark.tex").read_text().count("not run & not run & not run") == 18


def test_figures_replace_not_run_and_older_ones_of_the_same_device(tmp_path, quick):
    quick()
    benchmark(tmp_path, ["some_vit"], [4], ON_GPU)
    before = (tmp_path / "benchmark.csv").read_bytes()
    benchmark(tmp_path, ["some_vit"], [4], ON_GPU)
    assert (tmp_path / "benchmark.csv").read_bytes() == before
    assert {*benchmark(tmp_path, ["some_vit"], [4], QUICK).status} == {"measured"}
    quick(("evaluation", 4))
    benchmark(tmp_path, ["some_vit"], [4], QUICK)
    assert "out of memory" in (tmp_path / "benchmark.csv").read_text()


def test_measured_figures_are_not_replaced_by_not_run_or_by_another_device(tmp_path, measured, monkeypatch):
    folder, frame, _ = measured
    for name in FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(TocomError, match=r"measured on .*1 thread, and torch sees no GPU here; .*another --output"):
        benchmark(tmp_path, ["some_vit"], DEGREES, ON_GPU)
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA something")
    with pytest.raises(TocomError, match="this is NVIDIA something; move them away"):
        benchmark(tmp_path, ["some_vit"], DEGREES, QUICK)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_foreign_csv_is_not_written_over(tmp_path, text):
    (tmp_path / "benchmark.csv").write_text(text)
    with pytest.raises(TocomError, match="is no table of `tocom benchmark`"):
        benchmark(tmp_path, ["some_vit"], [4], ON_GPU)
    assert (tmp_path / "benchmark.csv").read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp8"], "'fp8'"),
        (["--batch-size", "0"], "batch_size"),
        (["--degree", "-1"], "-1"),
        (["--image-size", "33"], "image size 33 is no multiple of the 8-pixel patches; use 32"),
        (["--device", "cudo"], "unknown device 'cudo'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(tmp_path, options, message):
    result = CliRunner().invoke(app, ["benchmark", "--output", str(tmp_path / "new"), *options])
    assert isinstance(result.exception, TocomError)
    assert message in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_an_unknown_backbone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "create", create)
    with pytest.raises(TocomError, match="deit_smal_patch16_224.*deit_small_patch16_224"):
        benchmark(tmp_path, ["deit_smal_patch16_224"], [4], ON_GPU)
