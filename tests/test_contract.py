"""What every part promises, whichever it is: those of the registry, and classes that this package never saw."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.small import ARCHITECTURE, KWARGS, build, refusal, steps_of, teach, tune
from tocom import CompressedViT, gflops, load_model, load_part, make_part, save_model, save_part
from tocom.compressed import cost
from tocom.files import load_arrays, load_tensors
from tocom.jobs import EvaluateJob
from tocom.methods import DEFAULTS, PARTS
from tocom.models import compress
from tocom.parts import Shape, describe, part_class
from tocom.stages.evaluate import evaluate
from tocom.tasks.segment import Segmenter, make_head
from tocom.training import normalise

SHAPE = Shape(2, 16, 2, 17, 1, 16, 16, 32)
PATCHES, MAX_DEGREE = 16, 4
OUTSIDE = {"compressor": "Gate", "tuning": "Shift", "compensator": "Bias"}
OUTSIDE = {role: f"mypackage.parts:{name}" for role, name in OUTSIDE.items()}
KINDS = {role: [*names, OUTSIDE[role]] for role, names in PARTS.items()}
each_part = pytest.mark.parametrize(("role", "kind"), [(role, kind) for role in KINDS for kind in KINDS[role]])
#: Parts for models that read images; those that read text alone are held to the same promises in tests/test_lm.py.
VISUAL = {
    role: [kind for kind in kinds if kind not in PARTS[role] or "images" in part_class(role, kind).reads]
    for role, kinds in KINDS.items()
}
each_compressor = pytest.mark.parametrize("kind", VISUAL["compressor"])
each_tuning = pytest.mark.parametrize("kind", VISUAL["tuning"])
each_compensator = pytest.mark.parametrize("kind", VISUAL["compensator"])


@pytest.fixture(scope="module", autouse=True)
def mypackage(tmp_path_factory):
    """Put a package with parts of a user's own where Python finds it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "mypackage").mkdir()
    shutil.copy(Path(__file__).parent / "own_parts.py", folder / "mypackage" / "parts.py")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def drawn(role, kind, **options):
    """Return a part whose parameters, if it has any, matter."""
    part = make_part(role, {"kind": kind} | options, SHAPE, MAX_DEGREE).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in part.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return part


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- all parts --------------------------------------------------------------------------------------------------------


@each_part
def test_a_part_says_what_it_is(role, kind):
    cls = part_class(role, kind)
    assert cls.role == role
    assert all(text.strip() for text in (cls.title, cls.reference, cls.trains, cls.needs))
    missing = [name for name in cls.Options.model_fields if not cls.Options.meaning(name)]
    assert not missing
    assert role != "compressor" or (cls.axis.strip() and cls.saves.strip())


@each_part
def test_options_have_defaults_and_are_validated(role, kind):
    part = drawn(role, kind)
    described = describe(part)
    assert described["kind"] == kind
    assert describe(make_part(role, described, SHAPE, MAX_DEGREE)) == described
    fields = list(part.Options.model_fields)
    typo = f"{fields[0]}s" if fields else "anything"
    message = refusal(make_part, role, {"kind": kind, typo: 1}, SHAPE, MAX_DEGREE)
    assert f"unknown key '{typo}'" in message
    assert not fields or f"did you mean '{fields[0]}'" in message


@each_part
def test_a_part_comes_back_from_its_file_and_from_nothing_else(role, kind, tmp_path):
    part = drawn(role, kind)
    part.metadata = {"recipe": {"lr": 0.1}}
    save_part(tmp_path / "part", part)
    loaded = load_part(tmp_path / "part", role)
    assert type(loaded) is type(part)
    assert (describe(loaded), loaded.shape, loaded.max_degree) == (describe(part), SHAPE, MAX_DEGREE)
    assert (loaded.metadata, loaded.training) == (part.metadata, False)
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in loaded.state_dict().items())
    save_part(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "part").read_bytes()
    for other in set(KINDS) - {role}:
        assert f"holds {role}, not a {other}" in refusal(load_part, tmp_path / "part", other)


@pytest.mark.parametrize("role", KINDS)
def test_a_name_that_is_no_part_is_refused(role):
    known = KINDS[role][0]
    assert f"unknown {role} '{known}x' (did you mean '{known}'?)" in refusal(make_part, role, f"{known}x")
    assert "cannot be imported" in refusal(make_part, role, "no.such.module:Part")
    for wrong in ("mypackage.parts:Narrowing", "mypackage.parts:Absent", *(OUTSIDE[r] for r in KINDS if r != role)):
        assert f"is no {role}: give a subclass" in refusal(make_part, role, wrong)


# --- compressors ------------------------------------------------------------------------------------------------------


@each_compressor
@torch.no_grad()
def test_degree_0_is_the_plain_model_and_every_degree_repeats_itself(kind, images):
    model, part = build(), drawn("compressor", kind)
    start = make_part("compressor", kind, SHAPE, MAX_DEGREE).eval()
    assert torch.equal(CompressedViT(model, start)(images), model(images))
    vit = CompressedViT(model, part)
    assert torch.equal(vit(images), model(images)) != part.adapts
    seen = [vit.set_degree(degree)(images) for degree in (0, MAX_DEGREE)]
    assert not torch.equal(*seen)
    assert torch.equal(vit(images), seen[1])
    assert torch.equal(vit.set_degree(0)(images), seen[0])


@each_compressor
@torch.no_grad()
def test_an_image_gets_the_same_logits_in_any_batch(kind, images):
    vit = CompressedViT(build(), drawn("compressor", kind), MAX_DEGREE)
    alone = torch.cat([vit(image[None]) for image in images])
    torch.testing.assert_close(vit(images), alone, rtol=1e-4, atol=1e-4)


@each_compressor
def test_what_it_saves_does_not_rise_with_the_degree_and_ends_below_that_of_degree_0(kind):
    vit = CompressedViT(build(), drawn("compressor", kind))
    highest = vit.compressor.highest(vit.compressor.options, PATCHES)
    costs = [cost(vit.set_degree(degree)) for degree in range(highest + 1)]
    assert all(after <= before for before, after in pairwise(costs))
    assert costs[-1] < costs[0]


@each_compressor
@torch.no_grad()
def test_tokens_leave_the_blocks_as_its_attributes_say(kind, images):
    compressor = drawn("compressor", kind)
    vit = CompressedViT(build(), compressor, MAX_DEGREE)
    tokens, _ = vit.forward_features(images)
    assert tokens.shape[1] == vit.tokens()[-1]
    assert (tokens.shape[1] == 17) == compressor.restores
    without = build(class_token=False, global_pool="avg")
    if compressor.needs_class_token:
        assert "no class token" in refusal(CompressedViT, without, compressor)
    else:
        assert CompressedViT(without, compressor, MAX_DEGREE)(images).isfinite().all()
    head = make_head("linear", 16, 3)
    if compressor.restores:
        assert Segmenter(vit, head)(images).shape == (3, 3, 32, 32)
    else:
        assert "takes patches away that a segmentation head needs" in refusal(Segmenter, vit, head)


@each_compressor
def test_a_malformed_degree_is_refused(kind):
    vit = CompressedViT(build(), drawn("compressor", kind))
    assert "degree -1 is out of range" in refusal(vit.set_degree, -1)
    assert "2 blocks" in refusal(vit.set_degree, [1])
    assert vit.degree == 0


# --- methods: a compressor and a tuning -------------------------------------------------------------------------------


def options_of(kind):
    """Return options under which a tuning adds little to a small model."""
    return {"rank": 2} if "rank" in part_class("tuning", kind).Options.model_fields else {}


@pytest.mark.parametrize(
    ("compressor", "tuning"),
    [(kind, DEFAULTS["tuning"]) for kind in VISUAL["compressor"]]
    + [(DEFAULTS["compressor"], kind) for kind in VISUAL["tuning"]]
    + [(OUTSIDE["compressor"], OUTSIDE["tuning"])],
)
@torch.no_grad()
def test_a_tuned_model_starts_as_it_was_and_comes_back_from_its_checkpoint(compressor, tuning, images, tmp_path):
    model, tuned = build(), drawn("tuning", tuning, **options_of(tuning))
    before = model(images)
    tuned.prepare(model)
    assert torch.equal(model.eval()(images), before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert bool(trained) == tuned.trains_anything
    for parameter in trained:
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    changed = model(images)
    assert torch.equal(changed, before) != tuned.trains_anything
    tuned.finish(model)
    torch.testing.assert_close(model(images), changed, rtol=1e-4, atol=1e-4)
    vit = CompressedViT(model, drawn("compressor", compressor), MAX_DEGREE)
    about = {"tuning": describe(tuned), "compressor": describe(vit.compressor), "max_degree": MAX_DEGREE}
    save_model(tmp_path / "m", model, ARCHITECTURE, KWARGS, {"compressor": vit.compressor}, **about)
    loaded, about = load_model(tmp_path / "m")
    again = compress(loaded, about, about["compressor"], MAX_DEGREE)
    assert torch.equal(again(images), vit(images))


@each_tuning
def test_only_what_is_to_be_trained_changes_in_training(kind, backbone, digits, tmp_path):
    job = {"tuning": {"kind": kind} | options_of(kind)} | given(kind, backbone, digits, tmp_path)
    path, about = tune(backbone, digits, tmp_path / "x", "2", **job)
    weights, original = load_tensors(path)[0], load_tensors(backbone)[0]
    model = build(num_classes=10)
    drawn("tuning", kind, **options_of(kind)).prepare(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if part_class("tuning", kind).trains_anything:
        assert all(torch.equal(weights[name], original[name]) for name in frozen & original.keys())
        assert weights["head.weight"].any()  # it starts at zero
        assert about["best_epoch"] > 0
    else:
        elsewhere = load_tensors(job["fine_tuned"])[0]
        assert all(torch.equal(value, elsewhere[name]) for name, value in weights.items())


def given(kind, backbone, digits, tmp_path):
    """Return what a tuning that trains nothing needs: a model that was fine-tuned before."""
    if part_class("tuning", kind).trains_anything:
        return {}
    return {"fine_tuned": str(tune(backbone, digits, tmp_path / "elsewhere", "2")[0])}


@pytest.mark.parametrize(
    ("compressor", "tuning", "degree"),
    [(kind, DEFAULTS["tuning"], "fixed") for kind in VISUAL["compressor"]]
    + [(DEFAULTS["compressor"], kind, degree) for kind in VISUAL["tuning"] for degree in ("fixed", "random")]
    + [(OUTSIDE["compressor"], OUTSIDE["tuning"], "random")],
)
def test_a_killed_fine_tuning_resumes_to_the_same_bytes(compressor, tuning, degree, backbone, digits, tmp_path):
    if not part_class("tuning", tuning).trains_anything:
        pytest.skip("it trains nothing")
    learned = None
    if part_class("compressor", compressor).learns(None):
        learned = tmp_path / "learned"
        save_part(learned, drawn("compressor", compressor))
    spec = {"kind": tuning, "degree": degree} | options_of(tuning)
    label = "2" if degree == "fixed" else degree

    def run(name):
        return lambda: tune(backbone, digits, tmp_path / name, label, 0, learned, compressor=compressor, tuning=spec)

    assert steps_of(run("whole")) == 8
    steps_of(run("killed"), kill_at=6)
    assert not (tmp_path / "killed").exists()
    assert steps_of(run("killed")) == 3
    file = f"train-{label}_seed-0.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} - {"learned"} == {"killed", "whole"}


def test_cells_of_parts_from_elsewhere_are_those_of_the_trained_model(backbone, digits, tmp_path):
    for role in ("compressor", "compensator"):
        save_part(tmp_path / role, drawn(role, OUTSIDE[role]))
    parts = {"compressor": OUTSIDE["compressor"], "tuning": OUTSIDE["tuning"]}
    path, _ = tune(backbone, digits, tmp_path / "x", "2", learned=tmp_path / "compressor", **parts)
    methods = {"gate": {"infer_degrees": [0, 4]}, "bias": {"infer_degrees": [4], "compensated": True, "scales": [1]}}
    job = EvaluateJob(methods=methods, settings={"device": "cpu"})
    cells = evaluate(job, [path], digits, {"bias": tmp_path / "compensator"}, tmp_path / "cells")
    assert [(c["compressor"], c["compensator"], c["scale"]) for c in cells] == [
        ("Gate", "none", 0), ("Gate", "none", 0), ("Gate", "Bias", 0.5)]  # fmt: skip
    model, about = load_model(path)
    vit = compress(model, about, about["compressor"], 2).attach(load_part(tmp_path / "compensator", "compensator"))
    images = torch.from_numpy(load_arrays(digits)[0]["test_images"])
    with torch.no_grad():
        expected = vit.set_degree(4)(normalise(images, model)).argmax(-1)
    assert load_arrays(tmp_path / "cells")[0]["predictions"][2].tolist() == expected.tolist()


# --- compensators, and whatever else is learned on a backbone ---------------------------------------------------------


@each_compensator
@torch.no_grad()
def test_folding_changes_the_logits_and_detaching_gives_every_weight_back(kind, images, tmp_path):
    part, model = drawn("compensator", kind), build()
    before = state_of(model)
    vit = CompressedViT(model, degree=1)
    plain = {degree: vit.set_degree(degree)(images) for degree in range(MAX_DEGREE + 1)}
    vit.set_degree(1).attach(part)
    for degree in (3, 1, 0, 4):
        assert torch.equal(vit.set_degree(degree)(images), plain[degree]) == (degree == 1)
        if degree != 1:
            assert "detach it before saving" in refusal(save_model, tmp_path / "m", model, ARCHITECTURE, KWARGS)
    assert "out of range" in refusal(vit.set_degree, MAX_DEGREE + 1)
    assert vit.degree == 4
    vit.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(vit(images), plain[4])
    save_model(tmp_path / "m", model, ARCHITECTURE, KWARGS)


@each_compensator
@torch.no_grad()
def test_a_loaded_compensator_gives_the_logits_of_the_saved_one_and_costs_nothing(kind, images, tmp_path):
    part = drawn("compensator", kind)
    save_part(tmp_path / "part", part)
    logits, costs = [], [gflops(CompressedViT(build(), degree=3))]
    for compensator in (part, load_part(tmp_path / "part", "compensator")):
        vit = CompressedViT(build()).attach(compensator).set_degree(3)
        logits.append(vit(images))
        costs.append(gflops(vit))
    assert torch.equal(*logits)
    assert len(set(costs)) == 1


@each_compensator
@torch.no_grad()
def test_beside_the_weights_it_does_what_it_does_folded_in(kind, images):
    part = drawn("compensator", kind)
    teacher, student = CompressedViT(build()), CompressedViT(build())
    objective = part.objective(teacher, student, False).eval()
    for source, target in ((0, 4), (3, 1)):
        objective.set((source, target))
        folded = CompressedViT(build(), degree=source).attach(part).set_degree(target)
        results = objective.changed(images)
        logits = results[1] if isinstance(results, tuple) else results
        torch.testing.assert_close(logits, folded(images), rtol=1e-4, atol=1e-4)
        assert (teacher.degree, student.degree) == (source, target)
        assert torch.equal(teacher(images), CompressedViT(build(), degree=source)(images))


@each_compensator
def test_one_that_was_learned_for_another_model_or_compressor_is_refused(kind):
    vit, part = CompressedViT(build()), drawn("compensator", kind)
    part.compressor = {"kind": "another"}
    assert "was learned for" in refusal(vit.attach, part)
    part.compressor = describe(vit.compressor)
    vit.attach(part)
    assert "fits a backbone of 2 blocks" in refusal(CompressedViT(build(depth=3)).attach, part)


LEARNED = [("compensator", kind) for kind in VISUAL["compensator"]] + [("compressor", OUTSIDE["compressor"])]
LEARNED += [
    ("compressor", kind)
    for kind in VISUAL["compressor"]
    if kind in PARTS["compressor"] and part_class("compressor", kind).learns(None)
]


@pytest.mark.parametrize(("role", "kind"), LEARNED)
def test_a_killed_learning_resumes_to_the_same_bytes(role, kind, backbone, tmp_path):
    job = {"compensator": kind} if role == "compensator" else {"compressor": kind, "compensator": None}

    def run(name):
        return lambda: teach(backbone, tmp_path / name, {"batch_size": 16}, **job)

    assert steps_of(run("whole")) == 8
    steps_of(run("killed"), kill_at=6)
    assert not (tmp_path / "killed").exists()
    assert steps_of(run("killed")) == 3
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.stem for path in tmp_path.iterdir()} == {"killed", "whole"}
    loaded = load_part(tmp_path / "whole", role)
    assert loaded.max_degree == MAX_DEGREE
    assert any(parameter.any() for parameter in loaded.parameters())


@each_part
def test_what_learns_nothing_says_so(role, kind):
    part = drawn(role, kind)
    if role == "tuning" or not part.learns(part.options):
        assert "nothing to learn" in refusal(part.objective, None, None, False)
