"""How many images a second a device trains on and classifies, measured in seconds or read from an earlier file."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tocom.errors import TocomError
from tocom.files import write_text

if TYPE_CHECKING:
    import torch

#: Forward, loss and backward; forward alone.
MODES = ("train", "infer")


@dataclass(frozen=True)
class Rate:
    """Images a second of one model at one degree.

    Attributes:
        architecture: the model's name in timm with the arguments that differ, as :func:`label` writes it.
        mode: "train" (forward, loss, backward) or "infer" (forward).
    """

    architecture: str
    image_size: int
    compressor: str
    precision: str
    device: str
    degree: int
    mode: str
    images_per_second: float


#: Columns of a CSV of rates.
COLUMNS = tuple(field.name for field in fields(Rate))


def label(architecture: str, kwargs: dict[str, Any]) -> str:
    """Return a name for a model by what its speed depends on; neither image size nor classes are in it."""
    shown = [f"{key}={value}" for key, value in sorted(kwargs.items()) if key not in ("img_size", "num_classes")]
    return f"{architecture}({', '.join(shown)})" if shown else architecture


class Rates:
    """Measured rates, and what they say of degrees between the measured ones.

    Raises:
        TocomError: they were measured on several devices.
    """

    def __init__(self, rates: Iterable[Rate]):
        self.rates = tuple(rates)
        devices = sorted({rate.device for rate in self.rates})
        if len(devices) > 1:
            raise TocomError(f"rates of several devices ({'; '.join(devices)}); keep the rows of one")
        self.device = devices[0] if devices else "no device"

    def seconds(
        self, architecture: str, image_size: int, compressor: str, precision: str, mode: str, degrees: Sequence[int]
    ) -> float:
        """Return the seconds an image takes, on average over ``degrees``.

        Time is interpolated linearly between the measured degrees; beyond them, it is that of the nearest.

        Raises:
            TocomError: the model was not measured under these conditions.
        """
        wanted = (architecture, image_size, compressor, precision, mode)
        found = {
            rate.degree: 1 / rate.images_per_second
            for rate in self.rates
            if (rate.architecture, rate.image_size, rate.compressor, rate.precision, rate.mode) == wanted
        }
        if not found:
            raise TocomError(
                f"no rate of {architecture} ({mode}, {image_size} pixels, {compressor}, {precision}) was measured on"
                f" {self.device}; measure it there with `tocom plan CONFIG --save-rates FILE`"
            )
        measured = sorted(found)
        return float(np.interp(degrees, measured, [found[degree] for degree in measured]).mean())


def write_rates(rates: Iterable[Rate], path: str | os.PathLike) -> None:
    """Write rates as CSV."""
    import pandas as pd

    write_text(path, pd.DataFrame(map(asdict, rates), columns=COLUMNS).to_csv(index=False, lineterminator="\n"))


def read_rates(path: str | os.PathLike) -> list[Rate]:
    """Read what :func:`write_rates` wrote.

    Raises:
        TocomError: the file is missing, lacks a column, or has a value that is no rate.
    """
    import pandas as pd

    if not Path(path).is_file():
        raise TocomError(f"no such file: {path}; write it with `tocom plan CONFIG --save-rates {path}`")
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except ValueError as error:
        raise TocomError(f"{path} is not a CSV of rates ({str(error).splitlines()[0]}); write it again") from None
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise TocomError(f"{path} lacks the column {missing[0]!r}; write it again with `tocom plan --save-rates`")
    kinds = {"image_size": int, "degree": int, "images_per_second": float}
    try:
        rates = [Rate(*(kinds.get(name, str)(row[name]) for name in COLUMNS)) for row in table.to_dict("records")]
    except ValueError as error:
        raise TocomError(f"{path} holds a value that is no number ({error}); write it again") from None
    for number, rate in enumerate(rates, start=1):
        if not 0 < rate.images_per_second < float("inf") or rate.mode not in MODES:
            raise TocomError(f"{path}: row {number} is no rate ({rate.mode}, {rate.images_per_second}); write it again")
    return rates


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", information.read_text(), re.M) if information.is_file() else []
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{' '.join(name.split())}, {threads} thread{'s' if threads > 1 else ''}"


def measure(
    architecture: str,
    degrees: Sequence[int],
    device: torch.device,
    batch_size: int,
    seconds: float,
    *,
    kwargs: dict[str, Any] | None = None,
    image_size: int = 224,
    compressor: str = "tome",
    precision: str = "fp32",
    modes: Sequence[str] = MODES,
    proportional_attention: bool = True,
) -> list[Rate]:
    """Time a model with random weights at each degree and mode.

    Args:
        architecture: a timm model. kwargs: overrides of its arguments.
        batch_size: images a forward pass. seconds: how long each degree is timed, at least one pass.

    Returns:
        A rate (from the median time of a pass) for each degree and mode.

    Raises:
        TocomError: the model cannot be built or compressed, or the device's memory does not hold the batch.
    """
    import torch

    from tocom.models import create
    from tocom.stages.throughput import inference_work, training_work
    from tocom.vit import CompressedViT

    # Weights that were trained without labels have no classifier, which a study gives them.
    arguments = (kwargs or {}) | {"img_size": image_size}
    model = create(architecture, {"num_classes": 1000} | arguments).to(device)
    vit = CompressedViT(model, compressor, proportional_attention=proportional_attention)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    name, rates = label(architecture, kwargs or {}), []
    for degree in degrees:
        vit.set_degree(degree)
        for mode in modes:
            make = training_work if mode == "train" else inference_work
            try:
                elapsed = _median_time(make(vit.train(mode == "train"), images, precision), device, seconds)
            except torch.OutOfMemoryError:
                raise TocomError(
                    f"{batch_size} images of {name} do not fit into the memory of {device_name(device)};"
                    " give a smaller --batch-size"
                ) from None
            speed = batch_size / elapsed
            rates.append(
                Rate(name, image_size, compressor, precision, device_name(device), int(degree), mode, float(speed))
            )
    return rates


def _median_time(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median seconds of a piece of work, repeated until ``budget`` seconds are used up."""
    from tocom.stages.throughput import seconds

    seconds(work, device)  # kernels are chosen and memory is taken in the first passes
    times, end = [seconds(work, device)], time.perf_counter() + budget
    while time.perf_counter() < end:
        times.append(seconds(work, device))
    return float(np.median(times))
