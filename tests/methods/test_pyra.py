"""PYRA against loops: its gates, what they leave alone, what of them is trained, degrees they were not trained at."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import build, draw_tokens, refusal, squeeze, tune
from tocom import CompressedViT, gflops, load_model, make_part
from tocom.files import load_tensors
from tocom.methods.pyra import PYRA, Gate
from tocom.methods.tome import ToMe
from tocom.models import compress
from tocom.parts import Attention, Shape
from tocom.settings import Optimisation
from tocom.training import make_optimizer

DIM = 5
common = {
    "n_tokens": st.integers(7, 20),
    "prefix": st.integers(1, 4),
    "count": st.integers(1, 12),
    "seed": st.integers(0, 10**6),
}


def attention(k):
    return Attention(q=torch.zeros_like(k), k=k, v=k, scale=1.0, bias=None)


def fresh(n_tokens=17, prefix=1, depth=1):
    torch.manual_seed(0)
    return PYRA(shape=Shape(depth, DIM, 2, n_tokens, prefix)).double().eval()


@torch.no_grad()
def drawn(n_tokens=17, prefix=1, seed=0, scale=1.0):
    """Return a PYRA all of whose parameters matter."""
    part, generator = fresh(n_tokens, prefix), torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return part


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def factors_by_loops(pairs, gate, by_rank):
    """Return the factors [r][D] of sums of source and target, a list of r vectors, as the paper has them."""
    rows = []
    for pair in pairs:
        values = pair.tolist()
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
        affine = zip(values, gate.norm.weight.tolist(), gate.norm.bias.tolist(), strict=True)
        rows.append([(value - mean) / deviation * weight + bias for value, weight, bias in affine])
    w1 = [2 * sigmoid(sum(w * row[d] for w, row in zip(by_rank, rows, strict=False))) for d in range(DIM)]
    w2 = [2 * sigmoid(sum(w * m for w, m in zip(gate.by_width.tolist(), row, strict=True))) - 1 for row in rows]
    return [[1 + w1[d] * w2[i] for d in range(DIM)] for i in range(len(rows))]


def by_loops(x, sizes, k, count, prefix, gate, by_rank):
    """Merge the tokens [N, D] of one image; return what is left in its order."""
    metric, n_tokens = k.mean(dim=0), len(x)
    odd = [i for i in range(1, n_tokens, 2) if i >= prefix]
    best = []
    for a in (i for i in range(0, n_tokens, 2) if i >= prefix):
        cosines = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in odd]
        best.append((max(cosines), a, odd[cosines.index(max(cosines))]))
    merging = [(a, b) for _, a, b in sorted(best, reverse=True)[:count]]  # the most similar first
    mass = {i: sizes[i] * x[i] for i in range(n_tokens)}
    factors = factors_by_loops([mass[a] + mass[b] for a, b in merging], gate, by_rank)
    total, weight = dict(mass), dict(enumerate(sizes))
    for (a, b), factor in zip(merging, factors, strict=True):
        total[b] = total[b] + mass[a] * torch.tensor(factor, dtype=x.dtype)
        weight[b] += sizes[a]
    gone = {a for a, _ in merging}
    order = [*range(prefix), *(i for i in range(0, n_tokens, 2) if i >= prefix and i not in gone), *odd]
    return torch.stack([total[i] / weight[i] for i in order])


@given(trained=st.integers(0, 8), **common)
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_merging_is_that_of_the_loops_and_ranks_that_were_never_trained_count_nothing(
    n_tokens, prefix, count, seed, trained
):
    x, size, k = draw_tokens(n_tokens, seed, dim=DIM)
    part = drawn(n_tokens, prefix, seed)
    gate = part.gates[0]
    gate.change[trained:] = 0
    merged, _ = squeeze(part, x, size, count, attention(k), prefix)
    by_rank = (gate.start + gate.change)[:trained].tolist()
    count = min(count, (n_tokens - prefix) // 2)
    for image in range(len(x)):
        sizes = size[image, :, 0].tolist()
        expected = by_loops(x[image], sizes, k[image], count, prefix, gate, by_rank)
        torch.testing.assert_close(merged[image], expected)


@given(**common)
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_sizes_and_what_does_not_merge_are_those_of_tome(n_tokens, prefix, count, seed):
    x, size, k = draw_tokens(n_tokens, seed, dim=DIM)
    part = drawn(n_tokens, prefix, seed)
    assert torch.equal(*(squeeze(it, x, size, count, attention(k), prefix)[1] for it in (part, ToMe())))
    merged, plain = (squeeze(it, x, None, count, attention(k), prefix)[0] for it in (part, ToMe()))
    alone = (plain[:, :, None] == x[:, None]).all(dim=-1).any(dim=-1)  # tokens that are as they came
    assert torch.equal(merged[alone], plain[alone])
    assert alone[:, :prefix].all()


def test_at_the_start_it_is_tome_to_the_bit_and_only_by_width_has_a_gradient():
    for training in (False, True):
        x, size, k = draw_tokens(17, 3, dim=DIM)
        part = fresh().train(training)
        merged, _ = squeeze(part, x, size, 6, attention(k), 1)
        assert torch.equal(merged, squeeze(ToMe(), x, size, 6, attention(k), 1)[0])
        merged.square().sum().backward()
        gate = part.gates[0]
        assert gate.by_width.grad.abs().min() > 0
        assert not any(other.grad.any() for other in (gate.change, gate.norm.weight, gate.norm.bias))


def test_its_weights_start_as_the_paper_says_and_depend_on_torch_s_random_state_alone():
    start = torch.cat([gate.start for gate in fresh(197, 1, depth=12).gates])
    assert len(start) == 12 * 98
    assert start.abs().max() <= 1
    assert abs(start.mean()) < 0.1
    assert start.var().item() == pytest.approx(1 / 3, rel=0.1)
    assert torch.equal(start, torch.cat([gate.start for gate in fresh(197, 1, depth=12).gates]))


@torch.no_grad()
def test_factors_lie_between_minus_1_and_3_and_without_ranks_are_twice_a_sigmoid():
    gate, pairs = drawn(seed=4, scale=30.0).gates[0], torch.randn(50, 8, DIM, dtype=torch.float64)
    factors = gate(pairs)
    assert -1 <= factors.min() < -0.99
    assert 2.99 < factors.max() <= 3
    gate.change.zero_()  # as in eval mode all ranks then count nothing
    m = gate.norm(pairs)
    torch.testing.assert_close(gate(pairs), (2 * (m @ gate.by_width).sigmoid()).unsqueeze(-1).expand_as(pairs))


@torch.no_grad()
def test_more_pairs_than_it_has_ranks_for_are_padded_with_zeros():
    short, long = Gate(DIM, 3).double().eval(), Gate(DIM, 8).double().eval()
    for gate in (short, long):
        for parameter in gate.parameters():
            parameter.copy_(torch.linspace(-1, 2, len(parameter)))
    long.change.zero_()
    long.start[:3], long.change[:3] = short.start, short.change
    pairs = torch.randn(2, 6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(short(pairs), long(pairs))
    assert not torch.equal(long(pairs), long.train()(pairs))  # while it trains, all ranks count


@torch.no_grad()
def test_half_precision_is_close_to_float32():
    x, size, k = (part.float() for part in draw_tokens(17, 5, dim=DIM))
    part = drawn().float()
    for dtype, tolerance in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
        for gate in (part, drawn().to(dtype)):
            merged, sizes = squeeze(gate, x.to(dtype), size.to(dtype), 6, attention(k.to(dtype).float()), 1)
            chosen, _ = squeeze(part, x, size, 6, attention(k.to(dtype).float()), 1)
            assert merged.dtype == sizes.dtype == dtype
            assert (merged.float() - chosen).norm() < tolerance * chosen.norm()


def test_a_gate_costs_two_products_of_each_pair():
    vit = CompressedViT(build(), "pyra")
    for degree in (0, 3, 8):
        plain = gflops(CompressedViT(build(), "tome", degree))
        pairs = 17 - vit.set_degree(degree).tokens()[-1]
        assert gflops(vit) - plain == pytest.approx(2 * pairs * 16 / 1e9)


def test_gates_for_another_model_are_refused():
    assert "gates for 3 blocks, but the model has 2" in refusal(CompressedViT, build(), fresh(depth=3))
    assert "gates for 0 blocks" in refusal(CompressedViT, build(), PYRA())


# --- trained with the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["full", "head", {"kind": "lora", "rank": 2, "dropout": 0.1}], ids=str)
def test_its_gates_are_trained_with_every_tuning_and_those_of_the_degree_alone(tuning, backbone, digits, tmp_path):
    path, _ = tune(
        backbone, digits, tmp_path / "x", "3", compressor="pyra", tuning=tuning, settings={"weight_decay": 1}
    )
    tensors, original = load_tensors(path)[0], load_tensors(backbone)[0]
    kept = [name for name, value in tensors.items() if name in original and torch.equal(value, original[name])]
    assert ("blocks.0.mlp.fc1.weight" in kept) == (tuning != "full")
    model, about = load_model(path)
    vit = compress(model, about, about["compressor"], 3)
    for block, gate in enumerate(vit.compressor.gates):
        stored = {name: tensors[f"compressor.gates.{block}.{name}"] for name in ("by_width", "change", "start")}
        assert all(
            torch.equal(value, gate.get_parameter(name).data) for name, value in stored.items() if name != "start"
        )
        last = block == len(vit.compressor.gates) - 1
        assert gate.by_width.any() != last  # a head that reads the class token does not see what the last block merges
        assert gate.change[:3].all() != last
        assert not gate.change[3:].any()
        assert not gate.by_rank()[3:].any()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained, plain = vit(images), CompressedViT(model, "tome", 3)(images)
        assert not torch.equal(trained, plain)
        assert torch.equal(vit.set_degree(0)(images), model(images))
        assert vit.set_degree(8)(images).isfinite().all()


def test_no_weight_of_a_gate_is_decayed():
    vit = CompressedViT(build(), "pyra", degree=3)
    decayed = [
        id(p) for g in make_optimizer(vit, Optimisation()).param_groups if g["weight_decay"] for p in g["params"]
    ]
    assert decayed
    assert not {id(parameter) for parameter in vit.compressor.parameters()} & set(decayed)


def test_it_takes_no_options_and_goes_as_far_as_tome():
    assert "unknown key 'rank'" in refusal(make_part, "compressor", {"kind": "pyra", "rank": 3})
    assert PYRA.highest(None, 196) == 98
    assert not PYRA.learns(None)
