"""On a GPU every part does what it does on a CPU, and every stage gives the same bytes twice (`make gpu`)."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.small import QUICK, build, teach, tune
from tests.small_lm import build_lm, tokens
from tocom import CompressedLM, CompressedViT, make_part
from tocom.files import load_arrays, load_tensors
from tocom.jobs import AdaptJob, EvaluateJob, ThroughputJob
from tocom.methods import PARTS
from tocom.parts import Shape, part_class
from tocom.stages.adapt import adapt
from tocom.stages.evaluate import evaluate
from tocom.stages.throughput import throughput

pytestmark = pytest.mark.gpu
SHAPE = Shape(2, 16, 2, 17, 1, 16, 16, 32)
GPU = {"device": "cuda"}
READS = {kind: part_class("compressor", kind).reads for kind in PARTS["compressor"]}
COMPENSATORS = [kind for kind in PARTS["compensator"] if "images" in part_class("compensator", kind).reads]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


def both(model, part, inputs, degree):
    """Return the logits, and the gradients of a loss, of a model on either device, in double precision."""
    found = []
    for device in ("cpu", "cuda"):
        wrapped = CompressedLM if inputs.dtype == torch.long else CompressedViT
        compressed = wrapped(deepcopy(model).to(device), deepcopy(part).to(device), degree).train()
        logits = compressed(inputs.to(device))
        logits.square().mean().backward()
        gradients = {n: p.grad.cpu() for n, p in compressed.named_parameters() if p.grad is not None}
        found.append((logits.detach().cpu(), gradients))
    return found


def check(first, second, atol=1e-8):
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=atol)
    assert first[1].keys() == second[1].keys()
    assert first[1]
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-5, atol=10 * atol, msg=name)


@pytest.mark.parametrize("degree", [0, 2, 4])
@pytest.mark.parametrize("kind", [kind for kind, reads in READS.items() if "images" in reads])
def test_logits_and_gradients_are_those_of_the_cpu(kind, degree):
    part = make_part("compressor", kind, SHAPE, 4).double()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check(*both(build().double(), part, images, degree))


@pytest.mark.parametrize("degree", [0, 2, 4])
@pytest.mark.parametrize("kind", [kind for kind, reads in READS.items() if "text" in reads])
def test_those_of_a_language_model_too(kind, degree):
    model = build_lm()
    part = make_part("compressor", kind, CompressedLM(model, kind).compressor.shape, 4).double()
    check(*both(model, part, tokens(), degree), atol=1e-4)  # transformers rotates in float32


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [kind for kind in PARTS["tuning"] if kind != "none"])
def test_every_tuning_gives_the_same_bytes_twice(kind, precision, backbone, digits, tmp_path):
    job = {"tuning": kind, "settings": GPU | {"precision": precision}}
    files = [tune(backbone, digits, tmp_path / name, "2", **job)[0] for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(tensor.isfinite().all() for tensor in load_tensors(files[0])[0].values() if tensor.is_floating_point())


@pytest.mark.parametrize("kind", COMPENSATORS)
def test_every_stage_gives_the_same_twice_and_the_gpus_cells_are_those_of_the_cpu(kind, backbone, digits, tmp_path):
    checkpoint, _ = tune(backbone, digits, tmp_path / "tuned", settings=GPU | {"epochs": 4})
    for name in ("first", "again"):
        teach(backbone, tmp_path / name, GPU, compensator=kind)
        settings = QUICK | GPU | {"pairs": 4}
        job = AdaptJob.model_validate({"compensator": kind, "max_degree": 4, "settings": settings})
        adapt(job, checkpoint, digits, tmp_path / "adapted" / name, tmp_path / "first")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    adapted = [tmp_path / "adapted" / name / checkpoint.name for name in ("first", "again")]
    assert adapted[0].read_bytes() == adapted[1].read_bytes()
    methods = {"plain": {"infer_degrees": (0, 2, 4)}, "ours": {"infer_degrees": (0, 2, 4), "compensated": True}}
    predicted = {}
    for device in ("cpu", "cuda"):
        job = EvaluateJob.model_validate({"methods": methods, "settings": {"device": device, "scales": (0, 0.5, 1)}})
        evaluate(job, checkpoint, digits, {"ours": tmp_path / "first"}, tmp_path / device)
        predicted[device] = load_arrays(tmp_path / device)[0]["predictions"]
    assert np.mean(predicted["cpu"] == predicted["cuda"]) > 0.98  # rounding decides some ties


def test_throughput_counts_the_memory_of_the_device(backbone):
    settings = GPU | {"batch_size": 8, "repeats": 3}
    job = ThroughputJob.model_validate({"methods": {"tome": False}, "degrees": (0, 4), "settings": settings})
    rows = throughput(job, backbone, {})
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()}
    assert all(row["memory_mb"] > 0 for row in rows)
