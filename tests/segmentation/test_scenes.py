"""Generated scenes: a function of the seed, every class among them, labels where the shapes are."""

import numpy as np
import pytest

from tocom.segmentation.scenes import CLASSES, IGNORED, scenes


def test_scenes_are_a_function_of_seed_and_index():
    images, labels = scenes(6, 32, seed=1)
    assert images.shape == (6, 3, 32, 32)
    assert labels.shape == (6, 32, 32)
    assert images.dtype == labels.dtype == np.uint8
    longer = scenes(9, 32, seed=1)
    assert np.array_equal(images, longer[0][:6])
    assert np.array_equal(labels, longer[1][:6])
    assert not np.array_equal(images, scenes(6, 32, seed=2)[0])


@pytest.mark.parametrize("size", [32, 64])
def test_every_class_and_unlabelled_pixels_occur(size):
    _, labels = scenes(60, size, seed=0)
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert set(np.flatnonzero(shares)) == {*range(len(CLASSES)), IGNORED}
    assert 0.3 < shares[0] < 0.9
    assert (shares[1 : len(CLASSES)] > 0.01).all()


def test_labels_change_where_the_image_does():
    images, labels = scenes(40, 64, seed=3)
    jump = np.abs(np.diff(images.astype(float), axis=-1)).mean(axis=1)
    left, right = labels[..., :-1], labels[..., 1:]
    ground = (left == 0) & (right == 0)
    edge = (left == 0) & (right == CLASSES.index("disc"))
    assert edge.sum() > 100
    assert jump[edge].mean() > 4 * jump[ground].mean()


def test_a_textured_shape_has_two_colours_and_a_plain_one_has_one():
    images, labels = scenes(60, 64, seed=4)
    jump = np.abs(np.diff(images.astype(float), axis=-1)).mean(axis=1)
    inside = {
        name: jump[(labels[..., :-1] == number) & (labels[..., 1:] == number)].mean()
        for number, name in enumerate(CLASSES)
    }
    assert min(inside["stripes"], inside["checks"]) > 1.3 * max(inside["square"], inside["triangle"])
