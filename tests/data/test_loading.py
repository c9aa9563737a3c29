"""Training images on their way to a model: errors of loading processes, and policies of augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small import QUICK, build
from tocom.data.loading import TrainImages, feed, posterize, train_transform
from tocom.errors import TocomError


@pytest.fixture
def files(tmp_path):
    """Three images, of which the last cannot be read."""
    for number in range(2):
        Image.fromarray(np.full((40, 40, 3), 50 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    return [tmp_path / f"{number}.png" for number in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line_whoever_loads_it(files, workers):
    data = TrainImages(files, torch.arange(3), train_transform(build(), QUICK), 0)
    items = feed(data, workers)(0, [torch.tensor([0, 1]), torch.tensor([2])])
    images, labels = next(items)
    assert (images.shape, labels.tolist()) == ((2, 3, 32, 32), [0, 1])
    with pytest.raises(TocomError) as caught:
        next(items)
    assert str(caught.value).startswith(f"{files[2]} is not a readable image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["foo", "rand-z9", "foo-m9"])
def test_a_policy_that_timm_does_not_know_is_refused(policy):
    settings = QUICK.model_copy(update={"auto_augment": policy})
    with pytest.raises(TocomError, match=f"auto_augment '{policy}' is no policy that timm knows .*, or null"):
        train_transform(build(), settings)


def test_the_strongest_posterizing_keeps_no_bit_and_others_keep_the_highest():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels, pixels.T, 255 - pixels], axis=-1))
    for bits in range(9):
        step = 2 ** (8 - bits)
        expected = np.asarray(image).astype(int) // step * step
        assert np.array_equal(np.asarray(posterize(image, bits)), expected)


def test_the_published_policy_works_at_its_strongest():
    settings = QUICK.model_copy(update={"auto_augment": "rand-m10-n20-inc1"})  # every operation, at full magnitude
    transform = train_transform(build(), settings)
    image = Image.fromarray(np.full((40, 40, 3), 99, dtype=np.uint8))
    for _ in range(30):
        assert transform(image).shape == (3, 32, 32)
