"""Several processes that train one model, as torchrun starts them; with one process, everything here does nothing.

In every step all processes draw the same degrees. They are those that one process would draw only if
``micro_batch_size`` is stated: each of several micro-batches has a random state of its own, whoever computes it. With
the default (null) there are as many micro-batches as processes, and the single one of a lone process draws from the
epoch's stream, in which the degrees follow whatever dropout and augmentation drew before.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from tocom.errors import TocomError
from tocom.gpus import claim

#: Numbers the groups that this process joins, one for each model that it trains.
_groups = itertools.count()


def is_main() -> bool:
    """Return whether this process is the one of torchrun's that reports; without torchrun it is."""
    return rank() == 0


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process where "cuda" stands for one GPU a process; other devices stay as they are.

    A GPU by number becomes torch's present one, whose random state training saves and puts back.

    Raises:
        TocomError: there is no GPU of this number, or the node has fewer GPUs than processes.
    """
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise TocomError(f"there is no {device}: torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on")
        torch.cuda.set_device(device)
        return device
    if world_size() == 1 or device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise TocomError(
            f"process {local} of this node has no GPU: torch sees {torch.cuda.device_count()};"
            " start as many processes as there are GPUs"
        )
    return torch.device("cuda", local)


def launch(processes: int, nodes: int, device: str) -> None:
    """Have several processes run this program's command line in its place, as torchrun starts them.

    Does nothing for one process, or in one that torchrun started. On one node the processes first get GPUs that no
    other job has; several nodes are those of the Slurm job that this runs in, each with as many processes.

    Raises:
        TocomError: several nodes are asked for outside of Slurm, or the GPUs are not to be had.
    """
    if processes * nodes == 1 or "WORLD_SIZE" in os.environ:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    each = ["--nproc-per-node", str(processes), "-m", "tocom.cli", *sys.argv[1:]]
    if nodes == 1:
        if device.startswith("cuda"):
            claim(processes)
        os.execv(sys.executable, [*torchrun, "--standalone", *each])
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise TocomError(f"{nodes} nodes can be used in a job of Slurm only; use one node, or submit it")
    meet = f"{socket.gethostname()}:{29500 + int(job) % 1000}"
    step = ["srun", "--overlap", f"--nodes={nodes}", "--ntasks-per-node=1"]
    rendezvous_by = ["--nnodes", str(nodes), "--rdzv-id", job, "--rdzv-backend", "c10d", "--rdzv-endpoint", meet]
    # The step that this runs in has one node; what it says of itself must not reach the step of all nodes.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in ("SLURM_JOB_ID", "SLURM_CONF")}
    os.execvpe("srun", [*step, *torchrun, *rendezvous_by, *each], kept)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes for the length of the block: NCCL between GPUs, gloo between CPUs.

    After an error the group is not left in order, which might wait for processes that wait for this one: the error
    ends this process, and torchrun then ends the others.
    """
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun's store outlives a group; by the same names, the next one would find addresses where nobody is any more.
    store = distributed.PrefixStore(f"tocom-{next(_groups)}", next(rendezvous("env://"))[0])
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
    yield
    distributed.destroy_process_group()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite every process's tensors by those of the main one."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up gradients over all processes, in one message; a parameter that no process used stays without one."""
    if not distributed.is_initialized():
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([used, *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(total)
    used, *parts = total.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, part, count in zip(parameters, parts, used.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if count else None


def sum_values(value: Tensor) -> Tensor:
    """Return a tensor summed over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Return every world_size-th item, from this process's rank on; :func:`gather` puts results in order again."""
    return items[rank() :: world_size()] if distributed.is_initialized() else items


def gather(results: list[Any]) -> list[Any]:
    """Return the results for all items of which every process worked on its :func:`share`, in the items' order."""
    if not distributed.is_initialized():
        return results
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    distributed.all_gather_object(parts, results)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def wait_for_all() -> None:
    """Return once every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()
