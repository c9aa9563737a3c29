"""Segmentation from training to cells: it learns, repeats, resumes, and every figure is that of its own predictions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from tests.small import ARCHITECTURE, KWARGS, build, refusal, steps_of, teach, tune
from tocom.analysis.scores import Counts, miou
from tocom.data.pixels import Split, load
from tocom.data.registry import prepare
from tocom.files import load_arrays, load_tensors
from tocom.jobs import EvaluateJob
from tocom.models import compress, load_model, save_model
from tocom.parts import load_part
from tocom.stages.evaluate import evaluate
from tocom.tasks import load_task
from tocom.tasks.segment import Segmenter, make_head, pixel_loss, scored, segment
from tocom.training import normalise
from tocom.vit import CompressedViT

#: 64 patches, so that degree 16 merges 32 of them.
PATCHES = {"patch_size": 4}
DEGREES = (0, 8, 16)
CPU = torch.device("cpu")
VIEWS = {"min_scale": 0.8, "max_scale": 1.25}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_model(path, build(**PATCHES), ARCHITECTURE, KWARGS | PATCHES)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scenes.safetensors"
    prepare("scenes", path, {"train": 48, "val": 16, "test": 24}, 32)
    return path


@pytest.fixture(scope="module")
def compensator(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("compensator") / "tome_mlp.safetensors"
    teach(backbone, path, {"lr": 0.02, "batch_size": 16}, max_degree=16, compressor="tome_mlp")
    return path


def train(backbone, data, folder, label="0", seed=0, **settings):
    job = {"compressor": "tome_mlp", "task_kind": "segment", "max_degree": 16, "settings": VIEWS | settings}
    return tune(backbone, data, folder, label, seed, **job)


@pytest.fixture(scope="module")
def checkpoints(backbone, scenes, tmp_path_factory):
    """One trained segmenter for each of two seeds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [train(backbone, scenes, folder, seed=seed)[0] for seed in (0, 1)]


def restored(checkpoint, data, degree=0):
    """Return the segmenter of a checkpoint."""
    model, about = load_model(checkpoint)
    return load_task(data, CPU).restore(compress(model, about, about["compressor"], degree), about).eval()


def test_scores_are_those_of_the_backbone_and_the_head_by_hand(backbone):
    model, _ = load_model(backbone)
    segmenter = Segmenter(CompressedViT(model, "tome_mlp"), make_head("linear", 16, 7))
    torch.manual_seed(0)
    torch.nn.init.normal_(segmenter.decoder.weight)
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)[:, 1:]
    weight, bias = segmenter.decoder.weight[:, :, 0, 0], segmenter.decoder.bias
    grid = (tokens @ weight.T + bias).view(2, 8, 8, 7).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(segmenter.eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_averages_before_its_last_norm_gets_normalised_tokens(make_vit, images):
    vit = CompressedViT(make_vit(class_token=False, global_pool="avg"), "tome_mlp")
    seen = []
    head = torch.nn.Identity()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    Segmenter(vit, head)(images)
    tokens = vit.model.fc_norm(vit.model.forward_features(images))
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), tokens)


def test_the_loss_counts_labelled_pixels_only_and_is_zero_without_any():
    scores, labels = torch.randn(2, 4, 5, 5), torch.randint(0, 4, (2, 5, 5))
    labels[0, 2] = 255
    wanted = labels != 255
    expected = F.cross_entropy(scores.permute(0, 2, 3, 1)[wanted], labels[wanted])
    torch.testing.assert_close(pixel_loss(scores, labels, 255), expected)
    assert pixel_loss(scores, torch.full_like(labels, 255), 255) == 0


def test_training_lowers_the_loss_and_beats_a_model_that_sees_ground_everywhere(backbone, tmp_path):
    prepare("scenes", tmp_path / "data", {"train": 96, "val": 32, "test": 1}, 32)
    path, about = train(backbone, tmp_path / "data", tmp_path / "x", epochs=8, lr=5e-3)
    split = load(tmp_path / "data").splits["val"]
    blind = 100 * np.mean(split.labels[split.labels != 255] == 0) / 7
    assert about["val_score"] > 1.3 * blind
    counts, _ = segment(restored(path, tmp_path / "data"), split, 10)
    assert float(miou(counts)) == pytest.approx(about["val_score"])


def test_the_same_seed_gives_the_same_bytes_whoever_loads_and_another_does_not(checkpoints, backbone, scenes, tmp_path):
    job = {"compressor": "tome_mlp", "task_kind": "segment", "max_degree": 16, "settings": VIEWS}
    path, _ = tune(backbone, scenes, tmp_path / "a", "0", workers=1, **job)
    assert checkpoints[0].read_bytes() == path.read_bytes() != checkpoints[1].read_bytes()


@pytest.mark.parametrize(("label", "head"), [("0", "conv"), ("16", "linear")])
def test_a_killed_run_resumes_to_the_same_bytes(backbone, scenes, tmp_path, label, head):
    whole, about = train(backbone, scenes, tmp_path / "whole", label, head=head, precision="bf16", ema=0.9)
    assert about["recipe"]["precision"] == "bf16"
    steps_of(lambda: train(backbone, scenes, tmp_path / "x", label, head=head, precision="bf16", ema=0.9), kill_at=5)
    assert steps_of(lambda: train(backbone, scenes, tmp_path / "x", label, head=head, precision="bf16", ema=0.9)) == 2
    assert (tmp_path / "x" / whole.name).read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "x"]


def run(checkpoints, data, compensator, output, scales=(0, 0.5, 1), degrees=DEGREES):
    methods = {"tome_mlp": {"infer_degrees": degrees}, "tocom": {"infer_degrees": degrees, "compensated": True}}
    job = EvaluateJob(methods=methods, settings={"scales": scales, "batch_size": 20, "device": "cpu"})
    cells = evaluate(job, checkpoints, data, {"tocom": compensator}, output)
    return cells, load_arrays(output)[0]


def test_a_cell_is_what_torchmetrics_makes_of_the_same_predictions(checkpoints, scenes, compensator, tmp_path):
    cells, arrays = run(checkpoints, scenes, compensator, tmp_path / "p")
    split = load(scenes).splits["test"]
    assert [(c["seed"], c["compensated"], c["infer_degree"]) for c in cells] == [
        (seed, added, degree) for seed in (0, 1) for added in (False, True) for degree in DEGREES
    ]
    assert load_arrays(tmp_path / "p")[1]["metric"] == "mIoU"
    assert (arrays["tp"].shape, arrays["tp"].dtype) == ((12, 24, 7), np.int32)
    labelled = [np.bincount(image[image != 255], minlength=7) for image in split.labels]
    assert np.array_equal(arrays["tp"] + arrays["fn"], [labelled] * 12)
    costs = [cell["gflops"] for cell in cells]
    assert costs[0] > costs[1] > costs[2]
    assert costs == costs[:3] * 4
    for number, cell in enumerate(cells):
        segmenter = restored(checkpoints[cell["seed"]], scenes)
        if cell["scale"]:
            segmenter.vit.attach(load_part(compensator, "compensator"), cell["scale"])
        segmenter.vit.set_degree(cell["infer_degree"])
        with torch.inference_mode():
            scores = segmenter(normalise(torch.from_numpy(split.images), segmenter.vit.model))
        metric = MulticlassJaccardIndex(7, average="macro", ignore_index=255)
        expected = 100 * float(metric(scores.argmax(1), torch.from_numpy(split.labels)))
        got = float(miou(Counts(*(arrays[part][number] for part in ("tp", "fp", "fn")))))
        assert got == pytest.approx(expected, abs=0.2)  # batches round differently, and a pixel may flip


def test_compression_changes_predictions_and_a_compensator_can_decline(checkpoints, scenes, compensator, tmp_path):
    _, changed = run(checkpoints[:1], scenes, compensator, tmp_path / "a", scales=(0, 1))
    assert not np.array_equal(changed["tp"][0], changed["tp"][2])
    cells, declined = run(checkpoints[:1], scenes, compensator, tmp_path / "b", scales=(0,))
    assert [cell["scale"] for cell in cells] == [0] * 6
    assert np.array_equal(declined["tp"][:3], declined["tp"][3:])


def test_the_cross_entropy_does_not_depend_on_the_size_of_batches(checkpoints, scenes):
    segmenter, split = restored(checkpoints[0], scenes), load(scenes).splits["val"]
    (_, one), (_, all_at_once) = segment(segmenter, split, 1), segment(segmenter, split, 16)
    assert one == pytest.approx(all_at_once, rel=1e-6)


def test_validation_gives_a_score_and_a_loss_and_what_each_image_adds_to_them(checkpoints, scenes):
    counts, losses = segment(restored(checkpoints[0], scenes), load(scenes).splits["val"], 8)
    labelled = (counts.tp + counts.fn).sum(axis=-1)
    found = scored(counts, losses)
    assert found.score == miou(counts)
    assert found.loss == pytest.approx(-losses.sum() / labelled.sum())
    for name, figure in (("score", found.score), ("loss", found.loss)):
        assert found.by_image[name].mean() == pytest.approx(figure)
    # An image that counts a little more moves a figure by its value less the mean, over the number of images.
    for image, step in ((0, 1e-4), (11, 1e-4)):
        weights = np.ones(16)
        weights[image] += step
        moved = -(weights @ losses) / (weights @ labelled)
        expected = found.by_image["loss"][image] - found.loss
        assert 16 * (moved - found.loss) / step == pytest.approx(expected, rel=1e-3)
    nothing = Counts(*(np.zeros_like(part) for part in counts))
    assert [*scored(nothing, np.zeros(16)).by_image["loss"]] == [0] * 16


def test_images_of_another_size_resize_the_position_embedding_or_are_refused(backbone, tmp_path):
    for side in (48, 30):
        prepare("scenes", tmp_path / f"{side}", {"train": 16, "val": 2, "test": 2}, side)
    path, _ = train(backbone, tmp_path / "48", tmp_path / "x", epochs=1)
    assert restored(path, tmp_path / "48")(torch.zeros(1, 3, 48, 48)).shape == (1, 7, 48, 48)
    assert load_tensors(path)[1]["kwargs"]["img_size"] == 48
    weights, before = load_tensors(path)[0], load_tensors(backbone)[0]
    assert not [n for n in weights if n.startswith("blocks") and torch.equal(weights[n], before[n])]
    message = refusal(train, backbone, tmp_path / "30", tmp_path / "y")
    assert "image size 30 is no multiple of the 4-pixel patches" in message


def test_what_does_not_belong_together_is_refused(backbone, checkpoints, scenes, compensator, tmp_path):
    model, _ = load_model(backbone)
    with torch.no_grad():
        model.cls_token += 1
    save_model(tmp_path / "other", model, ARCHITECTURE, KWARGS | PATCHES)
    path, _ = train(tmp_path / "other", scenes, tmp_path / "x", epochs=1)
    assert "trained from another backbone than" in refusal(run, [path], scenes, compensator, tmp_path / "y")
    assert "was fine-tuned for None" in refusal(run, [backbone], scenes, compensator, tmp_path / "y")
    assert not (tmp_path / "y").exists()
    model, about = load_model(checkpoints[0])
    del about["beside"]["decoder"]
    task = load_task(scenes, CPU)
    assert "has no head for the 7 classes" in refusal(task.restore, CompressedViT(model, "tome_mlp"), about)
    job = {"compressor": "tome", "task_kind": "segment"}
    assert "takes patches away" in refusal(tune, backbone, scenes, tmp_path / "y", **job)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line_whoever_loads_it(checkpoints, scenes, tmp_path, workers):
    (tmp_path / "x.png").write_bytes(b"no image")
    split = Split((tmp_path / "x.png",), (tmp_path / "x.png",), 32, 7)
    message = refusal(segment, restored(checkpoints[0], scenes), split, 1, workers=workers)
    assert message.startswith(f"{tmp_path / 'x.png'} ")
