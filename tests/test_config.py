"""What a config may say, and what the workflow is told of it."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tocom.compress import COMPRESSORS
from tocom.config import COMPRESSOR_NAMES, parse_study, read_study, schema
from tocom.errors import TocomError
from tocom.settings import STAGES, FinetuneSettings, parse

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*ROOT.glob("config/*.yaml"), *ROOT.glob("tests/configs/*.yaml")])
DEMO = yaml.safe_load((ROOT / "config/demo.yaml").read_text())


def changed(**changes) -> dict:
    return json.loads(json.dumps(DEMO)) | changes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_named_like_its_study(path):
    assert read_study(path).study == path.stem


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads((ROOT / "workflow/schemas/study.schema.json").read_text())
    assert committed == schema()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_fits_the_schema_that_editors_use(path):
    import jsonschema

    jsonschema.validate(yaml.safe_load(path.read_text()), schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(path.read_text()), "sedes": [1]}, schema())


def test_every_setting_of_every_stage_says_what_it_means():
    missing = [
        f"{stage}.{name}" for stage, kind in STAGES.items() for name in kind.model_fields if not kind.meaning(name)
    ]
    assert missing == []


def test_names_of_compressors_match_the_registry():
    assert set(COMPRESSOR_NAMES) == set(COMPRESSORS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(sedes=[0]), "unknown key 'sedes' (did you mean 'seeds'?)"),
        (changed(finetune={"epoch": 3}), "unknown key 'finetune.epoch' (did you mean 'epochs'?)"),
        (changed(infer_degrees=[0, 15]), "degree 15 is out of range"),
        (changed(infer_degrees=[-1]), "infer_degrees.0"),
        (changed(max_degree=40), "a block removes at most half"),
        (changed(train_degrees=["sometimes"]), "train_degrees.0"),
        (changed(tasks=["digit"]), "did you mean 'digits'?"),
        (changed(compressors=["tomme"]), "did you mean 'tome'?"),
        (changed(seeds=[0, 0]), "seeds lists something twice"),
        (changed(study="a/b"), "cannot name a folder"),
        (changed(backbones=[{"name": "mine"}]), "needs a checkpoint, or an architecture"),
        ({key: value for key, value in DEMO.items() if key != "tasks"}, "key 'tasks' is missing"),
        (changed(finetune={"lr": -1}), "finetune.lr = -1"),
        (changed(evaluate={"scales": [0.5, 1]}), "0 must be among the scales"),
        (changed(train_degrees=[0], infer_degrees=[0]), "no gap to close"),
        (changed(backbones=[{"name": "a", "checkpoint": "a.st", "image_size": 224}]), "use folders of images"),
        (
            changed(backbones=[{"name": "a", "checkpoint": "x"}, {"name": "b", "checkpoint": "y", "image_size": 64}]),
            "images of different sizes",
        ),
    ],
)
def test_a_mistake_in_a_config_is_one_line_that_names_it(config, message):
    with pytest.raises(TocomError) as error:
        parse_study(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("", "is empty"), (None, "no such config")]
)  # fmt: skip
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TocomError, match=message) as error:
        read_study(path)
    assert "\n" not in str(error.value)


@given(st.integers(1, 30))
def test_jobs_share_out_every_checkpoint_once(size):
    study = parse_study(changed(checkpoints_per_job=size))
    shared = [checkpoint for batch in study.batches for checkpoint in batch]
    assert shared == list(study.checkpoints)
    assert len(shared) == len(DEMO["train_degrees"]) * len(DEMO["seeds"])
    assert max(len(batch) for batch in study.batches) <= size


def test_settings_survive_the_way_through_a_command_line():
    import shlex

    before = FinetuneSettings(lr=3e-4, lr_batch=512, device="cpu")
    words = shlex.split(before.options())
    assert parse(FinetuneSettings, words[1::2]) == before
    assert set(words[::2]) == {"--set"}


@pytest.mark.parametrize("pair", ["epochs", "epoch=3", "epochs=0", "epochs=many", "drop_path=1.5"])
def test_a_wrong_setting_is_refused_in_one_line(pair):
    with pytest.raises(TocomError) as error:
        parse(FinetuneSettings, [pair])
    assert "\n" not in str(error.value)


def test_learning_rate_scales_with_the_batch_only_if_asked():
    assert FinetuneSettings(lr=1e-3, batch_size=64).peak_lr == 1e-3
    assert FinetuneSettings(lr=1e-3, batch_size=64, lr_batch=512).peak_lr == pytest.approx(1.25e-4)
