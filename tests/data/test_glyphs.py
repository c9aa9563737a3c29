"""Procedural images: a function of their seed, and what their labels say."""

import numpy as np
import pytest

from tocom.data import glyphs

MAKERS = {
    glyphs.letters: len(glyphs.LETTERS),
    glyphs.rotation: 8,
    glyphs.font: len(glyphs.FONTS),
    glyphs.counting: 6,
    glyphs.location: 9,
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_images_are_a_function_of_the_seed(make):
    images, labels = make(24, seed=5)
    again, labels_again = make(24, seed=5)
    other, _ = make(24, seed=6)
    assert images.shape == (24, 3, 32, 32)
    assert images.dtype == np.uint8
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(images, other)


@pytest.mark.parametrize(("make", "classes"), MAKERS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_labels_cover_the_classes_evenly(make, classes):
    _, labels = make(60 * classes, seed=0)
    counts = np.bincount(labels, minlength=classes)
    assert len(counts) == classes
    assert counts.min() > 25


def test_there_are_41_letters_and_16_fonts_and_no_digit():
    assert len(set(glyphs.LETTERS)) == 41
    assert len(set(glyphs.FONTS)) == 16
    assert not any(letter.isdigit() for letter in glyphs.LETTERS)


def test_a_glyph_is_drawn_where_it_is_placed():
    for x, y in ((8, 8), (24, 8), (8, 24), (16, 16)):
        coverage = glyphs.place("X", "DejaVuSans", angle=0, size=16, shear=0, x=x, y=y)
        rows, columns = np.indices(coverage.shape)
        assert (columns * coverage).sum() / coverage.sum() == pytest.approx(x - 0.5, abs=0.5)
        assert (rows * coverage).sum() / coverage.sum() == pytest.approx(y - 0.5, abs=0.5)


def test_a_turn_by_90_degrees_turns_the_image_counter_clockwise():
    upright = glyphs.place("F", "DejaVuSans", angle=0, size=40, shear=0, x=16, y=16)
    turned = glyphs.place("F", "DejaVuSans", angle=90, size=40, shear=0, x=16, y=16)
    assert np.abs(np.rot90(upright) - turned).mean() < 0.02 < np.abs(upright - turned).mean()


def test_letters_are_light_on_dark():
    coverage = glyphs.place("B", "DejaVuSans", angle=0, size=40, shear=0, x=16, y=16)[None].repeat(50, 0)
    images = glyphs.colourise(coverage, np.random.default_rng(0)).astype(float)
    inside, outside = coverage[0] > 0.95, coverage[0] < 0.05
    assert (images[:, :, inside].mean((1, 2)) > images[:, :, outside].mean((1, 2)) + 25).all()


def test_counting_draws_as_many_letters_as_it_says(monkeypatch):
    cells = []
    monkeypatch.setattr(glyphs, "_in_cell", lambda rng, cell: cells.append(cell) or np.zeros((32, 32), np.float32))
    _, labels = glyphs.counting(50, seed=0)
    assert len(cells) == (labels + 1).sum()
    first = iter(cells)
    for label in labels:  # the letters of one image lie in different cells
        assert len({next(first) for _ in range(label + 1)}) == label + 1


def test_a_small_letter_lies_in_its_cell():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for cell in range(9):
        alone = glyphs._in_cell(rng, cell)
        row, column = ndimage.center_of_mass(alone)
        assert (int(column // (32 / 3)), int(row // (32 / 3))) == (cell % 3, cell // 3)
