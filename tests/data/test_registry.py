"""Tasks: real and generated ones, folders of the user, and their splits."""

import numpy as np
import pytest
from PIL import Image

from tocom.data import registry
from tocom.errors import TocomError

SIZES = {"train": 80, "val": 20, "test": 50}


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
    arrays = registry.split_real(registry.TASKS["digits"], {"train": 800, "val": 200, "test": 5000})
    assert len(arrays["test_labels"]) == 1797 - 1000
    counts = np.bincount(arrays["train_labels"])
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
    for split in registry.SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{number}.png")
    return tmp_path / "pets"


def test_a_folder_of_images_is_a_task(folder, tmp_path):
    about = registry.prepare("pets", tmp_path / "pets.safetensors", SIZES, folder, image_size=16)
    arrays, _ = registry.read(tmp_path / "pets.safetensors")
    assert about["classes"] == 2
    assert arrays["test_images"].shape == (6, 3, 16, 16)
    assert arrays["val_labels"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("damage", ["split", "class", "image", "empty"])
def test_a_damaged_folder_is_refused_in_one_line_and_nothing_is_written(folder, tmp_path, damage):
    import shutil

    if damage == "split":
        shutil.rmtree(folder / "val")
    elif damage == "class":
        shutil.rmtree(folder / "val" / "dog")
    elif damage == "image":
        (folder / "train" / "cat" / "0.png").write_bytes(b"not an image")
    else:
        for path in (folder / "test").rglob("*.png"):
            path.unlink()
    with pytest.raises(TocomError) as error:
        registry.prepare("pets", tmp_path / "out" / "pets.safetensors", SIZES, folder, 16)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_kinds_of_tasks_follow_the_registry_and_folders_are_real():
    assert registry.kinds_of(["rotation", "pets", "digits"]) == {
        "digits": "real",
        "rotation": "generated",
        "pets": "real",
    }


def test_held_out_images_of_a_folder_are_never_among_the_others(folder):
    kept, apart = (registry.unlabelled(folder, 100, held_out, 16) for held_out in (False, True))
    assert len(kept) + len(apart) == 18
    assert len(apart) == 1
    assert not rows(kept) & rows(apart)
    assert np.array_equal(registry.unlabelled(folder, 3, False, 16), kept[:3])


def test_a_folder_of_few_images_is_refused(folder):
    with pytest.raises(TocomError, match="holds 3 images"):
        registry.unlabelled(folder / "train" / "cat", 5, False, 16)
