"""The training loop: micro-batches, several processes, states in mid-run, averages, precision."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.data.disk import file_limit
from tests.small import QUICK
from tocom import distributed
from tocom.errors import TocomError
from tocom.files import atomic, load_tensors
from tocom.segmentation.settings import SegmentationTraining
from tocom.settings import DistilSettings, PretrainSettings
from tocom.training import (
    check_pairs,
    compiled,
    explained,
    fit,
    forget,
    make_deterministic,
    numbered,
    pieces_of,
    resume_path,
    states,
)

DATA = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
TARGET = DATA @ torch.arange(6.0) / 10
SETTINGS = QUICK.model_copy(update={"epochs": 3, "batch_size": 12, "lr": 1e-2, "augmentation": "none"})


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def run(settings, resume=None, stop_after=None, draws=None, weights=None):
    """Train a small net with dropout; return its weights and the record."""
    net, steps = model(), 0
    drawn = [] if draws is None else draws

    def step(indices):
        nonlocal steps
        steps += 1
        if stop_after is not None and steps > stop_after:
            raise KeyboardInterrupt
        return (net(DATA[indices]).squeeze(-1) - TARGET[indices]).square().mean()

    def score():
        if weights is not None:
            weights.append(net[0].weight.detach().clone())
        with torch.no_grad():
            return (-float((net(DATA).squeeze(-1) - TARGET).square().mean()),)

    def begin():
        drawn.append(int(torch.randint(1000, ())))

    record = fit(step, net, len(DATA), settings, 0, score, "test", {}, resume, begin)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), record


def with_settings(**changes):
    return SETTINGS.model_copy(update=changes)


def test_a_step_of_micro_batches_is_the_step_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    whole, _ = run(with_settings())
    for size in (6, 4, 1):
        pieces, _ = run(with_settings(micro_batch_size=size))
        assert torch.allclose(whole, pieces, atol=1e-6)


def test_micro_batches_of_a_partial_batch_count_by_their_images():
    batch = torch.arange(10)
    pieces = pieces_of(batch, with_settings(batch_size=12, micro_batch_size=4), 1)
    assert [len(piece) for piece in pieces] == [4, 3, 3]
    assert torch.equal(torch.cat(pieces), batch)
    with pytest.raises(TocomError, match="3 micro-batches .* among 2 processes"):
        pieces_of(batch, with_settings(batch_size=12, micro_batch_size=4), 2)


@pytest.mark.parametrize("micro", [None, 6])
@pytest.mark.parametrize("stop_after", [1, 4, 7, 14])
def test_a_run_killed_in_mid_epoch_gives_the_same_weights(tmp_path, micro, stop_after):
    settings = with_settings(save_every=2, micro_batch_size=micro, ema=0.9, clip_grad=1.0, precision="bf16")
    draws, resumed_draws = [], []
    whole, record = run(settings, draws=draws)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "state", stop_after)
    resumed, again = run(settings, tmp_path / "state", draws=resumed_draws)
    assert torch.equal(whole, resumed)
    assert draws[len(draws) - len(resumed_draws) :] == resumed_draws
    assert (record["losses"], record["score"], record["best_epoch"]) == (
        again["losses"],
        again["score"],
        again["best_epoch"],
    )
    done = stop_after if micro is None else stop_after // 2
    saved = max(step for step in range(done + 1) if step % 5 in (0, 2, 4))  # five steps an epoch, every second saved
    assert len(resumed_draws) == len(draws) - saved


def test_as_many_states_are_kept_as_stated_and_an_unreadable_one_gives_way(tmp_path):
    settings = with_settings(save_every=1, keep_states=3)
    whole, _ = run(settings)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "state", 9)
    assert states(tmp_path / "state") == [numbered(tmp_path / "state", number) for number in range(3)]
    (tmp_path / "state").write_bytes(b"torn")
    draws = []
    resumed, _ = run(settings, tmp_path / "state", draws=draws)
    assert torch.equal(whole, resumed)
    assert len(draws) == 15 - 8


def test_a_nan_leaves_none_of_the_states(tmp_path):
    with pytest.raises(TocomError, match="the loss became"):
        run(with_settings(lr=1e30, save_every=1, keep_states=3), resume_path(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_the_states_that_were_there(tmp_path):
    with file_limit(2000), pytest.raises(TocomError, match="cannot write .*; free some space") as caught:
        run(with_settings(), tmp_path / "state")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        run(with_settings(), tmp_path / "state", 6)
    before = (tmp_path / "state").read_bytes()
    with file_limit(2000), pytest.raises(TocomError, match="free some space"):
        run(with_settings(), tmp_path / "state")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def killed_while_saving(path):
    """Leave what a process leaves that ends in the middle of a save."""
    child = os.fork()
    if not child:
        with atomic(path) as temporary:
            temporary.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)


def test_what_a_kill_during_a_save_left_goes_with_the_next_save(tmp_path):
    state = resume_path(tmp_path / "x[1]")
    killed_while_saving(state)
    killed_while_saving(tmp_path / "x[1]")  # half an output is not a state
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(KeyboardInterrupt):
        run(with_settings(save_every=1, keep_states=3), state, 4)
    assert states(state) == [numbered(state, number) for number in range(3)]
    assert len(list(tmp_path.iterdir())) == 4
    killed_while_saving(state)
    forget(tmp_path / "x[1]")
    assert len(list(tmp_path.iterdir())) == 1


def test_states_beyond_those_to_keep_go_with_the_next_save(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(with_settings(save_every=1, keep_states=3), tmp_path / "state", 4)
    assert len(states(tmp_path / "state")) == 3
    run(with_settings(save_every=1, keep_states=2), tmp_path / "state")
    assert sorted(tmp_path.iterdir()) == [numbered(tmp_path / "state", number) for number in range(2)]


def test_the_average_of_the_weights_is_scored_and_kept(tmp_path):
    plain, averaged = [], []
    run(with_settings(), weights=plain)
    final, record = run(with_settings(ema=0.999999), weights=averaged)
    start = model()[0].weight
    assert not torch.allclose(plain[-1], start, atol=1e-3)
    assert torch.allclose(averaged[-1], start, atol=1e-3)
    assert torch.equal(final[: start.numel()].view_as(start), averaged[record["best_epoch"] - 1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_close(precision, monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    exact, lower = run(with_settings())[1]["losses"], run(with_settings(precision=precision))[1]["losses"]
    assert exact != lower
    assert lower == pytest.approx(exact, rel=0.05)


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(TocomError, match="do not fill a batch"):
        fit(None, model(), 5, with_settings(), 0, None, "test", {}, drop_last=True)


# --- what torch is told ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchs_own():
    """Put torch's global settings back."""
    threads, limit = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = limit


def test_a_recipe_is_deterministic_unless_it_says_otherwise_or_segments():
    assert QUICK.deterministic
    assert QUICK.recipe()["deterministic"] is True
    assert not SegmentationTraining().deterministic


@pytest.mark.usefixtures("torchs_own")
@pytest.mark.parametrize("strict", [True, False])
def test_strict_makes_torch_refuse_what_it_only_warns_of_else(strict):
    make_deterministic(1, strict)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict


@pytest.mark.usefixtures("torchs_own")
@pytest.mark.parametrize(("given", "used"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_cublas_is_told_to_repeat_its_results(monkeypatch, given, used):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    make_deterministic(1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used


@pytest.mark.usefixtures("torchs_own")
def test_an_operation_whose_result_varies_is_one_line_that_names_the_fix():
    make_deterministic(1, strict=True)
    with pytest.raises(TocomError, match="^put_ gives results that vary .*deterministic: false") as caught, explained():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # refused on every device
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"), explained():
        raise RuntimeError("another")


@pytest.mark.usefixtures("torchs_own")
def test_compiling_allows_a_program_for_every_degree():
    module = model()
    torch._dynamo.config.recompile_limit = 8  # torch's own; some of timm's optimizers change it
    compiled(module, with_settings(compile="eager"))
    assert torch._dynamo.config.recompile_limit >= 256
    assert compiled(module, with_settings()) is module
    with pytest.raises(TocomError, match=r"no such backend \(did you mean 'inductor'\?\)") as caught:
        compiled(module, with_settings(compile="inductr"))
    assert "\n" not in str(caught.value)


def test_an_optimizer_that_timm_does_not_have_is_refused():
    with pytest.raises(TocomError, match=r"optimizer 'adamww' .*did you mean 'adamw'"):
        run(with_settings(optimizer="adamww"))


def test_a_gpu_by_number_becomes_the_present_one_whose_random_state_is_saved(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = [torch.device(name) for name in ("cuda:1", "cuda", "cpu", "cpu:0")]
    assert [distributed.own_device(device) for device in devices] == devices
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(TocomError, match="there is no cuda:2: torch sees 2 GPUs"):
        distributed.own_device(torch.device("cuda:2"))


# --- several processes ----------------------------------------------------------------------------------------------


def test_all_processes_draw_the_same_degrees(monkeypatch):
    drawn = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        run(with_settings(), draws=drawn.setdefault(rank, []))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10
    stated = [[], []]
    for number, processes in enumerate("12"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("RANK", "0")
        run(with_settings(micro_batch_size=6), draws=stated[number])
    assert stated[0] == stated[1]  # those of one process, if the micro-batches are the same


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(TocomError, match="mix pairs"):
        check_pairs(with_settings(batch_size=2, mixup=0.8))


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_group_is_left_in_order_but_not_after_an_error(monkeypatch, error):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed.distributed, "PrefixStore", lambda *args: None)
    monkeypatch.setattr(distributed.distributed, "init_process_group", lambda *args, **kwargs: calls.append("join"))
    monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: calls.append("leave"))
    try:
        with distributed.processes(torch.device("cpu")):
            if error:
                raise error
    except ValueError:
        assert error
    assert calls == (["join"] if error else ["join", "leave"])


def command(processes, *words):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *start, "-m", "tocom.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def options(settings):
    return [part for pair in settings.model_dump(mode="json").items() for part in ("--set", set_(*pair))]


def set_(key, value):
    return f"{key}={json.dumps(value)}"


def largest_difference(one, two):
    a, b = load_tensors(one)[0], load_tensors(two)[0]
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from tests.small import ARCHITECTURE, KWARGS, build
    from tocom.data.registry import prepare
    from tocom.models import save_model

    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "backbone", build(), ARCHITECTURE, KWARGS)
    prepare("digits", folder / "data", {"train": 36, "val": 16, "test": 16}, decode_train=False)
    return folder


def test_two_processes_fine_tune_as_one_does(inputs, tmp_path):
    settings = QUICK.model_copy(
        update={"augmentation": "timm", "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "batch_size": 16}
        | {"micro_batch_size": 4, "epochs": 2}
    )
    runs = ["--at", "random:0", "--max-degree", 4]
    for processes in (1, 2):
        command(processes, "finetune", inputs / "backbone", inputs / "data", "-o", tmp_path / f"{processes}",
                *runs, *options(settings))  # fmt: skip
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-4
    one, two = (load_tensors(tmp_path / name)[1] for name in "12")
    assert one["val_accuracy"] == two["val_accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_two_processes_distil_as_one_does(inputs, tmp_path):
    settings = DistilSettings(
        epochs=2, images=40, held_out=16, pairs=4, batch_size=16, micro_batch_size=4, device="cpu", drop_path=0.1
    )
    for processes in (1, 2):
        command(processes, "distil", inputs / "backbone", "-o", tmp_path / f"{processes}", "--max-degree", 4,
                *options(settings))  # fmt: skip
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-5
    up = load_tensors(tmp_path / "1")[0]["up"]
    assert float(up.abs().max()) > 1e-3  # it did learn


def test_two_processes_pre_train_as_one_does(tmp_path):
    from tests.small import ARCHITECTURE, KWARGS
    from tocom.stages.pretrain import pretrain

    settings = PretrainSettings(
        epochs=2, images=48, held_out=16, batch_size=16, micro_batch_size=8, threads=1, device="cpu", warmup_epochs=0
    )
    pretrain(tmp_path / "1", ARCHITECTURE, KWARGS, 0, [0], settings)
    command(2, "pretrain", "-o", tmp_path / "2", "--architecture", ARCHITECTURE, "--kwargs", json.dumps(KWARGS),
            *options(settings))  # fmt: skip
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-5
    one, two = (load_tensors(tmp_path / name)[1] for name in "12")
    assert (one["accuracy"], one["best_epoch"]) == (two["accuracy"], two["best_epoch"])
