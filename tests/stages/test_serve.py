"""`tocom serve-bench`: the queue keeps its books, the choice keeps deadlines, and the table says what the rows say."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small import refusal, tune
from tocom.files import load_arrays
from tocom.jobs import EvaluateJob, ServeJob
from tocom.models import load_model
from tocom.serving import Curve
from tocom.stages.evaluate import evaluate
from tocom.stages.serve import adaptive, arrivals, replay, serve_bench

DEGREES = (0, 2, 4)
#: Times that are known: degree 4 is twice as fast as degree 0.
SECONDS = {0: {1: 0.2, 4: 0.4}, 2: {1: 0.2, 4: 0.3}, 4: {1: 0.1, 4: 0.2}}
PHASES = ((20.0, 0.3), (10.0, 1.6), (20.0, 0.3))
FILES = {"serving.csv", "timeline.csv", "curve.csv", "serving.md", "serving.png", "serving.pdf"}


# --- the queue --------------------------------------------------------------------------------------------------------


def test_requests_are_answered_in_order_in_batches_of_what_waits():
    """Written out: arrivals at 0, 1, 1.5, 2, 2.2, 9; batches of up to 2 take 1.4 seconds."""
    begun = []

    def serve(degree, which):
        begun.append((degree, list(which)))
        return 1.4

    left_at = []
    done = replay(
        np.array([0.0, 1.0, 1.5, 2.0, 2.2, 9.0]),
        3.0,
        2,
        lambda left: left_at.append(left.round(6).tolist()) or 7,
        serve,
    )
    assert begun == [(7, [0]), (7, [1]), (7, [2, 3]), (7, [4]), (7, [5])]
    assert done.finished.round(6).tolist() == [1.4, 2.8, 4.2, 4.2, 5.6, 10.4]
    assert left_at == [[3.0], [2.6], [1.7, 2.2, 2.4], [1.0], [3.0]]
    assert (done.batches, round(done.busy, 6), set(done.degree)) == (5, 7.0, {7})


@given(st.lists(st.floats(0, 50), min_size=1, max_size=60).map(sorted), st.integers(1, 5), st.floats(0.01, 3))
def test_every_request_is_answered_once_after_it_came_and_the_server_never_idles_while_one_waits(times, size, took):
    times, batches = np.array(times), []

    def serve(degree, which):
        batches.append(which)
        return took

    done = replay(times, 1.0, size, lambda left: 0, serve)
    assert [number for batch in batches for number in batch] == list(range(len(times)))
    assert max(map(len, batches)) <= size
    ends = [done.finished[batch.start] for batch in batches]
    starts = np.array(ends) - took
    for number, batch in enumerate(batches):
        came = times[batch.start]
        free = ends[number - 1] if number else 0.0
        assert starts[number] == pytest.approx(max(came, free), abs=1e-9)
    assert done.busy == pytest.approx(took * len(batches))


def test_arrivals_are_those_of_a_poisson_process_whose_rate_changes():
    phases = ((200.0, 5.0), (100.0, 20.0))
    times = arrivals(phases, 0)
    assert np.array_equal(times, arrivals(phases, 0))
    assert not np.array_equal(times[:50], arrivals(phases, 1)[:50])
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 300
    for (start, end), rate in {(0, 200): 5.0, (200, 300): 20.0}.items():
        gaps = np.diff(times[(times >= start) & (times < end)])
        assert gaps.mean() == pytest.approx(1 / rate, rel=0.1)
        assert gaps.std() == pytest.approx(1 / rate, rel=0.1)  # exponential: as large as the mean


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "degree"),
    [
        ([1.0], 0),
        ([0.15], 4),
        ([0.01], 4),  # too late at any degree: the fastest
        ([-1.0, 0.5], 4),
        ([0.5] * 4, 0),
        ([0.5] * 4 + [0.7] * 4, 2),  # two batches within 0.7 seconds: 0.35 each
        ([0.5] * 4 + [0.85] * 4, 0),
        ([0.5] * 4 + [0.9] * 4 + [0.8] * 4, 4),
    ],
    ids=str,
)
def test_the_best_degree_at_which_all_that_waits_is_in_time_is_chosen(left, degree):
    assert adaptive(Curve(SECONDS), 4)(np.array(left)) == degree


def test_under_a_burst_the_choice_keeps_the_deadlines_that_the_lowest_degree_misses_and_relaxes_afterwards():
    curve, times = Curve(SECONDS), arrivals([(length, 10 * load) for length, load in PHASES], 0)

    def run(choose):
        return replay(times, 1.2, 4, choose, lambda degree, which: curve.time(degree, len(which)))

    lowest, highest, chosen = run(lambda left: 0), run(lambda left: 4), run(adaptive(curve, 4))
    met = [float((it.finished - it.arrived <= 1.2).mean()) for it in (lowest, highest, chosen)]
    assert met[0] < 0.9
    assert min(met[1:]) > 0.99
    burst = (times > 22) & (times < 30)
    assert chosen.degree[burst].mean() > 2
    assert chosen.degree[~burst].mean() < 0.5


def test_validation_scores_say_which_degree_is_best():
    scores = {0: 0.7, 2: 0.9, 4: 0.8}
    assert [adaptive(Curve(SECONDS, scores), 4)(np.array([left])) for left in (1.0, 0.15)] == [2, 4]


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(backbone, digits, tmp_path_factory):
    return tune(backbone, digits, tmp_path_factory.mktemp("tuned"), "0", settings={"epochs": 4})[0]


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    path = tmp_path_factory.mktemp("curve") / "curve.csv"
    Curve(SECONDS).write(path)
    return path


def run(checkpoint, digits, compensator, output, curve=None, **settings):
    settings = {"phases": PHASES, "batch_size": 4, "seeds": (0, 1), "repeats": 2} | settings
    job = {"degrees": DEGREES, "settings": settings, "evaluate": {"scales": (0, 1), "device": "cpu"}}
    rows = serve_bench(ServeJob.model_validate(job), checkpoint, digits, {"tocom": compensator}, output, curve)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def on_paper(checkpoint, digits, compensator, curve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_paper")
    return run(checkpoint, digits, compensator, folder, curve), folder


def test_there_is_a_row_for_each_policy_compensator_and_seed_of_the_same_requests(on_paper):
    rows, folder = on_paper
    assert {path.name for path in folder.iterdir()} == FILES
    assert len(rows) == 2 * 2 * 4
    assert list(rows.policy.unique()) == ["0", "2", "4", "adaptive"]
    assert list(rows.compensator.unique()) == ["none", "tocom"]
    assert (rows.groupby("seed").requests.nunique() == 1).all()
    assert np.allclose((rows.deadline_ms, rows.capacity), [[1200.0], [10.0]])
    assert Curve.read(folder / "curve.csv") == Curve(SECONDS)


def test_the_figures_of_a_row_fit_together(on_paper):
    rows, _ = on_paper
    assert (rows.right_in_time <= np.minimum(rows.met, rows.accuracy)).all()
    assert (rows.right_in_time >= rows.met + rows.accuracy - 1 - 1e-12).all()
    assert (rows.busy <= 1).all()
    assert (rows.p50_ms <= rows.p99_ms).all()
    fixed = rows[rows.policy != "adaptive"]
    assert (fixed.mean_degree == fixed.policy.astype(float)).all()
    assert rows[rows.policy == "0"].met.max() < 0.9


def test_accuracy_is_that_of_the_cells_at_the_degrees_that_were_run(
    on_paper, checkpoint, digits, compensator, tmp_path
):
    """A fixed degree answers drawn test images: its accuracy tends to that of the cell."""
    rows, _ = on_paper
    job = EvaluateJob.model_validate(
        {
            "methods": {"none": {"infer_degrees": DEGREES}, "tocom": {"infer_degrees": DEGREES, "compensated": True}},
            "settings": {"scales": (0, 1), "device": "cpu"},
        }
    )
    cells = evaluate(job, checkpoint, digits, {"tocom": compensator}, tmp_path / "predictions")
    arrays, _ = load_arrays(tmp_path / "predictions")
    for cell, predicted in zip(cells, arrays["predictions"], strict=True):
        accuracy = (predicted == arrays["labels"]).mean()
        of_it = rows[(rows.compensator == cell["method"]) & (rows.policy == str(cell["infer_degree"]))]
        error = 4 * np.sqrt(accuracy * (1 - accuracy) / of_it.requests.min())
        assert of_it.accuracy.to_numpy() == pytest.approx(accuracy, abs=error)


def test_the_table_and_the_figure_say_what_the_rows_say(on_paper):
    rows, folder = on_paper
    text = (folder / "serving.md").read_text()
    of = rows[(rows.compensator == "tocom") & (rows.policy == "adaptive")]
    line = next(line for line in text.splitlines() if "with tocom" in line and "adaptive" in line)
    assert f"{100 * of.met.mean():.1f} ± {100 * of.met.std():.1f}" in line
    assert f"{of.mean_degree.mean():.1f}" in line
    means = rows.groupby(["compensator", "policy"]).right_in_time.mean()
    assert text.count("**") == 2 * (means == means.max()).sum()
    assert f"**{100 * means.max():.1f} ±" in text
    assert "within 1200.0 ms" in text
    assert "10 images/s" in text
    assert "20 s at 0.3; 10 s at 1.6; 20 s at 0.3" in text
    assert "nothing was timed" in text
    assert (folder / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_curve_gives_the_same_bytes(on_paper, checkpoint, digits, compensator, curve, tmp_path):
    _, folder = on_paper
    run(checkpoint, digits, compensator, tmp_path, folder / "curve.csv")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_batches_are_computed_and_their_time_moves_the_clock(checkpoint, digits, compensator, tmp_path):
    phases = ((0.03, 0.5), (0.02, 1.5))
    rows = run(checkpoint, digits, compensator, tmp_path, seeds=(0,), phases=phases)
    assert set(rows.times) == {"computed"}
    assert (rows.p50_ms > 0).all()
    model, _ = load_model(checkpoint)
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert rows.model_mb.to_numpy() == pytest.approx(whole / 1e6)
    plain, compensated = (rows[rows.compensator == name].degree_mb for name in ("none", "tocom"))
    assert (plain == 0).all()
    assert (compensated < rows.model_mb.max()).all()
    assert "MB of the model; to switch to it takes" in (tmp_path / "serving.md").read_text()
    curve = Curve.read(tmp_path / "curve.csv")
    assert {degree: set(sizes) for degree, sizes in curve.seconds.items()} == dict.fromkeys(DEGREES, {1, 2, 4})
    assert rows.capacity.to_numpy() == pytest.approx(4 / curve.time(0, 4))


def test_a_curve_that_was_measured_gives_what_the_same_curve_from_its_file_gives(
    checkpoint, digits, compensator, tmp_path
):
    short = {"seeds": (0,), "phases": ((0.03, 0.5), (0.02, 1.5))}
    measured = run(checkpoint, digits, compensator, tmp_path / "a", times="curve", **short)
    assert set(measured.times) == {"curve"}
    again = run(checkpoint, digits, compensator, tmp_path / "b", tmp_path / "a" / "curve.csv", **short)
    same = [column for column in again.columns if column != "times"]
    pd.testing.assert_frame_equal(measured[same], again[same])


def test_what_cannot_be_replayed_is_refused_before_anything_is_written(
    checkpoint, backbone, digits, compensator, curve, tmp_path
):
    output = tmp_path / "out"

    def refused(checkpoint=checkpoint, name="tocom", degrees=DEGREES, curve=curve, **settings):
        job = {"degrees": degrees, "settings": settings, "evaluate": {"scales": (0, 1), "device": "cpu"}}
        job = ServeJob.model_validate(job)
        return refusal(serve_bench, job, checkpoint, digits, {name: compensator}, output, curve)

    assert "no degree 3" in refused(degrees=(0, 3))
    assert "no request arrives" in refused(phases=((1e-9, 0.1),))
    assert "'none', which stands for none" in refused(name="none")
    random, _ = tune(backbone, digits, tmp_path, "random", tuning={"kind": "full", "degree": "random"})
    assert "no one degree" in refused(random)
    assert not output.exists()
