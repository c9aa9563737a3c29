"""Training images on their way to a model: errors of loading processes, and policies of augmentation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tocom.data.loading import TrainImages, feed, mixer, posterize, train_transform
from tocom.errors import TocomError
from tocom.settings import Augmentation

MODEL = SimpleNamespace(
    patch_embed=SimpleNamespace(img_size=(32, 32)), pretrained_cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3}
)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_the_same_whoever_loads_them_and_one_that_cannot_be_read_is_one_line(tmp_path, workers):
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(files[number])
    files[2].write_bytes(b"no image")
    data = TrainImages(files, torch.arange(3), train_transform(MODEL, Augmentation()), 0)
    items = feed(data, workers)(4, [torch.tensor([1, 0]), torch.tensor([2])])
    images, labels = next(items)
    assert labels.tolist() == [1, 0]
    assert torch.equal(images, torch.stack([data[4, 1][0], data[4, 0][0]]))
    assert not torch.equal(data[4, 1][0], data[5, 1][0])
    with pytest.raises(TocomError) as caught:
        next(items)
    assert str(caught.value).startswith(f"{files[2]} is not a readable image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["foo", "rand-z9", "foo-m9"])
def test_a_policy_that_timm_does_not_know_is_refused(policy):
    with pytest.raises(TocomError, match=f"auto_augment '{policy}' is no policy that timm knows .*, or null"):
        train_transform(MODEL, Augmentation(auto_augment=policy))


def test_the_strongest_posterizing_keeps_no_bit_and_others_keep_the_highest():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels, pixels.T, 255 - pixels], axis=-1))
    for bits in range(9):
        step = 2 ** (8 - bits)
        expected = np.asarray(image).astype(int) // step * step
        assert np.array_equal(np.asarray(posterize(image, bits)), expected)
    # The published policy, with every operation at full magnitude.
    transform = train_transform(MODEL, Augmentation(auto_augment="rand-m10-n20-inc1"))
    assert all(transform(image).shape == (3, 32, 32) for _ in range(30))


def test_mixing_gives_soft_targets_and_is_off_unless_asked_for():
    assert mixer(Augmentation(), 5, 0.1) is None
    images, targets = mixer(Augmentation(mixup=0.8), 5, 0.1)(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert (images.shape, targets.shape) == ((4, 3, 8, 8), (4, 5))
    assert torch.allclose(targets.sum(1), torch.ones(4))
