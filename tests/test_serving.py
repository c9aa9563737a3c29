"""A server gives, bit for bit, what a model at a fixed degree gives, whatever other threads do, in bounded memory."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.small import ARCHITECTURE, KWARGS, build, refusal, tune
from tests.small_lm import build_lm, tokens
from tocom import (
    CompressedLM,
    CompressedViT,
    Curve,
    Inflected,
    Server,
    TocomError,
    load_compressed,
    load_part,
    save_model,
)
from tocom.models import load_model
from tocom.training import normalise

DEGREES = (0, 2, 3, 5)
NO_MODEL = {0: {1: 4.0, 8: 8.0}, 4: {1: 3.0, 8: 6.0}, 8: {1: 3.5, 8: 4.0}}


@pytest.fixture
def wide(make_compensator):
    """A compensator whose update matters."""
    return make_compensator()


def fixed(model, compensator, degree, source=0, scale=None):
    """Return a model of its own at a fixed degree."""
    vit = CompressedViT(deepcopy(model), degree=source).eval()
    return (vit if compensator is None else vit.attach(compensator, scale)).set_degree(degree)


@torch.inference_mode()
def logits_of(vit, images):
    return vit(images)


@pytest.mark.parametrize("source", [0, 3])
@pytest.mark.parametrize("compensated", [False, True])
def test_every_degree_is_bit_for_bit_that_of_a_model_at_that_degree(make_vit, wide, images, source, compensated):
    part = wide if compensated else None
    vit = fixed(make_vit(), part, source, source)
    server = Server(vit)
    for degree in [*DEGREES, (0, 5, 2), [0, 5, 2], Inflected(2, 1.0), *DEGREES]:
        assert torch.equal(server(images, degree), logits_of(fixed(make_vit(), part, degree, source), images))
    assert torch.equal(server(images), logits_of(fixed(make_vit(), part, source, source), images))


def test_the_model_is_given_back_as_it_was_and_is_never_written_to(make_vit, wide, images):
    vit = fixed(make_vit(), wide, 5)
    server = Server(vit)
    before = {name: value.clone() for name, value in make_vit().state_dict().items()}
    versions = [tensor._version for tensor in vit.parameters()]
    for degree in DEGREES:
        server(images, degree)
    assert all(torch.equal(value, before[name]) for name, value in vit.model.state_dict().items())
    assert [tensor._version for tensor in vit.parameters()] == versions


def test_a_prepared_degree_cannot_be_saved_as_if_it_were_the_model(make_vit, wide, tmp_path):
    server = Server(fixed(make_vit(), wide, 0))
    save_model(tmp_path / "plain", server.at(0).model, "vit", {})
    assert "compensator is folded" in refusal(save_model, tmp_path / "folded", server.at(3).model, "vit", {})


def test_scales_can_differ_by_degree(make_vit, wide, images):
    server = Server(fixed(make_vit(), wide, 0), scale={0: 1.0, 2: 0.0, 5: 0.5})
    assert torch.equal(server(images, 2), logits_of(fixed(make_vit(), None, 2), images))
    assert torch.equal(server(images, 5), logits_of(fixed(make_vit(), wide, 5, scale=0.5), images))
    assert "no scale was given for degree 3" in refusal(server, images, 3)


def test_what_is_refused_leaves_the_server_as_it_was(make_vit, wide, images):
    server = Server(fixed(make_vit(), wide, 0), keep=2)
    server.degree = 4
    for degree in (-1, 7, (1, 2), 2.5, "24", True, [[1], 2, 3], {4}):  # 7: the compensator goes up to 6
        with pytest.raises(TocomError):
            server.degree = degree
    assert (server.degree, server.prepared) == (4, (0, 4))
    server = Server(fixed(make_vit(), wide, 0), scale={0: 1.0, 5: 0.5}, keep=2)
    server.at(5)
    assert "no scale was given for degree 3" in refusal(server.at, 3)
    assert server.prepared == (0, 5)
    assert "keep 0 is out of range" in refusal(Server, fixed(make_vit(), wide, 0), keep=0)
    assert "no curve" in refusal(server, images, latency=1.0)
    assert "3 degrees are to be measured, 2 stay prepared" in refusal(server.measure, (0, 1, 2))
    for wrong in ({"repeats": 0}, {"quantile": 2}, {"batch_sizes": ()}, {"batch_sizes": (0,)}):
        assert "a curve needs degrees" in refusal(server.measure, (0, 5), **wrong)


def test_an_inflected_degree_is_not_taken_for_a_count_in_each_of_two_blocks():
    server, images = Server(CompressedViT(build())), torch.randn(2, 3, 32, 32)
    for degree in (Inflected(4, 0.0), (4, 0)):
        assert torch.equal(server(images, degree), logits_of(CompressedViT(build(), degree=degree), images))
    assert len(server.prepared) == 3


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_degree_holds_the_weights_that_it_changes_and_no_others(make_vit, wide):
    model = make_vit()
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    changed = sum(model.get_parameter(name).nbytes for name in wide.deltas(0, 6))
    assert 0 < changed < whole / 2
    server = Server(fixed(model, wide, 0), keep=3)
    assert server.nbytes == whole  # at the source degree there is nothing to change
    for degree in range(7):
        server.at(degree)
        held = [degree for degree in server.prepared if degree]
        assert server.nbytes == whole + len(held) * changed
        assert len(server.prepared) <= 3
    server.at(4)
    server.at(0)
    assert server.prepared == (6, 4, 0)


def test_without_a_compensator_all_degrees_share_every_weight(make_vit):
    model = make_vit()
    server = Server(fixed(model, None, 0))
    for degree in DEGREES:
        server.at(degree)
    assert server.nbytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_what_has_given_way_is_freed(make_vit, wide):
    server = Server(fixed(make_vit(), wide, 0), keep=1)
    gone = weakref.ref(server.at(3).model.blocks[0].attn.qkv.weight)
    server.at(5)
    gc.collect()
    assert gone() is None


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 8])
def test_threads_that_switch_all_the_time_get_what_a_fixed_degree_gives(make_vit, wide, images, keep):
    batches = [images + number for number in range(3)]
    expected = {d: [logits_of(fixed(make_vit(), wide, d), batch) for batch in batches] for d in DEGREES}
    server, stop = Server(fixed(make_vit(), wide, 0), keep=keep), threading.Event()

    def switch():
        number = 0
        while not stop.is_set():
            server.degree = DEGREES[number % len(DEGREES)]
            number += 1
        return number

    def ask(number):
        degree, batch = DEGREES[number % len(DEGREES)], number % len(batches)
        own, shared = server(batches[batch], degree), server(batches[batch])
        return torch.equal(own, expected[degree][batch]), any(torch.equal(shared, e[batch]) for e in expected.values())

    with ThreadPoolExecutor(5) as pool:
        switching = pool.submit(switch)
        try:
            results = list(pool.map(ask, range(60)))
        finally:
            stop.set()
        assert switching.result() > 1
    assert results == [(True, True)] * 60


def test_a_batch_that_began_at_one_degree_ends_at_it(make_vit, wide, images):
    server = Server(fixed(make_vit(), wide, 0), keep=1)
    begun, go_on = threading.Event(), threading.Event()

    def pause(*_):
        begun.set()
        assert go_on.wait(30)

    server.degree = 5
    hook = server.at(5).model.blocks[1].norm1.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(server, images)
        assert begun.wait(30)
        hook.remove()
        server.degree = 2  # keep=1: degree 5 gives way while its batch is half done
        other = server(images)
        go_on.set()
        assert torch.equal(batch.result(), logits_of(fixed(make_vit(), wide, 5), images))
    assert torch.equal(other, logits_of(fixed(make_vit(), wide, 2), images))
    assert server.prepared == (2,)


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "degree"),
    [
        ({"latency": 9.0}, 0),
        ({"latency": 7.0}, 4),
        ({"latency": 5.0}, 8),
        ({"latency": 0.1}, 8),  # none is fast enough: the fastest
        ({"throughput": 1.0}, 0),
        ({"throughput": 1.3}, 4),
        ({"latency": 9.0, "throughput": 1.3}, 4),
    ],
    ids=str,
)
def test_the_lowest_degree_within_the_budget_is_chosen(budget, degree):
    assert Curve(NO_MODEL).degree_for(8, **budget) == degree


def test_scores_decide_where_they_are_known_and_time_between_equal_ones():
    curve = Curve(NO_MODEL, {0: 0.9, 4: 0.95, 8: 0.5})
    assert [curve.degree_for(8, latency) for latency in (9.0, 7.0, 5.0)] == [4, 4, 8]
    assert Curve(NO_MODEL, dict.fromkeys(NO_MODEL, 1.0)).degree_for(8, 9.0) == 8


def test_times_are_linear_between_sizes_and_in_proportion_above():
    curve = Curve(NO_MODEL)
    assert [curve.time(0, n) for n in (1, 8, 16)] == [4.0, 8.0, 16.0]
    assert curve.time(0, 3) == pytest.approx(4 + 4 * 2 / 7)
    assert "no degree 5" in refusal(curve.time, 5, 1)


@given(
    st.dictionaries(st.integers(0, 9), st.floats(0.1, 10), min_size=1),
    st.integers(1, 64),
    st.floats(0.01, 20),
)
def test_what_is_chosen_fits_the_budget_if_anything_does(seconds, size, latency):
    curve = Curve({degree: {8: value} for degree, value in seconds.items()})
    chosen = curve.degree_for(size, latency)
    times = {degree: value * max(1, size / 8) for degree, value in seconds.items()}
    within = [degree for degree, value in times.items() if value <= latency]
    assert chosen == min(within) if within else times[chosen] == min(times.values())


def test_a_curve_comes_back_from_its_file_and_nothing_else_does(tmp_path):
    curve = Curve({0: {1: 0.1, 8: 1 / 3}, 4: {1: 1e-7, 8: 0.2}})
    curve.write(tmp_path / "curve.csv")
    assert Curve.read(tmp_path / "curve.csv") == curve
    (tmp_path / "other.csv").write_text("degree,seconds\n0,1\n")
    assert "is no curve" in refusal(Curve.read, tmp_path / "other.csv")
    assert "no such file" in refusal(Curve.read, tmp_path / "absent.csv")
    header = "degree,batch_size,seconds\n"
    texts = (f"{header}1.7,1,1\n", f"{header}inf,1,1\n", f"{header}x,1,1\n", f"{header}0,1\n", f"{header}5,1,1,1\n")
    for text in (*texts, "degree,batch_size,seconds,seconds\n0,1,1,1\n"):
        (tmp_path / "other.csv").write_text(text)
        refusal(Curve.read, tmp_path / "other.csv")
    for wrong in ({}, {0: {}}, {0: {1: 0.0}}, {0: {1: float("nan")}}):
        assert "positive" in refusal(Curve, wrong)
    assert "of different degrees" in refusal(Curve, NO_MODEL, {0: 1.0})
    assert "no budget" in refusal(curve.degree_for, 8)


def test_a_measured_curve_has_every_degree_and_size_and_is_heeded(make_vit, images):
    server = Server(CompressedViT(make_vit()))
    curve = server.measure((0, 5), batch_sizes=(1, 2), repeats=2)
    assert {d: set(sizes) for d, sizes in curve.seconds.items()} == {0: {1, 2}, 5: {1, 2}}
    assert torch.equal(server(images, latency=1e6), server(images, 0))
    server.curve = Curve({0: {1: 1.0}, 5: {1: 0.1}})
    assert torch.equal(server(images, latency=0.5), server(images, 5))
    assert torch.equal(server(images, throughput=5.0), server(images, 5))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_a_compensator_are_served_from_their_files(backbone, digits, compensator, tmp_path):
    path, about = tune(backbone, digits, tmp_path, "2")
    server = Server.load(path, compensator, device="cpu")
    assert server.degree == 2
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, _ = load_model(path)
    vit = fixed(model, load_part(compensator, "compensator"), 4, source=2)
    assert torch.equal(server(pixels, 4), logits_of(vit, normalise(pixels, model)))
    assert load_compressed(backbone, device="cpu").degree == 0


@pytest.mark.parametrize(
    "about", [{"compressor": 7}, {"compressor": {}}, {"train_degree": "²"}, {"train_degree": "--5"}]
)
def test_metadata_of_another_form_are_refused_in_one_line(about, tmp_path):
    save_model(tmp_path / "model.safetensors", build(), ARCHITECTURE, KWARGS, **about)
    assert "model.safetensors" in refusal(load_compressed, tmp_path / "model.safetensors", device="cpu")


def test_a_compensator_of_another_backbone_is_refused(backbone, digits, compensator, tmp_path):
    other = tmp_path / "other.safetensors"
    model = build()
    with torch.no_grad():
        model.head.bias += 1
    save_model(other, model, ARCHITECTURE, KWARGS)
    assert "another backbone" in refusal(Server.load, other, compensator, device="cpu")
    random, _ = tune(backbone, digits, tmp_path, "random", tuning={"kind": "full", "degree": "random"})
    assert "no one degree" in refusal(Server.load, random, compensator, device="cpu")


def test_a_language_model_is_served_in_the_same_way():
    server, read = Server(CompressedLM(build_lm(), "lorc")), tokens()
    different = []
    for degree in (0, 4, 8):
        expected = logits_of(CompressedLM(build_lm(), "lorc").eval().set_degree(degree), read)
        assert torch.equal(server(read, degree), expected)
        different.append(expected)
    assert not torch.equal(different[0], different[2])
