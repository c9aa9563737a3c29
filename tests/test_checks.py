"""What a valid config may still lack is named before anything runs; configs and weights with surprises are refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.small import ARCHITECTURE, KWARGS, build
from tocom.checks import check_study
from tocom.data.registry import prepare
from tocom.errors import TocomError
from tocom.files import atomic, read_yaml
from tocom.models import import_backbone, load_model, save_model
from tocom.starting import first_config
from tocom.study import parse_study, read_study

BASE = {
    "study": "mine",
    "backbones": [{"name": "glyph_vit", "checkpoint": "glyph_vit"}],
    "methods": {"plain": {"compressor": "tome"}, "added": {"like": "plain", "compensator": "tocom"}},
    "compare": [["plain", "added"]],
    "tasks": ["digits"],
    "train_degrees": [0],
    "infer_degrees": [0, 8],
    "max_degree": 8,
}


def draw(folder, classes, seed=0):
    """Write images of noise, six of each class in train and in test."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "pets", ["cat", "dog"])
    draw(tmp_path / "one", ["cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbones": [{"name": "v", "checkpoint": "gone.safetensors"}]},
            "checkpoint: no such file: gone.safetensors",
        ),
        ({"backbones": [BASE["backbones"][0] | {"images": "photos"}]}, "images: no such folder or data set: photos"),
        ({"learn": {"source": "imagenet1"}}, "did you mean 'imagenet1k'"),
        ({"tasks": [{"name": "p", "folder": "cats"}]}, "task 'p': there is no folder cats"),
        ({"tasks": [{"name": "p", "csv": "p.csv"}]}, "there is no CSV p.csv"),
        ({"tasks": [{"name": "p", "python": "no_such_module:load"}]}, "no_such_module"),
        ({"tasks": [{"name": "p", "folder": "one"}]}, "training images are of 1 class"),
        ({"tasks": [{"name": "digits", "fine_tuned": "f.pth"}]}, "fine_tuned: no such file: f.pth"),
        ({"data": {"train": 1700, "val": 200}}, "too few for 1900"),
        ({"finetune": {"optimizer": "adamww"}}, "timm has no 'adamww' (did you mean 'adamw'"),
    ],
)
def test_everything_that_a_study_names_is_looked_at(changes, message):
    if "fine_tuned" in str(changes):
        changes |= {"methods": {"plain": {"compressor": "tome", "tuning": "none"}}, "compare": [], "seeds": [0]}
    study = parse_study(BASE | changes)
    with pytest.raises(TocomError) as caught:
        check_study(study)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_there_passes_and_all_that_is_missing_is_named_at_once():
    check_study(parse_study(BASE | {"tasks": ["digits", {"name": "p", "folder": "pets"}]}))
    broken = {"learn": {"source": "gone"}, "tasks": [{"name": "p", "folder": "one"}, {"name": "q", "folder": "lost"}]}
    with pytest.raises(TocomError, match=r"gone.*1 class.*lost"):
        check_study(parse_study(BASE | broken))


def test_a_study_of_another_config_does_not_take_the_place_of_a_reference(tmp_path):
    folder = tmp_path / "results" / "mine" / "reference"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(parse_study(BASE).as_json())
    check_study(parse_study(BASE))
    with pytest.raises(TocomError, match="holds the reference run of another config of this name"):
        check_study(parse_study(BASE | {"seeds": [7]}))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "mps"])
def test_a_device_that_there_cannot_be_is_refused_with_the_config(device):
    with pytest.raises(TocomError, match=r"learn.device = '.*': give one that fits"):
        parse_study(BASE | {"learn": {"device": device}})


def test_a_key_given_twice_and_a_yaml_bomb_are_refused_in_one_short_line(tmp_path):
    (tmp_path / "twice.yaml").write_text("study: a\nseeds: [0]\nstudy: b\n")
    with pytest.raises(TocomError, match="'study' is given twice"):
        read_yaml("twice.yaml")
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(levels))
    with pytest.raises(TocomError, match="stands for more than") as caught:
        read_study("bomb.yaml")
    assert len(str(caught.value)) < 300
    (tmp_path / "itself.yaml").write_text("study: &me [*me]\n")
    with pytest.raises(TocomError, match="itself.yaml"):
        read_study("itself.yaml")


def test_a_value_of_any_length_is_shown_shortened():
    with pytest.raises(TocomError) as caught:
        parse_study(BASE | {"seeds": "x" * 100_000})
    assert len(str(caught.value)) < 500


def test_braces_in_a_group_reach_the_study_as_they_are():
    study = parse_study(BASE | {"tasks": [{"name": "p", "folder": "pets", "group": "{my} pets"}]})
    assert study.groups == {"p": "{my} pets"}
    assert parse_study(json.loads(study.as_json())).groups == study.groups


def test_no_config_advises_a_moving_average_that_would_keep_the_initial_weights():
    from tests.workflow.running import ROOT

    assert not [path for path in ROOT.glob("config/*.yaml") if "0.99996" in path.read_text()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(tmp_path, value):
    model = build()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = value
    save_model("own.safetensors", model, ARCHITECTURE, KWARGS)
    with pytest.raises(TocomError, match=r"own.safetensors holds NaN or infinite values \(blocks.1.mlp.fc1.weight\)"):
        load_model("own.safetensors")
    torch.save(model.state_dict(), "foreign.pth")
    with pytest.raises(TocomError, match="foreign.pth holds NaN or infinite values"):
        import_backbone("out.safetensors", ARCHITECTURE, weights="foreign.pth", kwargs=KWARGS)


def test_refusing_a_pickle_does_not_advise_to_load_it_all_the_same(tmp_path):
    torch.save({"model": model_with_code()}, "code.pth")
    with pytest.raises(TocomError, match="pickles can run code") as caught:
        import_backbone("out.safetensors", ARCHITECTURE, weights="code.pth", kwargs=KWARGS)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


class model_with_code:  # noqa: N801
    """Pickled by name, which reading would import."""


def test_a_folder_without_permission_is_no_full_disk(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(TocomError, match=r"Permission denied; choose a folder that you may write to"), atomic("a/b"):
        pass


def test_from_python_own_images_are_prepared_by_a_plain_mapping(tmp_path):
    about = prepare("pets", "pets.safetensors", source={"folder": "pets"}, image_size=8)
    assert about["classes"] == 2
    with pytest.raises(TocomError, match="unknown key 'foldr'"):
        prepare("pets", "pets.safetensors", source={"foldr": "pets"})


def test_a_first_config_is_commented_valid_and_finds_its_images(tmp_path):
    path = tmp_path / "my_pets.yaml"
    path.write_text(first_config(path, folder="pets"))
    study = read_study(path)
    assert study.study == "my_pets"
    assert study.tasks[0].folder == "pets"
    assert path.read_text().count("#") > 6
    check_study(study)
    timm = yaml.safe_load(first_config(path, model="vit_tiny_patch16_224.augreg_in21k"))
    assert timm["backbones"][0]["timm"] == "vit_tiny_patch16_224.augreg_in21k"
    assert (timm["backbones"][0]["image_size"], timm["backbones"][0]["patch_size"]) == (224, 16)
    with pytest.raises(TocomError, match="no such folder: lost"):
        first_config(path, folder="lost")


def test_the_settings_of_one_stage_are_shown_alone():
    command = [sys.executable, "-m", "tocom.cli", "settings", "compensator.tocom"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "trained_scale" in shown
    assert "weight_decay" not in shown
