"""Tasks: real and generated ones, folders of the user, and their splits."""

import numpy as np
import pytest
from PIL import Image

from tocom.data import registry
from tocom.data.listing import SPLITS, Items, Listing, with_validation
from tocom.data.own import OwnSource
from tocom.errors import TocomError

SIZES = {"train": 80, "val": 20, "test": 50}
ALL = {"train": None, "val": None, "test": None}


def rows(images):
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("name", registry.TASKS)
def test_splits_have_their_sizes_and_share_no_image(name, tmp_path):
    about = registry.prepare(name, tmp_path / "task.safetensors", SIZES)
    arrays, metadata = registry.read(tmp_path / "task.safetensors")
    assert metadata == about
    assert about["sizes"] == SIZES
    seen = set()
    for split, size in SIZES.items():
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        assert images.shape == (size, 3, 32, 32)
        assert labels.min() >= 0
        assert labels.max() < about["classes"]
        assert not rows(images) & seen
        seen |= rows(images)


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        registry.prepare("digits", tmp_path / name, SIZES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_real_splits_are_balanced_and_the_test_split_takes_what_is_left():
    splits = registry.split_real(registry.TASKS["digits"], {"train": 800, "val": 200, "test": 5000})
    assert len(splits["test"]) == 1797 - 1000
    counts = np.bincount(splits["train"].labels)
    assert counts.max() - counts.min() <= 5


def test_a_task_too_small_for_its_splits_is_refused():
    with pytest.raises(TocomError, match="too few"):
        registry.split_real(registry.TASKS["digits"], {"train": 1700, "val": 200, "test": 10})


def test_an_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(TocomError, match="did you mean 'mnist5k'"):
        registry.find("mnist")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{number}.png")
    return tmp_path / "pets"


def test_a_folder_of_images_is_a_task(folder, tmp_path):
    source = OwnSource(folder=str(folder), group="animals")
    about = registry.prepare("pets", tmp_path / "pets.safetensors", ALL, 16, source)
    arrays, _ = registry.read(tmp_path / "pets.safetensors")
    assert about["classes"] == 2
    assert about["group"] == "animals"
    assert arrays["test_images"].shape == (6, 3, 16, 16)
    assert arrays["val_labels"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("damage", ["split", "class", "image", "empty"])
def test_a_damaged_folder_is_refused_in_one_line_and_nothing_is_written(folder, tmp_path, damage):
    import shutil

    if damage == "split":
        shutil.rmtree(folder / "test")
    elif damage == "class":
        shutil.rmtree(folder / "train" / "dog")
    elif damage == "image":
        (folder / "train" / "cat" / "0.png").write_bytes(b"not an image")
    else:
        for path in (folder / "test").rglob("*.png"):
            path.unlink()
    with pytest.raises(TocomError) as error:
        registry.prepare("pets", tmp_path / "out" / "pets.safetensors", ALL, 16, OwnSource(folder=str(folder)))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_training_images_that_are_augmented_from_files_are_not_decoded(folder, tmp_path):
    source = OwnSource(folder=str(folder))
    registry.prepare("pets", tmp_path / "task", ALL, 16, source, decode_train=False)
    arrays, _ = registry.read(tmp_path / "task")
    assert "train_images" not in arrays
    paths = registry.unpack_paths(arrays["train_files"])
    assert [path.relative_to(folder.absolute()).as_posix() for path in paths] == [
        f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)
    ]
    assert arrays["test_images"].shape == (6, 3, 16, 16)


def test_images_are_cropped_or_squashed_to_the_size_of_the_input(tmp_path):
    image = np.zeros((60, 120, 3), dtype=np.uint8)
    image[:, :30] = 255  # the left quarter, which a centre crop cuts off
    for split in ("train", "test"):
        (tmp_path / "wide" / split / "only").mkdir(parents=True)
        for number in range(2):
            Image.fromarray(image).save(tmp_path / "wide" / split / "only" / f"{number}.png")
    bright = {}
    for resize in ("crop", "squash"):
        source = OwnSource(folder=str(tmp_path / "wide"))
        registry.prepare("wide", tmp_path / resize, ALL | {"val": 1}, 28, source, resize=resize)
        bright[resize] = float((registry.read(tmp_path / resize)[0]["test_images"] > 128).mean())
    assert bright["crop"] == 0
    assert bright["squash"] == pytest.approx(0.25, abs=0.03)


def test_groups_of_tasks_follow_the_registry_and_what_the_config_says():
    assert registry.groups_of(["rotation", "pets", "digits", "birds"], {"birds": "animals"}) == {
        "digits": "real tasks",
        "rotation": "generated tasks",
        "birds": "animals",
        "pets": "real tasks",
    }


def test_a_bundled_task_has_the_usual_sizes_unless_told_otherwise():
    sizes = {split: len(items) for split, items in registry.bundled("digits", ALL).splits.items()}
    assert sizes == {"train": 800, "val": 200, "test": 797}


def listing(n_train=40, classes=4):
    labels = np.arange(n_train) % classes
    images = np.arange(n_train, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), dtype=np.uint8)
    return Listing(
        classes, "g", "made up", {"train": Items(labels, arrays=images), "test": Items(labels[:8], arrays=images[:8])}
    )


@pytest.mark.parametrize(("wanted", "size"), [(0.25, 10), (8, 8), (None, 4)])
def test_a_validation_split_is_drawn_from_the_training_images(wanted, size):
    result = registry.downloaded(listing(), ALL | {"val": wanted})
    train, val = (result.splits[name].arrays[:, 0, 0, 0] for name in ("train", "val"))
    assert len(val) == size
    assert sorted([*train, *val]) == list(range(40))
    counts = np.bincount(result.splits["val"].labels, minlength=4)
    assert counts.max() - counts.min() <= 1


def test_a_validation_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(TocomError, match=r"change data\.val"):
        with_validation(listing(), 40)


def test_splits_are_cut_down_to_their_sizes_the_same_way_every_time():
    first, second = (registry.downloaded(listing(), {"train": 12, "val": 4, "test": 5}) for _ in range(2))
    assert {name: len(items) for name, items in first.splits.items()} == {"train": 12, "test": 5, "val": 4}
    for name in SPLITS:
        assert np.array_equal(first.splits[name].arrays, second.splits[name].arrays)


def test_held_out_images_are_never_among_the_others(folder):
    files = registry.pretraining_files(str(folder))
    for wanted, held_out in ((0, 0), (1, 1), (1000, len(files) // 10)):
        kept, apart = registry.split_files(files, wanted)
        assert len(apart) == held_out
        assert sorted([*kept, *apart]) == files
        assert registry.split_files(files, wanted) == (kept, apart)


def test_a_folder_of_few_images_is_refused(folder):
    with pytest.raises(TocomError, match="found 3"):
        registry.split_files(registry.pretraining_files(str(folder / "train" / "cat")), 1)


def test_images_to_distil_on_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(TocomError, match="no such folder or data set"):
        registry.pretraining_files(str(tmp_path / "none"))
