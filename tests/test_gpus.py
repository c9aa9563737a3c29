"""Which GPU a job gets, with a stand-in for nvidia-smi and real processes that compete."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tocom import gpus
from tocom.config import parse_study
from tocom.errors import TocomError

ROOT = Path(__file__).parents[1]

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
        monkeypatch.delenv(name, raising=False)

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
    time.sleep(2)
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


def test_a_command_holds_its_gpus_until_it_ends(machine):
    machine(3)
    inner = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "tocom.gpus", "--count", "2", "--", sys.executable, "-c", inner]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline().strip() == "GPU-0,GPU-1"
    with pytest.raises(TocomError, match="came free"):
        gpus.claim(2, {}, timeout=0)
    end(job)
    assert gpus.claim(2, {}, timeout=10) == ("GPU-0", "GPU-1")


#: Says what CUDA would have been shown whenever it was asked something.
ASKS = """
import os, torch
shown = []
torch.cuda.is_available = lambda: shown.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or True
torch.cuda.device_count = lambda: shown.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or 1
import tocom.segmentation.stage
from tocom.stages import distil, evaluate, finetune, pretrain, throughput, transfer
from tocom.models import pick_device
for device in ("auto", "cpu", "cuda:1", "cuda", "cuda"):
    pick_device(device)
print(*shown)
"""


def test_a_job_claims_its_gpu_before_it_starts_cuda_and_only_for_the_device_cuda(machine):
    machine(3)
    first = holder()
    assert first.stdout.readline().strip() == "GPU-0"
    job = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, timeout=300)
    assert job.stdout.split() == ["None", "None", "GPU-1", "GPU-1"], job.stderr  # auto, cuda:1, cuda, cuda
    end(first)


DEMO = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
FOUR = {"mem_mb": 1000, "runtime": 10, "processes": 4}


def test_processes_that_train_together_get_gpus_that_no_other_job_has(machine, tmp_path):
    machine(6)
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    study = parse_study(DEMO | {"resources": {"distil": FOUR}, "distil": DEMO["distil"] | {"device": "cuda"}})
    first = holder()
    assert first.stdout.readline().strip() == "GPU-0"
    job = subprocess.run(
        ["bash", "-c", f"{study.launcher('distil')} distil --output x"],
        env=os.environ
        | {"PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    words = "--standalone --nproc-per-node 4 -m tocom.cli distil --output x"
    assert job.stdout == f"GPU-1,GPU-2,GPU-3,GPU-4 {words}\n", job.stderr
    end(first)


def test_only_jobs_that_ask_for_gpus_claim_them():
    claims = {}
    for device in ("cpu", "auto", "cuda"):
        finetune = DEMO["finetune"] | {"device": device}
        claims[device] = parse_study(DEMO | {"resources": {"finetune": FOUR}, "finetune": finetune})
    assert claims["cpu"].launcher("finetune") == "torchrun --standalone --nproc-per-node 4 -m tocom.cli"
    assert claims["auto"].launcher("finetune") == claims["cpu"].launcher("finetune")
    assert claims["cuda"].launcher("finetune").startswith("python -m tocom.gpus --count 4 -- torchrun --standalone")
    # Its training is a section of its own, which may be on another device than fine-tuning.
    scenes = yaml.safe_load((ROOT / "config" / "ade20k.yaml").read_text()) | {"resources": {"finetune": FOUR}}
    assert "tocom.gpus" in parse_study(scenes).launcher("finetune")
    scenes["segmentation"]["train"]["device"] = "cpu"
    assert "tocom.gpus" not in parse_study(scenes).launcher("finetune")
    nodes = DEMO | {"resources": {"distil": FOUR | {"nodes": 2}}, "distil": DEMO["distil"] | {"device": "cuda"}}
    assert "tocom.gpus" not in parse_study(nodes).launcher("distil")  # Slurm has given it its GPUs


def test_a_command_that_cannot_be_started_is_named(machine):
    machine(1)
    command = [sys.executable, "-m", "tocom.gpus", "--", "no-such-program"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (
        1,
        "tocom: error: cannot start no-such-program: No such file or directory\n",
    )


def test_a_folder_of_locks_that_belongs_to_somebody_else_is_refused(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(gpus.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(TocomError, match=r"cannot use .*tocom-gpus-\d+ for locks .*set TMPDIR"):
        gpus.claim(1, {})
