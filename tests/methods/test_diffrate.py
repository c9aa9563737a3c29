"""DiffRate: budgets, gradients, schedules that are given, and the forward pass written as loops."""

import json

import pytest
import torch
from torch.nn import functional as F

from tests.small import build, refusal
from tocom import CompressedViT, gflops, load_part, make_part, save_part
from tocom.degrees import Inflected
from tocom.methods.diffrate import Choice, Costs, Kept, Removal, Search, ordered, spent, within
from tocom.parts import Shape

DEPTH, TOKENS, HIGHEST = 4, 17, 4
SHAPE = Shape(DEPTH, 16, 2, TOKENS, 1)
GIVEN = {"3": {"prune_kept_num": [17, 14, 11, 6], "merge_kept_num": [17, 12, 8, 6]}}
#: Prunes and merges, only prunes, only merges, and ends with the class token and one patch.
SCHEDULE = [Kept(15, 12), Kept(9, 9), Kept(9, 6), Kept(3, 2)]


def model(**overrides):
    return build(depth=DEPTH, **overrides)


@torch.no_grad()
def drawn(seed=0, scale=0.3, **options):
    """Return a DiffRate with schedules as learning might leave them."""
    part = make_part("compressor", {"kind": "diffrate"} | options, SHAPE, HIGHEST).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return part


def certain(kept, prefix=1, tokens=TOKENS):
    """Return the choice of one number without a doubt."""
    logits = torch.full((tokens - prefix,), -1e4, dtype=torch.float64)
    logits[kept - prefix - 1] = 0
    return Choice.of(logits, prefix)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"reg_tokens": 3}, {"mlp_ratio": 2.0}, {"num_heads": 4}])
def test_costs_are_those_that_are_counted(overrides):
    vit = model(**overrides)
    shape = Shape.of(vit)
    part = make_part("compressor", "diffrate", shape, HIGHEST)
    part.objective(CompressedViT(vit), CompressedViT(vit, part), False)  # looks at the layers
    plain = gflops(CompressedViT(vit))
    for degree in range(9):
        here, there = CompressedViT(vit, part, degree), CompressedViT(vit, "tome", degree)
        whole = part.costs.merging(0)
        assert gflops(here) - plain == pytest.approx((part.costs.schedule(part.schedule(degree)) - whole) / 1e9)
        assert gflops(there) - plain == pytest.approx((part.costs.merging(degree) - whole) / 1e9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0, 0.1, 1])
def test_every_degree_costs_its_budget_but_for_one_token_in_one_block(seed, scale):
    part = drawn(seed, scale)
    costs = part.costs
    token = (
        costs.attention + costs.mlp + 4 * TOKENS * SHAPE.dim
    )  # what one more costs a block, attention and ranking too
    for degree in range(1, 6):  # beyond, a fixed first block costs too much by itself
        budget, cost = costs.merging(degree), costs.schedule(part.schedule(degree))
        assert budget - token <= cost <= budget
        assert part.schedule(degree)[0] == Kept(TOKENS, TOKENS)


def test_a_budget_that_cannot_be_met_is_missed_by_as_little_as_can_be():
    part = drawn(fixed_blocks=2)
    assert part.schedule(8) == [Kept(17, 17), Kept(17, 17), Kept(2, 2), Kept(2, 2)]
    assert part.costs.schedule(part.schedule(8)) > part.costs.merging(8)


def test_two_blocks_at_least_remove():
    assert [drawn(fixed_blocks=n).fixed for n in (0, 1, 2, 3, 9)] == [0, 1, 2, 2, 2]


def test_a_schedule_within_its_budget_stays_and_another_moves_towards_all_or_none():
    costs = Costs(SHAPE, 4 * 16**2, 8 * 16**2)
    start = ordered([Kept(17, 17), Kept(14, 12), Kept(9, 9), Kept(9, 4)], TOKENS)
    assert within(start, costs.schedule(start), costs, 1) == start
    fewer, more = (within(start, round(share * costs.schedule(start)), costs, 1) for share in (0.9, 1.1))
    for low, middle, high in zip(fewer, start, more, strict=True):
        assert low[0] <= middle[0] <= high[0]
        assert low[1] <= middle[1] <= high[1]


def test_counts_are_what_is_gone_from_block_to_block(images):
    part = drawn()
    vit = CompressedViT(model(), part)
    for degree in (*range(9), [0, 3, 2, 1], Inflected(2, -1)):
        vit.set_degree(degree)
        counts = part.counts(degree, DEPTH)
        left = [TOKENS - sum(map(sum, counts[: block + 1])) for block in range(DEPTH)]
        assert list(vit.tokens()) == left
        assert vit.forward_features(images)[0].shape[1] == left[-1]
    assert part.counts([0, 3, 2, 1], DEPTH) == ((0, 0), (0, 3), (0, 2), (0, 1))
    assert [len(drawn(degrees=d).degrees) for d in ([2], [4, 1], None)] == [1, 2, 4]


def test_degrees_between_learned_ones_lie_between_them():
    part = drawn(degrees=[2, 6])
    low, middle, high = (part.schedule(degree) for degree in (2, 4, 6))
    for block in range(DEPTH):
        assert low[block].merging + 1 >= middle[block].merging >= high[block].merging - 1
    assert part.costs.schedule(low) > part.costs.schedule(middle) > part.costs.schedule(high)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_choice_has_the_gradients_of_its_expectation_and_of_its_survival():
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def mean(logits):
        return logits.softmax(-1) @ torch.arange(1.0, 7, dtype=torch.float64)

    choice = Choice.of(logits, 2)
    assert choice.kept == int(mean(logits).ceil()) + 2 == choice.expected
    (gradient,) = torch.autograd.grad(choice.expected, logits, retain_graph=True)
    assert torch.allclose(gradient, differences(mean, logits), atol=1e-7)
    p = logits.softmax(-1)
    kept = torch.stack([p[max(position - 2, 0) :].sum() for position in range(8)])  # those who keep more than position
    assert torch.allclose(choice.survival, kept)
    mask = choice.mask(7)
    assert mask.tolist() == [1.0] * choice.kept + [0.0] * (7 - choice.kept) + [1.0]
    for position in range(8):
        (gradient,) = torch.autograd.grad(mask[position], logits, retain_graph=True)
        expected = differences(lambda z, k=position: z.softmax(-1)[max(k - 2, 0) :].sum(), logits)
        assert torch.allclose(gradient, expected, atol=1e-7)


def differences(function, x, step=1e-6):
    """Return the gradient of a function by central differences."""
    result = torch.zeros_like(x)
    for index in range(x.numel()):
        up, down = x.detach().clone(), x.detach().clone()
        up.view(-1)[index] += step
        down.view(-1)[index] -= step
        result.view(-1)[index] = (function(up) - function(down)) / (2 * step)
    return result


def test_the_loss_of_the_budget_has_the_gradient_of_finite_differences():
    vit, part = model(), drawn()
    search = part.objective(CompressedViT(vit), CompressedViT(vit, part), False)
    assert isinstance(search, Search)
    costs, parameter = part.costs, part.change[search.set(3).compressor.degrees.index(3)]
    choices = part.chosen(3)
    search.miss(choices).backward()
    reached = [
        kept.merging for kept in ordered([Kept(17, 17), *(Kept(p.kept, m.kept) for p, m in choices[1:])], TOKENS)
    ]
    whole, now = costs.merging(0), float(spent(choices, costs).detach())
    before = [TOKENS, *reached[:-1]]

    def share(block, n):
        """Return what changes with the tokens that a block keeps: its MLP, and the attention of the next."""
        return n * costs.mlp + (costs.attending(n) if block + 1 < DEPTH else 0)

    expected = torch.zeros_like(parameter)
    for block in range(1, DEPTH):
        n = reached[block]
        slope = (share(block, n + 1e-3) - share(block, n - 1e-3)) / 2e-3  # of both choices, whichever is less
        slope *= 2 * (now - costs.merging(3)) / whole**2
        for role in range(2):
            logits = part.logits(3)[role, block - 1].detach().double()
            number = torch.arange(1.0, TOKENS, dtype=torch.float64)
            mean = differences(lambda z, number=number: z.softmax(-1) @ number, logits)
            expected[role, block - 1] = slope * part.options.speed * mean
    assert len(before) == DEPTH
    assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-9)
    assert all(other.grad is None for other in part.change if other is not parameter)


def test_without_a_budget_the_last_block_has_no_gradient_and_the_others_have(images):
    vit, part = model(), drawn(budget_weight=0)
    search = part.objective(CompressedViT(vit), CompressedViT(vit, part), False).train().set(4)
    search(images).backward()
    gradient = part.change[part.degrees.index(4)].grad
    assert gradient[:, :-1].abs().sum() > 0
    assert not gradient[:, -1].any()
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert part.choices is None


# --- the forward pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_loops(vit, image, schedule, prefix, proportional=True):
    """Return the logits of one image [3, H, W] under a schedule, token by token."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
    sizes = [1.0] * len(x)
    for block, kept in zip(vit.blocks, schedule, strict=True):
        attn, n = block.attn, len(x)
        q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
        rows = q @ k.transpose(-1, -2) * attn.scale
        if proportional:
            rows = rows + torch.tensor(sizes, dtype=x.dtype).log()
        rows = rows.softmax(-1)
        x = x + attn.proj((rows @ v).transpose(0, 1).reshape(n, -1))
        importance = rows[:, 0].mean(0)
        order = [*range(prefix), *sorted(range(prefix, n), key=lambda i: -float(importance[i]))]
        order = order[: kept.pruning]
        going, staying = order[kept.merging :], order[: kept.merging]
        joined = {i: [i] for i in staying}
        new = {i: sizes[i] for i in staying}
        for i in going:
            cosine, best = max((float(F.cosine_similarity(x[i], x[j], dim=0)), j) for j in staying[prefix:])
            joined[best].append(i)
            new[best] += sizes[i] * cosine
        if kept.merging < n:
            x = torch.stack([sum(x[j] for j in joined[i]) / len(joined[i]) for i in staying])
            sizes = [max(new[i], 1.0) if going else sizes[i] for i in staying]
        x = x + block.mlp(block.norm2(x))
    return vit.forward_head(vit.norm(x)[None])[0]


def as_option(schedule, degree=3):
    pruning, merging = zip(*schedule, strict=True)
    return {str(degree): {"prune_kept_num": pruning, "merge_kept_num": merging}}


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_a_fixed_schedule_does_what_loops_do(images, registers, proportional):
    vit, images = model(reg_tokens=registers).double(), images.double()
    schedule = [Kept(*(number + registers for number in kept)) for kept in SCHEDULE]
    compressed = CompressedViT(vit, {"kind": "diffrate", "schedule": as_option(schedule)}, 3, proportional)
    expected = torch.stack([by_loops(vit, image, schedule, 1 + registers, proportional) for image in images])
    torch.testing.assert_close(compressed(images), expected)
    assert not torch.allclose(compressed(images), vit(images), atol=0.1)


@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_masks_of_certain_choices_do_what_removing_does(images, pool):
    vit, images = model(global_pool=pool).double(), images.double()
    compressed = CompressedViT(vit, {"kind": "diffrate", "schedule": as_option(SCHEDULE)})
    choices = [tuple(map(certain, kept)) for kept in SCHEDULE]
    with compressed.compressor.searching(choices):
        masked = compressed(images)
    torch.testing.assert_close(masked, compressed.set_degree(3)(images))


@torch.no_grad()
def test_degree_0_is_the_plain_model_and_an_image_does_not_depend_on_its_batch(images):
    vit = model()
    compressed = CompressedViT(vit, drawn())
    assert torch.equal(compressed(images), vit(images))
    for degree in (2, 4):
        together = compressed.set_degree(degree)(images)
        alone = torch.cat([compressed(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compressed(images.flip(0)).flip(0), together, rtol=1e-4, atol=1e-4)


# --- schedules from files ---------------------------------------------------------------------------------------------


def test_schedules_go_to_json_and_come_back(images, tmp_path):
    part = drawn()
    part.save_schedules(tmp_path / "schedules.json")
    given = make_part("compressor", {"kind": "diffrate", "schedule": str(tmp_path / "schedules.json")}, SHAPE, HIGHEST)
    assert json.loads((tmp_path / "schedules.json").read_text()).keys() == {"1", "2", "3", "4"}
    for degree in range(6):
        assert given.counts(degree, DEPTH) == part.counts(degree, DEPTH)
    assert (given.learns(given.options), part.learns(part.options)) == (False, True)
    given.save_schedules(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "schedules.json").read_bytes()
    (tmp_path / "schedules.json").unlink()  # its contents are the option
    save_part(tmp_path / "part", given)
    assert load_part(tmp_path / "part", "compressor").schedules() == part.schedules()
    assert torch.equal(*(CompressedViT(model(), it, 3)(images) for it in (given, part)))


def test_a_given_schedule_runs_as_written_and_others_are_made_of_it():
    text = {"3": {key: json.dumps(numbers) for key, numbers in GIVEN["3"].items()}}  # as published
    for spec in (GIVEN, text, {3: GIVEN["3"]}):
        part = make_part("compressor", {"kind": "diffrate", "schedule": spec}, SHAPE, HIGHEST)
        assert part.counts(3, DEPTH) == (Removal(0, 0), Removal(3, 2), Removal(1, 3), Removal(2, 0))
        assert part.costs.merging(4) >= part.costs.schedule(part.schedule(4))
        assert not list(part.parameters())


def test_a_file_says_what_was_learned(tmp_path):
    save_part(tmp_path / "part", drawn())
    from tocom.files import load_tensors

    assert load_tensors(tmp_path / "part")[1]["summary"]["schedules"] == drawn().schedules()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("missing.json", "schedule = 'missing.json': cannot be read (No such file or directory)"),
        ("broken.json", "the file is not JSON"),
        ("list.json", "give a mapping"),
        ({}, "it is empty; give a degree"),
        ({"0": GIVEN["3"]}, "'0' is no degree; give 1 or more"),
        ({"x": GIVEN["3"]}, "'x' is no degree"),
        ({"3": {"prune_kept_num": [17]}}, "key 'schedule.3.merge_kept_num' is missing"),
        ({"3": GIVEN["3"] | {"kept": [1]}}, "unknown key 'schedule.3.kept'"),
        ({"3": GIVEN["3"] | {"merge_kept_num": [17, 12, 8]}}, "prune_kept_num has 4 entries, merge_kept_num 3"),
        ({"3": GIVEN["3"] | {"merge_kept_num": [17, 12, 8, 2.5]}}, "give a whole number"),
        ({"3": GIVEN["3"] | {"merge_kept_num": "17, 12"}}, "schedule.3.merge_kept_num"),
        ({"3": {key: numbers[:3] for key, numbers in GIVEN["3"].items()}}, "is for 3 blocks, but the model has 4"),
        (
            {"3": {key: [18, *numbers[1:]] for key, numbers in GIVEN["3"].items()}},
            "keeps 18 tokens, but the model can 2",
        ),
        ({"3": {key: [*numbers[:3], 1] for key, numbers in GIVEN["3"].items()}}, "keeps 1 tokens, but the model can 2"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_line(schedule, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1, 2]")
    assert message in refusal(make_part, "compressor", {"kind": "diffrate", "schedule": schedule}, SHAPE, HIGHEST)


def test_what_cannot_be_is_refused(tmp_path):
    given = make_part("compressor", {"kind": "diffrate", "schedule": GIVEN}, SHAPE, HIGHEST)
    assert "nothing to learn" in refusal(given.objective, None, None, False)
    assert "are for 4 blocks, but the model has 2" in refusal(CompressedViT, build(), given, 3)
    assert "needs a model" in refusal(make_part("compressor", "diffrate").counts, 2, 4)
    for degrees in ([], [2, 2]):
        assert "give one degree or more, none twice" in refusal(drawn, degrees=degrees)
