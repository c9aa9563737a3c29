"""Pre-training: at which degree every step runs, what chooses the best epoch, and that a killed run resumes exactly."""

import json

import pytest
import torch

from tests.small import ARCHITECTURE, KWARGS, refusal, steps_of
from tocom.files import load_tensors
from tocom.jobs import PretrainJob, read_job
from tocom.models import load_model
from tocom.seeds import derive_seed
from tocom.stages import pretrain as stage
from tocom.stages.sources import SOURCES
from tocom.vit import CompressedViT

QUICK = {"epochs": 3, "images": 80, "held_out": 32, "batch_size": 16, "threads": 1, "device": "cpu", "warmup_epochs": 0}
SET, RANGE = {"degree": "random", "among": [0, 2, 4]}, {"degree": "random", "lowest": 1, "highest": 4}
BATCHES = 5


def job(settings=None, **changes):
    usual = {"architecture": ARCHITECTURE, "kwargs": KWARGS, "degrees": [0, 2, 4], "max_degree": 4, "seed": 3}
    return PretrainJob(**usual | changes, settings=QUICK | (settings or {}))


def trained(path, settings=None, **changes):
    """Pre-train; return the weights and what is stored with them."""
    stage.pretrain(job(settings, **changes), path)
    return load_tensors(path)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def forwards(monkeypatch):
    """Whether each forward pass of a compressed ViT was one of training, and its degree."""
    seen, real = [], CompressedViT.forward

    def forward(self, images):
        seen.append((self.training, self.degree))
        return real(self, images)

    monkeypatch.setattr(CompressedViT, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("drawn", "degrees", "scored"), [(SET, (0, 2, 4), (0, 2, 4)), (RANGE, (1, 2, 3, 4), (1, 2, 4))]
)
def test_every_step_runs_at_a_degree_that_is_drawn_for_it(tmp_path, forwards, drawn, degrees, scored):
    _, about = trained(tmp_path / "vit", drawn, compressor="evit")
    expected = []
    for epoch in range(3):
        torch.manual_seed(derive_seed(3, "epoch", epoch))  # the order of the images is drawn first
        torch.randperm(80)
        expected += [(True, degrees[int(torch.randint(len(degrees), ()))]) for _ in range(BATCHES)]
        expected += [(False, degree) for degree in scored]
    assert forwards == [*expected, (False, 0), (False, 2), (False, 4)]
    behind = about["pretrained_behind"]
    assert (behind["compressor"]["kind"], behind["max_degree"]) == ("evit", 4)
    assert {key: about["recipe"][key] for key in drawn} == drawn


def test_by_default_nothing_is_compressed_and_nothing_is_drawn(tmp_path, forwards):
    weights, about = trained(tmp_path / "vit")
    assert {degree for training, degree in forwards if training} == {0}
    assert [degree for training, degree in forwards if not training] == [0] * 3 + [0, 2, 4]
    assert "pretrained_behind" not in about
    zero, _ = trained(tmp_path / "zero", {"degree": "random", "highest": 0})
    assert not same(weights, trained(tmp_path / "set", SET)[0])
    torch.testing.assert_close(weights["blocks.0.attn.qkv.weight"], zero["blocks.0.attn.qkv.weight"])


def test_the_best_epoch_has_the_highest_mean_accuracy_at_the_degrees_that_are_scored(tmp_path, monkeypatch):
    figures = iter([0.1, 0.2, 0.9, 0.5, 0.4, 0.6, 0.3, 0.3, 0.7, 0.0, 0.0, 0.0])
    monkeypatch.setattr(SOURCES["images"], "score", lambda *_: next(figures))
    assert trained(tmp_path / "vit", SET)[1]["best_epoch"] == 2  # means 0.4, 0.5 and 0.43; at degree 4 it is the worst


def test_what_is_reported_is_the_accuracy_of_the_checkpoint_and_repeats_itself(tmp_path):
    weights, about = trained(tmp_path / "a", RANGE)
    again, other = trained(tmp_path / "b", RANGE), trained(tmp_path / "c", RANGE, seed=4)
    assert same(weights, again[0])
    assert about["accuracy"] == again[1]["accuracy"]
    assert not same(weights, other[0])
    vit = CompressedViT(load_model(tmp_path / "a")[0])
    images, labels = SOURCES["images"].draw(32, held_out=True)
    for degree in (0, 2, 4):
        with torch.no_grad():
            pixels = (images / 255 - torch.tensor(vit.model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(
                vit.model.pretrained_cfg["std"]
            ).view(3, 1, 1)
            right = (vit.set_degree(degree)(pixels).argmax(-1) == labels).float().mean()
        assert about["accuracy"][str(degree)] == pytest.approx(float(right))


@pytest.mark.parametrize("drawn", [{}, SET, RANGE], ids=["fixed", "set", "range"])
def test_a_killed_pre_training_resumes_to_the_same_weights(tmp_path, drawn):
    def run(name):
        return lambda: trained(tmp_path / name, drawn)

    assert steps_of(run("whole")) == 3 * BATCHES
    steps_of(run("killed"), kill_at=8)
    assert not (tmp_path / "killed").exists()
    assert steps_of(run("killed")) == 3 * BATCHES - 7
    assert same(load_tensors(tmp_path / "killed")[0], load_tensors(tmp_path / "whole")[0])
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole"}


def test_parameters_of_a_compressor_stay_as_they_were(tmp_path):
    gated, plain = (trained(tmp_path / kind, SET, compressor=kind)[0] for kind in ("pyra", "tome"))
    assert gated.keys() == plain.keys()
    for name in plain:  # an untrained PYRA is ToMe
        torch.testing.assert_close(gated[name], plain[name])


@pytest.mark.parametrize("change", [{"compressor": "evit"}, {"max_degree": 6}, {"settings": SET | {"among": [0, 4]}}])
def test_a_state_that_other_degrees_left_is_not_resumed(tmp_path, monkeypatch, change):
    other = {"settings": SET} | change
    with monkeypatch.context() as patch:
        patch.setattr(stage, "forget", lambda output: None)  # as if killed before it was removed
        trained(tmp_path / "x", SET)
    assert list(tmp_path.glob(".x.resume*"))
    assert same(trained(tmp_path / "x", **other)[0], trained(tmp_path / "clean", **other)[0])
    assert not list(tmp_path.glob(".x.resume*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"degree": "random"}}, "degree: random needs to know how far to draw; give max_degree"),
        ({"settings": SET, "max_degree": 3}, "settings: random degree 4 is out of range: max_degree is 3"),
        ({"settings": {"among": [0]}}, "among: say what is drawn from; set degree: random"),
        ({"settings": {"degree": "sometimes"}}, "settings.degree = 'sometimes'"),
        ({"settings": SET, "max_degree": 4, "compressor": "tests.own_parts:Gate"}, "Gate is learned on a backbone"),
        ({"settings": SET, "max_degree": 4, "compressor": "tomee"}, "did you mean 'tome'?"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(changes, message):
    assert message in refusal(read_job, PretrainJob, json.dumps(changes))
