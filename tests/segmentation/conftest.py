"""A backbone, scenes, a compensator and evaluated segmenters small enough to train in seconds, and ADE20k's layout."""

import numpy as np
import pytest
from PIL import Image

from tests.small import ARCHITECTURE, KWARGS, build
from tocom.models import save_model
from tocom.segmentation.data import prepare
from tocom.segmentation.settings import SegmentationSizes, SegmentationTraining
from tocom.segmentation.stage import evaluate, train
from tocom.settings import DistilSettings, EvaluateSettings
from tocom.stages.distil import distil

#: 64 patches, so that degree 16 merges 32 of them.
PATCHES = {"patch_size": 4}
QUICK = SegmentationTraining(epochs=2, batch_size=16, lr=2e-3, min_scale=0.8, max_scale=1.25, device="cpu")
DEGREES = [0, 8, 16]
SEEDS = (0, 1)
EVALUATE = EvaluateSettings(scales=(0, 0.5, 1), batch_size=20, device="cpu")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_model(path, build(**PATCHES), ARCHITECTURE, KWARGS | PATCHES)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scenes.safetensors"
    prepare("scenes", path, 32, SegmentationSizes(train=48, val=16, test=24))
    return path


@pytest.fixture(scope="session")
def compensator(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("compensator") / "tome_mlp.safetensors"
    settings = DistilSettings(epochs=2, images=64, held_out=32, pairs=4, batch_size=16, lr=0.02, device="cpu")
    distil(backbone, path, max_degree=16, compressor="tome_mlp", settings=settings)
    return path


@pytest.fixture(scope="session")
def checkpoints(backbone, scenes, tmp_path_factory):
    """One trained segmenter for each seed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in SEEDS:
        train(backbone, scenes, folder / f"train-0_seed-{seed}.safetensors", 0, seed, settings=QUICK)
    return [folder / f"train-0_seed-{seed}.safetensors" for seed in SEEDS]


@pytest.fixture(scope="session")
def evaluated(checkpoints, scenes, compensator, tmp_path_factory):
    """The counts of all cells of the checkpoints, laid out as the workflow does."""
    folder = tmp_path_factory.mktemp("predictions")
    outputs = [folder / "tiny" / "tome_mlp" / "scenes" / path.name for path in checkpoints]
    evaluate(checkpoints, scenes, compensator, outputs, DEGREES, EVALUATE)
    return folder, outputs


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory):
    """Six training and three validation images in ADE20k's true layout: photographs of 40 x 56 pixels and less."""
    root = tmp_path_factory.mktemp("ade20k") / "ADEChallengeData2016"
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
    for name in ("objectInfo150.txt", "sceneCategories.txt"):
        (root / name).write_text("as in the archive\n")
    return root
