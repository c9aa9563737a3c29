"""A plan's numbers are those counted by hand, and those of a real run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from tests.small import ARCHITECTURE, KWARGS
from tocom import plan as planning
from tocom.cli import app
from tocom.errors import TocomError
from tocom.jobs import Plan
from tocom.plan import Passes, disk, hours, jobs_by_rule, passes, power_of, read_rates, sizes_of
from tocom.stages.works import Subject

METHODS = {
    "plain": {"compressor": "tome"},
    "added": {"like": "plain", "compensator": "tocom"},
    "drawn": {"like": "plain", "tuning": {"degree": "random"}},
}
CPU = {"device": "cpu", "epochs": 2, "batch_size": 32}
#: Two tasks, two seeds; one checkpoint trained at degrees 0 and 4 and at random ones for each.
TINY = {
    "study": "tiny",
    "backbones": [
        {"name": "vit", "architecture": ARCHITECTURE, "kwargs": KWARGS, "image_size": 32, "patch_size": 8},
    ],
    "methods": METHODS,
    "compare": [["plain", "added"]],
    "tasks": ["digits", "rotation"],
    "seeds": [0, 1],
    "train_degrees": [0, 4],
    "infer_degrees": [0, 4],
    "max_degree": 4,
    "transfer": True,
    "checkpoints_per_job": 3,
    "data": {"train": 64, "val": 32, "test": 60},
    "pretrain": CPU | {"images": 128, "held_out": 32, "threads": 1},
    "learn": CPU | {"images": 64, "held_out": 32, "pairs": 4},
    "finetune": CPU,
    "evaluate": {"device": "cpu", "scales": [0.5, 1], "may_decline": False},
    "throughput": {"device": "cpu", "batch_size": 8, "repeats": 3, "warmup": 1},
}
#: Data sets that tasks and learning share, timm's models, two compressors, batches that do not come out even.
LARGE = TINY | {
    "study": "large",
    "backbones": [
        {
            "name": name,
            "timm": f"{model}_patch16_224.fb_in1k",
            "image_size": 224,
            "patch_size": 16,
            "images": "imagenet1k",
        }
        for name, model in (("s", "deit_small"), ("b", "deit_base"))
    ],
    "methods": METHODS | {"pruned": {"compressor": "evit"}, "again": {"like": "added", "scales": [1]}},
    "tasks": ["cifar100", "vtab.dtd", {"name": "mine", "python": "mine:load"}],
    "seeds": [0, 1, 2],
    "checkpoints_per_job": 4,
    "paper": "methods",
}
SCENES = TINY | {
    "study": "scenes",
    "methods": {"plain": {"compressor": "tome_mlp"}, "added": {"like": "plain", "compensator": "tocom"}},
    "tasks": ["scenes"],
    "transfer": False,
    "data": {"train": 20, "val": 10, "test": 5, "image_size": 64},
}


def planned(*configs):
    plan = Plan({str(number): config for number, config in enumerate(configs)})
    sizes = {(name, task): sizes_of(study, task) for name, study in plan.studies.items() for task in study.task_names}
    return plan, sizes, list(passes(plan, sizes))


def by_stage(found):
    """Return the images of every stage: trained on, and seen without training."""
    sums = {}
    for item in found:
        both = sums.setdefault(item.stage, [0, 0])
        both[item.work == "evaluation"] += item.images
    return sums


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_jobs_are_those_counted_by_hand():
    each = {
        "study": 1,
        "cells": 1,
        "compare": 1,
        "costs": 1,
        "tables": 1,
        "figures": 1,
        "gather_throughput": 1,
        "gather_transfer": 1,
    }
    tiny = {"pretrain_backbone": 1, "learn": 2, "prepare": 2, "transfer": 1, "throughput": 1, "all": 1}
    # plain has 2 degrees x 2 seeds, drawn has 2 seeds: batches of three are two and one.
    tiny |= {"finetune": 2 * (2 + 1), "evaluate": 2 * (2 + 1)}
    assert jobs_by_rule(Plan({"a": TINY})) == each | tiny
    # cifar100, VTAB's one set of files, and ImageNet for both backbones; scales alone share what each seed learns.
    large = {"fetch": 3, "import_backbone": 2, "learn": 2 * 3, "prepare": 3, "paper_table": 1, "all": 1}
    # plain and pruned have 6 checkpoints in batches of 4, drawn has 3.
    large |= {"finetune": 2 * 3 * (2 + 1 + 2), "evaluate": 2 * 3 * (2 + 1 + 2), "transfer": 2 * 2, "throughput": 2 * 2}
    assert jobs_by_rule(Plan({"a": LARGE})) == each | large
    both, alone = (
        jobs_by_rule(Plan({"a": TINY, "b": LARGE})),
        [jobs_by_rule(Plan({"a": config})) for config in (TINY, LARGE)],
    )
    assert both.pop("all") == 1
    assert both == {rule: sum(counts.get(rule, 0) for counts in alone) for rule in both}


def test_what_studies_share_is_made_once():
    shared = {"store": "results/shared"}
    other = {"study": "other", "seeds": [2, 5]}
    counts = jobs_by_rule(Plan({"a": LARGE | shared, "b": LARGE | shared | other}))
    assert (counts["fetch"], counts["import_backbone"], counts["learn"]) == (3, 2, 2 * 4)
    assert counts["prepare"] == 6


# --- passes ---------------------------------------------------------------------------------------------------------


def test_images_of_the_tiny_study_are_those_counted_by_hand():
    plan, _, found = planned(TINY)
    assert by_stage(found) == {
        # Two epochs of 128; 32 held-out ones after each of them, and at degrees 0 to 4.
        "pretrain": [2 * 128, 32 * (2 + 5)],
        # Two seeds; 32 held-out ones, by teacher and student, before the two epochs and after each.
        "learn": [2 * 2 * 64, 2 * 2 * 3 * 32],
        # Two tasks, two seeds, degrees 0 and 4 (scored at one degree) and random ones (scored at three); two epochs.
        "finetune": [2 * 2 * 3 * 2 * 64, 2 * 2 * 2 * 32 * (1 + 1 + 3)],
        # Plain at both degrees; compensated at the other one, after two scales were tried.
        "evaluate": [0, 2 * 2 * (3 * 2 * 60 + 2 * (60 + 2 * 32))],
        # Both tasks' gaps and none, on both tasks, for both seeds.
        "transfer": [0, 3 * 2 * 2 * 60],
        # Three models at both degrees, one warm-up and three rounds of eight.
        "throughput": [0, 3 * 2 * 4 * 8],
    }
    # Two tasks and seeds: three checkpoints plain, two of them compensated, at two degrees.
    assert planning.cells_of(plan.studies["tiny"]) == 2 * 2 * 2 * (3 + 2)


def test_degrees_that_are_drawn_are_those_that_are_counted():
    drawn = {"degree": "random", "among": [0, 1]}
    methods = METHODS | {"drawn": {"like": "plain", "tuning": drawn}}
    (vit,) = TINY["backbones"]
    backbones = [vit, vit | {"name": "other", "pretrain": {"degree": "random", "lowest": 2, "epochs": 3}}]
    _, _, found = planned(TINY | {"methods": methods, "backbones": backbones})
    made = [(item.work, list(item.degrees), item.images) for item in found if item.stage == "pretrain"]
    assert made == [
        ("fine-tuning", [0], 2 * 128),
        ("evaluation", [0, 0, 0, 1, 2, 3, 4], 7 * 32),
        ("fine-tuning", [2, 3, 4], 3 * 128),
        ("evaluation", [2, 3, 4] * 3 + [0, 1, 2, 3, 4], 14 * 32),
    ]
    tuned = {(item.work, tuple(item.degrees)) for item in found if item.stage == "finetune"}
    assert tuned == {(work, degrees) for work in ("fine-tuning", "evaluation") for degrees in ((0,), (4,), (0, 1))}


def test_images_are_those_of_a_real_run(tmp_path, monkeypatch):
    from tocom.data.registry import prepare
    from tocom.stages import evaluate, finetune, learn, pretrain, throughput, transfer

    seen, real = {}, timm.layers.PatchEmbed.forward

    def counted(self, x):
        seen[stage] = seen.get(stage, 0) + len(x)
        return real(self, x)

    monkeypatch.setattr(timm.layers.PatchEmbed, "forward", counted)
    monkeypatch.setattr(evaluate, "gflops", lambda vit: 1.0)
    monkeypatch.setattr(throughput, "gflops", lambda vit: 1.0)
    monkeypatch.setattr(throughput, "peak_memory_mb", lambda *_: 1.0)
    plan, sizes, found = planned(TINY)
    study = plan.studies["tiny"]
    it = SimpleNamespace(study="tiny", store="results/tiny", backbone="vit")
    stage = "pretrain"
    pretrain.pretrain(plan.pretrain(it), "vit")
    stage = "learn"
    for job in plan.learned.values():
        learn.learn(job, "vit", f"learned-{job.seed}")
    added = {"added": ["learned-0", "learned-1"]}
    for task in study.task_names:
        prepare(task, task, study.data_for(task).model_dump(include={"train", "val", "test"}))
        for tuned in study.tuned:
            for batch in study.batches(tuned):
                files = f"{task}-{tuned}-{batch}"
                one, stage = SimpleNamespace(**vars(it), task=task, tuned=tuned, batch=batch), "finetune"
                finetune.finetune(plan.finetune(one), "vit", task, files)
                stage = "evaluate"
                evaluate.evaluate(plan.evaluate(one), files, task, added, f"{files}-predicted")
    it.tuned, stage = "plain", "transfer"
    folders = {task: [f"{task}-plain-{batch}" for batch in study.batches("plain")] for task in study.task_names}
    transfer.transfer(plan.transfer(it), dict(zip(study.task_names, study.task_names, strict=True)), folders)
    stage = "throughput"
    throughput.throughput(plan.throughput(it), "vit", {"added": "learned-0"})
    expected = {}
    for item in found:
        expected[item.stage] = expected.get(item.stage, 0) + item.images * (2 if item.work == "distillation" else 1)
    assert seen == expected
    files = disk(plan, sizes)
    assert sum(files["prepared tasks"]) == pytest.approx(
        sum((tmp_path / t).stat().st_size for t in study.task_names), rel=0.02
    )
    assert sum(files["backbones"]) == pytest.approx((tmp_path / "vit").stat().st_size, rel=0.2)  # and a header
    assert planning.checkpoints_of(study) == len(list(tmp_path.glob("*/train-*.safetensors"))) == 12
    assert sum(files["checkpoints"]) == 12 * files["backbones"][0]
    assert sum(files["predictions"]) == 40 * 60 * 2


def test_a_study_to_segment_counts_its_head_and_the_size_of_its_images():
    plan, sizes, found = planned(SCENES)
    assert by_stage(found)["finetune"] == [2 * 2 * 2 * 20, 2 * 2 * 2 * 10]
    assert by_stage(found)["evaluate"] == [0, 2 * (2 * 2 * 5 + 2 * (5 + 2 * 10))]
    subject = next(item.subject for item in found if item.stage == "finetune")
    classes = 7  # six shapes and the ground
    assert (subject.head, subject.kwargs["img_size"]) == (("linear", classes), 64)
    assert next(item.subject for item in found if item.stage == "learn").kwargs["img_size"] == 32
    assert disk(plan, sizes)["predictions"] == [2 * (4 + 4) * 5 * 12 * classes]
    assert disk(plan, sizes)["prepared tasks"] == [35 * 4 * 64**2]


def test_partial_batches_are_left_out_where_images_are_mixed_and_a_tenth_at_most_is_held_out(tmp_path):
    for number in range(25):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    mixed = {"batch_size": 6, "mixup": 0.8}
    config = TINY | {"finetune": CPU | mixed, "learn": CPU | mixed | {"source": str(tmp_path), "images": None}}
    found = by_stage(planned(config)[2])
    assert found["learn"] == [2 * 2 * 18, 2 * 2 * 3 * 2]  # of 25, 2 are held out, and of 23, three batches are full
    assert found["finetune"][0] == 2 * 2 * 3 * 2 * 60


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_are_counted_or_stated_or_not_known(tmp_path):
    for number in range(20):
        path = tmp_path / "pets" / ("test" if number < 7 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    tasks = ["digits", "cub200", "vtab.dtd", {"name": "pets", "folder": "pets", "data": {"val": 0.25}}]
    tasks += [{"name": "gone", "folder": "gone"}, {"name": "mine", "python": "mine:load"}]
    tasks += [{"name": "cifar100", "data": {"val": 5000}}]
    config = TINY | {"tasks": tasks, "data": {}, "transfer": False}
    plan, sizes, found = planned(config)
    assert {task: tuple(each.values()) for (_, task), each in sizes.items() if task not in ("gone", "mine")} == {
        "digits": (800, 200, 797),
        "cub200": (5_994 - 599, 599, 5_794),
        "vtab.dtd": (800, 200, 1_880),
        "pets": (10, 3, 7),
        "cifar100": (45_000, 5_000, 10_000),
    }
    assert all(map(math.isnan, [*sizes["tiny", "gone"].values(), *sizes["tiny", "mine"].values()]))
    assert planning.total([i.images for i in found if i.stage == "evaluate"], str).endswith(" + unknown")
    assert planning.total([math.nan], str) == "unknown"
    from tocom.files import save_arrays

    sizes = {"train": 5, "val": 6, "test": 7}
    save_arrays(tmp_path / "results/tiny/data/mine.safetensors", {"a": np.zeros(1)}, {"sizes": sizes})
    assert sizes_of(plan.studies["tiny"], "mine") == sizes


# --- hours ----------------------------------------------------------------------------------------------------------


def test_hours_are_images_by_time_between_the_measured_degrees():
    item = Passes("evaluate", "evaluation", Subject("a"), "fp32", [0, 2, 8], 7200)
    assert hours(item, {item.key: {8: 1.0, 0: 3.0}}) == pytest.approx(2 * (3.0 + 2.5 + 1.0) / 3)


def test_rates_of_a_file_are_those_of_the_backbone_size_and_stage(tmp_path):
    from tocom.stages.benchmark import COLUMNS

    rows = [
        {
            "backbone": f"deit_{size}_patch16_224",
            "image_size": 224,
            "precision": precision,
            "stage": stage,
            "degree": degree,
            "status": "measured",
        }
        | {"images_per_second": slower * rate * (1 + degree), "device": "some GPU"}
        for precision, slower in (("bf16", 1), ("fp32", 0.1))
        for size, factor in (("small", 1), ("base", 10))
        for stage, rate in (("fine-tuning", factor), ("distillation", 2 * factor), ("evaluation", 4 * factor))
        for degree in (0, 4)
    ]
    rows.append(rows[0] | {"status": "out of memory", "images_per_second": None, "degree": 2, "device": ""})
    pd.DataFrame(rows, columns=COLUMNS).to_csv("rates.csv", index=False)
    found = planned(LARGE)[2]
    rates, where = read_rates(tmp_path / "rates.csv", found)
    assert where.startswith("some GPU, from ")
    for item in found:
        factor = (10 if "base" in item.subject.architecture else 1) * {"bf16": 1, "fp32": 0.1}[item.precision]
        first = factor * {"fine-tuning": 1, "distillation": 2, "evaluation": 4}[item.work]
        assert rates[item.key] == pytest.approx({0: 1 / first, 4: 1 / (5 * first)})
    with pytest.raises(TocomError, match=f"no figures of fine-tuning of {ARCHITECTURE} at 32 pixels"):
        read_rates(tmp_path / "rates.csv", planned(TINY)[2])
    pd.DataFrame([row | {"status": "not run"} for row in rows], columns=COLUMNS).to_csv("none.csv", index=False)
    with pytest.raises(TocomError, match="no figures of distillation"):
        read_rates(tmp_path / "none.csv", found)
    with pytest.raises(TocomError, match="no such file: gone.csv"):
        read_rates("gone.csv", found)


# --- power ----------------------------------------------------------------------------------------------------------


def detected(error, df):
    """Return the gain that a t-test on trainings finds with 80 % power at the 5 % level, to a hundredth."""
    gains, critical = np.arange(0, 40, 0.001), stats.t.isf(0.025, df)
    away = gains / error
    power = stats.nct.sf(critical, df, away) + stats.nct.sf(critical, df, -away)
    return float(gains[np.flatnonzero(power >= 0.8)[0]])


def test_the_detectable_gain_is_that_of_a_test_on_trainings_if_images_do_not_differ():
    spread = {"image": 0, "seed": 1.5, "compensator": 1.0, "rest": 25}
    whole = TINY | {"seeds": [0, 1, 2], "analysis": {"expected": spread}}
    own = (1.5**2 + 25**2 / 60) / 2  # two tasks of 60 test images
    name, seeds, images, gain = power_of(*_study_and_sizes(whole))
    assert (name, seeds) == ("tiny: added over plain (vit), all tasks, 0 → 4", "3")
    assert images == "2 × 60"
    assert float(gain.split()[0]) == pytest.approx(detected(((own + 1) / 3) ** 0.5, 2), abs=0.02)
    # Nothing is learned: each task tells something of how trainings differ.
    drawn = whole | {"endpoint": {"compare": ["plain", "drawn"]}, "compare": [["plain", "drawn"]]}
    name, *_, gain = power_of(*_study_and_sizes(drawn))
    assert name.startswith("tiny: drawn over plain")
    assert float(gain.split()[0]) == pytest.approx(detected((own / 3) ** 0.5, 4), abs=0.02)
    one = whole | {"endpoint": {"tasks": "digits", "train_degree": 4, "infer_degree": 0}}
    name, _, images, gain = power_of(*_study_and_sizes(one))
    assert (name.split("), ")[1], images) == ("digits, 4 → 0", "1 × 60")
    assert float(gain.split()[0]) == pytest.approx(detected(((2 * own + 1) / 3) ** 0.5, 2), abs=0.02)


def _study_and_sizes(config):
    plan, sizes, _ = planned(config)
    return plan.studies[config["study"]], sizes


def test_what_cannot_be_detected_or_is_not_known_is_said():
    expected = {"analysis": {"expected": {"image": 30.0}}}
    fewer, more = (TINY | {"seeds": list(range(n))} | expected for n in (2, 9))
    gains = [float(power_of(*_study_and_sizes(config))[3].split()[0]) for config in (fewer, more)]
    assert gains[0] > 3 * gains[1]
    assert power_of(*_study_and_sizes(TINY | {"seeds": [0]}))[3] == "none"
    assert power_of(*_study_and_sizes(LARGE))[2:] == ("3 × unknown", "unknown: give data.test")
    assert power_of(*_study_and_sizes(LARGE | {"data": {"test": 500}}))[3].startswith("unknown")  # of `mine`, still
    sizes = {("tiny", "digits"): {"test": 50}, ("tiny", "rotation"): {"test": 7_000}}
    study = _study_and_sizes(TINY)[0]
    assert power_of(study, sizes)[2] == "2 × 50 to 7,000"
    nothing = power_of(*_study_and_sizes(TINY | {"compare": []}))
    assert nothing == ("tiny: compares nothing", "2", "", "")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, SCENES], ids=["classify", "segment"])
def test_the_command_measures_here_and_prints_everything(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    (tmp_path / "b.yaml").write_text(json.dumps(LARGE | {"backbones": TINY["backbones"], "tasks": ["digits"]}))
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--device", "cuda:0"])
    assert result.exit_code == 0, result.output
    plan, sizes, found = planned(config, LARGE | {"backbones": TINY["backbones"], "tasks": ["digits"]})
    lines = {line.split()[1]: line for line in result.output.splitlines() if len(line.split()) > 2}
    assert all(str(count) in lines[rule] for rule, count in jobs_by_rule(plan).items() if rule not in by_stage(found))
    for stage, images in by_stage(found).items():
        assert all(f"{count:,}" in lines[stage] for count in images)
        assert 0 < float(lines[stage].split()[7]) < 1
    words = " ".join(result.output.replace("│", " ").split())
    assert all(cell in words for study in plan.studies.values() for cell in power_of(study, sizes)[2:])
    assert "analysis.expected says" in words
    assert "torch sees no GPU: the hours are those of this processor" in result.output
