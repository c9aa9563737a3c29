"""ToCom on a language model: what it adds to which weights, beside them and folded in, and that it learns."""

import pytest
import torch
from torch.nn import functional as F

from tests.small import refusal, teach
from tests.small_lm import KWARGS, build_lm, tokens
from tocom import CompressedLM, CompressedViT, load_part, make_part, save_model, save_part
from tocom.methods.tocom_lm import MODULES

LORC = {"kind": "lorc"}


@torch.no_grad()
def drawn(max_degree=15, **options):
    part = make_part("compensator", {"kind": "tocom_lm"} | options, CompressedLM(build_lm(), LORC).shape, max_degree)
    generator = torch.Generator().manual_seed(2)
    for parameter in part.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return part.double().eval()


def test_from_one_degree_to_the_same_and_fresh_it_changes_no_bit():
    model = build_lm()
    plain = CompressedLM(model, LORC, degree=4)
    fresh = make_part("compensator", "tocom_lm", plain.shape, 15)
    expected = {degree: plain.set_degree(degree)(tokens()) for degree in (0, 4, 12)}
    lm = CompressedLM(model, LORC, degree=4).attach(fresh)
    assert all(torch.equal(lm.set_degree(degree)(tokens()), logits) for degree, logits in expected.items())
    lm.attach(drawn())
    assert [torch.equal(lm.set_degree(degree)(tokens()), expected[degree]) for degree in (0, 4, 12)] == [0, 1, 0]
    before = {name: value.clone() for name, value in lm.detach().model.state_dict().items()}
    lm.attach(drawn()).set_degree(9)
    lm.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_changes_are_sums_over_steps_of_products_of_the_named_layers():
    part = drawn()
    deltas, back = part.deltas(3, 6), part.deltas(6, 3)
    assert len(deltas) == 2 * len(MODULES)
    for name, module in MODULES.items():
        for block in range(2):
            key = f"model.layers.{block}.{module}.weight"
            expected = sum(part.up[name][block, 0, step] @ part.down[name][block, 0, step] for step in (3, 4, 5))
            torch.testing.assert_close(deltas[key], expected)
            torch.testing.assert_close(back[key], -expected)
    some = drawn(layers=["o", "q"])
    assert {key.split(".")[-2] for key in some.deltas(0, 1)} == {"q_proj", "o_proj"}


@pytest.mark.parametrize("compressor", ["lorc", "beacon"])
@torch.no_grad()
def test_beside_the_weights_it_does_what_it_does_folded_in(compressor):
    part, text = drawn(4), tokens(2, 80)
    teacher, student = (CompressedLM(build_lm(), compressor) for _ in range(2))
    objective = part.objective(teacher, student, False).eval()
    for source, target in ((0, 3), (4, 1), (2, 2)):
        objective.set((source, target))
        folded = CompressedLM(build_lm(), compressor, degree=source).attach(part).set_degree(target)
        torch.testing.assert_close(objective.changed(text), folded(text))
        expected = CompressedLM(build_lm(), compressor, degree=source)(text)
        assert torch.equal(teacher(text), expected)
        kl = F.kl_div(folded(text).log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
        assert objective(text).item() == pytest.approx(kl.sum(-1).mean().item(), rel=1e-4, abs=1e-6)


def test_it_learns_on_text_and_comes_back_from_its_file(tmp_path):
    save_model(tmp_path / "lm", build_lm().float(), "llama", KWARGS)
    settings = {"lr": 2e-3, "images": 96, "batch_size": 8, "epochs": 3}
    about = teach(tmp_path / "lm", tmp_path / "part", settings, compressor=LORC, compensator="tocom_lm", max_degree=12)
    assert about["held_out_kl"] < 0.9 * about["held_out_kl_without"]
    part = load_part(tmp_path / "part", "compensator")
    save_part(tmp_path / "again", part)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "part").read_bytes()
    lm = CompressedLM(build_lm().float(), LORC).attach(part)
    assert not torch.equal(lm.set_degree(12)(tokens()), lm.detach()(tokens()))
    assert "was learned for" in refusal(CompressedLM(build_lm(), "beacon").attach, part)


def test_another_family_of_models_refuses_it(make_vit):
    assert "is for models that read text, not images" in refusal(CompressedViT(make_vit()).attach, drawn())
    assert "fits a backbone of 2 blocks" in refusal(CompressedLM(build_lm(num_hidden_layers=3), LORC).attach, drawn())
    wide = CompressedLM(build_lm(intermediate_size=32), LORC)
    assert "has shape" in refusal(wide.set_degree(0).attach, drawn())
    part = make_part("compensator", "tocom", wide.shape, 4)
    assert "is for models that read images, not text" in refusal(wide.attach, part)
