"""Tasks: bundled ones, data sets and folders of the user, prepared in splits."""

import re
import shutil

import numpy as np
import pytest

from tests import small
from tests.data import layouts
from tocom.data import registry
from tocom.data.fetch import fetch
from tocom.data.listing import SPLITS
from tocom.data.own import OwnOptions
from tocom.errors import TocomError
from tocom.files import save_arrays

SIZES = {"train": 80, "val": 20, "test": 50}


def made(tmp_path, name, *args, **options):
    """Prepare a task and read it: arrays and metadata."""
    about = registry.prepare(name, tmp_path / "task.safetensors", *args, **options)
    arrays, metadata = registry.read(tmp_path / "task.safetensors")
    assert metadata == about
    return arrays, metadata


def refusal(tmp_path, name, *args, **options):
    message = small.refusal(registry.prepare, name, tmp_path / "out" / "task", *args, **options)
    assert not (tmp_path / "out").exists()
    return message


@pytest.mark.parametrize("name", [name for name, task in registry.TASKS.items() if task.kind != "language"])
def test_bundled_tasks_have_the_sizes_that_are_asked_for_and_splits_share_no_image(name, tmp_path):
    arrays, about = made(tmp_path, name, SIZES)
    assert about["sizes"] == SIZES
    assert about["task_kind"] == registry.kind_of_task(name) == ("segment" if name == "scenes" else "classify")
    seen = set()
    for split, size in SIZES.items():
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        assert images.shape == (size, 3, 32, 32)
        assert labels.shape == ((size, 32, 32) if name == "scenes" else (size,))
        assert labels.min() >= 0
        assert labels[labels != 255].max() < about["classes"]
        rows = {image.tobytes() for image in images}
        assert not rows & seen
        seen |= rows


def test_sizes_that_are_not_stated_are_the_usual_ones_and_preparing_twice_gives_the_same_bytes(tmp_path):
    arrays, about = made(tmp_path, "digits", {"val": None})
    assert about["sizes"] == {"train": 800, "val": 200, "test": 797}  # as many as are left
    counts = np.bincount(arrays["train_labels"])
    assert counts.max() - counts.min() <= 5
    registry.prepare("digits", tmp_path / "again", source={})
    assert (tmp_path / "task.safetensors").read_bytes() == (tmp_path / "again").read_bytes()
    assert registry.TASKS["scenes"].sizes == {"train": 400, "val": 100, "test": 200}


@pytest.mark.parametrize(
    ("name", "sizes", "match"),
    [
        ("digits", {"train": 1700, "val": 200}, "has 1797 images, too few for 1900"),
        ("digits", {"val": 0.5}, "data.val must be a number of images; it is 0.5"),
        ("digits", {"tst": 5}, "sizes of 'tst' (did you mean 'test'?); the splits are train, val, test"),
        ("digits", {"train": 0.5}, "0.5 images in the train split; give a whole number above 0"),
        ("mnist", {}, "unknown task 'mnist' (did you mean 'mnist5k'?)"),
        ("cub200", {}, "the data set 'cub200' is not in"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(tmp_path, name, sizes, match):
    assert match in refusal(tmp_path, name, sizes, root=tmp_path)


@pytest.mark.parametrize("source", [dict, OwnOptions])
def test_a_folder_of_images_is_a_task(pets, tmp_path, source):
    arrays, about = made(tmp_path, "pets", image_size=16, source=source(folder=str(pets), group="animals"))
    assert (about["classes"], about["group"], about["task_kind"]) == (2, "animals", "classify")
    assert arrays["test_images"].shape == (6, 3, 16, 16)
    assert arrays["val_labels"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_mistake_in_a_source_or_its_images_is_one_line_and_nothing_is_written(pets, tmp_path):
    for source, match in (
        ({"foldr": "x"}, "task 'pets': unknown key 'foldr' (did you mean 'folder'?)"),
        (OwnOptions(), "no source; give one of folder"),
        ({"folder": str(pets), "classes": 2}, "classes goes with"),
    ):
        assert match in refusal(tmp_path, "pets", source=source)
    (pets / "train" / "cat" / "0.png").write_bytes(b"not an image")
    assert "0.png is not a readable image" in refusal(tmp_path, "pets", source={"folder": str(pets)})


def test_training_images_that_are_augmented_from_files_are_not_decoded(pets, tmp_path):
    arrays, _ = made(tmp_path, "pets", source={"folder": str(pets)}, decode_train=False)
    assert "train_images" not in arrays
    paths = registry.unpack_paths(arrays["train_files"])
    assert paths == tuple(pets / f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3))
    assert arrays["test_images"].shape == (6, 3, 32, 32)


def test_an_image_that_is_in_train_and_in_test_under_two_names_is_refused(pets, tmp_path):
    shutil.copy(pets / "train/cat/1.png", pets / "test/dog/copy.png")
    message = refusal(tmp_path, "pets", source={"folder": str(pets)})
    assert re.search(r"dog/copy.png is among the test images, and the same image .*train/cat/1.png", message)


@pytest.mark.parametrize(("val", "drawn"), [(0.5, 12), (8, 8), (None, 2)])
def test_a_data_set_gets_a_balanced_validation_split_and_is_cut_down_the_same_way_every_time(tmp_path, val, drawn):
    folder, sizes = tmp_path / "mirror", {"val": val}
    options = {"root": tmp_path / "data", "catalogue": layouts.make_catalogue(folder, folder.as_uri(), ["cub200"])}
    fetch("cub200", *options.values())
    arrays, about = made(tmp_path, "cub200", sizes, **options)
    assert about["sizes"] == {"train": 24 - drawn, "val": drawn, "test": 12}
    counts = np.bincount(arrays["val_labels"], minlength=4)
    assert counts.max() - counts.min() <= (1 if drawn >= 4 else 2)
    assert about["group"] == "FGVC"
    small, _ = made(tmp_path, "cub200", sizes | {"train": 5, "test": 3}, **options)
    again, _ = made(tmp_path, "cub200", sizes | {"train": 5, "test": 3}, **options)
    assert [len(small[f"{split}_labels"]) for split in SPLITS] == [5, drawn, 3]
    assert all(np.array_equal(small[name], again[name]) for name in small)
    assert "cannot be kept to choose on; change data.val" in refusal(tmp_path, "cub200", {"val": 24}, **options)


def test_kinds_and_groups_of_tasks_follow_the_registry_and_what_the_config_says():
    assert registry.groups_of(["rotation", "pets", "digits", "birds", "ade20k", "scenes"], {"birds": "animals"}) == {
        "digits": "real tasks",
        "rotation": "generated tasks",
        "scenes": "generated tasks",
        "ade20k": "segmentation",
        "birds": "animals",
        "pets": "real tasks",
    }
    kind = registry.kind_of_task
    assert [kind(name) for name in ("ade20k", "cub200", "vtab.dtd", "nobody")] == ["segment"] + ["classify"] * 3
    assert kind("streets", {"segment": "a", "classes": 3}) == kind("s", OwnOptions(segment="a", classes=3)) == "segment"
    assert kind("ade20k", {"folder": "a", "segment": None}) == kind("pets", OwnOptions()) == "classify"


def test_another_file_is_no_prepared_task(tmp_path):
    save_arrays(tmp_path / "x", {"a": np.zeros(1)})
    with pytest.raises(TocomError, match="is not a prepared task; make it with `tocom prepare`"):
        registry.read(tmp_path / "x")


def test_held_out_images_are_never_among_the_others(pets):
    files = registry.pretraining_files(str(pets))
    assert len(files) == 18
    for wanted, held_out in ((0, 0), (1, 1), (1000, 1)):
        kept, apart = registry.split_files(files, wanted)
        assert len(apart) == held_out
        assert sorted([*kept, *apart]) == files
        assert registry.split_files(files, wanted) == (kept, apart)
    shutil.rmtree(pets / "train")
    shutil.rmtree(pets / "val")
    with pytest.raises(TocomError, match="found 6"):
        registry.split_files(registry.pretraining_files(str(pets)), 1)
    with pytest.raises(TocomError, match="no such folder or data set"):
        registry.pretraining_files(str(pets / "none"))
