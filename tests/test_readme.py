"""The README promises only what is there."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import tocom
from tocom.parts import Shape

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page):
    import click
    import typer

    from tocom.cli import app

    group = typer.main.get_command(app)
    for words in re.findall(
        r"\btocom ((?:analyse )?[a-z-]+)\b", " ".join(re.findall(r"`[^`]+`|^    .*$", page.read_text(), re.M))
    ):
        command = group
        for word in words.split():
            command = command.get_command(click.Context(command), word)
            assert command is not None, words


def test_the_five_lines_on_a_timm_model_run_as_they_stand(tmp_path, monkeypatch):
    import timm

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    real = timm.create_model
    small = {"embed_dim": 24, "num_heads": 2, "depth": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: real(name, **small))  # nothing is downloaded
    monkeypatch.chdir(tmp_path)
    part = tocom.make_part("compensator", "tocom", Shape(2, 24, 2, 197, 1), max_degree=16)
    tocom.save_part("tocom_deit_b.safetensors", part)
    scope = {"images": torch.zeros(1, 3, 224, 224)}
    exec(code, scope)
    assert scope["logits"].shape == (1, 1000)
    assert scope["vit"].tokens() == (181, 165)


@torch.no_grad()
def test_the_python_of_the_page_on_serving_runs_as_it_stands(tmp_path, monkeypatch):
    from tocom.bundled import resolve
    from tocom.models import load_model

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(resolve("glyph_vit"), "model.safetensors")
    model, about = load_model("model.safetensors")
    part = tocom.make_part("compensator", "tocom", Shape.of(model), max_degree=14)
    part.up.normal_(std=0.01)
    part.metadata = {"backbone": "glyph_vit", "backbone_sha256": about["sha256"]}
    tocom.save_part("compensator.safetensors", part)
    scope = {"images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)}
    for block in blocks:
        exec(block, scope)
    assert scope["logits"].shape == (4, 41)
    assert scope["degree"] in (0, 6, 10, 14)
    assert scope["difference"].relative < 1e-4
    assert Path("model.pt2").stat().st_size > 1e6
    assert torch.equal(scope["part"].up, part.up)


def test_every_public_name_can_be_imported_and_says_what_it_is():
    for name in tocom.__all__:
        assert name.startswith("__") or getattr(tocom, name).__doc__
