"""A plan's numbers are those of the real workflow and of real runs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.small import ARCHITECTURE, KWARGS, build
from tests.workflow.test_studies import planned as dry_run
from tests.workflow.test_workflow import workplace
from tocom import plan as planning
from tocom import plan_inputs
from tocom.config import DataSettings, parse_study, read_study
from tocom.data import registry
from tocom.data.catalogue import read_catalogue
from tocom.data.families import FAMILIES
from tocom.data.listing import Items, Listing
from tocom.errors import TocomError
from tocom.plan import Amount, Model, Runs, Sizes
from tocom.plan_inputs import UNKNOWN
from tocom.rates import Head, Rate, Rates

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
SCENES = ROOT / "tests" / "configs" / "scenes.yaml"
#: Everything that changes the number of jobs: downloads that are shared, timm's models, variants of which two share a
#: distillation, several compressors, batches that do not come out even.
LARGE = {
    "study": "large",
    "backbones": [
        {"name": name, "timm": f"{model}_patch16_224.fb_in1k", "image_size": 224, "patch_size": 16}
        | {"distil_images": "imagenet1k"}
        for name, model in (("deit_s", "deit_small"), ("deit_b", "deit_base"))
    ],
    "compressors": ["tome", "evit"],
    "compensators": {"tocom": {}, "rank1": {"rank": 1}, "fixed": {"scales": [1]}},
    "tasks": ["cifar100", "vtab.dtd", "vtab.svhn", {"name": "mine", "python": "mine:load"}],
    "seeds": [0, 1, 2],
    "train_degrees": [0, 8, 16, "random"],
    "infer_degrees": [0, 8, 16],
    "max_degree": 16,
    "transfer": True,
    "checkpoints_per_job": 5,
    "finetune": {"augmentation": "timm", "precision": "bf16"},
    "distil": {"images": None},
}
#: One task, one seed.
ONE = yaml.safe_load(TINY.read_text()) | {"tasks": ["digits"], "seeds": [0], "transfer": False}
#: What the jobs of a segmentation study depend on.
SEVERAL_SCENES = yaml.safe_load(SCENES.read_text()) | {
    "study": "several_scenes",
    "backbones": [yaml.safe_load(SCENES.read_text())["backbones"][0] | {"name": name} for name in ("a", "b")],
    "train_degrees": [0, 16],
    "infer_degrees": [0, 8, 16],
}
FLAT = {"train": 50.0, "infer": 200.0}


def rates_for(study, models, speeds=None):
    """The same rate for every model and degree."""
    speeds = speeds or FLAT
    conditions = [(study.backbones[0].image_size, None)]
    if study.segmentation:
        head = Head(study.segmentation.train.head, study.segmentation.n_classes)
        conditions.append((study.segmentation.image_size, head))
    return Rates(
        Rate(models[b.name].label(head), size, c, p, "a device", degree, mode, speeds[mode])
        for b in study.backbones
        for size, head in conditions
        for c in study.compressors
        for p in ("fp32", "bf16")
        for degree in (0, study.max_degree)
        for mode in speeds
    )


def planned(study, sizes, distil_images=None, parameters=1000, segmenter=0):
    models = {b.name: Model(b.name, {}, parameters, segmenter_parameters=segmenter) for b in study.backbones}
    images = distil_images or dict.fromkeys(planning.images_of(study))
    return planning.plan(study, rates_for(study, models), models, sizes, images)


# --- jobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "pretrain", "large", "several_scenes"])
def test_jobs_are_those_that_snakemake_would_run_in_an_empty_folder(name, tmp_path):
    folder = workplace(tmp_path)
    path = folder / "config" / f"{name}.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump({"large": LARGE, "several_scenes": SEVERAL_SCENES}[name]))
    counts = dry_run(folder, name)
    assert counts.pop("total") == sum(counts.values())
    assert planning.jobs(read_study(path), read_catalogue()) == counts


# --- passes ---------------------------------------------------------------------------------------------------------


def test_passes_of_the_tiny_study_are_those_counted_by_hand():
    study = read_study(TINY)
    result = planned(study, {"digits": Sizes(64, 32, 60), "rotation": Sizes(64, 32, 60)})
    assert {stage: amount.known for stage, amount in result.passes.items()} == {
        # Two epochs of 128; 32 held-out ones after each of them, and at degrees 0 to 4.
        "pretrain": 2 * 128 + 32 * (2 + 5),
        # Teacher and student on two epochs of 64, and on 32 held-out ones before them and after each.
        "distil": 2 * (2 * 64) + 2 * (3 * 32),
        # Two tasks, two seeds, degrees 0, 4 (scored at one degree) and random (scored at three); two epochs.
        "finetune": 2 * 2 * (3 * 2 * 64 + 2 * 32 * (1 + 1 + 3)),
        # Plain at both degrees; compensated at the other one, after two scales were tried.
        "evaluate": 2 * 2 * (3 * 2 * 60 + 2 * (60 + 2 * 32)),
        # Both tasks' gaps and none, on both tasks, for both seeds.
        "transfer": 3 * 2 * 2 * 60,
        # Three models at both degrees, one warm-up and three rounds of eight.
        "throughput": 3 * 2 * 4 * 8,
    }
    assert all(amount.whole for amount in result.passes.values())


def test_partial_batches_are_left_out_where_images_are_mixed_and_a_tenth_at_most_is_held_out():
    recipe = {"batch_size": 64, "epochs": 3}
    config = yaml.safe_load(TINY.read_text()) | {
        "tasks": ["digits"],
        "seeds": [0],
        "transfer": False,
        "train_degrees": [0],
    }
    config |= {"finetune": recipe | {"mixup": 0.8}, "distil": recipe | {"images": None, "held_out": 1000}}
    passes = planned(parse_study(config), {"digits": Sizes(150, 10, 1)}, {None: 505}).passes
    assert passes["finetune"].known == 3 * (128 + 10)
    assert passes["distil"].known == 2 * 3 * (505 - 50) + 2 * 4 * 50
    config["distil"] |= {"held_out": 20, "cutmix": 1}
    passes = planned(parse_study(config), {"digits": Sizes(150, 10, 1)}, {None: 505}).passes
    assert passes["distil"].known == 2 * 3 * 448 + 2 * 4 * 20


class Sums(dict):
    def add(self, key, value):
        self[key] = self.get(key, 0) + value


def test_passes_are_those_of_a_real_run(tmp_path, monkeypatch):
    """Every image that goes through a model is counted while the stages run; the plan says the same."""
    from tocom.models import save_model
    from tocom.stages.distil import distil
    from tocom.stages.evaluate import evaluate
    from tocom.stages.finetune import finetune
    from tocom.vit import CompressedViT

    config = yaml.safe_load(TINY.read_text()) | {
        "tasks": ["digits"],
        "seeds": [0],
        "transfer": False,
        "train_degrees": [3, "random"],
    }
    config["evaluate"] = {"device": "cpu", "scales": [0.5, 1], "may_decline": False}
    study = parse_study(config)
    save_model(tmp_path / "backbone", build(), ARCHITECTURE, KWARGS)
    registry.prepare("digits", tmp_path / "data", {"train": 64, "val": 32, "test": 60})
    seen, real = Sums(), CompressedViT.forward

    def counting(self, images):
        if len(images) > 1:  # one image alone is a count of FLOPs
            seen.add((stage, "train" if torch.is_grad_enabled() else "infer"), len(images))
        return real(self, images)

    monkeypatch.setattr(CompressedViT, "forward", counting)
    stage = "distil"
    distil(tmp_path / "backbone", tmp_path / "tocom", study.max_degree, settings=study.distil)
    for degree in study.train_degrees:
        stage, path = "finetune", tmp_path / str(degree)
        finetune(tmp_path / "backbone", tmp_path / "data", path, degree, 0, max_degree=4, settings=study.finetune)
        stage = "evaluate"
        compensators = {"tocom": tmp_path / "tocom"}
        degrees = list(study.infer_degrees)
        evaluate([path], tmp_path / "data", compensators, [tmp_path / "out"], degrees, study.evaluate)
    expected = Sums()
    for work in planning.works(study, {"digits": Sizes(64, 32, 60)}, {None: None}):
        if work.stage in ("distil", "finetune", "evaluate"):
            expected.add((work.stage, work.mode), work.images)
    assert seen == expected


def test_a_model_that_is_used_as_it_is_is_not_trained():
    config = yaml.safe_load(TINY.read_text()) | {
        "tasks": ["digits"],
        "seeds": [0],
        "transfer": False,
        "train_degrees": [0],
    }
    study = parse_study(config | {"finetune": {"tuning": {"mode": "none"}}})
    passes = planned(study, {"digits": Sizes(64, 32, 60)}).passes
    assert passes["finetune"].known == 32
    assert "transfer" not in passes


def test_passes_and_disk_space_of_segmentation_are_those_counted_by_hand():
    study = parse_study(SEVERAL_SCENES)
    result = planned(study, {"scenes": plan_inputs.segmentation_sizes(study, {})}, {None: None}, 1000, 900)
    runs = 2 * 2 * 2  # backbones, seeds, train degrees
    assert {stage: amount.known for stage, amount in result.passes.items()} == {
        "pretrain": 2 * (2 * 128 + 32 * (2 + 17)),
        "distil": 2 * (2 * (2 * 64) + 2 * (3 * 32)),
        "segment train": runs * 2 * (48 + 16),
        # Plain at three degrees; compensated at the two others, after two scales were tried.
        "segment evaluate": runs * (3 * 24 + 2 * (24 + 2 * 16)),
        "throughput": 2 * 3 * 3 * 4 * 8,
    }
    assert {kind: amount.known for kind, amount in result.disk.items() if amount.known} == {
        "prepared tasks": (48 + 16 + 24) * 4 * 32 * 32,
        "backbones": 2 * 4 * 1000,
        "checkpoints": runs * 4 * 900,
        "predictions": runs * 6 * 24 * 7 * 3 * 4,
    }
    assert result.hours["segment train"].known == pytest.approx(runs * 2 * (48 / 50 + 16 / 200) / 3600)


def test_passes_and_files_of_segmentation_are_those_of_a_real_run(tmp_path, monkeypatch):
    from tocom.compensator import Compensator
    from tocom.files import load_arrays
    from tocom.models import load_model, save_model
    from tocom.segmentation.data import prepare
    from tocom.segmentation.model import Segmenter
    from tocom.segmentation.stage import evaluate, train

    patches = {"patch_size": 4}
    config = yaml.safe_load(SCENES.read_text()) | {"seeds": [0], "train_degrees": [8]}
    config["backbones"] = [{"name": "tiny_vit", "checkpoint": str(tmp_path / "backbone")}]
    config["evaluate"] = {"device": "cpu", "scales": [0.5], "may_decline": False, "batch_size": 10}
    config["segmentation"] |= {"image_size": 48}
    save_model(tmp_path / "backbone", build(**patches), ARCHITECTURE, KWARGS | patches)
    study = parse_study(config)
    wanted = study.segmentation
    Compensator.for_model(load_model(tmp_path / "backbone")[0], 16, compressor="tome_mlp").save(tmp_path / "tocom")
    prepare("scenes", tmp_path / "data", 48, wanted.sizes)
    seen, real = Sums(), Segmenter.forward

    def counting(self, images):
        seen.add((stage, "train" if torch.is_grad_enabled() else "infer", images.shape[-1]), len(images))
        return real(self, images)

    monkeypatch.setattr(Segmenter, "forward", counting)
    stage = "segment train"
    train(tmp_path / "backbone", tmp_path / "data", tmp_path / "segmenter", 8, 0, "tome_mlp", wanted.train)
    stage = "segment evaluate"
    files = [[tmp_path / "segmenter"], tmp_path / "data", tmp_path / "tocom", [tmp_path / "counts"]]
    evaluate(*files, list(study.infer_degrees), study.evaluate)
    sizes = {"scenes": plan_inputs.segmentation_sizes(study, {})}
    works = [work for work in planning.works(study, sizes, {None: None}) if work.stage.startswith("segment")]
    assert {work.runs for work in works} == {Runs("tiny_vit", "tome_mlp", 48, Head("linear", 7))}
    expected = Sums()
    for work in works:
        expected.add((work.stage, work.mode, work.runs.image_size), work.images)
    assert seen == expected

    model = planning.describe(study.backbones[0], wanted)
    disk = planned(study, sizes, None, model.parameters, model.segmenter_parameters).disk
    kinds = {"checkpoints": "segmenter", "predictions": "counts", "prepared tasks": "data"}
    for kind, name in kinds.items():
        assert disk[kind].known == sum(array.nbytes for array in load_arrays(tmp_path / name)[0].values()), kind


# --- hours ----------------------------------------------------------------------------------------------------------


def test_hours_are_passes_over_images_a_second():
    study = read_study(TINY)
    result = planned(study, {"digits": Sizes(64, 32, 60), "rotation": Sizes(64, 32, 60)})
    assert result.hours["evaluate"].known == pytest.approx(result.passes["evaluate"].known / 200 / 3600)
    train, score = 2 * 2 * 3 * 2 * 64, 2 * 2 * 2 * 32 * 5
    assert result.hours["finetune"].known == pytest.approx((train / 50 + score / 200) / 3600)
    assert result.device == "a device"


def test_random_degrees_take_the_mean_time_of_all_and_a_fixed_one_its_own():
    study = parse_study(yaml.safe_load(TINY.read_text()) | {"tasks": ["digits"], "seeds": [0]})
    sizes = {"digits": Sizes(64, 32, 60)}
    images = {None: None}
    seconds = {degree: 10.0 - degree for degree in range(5)}
    model = Model("m", {}, 1)
    rates = Rates(
        Rate("m", 32, "tome", "fp32", "d", degree, mode, 1 / seconds[degree]) for degree in (0, 2, 4) for mode in FLAT
    )
    result = planning.plan(study, rates, {"tiny_vit": model}, sizes, images)
    train = 2 * 64 * (seconds[0] + seconds[4] + np.mean(list(seconds.values())))
    score = 2 * 32 * (seconds[0] + seconds[4] + seconds[0] + seconds[2] + seconds[4])
    assert result.hours["finetune"].known * 3600 == pytest.approx(train + score)


# --- disk -----------------------------------------------------------------------------------------------------------


def test_disk_space_is_that_of_the_files_which_a_run_writes(tmp_path):
    from tocom.files import load_arrays, save_arrays
    from tocom.models import save_model

    study = parse_study(yaml.safe_load(TINY.read_text()) | {"tasks": ["digits"]})
    registry.prepare("digits", tmp_path / "data", {"train": 64, "val": 32, "test": 60})
    prepared = sum(a.nbytes for name, a in load_arrays(tmp_path / "data")[0].items() if name.endswith("images"))
    save_model(tmp_path / "model", build(), ARCHITECTURE, KWARGS)
    parameters = planning.describe(study.backbones[0]).parameters
    weights = sum(a.nbytes for a in load_arrays(tmp_path / "model")[0].values())
    assert parameters * 4 == weights
    result = planned(study, {"digits": Sizes(64, 32, 60)}, parameters=parameters).disk
    assert result["prepared tasks"].known == prepared
    assert result["checkpoints"].known == 6 * weights
    assert result["backbones"].known == weights
    written = 0
    for cells in (4, 4, 2):  # degrees 0 and 4 with and without ToCom, and random degrees without
        arrays = {"predictions": np.zeros((cells, 60), np.int16), "labels": np.zeros(60, np.int64)}
        save_arrays(tmp_path / "predictions", arrays)
        written += 2 * sum(a.nbytes for a in load_arrays(tmp_path / "predictions")[0].values())
    assert result["predictions"].known == written


def test_downloads_are_counted_once_and_training_images_that_stay_files_are_not_decoded():
    study = parse_study(LARGE)
    catalogue = read_catalogue()
    assert planning.downloads(study, catalogue) == ["cifar100", "vtab-1k", "imagenet1k"]
    sizes = {name: Sizes(1000, 100, 500) for name in study.task_names}
    result = planned(study, sizes, {"imagenet1k": 10}).disk
    expected = sum(catalogue[name].unpacked_bytes for name in ("cifar100", "vtab-1k", "imagenet1k"))
    assert result["data sets, unpacked"].known == expected
    assert result["prepared tasks"].known == 4 * 600 * 3 * 224**2


# --- what is known beforehand ---------------------------------------------------------------------------------------


def test_what_is_not_known_is_said_and_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study, catalogue = parse_study(LARGE), read_catalogue()
    sizes = {task.name: planning.task_sizes(study, task, catalogue) for task in study.tasks}
    assert sizes["mine"] == UNKNOWN
    assert sizes["cifar100"] == Sizes(45_000, 5_000, 10_000)
    assert sizes["vtab.dtd"] == Sizes(800, 200, 1880)
    result = planned(study, sizes)
    assert result.unknown == ("mine", "images of imagenet1k to distil on")
    for stage in ("finetune", "evaluate", "transfer"):
        assert not result.passes[stage].whole
        assert result.passes[stage].known > 0
        assert not result.hours[stage].whole
    assert result.passes["throughput"].whole
    assert not result.disk["prepared tasks"].whole
    assert result.disk["checkpoints"].whole
    assert not planning.total_of(result.hours).whole
    assert [Amount(3.0).text(str), Amount(3.0, False).text(str), Amount(0, False).text(str)] == [
        "3.0",
        "3.0 + unknown",
        "unknown",
    ]


@given(
    st.integers(2, 60),
    st.none() | st.integers(1, 30),
    st.integers(1, 30),
    st.none() | st.integers(1, 80),
    st.none() | st.sampled_from([0.1, 0.34, 0.5, 1, 2, 7]),
    st.none() | st.integers(1, 40),
)
def test_sizes_are_those_that_preparing_a_task_gives(n_train, n_val, n_test, train, val, test):
    counts = {"train": n_train, "test": n_test} | ({} if n_val is None else {"val": n_val})
    items = {
        split: Items(np.zeros(n, np.int64), arrays=np.zeros((n, 3, 1, 1), np.uint8)) for split, n in counts.items()
    }
    data = DataSettings(train=train, val=val, test=test)
    try:
        listing = registry.downloaded(
            Listing(1, "group", "me", items), {"train": data.train, "val": data.val, "test": data.test}
        )
    except TocomError:  # too few images to choose on
        return
    expected = Sizes(*(len(listing.splits[split]) for split in Sizes._fields))
    assert plan_inputs.split_sizes(n_train, n_val, n_test, data) == expected


@pytest.mark.parametrize("name", ["digits", "rotation"])
@pytest.mark.parametrize("sizes", [{}, {"train": 100, "val": 30, "test": 5000}])
def test_sizes_of_bundled_tasks_are_those_of_their_splits(name, sizes):
    if name == "rotation" and sizes:
        sizes = sizes | {"test": 7}
    study = parse_study(yaml.safe_load(TINY.read_text()) | {"tasks": [name], "data": sizes})
    wanted = {split: sizes.get(split) for split in Sizes._fields}
    splits = registry.bundled(name, wanted).splits
    expected = Sizes(*(len(splits[split]) for split in Sizes._fields))
    assert planning.task_sizes(study, study.tasks[0], {}) == expected


def test_images_of_a_folder_are_counted(tmp_path):
    for split, n in (("train", 10), ("test", 3)):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(n):
            (tmp_path / split / "a" / f"{number}.png").write_bytes(b"")
    tasks = [{"name": "mine", "folder": str(tmp_path)}]
    study = parse_study(yaml.safe_load(TINY.read_text()) | {"tasks": tasks, "data": {"val": 0.2}})
    assert planning.task_sizes(study, study.tasks[0], {}) == Sizes(8, 2, 3)


def test_the_images_of_a_hub_data_set_are_known_once_it_is_prepared(tmp_path, monkeypatch):
    from tocom.files import save_arrays

    monkeypatch.chdir(tmp_path)
    study = parse_study(yaml.safe_load(TINY.read_text()) | {"tasks": [{"name": "mine", "hub": "a/b"}]})
    assert planning.task_sizes(study, study.tasks[0], {}) == UNKNOWN
    about = {"sizes": {"train": 9, "val": 2, "test": 4}}
    save_arrays("results/tiny/data/mine.safetensors", {"x": np.zeros(1)}, about)
    assert planning.task_sizes(study, study.tasks[0], {}) == Sizes(9, 2, 4)


def test_images_to_segment_are_counted_in_a_folder_and_stated_of_ade20k(tmp_path):
    from PIL import Image

    for source, number in (("training", 5), ("validation", 2)):
        for part in ("images", "annotations"):
            (tmp_path / part / source).mkdir(parents=True)
            for index in range(number):
                Image.new("L", (8, 8)).save(tmp_path / part / source / f"{index}.png")

    def sizes(**changes):
        section = {"image_size": 32, "sizes": {"val": 2}} | changes
        return plan_inputs.segmentation_sizes(parse_study(SEVERAL_SCENES | {"segmentation": section}), read_catalogue())

    assert sizes(data=str(tmp_path), classes=3) == Sizes(3, 2, 2)
    assert sizes(data="ade20k", folder=str(tmp_path)) == Sizes(3, 2, 2)
    assert sizes(data=str(tmp_path / "none"), classes=3) == UNKNOWN
    with pytest.raises(TocomError, match="too few training images to keep 5"):
        sizes(data=str(tmp_path), classes=3, sizes={"val": 5})
    # The challenge has 20,210 training and 2,000 validation images.
    study = read_study(ROOT / "config" / "ade20k.yaml")
    assert plan_inputs.segmentation_sizes(study, read_catalogue()) == Sizes(19_210, 1_000, 2_000)
    assert planning.downloads(study, read_catalogue()) == ["ade20k", "imagenet1k"]


def test_the_catalogue_states_the_splits_of_every_task(tmp_path):
    catalogue = read_catalogue()
    tasks = [name for name, entry in catalogue.items() if entry.family in FAMILIES]
    assert len(tasks) >= 24
    for name in tasks:
        counts = plan_inputs._downloaded_counts(name, str(tmp_path), catalogue)
        assert {"train", "test"} <= counts.keys(), name


def test_the_real_models_have_their_published_sizes():
    study = parse_study(LARGE)
    models = [planning.describe(backbone) for backbone in study.backbones]
    # DeiT (arXiv 2012.12877), table 1: 22 and 86 million.
    assert [round(model.parameters / 1e6) for model in models] == [22, 87]
    assert all(model.proportional_attention for model in models)
    assert planning.describe(read_study(ROOT / "config" / "demo.yaml").backbones[0]).label().startswith("vit_tiny")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_measures_saves_reads_and_prints(tmp_path, capsys):
    from tocom.rates import device_name, read_rates

    file = tmp_path / "rates.csv"
    planning.plan_command(TINY, save_rates=file, device="cpu", batch_size=4, seconds=0)
    first, progress = capsys.readouterr()
    # Three degrees in each mode; a training pass counts as three.
    assert re.search(r"measure: 100%.* 12/12 ", progress)
    assert {(rate.degree, rate.mode) for rate in read_rates(file)} == {(d, m) for d in (0, 2, 4) for m in FLAT}
    planning.plan_command(TINY, rates=file)
    second = capsys.readouterr().out
    assert first == second
    assert device_name(torch.device("cpu")) in " ".join(second.split())
    assert re.search(r"together\W+\d+", second)
    for word in ("finetune", "distil", "evaluate", "checkpoints", "prepared tasks"):
        assert word in second
    with pytest.raises(TocomError, match="one of them"):
        planning.plan_command(TINY, rates=file, save_rates=file)
    with pytest.raises(TocomError, match="no rate of"):
        planning.plan_command(ROOT / "config" / "demo.yaml", rates=file)


def test_a_segmentation_study_is_planned_from_rates_of_its_own_models(tmp_path, capsys):
    from tocom.rates import read_rates

    file = tmp_path / "rates.csv"
    planning.plan_command(SCENES, save_rates=file, device="cpu", seconds=0)
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("segment train", "segment evaluate", "segment_table", "segmentation head", "counting labelled pixels"):
        assert word in printed
    assert {rate.compressor for rate in read_rates(file)} == {"tome_mlp"}
    heads = {(rate.degree, rate.mode) for rate in read_rates(file) if rate.architecture.endswith("head of 7 classes")}
    assert heads == {(0, "train"), (0, "infer"), (8, "infer"), (16, "infer")}  # the middle of 0 to 16 is 8


def test_a_study_for_a_gpu_says_so_before_it_is_measured_on_a_processor(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(planning, "measure_study", lambda *arguments: asked.append(arguments) or [])
    with pytest.raises(TocomError, match="no rate of"):
        planning.plan_command(ROOT / "config" / "ade20k.yaml", device="cpu")
    assert "for a GPU" in capsys.readouterr().err
    assert len(asked) == 1


def test_planning_imports_no_torch():
    code = "import sys, tocom.plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
