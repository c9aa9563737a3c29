"""What tests of data sets share: nothing of the machine's settings, and folders of images."""

import numpy as np
import pytest
from PIL import Image


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
    """Six training and three validation images in ADE20k's true layout: photographs of 40 x 56 pixels and less."""
    root = tmp_path / "unpacked" / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for source, letters, n in (("training", "train", 6), ("validation", "val", 3)):
        for part in ("images", "annotations"):
            (root / part / source).mkdir(parents=True)
        for number in range(1, n + 1):
            stem = f"ADE_{letters}_{number:08d}"
            shape = (40, 56) if number % 2 else (48, 36)
            photo = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            values = np.zeros(shape, dtype=np.uint8)  # 0: other
            values[10:30, 5:20], values[5:15, 20:35] = number, 150
            Image.fromarray(photo).save(root / "images" / source / f"{stem}.jpg")
            Image.fromarray(values).save(root / "annotations" / source / f"{stem}.png")
    return root
