"""Activation Beacon against a reading by loops, and what it promises: nothing changes where there are no beacons."""

import pytest
import torch
from torch.nn import functional as F

from tests.small import refusal
from tests.small_lm import build_lm, tokens
from tocom import CompressedLM, load_part, make_part, save_part
from tocom.lm import heads, turned

WINDOW = 8


def beacons(alphas=(2, 4, 8), window=WINDOW, sink=1, **overrides):
    """A model behind beacons whose projections and embedding are not the model's."""
    options = {"kind": "beacon", "alphas": alphas, "window": window, "sink": sink}
    lm = CompressedLM(build_lm(**overrides), options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lm.compressor.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return lm


@torch.no_grad()
def by_loops(lm, text, alpha):
    """Read one text row by row, every row against a list of the keys and values that it may see."""
    part, model = lm.compressor, lm.model
    chunks = [text[start : start + WINDOW] for start in range(0, len(text), WINDOW)]
    memory = [[] for _ in model.model.layers]  # of each layer, (key before rotation, value)
    outputs, sizes = [], []
    for number, chunk in enumerate(chunks):
        rows = []
        for index, token in enumerate(chunk):
            rows.append((model.model.embed_tokens.weight[token], False))
            if number + 1 < len(chunks) and (index + 1) % alpha == 0:
                rows.append((part.embedding, True))
        x = [row for row, _ in rows]
        for index, block in enumerate(model.model.layers):
            attn, old = block.self_attn, memory[index]
            projected = []
            for row, (_, is_beacon) in zip(x, rows, strict=True):
                normed = block.input_layernorm(row)
                linears = [getattr(attn, f"{name}_proj") for name in "qkv"]
                weights = [
                    part.maps[name][index] if is_beacon else linear.weight
                    for name, linear in zip("qkv", linears, strict=True)
                ]
                projected.append(
                    [F.linear(normed, weight, linear.bias) for weight, linear in zip(weights, linears, strict=True)]
                )
            pairs = [*old, *((k, v) for _, k, v in projected)]
            results = []
            for place, row in enumerate(x):
                seen = pairs[: len(old) + place + 1]
                cos, sin = lm.turns(row, torch.arange(len(seen)))
                keys = turned(heads(torch.stack([k for k, _ in seen])[None], attn), cos, sin)
                values = heads(torch.stack([v for _, v in seen])[None], attn)
                q = turned(heads(projected[place][0][None, None], attn), cos[:, -1:], sin[:, -1:])
                keys, values = (part.repeat_interleave(attn.num_key_value_groups, 1) for part in (keys, values))
                weights = (q @ keys.transpose(2, 3) * attn.head_dim**-0.5).softmax(-1)
                out = row + attn.o_proj((weights @ values).transpose(1, 2).flatten())
                results.append(out + block.mlp(block.post_attention_layernorm(out)))
            kept = [pair for place, pair in enumerate(pairs[len(old) :]) if rows[place][1]]
            if number == 0:
                kept = [*pairs[: part.options.sink], *kept]
            memory[index], x = [*old, *kept], results
        sizes.append(len(memory[0]))
        outputs += [out for out, (_, is_beacon) in zip(x, rows, strict=True) if not is_beacon]
    return model.lm_head(model.model.norm(torch.stack(outputs))), sizes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [9, 24, 29])
@pytest.mark.parametrize("degree", [1, 2, 3])
@torch.no_grad()
def test_logits_are_those_of_a_reading_by_loops(degree, length, bias):
    lm = beacons(attention_bias=bias).set_degree(degree)
    text = tokens(1, length)
    expected, sizes = by_loops(lm, text[0], (2, 4, 8)[degree - 1])
    torch.testing.assert_close(lm(text)[0], expected, rtol=1e-9, atol=1e-9)
    alpha = (2, 4, 8)[degree - 1]
    before = (length - 1) // WINDOW  # windows with beacons
    assert sizes[before - 1] == 1 + before * WINDOW // alpha


@pytest.mark.parametrize("length", [8, 16, 21])
@torch.no_grad()
def test_alpha_0_by_windows_is_the_full_forward_pass(length):
    lm, text = beacons(), tokens(2, length)
    by_windows = lm.model.lm_head(lm.compressor.by_windows(lm, text, 0))
    torch.testing.assert_close(by_windows, lm.model(text).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_no_beacon_has_been_seen_by_is_as_without():
    lm = beacons().set_degree(2)
    short, long = tokens(2, WINDOW), tokens(2, 20)
    assert torch.equal(lm(short), lm.set_degree(0)(short))
    with_beacons, without = lm.set_degree(2)(long), lm.model(long).logits
    torch.testing.assert_close(with_beacons[:, :4], without[:, :4], rtol=0, atol=1e-10)
    assert not torch.isclose(with_beacons[:, 4:], without[:, 4:]).all(dim=-1).any()


@torch.no_grad()
def test_a_beacon_for_every_token_is_not_the_model_itself():
    lm = beacons(alphas=(1, 2)).set_degree(1)
    assert not torch.isclose(lm(tokens(1, 20))[0, -1], lm.model(tokens(1, 20)).logits[0, -1]).any()


@pytest.mark.parametrize(("degree", "rows"), [(0, 256), (1, 1 + 31 * 4 + 8), (2, 1 + 31 * 2 + 8), (3, 1 + 31 + 8)])
def test_the_cache_holds_sink_beacons_and_a_window(degree, rows):
    lm = beacons().set_degree(degree)
    assert lm.cache_bytes() == 2 * 2 * 16 * rows * 8
    assert lm.cache_bytes(WINDOW) == 2 * 2 * 16 * WINDOW * 8


def test_only_beacons_learn_on_the_backbone_and_begin_as_the_model():
    lm = CompressedLM(build_lm(), "beacon")
    part = lm.compressor
    for index, block in enumerate(lm.model.model.layers):
        for name, own in part.maps.items():
            assert torch.equal(own[index], getattr(block.self_attn, f"{name}_proj").weight)
    assert torch.equal(part.embedding, lm.model.model.embed_tokens.weight[256])
    objective = part.objective(lm, lm, False)
    assert {objective.draw(torch.Generator().manual_seed(seed)) for seed in range(30)} == {1, 2, 3, 4}
    text = tokens(2, 80)
    loss = objective.set(2)(text)
    expected = F.cross_entropy(lm(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert (lm.degree, loss.item()) == (2, pytest.approx(expected.item(), rel=1e-6))
    loss.backward()
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"student.compressor.{name}" for name, _ in part.named_parameters()}
    assert all(parameter.grad.any() for parameter in part.parameters())


def test_learned_beacons_stay_what_they_are_in_another_model(tmp_path):
    part = beacons().compressor
    save_part(tmp_path / "part", part)
    loaded = load_part(tmp_path / "part", "compressor")
    lm = CompressedLM(build_lm(seed=3).float(), loaded)
    for name, value in lm.compressor.state_dict().items():
        assert torch.equal(value, part.state_dict()[name].to(value.dtype)), name


def test_options_and_degrees_that_make_no_sense_are_refused():
    lm = beacons()
    assert "has 3 alphas" in refusal(lm.set_degree, 4)
    assert "give one degree" in refusal(lm.set_degree, [1, 2])
    for options, message in (
        ({"alphas": [4, 2]}, "do not rise"),
        ({"alphas": [3]}, "window 32 is no multiple of alpha 3"),
        ({"sink": 40}, "larger than the window"),
    ):
        assert message in refusal(make_part, "compressor", {"kind": "beacon"} | options, lm.shape)
