"""The segmentation section of a config."""

import shlex

import pytest
from pydantic import ValidationError

from tocom.segmentation.settings import SegmentationSettings


def test_the_number_of_classes_is_that_of_the_data():
    assert SegmentationSettings(data="ade20k").n_classes == 150
    assert SegmentationSettings().n_classes == 7
    assert SegmentationSettings(data="my/road scenes", classes=19).n_classes == 19
    assert SegmentationSettings(data="my/road scenes", classes=19).name == "road_scenes"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": "my/scenes"}, "say how many classes it has"),
        ({"data": "ade20k", "classes": 19}, "ade20k has 150 classes, not 19"),
        ({"data": "scenes", "folder": "x"}, "scenes are generated"),
        ({"train": {"min_scale": 2, "max_scale": 1}}, "min_scale 2.0 is above max_scale 1.0"),
        ({"trian": {}}, "Extra inputs"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        SegmentationSettings.model_validate(section)


def test_the_options_of_prepare_name_the_folder():
    def folder(**section):
        return shlex.split(SegmentationSettings(**section).prepare_options("data"))[11:]

    sizes = "--train 400 --val 100 --test 200"
    scenes = SegmentationSettings(image_size=32).prepare_options("data")
    assert scenes == f"scenes --classes 7 --image-size 32 {sizes}"
    assert folder(data="ade20k") == ["--folder", "data/ade20k"]
    assert folder(data="ade20k", folder="/my/ade20k") == ["--folder", "/my/ade20k"]
    assert folder(data="my/road scenes", classes=3) == ["--folder", "my/road scenes"]


def test_only_ade20k_without_a_folder_of_its_own_is_downloaded():
    assert SegmentationSettings(data="ade20k").is_downloaded
    assert not SegmentationSettings(data="ade20k", folder="x").is_downloaded
    assert not SegmentationSettings().is_downloaded
