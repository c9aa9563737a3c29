"""Compressors in half precision: models under autocast or with half weights, and sums that half types cannot hold."""

import pytest
import torch

from tests.small import squeeze
from tocom.methods.evit import EViT, EViTOptions
from tocom.methods.tome import ToMe, match
from tocom.parts import Attention
from tocom.vit import CompressedViT

#: Largest relative error of the logits: a few roundings to 8 or 11 binary digits in each of three blocks.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005}
FUSED = {"kind": "evit", "fuse": "mean"}
COMPRESSORS = ["tome", "evit", FUSED, {"kind": "tofu", "pruning_blocks": 1}]
half_types = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def attention(k, q=None):
    return Attention(torch.zeros_like(k) if q is None else q, k, k, scale=1.0, bias=None)


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@half_types
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"global_pool": "avg"}], ids=str)
@torch.no_grad()
def test_half_precision_gives_the_logits_of_float32(make_vit, images, settings, compressor, dtype):
    vit = CompressedViT(make_vit(**settings).float(), compressor)
    uncompressed, expected = vit(images.float()), vit.set_degree(5)(images.float())
    assert relative_error(uncompressed, expected) > 5 * TOLERANCE[dtype]  # a wrong choice of tokens would be seen
    with torch.autocast("cpu", dtype):
        autocast = vit(images.float())
    half = vit.to(dtype)(images.to(dtype))
    for logits in (autocast, half):
        assert logits.dtype == dtype
        assert relative_error(logits, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_gradients_under_autocast_are_those_of_float32(make_vit, images, compressor):
    gradients = {}
    for enabled in (False, True):
        model = make_vit().float()
        vit = CompressedViT(model, compressor, degree=5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            vit(images.float()).float().square().sum().backward()
        gradients[enabled] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert relative_error(gradients[True], gradients[False]) < 0.05


def close_keys(n_tokens, seed=0):
    """Return keys [2, 1, n_tokens, 8] so alike that bfloat16 cannot tell their cosines apart."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.02 * torch.randn(2, 1, n_tokens, 8, generator=generator)


def test_pairs_do_not_depend_on_autocast():
    metric = close_keys(30).mean(dim=1)
    expected = match(metric, 7, prefix=1)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = match(metric, 7, prefix=1)
    assert all(torch.equal(a, b) for a, b in zip(pairs, expected, strict=True))
    similarity = torch.nn.functional.normalize(metric, dim=-1).bfloat16()
    assert (similarity[:, 2::2] @ similarity[:, 1::2].mT).unique().numel() < 10  # what autocast would have compared


@half_types
def test_pairs_of_half_keys_are_those_of_the_same_keys_in_float32(dtype):
    k = close_keys(30, seed=1).to(dtype)
    pairs, expected = (match(keys.mean(dim=1), 7, prefix=1) for keys in (k, k.float()))
    assert all(torch.equal(a, b) for a, b in zip(pairs, expected, strict=True))


def test_a_key_too_short_for_float16_still_has_a_direction():
    k = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(2))
    k[:, :, 2], k[:, :, 5] = torch.tensor([1e-7, 0, 0, 0]), torch.tensor([9.0, 0, 0, 0])  # alike but for their length
    k[:, :, 4] = 0  # a key without direction is like none
    pairs = match(k.half().mean(dim=1), 1, prefix=1)
    assert (pairs.source.item(), pairs.target.item()) == (2, 2)


@half_types
def test_large_tokens_that_stand_for_many_merge_without_overflow(dtype):
    x = torch.full((1, 4, 2), 600.0, dtype=dtype)
    size = torch.full((1, 4, 1), 150.0, dtype=dtype)  # 600 * 150 is beyond the largest float16, 65504
    merged, sizes = squeeze(ToMe(), x, size, 1, attention(torch.ones(1, 1, 4, 2, dtype=dtype)), 1)
    assert merged.dtype == sizes.dtype == dtype
    assert (merged == x[:, :3]).all()
    assert sorted(sizes.flatten().tolist()) == [150, 150, 300]


@half_types
def test_the_mean_of_many_tokens_is_rounded_once(dtype):
    x = torch.randn(1, 197, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    k = torch.zeros(1, 1, 197, 2, dtype=dtype)
    k[..., 0], k[:, :, 1:2, 1] = 1, 1e-3
    merged, size = squeeze(ToMe(), x, None, 98, attention(k), 1)
    receiver = int(size.argmax())
    assert (size.dtype, size.sum().item()) == (dtype, 197)
    assert size[0, receiver] == 99  # every patch of A went to the same patch of B
    exact = torch.cat([x[:, 2::2], x[:, [2 * receiver - 1]]], dim=1).double().mean(dim=1)
    torch.testing.assert_close(merged[:, receiver], exact.to(dtype), rtol=0, atol=0)


def test_the_fused_token_weighs_attention_that_float16_cannot_hold():
    q, k = torch.zeros(1, 1, 5, 1), torch.zeros(1, 1, 5, 1)
    q[:, :, 0], k[0, 0, :, 0] = 1, torch.tensor([20.0, 19.0, 1.0, -1.0, 1.0])  # exp(-21) is below float16's range
    x = torch.tensor([[[0.0], [0.0], [1.0], [8.0], [1.0]]])
    fused, _ = squeeze(EViT(EViTOptions(fuse="mean")), x.half(), None, 2, attention(k.half(), q.half()), 1)
    small = torch.exp(torch.tensor(-2.0))
    expected = (2 + 8 * small) / (2 + small)
    assert fused.dtype == torch.float16
    assert float(fused[0, -1]) == pytest.approx(float(expected), rel=2e-3)
