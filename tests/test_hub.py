"""Learned parts as repositories: a folder holds all of a part, one line brings it back, a card says what it is."""

import json
import re

import huggingface_hub
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.small import refusal, tune
from tocom import Compensator, load_part, make_part
from tocom.cli import app
from tocom.files import load_metadata
from tocom.hub import CARD, CONFIG, WEIGHTS
from tocom.jobs import EvaluateJob
from tocom.methods.tocom import ToCom
from tocom.methods.widecom import WideCom
from tocom.parts import Shape
from tocom.stages.evaluate import evaluate

COMMIT = "a" * 40  # what the stand-in for the Hub calls main


@pytest.fixture
def part(compensator):
    return load_part(compensator, "compensator")


@pytest.fixture
def published(part, hub, tmp_path):
    """The part in a repository of the Hub, of which the layout is in a folder."""
    part.save_pretrained(tmp_path / "folder", "mit")
    hub.files |= {(COMMIT, path.name): path for path in (tmp_path / "folder").iterdir()}
    return hub


def same(a, b):
    return type(a) is type(b) and a.metadata == b.metadata and a.compressor == b.compressor and all(
        torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()
    )  # fmt: skip


def test_a_folder_holds_all_of_a_part(part, compensator, tmp_path):
    part.save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert (tmp_path / "folder" / WEIGHTS).read_bytes() == compensator.read_bytes()
    assert json.loads((tmp_path / "folder" / CONFIG).read_text()) == load_metadata(compensator)
    for loaded in (load_part(tmp_path / "folder", "compensator"), Compensator.from_pretrained(tmp_path / "folder")):
        assert same(loaded, part)


def test_the_card_says_what_it_is_and_how_to_load_it(part, tmp_path):
    part.save_pretrained(tmp_path, "cc-by-nc-4.0", "someone/some-part")
    text, about = (tmp_path / CARD).read_text(), part.metadata
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["library_name"]) == ("cc-by-nc-4.0", "tocom")
    assert {"compensator", "token-compression", "vision-transformer"} == set(head["tags"])
    assert "base_model" not in head  # the backbone is no published one
    for fact in (
        about["backbone"],
        about["backbone_sha256"],
        "0 to 4",
        f"{about['held_out_kl_without']:.4f} nats without, {about['held_out_kl']:.4f} with it",
        json.dumps(about["recipe"]),
        json.dumps(part.compressor),
        "[arXiv 2408.06798](https://arxiv.org/abs/2408.06798)",
        load_metadata(tmp_path / WEIGHTS)["sha256"],
    ):
        assert fact in text, fact
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert 'tocom.load_part("someone/some-part", "compensator")' in code


def test_the_card_names_the_published_backbone_and_leaves_out_what_is_not_known(tmp_path):
    part = make_part("compensator", "tocom", Shape(2, 16, 2, 17, 1), 4)
    part.save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "held-out" not in text
    assert "recipe" not in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    part.metadata = {"backbone": "deit_base_patch16_224.fb_in1k"}
    part.save_pretrained(tmp_path)
    head = yaml.safe_load((tmp_path / CARD).read_text().split("---")[1])
    assert head["base_model"] == "timm/deit_base_patch16_224.fb_in1k"


def test_one_line_brings_a_part_from_the_hub(part, published):
    assert same(load_part("someone/part", "compensator"), part)
    assert same(ToCom.from_pretrained("someone/part@main"), part)
    assert {(repository, name) for _, repository, _, name in published.asked} == {("someone/part", WEIGHTS)}
    assert "holds a ToCom, not a WideCom" in refusal(WideCom.from_pretrained, "someone/part")


def test_models_are_evaluated_and_timed_with_a_part_from_the_hub_or_a_folder(
    part, published, backbone, digits, compensator, tmp_path
):
    checkpoint, _ = tune(backbone, digits, tmp_path / "models")
    job = {"methods": {"tocom": {"infer_degrees": [0, 4], "compensated": True}}, "settings": {"device": "cpu"}}
    cells, sums = [], []
    for number, place in enumerate((compensator, "someone/part", tmp_path / "folder")):
        output = tmp_path / f"{number}.safetensors"
        cells.append(evaluate(EvaluateJob(**job), checkpoint, digits, {"tocom": place}, output))
        sums.append(load_metadata(output)["made"]["inputs"][-1]["role"])
    assert cells[0] == cells[1] == cells[2]
    assert sums == ["compensator"] * 3
    timed = {"methods": {"tome": False, "tocom": True}, "degrees": [4], "settings": {"device": "cpu", "repeats": 1}}
    command = ["throughput", json.dumps(timed), "--backbone", str(backbone), "--compensator", "tocom=someone/part"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "throughput.csv")], catch_exceptions=False)
    assert result.exit_code == 0
    assert WEIGHTS in (tmp_path / "throughput.sha256").read_text()


def test_what_is_not_on_the_hub_is_refused_and_files_are_not_looked_for_there(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "cannot be fetched from the Hub" in refusal(load_part, "someone/part@nosuchbranch", "compensator")
    asked = len(published.asked)
    for absent in ("learned/part.safetensors", "part", "a/b/c", "./part/x", tmp_path / "part"):
        assert "no such file" in refusal(load_part, absent, "compensator")
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "part").write_text("a file of that name")
    assert "corrupt" in refusal(load_part, "someone/part", "compensator")
    assert len(published.asked) == asked


def test_a_repository_cannot_have_code_of_its_own_run(hub, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.chdir(tmp_path)
    part = make_part("compensator", "tocom", Shape(2, 16, 2, 17, 1), 4)
    part.kind = "evil:Part"
    part.save_pretrained(tmp_path / "folder")
    hub.files[COMMIT, WEIGHTS] = tmp_path / "folder" / WEIGHTS
    assert "asks for 'evil:Part', which is not this package's" in refusal(load_part, "someone/evil", "compensator")


def test_a_part_is_uploaded_with_its_card_as_one_commit(part, compensator, monkeypatch):
    done = []

    class Api:
        def create_repo(self, repository, private, exist_ok):
            done.append(("create", repository, private, exist_ok))
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            done.append(("upload", repo_id, files))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert part.push_to_hub("someone/part", "apache-2.0", private=True) == "https://hub/someone/part"
    (created, uploaded) = done
    assert created == ("create", "someone/part", True, True)
    assert uploaded[:2] == ("upload", "someone/part")
    assert set(uploaded[2]) == {WEIGHTS, CONFIG, CARD}
    assert uploaded[2][WEIGHTS] == compensator.read_bytes()
    assert b'tocom.load_part("someone/part", "compensator")' in uploaded[2][CARD]

    def fail(self, *args, **kwargs):
        raise OSError("401 Client Error\nand more")

    monkeypatch.setattr(Api, "create_repo", fail)
    assert "cannot be uploaded (401 Client Error)" in refusal(part.push_to_hub, "someone/part")
    for wrong in ("part", "a/b/c", "someone/part@main", "../part"):
        assert "no repository of the Hub" in refusal(part.push_to_hub, wrong)
    assert "no licence" in refusal(part.push_to_hub, "someone/part", "my own\nlicence")
