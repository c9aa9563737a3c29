"""How many images a second a device trains on and classifies, measured in seconds or read from an earlier file."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tocom.errors import TocomError
from tocom.files import write_text

if TYPE_CHECKING:
    import torch

    from tocom.vit import CompressedViT

#: Forward, loss and backward; forward alone.
MODES = ("train", "infer")
#: How many images of 224 x 224 pixels, or as many pixels in others, are in a pass that is timed.
BATCHES = {"cuda": 32, "cpu": 2}


class Head(NamedTuple):
    """The head of a model that labels pixels; its time, and that of the loss of every pixel, count."""

    kind: str
    classes: int


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


def label(architecture: str, kwargs: dict[str, Any], head: Head | None = None) -> str:
    """Return a name for a model by what its speed depends on, less image size and a classifier's classes."""
    shown = [f"{key}={value}" for key, value in sorted(kwargs.items()) if key not in ("img_size", "num_classes")]
    name = f"{architecture}({', '.join(shown)})" if shown else architecture
    return f"{name} + {head.kind} head of {head.classes} classes" if head else name


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


def default_batch(device: str, image_size: int, most: int) -> int:
    """Return how many images a timed pass has: enough to keep the device busy, few enough that it is soon done.

    Args:
        device: torch's type of device. image_size: side in pixels.
        most: as many as the study itself has in a step.
    """
    pixels = BATCHES.get(device, BATCHES["cuda"]) * 224**2
    return max(1, min(most, pixels // image_size**2))


def measure(
    architecture: str,
    degrees: Mapping[str, Sequence[int]],
    device: torch.device,
    batch_size: int,
    seconds: float,
    *,
    kwargs: dict[str, Any] | None = None,
    image_size: int = 224,
    compressor: str = "tome",
    precision: str = "fp32",
    proportional_attention: bool = True,
    head: Head | None = None,
    advance: Callable[[str], object] = lambda mode: None,
) -> list[Rate]:
    """Time a model with random weights at each degree and mode.

    Args:
        architecture: a timm model. kwargs: overrides of its arguments.
        degrees: mode -> the degrees at which it is timed.
        batch_size: images a pass. seconds: how long each degree and mode is timed, at least one pass.
        head: of a model that labels pixels; None: it classifies images.
        advance: called with the mode after each rate, for a progress bar.

    Returns:
        A rate (from the median time of a pass) for each degree and mode, by ascending degree.

    Raises:
        TocomError: the model cannot be built or compressed, or the device's memory does not hold the batch.
    """
    import torch

    from tocom.models import create
    from tocom.stages.throughput import random_images
    from tocom.vit import CompressedViT

    # Weights that were trained without labels have no classifier, which a study gives them.
    arguments = {"num_classes": 1000} | (kwargs or {}) | {"img_size": image_size} | ({"num_classes": 0} if head else {})
    vit = CompressedViT(create(architecture, arguments), compressor, proportional_attention=proportional_attention)
    images = random_images(vit, batch_size, device)
    make = _labelling(vit, head, images, precision) if head else _classifying(vit, images, precision)
    name, rates = label(architecture, kwargs or {}, head), []
    for degree, mode in sorted((degree, mode) for mode, found in degrees.items() for degree in found):
        vit.set_degree(degree)
        try:
            elapsed = _median_time(make(mode), device, seconds)
        except torch.OutOfMemoryError:
            raise TocomError(
                f"{batch_size} images of {name} do not fit into the memory of {device_name(device)};"
                " give a smaller --batch-size"
            ) from None
        speed = batch_size / elapsed
        rates.append(
            Rate(name, image_size, compressor, precision, device_name(device), int(degree), mode, float(speed))
        )
        advance(mode)
    return rates


def _classifying(vit: CompressedViT, images: torch.Tensor, precision: str) -> Callable[[str], Callable[[], object]]:
    """Return a function from a mode to a pass of images [B, 3, S, S] through a model that classifies them."""
    from tocom.stages.throughput import inference_work, training_work

    vit.to(images.device)

    def make(mode: str) -> Callable[[], object]:
        work = training_work if mode == "train" else inference_work
        return work(vit.train(mode == "train"), images, precision)

    return make


def _labelling(
    vit: CompressedViT, head: Head, images: torch.Tensor, precision: str
) -> Callable[[str], Callable[[], object]]:
    """Return a function from a mode to a pass of images [B, 3, S, S] through a model that labels their pixels.

    As in the stage itself, images that are not trained on are labelled, and their loss is computed.
    """
    import torch

    from tocom.segmentation.model import Segmenter, make_head, pixel_loss
    from tocom.segmentation.scenes import IGNORED
    from tocom.stages.throughput import step_work
    from tocom.training import autocast

    device = images.device
    segmenter = Segmenter(vit, make_head(head.kind, vit.model.embed_dim, head.classes)).to(device)
    shape = (len(images), *images.shape[-2:])
    labels = torch.randint(head.classes, shape, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.inference_mode()
    def infer() -> None:
        with autocast(precision, device):
            scores = segmenter(images)
        pixel_loss(scores, labels, IGNORED)
        scores.argmax(1)

    def make(mode: str) -> Callable[[], object]:
        segmenter.train(mode == "train")
        if mode == "infer":
            return infer
        return step_work(segmenter, lambda: pixel_loss(segmenter(images), labels, IGNORED), precision, device)

    return make


def _median_time(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median seconds of a piece of work, repeated until ``budget`` seconds are used up.

    The first pass, in which kernels are chosen and memory is taken, does not count, unless it takes all of the budget
    on a processor, where that makes little difference to so long a pass.
    """
    from tocom.stages.throughput import seconds

    first = seconds(work, device)
    if device.type == "cpu" and first >= budget:
        return first
    end = time.perf_counter() + budget
    times = [seconds(work, device)]
    while time.perf_counter() < end:
        times.append(seconds(work, device))
    return float(np.median(times))
