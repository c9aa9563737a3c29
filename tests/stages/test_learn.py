"""Learning a compensator: the objective, the draws, and that nothing else learns."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.small import ARCHITECTURE, KWARGS, build, refusal, teach
from tocom.distillation import distillation_loss, draw_pair
from tocom.models import create, load_model, save_model
from tocom.parts import Shape, load_part, make_part
from tocom.training import normalise
from tocom.vit import CompressedViT


@pytest.mark.parametrize(("source", "need"), [(None, 0), (None, 2), (0, 2), (2, 1)])
def test_pairs_are_drawn_in_proportion_to_the_power_of_their_distance(source, need):
    torch.manual_seed(0)
    draws = Counter(draw_pair(3, source, need) for _ in range(6_000))
    pairs = [(m, n) for m in range(4) for n in range(4) if m != n and source in (None, m)]
    total = sum(abs(m - n) ** need for m, n in pairs)
    assert set(draws) == set(pairs)
    for m, n in pairs:
        p = abs(m - n) ** need / total
        assert abs(draws[m, n] - 6_000 * p) < 4.5 * (6_000 * p * (1 - p)) ** 0.5


def test_the_loss_is_the_kl_divergence_from_teacher_to_student():
    teacher, student = torch.randn(2, 5, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(5)) / 5
    assert float(distillation_loss(teacher, student)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_only_the_compensator_learns_and_the_teacher_is_plain():
    compensator = make_part("compensator", "tocom", Shape.of(build()), 4)
    objective = compensator.objective(CompressedViT(build()), CompressedViT(build()), False).train()
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {"compensator.down", "compensator.up"}
    assert not objective.teacher.training
    assert objective.student.training
    images = normalise(torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), build())
    loss = objective.set((0, 4))(images)
    loss.backward()
    with torch.no_grad():  # up is zero at the start: the student is the plain model
        teacher, student = (CompressedViT(build(), degree=degree)(images) for degree in (0, 4))
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / 4
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-2)
    assert compensator.up.grad.abs().sum() > 0


def test_learning_lowers_the_held_out_divergence_repeats_itself_and_says_what_it_is(backbone, tmp_path):
    longer, spec = {"epochs": 8, "lr": 3e-3, "images": 512}, {"kind": "tocom", "rank": 3, "dropout": 0}
    about = [teach(backbone, tmp_path / name, longer, compensator=spec) for name in "ab"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert about[0]["held_out_kl"] < 0.95 * about[0]["held_out_kl_without"]
    curve = pd.read_csv(tmp_path / "a.csv")
    assert (len(curve), curve.loss.iloc[-1] < curve.loss.iloc[0]) == (8, True)
    loaded = load_part(tmp_path / "a", "compensator")
    assert (loaded.steps, loaded.options.rank, loaded.compressor) == (4, 3, {"kind": "tome"})
    assert (loaded.metadata["recipe"]["epochs"], loaded.metadata["seed"]) == (8, 0)
    assert loaded.metadata["backbone_sha256"] == load_model(backbone)[1]["sha256"]


def test_another_seed_learns_another_part_which_says_so(backbone, tmp_path):
    for name, job in (("none", {}), ("0", {"seed": 0}), ("1", {"seed": 1})):
        teach(backbone, tmp_path / name, {"lr": 1e-9, "min_lr": 0}, **job)
    usual, zero, one = (load_part(tmp_path / name, "compensator") for name in ("none", "0", "1"))
    assert (tmp_path / "none").read_bytes() == (tmp_path / "0").read_bytes()
    assert (usual.metadata["seed"], zero.metadata["seed"], one.metadata["seed"]) == (0, 0, 1)
    assert not torch.allclose(zero.down, one.down, atol=1e-3)  # even where nothing was trained


def test_a_loss_that_turns_nan_leaves_no_output(backbone, tmp_path):
    assert "became nan" in refusal(teach, backbone, tmp_path / "c", {"lr": 1e30, "epochs": 4})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["max_degree", "mean"])
def test_a_state_that_other_inputs_left_is_not_resumed(backbone, tmp_path, monkeypatch, change):
    model, meta = load_model(backbone)
    kwargs = meta["kwargs"] | {"pretrained_cfg_overlay": {"mean": [0.3, 0.3, 0.3]}}
    save_model(tmp_path / "b", model, meta["architecture"], kwargs)  # the same weights, run in another way
    other = {"max_degree": (backbone, 3), "mean": (tmp_path / "b", 4)}[change]
    with monkeypatch.context() as patch:
        patch.setattr("tocom.stages.learn.forget", lambda output: None)  # as if killed before it was removed
        teach(backbone, tmp_path / "x")
    for name in ("x", "clean"):
        teach(other[0], tmp_path / name, max_degree=other[1])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()
    if change == "mean":
        assert load_part(tmp_path / "x", "compensator").metadata["mean"] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("settings", [{}, {"augmentation": "timm", "mixup": 0.5, "batch_size": 8}], ids=str)
def test_a_backbone_of_another_size_needs_its_own_images_and_takes_them(tmp_path, settings):
    kwargs = KWARGS | {"img_size": 48}
    save_model(tmp_path / "b", create(ARCHITECTURE, kwargs), ARCHITECTURE, kwargs)
    assert "takes 48 x 48 images" in refusal(teach, tmp_path / "b", tmp_path / "c")
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number in range(30):
        pixels = rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "deep" / f"{number}.png")
    about = teach(tmp_path / "b", tmp_path / "c", settings | {"source": str(tmp_path / "images")})
    assert about["held_out_kl"] >= 0


def test_what_has_no_classifier_or_no_images_is_refused(backbone, tmp_path):
    kwargs = KWARGS | {"num_classes": 0}
    save_model(tmp_path / "b", create(ARCHITECTURE, kwargs), ARCHITECTURE, kwargs)
    assert "has no classifier" in refusal(teach, tmp_path / "b", tmp_path / "c")
    assert "no such folder or data set" in refusal(teach, backbone, tmp_path / "c", {"source": str(tmp_path / "none")})
    assert "no end of letters" in refusal(teach, backbone, tmp_path / "c", {"images": None})
