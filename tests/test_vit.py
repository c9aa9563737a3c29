"""The forward pass against timm at degree 0, against loops at every other degree, and what it refuses."""

import pytest
import timm
import torch
from timm.models import vision_transformer as timm_vit

from tocom.compressed import gflops
from tocom.degrees import Inflected, token_counts
from tocom.errors import TocomError
from tocom.methods.evit import EViT
from tocom.methods.tome import ToMe
from tocom.parts import descending
from tocom.vit import CompressedViT

SUMMED, MEAN = ({"kind": "evit", "fuse": how} for how in ("sum", "mean"))
UNPROTECTED, FUSION = {"kind": "pitome", "unprotected": "all"}, {"kind": "tofu", "pruning_blocks": 1}
COMPRESSORS = pytest.mark.parametrize("compressor", ["tome", "evit", SUMMED, MEAN], ids=str)

# --- an independent forward pass: one image, one head, one token at a time ----------------------------------


def evit_by_loops(tokens, class_attention, count, prefix, fuse):
    removed = min(count, (len(tokens) - prefix) // 2)
    if not removed:
        return tokens
    ranked = sorted(range(prefix, len(tokens)), key=class_attention.__getitem__)
    cut = removed + bool(fuse)
    pruned, left = ranked[:cut], sorted(ranked[cut:])
    result = [tokens[i] for i in (*range(prefix), *left)]
    if fuse:
        total = sum(class_attention[i] for i in pruned) if fuse == "mean" else 1
        result.append(sum(class_attention[i] / total * tokens[i] for i in pruned))
    return torch.stack(result)


def logits_by_loops(model, image, schedule, merge, compressor="tome", proportional_attention=True):
    """Classify one image [3, H, W]; ``merge`` is the loop_merge of conftest.py."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    sizes = [1.0] * len(x)
    for block, count in zip(model.blocks, schedule, strict=True):
        attn, normed = block.attn, block.norm1(x)
        query, key, value = attn.qkv(normed).chunk(3, dim=-1)
        outputs, keys, class_attention = [], [], torch.zeros(len(x), dtype=x.dtype)
        for head in range(attn.num_heads):
            part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            q, k, v = attn.q_norm(query[:, part]), attn.k_norm(key[:, part]), value[:, part]
            logits = q @ k.T / attn.head_dim**0.5
            if proportional_attention and compressor == "tome":
                logits = logits + torch.tensor(sizes, dtype=x.dtype).log()
            weights = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
            outputs.append(weights @ v)
            keys.append(k)
            class_attention += weights[0] / attn.num_heads
        y = attn.norm(torch.cat(outputs, dim=1))
        if attn.gate is not None:
            y = y / (1 + torch.exp(-attn.gate(normed)))
        x = x + block.ls1(attn.proj(y))
        if compressor == "tome":
            x, sizes = merge(x, sizes, sum(keys) / len(keys), count, prefix)
        else:
            fuse = None if compressor == "evit" else compressor["fuse"]
            x = evit_by_loops(x, class_attention.tolist(), count, prefix, fuse)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.global_pool == "avg" and compressor == "tome":
        pooled = range(0 if model.pool_include_prefix else prefix, len(x))
        mean = sum(sizes[i] * x[i] for i in pooled) / sum(sizes[i] for i in pooled)
        return model.head(model.fc_norm(mean))
    return model.forward_head(x[None])[0]


@torch.no_grad()
def check_against_loops(model, images, degree, loop_merge, **settings):
    vit = CompressedViT(model, degree=degree, **settings)
    schedule = (degree,) * 3 if isinstance(degree, int) else degree
    expected = [logits_by_loops(model, image, schedule, loop_merge, **settings) for image in images]
    torch.testing.assert_close(vit(images), torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("degree", [4, 100, (0, 5, 2)], ids=str)
def test_logits_at_any_degree_are_those_of_the_loops(family, images, loop_merge, degree):
    check_against_loops(family, images, degree, loop_merge)


@pytest.mark.parametrize("compressor", ["evit", SUMMED, MEAN], ids=str)
@pytest.mark.parametrize("degree", [4, 100, (0, 5, 2)], ids=str)
@pytest.mark.parametrize("overrides", [{}, {"reg_tokens": 4}, {"distilled": True}, {"global_pool": "avg"}], ids=str)
def test_pruned_logits_are_those_of_the_loops(make_vit, images, loop_merge, compressor, degree, overrides):
    check_against_loops(make_vit(**overrides), images, degree, loop_merge, compressor=compressor)


def test_logits_without_proportional_attention_are_those_of_the_loops(make_vit, images, loop_merge):
    check_against_loops(make_vit(), images, 4, loop_merge, proportional_attention=False)


# --- degree 0 is timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@torch.no_grad()
def test_degree_0_is_the_plain_model(family, images, dtype, tolerance):
    model, images = family.to(dtype), images.to(dtype)
    expected = model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(CompressedViT(model)(images), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_degree_0_in_bfloat16_is_as_close_to_float32_as_the_plain_model_is(family, images):
    exact = family.float()(images.float())
    model, images = family.bfloat16(), images.bfloat16()
    own, plain = (
        (logits.float() - exact).norm() / exact.norm() for logits in (CompressedViT(model)(images), model(images))
    )
    assert own < 1.5 * plain + 0.005 < 0.05


def test_degree_0_in_train_mode_is_the_plain_model_dropout_included(family, images):
    vit = CompressedViT(family).train()
    torch.manual_seed(0)
    expected = family(images)
    torch.manual_seed(0)
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-12)


def test_a_distilled_model_trains_both_heads_as_timm_does(make_vit, images):
    model = make_vit(distilled=True).train()
    model.set_distilled_training(True)
    for ours, theirs in zip(CompressedViT(model)(images), model(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
def test_another_image_size_works_if_the_model_allows_it(make_vit, loop_merge):
    model = make_vit(dynamic_img_size=True)
    images = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    torch.testing.assert_close(CompressedViT(model)(images), model(images), rtol=0, atol=1e-12)
    check_against_loops(model, images, 5, loop_merge)


@torch.no_grad()
def test_a_hybrid_model_with_a_convolutional_stem_works_too():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=2, num_classes=7).eval()
    vit, images = CompressedViT(model), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(vit(images), model(images), rtol=0, atol=1e-5)
    plain = gflops(vit)
    assert vit.set_degree(2)(images).isfinite().all()
    assert gflops(vit) < plain


# --- other degrees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_parameter_gets_a_finite_gradient_at_a_high_degree(family, images, training):
    vit = CompressedViT(family, degree=8).train(training)
    logits = vit(images)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("qkv.bias") and not training:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@torch.no_grad()
def test_merging_identical_patches_changes_nothing(make_vit, global_pool):
    model = make_vit(pos_embed="none", global_pool=global_pool)
    images = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    torch.testing.assert_close(CompressedViT(model, degree=6)(images), model(images))
    without = CompressedViT(model, degree=6, proportional_attention=False)(images)
    assert not torch.allclose(without, model(images), rtol=1e-3)


class Recording(ToMe):
    """ToMe that writes down how many tokens leave each block."""

    def compress(self, tokens, attention):
        tokens = super().compress(tokens, attention)
        self.seen.append(tokens.x.shape[1])
        return tokens


class RecordingEViT(Recording, EViT):
    """The same for EViT."""


@pytest.mark.parametrize("kind", [Recording, RecordingEViT])
@pytest.mark.parametrize("degree", [0, 3, 100, [1, 0, 7], Inflected(3, -1)], ids=str)
def test_tokens_are_those_that_leave_the_blocks(make_vit, images, kind, degree):
    compressor = kind()
    compressor.seen = []
    vit = CompressedViT(make_vit(reg_tokens=2), compressor, degree)
    vit(images)
    assert vit.tokens() == tuple(compressor.seen) == token_counts(degree, 3, 19, 3)


# --- cost -----------------------------------------------------------------------------------------------------


def multiply_adds(n_tokens, schedule, dim=24, heads=2, classes=7, patches=16, patch=8, compressor="tome"):
    """Count the multiply-adds of the SMALL model of conftest.py with a class token, layer by layer."""
    total = patches * 3 * patch**2 * dim + dim * classes
    for count in schedule:
        total += 3 * n_tokens * dim**2  # qkv
        total += 2 * n_tokens**2 * dim  # attention
        total += n_tokens * dim**2  # projection
        if count:
            if compressor == "tome":  # similarity of every A token with every B token
                total += (n_tokens + 1) // 2 * (n_tokens // 2) * dim // heads
            else:  # attention of the class token
                total += n_tokens * dim
        n_tokens -= count
        total += 2 * n_tokens * dim * 4 * dim  # MLP
    return total


@pytest.mark.parametrize("compressor", ["tome", "evit"])
@pytest.mark.parametrize("schedule", [(0, 0, 0), (3, 3, 3), (0, 5, 1)], ids=str)
def test_gflops_are_billions_of_multiply_adds(make_vit, compressor, schedule):
    vit = CompressedViT(make_vit(), compressor, list(schedule))
    assert gflops(vit) * 1e9 == pytest.approx(multiply_adds(17, schedule, compressor=compressor), abs=0.5)


def test_gflops_of_another_image_size_are_counted(make_vit):
    vit = CompressedViT(make_vit(dynamic_img_size=True))
    wide = multiply_adds(25, (0, 0, 0), patches=24)
    assert gflops(vit, (48, 32)) * 1e9 == pytest.approx(wide, abs=0.5)
    assert gflops(vit, 32) == gflops(vit)


def test_counting_gflops_leaves_the_mode_and_the_random_state_as_they_were(make_vit):
    vit = CompressedViT(make_vit(drop_rate=0.5), degree=3).train()
    before = torch.get_rng_state()
    gflops(vit)
    assert torch.equal(torch.get_rng_state(), before)
    assert vit.training
    assert vit.model.training


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ({"global_pool": "map", "class_token": False}, "'map' pooling"),
        ({"global_pool": "prr"}, "'prr' pooling"),
        ({"global_pool": "max"}, "'max' pooling"),
        ({"global_pool": "avgmax"}, "'avgmax' pooling"),
        ({"block_fn": timm_vit.ParallelScalingBlock}, "blocks of type ParallelScalingBlock"),
        ({"block_fn": timm_vit.ParallelThingsBlock}, "blocks of type ParallelThingsBlock"),
        ({"block_fn": timm_vit.ResPostBlock, "init_values": 0.1}, "blocks of type ResPostBlock"),
        ({"attn_layer": "diff"}, "attention of type DiffAttention"),
        ({"patch_drop_rate": 0.5}, "patch dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_would_go_wrong_is_refused_by_name(make_vit, overrides, cause):
    with pytest.raises(TocomError, match=f"^VisionTransformer is not supported.*{cause}") as caught:
        CompressedViT(make_vit(**overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet10t", "mixer_s32_224"])
def test_a_model_that_is_no_vit_is_refused_by_name(name):
    model = timm.create_model(name)
    with pytest.raises(TocomError, match=f"^{type(model).__name__} is not supported"):
        CompressedViT(model)


@pytest.mark.parametrize(
    ("degree", "cause"),
    [
        (-1, "degree -1 is out of range"),
        ([1, 2], "2 entries, but the model has 3 blocks"),
        (Inflected(2, 1.5), "inflection 1.5 is out of range"),
    ],
    ids=str,
)
def test_a_malformed_degree_is_refused_and_the_model_stays_as_it_was(make_vit, images, degree, cause):
    with pytest.raises(TocomError, match=cause):
        CompressedViT(make_vit(), degree=degree)
    vit = CompressedViT(make_vit(), degree=2)
    before = vit(images)
    with pytest.raises(TocomError, match=cause):
        vit.set_degree(degree)
    assert vit.degree == 2
    assert torch.equal(vit(images), before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("compressor", "dynamo"),
    [("tome", False), ("tome", True), ("evit", False), ("tome_mlp", False)]
    + [(part, dynamo) for part in ("pitome", UNPROTECTED, FUSION, "pyra", "sparse_tuning") for dynamo in (False, True)]
    + [("topk", False), ("quantise", True), ("lorc", False), ("condense", True), ("condense", False)],
    ids=str,
)
def test_every_degree_is_exported_to_onnx_and_torch_export_and_gives_the_same_logits(compressor, dynamo, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    ).eval()
    vit = CompressedViT(model, compressor, degree=5).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vit(images)
        torch.testing.assert_close(torch.export.export(vit, (images,)).module()(images), expected)
        torch.onnx.export(vit, (images,), tmp_path / "vit.onnx", dynamo=dynamo, verbose=False)
    session = ort.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=2e-6)


def test_ties_are_broken_by_position_also_in_what_is_exported(monkeypatch):
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]])
    assert descending(scores).tolist() == [[1, 2, 4, 0, 3]]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    distinct = torch.randperm(64, generator=torch.Generator().manual_seed(0)).float()[None]
    assert torch.equal(descending(distinct), distinct.argsort(dim=-1, descending=True))


def test_gradient_checkpointing_of_timm_is_heeded_and_changes_no_gradient():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    vit, images = CompressedViT(model, degree=4).train(), torch.randn(2, 3, 32, 32)
    calls, gradients = [], []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        handle = model.blocks[0].norm1.register_forward_hook(count)
        vit(images).square().sum().backward()
        handle.remove()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert calls == [1, 2]  # computed once more on the way back
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
