"""Language models: the forward pass is that of transformers, and every part for text keeps the contract's promises."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

import tocom
from tests.small import build, refusal
from tests.small_lm import KWARGS, build_lm, shake, tokens
from tocom import CompressedLM, CompressedViT, gflops, load_model, save_model
from tocom.compressed import cost
from tocom.methods import PARTS
from tocom.models import compress, create
from tocom.parts import describe, part_class

ROOT = Path(__file__).parents[1]
#: Compressors for text, of which PLAIN is any.
KINDS = [kind for kind in PARTS["compressor"] if "text" in part_class("compressor", kind).reads]
PLAIN = KINDS[0]
each_compressor = pytest.mark.parametrize("kind", KINDS)
#: Models of transformers that are supported: class -> further options of its config.
MODELS = {
    "Llama": {},
    "Llama, attention and MLP biases": {"attention_bias": True, "mlp_bias": True},
    "Llama, RoPE of Llama 3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "Llama, wide heads": {"head_dim": 12},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
}


def of_transformers(name, **options):
    """Build a small model of transformers in float64."""
    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(**KWARGS | MODELS[name] | options)
    return shake(getattr(transformers, f"{family}ForCausalLM")(config)).double()


def highest(lm):
    return lm.compressor.highest(lm.compressor.options, 0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_degree_0_is_the_forward_pass_of_transformers(name, kv_heads):
    model = of_transformers(name, num_key_value_heads=kv_heads)
    found = CompressedLM(model, PLAIN)(tokens())
    torch.testing.assert_close(found, model(tokens()).logits, rtol=0, atol=1e-10)
    assert found.std() > 0.1


@each_compressor
@torch.no_grad()
def test_degree_0_is_the_plain_model_and_every_degree_repeats_itself(kind):
    model = build_lm()
    lm = CompressedLM(model, kind)
    assert torch.equal(lm(tokens()), CompressedLM(model, PLAIN)(tokens()))
    seen = [lm.set_degree(degree)(tokens()) for degree in range(highest(lm) + 1)]
    for before, after in pairwise(seen):
        assert not torch.equal(before[:, -1], after[:, -1])
    assert torch.equal(lm(tokens()), seen[-1])
    assert torch.equal(lm.set_degree(0)(tokens()), seen[0])


@each_compressor
@pytest.mark.parametrize("changed", [0, 5, 33, 63, 79])
@torch.no_grad()
def test_what_comes_later_changes_nothing_before(kind, changed):
    lm, before = CompressedLM(build_lm(), kind), tokens(length=80)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % 257
    for degree in range(highest(lm) + 1):
        logits = [lm.set_degree(degree)(each) for each in (before, after)]
        torch.testing.assert_close(logits[0][:, :changed], logits[1][:, :changed], rtol=0, atol=1e-12)
        assert not torch.equal(logits[0][:, -1], logits[1][:, -1])


@each_compressor
@torch.no_grad()
def test_a_text_gets_the_same_logits_in_any_batch(kind):
    lm, batch = CompressedLM(build_lm(), kind), tokens(3, 80)
    lm.set_degree(highest(lm))
    torch.testing.assert_close(lm(batch), torch.cat([lm(text[None]) for text in batch]))


@each_compressor
@torch.no_grad()
def test_the_cache_shrinks_with_the_degree_from_what_all_keys_and_values_take(kind):
    lm = CompressedLM(build_lm(), kind)
    costs = [lm.set_degree(degree).cache_bytes() for degree in range(highest(lm) + 1)]
    assert costs[0] == 2 * 2 * 256 * 16 * 8  # keys and values, layers, tokens, width of keys, bytes of float64
    assert all(after < before for before, after in pairwise(costs))
    assert lm.set_degree(0).cache_bytes(64) == costs[0] / 4
    assert gflops(lm) > 0
    assert CompressedViT(build()).cache_bytes() is None


@each_compressor
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_compressor_saves_is_the_cache(kind, dtype):
    lm = CompressedLM(build_lm().to(dtype), kind)
    assert lm.compressor.saves == "bytes of keys and values"
    for degree in (0, highest(lm)):
        assert cost(lm.set_degree(degree)) == lm.cache_bytes() == lm.cache_bytes(256)
    assert lm.set_degree(0).cache_bytes() == 2 * 2 * 256 * 16 * dtype.itemsize


@each_compressor
@torch.no_grad()
def test_a_changed_model_comes_back_from_its_checkpoint_with_the_compressor_of_the_pre_trained_one(kind, tmp_path):
    lm = CompressedLM(build_lm().float(), kind)
    degree = highest(lm) // 2
    of_pretrained = lm.set_degree(degree)(tokens())
    for parameter in lm.model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    changed = lm(tokens())
    assert not torch.equal(changed, of_pretrained)
    about = {"compressor": describe(lm.compressor)}
    save_model(tmp_path / "m", lm.model, "llama", KWARGS, {"compressor": lm.compressor}, **about)
    loaded, about = load_model(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    again = compress(loaded, about, about["compressor"], degree)
    assert torch.equal(again(tokens()), changed)
    save_model(
        tmp_path / "n", loaded, "llama", KWARGS, {"compressor": again.compressor}, compressor=about["compressor"]
    )
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


@each_compressor
def test_every_weight_gets_a_gradient(kind):
    lm = CompressedLM(build_lm(), kind)
    lm.set_degree(highest(lm))(tokens(length=80)).square().mean().backward()
    missing = [name for name, parameter in lm.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not missing


def test_what_is_not_supported_is_refused_in_one_line():
    message = refusal(CompressedLM, build_lm(), "tome")
    assert "is for models that read images" in message
    assert "LlamaForCausalLM reads text" in message
    assert "is for models that read text" in refusal(CompressedViT, build(), "beacon")
    assert "VisionTransformer is not supported" in refusal(CompressedLM, build(), PLAIN)
    assert "sliding window" in refusal(CompressedLM, of_transformers("Mistral", sliding_window=8), PLAIN)
    assert "no option 'hidden_sise' (did you mean 'hidden_size'?)" in refusal(create, "llama", {"hidden_sise": 16})
    assert "no stochastic depth" in refusal(create, "llama", KWARGS | {"drop_path_rate": 0.1})
    assert "could not build 'llama'" in refusal(create, "llama", KWARGS | {"hidden_size": "wide"})
    lm = CompressedLM(build_lm(), PLAIN)
    assert "out of range" in refusal(lm.set_degree, highest(lm) + 1)
    assert "degree -1 is out of range" in refusal(lm.set_degree, -1)
    assert lm.degree == 0


@pytest.mark.parametrize("page", ["lorc", "beacon"])
def test_the_lines_of_a_page_run_as_they_stand_on_a_model_of_a_user(page, capsys):
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    model = of_transformers("Llama", max_position_embeddings=2048, vocab_size=61, bos_token_id=1, eos_token_id=2)
    scope = {"tocom": tocom, "hf_model": model, "tokens": tokens(1, 1030, 61)}
    exec(code, scope)
    assert scope["logits"].shape == (1, 1030, 61)
    assert not torch.equal(scope["logits"], model(scope["tokens"]).logits)
    assert capsys.readouterr().out in ("524288 1048576\n", "")


def test_nothing_but_a_language_model_imports_transformers():
    code = "import sys, tocom.stages.finetune, tocom.stages.learn; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"
