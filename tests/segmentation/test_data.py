"""ADE20k's layout, its label coding, and views of images: the same pixels for image and labels, whoever asks."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.segmentation.conftest import QUICK
from tocom.data.loading import feed
from tocom.errors import TocomError
from tocom.files import save_arrays
from tocom.segmentation.ade20k import listing, read_labels
from tocom.segmentation.data import Split, TrainViews, load, prepare, random_view
from tocom.segmentation.settings import SegmentationSizes

SIZES = SegmentationSizes(val=2)


def test_the_layout_of_ade20k_is_listed_in_the_order_of_names(ade20k):
    for folder in (ade20k, ade20k.parent):
        pairs = listing(folder)
        assert [path.name for path in pairs["train"][0]] == [f"ADE_train_{n:08d}.jpg" for n in range(1, 7)]
        assert [path.stem for path in pairs["test"][1]] == [f"ADE_val_{n:08d}" for n in range(1, 4)]
        assert pairs["train"][1][0] == ade20k / "annotations" / "training" / "ADE_train_00000001.png"


def test_class_k_becomes_k_minus_1_and_other_is_ignored(ade20k):
    labels = read_labels(ade20k / "annotations" / "training" / "ADE_train_00000003.png", 150)
    assert labels.shape == (40, 56)
    assert labels.dtype == np.uint8
    assert labels[0, 0] == 255
    assert labels[20, 10] == 2
    assert labels[10, 30] == 149
    assert np.count_nonzero(labels == 149) == 10 * 15


def test_the_validation_images_are_the_test_split_and_val_is_drawn_from_training(ade20k, tmp_path):
    about = prepare("ade20k", tmp_path / "a", 32, SIZES, ade20k)
    prepare("ade20k", tmp_path / "b", 32, SIZES, ade20k.parent)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert about["classes"] == 150
    assert about["sizes"] == {"train": 4, "val": 2, "test": 3}
    splits = load(tmp_path / "a").splits
    files = {name: [path.name for path in split.images] for name, split in splits.items()}
    assert set(files["train"]) | set(files["val"]) == {f"ADE_train_{n:08d}.jpg" for n in range(1, 7)}
    assert files["test"] == [f"ADE_val_{n:08d}.jpg" for n in range(1, 4)]
    assert all(
        image.stem == labels.stem
        for split in splits.values()
        for image, labels in zip(split.images, split.labels, strict=True)
    )


def test_a_view_for_testing_is_the_centre_at_full_height(ade20k, tmp_path):
    prepare("ade20k", tmp_path / "a", 20, SIZES, ade20k)
    split = load(tmp_path / "a").splits["test"]
    image, labels = split[0]  # 40 x 56 scaled by 1/2 is 20 x 28, of which columns 4 to 23 are kept
    assert image.shape == (3, 20, 20)
    assert labels.shape == (20, 20)
    whole = read_labels(split.labels[0], 150)
    expected = np.asarray(Image.fromarray(whole).resize((28, 20), Image.Resampling.NEAREST))[:, 4:24]
    assert np.array_equal(labels, expected)
    assert set(np.unique(labels)) == {0, 149, 255}


def test_decoded_images_of_the_right_size_stay_as_they_are(scenes):
    split = load(scenes).splits["test"]
    image, labels = split[5]
    assert np.array_equal(image, split.images[5])
    assert np.array_equal(labels, split.labels[5])


def coded(n=3, height=30, width=44):
    """Images whose pixels tell their label: red is 5 times the label; large blocks survive scaling."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 7, (n, height // 10 + 1, width // 11 + 1))
    labels = np.stack([np.kron(b, np.ones((10, 11)))[:height, :width] for b in blocks]).astype(np.uint8)
    return np.stack([np.stack([35 * label + 20, 0 * label, 0 * label]) for label in labels]).astype(np.uint8), labels


@pytest.mark.parametrize("scales", [(0.5, 0.7), (1, 1), (1.3, 2)])
def test_a_random_view_moves_image_and_labels_alike(scales):
    images, labels = coded()
    settings = QUICK.model_copy(update={"min_scale": scales[0], "max_scale": scales[1]})
    split = Split(images, labels, 24, 7)
    rng = np.random.default_rng(1)
    padded = 0
    for _ in range(20):
        image, seen = random_view(split, 1, settings, rng)
        assert image.shape == (3, 24, 24)
        assert seen.shape == (24, 24)
        inside = seen != 255
        expected = 35 * seen.astype(int) + 20
        # Bicubic and nearest scaling differ at the edges of blocks.
        assert np.mean(np.abs(image[0].astype(int) - expected)[inside] <= 8) > 0.55
        assert (image[:, ~inside] == 0).all()
        padded += not inside.all()
    assert padded == (20 if scales[1] < 1 else 0)


def test_without_scaling_a_random_view_is_a_window_of_the_image_or_of_its_mirror():
    images, labels = coded()
    images = np.random.default_rng(2).integers(0, 256, images.shape, dtype=np.uint8)
    settings = QUICK.model_copy(update={"min_scale": 1.0, "max_scale": 1.0})
    split = Split(images, labels, 30, 7)
    windows = [images[0][:, :, x : x + 30] for x in range(15)]
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(40):
        view, _ = random_view(split, 0, settings, rng)
        found = [(x, m) for m in (0, 1) for x, w in enumerate(windows) if np.array_equal(w[..., :: 1 - 2 * m], view)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 15
    assert {mirrored for _, mirrored in seen} == {0, 1}


def test_views_depend_on_seed_epoch_and_index_and_not_on_who_loads_them(scenes):
    split = load(scenes).splits["train"]
    views = TrainViews(split, QUICK, seed=5)
    again = TrainViews(split, QUICK, seed=5)
    assert np.array_equal(views[1, 3][0], again[1, 3][0])
    assert not np.array_equal(views[1, 3][0], views[2, 3][0])
    assert not np.array_equal(views[1, 3][0], TrainViews(split, QUICK, seed=6)[1, 3][0])
    pieces = [torch.tensor([3, 1]), torch.tensor([0])]
    alone, together = (list(feed(views, workers)(1, pieces)) for workers in (0, 2))
    assert np.array_equal(alone[0][0][0], views[1, 3][0])
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_a_folder_of_ones_own_needs_its_number_of_classes(ade20k, tmp_path):
    with pytest.raises(TocomError, match="say how many classes it has"):
        prepare("mine", tmp_path / "x", 32, SIZES, ade20k)
    assert prepare("mine", tmp_path / "x", 32, SIZES, ade20k, classes=200)["classes"] == 200


def copied(ade20k, tmp_path):
    import shutil

    return shutil.copytree(ade20k, tmp_path / "copy")


def break_missing_annotation(root):
    (root / "annotations" / "training" / "ADE_train_00000002.png").unlink()


def break_missing_folder(root):
    (root / "images" / "validation").rename(root / "images" / "val")


def break_size(root):
    Image.new("L", (9, 9)).save(root / "annotations" / "validation" / "ADE_val_00000001.png")


def break_image(root):
    (root / "images" / "training" / "ADE_train_00000001.jpg").write_bytes(b"not a photograph")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing_annotation, "training/ADE_train_00000002 has an image but no annotation"),
        (break_missing_folder, "no such folder: .*validation"),
        (break_size, r"has \(56, 40\) pixels, its annotation \(9, 9\)"),
        (break_image, "is not a readable image"),
    ],
)
def test_a_broken_layout_is_one_line_and_leaves_nothing(ade20k, tmp_path, damage, message):
    root = copied(ade20k, tmp_path)
    damage(root)
    with pytest.raises(TocomError, match=message) as error:
        prepare("ade20k", tmp_path / "out" / "x", 32, SIZES, root)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_the_classes_or_several_channels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 151, dtype=np.uint8)).save(tmp_path / "high.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(TocomError, match="holds the value 151, but there are 150 classes"):
        read_labels(tmp_path / "high.png", 150)
    with pytest.raises(TocomError, match="has 3 channels"):
        read_labels(tmp_path / "rgb.png", 150)


def test_too_few_training_images_for_validation_are_refused(ade20k, tmp_path):
    with pytest.raises(TocomError, match="has 6 training images, too few to keep 6"):
        prepare("ade20k", tmp_path / "x", 32, SegmentationSizes(val=6), ade20k)


def test_another_file_is_no_prepared_task(tmp_path):
    save_arrays(tmp_path / "x", {"a": np.zeros(1)})
    with pytest.raises(TocomError, match="not a prepared segmentation task"):
        load(tmp_path / "x")
