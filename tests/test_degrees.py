"""Schedules: how many tokens every block removes, and how many are left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.degrees import Inflected, counts, limit, token_counts
from tocom.errors import TocomError


def test_the_decreasing_schedule_is_that_of_tome_code():
    assert counts(Inflected(8, -1), 12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)


def test_the_increasing_schedule_is_that_of_tome_code():
    assert counts(Inflected(8, 1), 12) == (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)


@given(r=st.integers(0, 40), inflection=st.floats(-1, 1), depth=st.integers(2, 32))
def test_an_inflected_schedule_is_monotone_and_averages_r_up_to_cut_off_fractions(r, inflection, depth):
    schedule = counts(Inflected(r, inflection), depth)
    assert r - 1 < sum(schedule) / depth <= r
    assert list(schedule) == sorted(schedule, reverse=schedule[0] > schedule[-1])
    assert all(0 <= count <= 2 * r for count in schedule)
    if inflection <= 0:
        assert schedule[0] >= r >= schedule[-1]


@given(r=st.integers(0, 40), depth=st.integers(1, 32))
def test_inflection_zero_is_the_constant_schedule(r, depth):
    assert counts(Inflected(r, 0), depth) == counts(r, depth)


@pytest.mark.parametrize(
    ("degree", "cause"),
    [
        (-1, "-1"),
        (2.5, "2.5"),
        (True, "True"),
        ("8", "'8'"),
        (None, "None"),
        ([1, 2, -3], "-3"),
        ([1, 2, 3.0], "3.0"),
        ([1, 2], "2 entries, but the model has 3 blocks"),
        ([1, 2, 3, 4], "4 entries, but the model has 3 blocks"),
        (Inflected(8, -1.1), "inflection -1.1"),
        (Inflected(8, 2), "inflection 2"),
        (Inflected(8, float("nan")), "inflection nan"),
        (Inflected(-8, 0.5), "r=-8"),
    ],
)
def test_a_malformed_degree_is_refused_by_name(degree, cause):
    with pytest.raises(TocomError) as caught:
        counts(degree, 3)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vit_b16_at_degree_8_ends_with_101_of_197_tokens():
    assert token_counts(8, 12, 197, 1)[-1] == 101


def test_vit_b16_at_degree_16_meets_the_limit_in_its_last_block_only():
    assert token_counts(16, 12, 197, 1) == (181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11)


@pytest.mark.parametrize(
    ("n_tokens", "n_protected", "most"), [(197, 1, 98), (198, 2, 98), (8, 1, 3), (8, 0, 4), (5, 5, 0), (3, 5, 0)]
)
def test_at_most_half_of_the_unprotected_tokens_go(n_tokens, n_protected, most):
    assert limit(n_tokens, n_protected) == most


@given(degree=st.integers(0, 50), depth=st.integers(1, 16), n_tokens=st.integers(1, 300), n_protected=st.integers(0, 5))
def test_tokens_only_decrease_and_at_least_half_of_the_unprotected_survive_a_block(
    degree, depth, n_tokens, n_protected
):
    before = n_tokens
    for after in token_counts(degree, depth, n_tokens, n_protected):
        assert before - after in {degree, limit(before, n_protected)}
        assert before - after <= degree
        assert 2 * (after - n_protected) >= before - n_protected or before == after
        before = after


def parse_r(num_layers, r, inflect):
    """The published rule (ToMe's public code), written down once more."""
    smallest = int(r * (1.0 - inflect))
    step = (2 * r - smallest - smallest) / (num_layers - 1)
    return tuple(int(smallest + step * i) for i in range(num_layers))


@given(st.integers(0, 40), st.integers(-10, 10), st.integers(2, 32))
@settings(max_examples=400, deadline=None)
def test_inflected_schedules_round_as_the_public_code_does(r, tenths, depth):
    assert counts(Inflected(r, tenths / 10), depth) == parse_r(depth, r, tenths / 10)
