"""A backbone, a task and a compensator small enough to train in a second."""

import pytest

from tests.small import ARCHITECTURE, KWARGS, build
from tocom.data.registry import prepare
from tocom.models import save_model
from tocom.settings import DistilSettings
from tocom.stages.distil import distil


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_model(path, build(), ARCHITECTURE, KWARGS)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    prepare("digits", path, {"train": 64, "val": 32, "test": 40})
    return path


@pytest.fixture(scope="session")
def compensator(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("compensator") / "tome.safetensors"
    settings = DistilSettings(epochs=2, images=64, held_out=32, pairs=4, batch_size=32, device="cpu")
    distil(backbone, path, max_degree=4, settings=settings)
    return path
