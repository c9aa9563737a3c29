"""The training loop: micro-batches, several processes, states in mid-run, averages, precision."""

import contextlib
import math
import multiprocessing
import os
import socket
import sys
import types

import pytest
import torch
from torch import nn

from tests.data.disk import file_limit
from tests.small import ARCHITECTURE, KWARGS, LEARN, QUICK, refusal, teach, tune
from tocom import distributed, training
from tocom.data.registry import prepare
from tocom.files import atomic, load_tensors
from tocom.jobs import PretrainJob
from tocom.settings import FinetuneSettings
from tocom.stages.pretrain import pretrain
from tocom.training import (
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
SETTINGS = FinetuneSettings(epochs=3, batch_size=12, lr=1e-2, augmentation="none", device="cpu")


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


@pytest.fixture
def every_step(monkeypatch):
    """Leave a state after every step, not after ten minutes."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


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
    message = refusal(pieces_of, batch, with_settings(batch_size=12, micro_batch_size=4), 2)
    assert message.startswith("3 micro-batches")


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("micro", [None, 6])
@pytest.mark.parametrize("stop_after", [1, 7, 14])
def test_a_run_killed_in_mid_epoch_gives_the_same_weights(tmp_path, micro, stop_after):
    settings = with_settings(micro_batch_size=micro, ema=0.9, clip_grad=1.0, precision="bf16")
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
    assert len(resumed_draws) == len(draws) - done


class Trail(nn.Module):
    """Scale what passes by what has passed in training: a buffer that grows, and belongs to no state_dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.empty(0), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean()[None]])
        return x * (1 + self.seen.sum())


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("best", [1, 2, 3])
def test_buffers_are_resumed_and_are_those_of_the_best_epoch(tmp_path, best):
    def trained(resume=None, stop_after=None):
        torch.manual_seed(0)
        net, steps = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), Trail(), nn.Linear(8, 1)), 0

        def step(indices):
            nonlocal steps
            steps += 1
            if steps == stop_after:
                raise KeyboardInterrupt
            return (net(DATA[indices]).squeeze(-1) - TARGET[indices]).square().mean()

        def score():
            return (-abs(len(net[3].seen) - 5.0 * best),)

        assert fit(step, net, len(DATA), SETTINGS, 0, score, "test", {}, resume)["best_epoch"] == best
        return net.state_dict() | dict(net.named_buffers())

    whole = trained()
    assert len(whole["3.seen"]) == whole["1.num_batches_tracked"] == 5 * best
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "state", 8)
    resumed = trained(tmp_path / "state")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.usefixtures("every_step")
def test_two_states_are_kept_and_an_unreadable_one_gives_way(tmp_path):
    whole, _ = run(SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, tmp_path / "state", 9)
    assert states(tmp_path / "state") == [numbered(tmp_path / "state", number) for number in range(2)]
    (tmp_path / "state").write_bytes(b"torn")
    draws = []
    resumed, _ = run(SETTINGS, tmp_path / "state", draws=draws)
    assert torch.equal(whole, resumed)
    assert len(draws) == 15 - 8


def test_within_an_epoch_a_state_is_left_when_enough_time_has_passed_only(tmp_path, monkeypatch):
    for seconds, resumed in ((600.0, 15 - 5), (0.0, 15 - 8)):
        monkeypatch.setattr(training, "SAVE_SECONDS", seconds)
        with pytest.raises(KeyboardInterrupt):
            run(SETTINGS, tmp_path / f"{seconds}", 8)
        draws = []
        run(SETTINGS, tmp_path / f"{seconds}", draws=draws)
        assert len(draws) == resumed


@pytest.mark.usefixtures("every_step")
def test_a_nan_leaves_none_of_the_states(tmp_path):
    message = refusal(run, with_settings(lr=1e30), resume_path(tmp_path / "x"))
    assert "the loss became" in message
    assert "lower the learning rate" in message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_the_states_that_were_there(tmp_path):
    with file_limit(2000):
        message = refusal(run, SETTINGS, tmp_path / "state")
    assert message.startswith("cannot write ")
    assert "free some space" in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        run(with_settings(), tmp_path / "state", 6)
    before = (tmp_path / "state").read_bytes()
    with file_limit(2000):
        refusal(run, SETTINGS, tmp_path / "state")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def killed_while_saving(path):
    """Leave what a process leaves that ends in the middle of a save."""
    child = os.fork()
    if not child:
        with atomic(path) as temporary:
            temporary.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("every_step")
def test_what_a_kill_during_a_save_left_goes_with_the_next_save(tmp_path):
    state = resume_path(tmp_path / "x[1]")
    killed_while_saving(state)
    killed_while_saving(tmp_path / "x[1]")  # half an output is not a state
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, state, 4)
    assert states(state) == [numbered(state, number) for number in range(2)]
    assert len(list(tmp_path.iterdir())) == 3
    killed_while_saving(state)
    forget(tmp_path / "x[1]")
    assert len(list(tmp_path.iterdir())) == 1


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


# --- what torch is told ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchs_own():
    """Put torch's global settings back."""
    threads, limit = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = limit


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
    put = explained()(lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))  # refused on every device
    message = refusal(put)
    assert message.startswith("put_ gives results that vary")
    assert "deterministic: false" in message
    with pytest.raises(RuntimeError, match="another"), explained():
        raise RuntimeError("another")


@pytest.mark.usefixtures("torchs_own")
def test_compiling_allows_a_program_for_every_degree():
    module = model()
    torch._dynamo.config.recompile_limit = 8  # torch's own; some of timm's optimizers change it
    compiled(module, with_settings(compile="eager"))
    assert torch._dynamo.config.recompile_limit >= 256
    assert compiled(module, with_settings()) is module
    assert "no such backend (did you mean 'inductor'?)" in refusal(compiled, module, with_settings(compile="inductr"))


def test_an_optimizer_that_timm_does_not_have_is_refused():
    message = refusal(run, with_settings(optimizer="adamww"))
    assert message.startswith("optimizer 'adamww'")
    assert "did you mean 'adamw'" in message


def test_a_gpu_by_number_becomes_the_present_one_whose_random_state_is_saved(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = [torch.device(name) for name in ("cuda:1", "cuda", "cpu", "cpu:0")]
    assert [distributed.own_device(device) for device in devices] == devices
    assert chosen == [torch.device("cuda:1")]
    assert "there is no cuda:2: torch sees 2 GPUs" in refusal(distributed.own_device, torch.device("cuda:2"))


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


def in_two(work):
    """Do some work in two processes that train one model, each as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def child(rank):
        os.environ |= meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work()

    forks = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(120)
    assert [fork.exitcode for fork in forks] == [0, 0]


def largest_difference(one, two):
    a, b = load_tensors(one)[0], load_tensors(two)[0]
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_fine_tune_as_one_does(backbone, tmp_path):
    prepare("digits", tmp_path / "data", {"train": 36, "val": 16, "test": 16}, decode_train=False)
    settings = QUICK | {"augmentation": "timm", "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "micro_batch_size": 4}
    job = {"settings": settings, "tuning": {"degree": "random", "kind": "full"}}
    tune(backbone, tmp_path / "data", tmp_path / "1", "random", **job)
    in_two(lambda: tune(backbone, tmp_path / "data", tmp_path / "2", "random", **job))
    file = "train-random_seed-0.safetensors"
    assert largest_difference(tmp_path / "1" / file, tmp_path / "2" / file) < 1e-4
    one, two = (load_tensors(tmp_path / name / file)[1] for name in "12")
    assert one["val_score"] == two["val_score"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "data"]


def test_two_processes_learn_as_one_does(backbone, tmp_path):
    settings = LEARN | {"images": 40, "held_out": 16, "batch_size": 16, "micro_batch_size": 4, "drop_path": 0.1}
    teach(backbone, tmp_path / "1", settings)
    in_two(lambda: teach(backbone, tmp_path / "2", settings))
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-5
    assert float(load_tensors(tmp_path / "1")[0]["up"].abs().max()) > 1e-3  # it did learn


def test_two_processes_pre_train_as_one_does(tmp_path):
    settings = {"epochs": 2, "images": 48, "held_out": 16, "batch_size": 16, "micro_batch_size": 8, "threads": 1}
    settings |= {"device": "cpu", "warmup_epochs": 0}
    job = {"architecture": ARCHITECTURE, "kwargs": KWARGS, "settings": settings, "degrees": [0, 4]}
    pretrain(PretrainJob(**job), tmp_path / "1")
    in_two(lambda: pretrain(PretrainJob(**job), tmp_path / "2"))
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-5
    one, two = (load_tensors(tmp_path / name)[1] for name in "12")
    assert (one["accuracy"], one["best_epoch"]) == (two["accuracy"], two["best_epoch"])
    assert set(one["accuracy"]) == {"0", "4"}


def test_the_schedule_per_epoch_is_that_of_the_public_code():
    """One epoch late: mean 1.30e-3 and last 2.0e-4 for the published recipe of distillation."""
    recipe = with_settings(epochs=10, lr=1e-3, lr_batch=6, min_lr=1e-5, schedule="epoch")
    assert recipe.peak_lr == 2e-3
    rates = [row["lr"] for row in run(recipe)[1]["epochs"]]
    cosine = [1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in (0, *range(9))]
    assert rates == pytest.approx(cosine)
    assert (sum(rates) / 10, rates[-1]) == (pytest.approx(1.30e-3, rel=0.01), pytest.approx(2.0e-4, rel=0.01))


def test_a_run_resumed_under_the_schedule_per_epoch_gives_the_same_weights(tmp_path, every_step):
    settings = with_settings(schedule="epoch")
    whole, _ = run(settings)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / ".r.resume", stop_after=7)
    resumed, record = run(settings, tmp_path / ".r.resume")
    assert torch.equal(whole, resumed)
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3]


def test_every_epoch_leaves_a_row_of_its_curve_and_one_for_tensorboard_if_asked(tmp_path, monkeypatch):
    _, record = run(SETTINGS)
    assert [list(row) for row in record["epochs"]] == [["epoch", "loss", "held_out", "lr", "seconds"]] * 3
    assert [row["loss"] for row in record["epochs"]] == record["losses"]
    assert max(row["held_out"] for row in record["epochs"]) == record["score"][0]
    written = []

    class Writer(contextlib.AbstractContextManager):
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, epoch):
            written.append((self.folder, name, value, epoch))

        def __exit__(self, *_):
            return None

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setenv(training.TENSORBOARD, str(tmp_path))
    run(SETTINGS)
    losses = [
        value for folder, name, value, _ in written if name == "loss" and folder.startswith(str(tmp_path / "test_"))
    ]
    assert losses == record["losses"]
