"""What a config may say, and what the workflow is told of it."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tocom.analysis.significance import ALL, VTAB
from tocom.compress import COMPRESSORS
from tocom.config import COMPRESSOR_NAMES, RESERVED_GROUPS, parse_study, read_study, schema
from tocom.errors import TocomError
from tocom.settings import STAGES, FinetuneSettings, parse

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*ROOT.glob("config/*.yaml"), *ROOT.glob("tests/configs/*.yaml")])
SCENES = yaml.safe_load((ROOT / "tests/configs/scenes.yaml").read_text())
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
    assert set(RESERVED_GROUPS) == {ALL, VTAB}


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
        (changed(backbones=[{"name": "mine"}]), "needs one of checkpoint, timm and architecture"),
        (changed(backbones=[{"name": "a", "checkpoint": "x", "revision": "y"}]), "revision goes with timm"),
        ({key: value for key, value in DEMO.items() if key != "tasks"}, "give tasks to classify, or a segmentation"),
        ({key: value for key, value in DEMO.items() if key != "seeds"} | {"study": 3}, "study = 3"),
        (changed(tasks=[{"name": "digits", "finetune": {"epoch": 1}}]), "task 'digits': finetune: unknown key 'epoch'"),
        (changed(tasks=[{"name": "digits", "data": {"trian": 1}}]), "task 'digits': data: unknown key 'trian'"),
        (changed(compensators={"none": {}}), "no compensator can be called 'none'"),
        (changed(store="a b;rm"), "use letters, digits"),
        (changed(transfer=True, train_degrees=[0]), "transfer needs tasks to classify"),
        (
            changed(tasks=["digits", {"name": "mnist5k", "finetune": {"tuning": {"mode": "lora"}}}]),
            "transfer needs tasks that are tuned alike",
        ),
        (changed(paper="transfer", transfer=False), "needs transfer: true"),
        (changed(paper="speedup"), "needs throughput: {training: true}"),
        (changed(finetune={"warmup_epochs": 60, "epochs": 50}), "warmup_epochs 60 exceeds epochs 50"),
        (changed(finetune={"lr": 5e-5, "batch_size": 64, "lr_batch": 512}), "would rise from 6.25e-06 to min_lr 1e-05"),
        (changed(finetune={"lr": float("inf")}), "finetune.lr"),
        (changed(distil={"projections": ["q", "q"]}), "lists something twice"),
        (changed(backbones=[{"name": "a", "timm": "vit_tiny_patch16_224"}]), "timm needs image_size and patch_size"),
        (changed(resources={"evaluate": {"mem_mb": 1, "runtime": 1, "processes": 2}}), "evaluate runs in one process"),
        (changed(resources={"distil": {"mem_mb": 1, "runtime": 1, "processes": 2, "gpu": 1}}), "as many GPUs, not 1"),
        (changed(tasks=[{"name": "x", "folder": "y", "group": "all tasks"}]), "tables make the group 'all tasks'"),
        (SCENES | {"compensators": {"a": {}, "b": {"rank": 1}}}, "a segmentation study has one compensator"),
        (SCENES | {"finetune": {"epochs": 1}}, "a segmentation study has no finetune"),
        (changed(tasks=[{"name": "pets", "foldr": "x"}]), "unknown key 'tasks.0.foldr' (did you mean 'folder'?)"),
        (changed(tasks=[{"name": "digits", "group": "mine"}]), "group is for your own images"),
        (changed(tasks=["digits"], data={"val": 0.2}), "data.val must be a number of images"),
        (changed(backbones=[DEMO["backbones"][0] | {"distil_images": "vtab-1k"}]), "cannot distil on vtab-1k"),
        (changed(tasks=["ade20k"]), "ade20k cannot be a task: it is for segmentation"),
        (changed(tasks=["vtab-1k"]), "vtab-1k cannot be a task: it holds several tasks; name one, such as vtab.dtd"),
        (changed(tasks=[{"name": "cub200", "data": {"root": "x"}}]), "data.root is one for all tasks"),
        (changed(tasks=[{"name": "digits", "fine_tuned": "x"}]), "fine_tuned goes with finetune"),
        (changed(finetune={"tuning": {"mode": "none"}}), "were trained at one degree"),
        (changed(compensators={"low": {"ranks": 1}}), "compensator 'low': unknown key 'ranks' (did you mean 'rank'?)"),
        (changed(compensators={}), "compensators"),
        (changed(resources={"distil": {"mem_mb": 1, "runtime": 1, "gpus": 1}}), "did you mean 'gpu'?"),
        (changed(compressors=["tome_mlp"], max_degree=17), "tome_mlp goes up to 16"),
        (changed(finetune={"lr": -1}), "finetune.lr = -1"),
        (changed(evaluate={"scales": [0.5, 1]}), "0 must be among the scales"),
        (changed(train_degrees=[0], infer_degrees=[0]), "no gap to close"),
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

    before = FinetuneSettings(lr=3e-4, lr_batch=512, device="cpu", workers=2, save_every=5)
    words = shlex.split(f"{before.options()} {before.how_options()}")
    assert "workers" not in before.options()
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


def test_a_task_changes_sections_key_by_key():
    study = parse_study(
        changed(
            tasks=["digits", {"name": "mnist5k", "finetune": {"lr": 1e-4, "tuning": {"mode": "lora"}}}],
            transfer=False,
            finetune={"epochs": 7, "tuning": {"lora_rank": 3}},
        )
    )
    assert study.finetune_for("digits") == study.finetune
    mine = study.finetune_for("mnist5k")
    assert (mine.lr, mine.epochs, mine.tuning.mode, mine.tuning.lora_rank) == (1e-4, 7, "lora", 3)


def test_variants_that_differ_in_scales_alone_share_a_compensator():
    study = parse_study(changed(compensators={"tocom": {}, "half": {"scales": [0.5]}, "low": {"rank": 1}}))
    assert [study.distilled_as(name) for name in study.variants] == ["tocom", "tocom", "low"]
    assert study.scales_options() == "--scales half=0.5"
    assert study.distil_for("low").rank == 1
    assert study.distil_for("low").epochs == study.distil.epochs


@pytest.mark.parametrize(
    ("wanted", "start", "gpus"),
    [
        ({}, "tocom", 1),
        ({"processes": 4}, "torchrun --standalone --nproc-per-node 4 -m tocom.cli", 4),
        ({"processes": 4, "nodes": 2}, "export -n $(compgen -e SLURM_ ", 4),
        ({"gpu": 0}, "tocom", 0),
    ],
)
def test_a_stage_is_started_by_as_many_processes_as_it_asks_for(wanted, start, gpus):
    study = parse_study(changed(resources={"distil": {"mem_mb": 1000, "runtime": 10} | wanted}))
    assert study.launcher("distil").startswith(start)
    assert study.gpus("distil", "cuda") == gpus
    assert study.gpus("distil", "cpu") == 0


def test_a_training_job_asks_for_the_cores_of_all_its_processes():
    study = parse_study(changed(resources={"distil": {"mem_mb": 1, "runtime": 1, "processes": 4}}))
    assert study.threads("finetune", FinetuneSettings(threads=2)) == 2
    assert study.threads("distil", FinetuneSettings(threads=2, workers=3)) == 4 * 5


def test_images_of_timm_models_are_listed_and_those_augmented_in_memory_are_decoded():
    assert "--no-decode-train" not in parse_study(DEMO).prepare_options("digits")
    study = parse_study(changed(finetune={"augmentation": "timm"}))
    assert "--no-decode-train" in study.prepare_options("digits")
