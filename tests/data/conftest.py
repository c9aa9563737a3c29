"""What tests of data sets share: nothing of the machine's settings, and folders of images."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data import layouts


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in ("TOCOM_MIRROR", "TOCOM_CATALOGUE", "TOCOM_DATA", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pets(tmp_path):
    """Three noisy images of each of two classes in each split: pets/{train,val,test}/{cat,dog}/{0,1,2}.png."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{number}.png")
    return tmp_path / "pets"


@pytest.fixture
def photographs(tmp_path):
    """ADE20k's true layout with 24 training and 12 validation images of 48 x 48 pixels, unpacked."""
    layouts.ade20k(tmp_path)
    shutil.unpack_archive(tmp_path / "ADEChallengeData2016.zip", tmp_path / "unpacked")
    return tmp_path / "unpacked" / "ADEChallengeData2016"
