"""The largest entries: how many, which of equal ones, what is lost, and what goes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.methods.topk import TopK, TopKOptions, largest
from tocom.parts import Shape, left_of


def part(**options):
    return TopK(TopKOptions(**options), Shape(3, 24, 2, 17, 1))


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=40),
    count=st.integers(1, 15),
)
@settings(deadline=None, max_examples=80)
def test_just_so_many_entries_are_sent_the_first_of_equal_ones_and_as_they_are(values, count):
    x = torch.tensor([values, values[::-1]], dtype=torch.float64)
    sent = part().squeeze(x, count)
    number = max(1, round(len(values) * (1 - count / 16)))
    for row, got, mask in zip(x.tolist(), sent.x.tolist(), sent.mask.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:number]
        assert sorted(best) == [i for i, chosen in enumerate(mask) if chosen]
        assert got == [value if i in best else 0 for i, value in enumerate(row)]
    assert torch.equal(part().squeeze(sent.x, count).x, sent.x)
    lost, whole = (x - sent.x).square().sum(dim=1), x.square().sum(dim=1)
    assert (lost <= (1 - number / len(values)) * whole + 1e-12).all()


def test_any_leading_dimensions_are_taken_one_by_one():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = largest(x, 3)
    assert all(torch.equal(mask[i, j], largest(x[i, j][None], 3)[0]) for i in range(2) for j in range(3))
    assert largest(x, 8).all()


@pytest.mark.parametrize("feedback", ["none", "ef", "ef21"])
def test_shared_entries_are_the_derivative_of_the_mask(feedback):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    pipeline = part(feedback=feedback).train()
    mask = pipeline.squeeze(x, 10).mask  # in a first batch, feedback holds nothing yet
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = pipeline.send(given, 10, 0), expected * mask
    assert torch.equal(y, z)
    y.backward(gradient)
    z.backward(gradient)
    assert torch.equal(given.grad, expected.grad)
    assert (given.grad != 0).sum() == 2 * left_of(50, 10)


def test_own_entries_are_the_largest_of_the_gradient():
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(2, 50, generator=generator) for _ in range(2))
    x.requires_grad_()
    part(backward="own").send(x, 12, 0).backward(gradient)
    assert torch.equal(x.grad, torch.where(largest(gradient, left_of(50, 12)), gradient, 0))
    assert not torch.equal(x.grad != 0, largest(x, left_of(50, 12)))


def test_labels_tell_options_apart():
    assert TopK.label(TopKOptions()) == "TopK"
    assert TopK.label(TopKOptions(backward="own", backward_degree=2, feedback="ef_mixed")) == (
        "TopK (own gradients, gradients at 2, EF-MIXED)"
    )
