"""The paper's DeiT-B at its own size: 224 pixels, 12 blocks, degrees 0..16, forward, backward and folded."""

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import randomise
from tocom import CompressedViT
from tocom.models import PAPER_BACKBONES, create
from tocom.parts import Shape, make_part

DEPTH, TOKENS, MAX_DEGREE = 12, 197, 16
DEGREES = range(MAX_DEGREE + 1)


@pytest.fixture(scope="module")
def vit():
    """DeiT-B with random weights at which tokens and degrees matter."""
    model = randomise(create(PAPER_BACKBONES["deit_b"].architecture)).eval()
    return CompressedViT(model, "tome")


@pytest.fixture(scope="module")
def image():
    """One random image of the paper's size."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compensator(vit):
    """ToCom for 16 steps of rank 2, with an update that is large enough to be seen."""
    torch.manual_seed(2)
    result = make_part("compensator", {"kind": "tocom", "trained_scale": 0.1}, Shape.of(vit.model), MAX_DEGREE).eval()
    with torch.no_grad():
        result.up.normal_(std=0.3)
    return result


@pytest.fixture(scope="module")
def plain(vit, image):
    """Logits and tokens after each block at every degree, without ToCom: degree -> ([1, 1000], [12])."""
    lengths, results = [], {}
    hooks = [
        block.mlp.register_forward_hook(lambda *args: lengths.append(args[2].shape[1])) for block in vit.model.blocks
    ]
    with torch.inference_mode():
        for degree in DEGREES:
            lengths.clear()
            results[degree] = vit.set_degree(degree)(image), list(lengths)
    for hook in hooks:
        hook.remove()
    return results


def test_it_is_the_deit_b_of_the_paper(vit):
    model = vit.model
    assert (len(model.blocks), model.embed_dim, model.num_classes) == (DEPTH, 768, 1000)
    assert model.patch_embed.num_patches + model.num_prefix_tokens == TOKENS
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


def test_every_degree_runs_with_the_tokens_that_arithmetic_gives(vit, plain):
    for degree, (logits, lengths) in plain.items():
        expected = [TOKENS - degree * block for block in range(1, DEPTH + 1)]
        if degree == 16:
            expected[-1] = 11  # the last block has 21 tokens, 20 of them patches, and at most half of these go
        assert lengths == expected
        assert lengths == list(vit.set_degree(degree).tokens())
        assert logits.shape == (1, 1000)
        assert logits.isfinite().all()


def test_degree_0_is_the_model_itself_and_each_degree_differs_from_the_one_before(vit, image, plain):
    with torch.inference_mode():
        torch.testing.assert_close(plain[0][0], vit.model(image), rtol=1e-4, atol=1e-4)
    spread = plain[0][0].std()
    for degree in DEGREES[1:]:
        assert (plain[degree][0] - plain[degree - 1][0]).std() > 0.01 * spread


@pytest.mark.parametrize("degree", [8, 16])
def test_gradients_reach_every_block(vit, image, degree):
    vit.train().set_degree(degree)
    try:
        F.cross_entropy(vit(image), torch.tensor([3])).backward()
        for block in vit.model.blocks:
            gradient = block.attn.qkv.weight.grad
            assert gradient.isfinite().all()
            for part in gradient.chunk(3):  # the keys also decide what is merged, but their values flow too
                assert part.abs().max() > 0
        assert vit.model.patch_embed.proj.weight.grad.abs().max() > 0
    finally:
        vit.zero_grad(set_to_none=True)
        vit.eval()


def test_tocom_is_learned_and_folded(vit, image, plain, compensator):
    """Distillation at the paper's size reaches the steps in use; folded in, ToCom gives what it gave beside."""
    weights = [block.attn.qkv.weight.clone() for block in vit.model.blocks]
    objective = compensator.objective(vit, CompressedViT(vit.model), False)
    objective.set((4, 16)).student(image).square().mean().backward()
    reached = compensator.up.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [False] * 4 + [True] * 12
    assert compensator.up.grad.isfinite().all()
    assert (compensator.up.grad.abs().amax(dim=(2, 3, 4)) > 0).all()  # every block, q and v
    with torch.inference_mode():
        beside = {degree: objective.set((0, degree)).student(image) for degree in (8, 16)}
    for block in vit.model.blocks:
        block.attn.qkv._forward_hooks.clear()

    vit.set_degree(0).attach(compensator)
    with torch.inference_mode():
        for degree in (0, 3, 8, 16):
            folded = vit.set_degree(degree)(image)
            assert folded.isfinite().all()
            difference = (folded - plain[degree][0]).abs().max()
            assert (difference == 0) if degree == 0 else (difference > 1e-3)
            if degree in beside:
                torch.testing.assert_close(folded, beside[degree], rtol=1e-3, atol=1e-3 * float(folded.std()))
    vit.detach()
    assert all(torch.equal(b.attn.qkv.weight, weight) for b, weight in zip(vit.model.blocks, weights, strict=True))
