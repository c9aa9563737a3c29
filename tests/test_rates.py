"""Measured rates: what is written is read back, and what lies between is interpolated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.small import ARCHITECTURE, KWARGS
from tocom.errors import TocomError
from tocom.rates import Head, Rate, Rates, default_batch, device_name, label, measure, read_rates, write_rates
from tocom.rates import _median_time as median_time

SMALL = {key: value for key, value in KWARGS.items() if key != "img_size"}


def rate(degree, images_per_second, mode="infer", device="a device"):
    return Rate("vit", 32, "tome", "fp32", device, degree, mode, images_per_second)


def seconds(rates, degrees, mode="infer", **other):
    conditions = {"architecture": "vit", "image_size": 32, "compressor": "tome", "precision": "fp32"} | other
    return Rates(rates).seconds(mode=mode, degrees=degrees, **conditions)


def test_time_is_interpolated_between_measured_degrees_and_kept_beyond_them():
    rates = [rate(8, 1 / 3), rate(2, 1 / 9), rate(4, 1 / 7), rate(2, 1.0, mode="train")]
    assert seconds(rates, [2]) == pytest.approx(9)
    assert seconds(rates, [3]) == pytest.approx(8)
    assert seconds(rates, [6]) == pytest.approx(5)
    assert seconds(rates, [0, 20]) == pytest.approx((9 + 3) / 2)
    assert seconds(rates, [3], mode="train") == pytest.approx(1)


@given(st.lists(st.integers(0, 16), min_size=1), st.floats(0.5, 10), st.floats(0, 0.02))
def test_the_mean_over_degrees_is_that_of_a_linear_time(degrees, start, slope):
    rates = [rate(degree, 1 / (start - slope * degree)) for degree in (0, 8, 16)]
    assert seconds(rates, degrees) == pytest.approx(np.mean([start - slope * degree for degree in degrees]))


def test_a_rate_that_was_not_measured_is_named():
    with pytest.raises(TocomError, match=r"no rate of vit \(train, 32 pixels, tome, fp32\) was measured on a device"):
        seconds([rate(0, 1)], [0], mode="train")
    with pytest.raises(TocomError, match="no rate of vit .*bf16"):
        seconds([rate(0, 1)], [0], precision="bf16")


def test_rates_of_several_devices_are_not_mixed():
    with pytest.raises(TocomError, match="several devices"):
        Rates([rate(0, 1), rate(2, 1, device="another")])


def test_rates_read_back_as_they_were_written(tmp_path):
    rates = [rate(0, 1 / 3), Rate("vit(depth=2)", 224, "evit", "bf16", "GPU, 80 GB", 16, "train", 1234.5)]
    write_rates(rates, tmp_path / "rates.csv")
    assert read_rates(tmp_path / "rates.csv") == rates
    assert (
        (tmp_path / "rates.csv")
        .read_text()
        .startswith("architecture,image_size,compressor,precision,device,degree,mode,images_per_second\nvit,32,")
    )


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("degree", "level", "lacks the column 'degree'"),
        ("infer", "idle", r"row 1 is no rate \(idle"),
        ("2.5", "0", "row 1 is no rate"),
        ("2.5", "nan", "row 1 is no rate"),
        ("2.5", "fast", "no number"),
    ],
)
def test_a_damaged_file_of_rates_is_refused(tmp_path, old, new, match):
    write_rates([rate(0, 2.5)], tmp_path / "rates.csv")
    text = (tmp_path / "rates.csv").read_text()
    (tmp_path / "rates.csv").write_text(text.replace(old, new))
    with pytest.raises(TocomError, match=match) as error:
        read_rates(tmp_path / "rates.csv")
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_file_of_rates_is_refused(tmp_path):
    with pytest.raises(TocomError, match="no such file"):
        read_rates(tmp_path / "rates.csv")
    (tmp_path / "rates.csv").write_text("")
    with pytest.raises(TocomError, match="not a CSV of rates"):
        read_rates(tmp_path / "rates.csv")


def test_a_model_is_called_by_what_its_speed_depends_on():
    assert label("deit", {}) == label("deit", {"num_classes": 3, "img_size": 32}) == "deit"
    assert label("deit", {"depth": 2, "num_classes": 3, "embed_dim": 16}) == "deit(depth=2, embed_dim=16)"
    assert label("deit", {"depth": 2}, Head("conv", 7)) == "deit(depth=2) + conv head of 7 classes"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_gives_a_rate_for_every_degree_and_mode(precision):
    device = torch.device("cpu")
    options = {"kwargs": SMALL, "image_size": 32, "precision": precision}
    modes = []
    degrees = {"train": [4, 0], "infer": [0, 2]}
    rates = measure(ARCHITECTURE, degrees, device, batch_size=4, seconds=0, advance=modes.append, **options)
    assert [(r.degree, r.mode) for r in rates] == [(0, "infer"), (0, "train"), (2, "infer"), (4, "train")]
    assert modes == [r.mode for r in rates]
    assert all(r.images_per_second > 0 for r in rates)
    assert {(r.architecture, r.image_size, r.compressor, r.precision, r.device) for r in rates} == {
        (label(ARCHITECTURE, SMALL), 32, "tome", precision, device_name(device))
    }


def test_a_rate_is_the_batch_over_its_time(monkeypatch):
    from tocom.stages import throughput

    monkeypatch.setattr(throughput, "seconds", lambda work, device: 0.5)
    (only,) = measure(
        ARCHITECTURE, {"infer": [0]}, torch.device("cpu"), batch_size=6, seconds=0, kwargs=SMALL, image_size=32
    )
    assert only.images_per_second == 12


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_model_that_labels_pixels_is_timed_with_its_head_and_loss(monkeypatch, kind):
    from tocom.segmentation import model

    seen, real = [], model.pixel_loss

    def loss(scores, labels, ignored):
        seen.append((tuple(scores.shape), tuple(labels.shape), scores.requires_grad, torch.is_inference(scores)))
        return real(scores, labels, ignored)

    monkeypatch.setattr(model, "pixel_loss", loss)
    options = {"kwargs": SMALL, "image_size": 48, "compressor": "tome_mlp", "head": Head(kind, 5)}
    rates = measure(ARCHITECTURE, {"train": [8], "infer": [8]}, torch.device("cpu"), 3, 0, **options)
    assert [(r.architecture, r.image_size) for r in rates] == 2 * [(label(ARCHITECTURE, SMALL, Head(kind, 5)), 48)]
    shapes = (3, 5, 48, 48), (3, 48, 48)
    assert seen == [(*shapes, False, True), (*shapes, True, False)]


@pytest.mark.parametrize(
    ("device", "took", "budget", "expected", "passes"),
    [
        ("cpu", [5.0], 2, 5.0, 1),  # so long a pass counts although it is the first
        ("cpu", [1.0, 0.7], 0.0, 1.0, 1),
        ("cpu", [1.0, 0.5, 0.7, 0.6], 1.5, 0.6, 4),
        ("cuda", [5.0, 0.5, 0.7, 0.6], 1.5, 0.6, 4),  # the first pass of a GPU loads its programs
        ("cuda", [5.0, 9.0], 2, 9.0, 2),
    ],
)
def test_the_first_pass_counts_on_a_processor_only_if_it_is_long(monkeypatch, device, took, budget, expected, passes):
    from tocom import rates
    from tocom.stages import throughput

    clock, left = [0.0], list(took)

    def seconds(work, where):
        clock[0] += left[0]
        return left.pop(0)

    monkeypatch.setattr(throughput, "seconds", seconds)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])
    assert median_time(lambda: None, torch.device(device), budget) == expected
    assert len(took) - len(left) == passes


def test_a_timed_pass_has_as_many_pixels_as_the_device_can_do_with():
    assert default_batch("cuda", 224, 1024) == 32
    assert default_batch("cuda", 512, 16) == 6  # 32 * 224**2 / 512**2 = 6.1
    assert default_batch("cpu", 224, 1024) == 2
    assert default_batch("cpu", 512, 16) == 1
    assert default_batch("cpu", 32, 24) == 24  # never more than the study has in a step
