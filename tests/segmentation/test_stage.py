"""Segmenters from training to cells: they learn, repeat, resume, and every figure is that of their own predictions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from tests.segmentation.conftest import DEGREES, EVALUATE, QUICK, SEEDS
from tests.small import ARCHITECTURE, KWARGS, build
from tocom.compensator import Compensator
from tocom.data.loading import feed
from tocom.errors import TocomError
from tocom.files import load_arrays, load_tensors
from tocom.models import load_model, save_model
from tocom.segmentation.data import Split, TrainViews, load, prepare
from tocom.segmentation.metrics import Counts, miou
from tocom.segmentation.model import Segmenter, make_head, pixel_loss
from tocom.segmentation.model import build as build_segmenter
from tocom.segmentation.model import load as load_segmenter
from tocom.segmentation.settings import SegmentationSizes
from tocom.segmentation.stage import evaluate, segment, train, validated
from tocom.settings import EvaluateSettings
from tocom.stages.evaluate import choose_scale
from tocom.training import normalise, resume_path
from tocom.vit import CompressedViT


def test_scores_are_those_of_the_backbone_and_the_head_by_hand(backbone):
    segmenter, _ = build_segmenter(backbone, 7, 32, "linear", "tome_mlp", 0)
    torch.manual_seed(0)
    torch.nn.init.normal_(segmenter.head.weight)
    images = torch.randn(2, 3, 32, 32)
    model, _ = load_model(backbone)
    tokens = model.forward_features(images)[:, 1:]
    grid = (tokens @ segmenter.head.weight[:, :, 0, 0].T + segmenter.head.bias).view(2, 8, 8, 7).permute(0, 3, 1, 2)
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


def test_images_of_another_size_resize_the_position_embedding(backbone):
    segmenter, about = build_segmenter(backbone, 7, 48, "conv", "tome_mlp", 8)
    assert segmenter(torch.zeros(1, 3, 48, 48)).shape == (1, 7, 48, 48)
    assert about["kwargs"]["img_size"] == 48
    assert about["backbone_sha256"] == load_model(backbone)[1]["sha256"]


def test_the_loss_counts_labelled_pixels_only_and_is_zero_without_any():
    scores, labels = torch.randn(2, 4, 5, 5), torch.randint(0, 4, (2, 5, 5))
    labels[0, 2] = 255
    wanted = labels != 255
    expected = F.cross_entropy(scores.permute(0, 2, 3, 1)[wanted], labels[wanted])
    torch.testing.assert_close(pixel_loss(scores, labels, 255), expected)
    assert pixel_loss(scores, torch.full_like(labels, 255), 255) == 0


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_a_compressor_that_takes_patches_away_is_refused(make_vit, name):
    with pytest.raises(TocomError, match="takes patches away that a segmentation head needs; use tome_mlp"):
        Segmenter(CompressedViT(make_vit(), name), make_head("linear", 24, 3))


def test_training_lowers_the_loss_and_beats_a_model_that_sees_ground_everywhere(backbone, tmp_path):
    prepare("scenes", tmp_path / "data", 32, SegmentationSizes(train=96, val=32, test=1))
    settings = QUICK.model_copy(update={"epochs": 8, "lr": 5e-3})
    about = train(backbone, tmp_path / "data", tmp_path / "x", settings=settings)
    split = load(tmp_path / "data").splits["val"]
    labels = split.labels[split.labels != 255]
    blind = 100 * np.mean(labels == 0) / 7
    assert about["val_miou"] > 1.3 * blind
    counts, _ = segment(load_segmenter(tmp_path / "x")[0], split, 10)
    assert float(miou(counts)) == pytest.approx(about["val_miou"])


def test_the_same_seed_gives_the_same_bytes_whoever_loads_and_another_does_not(checkpoints, backbone, scenes, tmp_path):
    train(backbone, scenes, tmp_path / "a", settings=QUICK.model_copy(update={"workers": 1}))
    assert checkpoints[0].read_bytes() == (tmp_path / "a").read_bytes()
    assert checkpoints[0].read_bytes() != checkpoints[1].read_bytes()


def test_the_same_weights_run_in_another_way_do_not_resume_the_state(backbone, scenes, tmp_path, monkeypatch):
    model, meta = load_model(backbone)
    kwargs = meta["kwargs"] | {"pretrained_cfg_overlay": {"mean": [0.3, 0.3, 0.3]}}
    save_model(tmp_path / "b", model, meta["architecture"], kwargs)
    settings = QUICK.model_copy(update={"epochs": 1})
    monkeypatch.setattr("tocom.segmentation.stage.forget", lambda output: None)  # as if killed before it was removed
    train(backbone, scenes, tmp_path / "x", settings=settings)
    monkeypatch.undo()
    train(tmp_path / "b", scenes, tmp_path / "x", settings=settings)
    train(tmp_path / "b", scenes, tmp_path / "clean", settings=settings)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()


def test_compiling_and_autocast_are_heeded(backbone, scenes, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("tocom.segmentation.stage.compiled", lambda module, settings: seen.append(settings) or module)
    settings = QUICK.model_copy(update={"precision": "bf16", "compile": "eager", "epochs": 1})
    train(backbone, scenes, tmp_path / "x", settings=settings)
    assert [s.compile for s in seen] == ["eager"]
    assert load_tensors(tmp_path / "x")[1]["recipe"]["precision"] == "bf16"


@pytest.mark.parametrize("degree", [0, 16])
def test_a_killed_run_resumes_to_the_same_weights(backbone, scenes, tmp_path, monkeypatch, degree):
    settings = QUICK.model_copy(update={"head": "conv", "epochs": 3})
    train(backbone, scenes, tmp_path / "whole", degree, settings=settings)
    calls = 0

    def stop_in_the_second_epoch(*args):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return pixel_loss(*args)

    monkeypatch.setattr("tocom.segmentation.stage.pixel_loss", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(backbone, scenes, tmp_path / "resumed", degree, settings=settings)
    assert not (tmp_path / "resumed").exists()
    assert resume_path(tmp_path / "resumed").exists()
    calls = -5  # two epochs of three steps are left, and would not be done within these if it started again
    train(backbone, scenes, tmp_path / "resumed", degree, settings=settings)
    assert calls == 1
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not resume_path(tmp_path / "resumed").exists()


def test_every_cell_is_there_with_and_without_tocom(evaluated, scenes):
    for seed, path in zip(SEEDS, evaluated[1], strict=True):
        arrays, meta = load_arrays(path)
        assert meta["seed"] == seed
        cells = [(c["infer_degree"], c["compensated"], c["compensator"]) for c in meta["cells"]]
        assert cells == [(d, c, "tocom" if c else "none") for c in (False, True) for d in DEGREES]
        assert arrays["tp"].shape == (6, 24, 7)
        assert arrays["tp"].dtype == np.int32
        labels = load(scenes).splits["test"].labels
        labelled = [np.bincount(image[image != 255], minlength=7) for image in labels]
        assert np.array_equal(arrays["tp"] + arrays["fn"], [labelled] * 6)
        gflops = [c["gflops"] for c in meta["cells"]]
        assert gflops[:3] == gflops[3:]
        assert gflops[0] > gflops[1] > gflops[2]
        assert meta["cells"][3]["scale"] == 0  # nothing to compensate at the train degree


def test_a_cell_is_what_torchmetrics_makes_of_the_same_predictions(evaluated, checkpoints, scenes, compensator):
    arrays, meta = load_arrays(evaluated[1][0])
    split = load(scenes).splits["test"]
    for number, cell in enumerate(meta["cells"]):
        segmenter, _ = load_segmenter(checkpoints[0])
        if cell["scale"]:
            segmenter.vit.attach(Compensator.load(compensator))
            segmenter.vit.set_degree(cell["infer_degree"], cell["scale"])
        segmenter.vit.set_degree(cell["infer_degree"])
        with torch.inference_mode():
            scores = segmenter(normalise(torch.from_numpy(split.images), segmenter.vit.model))
        metric = MulticlassJaccardIndex(7, average="macro", ignore_index=255)
        expected = 100 * float(metric(scores.argmax(1), torch.from_numpy(split.labels)))
        got = float(miou(Counts(*(arrays[part][number] for part in ("tp", "fp", "fn")))))
        assert got == pytest.approx(expected, abs=0.2)  # batches round differently, and a pixel may flip


def test_compression_changes_predictions_and_tocom_changes_them_again(checkpoints, scenes, compensator):
    segmenter, _ = load_segmenter(checkpoints[0])
    split = load(scenes).splits["test"]
    plain, _ = segment(segmenter, split, 24)
    segmenter.vit.set_degree(16)
    merged, merged_loss = segment(segmenter, split, 24)
    segmenter.vit.set_degree(0).attach(Compensator.load(compensator)).set_degree(16)
    _, ours_loss = segment(segmenter, split, 24)
    assert not np.array_equal(plain.tp, merged.tp)
    assert merged_loss != ours_loss


def test_the_scale_is_the_best_on_the_validation_images_and_ties_go_to_the_smaller(
    checkpoints, scenes, compensator, monkeypatch
):
    segmenter, _ = load_segmenter(checkpoints[0])
    val = load(scenes).splits["val"]
    segmenter.vit.attach(Compensator.load(compensator)).set_degree(16)
    seen = []
    figures = {0.0: 30, 0.5: 40, 1.0: 40}

    def fake(model, split, *_):
        assert split is val
        seen.append(model.vit.scale)
        return Counts(np.array([[figures[model.vit.scale]]]), np.array([[60]]), np.array([[0]])), 1.0

    monkeypatch.setattr("tocom.segmentation.stage.segment", fake)

    def scale(candidates, settings):
        return choose_scale(segmenter.vit, candidates, lambda: validated(segmenter, val, 24, "fp32"), settings)

    assert scale([1.0, 0.0, 0.5], EVALUATE) == 0.5
    assert seen == [0.0, 0.5, 1.0]
    by_loss = EVALUATE.model_copy(update={"select_by": "loss"})
    assert scale([1.0, 0.5], by_loss) == 0.5


def test_the_cross_entropy_does_not_depend_on_the_size_of_batches(checkpoints, scenes):
    segmenter, _ = load_segmenter(checkpoints[0])
    split = load(scenes).splits["val"]
    (_, one), (_, all_at_once) = segment(segmenter, split, 1), segment(segmenter, split, 16)
    assert one == pytest.approx(all_at_once, rel=1e-6)


def test_a_step_on_ade20k_from_its_files_trains_every_weight(ade20k, backbone, tmp_path):
    prepare("ade20k", tmp_path / "data", 32, SegmentationSizes(val=2), ade20k)
    settings = QUICK.model_copy(update={"epochs": 1, "batch_size": 4, "min_scale": 0.5, "max_scale": 2.0})
    about = train(backbone, tmp_path / "data", tmp_path / "x", settings=settings)
    assert about["classes"] == 150
    weights, _ = load_tensors(tmp_path / "x")
    before, _ = build_segmenter(backbone, 150, 32, "linear", "tome_mlp", 0)
    unchanged = [n for n, value in before.state_dict().items() if torch.equal(value, weights[n])]
    assert set(unchanged) <= {"vit.model.patch_embed.proj.bias"}
    counts, loss = segment(load_segmenter(tmp_path / "x")[0], load(tmp_path / "data").splits["test"], 2)
    assert counts.tp.shape == (3, 150)
    assert 0 < loss < 20


def test_files_and_decoded_scenes_feed_tensors_of_the_same_kind(ade20k, scenes, tmp_path):
    prepare("ade20k", tmp_path / "data", 32, SegmentationSizes(val=2), ade20k)
    for path in (tmp_path / "data", scenes):
        views = TrainViews(load(path).splits["train"], QUICK, 0)
        images, labels = next(feed(views, 0)(0, [torch.arange(3)]))
        assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.uint8)
        assert (labels.shape, labels.dtype) == ((3, 32, 32), torch.int64)


def other_backbone(tmp_path):
    kwargs = KWARGS | {"patch_size": 4}
    model = build(patch_size=4)
    with torch.no_grad():
        model.cls_token += 1
    save_model(tmp_path / "other", model, ARCHITECTURE, kwargs)
    return tmp_path / "other"


def test_a_compensator_of_another_backbone_is_refused(scenes, compensator, tmp_path):
    settings = QUICK.model_copy(update={"epochs": 1})
    train(other_backbone(tmp_path), scenes, tmp_path / "x", settings=settings)
    with pytest.raises(TocomError, match="trained from another backbone than this compensator"):
        evaluate([tmp_path / "x"], scenes, compensator, [tmp_path / "y"], [0, 8], EVALUATE)
    assert not (tmp_path / "y").exists()


def test_a_checkpoint_of_another_task_is_refused(checkpoints, ade20k, compensator, tmp_path):
    prepare("ade20k", tmp_path / "data", 32, SegmentationSizes(val=2), ade20k)
    with pytest.raises(TocomError, match=r"trained for another task \(scenes, not ade20k\)"):
        evaluate(checkpoints[:1], tmp_path / "data", compensator, [tmp_path / "y"], [0, 8], EVALUATE)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line_whoever_loads_it(checkpoints, tmp_path, workers):
    (tmp_path / "x.png").write_bytes(b"no image")
    split = Split((tmp_path / "x.png",), (tmp_path / "x.png",), 32, 7)
    with pytest.raises(TocomError, match=f"^{tmp_path / 'x.png'} ") as caught:
        segment(load_segmenter(checkpoints[0])[0], split, 1, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_size_that_patches_do_not_divide_is_refused(backbone, tmp_path):
    prepare("scenes", tmp_path / "data", 30, SegmentationSizes(train=4, val=2, test=2))
    with pytest.raises(TocomError, match="images of 30 pixels do not divide into patches of 4"):
        train(backbone, tmp_path / "data", tmp_path / "x", settings=QUICK)


def test_a_classifier_is_no_segmenter(backbone):
    with pytest.raises(TocomError, match="holds model, not a segmenter"):
        load_segmenter(backbone)


def test_declining_copies_the_plain_cell(checkpoints, scenes, compensator, tmp_path):
    settings = EvaluateSettings(scales=(0,), batch_size=20, device="cpu")
    evaluate(checkpoints[:1], scenes, compensator, [tmp_path / "y"], [8], settings)
    arrays, meta = load_arrays(tmp_path / "y")
    assert [cell["scale"] for cell in meta["cells"]] == [0, 0]
    assert np.array_equal(arrays["tp"][0], arrays["tp"][1])
