"""Procedural images: a function of their seed, and what their labels say."""

import numpy as np
import pytest
from scipy import ndimage

from tocom.data import glyphs

MAKERS = {
    glyphs.letters: len(glyphs.LETTERS),
    glyphs.rotation: 8,
    glyphs.counting: 6,
}


@pytest.mark.parametrize(("make", "classes"), MAKERS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_images_are_a_function_of_the_seed_and_labels_cover_the_classes_evenly(make, classes):
    images, labels = make(60 * classes, seed=0)
    assert images.shape == (60 * classes, 3, 32, 32)
    assert images.dtype == np.uint8
    counts = np.bincount(labels, minlength=classes)
    assert len(counts) == classes
    assert counts.min() > 25
    again, labels_again = make(60 * classes, seed=0)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(make(8, seed=5)[0], make(8, seed=6)[0])


def test_a_glyph_is_drawn_where_it_is_placed_turned_counter_clockwise_and_light_on_dark():
    for x, y in ((8, 8), (24, 8), (8, 24), (16, 16)):
        centre = ndimage.center_of_mass(glyphs.place("X", "DejaVuSans", angle=0, size=16, shear=0, x=x, y=y))
        assert centre == pytest.approx((y - 0.5, x - 0.5), abs=0.5)
    upright, turned = (glyphs.place("F", "DejaVuSans", angle=a, size=40, shear=0, x=16, y=16) for a in (0, 90))
    assert np.abs(np.rot90(upright) - turned).mean() < 0.02 < np.abs(upright - turned).mean()
    images = glyphs.colourise(upright[None].repeat(50, 0), np.random.default_rng(0)).astype(float)
    inside, outside = upright > 0.95, upright < 0.05
    assert (images[:, :, inside].mean((1, 2)) > images[:, :, outside].mean((1, 2)) + 25).all()


def test_small_letters_lie_in_their_cells_and_as_many_as_counting_says(monkeypatch):
    rng = np.random.default_rng(0)
    for cell in range(9):
        row, column = ndimage.center_of_mass(glyphs._in_cell(rng, cell))
        assert (int(column // (32 / 3)), int(row // (32 / 3))) == (cell % 3, cell // 3)
    cells = []
    monkeypatch.setattr(glyphs, "_in_cell", lambda rng, cell: cells.append(cell) or np.zeros((32, 32), np.float32))
    _, labels = glyphs.counting(50, seed=0)
    assert len(cells) == (labels + 1).sum()
    first = iter(cells)
    for label in labels:  # the letters of one image lie in different cells
        assert len({next(first) for _ in range(label + 1)}) == label + 1
