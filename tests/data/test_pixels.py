"""Tasks to segment: scenes, ADE20k's layout and coding, and views with the same pixels for image and labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small import refusal
from tocom.data.families.ade20k import read_labels
from tocom.data.loading import feed
from tocom.data.pixels import Split, TrainViews, load, random_view
from tocom.data.registry import prepare
from tocom.data.scenes import CLASSES, IGNORED, scenes
from tocom.errors import TocomError
from tocom.settings import SegmentSettings


@pytest.fixture
def drawn(tmp_path):
    prepare("scenes", tmp_path / "scenes", {"train": 12, "val": 4, "test": 6})
    return load(tmp_path / "scenes").splits


def test_scenes_are_a_function_of_seed_and_index_and_show_every_class():
    images, labels = scenes(60, 32, seed=1)
    assert images.shape == (60, 3, 32, 32)
    assert labels.shape == (60, 32, 32)
    assert images.dtype == labels.dtype == np.uint8
    fewer = scenes(6, 32, seed=1)
    assert np.array_equal(images[:6], fewer[0])
    assert np.array_equal(labels[:6], fewer[1])
    assert not np.array_equal(fewer[0], scenes(6, 32, seed=2)[0])
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert (shares[: len(CLASSES)] > 0.01).all()
    assert 0 < shares[IGNORED] < 0.1
    assert shares[: len(CLASSES)].sum() + shares[IGNORED] == pytest.approx(1)


# --- ADE20k's layout


def test_class_k_becomes_k_minus_1_and_other_is_ignored(tmp_path):
    Image.fromarray(np.array([[0, 3, 150]], dtype=np.uint8)).save(tmp_path / "x.png")
    labels = read_labels(tmp_path / "x.png", 150)
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[255, 2, 149]]


def test_the_validation_images_are_the_test_split_and_val_is_drawn_from_training(photographs, tmp_path):
    for name, folder in (("a", photographs), ("b", photographs.parent)):
        source = {"segment": str(folder), "classes": 150}
        about = prepare("ade20k", tmp_path / name, {"val": 2}, source=source)
        assert (about["classes"], about["sizes"]) == (150, {"train": 22, "val": 2, "test": 12})
    data = load(tmp_path / "a")
    assert (data.name, data.classes, data.size) == ("ade20k", 150, 32)
    files = {name: [path.name for path in split.images] for name, split in data.splits.items()}
    assert sorted(files["train"] + files["val"]) == [f"ADE_train_{n:08d}.jpg" for n in range(1, 25)]
    assert files["train"] == sorted(files["train"])
    for split in data.splits.values():
        assert [path.stem for path in split.images] == [path.stem for path in split.labels]
    message = refusal(prepare, "ade20k", tmp_path / "x", {"val": 24}, source=source)
    assert "has 24 training images, of which 24 cannot be kept" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "annotations/training/ADE_train_00000002.png").unlink(),
            "training/ADE_train_00000002 has an image but no annotation",
        ),
        (lambda root: (root / "images/validation").rename(root / "images/val"), "no such folder: "),
        (
            lambda root: Image.new("L", (9, 9)).save(root / "annotations/validation/ADE_val_00000001.png"),
            "has (48, 48) pixels, its annotation (9, 9)",
        ),
        (lambda root: (root / "images/training/ADE_train_00000001.jpg").write_bytes(b"?"), "is not a readable image"),
    ],
)
def test_a_broken_layout_is_one_line_and_leaves_nothing(photographs, tmp_path, damage, message):
    damage(photographs)
    source = {"segment": str(photographs), "classes": 150}
    assert message in refusal(prepare, "ade20k", tmp_path / "out" / "x", source=source)
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_the_classes_or_several_channels_are_refused(tmp_path):
    Image.new("L", (4, 4), 151).save(tmp_path / "high.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    assert "holds the value 151, but there are 150 classes" in refusal(read_labels, tmp_path / "high.png", 150)
    assert "has 3 channels" in refusal(read_labels, tmp_path / "rgb.png", 150)


def test_a_task_to_classify_is_not_read_as_one_to_segment(tmp_path):
    prepare("digits", tmp_path / "digits")
    with pytest.raises(TocomError, match="is a task to classify, not to segment"):
        load(tmp_path / "digits")


# --- views


def test_a_view_for_testing_is_the_centre_at_full_height(tmp_path, drawn):
    values = np.repeat(np.repeat(np.arange(56 // 8, dtype=np.uint8), 8)[None], 40, axis=0)
    file = tmp_path / "x.png"
    Image.fromarray(values).save(file)
    image, labels = Split((file,), (file,), 20, 150)[0]  # 40 x 56 becomes 20 x 28, of which columns 4 to 23 are kept
    assert image.shape == (3, 20, 20)
    assert labels.tolist() == [[k for k in range(5) for _ in range(4)]] * 20
    split = drawn["test"]  # of the right size: as it is
    assert np.array_equal(split[5][0], split.images[5])
    assert np.array_equal(split[5][1], split.labels[5])


def coded(n=3, height=30, width=44):
    """Images whose pixels tell their label: red is 35 times the label and 20; large blocks survive scaling."""
    blocks = np.random.default_rng(0).integers(0, 7, (n, height // 10 + 1, width // 11 + 1))
    labels = np.stack([np.kron(b, np.ones((10, 11)))[:height, :width] for b in blocks]).astype(np.uint8)
    return np.stack([35 * labels + 20, 0 * labels, 0 * labels], axis=1).astype(np.uint8), labels


@pytest.mark.parametrize("scales", [(0.5, 0.7), (1, 1), (1.3, 2)])
def test_a_random_view_moves_image_and_labels_alike(scales):
    split = Split(*coded(), 24, 7)
    settings = SegmentSettings(min_scale=scales[0], max_scale=scales[1])
    rng, padded = np.random.default_rng(1), 0
    for _ in range(20):
        image, seen = random_view(split, 1, settings, rng)
        assert image.shape == (3, 24, 24)
        inside = seen != 255
        # Bicubic and nearest scaling differ at the edges of blocks.
        assert np.mean(np.abs(image[0].astype(int) - (35 * seen.astype(int) + 20))[inside] <= 8) > 0.55
        assert (image[:, ~inside] == 0).all()
        padded += not inside.all()
    assert padded == (20 if scales[1] < 1 else 0)


def test_views_depend_on_seed_epoch_and_index_and_not_on_who_loads_them(drawn):
    data, again, other = (TrainViews(drawn["train"], SegmentSettings(), seed) for seed in (5, 5, 6))
    assert np.array_equal(data[1, 3][0], again[1, 3][0])
    assert not np.array_equal(data[1, 3][0], data[2, 3][0])
    assert not np.array_equal(data[1, 3][0], other[1, 3][0])
    pieces = [torch.tensor([3, 1]), torch.tensor([0])]
    alone, together = (list(feed(data, workers)(1, pieces)) for workers in (0, 2))
    assert np.array_equal(alone[0][0][0], data[1, 3][0])
    assert all(
        torch.equal(a, b) for one, two in zip(alone, together, strict=True) for a, b in zip(one, two, strict=True)
    )
