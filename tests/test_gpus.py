"""Which GPU a job gets, with a stand-in for nvidia-smi and real processes that compete."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.small import refusal
from tocom import gpus
from tocom.distributed import launch
from tocom.errors import TocomError
from tocom.models import pick_device

#: Claims, says what it got, and keeps it until somebody closes its input.
HOLDER = (
    "import os, sys; from tocom.gpus import claim; claim(int(sys.argv[1]), timeout=20);"
    "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that gives this machine so many GPUs, GPU-0 to GPU-N, and locks of its own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpus.tempfile, "tempdir", None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "TOCOM_GPUS", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    def install(count):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo GPU-{index}\n" for index in range(count)))
        program.chmod(0o755)

    return install


def holder(count=1, **environment):
    """Start a process that claims GPUs and holds them."""
    command = [sys.executable, "-c", HOLDER, str(count)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def end(process):
    process.stdin.close()
    assert process.wait(timeout=20) == 0


def test_jobs_at_the_same_time_get_different_gpus(machine):
    machine(3)
    jobs = [holder() for _ in range(3)]
    assert {job.stdout.readline().strip() for job in jobs} == {"GPU-0", "GPU-1", "GPU-2"}
    for job in jobs:
        end(job)


def test_a_job_waits_for_a_gpu_and_gets_the_one_that_comes_free(machine):
    machine(2)
    first, second = holder(), holder()
    taken = [first.stdout.readline().strip(), second.stdout.readline().strip()]
    third = holder()
    time.sleep(1)
    assert third.poll() is None
    end(second)
    assert third.stdout.readline().strip() == taken[1]
    end(first)
    end(third)


def test_a_killed_job_gives_its_gpu_back(machine):
    machine(2)
    jobs = [holder(), holder()]
    taken = [job.stdout.readline().strip() for job in jobs]
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].wait()
    assert gpus.claim(1, {}, timeout=10) == (taken[0],)
    end(jobs[1])


def test_two_gpus_are_claimed_together_or_not_at_all(machine):
    machine(3)
    one = holder()
    assert one.stdout.readline().strip() == "GPU-0"
    two = holder(2)
    assert two.stdout.readline().strip() == "GPU-1,GPU-2"
    end(one)
    with pytest.raises(TocomError, match="no 2 of 3 GPUs came free"):
        gpus.claim(2, {}, timeout=0)
    environment = {}
    assert gpus.claim(1, environment, timeout=0) == ("GPU-0",)  # the failed claim kept none
    assert environment == {"CUDA_VISIBLE_DEVICES": "GPU-0", "TOCOM_GPUS": "GPU-0"}
    end(two)


@pytest.mark.parametrize(
    ("installed", "environment"),
    [
        (0, {}),
        (1, {}),
        (4, {"CUDA_VISIBLE_DEVICES": "2"}),
        (4, {"CUDA_VISIBLE_DEVICES": ""}),
        (0, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        (4, {"WORLD_SIZE": "2"}),
        (4, {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-3", "TOCOM_GPUS": "GPU-1,GPU-3"}),
    ],
    ids=["no driver", "one GPU", "given one", "given none", "no nvidia-smi", "torchrun", "claimed by who started it"],
)
def test_nothing_is_claimed_where_there_is_nothing_to_choose(machine, installed, environment):
    machine(installed)
    before = dict(environment)
    assert gpus.claim(1, environment) == ()
    assert environment == before


def test_all_gpus_are_locked_but_none_is_hidden(machine):
    machine(2)
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert gpus.claim(2, environment, timeout=0) == ("GPU-0", "GPU-1")
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1", "TOCOM_GPUS": "GPU-0,GPU-1"}
    with pytest.raises(TocomError, match="came free"):
        gpus.claim(1, {}, timeout=0)


def test_numbers_and_names_of_a_gpu_are_the_same_gpu(machine):
    machine(4)
    assert gpus.visible({"CUDA_VISIBLE_DEVICES": "3, GPU-1,9"}) == ["GPU-3", "GPU-1", "9"]
    job = holder(CUDA_VISIBLE_DEVICES="GPU-2,GPU-3")
    assert job.stdout.readline().strip() == "GPU-2"
    assert gpus.claim(1, {"CUDA_VISIBLE_DEVICES": "2,3"}, timeout=0) == ("GPU-3",)
    end(job)


def test_more_gpus_than_there_are_is_an_error_and_no_endless_wait(machine):
    machine(2)
    with pytest.raises(TocomError, match=r"3 GPUs wanted, 2 visible; ask for fewer"):
        gpus.claim(3, {})


def test_a_job_claims_its_gpu_before_it_starts_cuda_and_only_for_the_device_cuda(machine, monkeypatch):
    machine(3)
    first, shown = holder(), []
    assert first.stdout.readline().strip() == "GPU-0"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not shown.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    for device in ("auto", "cpu", "cuda:1", "cuda", "cuda"):
        pick_device(device)
    assert shown == [None, None, "GPU-1", "GPU-1"]  # auto, cuda:1, cuda, cuda
    end(first)


def test_processes_that_train_together_get_gpus_that_no_other_job_has(machine, monkeypatch):
    machine(6)
    first, started = holder(), []
    assert first.stdout.readline().strip() == "GPU-0"

    def execv(program, words):
        started.append((os.environ["CUDA_VISIBLE_DEVICES"], words))
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["tocom", "learn", "JOB"])
    launch(1, 1, "cuda")
    with pytest.raises(SystemExit):
        launch(4, 1, "cuda")
    words = "-m torch.distributed.run --standalone --nproc-per-node 4 -m tocom.cli learn JOB"
    assert started == [("GPU-1,GPU-2,GPU-3,GPU-4", [sys.executable, *words.split()])]
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "in a job of Slurm only" in refusal(launch, 4, 2, "cuda")
    end(first)


def test_a_folder_of_locks_that_belongs_to_somebody_else_is_refused(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(gpus.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(TocomError, match=r"cannot use .*tocom-gpus-\d+ for locks .*set TMPDIR"):
        gpus.claim(1, {})
