"""Random states that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else (not on PYTHONHASHSEED)."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python from ``parts``; timm draws from each."""
    seed_cpu(*parts)
    torch.manual_seed(derive_seed(*parts))


def seed_cpu(*parts: int | str) -> None:
    """Seed the global generators that loading images draws from; those of GPUs go on as they were."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def random_state() -> dict:
    """Return the states of all global generators (of the present GPU), as what torch.save keeps safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_random_state(state: dict) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
