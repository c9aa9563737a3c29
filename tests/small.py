"""What tests share: a backbone and recipes that train in a second, random tokens, checks of compensators."""

from copy import deepcopy

import pytest
import torch

from tocom import distributed, training
from tocom.jobs import FinetuneJob, LearnJob
from tocom.models import create
from tocom.parts import Tokens
from tocom.stages.finetune import finetune
from tocom.stages.learn import learn
from tocom.study import Checkpoint
from tocom.vit import CompressedViT

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 41}
QUICK = {"epochs": 2, "batch_size": 16, "lr": 2e-3, "device": "cpu"}
LEARN = {"epochs": 2, "images": 64, "held_out": 32, "pairs": 4, "batch_size": 32, "device": "cpu"}


@torch.no_grad()
def build(**overrides):
    """Build the small backbone with weights large enough that its logits depend on the image."""
    torch.manual_seed(0)
    model = create(ARCHITECTURE, KWARGS | overrides)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.mul_(25)
    return model.eval()


def tune(backbone, data, folder, label="0", seed=0, learned=None, workers=0, settings=None, **job):
    """Fine-tune one model; return its checkpoint and what is stored with it."""
    job = {"checkpoints": ((label, seed),), "max_degree": 4, "settings": QUICK | (settings or {})} | job
    (about,) = finetune(FinetuneJob(**job), backbone, data, folder, learned, workers)
    return folder / Checkpoint(label, seed).file, about


def teach(backbone, output, settings=None, **job):
    """Learn a part; return what is stored with it."""
    return learn(LearnJob(**{"max_degree": 4, "settings": LEARN | (settings or {})} | job), backbone, output)


def steps_of(run, kill_at=None):
    """Count the training steps of something, of which each leaves a state; raise in the middle of one if told so."""
    done = 0

    def count(parameters):
        nonlocal done
        done += 1
        if done == kill_at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        patch.setattr(distributed, "sum_gradients", count)  # with one process there is nothing to sum
        if kill_at is None:
            run()
        else:
            with pytest.raises(KeyboardInterrupt):
                run()
    return done


def refusal(function, *arguments, **settings):
    """Return the one line with which something is refused."""
    from tocom.errors import TocomError

    with pytest.raises(TocomError) as caught:
        function(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def squeeze(compressor, x, size, count, attention, prefix):
    """Return what a compressor makes of tokens [B, N, D] and sizes [B, N, 1]: tokens and sizes."""
    tokens = compressor.compress(Tokens(x, size, count, 0, prefix), attention)
    return tokens.x, tokens.size


def groups(k, count, prefix):
    """Which tokens of one image ToMe joins, as loops: keys [heads, N, C] -> the group of every token, a set."""
    metric = k.mean(dim=0)
    n_tokens = len(metric)
    odd = [i for i in range(1, n_tokens, 2) if i >= prefix]
    best = []
    for a in (i for i in range(0, n_tokens, 2) if i >= prefix):
        cosines = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in odd]
        best.append((max(cosines), a, odd[cosines.index(max(cosines))]))
    group = {i: {i} for i in range(n_tokens)}
    for _, a, b in sorted(best, reverse=True)[:count]:
        group[b] |= group.pop(a)
    return [next(g for g in group.values() if token in g) for token in range(n_tokens)]


def draw_tokens(n_tokens, seed, batch=2, heads=2, dim=5):
    """Return random tokens [B, N, D], sizes [B, N, 1] and keys [B, heads, N, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_tokens, dim, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (batch, n_tokens, 1), generator=generator).double()
    k = torch.randn(batch, heads, n_tokens, 3, generator=generator, dtype=torch.float64)
    return x, size, k


def beside(model, compensator, m, n, whole=False):
    """Return a copy of a model at degree n, and its logits with the change from m, as while that is learned."""
    student = CompressedViT(deepcopy(model))
    objective = compensator.objective(CompressedViT(deepcopy(model)), student, whole)
    objective.train(compensator.training).set((m, n))

    def logits(images):
        results = objective.changed(images)
        return results[1] if isinstance(results, tuple) else results

    return student, logits


@torch.no_grad()
def check_beside_is_folded(model, compensator, images, m, n, whole, folded):
    """Assert that a change beside the weights is the change folded in, to absolute tolerances."""
    _, run = beside(model, compensator, m, n)
    logits = run(images)
    compensator.between(m, n, whole=True)
    torch.testing.assert_close(run(images), logits, rtol=0, atol=whole)
    plain = CompressedViT(model, degree=n)(images)
    assert torch.allclose(logits, plain, rtol=1e-3) == (m == n)
    vit = CompressedViT(model, degree=m).attach(compensator).set_degree(n)
    torch.testing.assert_close(vit(images), logits, rtol=0, atol=folded)


@torch.no_grad()
def check_half_precision(make_vit, compensator, images, dtype):
    """Assert that half precision agrees with float32, folded and beside the weights."""
    model, compensator, images = make_vit().float(), compensator.float(), images.float()
    plain = CompressedViT(model, degree=4)(images)
    exact = CompressedViT(make_vit().float()).attach(compensator).set_degree(4)(images)
    student, run = beside(model, compensator, 0, 4)
    with torch.autocast("cpu", dtype):
        results = [run(images)]
    student.to(dtype)
    results.append(run(images.to(dtype)))
    results.append(CompressedViT(make_vit().to(dtype)).attach(compensator).set_degree(4)(images.to(dtype)))
    for logits in results:
        assert logits.dtype == dtype
        assert (logits - exact).norm() < 0.1 * (plain - exact).norm()
