"""What is exported computes what the model computes, for any size of a batch, and what does not is not kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small import build, refusal
from tocom import CompressedViT, Server, exports, load_part
from tocom.exports import export
from tocom.methods import PARTS
from tocom.parts import part_class

onnxruntime = pytest.importorskip("onnxruntime")


def program(path):
    """Return a function that runs an exported file, and what the file says of itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        said = session.get_modelmeta().custom_metadata_map["tocom.about"]
        return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0]), json.loads(said)
    said = {"tocom.about": ""}
    run = torch.export.load(path, extra_files=said).module()
    return run, json.loads(said["tocom.about"])


@pytest.mark.parametrize(
    ("suffix", "compressor", "degree", "compensated"),
    [
        (".onnx", "tome", 0, False),
        (".onnx", "tome", 4, True),
        (".pt2", "tome", 0, False),
        (".pt2", "tome", 4, True),
        (".pt2", "tome", (0, 5), False),
        (".pt2", "evit", 3, False),
    ],
)
@torch.no_grad()
def test_every_degree_gives_the_logits_of_the_model_for_any_size_of_a_batch(
    suffix, compressor, degree, compensated, backbone, compensator, tmp_path
):
    vit = CompressedViT(build(), compressor).eval()
    plain = vit.set_degree(degree)(vit.example(2))
    part = load_part(compensator, "compensator")
    if compensated:
        vit.set_degree(0).attach(part, 20.0).set_degree(degree)  # the update is small after two epochs
        assert not torch.allclose(vit(vit.example(2)), plain, atol=1e-3)
    path = tmp_path / f"vit{suffix}"
    found = export(vit, path)
    run, said = program(path)
    for size in (1, 4, 9):
        images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(run(images), vit(images), rtol=0, atol=1e-5 * float(vit(images).abs().max()))
    assert found.largest <= 1e-5 * found.logit
    assert said["degree"] == (list(degree) if isinstance(degree, tuple) else degree)
    assert (said["compressor"]["kind"], said["scale"]) == (compressor, 20.0 if compensated else 0.0)
    assert (said["compensator"] is not None) == compensated
    assert said["input"]["mean"] == list(vit.model.pretrained_cfg["mean"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in PARTS["compressor"] if "images" in part_class("compressor", k).reads])
@torch.no_grad()
def test_every_compressor_for_images_is_exported_for_any_size_of_a_batch(kind, tmp_path):
    vit = CompressedViT(build(), kind, max_degree=8).eval().set_degree(4)
    assert export(vit, tmp_path / "vit.pt2").relative < 1e-5


@torch.no_grad()
def test_one_size_of_a_batch_can_be_asked_for(tmp_path):
    vit = CompressedViT(build(depth=1), degree=3).eval()
    export(vit, tmp_path / "vit.pt2", batch_size=2)
    run, _ = program(tmp_path / "vit.pt2")
    torch.testing.assert_close(run(vit.example(2)), vit(vit.example(2)))
    with pytest.raises(Exception, match="2"):
        run(vit.example(3))


def test_what_differs_from_the_model_is_not_kept_and_what_was_there_stays(tmp_path, monkeypatch):
    vit, path = CompressedViT(build(depth=1)).eval(), tmp_path / "vit.pt2"
    traced = exports._program(vit, 2)
    monkeypatch.setattr(exports, "_program", lambda model, batch_size: traced)  # it takes long, and is tested above
    path.write_text("what was there")
    write, read = exports._WRITERS[".pt2"]
    for wrong in (lambda logits: logits + 0.01, lambda logits: logits * torch.nan):
        monkeypatch.setitem(exports._WRITERS, ".pt2", (write, lambda path, w=wrong: lambda batch: w(read(path)(batch))))
        assert "is not kept" in refusal(export, vit, path, 2)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setitem(exports._WRITERS, ".pt2", (write, lambda path: lambda batch: read(path)(batch) + 0.01))
    assert export(vit, path, 2, tolerance=1.0).largest == pytest.approx(0.01, rel=1e-3)


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, monkeypatch):
    vit = CompressedViT(build(), degree=3).eval()
    assert "ends in '.pth'" in refusal(export, vit, tmp_path / "vit.pth")
    assert "in eval mode" in refusal(export, CompressedViT(build()).train(), tmp_path / "vit.pt2")
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name == "onnxscript" else name)
    message = refusal(export, vit, tmp_path / "vit.onnx")
    assert message == "ONNX needs onnxscript; pip install onnx onnxscript onnxruntime"

    def fail(*args, **kwargs):
        raise RuntimeError("data-dependent shape\nand much more")

    monkeypatch.setattr(torch.export, "export", fail)
    assert "cannot be exported (data-dependent shape); name the one size" in refusal(export, vit, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_server_does_not_say_what_is_folded_into_it_and_is_refused(make_vit, make_compensator, tmp_path):
    vit = CompressedViT(make_vit()).eval().attach(make_compensator())
    assert "folded into this model of a server" in refusal(export, Server(vit).at(4), tmp_path / "vit.pt2")


@pytest.mark.parametrize("name", ["vit.pt2", "vit.onnx"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name, tmp_path):
    """In a process of its own, which a writer might end."""
    program = (
        "import resource, sys; from tests.small import build; from tocom import CompressedViT, TocomError, export\n"
        "vit = CompressedViT(build(), degree=3).eval()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: export(vit, sys.argv[1])\n"
        "except TocomError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / name)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "free some space" in done.stdout
    assert not list(tmp_path.iterdir())
