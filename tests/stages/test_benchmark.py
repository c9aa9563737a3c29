"""`tocom benchmark`: each stage is a true step, the table says what the rows say, and no figure is lost."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.small import ARCHITECTURE, KWARGS, build
from tocom.distillation import distillation_loss
from tocom.errors import TocomError
from tocom.folding import is_folded
from tocom.models import create
from tocom.settings import BenchmarkSettings
from tocom.stages import benchmark as module
from tocom.stages import overheads, throughput, works
from tocom.stages.benchmark import COLUMNS, QUANTITIES, RATIOS, benchmark, table
from tocom.stages.eager import EagerToMe
from tocom.stages.works import STAGES, VARIANTS, Subject
from tocom.training import autocast, inference
from tocom.vit import CompressedViT

CPU = torch.device("cpu")
DEGREES = (0, 4, 6)
QUICK = BenchmarkSettings(batch_size=2, repeats=4, warmup=1, precision="fp32", device="cpu", seconds=1000)
ON_GPU = QUICK.model_copy(update={"device": "cuda"})
FILES = [f"{name}.{kind}" for name in ("benchmark", "overheads") for kind in ("csv", "md", "tex")]
NUMBERS = [name for name in COLUMNS if name.startswith((*QUANTITIES, "memory", "eager_memory"))]
ROW = {"what": "a grid", "ratio": 1.05, "low": 1.04, "high": 1.06, "seconds": 3.0}
SUBJECTS = {
    "classifier": Subject(ARCHITECTURE, KWARGS),
    "segmenter": Subject(ARCHITECTURE, KWARGS, "tome_mlp", head=("conv", 5)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every backbone is one of two blocks and 17 tokens; the machine has no GPU."""
    monkeypatch.setattr(works, "create", lambda name, kwargs: create(ARCHITECTURE, KWARGS | kwargs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "matrix_rate", lambda precision, device: 1e12)
    monkeypatch.setattr(overheads, "measure", lambda settings, device: iter([ROW]))


def run(folder, degrees=DEGREES, settings=QUICK, names=("some_vit",), precisions=("fp32",), training=None):
    return benchmark(folder, names, degrees, precisions, settings, training)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A run whose pieces of work take known times: the folder, its rows and the times."""
    clock = np.random.default_rng(3).uniform(0.001, 0.1, 200)
    ticks = iter(clock)
    monkeypatch.setattr(throughput, "seconds", lambda work, device: next(ticks))
    return tmp_path / "measured", run(tmp_path / "measured"), clock


@pytest.fixture
def quick(monkeypatch):
    """Nothing is run: every degree takes 1 MB, and a second in each round; some (stage, degree) do not fit."""

    def install(*too_large):
        def memory(work, degree, device):
            if (work, degree) in too_large:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1.0

        def times(works, stage, degrees, *_):
            names = VARIANTS[stage]
            return {(name, None if name == "timm" else d): np.ones(4) for name in names for d in degrees}

        works = lambda subject, stage, *_: dict.fromkeys(VARIANTS[stage], stage)  # noqa: E731
        monkeypatch.setattr(module, "_works", works)
        monkeypatch.setattr(module, "_memory_mb", memory)
        monkeypatch.setattr(module, "_times", times)

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


# --- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 4, 6, 50])
@torch.inference_mode()
def test_the_eager_reference_computes_the_same_method(degree):
    model = build(num_classes=10)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = CompressedViT(model).set_degree(degree)(images)
    torch.testing.assert_close(EagerToMe(model, degree)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [{"qk_norm": True}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 1}])
def test_of_another_vit_there_is_no_eager_reference(other):
    with pytest.raises(TocomError, match="of a plain ViT"):
        EagerToMe(build(**other))


def test_variants_of_a_step_have_the_same_gradients():
    for stage in ("fine-tuning", "distillation"):
        gradients = {}
        for variant in ("own", "eager"):
            torch.manual_seed(0)
            work = STAGES[stage](SUBJECTS["classifier"], 6, QUICK, CPU, variant)
            work.set_degree(4)
            torch.manual_seed(1)  # dropout
            work.run()
            gradients[variant] = [p.grad for p in work.module.parameters() if p.grad is not None]
        for own, eager in zip(*gradients.values(), strict=True):
            torch.testing.assert_close(own, eager, rtol=1e-3, atol=1e-5)


def test_weights_that_are_cast_once_give_what_autocast_gives_and_come_back():
    vit = CompressedViT(build(num_classes=10)).set_degree(4)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    with torch.inference_mode(), autocast("bf16", CPU):
        expected = vit(images)
    with inference(vit, "bf16", CPU):
        assert vit.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert torch.equal(vit(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in vit.parameters())


# --- figures ------------------------------------------------------------------------------------------------------


def test_every_stage_and_degree_has_a_row_with_its_conditions(measured):
    folder, frame, _ = measured
    grid = [(stage, degree) for stage in ("fine-tuning", "distillation", "evaluation") for degree in DEGREES]
    assert list(zip(frame.stage, frame.degree, strict=True)) == grid
    assert frame.teacher_degree.fillna(-1).tolist() == [-1] * 3 + [1, 0, 0] + [-1] * 3
    row = frame.iloc[0]
    assert (row.backbone, row.image_size, row.batch_size, row.precision, row.rounds) == ("some_vit", 32, 2, "fp32", 4)
    assert (row.torch, row.device[-8:], {*frame.status}) == (torch.__version__, "1 thread", {"measured"})
    assert sorted(path.name for path in folder.iterdir()) == FILES
    written = pd.read_csv(folder / "benchmark.csv")
    assert tuple(written.columns) == COLUMNS
    numbers = [name for name in NUMBERS if frame[name].notna().any()]
    np.testing.assert_allclose(written[numbers].astype(float), frame[numbers].astype(float), rtol=1e-5)
    assert "| a grid | 1.050 [1.040, 1.060] | 3.00      |" in (folder / "overheads.md").read_text()


def test_ratios_are_medians_over_rounds_of_the_ratio_within_a_round(measured):
    _, frame, clock = measured
    ticks = iter(clock)
    for stage in ("evaluation", "fine-tuning", "distillation"):  # the order in which they are run
        names = [name for name in VARIANTS[stage] if name != "eager fp32"]
        keys = [(name, degree) for name in names for degree in ((None,) if name == "timm" else DEGREES)]
        order, times = np.random.default_rng(0), {key: [] for key in keys}
        for _ in range(QUICK.repeats):
            for number in order.permutation(len(keys)):
                times[keys[number]].append(next(ticks))
        for degree in DEGREES:
            row = frame[(frame.stage == stage) & (frame.degree == degree)].iloc[0]

            def check(name, above, below, row=row, times=times):
                ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
                assert row[name] == pytest.approx((ratios[1] + ratios[2]) / 2)
                assert row[f"{name}_low"] == pytest.approx(ratios[0] + 0.75 * (ratios[1] - ratios[0]))
                assert row[f"{name}_high"] == pytest.approx(ratios[2] + 0.25 * (ratios[3] - ratios[2]))

            own = ("own", degree)
            check("speedup", ("own", 0), own)
            check("over_eager", own, ("eager", degree))
            if stage == "evaluation":
                check("over_timm", own, ("timm", None))
                check("folding", own, ("unfolded", degree))
            whole = frame[(frame.stage == stage) & (frame.degree == 0)].iloc[0]
            assert row.realised == pytest.approx(row.speedup * row.gflops / whole.gflops)
            rates = sorted(QUICK.batch_size / time for time in times[own])
            assert row.images_per_second == pytest.approx((rates[1] + rates[2]) / 2)


def test_the_table_shows_the_numbers_of_the_csv_and_names_the_device(measured):
    folder, rows, _ = measured
    markdown = (folder / "benchmark.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    header = lines[0]
    for cells, (_, row) in zip(lines[2:], rows.iterrows(), strict=True):
        assert cells[:4] == ["some_vit", "fp32", row.stage, str(row.degree)]
        shown = dict(zip(header, cells, strict=True))
        assert float(shown["images/s"].split()[0]) == pytest.approx(row.images_per_second, rel=0.01)
        assert float(shown["speed-up"].split()[0]) == pytest.approx(row.speedup, abs=0.005)
        assert float(shown["time over eager"].split()[0]) == pytest.approx(row.over_eager, abs=0.0005)
        assert float(shown["peak memory (MB)"]) == pytest.approx(row.memory_mb, abs=0.5)
    assert f"Measured on {rows.device[0]} with torch {torch.__version__}" in markdown
    latex = (folder / "benchmark.tex").read_text()
    assert (latex.count("some\\_vit & "), latex.count("\\midrule")) == (9, 3)


def test_precisions_and_the_reference_in_float32(tmp_path, quick):
    quick()
    frame = run(tmp_path, [4], precisions=("fp32", "bf16"), training=())
    assert list(zip(frame.precision, frame.stage, frame.degree, strict=True)) == [
        (precision, "evaluation", degree) for precision in ("fp32", "bf16") for degree in (0, 4)
    ]
    frame = run(tmp_path, [4], precisions=("bf16",))
    assert (frame.over_eager_fp32[frame.stage != "evaluation"] == 1).all()
    assert frame[[*RATIOS][-2:]].isna().all(axis=None)  # captured and compiled: on a GPU alone


def test_what_was_measured_before_a_run_was_stopped_stays(tmp_path, quick, monkeypatch):
    quick()
    measure, calls = module.measure, []

    def stop(*arguments):
        calls.append(arguments[1])
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [4])
    written = pd.read_csv(tmp_path / "benchmark.csv").groupby("stage").status.first()
    assert written.to_dict() == {"evaluation": "measured", "fine-tuning": "not run", "distillation": "not run"}


def test_rounds_end_with_the_time_that_a_group_may_take(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    settings = QUICK.model_copy(update={"repeats": 50})
    rounds = {
        budget: len(throughput.side_by_side({"a": lambda: 0}, settings, CPU, budget=budget)["a"]) for budget in (0, 9)
    }
    assert rounds[0] == throughput.LEAST_ROUNDS < rounds[9] < 50


def test_a_grid_is_timed_over_the_forward_passes_that_it_contains():
    row = overheads.grid(QUICK, CPU, rounds=1, degrees=range(3), images=(8, 16))
    assert 0.5 < row["ratio"] < 50  # so few images: mostly loading the model and counting FLOPs
    assert row["low"] == row["ratio"] == row["high"]


# --- what cannot be measured --------------------------------------------------------------------------------------


def test_a_degree_that_does_not_fit_says_so_and_the_others_are_measured(tmp_path, quick):
    quick(("fine-tuning", 4), ("evaluation", 0))
    frame = run(tmp_path).set_index(["stage", "degree"])
    assert frame.status.value_counts().to_dict() == {"measured": 7, "out of memory": 2}
    assert frame.loc[("fine-tuning", 4), NUMBERS].isna().all()
    assert frame.loc["fine-tuning", 6].speedup == 1
    assert np.isnan(frame.loc["evaluation", 6].speedup)  # its degree 0 is not there
    assert [row[5].text for row in table(frame.reset_index()).rows][-2:] == ["–", "–"]


def test_memory_that_fails_only_while_timing_is_out_of_memory_too(tmp_path, quick, monkeypatch):
    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "side_by_side", too_much)
    frame = run(tmp_path, [0, 4])
    assert {*frame.status} == {"out of memory"}
    assert frame[NUMBERS].isna().all(axis=None)


def test_without_a_gpu_the_whole_grid_says_not_run(tmp_path):
    rows = run(tmp_path, [6, 4, 6], ON_GPU, ["a", "b"])
    assert rows.degree.tolist() == [0, 4, 6] * 6  # 0 is always there to be compared with
    assert {*rows.status} == {"not run"}
    assert rows[[*NUMBERS, "device"]].isna().all(axis=None)
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown.count("| not run ") == 18 * 7
    assert "Not run: torch saw no GPU" in markdown


def test_measured_figures_are_replaced_by_those_of_the_same_device_alone(tmp_path, quick, monkeypatch):
    quick()
    run(tmp_path, [4], ON_GPU)
    for _ in range(2):
        assert {*run(tmp_path, [4]).status} == {"measured"}
    before = [(tmp_path / name).read_bytes() for name in FILES]
    with pytest.raises(TocomError, match=r"measured on .*1 thread, and torch sees no GPU here; .*another --output"):
        run(tmp_path, settings=ON_GPU)
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA something")
    with pytest.raises(TocomError, match="this is NVIDIA something; move them away"):
        run(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in FILES] == before


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_foreign_csv_is_not_written_over(tmp_path, text):
    (tmp_path / "benchmark.csv").write_text(text)
    with pytest.raises(TocomError, match="is no table of `tocom benchmark`"):
        run(tmp_path, [4], ON_GPU)
    assert (tmp_path / "benchmark.csv").read_text() == text


def test_names_that_are_not_known_are_refused(tmp_path):
    for given in ({"precisions": ["bfloat16"]}, {"training": ["some_wit"]}):
        with pytest.raises(TocomError, match="is none of"):
            run(tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


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
        run(tmp_path / "new", degrees, QUICK.model_copy(update=changes))
    assert not (tmp_path / "new").exists()
