"""Distillation: the objective, the draws, and that only the compensator learns."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.small import ARCHITECTURE, KWARGS, build
from tocom.compensator import Compensator
from tocom.data.registry import pretraining_files
from tocom.errors import TocomError
from tocom.models import create, load_model, save_model
from tocom.settings import DistilSettings
from tocom.stages.distil import Distiller, distil, distillation_loss, draw_pair
from tocom.training import normalise

QUICK = DistilSettings(epochs=2, images=64, held_out=32, pairs=4, batch_size=32, device="cpu")


def test_pairs_are_uniform_over_different_degrees():
    torch.manual_seed(0)
    draws = Counter(draw_pair(3) for _ in range(12_000))
    assert set(draws) == {(m, n) for m in range(4) for n in range(4) if m != n}
    assert max(abs(count - 1000) for count in draws.values()) < 130  # four standard deviations


def test_the_loss_is_the_kl_divergence_from_teacher_to_student():
    teacher, student = torch.randn(2, 5, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(5)) / 5
    assert float(distillation_loss(teacher, student)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_only_the_compensator_learns_and_the_teacher_is_plain():
    models = [build() for _ in range(2)]
    compensator = Compensator.for_model(models[0], 4)
    distiller = Distiller(*models, compensator).train()
    assert {name for name, p in distiller.named_parameters() if p.requires_grad} == {
        "compensator.down",
        "compensator.up",
    }
    images = normalise(torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), models[0])
    loss = distiller.set_degrees(0, 4)(images)
    loss.backward()
    with torch.no_grad():
        teacher = distiller.teacher.set_degree(0)(images)
        student = distiller.student.set_live_update(None) or distiller.student.set_degree(4)(images)
    assert float(loss.detach()) == pytest.approx(float(F.kl_div(
        student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / 4), rel=1e-2)  # fmt: skip
    assert compensator.up.grad.abs().sum() > 0
    assert not distiller.teacher.model.training


def test_a_longer_distillation_lowers_the_held_out_divergence(backbone, tmp_path):
    about = distil(backbone, tmp_path / "c", 4, settings=QUICK.model_copy(update={"epochs": 30, "lr": 3e-3}))
    assert about["held_out_kl"] < 0.97 * about["held_out_kl_without"]


def test_distilling_twice_gives_the_same_bytes_and_says_what_it_is(backbone, tmp_path):
    for name in "ab":
        distil(backbone, tmp_path / name, 4, settings=QUICK)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Compensator.load(tmp_path / "a")
    assert loaded.steps == 4
    assert loaded.metadata["recipe"]["rank"] == 2
    assert len(loaded.metadata["backbone_sha256"]) == 64


def test_a_loss_that_turns_nan_leaves_no_output(backbone, tmp_path):
    with pytest.raises(TocomError, match="became nan"):
        distil(backbone, tmp_path / "c", 4, settings=QUICK.model_copy(update={"lr": 1e30, "epochs": 4}))
    assert list(tmp_path.iterdir()) == []


def test_another_highest_degree_does_not_resume_the_state_of_the_first(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("tocom.stages.distil.forget", lambda output: None)  # as if killed before it was removed
    distil(backbone, tmp_path / "x", 4, settings=QUICK)
    monkeypatch.undo()
    distil(backbone, tmp_path / "x", 3, settings=QUICK)
    distil(backbone, tmp_path / "clean", 3, settings=QUICK)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()


def test_the_same_weights_run_in_another_way_do_not_resume_the_state(backbone, tmp_path, monkeypatch):
    model, meta = load_model(backbone)
    kwargs = meta["kwargs"] | {"pretrained_cfg_overlay": {"mean": [0.3, 0.3, 0.3]}}
    save_model(tmp_path / "b", model, meta["architecture"], kwargs)
    assert load_model(tmp_path / "b")[1]["sha256"] == meta["sha256"]
    monkeypatch.setattr("tocom.stages.distil.forget", lambda output: None)  # as if killed before it was removed
    distil(backbone, tmp_path / "x", 4, settings=QUICK)
    monkeypatch.undo()
    distil(tmp_path / "b", tmp_path / "x", 4, settings=QUICK)
    distil(tmp_path / "b", tmp_path / "clean", 4, settings=QUICK)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()
    assert Compensator.load(tmp_path / "x").metadata["mean"] == [0.3, 0.3, 0.3]


def test_a_backbone_of_another_size_needs_its_own_images_and_takes_them(tmp_path):
    kwargs = KWARGS | {"img_size": 48}
    save_model(tmp_path / "b", create(ARCHITECTURE, kwargs), ARCHITECTURE, kwargs)
    with pytest.raises(TocomError, match="takes 48 x 48 images"):
        distil(tmp_path / "b", tmp_path / "c", 4, settings=QUICK)
    assert not (tmp_path / "c").exists()
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number in range(30):
        pixels = rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "deep" / f"{number}.png")
    about = distil(tmp_path / "b", tmp_path / "c", 4, settings=QUICK, files=pretraining_files(str(tmp_path / "images")))
    assert about["held_out_kl"] >= 0
    assert Compensator.load(tmp_path / "c").steps == 4
