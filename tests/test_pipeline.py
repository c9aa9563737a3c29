"""Cuts of a pipeline: where they are, what goes back, feedback from batch to batch, and resuming with it."""

from math import ceil

import pytest
import torch
from torch.nn import functional as F

from tests.small import refusal, steps_of, tune
from tocom import CompressedViT, distributed
from tocom.compressed import cost
from tocom.parts import Shape, left_of, make_part

KINDS = pytest.mark.parametrize("kind", ["topk", "quantise"])
N = 40


def part(kind, depth=3, **options):
    return make_part("compressor", {"kind": kind} | options, Shape(depth, 24, 2, 17, 1)).train()


def draw(seed, batch=2, n=N):
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squeezed(pipeline, x, count):
    result = pipeline.squeeze(x, count)
    return result if isinstance(result, torch.Tensor) else result.x


@pytest.mark.parametrize(("depth", "cuts"), [(6, (1, 3)), (12, (3, 7)), (3, (0, 1)), (2, (0,))])
@KINDS
def test_a_model_is_cut_after_its_thirds_or_where_it_is_told(kind, depth, cuts):
    assert part(kind, depth).cuts == cuts
    assert part(kind, depth, cuts=[0]).cuts == (0,)
    assert "cannot be cut after" in refusal(part, kind, depth, cuts=[0, depth - 1])
    assert "cannot be cut after []" in refusal(part, kind, 1)


@KINDS
@torch.no_grad()
def test_a_forward_pass_sends_what_leaves_the_blocks_of_the_cuts(make_vit, images, kind):
    model = make_vit(depth=6)
    vit = CompressedViT(model, {"kind": kind, "cuts": [4, 1]}, 9)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        x = block(x)
        if index in (1, 4):
            x = squeezed(vit.compressor, x.flatten(1), 9).view_as(x)
    torch.testing.assert_close(vit(images), model.forward_head(model.norm(x)), rtol=0, atol=1e-10)
    by_block = vit.set_degree([9, 3, 9, 9, 0, 9])(images)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        x = block(x)
        x = squeezed(vit.compressor, x.flatten(1), 3).view_as(x) if index == 1 else x
    torch.testing.assert_close(by_block, model.forward_head(model.norm(x)), rtol=0, atol=1e-10)


@KINDS
def test_degree_0_sends_everything_both_ways(make_vit, images, kind):
    gradients = []
    for compressor in ("tome", {"kind": kind, "backward": "own", "backward_degree": 9, "feedback": "ef"}):
        model = make_vit()
        CompressedViT(model, compressor).train()(images).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("milder", [None, 0, 3])
@KINDS
def test_gradients_are_compressed_as_activations_are_or_milder_or_not_at_all(kind, milder):
    x, gradient = draw(0).requires_grad_(), draw(1)
    for backward in ("own", "none"):
        pipeline = part(kind, backward=backward, **{"backward_degree": milder} if backward == "own" else {})
        x.grad = None
        y = pipeline.send(x, 9, 0)
        assert torch.equal(y.detach(), squeezed(pipeline, x.detach(), 9))
        y.backward(gradient)
        degree = 0 if backward == "none" else 9 if milder is None else milder
        assert torch.equal(x.grad, squeezed(pipeline, gradient, degree) if degree else gradient)


@pytest.mark.parametrize("kind", ["topk", "quantise"])
@pytest.mark.parametrize("feedback", ["ef", "ef_mixed"])
def test_what_one_step_leaves_out_is_sent_later(kind, feedback):
    if (kind, feedback) == ("quantise", "ef_mixed"):
        assert "feedback" in refusal(part, kind, feedback=feedback)
        return
    pipeline, sent, seen = part(kind, feedback=feedback), torch.zeros(2, N).double(), torch.zeros(2, N).double()
    for step in range(7):
        x = draw(step)
        y = pipeline.send(x, 12, 1)
        if kind == "topk":
            assert ((y != 0).sum(dim=1) <= left_of(N, 12)).all()
        sent, seen = sent + y, seen + x
        torch.testing.assert_close(sent + pipeline.feedback_1, seen)
    assert not torch.equal(sent, seen)
    assert not pipeline.feedback_0.numel()


def test_the_change_of_what_does_not_change_arrives_after_as_many_steps_as_there_are_parts_of_it():
    pipeline, x = part("topk", feedback="ef21"), draw(0)
    number = left_of(N, 11)
    for step in range(1, ceil(N / number) + 1):
        y = pipeline.send(x, 11, 0)
        assert ((y == x).sum(dim=1) == min(step * number, N)).all()
    assert torch.equal(y, x)


@KINDS
def test_deltas_follow_a_first_batch_that_is_sent_whole(kind):
    pipeline = part(kind, feedback="aq_sgd")
    first, second = draw(0), draw(1)
    assert torch.equal(pipeline.send(first, 12, 0), first)
    expected = first + squeezed(pipeline, second - first, 12)
    assert torch.equal(pipeline.send(second, 12, 0), expected)
    assert torch.equal(pipeline.feedback_0, expected)


@pytest.mark.parametrize("feedback", ["ef", "ef21", "aq_sgd"])
def test_feedback_is_of_training_alone_and_starts_anew_with_a_batch_of_another_size(feedback):
    pipeline = part("topk", feedback=feedback)
    first = pipeline.send(draw(0), 12, 0)
    held = pipeline.feedback_0
    pipeline.eval()
    assert torch.equal(pipeline.send(draw(0), 12, 0), squeezed(pipeline, draw(0), 12))
    assert pipeline.feedback_0 is held
    pipeline.train()
    assert not torch.equal(pipeline.send(draw(2), 12, 0), part("topk", feedback=feedback).send(draw(2), 12, 0))
    pipeline.send(draw(1, batch=3), 12, 0)
    assert torch.equal(pipeline.send(draw(0), 12, 0), first)


def test_feedback_carries_no_gradient_and_belongs_to_no_checkpoint(monkeypatch):
    pipeline = part("topk", feedback="ef")
    one, two = draw(0).requires_grad_(), draw(1).requires_grad_()
    pipeline.send(one, 12, 0).sum().backward()
    one.grad = None
    pipeline.send(two, 12, 0).sum().backward()
    assert one.grad is None
    assert (two.grad.sum(dim=1) == left_of(N, 12)).all()
    assert not pipeline.state_dict()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "train with one" in refusal(pipeline.send, two, 12, 0)


@KINDS
def test_gradient_checkpointing_changes_neither_gradients_nor_feedback(make_vit, images, kind):
    seen = []
    for checkpointing in (False, True):
        model = make_vit()
        model.set_grad_checkpointing(checkpointing)
        vit = CompressedViT(model, {"kind": kind, "feedback": "ef"}, 8).train()
        for batch in (images, images.flip(0)):
            model.zero_grad()
            F.cross_entropy(vit(batch), torch.tensor([0, 1])).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters()]
        seen.append(torch.cat([*gradients, *(buffer.flatten() for buffer in vit.compressor.buffers())]))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(("kind", "feedback"), [("topk", "ef_mixed"), ("topk", "aq_sgd"), ("quantise", "ef")])
def test_a_training_with_feedback_resumes_to_the_same_bytes(kind, feedback, backbone, digits, tmp_path):
    def run(name, feedback=feedback):
        settings, spec = {"batch_size": 24, "epochs": 1}, {"kind": kind, "feedback": feedback}
        return lambda: tune(backbone, digits, tmp_path / name, "2", settings=settings, compressor=spec)

    def written(name):
        return (tmp_path / name / "train-2_seed-0.safetensors").read_bytes()

    steps_of(run("whole"))
    steps_of(run("killed"), kill_at=2)  # between two whole batches
    assert steps_of(run("killed")) == 2
    assert written("killed") == written("whole")
    steps_of(run("without", "none"))
    assert written("without") != written("whole")


@pytest.mark.parametrize("kind", ["topk", "quantise"])
def test_a_degree_of_which_nothing_is_left_and_options_that_do_not_go_together_are_refused(make_vit, kind):
    vit = CompressedViT(make_vit(), kind)
    assert "goes up to 15" in refusal(vit.set_degree, 16)
    options = {"backward": "none", "backward_degree": 3}
    assert "backward_degree goes with backward: own" in refusal(part, kind, **options)


def test_what_is_sent_counts_every_cut_at_its_own_degree(make_vit):
    n = 17 * 24
    assert cost(CompressedViT(make_vit(), "topk")) == 2 * 4 * n
    vit = CompressedViT(make_vit(), "topk", [8, 0, 8])
    assert cost(vit) == 4 * n + 4 * n // 2 + n / 8  # positions: a bit for each entry
    assert cost(vit.set_degree([15, 0, 15])) == 4 * n + 26 * (4 + 9 / 8)  # nine bits for each that is sent
    assert cost(CompressedViT(make_vit(), "quantise", [12, 15, 0])) == 4 * n / 8 + 8 + n / 8 + 8
