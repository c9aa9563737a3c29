"""What a config may say, the grid that it stands for, and jobs that survive the way through a command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import refusal
from tocom.analysis.planned import endpoint
from tocom.jobs import EvaluateJob, FinetuneJob, LearnJob, Plan, read_job
from tocom.methods import PARTS
from tocom.parts import part_class
from tocom.settings import STAGES, EvaluateSettings, FinetuneSettings, PretrainSettings
from tocom.study import Study, parse_study, read_study

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path
    for path in (*ROOT.glob("config/*.yaml"), *ROOT.glob("tests/configs/*.yaml"))
    if "\nstudy:" in path.read_text()  # others list studies, or are what studies extend
)
DEMO = yaml.safe_load((ROOT / "config/demo.yaml").read_text()) | {"train_degrees": [0, 10, 14], "seeds": [0, 1, 2]}
del DEMO["endpoint"]  # of methods and tasks that tests change
TOCOM = {"like": "tome", "compensator": {"kind": "tocom", "rank": 2, "dropout": 0}}
RIVAL = {"like": "tome", "tuning": {"degree": "random"}}
DEMO["methods"] = {"tome": {"compressor": "tome"}, "tocom": TOCOM, "random_degree": RIVAL}
DEMO["compare"] = [["tome", "tocom"], ["tocom", "random_degree"]]
LETTERS = DEMO["backbones"][0]
RANDOM = {"degree": "random"}


def changed(**changes) -> dict:
    return json.loads(json.dumps(DEMO)) | changes


def with_methods(**methods) -> dict:
    return changed(methods=methods, compare=[])


def with_backbone(**backbone) -> dict:
    return changed(backbones=[LETTERS | backbone])


def made(own, name="made", **changes) -> dict:
    """Return a study whose one backbone is pre-trained, with changes of the pretrain section for itself."""
    entry = {"name": name, "architecture": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4}
    return changed(backbones=[entry | {"pretrain": own}], **changes)


def segmenting(**changes) -> dict:
    methods = {"tome_mlp": {"compressor": "tome_mlp"}}
    return changed(methods=methods, compare=[], tasks=["scenes"], transfer=False, finetune={}) | changes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_named_like_its_study_and_fits_the_schema(path):
    import jsonschema

    study = read_study(path)
    assert path.stem == study.study or path.stem.startswith(f"{study.study}_")  # a part of what a list runs
    assert parse_study(json.loads(study.as_json())) == study
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, Study.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "sedes": [1]}, Study.model_json_schema())


def test_every_setting_and_every_key_says_what_it_means():
    kinds = dict(STAGES) | {f"{r}.{n}": part_class(r, n).Options for r, names in PARTS.items() for n in names}
    missing = [f"{name}.{key}" for name, kind in kinds.items() for key in kind.model_fields if not kind.meaning(key)]
    assert missing == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(sedes=[0]), "unknown key 'sedes' (did you mean 'seeds'?)"),
        (changed(finetune={"epoch": 3}), "finetune: unknown key 'epoch' (did you mean 'epochs'?)"),
        (changed(learn={"epoch": 3}), "unknown key 'learn.epoch' (did you mean 'epochs'?)"),
        (changed(methods={"a": None, "b": {"like": "a"}}), "like: 'a' is no method above it"),
        (changed(methods={"a": {"infer_degrees": [2, 2]}}), "method 'a': infer_degrees lists something twice"),
        (
            changed(
                methods={"a": {}, "b": {"like": "a", "compensator": "tocom"}},
                infer_degrees=[0],
                train_degrees=[0],
                compare=[],
            ),
            "method 'b': no train degree differs from an inference degree",
        ),
        (changed(finetune={"lr": -1}), "lr = -1"),
        (changed(finetune={"lr": float("inf")}), "lr = inf"),
        (changed(finetune={"warmup_epochs": 60, "epochs": 50}), "warmup_epochs 60 exceeds epochs 50"),
        (changed(finetune={"lr": 5e-5, "batch_size": 64, "lr_batch": 512}), "would rise from 6.25e-06 to min_lr 1e-05"),
        (changed(infer_degrees=[0, 15]), "degree 15 is out of range"),
        (changed(infer_degrees=[-1]), "infer_degrees.0"),
        (changed(train_degrees=["sometimes"]), "train_degrees.0"),
        (changed(max_degree=40), "tome goes up to 32 with glyph_vit, which has 64 patches"),
        (segmenting(max_degree=17), "tome_mlp goes up to 16"),
        (changed(seeds=[0, 0]), "seeds lists something twice"),
        (changed(study="a/b"), "cannot name a folder"),
        (changed(study=3), "study = 3"),
        (changed(store="a b;rm"), "use letters, digits"),
        ({key: value for key, value in DEMO.items() if key != "tasks"}, "key 'tasks' is missing"),
        # tasks
        (changed(tasks=["digit"]), "did you mean 'digits'?"),
        (changed(tasks=["digits", "scenes"]), "tasks are of different kinds"),
        (changed(tasks=["scenes"]), "tome takes patches away that segmentation needs"),
        (changed(tasks=["vtab-1k"]), "vtab-1k cannot be a task: it holds several tasks; name one, such as vtab.dtd"),
        (changed(tasks=[{"name": "digits", "finetune": {"epoch": 1}}]), "task 'digits': finetune: unknown key 'epoch'"),
        (changed(tasks=[{"name": "digits", "data": {"trian": 1}}]), "task 'digits': data: unknown key 'trian'"),
        (changed(tasks=[{"name": "pets", "foldr": "x"}]), "unknown key 'tasks.0.foldr' (did you mean 'folder'?)"),
        (changed(tasks=[{"name": "x", "folder": "y", "group": "all tasks"}]), "tables make the group 'all tasks'"),
        (changed(tasks=[{"name": "digits", "group": "mine"}]), "group is for your own images"),
        (changed(tasks=["digits"], data={"val": 0.2}), "data.val must be a number of images"),
        (changed(tasks=[{"name": "cub200", "data": {"root": "x"}}]), "data.root is one for all tasks"),
        (changed(tasks=[{"name": "digits", "fine_tuned": "x"}]), "fine_tuned goes with a method that has tuning: none"),
        (segmenting(transfer=True), "transfer needs tasks to classify"),
        (changed(transfer=True, train_degrees=[0]), "transfer needs tasks to classify, and two train degrees"),
        (changed(paper="transfer", transfer=False), "needs transfer: true"),
        (changed(paper="speedup"), "needs throughput: {training: true}"),
        (changed(evaluate={"scales": [0.5, 1]}), "0 must be among the scales"),
        # backbones
        (changed(backbones=[{"name": "mine"}]), "needs one of checkpoint, timm and architecture"),
        (changed(backbones=[{"name": "a", "checkpoint": "x", "revision": "y"}]), "revision goes with timm"),
        (changed(backbones=[{"name": "a", "timm": "vit_tiny_patch16_224"}]), "timm needs image_size and patch_size"),
        (changed(backbones=[LETTERS, LETTERS | {"name": "b", "image_size": 64}]), "images of different sizes"),
        (with_backbone(images="vtab-1k"), "cannot learn on vtab-1k"),
        (with_backbone(pretrain={"epochs": 1}), "pretrain goes with architecture, not with checkpoint"),
        (made({"epoch": 1}), "backbone 'made': pretrain: unknown key 'epoch' (did you mean 'epochs'?)"),
        (made({"degree": "drawn"}), "backbone 'made': pretrain: degree = 'drawn'"),
        (made({"degree": "random", "among": [0, 15]}), "'made': pretrain: random degree 15 is out of range"),
        (made({"among": [0, 2]}), "among: say what is drawn from; set degree: random"),
        (made({}, pretrain={"degree": "random", "highest": 15}), "'made': pretrain: random degree 15 is out of range"),
        (
            made({"degree": "random"}, methods={"a": {"compressor": "tests.own_parts:Gate"}}, compare=[]),
            "'made': pretrain: Gate is learned on a backbone",
        ),
        # methods
        (with_methods(), "methods"),
        (with_methods(a={"compressor": "tomme"}), "did you mean 'tome'?"),
        (with_methods(a={"tuning": "lorra"}), "unknown tuning 'lorra' (did you mean 'lora'?)"),
        (with_methods(a={"tuning": {"kind": "lora", "ranks": 1}}), "unknown key 'ranks' (did you mean 'rank'?)"),
        (with_methods(a={"compressor": "no.such:Part"}), "cannot be imported"),
        (with_methods(a={"compresor": "tome"}), "unknown key 'methods.a.compresor' (did you mean 'compressor'?)"),
        (with_methods(a={"like": "b"}), "method 'a': like: 'b' is no method above it"),
        (with_methods(none={}), "no method can be called 'none'"),
        (with_methods(a={}, b={"like": "a", "compensator": {"projections": ["q", "q"]}}), "lists something twice"),
        (with_methods(a={"compensator": "tocom"}), "list the same method without one"),
        (with_methods(a={"scales": [0, 1]}), "scales are those of a compensator"),
        (with_methods(a={"tuning": "none"}), "were trained at one degree"),
        (with_methods(a={"tuning": RANDOM | {"highest": 15}}), "method 'a': random degree 15 is out of range"),
        (with_methods(a={"tuning": RANDOM | {"among": [0, 15]}}), "max_degree is 14; raise it or draw lower degrees"),
        (with_methods(a={"tuning": RANDOM | {"among": [2], "lowest": 1}}), "among stands in place of lowest"),
        (with_methods(a={"tuning": {"lowest": 1}}), "lowest: say what is drawn from; set degree: random"),
        (with_methods(a={"learn": {"epoch": 1}}), "method 'a': learn: unknown key 'epoch'"),
        (changed(compare=[["tome", "tocm"]]), "compare names 'tocm' (did you mean 'tocom'?)"),
        (changed(compare=[["tome", "tome"]]), "sets 'tome' against itself"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_mistake_in_a_config_is_one_line_that_names_it(config, message):
    assert message in refusal(parse_study, config)


def test_a_config_that_extends_itself_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml")
    assert "extends: './a.yaml' is no other config" in refusal(read_study, "a.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "YAML"), ("", "is empty"), (None, "no such config")])
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    assert message in refusal(read_study, path)


def test_the_endpoint_is_what_the_study_has():
    ends = {"tasks": "digits", "train_degree": 10, "infer_degree": 12, "compare": ["tocom", "random_degree"]}
    found = endpoint(parse_study(changed(endpoint=ends)))
    assert (found.before, found.after, found.scope.name, found.point.train, found.point.infer) == (
        *("tocom", "random_degree", "digits", "10", 12),
    )
    widest = endpoint(parse_study(changed(tasks=["digits", "rotation"])))
    assert (widest.scope.name, widest.point.train, widest.point.infer) == ("all tasks", "0", 14)
    assert endpoint(parse_study(changed(compare=[]))) is None
    for key, value in {"tasks": "letters", "train_degree": 3, "infer_degree": 9, "backbone": "b"}.items():
        assert f"endpoint.{key}: the study has no {value!r}; give one of" in refusal(
            parse_study, changed(endpoint={key: value})
        )
    assert "endpoint.compare" in refusal(parse_study, changed(endpoint={"compare": ["random_degree", "tome"]}))


@settings(deadline=None)
@given(st.integers(1, 30))
def test_jobs_share_out_every_checkpoint_once(size):
    study = parse_study(changed(checkpoints_per_job=size))
    for tuned, labels in (("tome", {"0", "10", "14"}), ("random_degree", {"random"})):
        batches = study.batches(tuned).values()
        shared = [checkpoint for batch in batches for checkpoint in batch]
        assert sorted(shared) == sorted((label, seed) for label in labels for seed in (0, 1, 2))
        assert max(map(len, batches)) <= size


def test_methods_inherit_share_checkpoints_and_learn_once():
    study = parse_study(
        changed(
            methods=DEMO["methods"]
            | {
                "half": {"like": "tocom", "scales": [0, 0.5]},
                "low": {"like": "tocom", "compensator": {"rank": 1}},
                "fused": {"compressor": {"kind": "evit", "fuse": "mean"}, "train_degrees": [0]},
            }
        )
    )
    tuned = [study.tuned_as(name) for name in study.methods]
    assert tuned == ["tome", "tome", "random_degree", "tome", "tome", "fused"]
    assert study.tuned == ("tome", "random_degree", "fused")
    assert study.sharing("tome") == ("tome", "tocom", "half", "low")
    assert (study.plain_of("low"), study.plain_of("random_degree")) == ("tome", "random_degree")
    titles = [method.title for method in study.methods.values()]
    assert titles[:3] == ["ToMe", "ToMe + ToCom", "ToMe, random degrees"]
    assert (study.train_degrees_of("tome"), study.train_degrees_of("random_degree")) == (("0", "10", "14"), ("random",))
    low = study.methods["low"].compensator.options
    assert (low.rank, low.dropout, study.methods["low"].changes) == (1, 0, {"compensator": {"rank": 1}})
    files = {name: study.learned_file("glyph_vit", name, 0) for name in study.methods}
    assert files["tocom"] == files["half"] != files["low"]
    assert [name for name, file in files.items() if file is None] == ["tome", "random_degree", "fused"]
    assert study.gap_degrees("tome") == ("0", "14")
    assert study.gap_degrees("random_degree") is study.gap_degrees("fused") is None


def test_what_is_learned_in_another_way_has_another_file():
    def file(**changes):
        return parse_study(changed(**changes)).learned_file("glyph_vit", "tocom", 0)

    recipes = [{}, {"learn": {}}, {"max_degree": 16}, {"backbones": [LETTERS | {"images": "data/photos"}]}]
    assert len({file(**recipe) for recipe in recipes}) == len(recipes)
    assert file(store="shared").parent == Path("shared/learned/glyph_vit")
    assert file(store="shared").name == file().name


def test_studies_with_other_seeds_share_what_both_learn_and_every_seed_goes_its_own_way():
    methods = {
        "drop": {"compressor": "tests.own_parts:Gate"},
        "added": {"like": "drop", "compensator": "tocom"},
    }
    configs = {
        name: changed(study=name, store="shared", seeds=seeds, methods=methods, compare=[], checkpoints_per_job=2)
        for name, seeds in (("a", [0, 1, 2]), ("b", [2, 5]))
    }
    plan = Plan(configs)
    a, b = plan.studies.values()
    names = {
        role: [a.learned_name("glyph_vit", "added", seed, role) for seed in (0, 1, 2, 5)]
        for role in ("compressor", "compensator")
    }
    assert names["compensator"][2:] == [b.learned_name("glyph_vit", "added", seed, "compensator") for seed in (2, 5)]
    assert {name for _, _, name in plan.learned} == {*names["compressor"], *names["compensator"]}
    for role, listed in names.items():
        for name, seed in zip(listed, (0, 1, 2, 5), strict=True):
            job = plan.learned["shared", "glyph_vit", name]
            assert (job.seed, job.compensator is None) == (seed, role == "compressor")
    folder = "shared/learned/glyph_vit"
    for gate, compensator in zip(names["compressor"], names["compensator"], strict=True):
        it = SimpleNamespace(store="shared", backbone="glyph_vit", part=compensator)
        assert plan.learned_before(it) == [f"{folder}/{gate}.safetensors"]
    # Degrees 0, 10 and 14 with seeds 0, 1 and 2, two a job: a job is given what was learned with its own seeds.
    it = SimpleNamespace(study="a", backbone="glyph_vit", tuned="drop", batch="batch-1")
    files = {r: [f"{folder}/{name}.safetensors" for name in listed] for r, listed in names.items()}
    assert (a.batches("drop")["batch-1"], plan.compressors(it)) == ((("0", 2), ("10", 0)), files["compressor"][:3:2])
    assert plan.compensators(it) == [("added", file) for file in files["compensator"][:3:2]]
    assert (plan.timed_compressor(it), plan.timed_compensators(it)) == (
        files["compressor"][:1], [("added", files["compensator"][0])])  # fmt: skip
    assert plan.all_learned(SimpleNamespace(study="b")) == files["compressor"][2:] + files["compensator"][2:]


def test_a_task_changes_sections_key_by_key():
    tasks = ["digits", {"name": "mnist5k", "finetune": {"lr": 1e-4}, "data": {"train": 50}}]
    study = parse_study(changed(tasks=tasks, finetune={"epochs": 7}))
    assert study.finetune_for("digits", "tome") == FinetuneSettings(epochs=7)
    assert study.finetune_for("mnist5k", "tome") == FinetuneSettings(epochs=7, lr=1e-4)
    assert (study.data_for("mnist5k").train, study.data_for("mnist5k").test) == (50, study.data.test)


def test_a_backbone_changes_the_pretrain_section_key_by_key():
    some, plain = made(RANDOM | {"lr": 1e-4}, "some"), made({}, "plain")
    both = changed(backbones=[*some["backbones"], *plain["backbones"]], pretrain={"epochs": 7, "images": 50})
    study = parse_study(both)
    assert study.pretrain_for("plain") == PretrainSettings(epochs=7, images=50)
    assert study.pretrain_for("some") == PretrainSettings(epochs=7, images=50, degree="random", lr=1e-4)
    plan = Plan({"a": both})
    jobs = [plan.pretrain(SimpleNamespace(store="results/demo", backbone=name)) for name in ("some", "plain")]
    assert [job.settings.degree for job in jobs] == ["random", "fixed"]
    assert {(job.compressor["kind"], job.max_degree, job.architecture) for job in jobs} == {
        ("tome", 14, "vit_tiny_patch16_224")
    }
    assert [plan.backbone_file(SimpleNamespace(store="results/demo", backbone=name)) for name in ("some", "plain")] == [
        "results/demo/backbones/some.safetensors", "results/demo/backbones/plain.safetensors"]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ({}, {}, True),
        (RANDOM, RANDOM, True),
        ({}, RANDOM, False),
        (RANDOM, RANDOM | {"highest": 5}, False),
        (RANDOM | {"among": [0, 5]}, RANDOM | {"among": [5, 0]}, True),
    ],
)
def test_studies_of_one_store_have_to_pre_train_a_backbone_alike(one, other, agree):
    def plan(first, second):
        return Plan({"a": first | {"store": "shared"}, "b": second | {"store": "shared", "study": "b"}})

    section = made({}, pretrain=other)  # for all backbones of a study, or for the one alone
    for second in (made(other), section):
        if agree:
            assert plan(made(one), second).made("architecture") == ["made"]
        else:
            assert "mean different things by the backbone 'made'" in refusal(plan, made(one), second)
    # What is drawn are degrees of the first method's compressor, up to the study's highest.
    fewer = {"max_degree": 15}
    pruned = {"methods": {"evit": {"compressor": "evit"}}, "compare": []}
    for changes in (fewer, pruned):
        if one:
            assert "mean different things" in refusal(plan, made(one), made(one, **changes))
        else:
            plan(made(one), made(one, **changes))


def test_methods_that_draw_from_other_degrees_are_trained_apart_and_tables_tell_them_apart():
    drawn = {"like": "tome", "tuning": RANDOM}
    methods = DEMO["methods"] | {
        "low": drawn | {"tuning": RANDOM | {"highest": 5}},
        "few": drawn | {"tuning": RANDOM | {"among": [14, 0]}},
        "same": drawn | {"tuning": RANDOM | {"among": [0, 14]}},
    }
    study = parse_study(changed(methods=methods))
    assert study.tuned == ("tome", "random_degree", "low", "few")
    assert [study.methods[name].title for name in ("random_degree", "low", "few")] == [
        "ToMe, random degrees", "ToMe, random degrees 0 to 5", "ToMe, random degrees among 0, 14"]  # fmt: skip
    assert study.train_degrees_of("few") == ("random",)


def test_learning_rate_scales_with_the_batch_only_if_asked():
    assert FinetuneSettings(lr=1e-3, batch_size=64).peak_lr == 1e-3
    assert FinetuneSettings(lr=1e-3, batch_size=64, lr_batch=512).peak_lr == pytest.approx(1.25e-4)


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        FinetuneJob(tuning={"kind": "lora", "rank": 2}, checkpoints=[["0", 1], [8, 0]], settings={"lr": 3e-4}),
        LearnJob(max_degree=4, settings={"epochs": 1}, compensator=None),
        EvaluateJob(methods={"a": {"infer_degrees": [0]}}, settings=EvaluateSettings(scales=(0,))),
    ],
    ids=lambda job: type(job).__name__,
)
def test_a_job_survives_the_way_through_a_command_line_and_a_file(job, tmp_path):
    assert read_job(type(job), job.as_json()) == job
    assert set(json.loads(job.as_json())) == set(type(job).model_fields)  # another default is another job
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(job.as_json())))
    assert read_job(type(job), str(tmp_path / "job.yaml")) == job


def test_changes_of_a_job_reach_what_they_name():
    changes = ["settings.lr=1e-4", "settings.source=data/x", "compensator.kind=tocom", "seed=1"]
    job = read_job(LearnJob, '{"max_degree": 4}', changes)
    assert (job.settings.lr, job.settings.source, job.compensator) == (1e-4, "data/x", {"kind": "tocom"})
    assert job.seed == 1


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("{}", "settings.epochs", "write key=value"),
        ("{}", "settings.epoch=3", "unknown key 'epoch' (did you mean 'epochs'?)"),
        ("{}", "settings.epochs=0", "epochs = 0"),
        ("{}", "settings.epochs=many", "epochs = 'many'"),
        ("{}", "checkpoint=1", "unknown key 'checkpoint' (did you mean 'checkpoints'?)"),
        ("{}", "compressor.kind.x=1", "compressor.kind"),
        ("{", None, "no JSON"),
        ("none.yaml", None, "no such config: none.yaml"),
    ],
)
def test_a_wrong_job_is_refused_in_one_line(text, change, message):
    changes = [] if change is None else ["compressor.kind=tome", change]
    assert message in refusal(read_job, FinetuneJob, text, changes)


def test_what_a_config_states_is_kept_where_it_is_also_the_default():
    """A timm backbone has to state the sizes of its images and patches, whatever they are."""
    timm = {"name": "v", "timm": "vit_small_patch16_224", "weights": "w.pth", "image_size": 32, "patch_size": 4}
    study = parse_study(changed(backbones=[timm]))
    assert parse_study(json.loads(study.as_json())) == study


def test_methods_of_fewer_degrees_and_seeds_share_the_checkpoints_of_those_with_more():
    methods = {
        "tome": {"compressor": "tome", "seeds": [0, 1]},
        "few": {"like": "tome", "compensator": "widecom", "adapt": {}, "train_degrees": [0], "seeds": [1]},
        "other": {"like": "tome", "seeds": [2]},
        "longer": {"like": "tome", "finetune": {"epochs": 9}},
    }
    config = changed(methods=methods, compare=[["tome", "few"]], endpoint={})
    study = parse_study(config)
    assert study.first_tuned == {"tome": "tome", "few": "tome", "other": "other", "longer": "longer"}
    assert study.finetune_for("digits", "longer").epochs == 9
    plan, batch = Plan({"config": config}), next(iter(study.batches("tome")))
    where = SimpleNamespace(study=study.study, backbone=study.backbones[0].name, task="digits", batch=batch)
    where.tuned, where.method = "tome", "few"
    assert plan.compensators(where) == []
    assert plan.adapted(where, "{method}/{task}/{batch}") == [("few", f"few/digits/{batch}")]
    assert [Path(file).stem.rpartition("_")[2] for file in plan.adapted_from(where)] == ["seed-1"]
    job = plan.evaluate(where)
    assert (job.methods["few"].train_degrees, job.methods["few"].seeds) == (("0",), (1,))
    meant = [(label, seed) for label in ("0", "4") for seed in (0, 1) if job.methods["few"].concerns(label, seed)]
    assert meant == [("0", 1)]
    assert not plan.adapt(where).concerns("4", 1)


def test_what_is_adapted_from_zero_has_no_file_to_time_and_goes_as_far_as_its_method():
    methods = {
        "tome": {"compressor": "tome", "max_degree": 15},
        "zero": {"like": "tome", "compensator": "widecom", "adapt": {"start": "zero"}},
    }
    plan = Plan({"config": changed(methods=methods, compare=[["tome", "zero"]], endpoint={})})
    (study,) = plan.studies.values()
    where = SimpleNamespace(study=study.study, backbone="glyph_vit", tuned="tome", method="zero")
    assert plan.timed_compensators(where) == []
    assert plan.throughput(where).methods == {"tome": False}
    assert plan.adapt(where).max_degree == 15
