"""Compression degrees: how many tokens each block removes.

A degree is an integer ``r`` (tokens removed in every block), a list with one count a block, or an
``Inflected(r, i)`` whose counts rise or fall linearly over depth (ToMe, arXiv 2210.09461, appendix D;
``i = -1`` is its decreasing schedule, ``i = 0`` the constant one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tocom.errors import TocomError


class Inflected(NamedTuple):
    """A schedule whose counts change linearly over depth and remove ``r`` tokens a block on average.

    Fractions of a token are cut off, as in ToMe's code, so the average may fall short of ``r`` by less than one.
    """

    r: int
    inflection: float


Degree = int | Sequence[int] | Inflected


def counts(degree: Degree, depth: int) -> tuple[int, ...]:
    """Return the number of tokens to remove in each of ``depth`` blocks, before any block's own limit.

    Raises:
        TocomError: a count is negative or not whole, a list has the wrong length, or the inflection leaves [-1, 1].
    """
    if isinstance(degree, Inflected):
        result = _inflected(degree, depth)
    elif isinstance(degree, Sequence) and not isinstance(degree, str):
        result = tuple(degree)
        if len(result) != depth:
            raise TocomError(f"degree {list(degree)} has {len(result)} entries, but the model has {depth} blocks")
    else:
        result = (degree,) * depth
    for count in result:
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise TocomError(f"degree {degree!r} is out of range: counts are whole numbers of tokens, 0 or more")
    return result


def _inflected(degree: Inflected, depth: int) -> tuple[int, ...]:
    r, inflection = degree
    if not -1 <= inflection <= 1:
        raise TocomError(f"inflection {inflection} is out of range: it lies between -1 and 1")
    first = int(r * (1 - inflection))
    last = 2 * r - first
    step = (last - first) / max(depth - 1, 1)  # in this order: other roundings give other counts now and then
    return tuple(int(first + step * block) for block in range(depth))


def limit(n_tokens: int, n_protected: int) -> int:
    """Return the most tokens that one block may remove: half of those that are not protected."""
    return max(n_tokens - n_protected, 0) // 2


def token_counts(
    degree: Degree, depth: int, n_tokens: int, n_protected: int, most: Callable[[int, int], int] = limit
) -> tuple[int, ...]:
    """Return the number of tokens that leave each block, for images that enter with ``n_tokens``.

    Args:
        most: (tokens, protected ones) -> the most that one block may remove.
    """
    result = []
    for count in counts(degree, depth):
        n_tokens -= min(count, most(n_tokens, n_protected))
        result.append(n_tokens)
    return tuple(result)
