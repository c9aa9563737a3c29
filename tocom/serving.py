"""Serve one fine-tuned model at a cost that changes: degrees that share its weights, chosen by a measured curve.

A degree is prepared once: a copy of the model's modules that shares every tensor with it but the weights that the
compensator changes at that degree. Nothing is written into a model that may be running, so that a batch ends at the
degree that it began at, whatever other threads do, and to switch copies nothing.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tocom.compressed import Compressed
from tocom.degrees import Degree, Inflected
from tocom.errors import TocomError
from tocom.files import read_rows, understood, write_rows
from tocom.folding import changed, check_deltas, mark
from tocom.methods import DEFAULTS
from tocom.models import compress, load_model, pick_device
from tocom.parts import load_part, source_degree
from tocom.settings import ThroughputSettings
from tocom.stages.evaluate import check_compensator
from tocom.stages.throughput import inference_work, side_by_side
from tocom.training import autocast

#: Columns of a curve's file.
_COLUMNS = ("degree", "batch_size", "seconds")


@dataclass(frozen=True)
class Curve:
    """What a batch takes at each degree.

    Attributes:
        seconds: degree -> size of a batch -> seconds.
        scores: degree -> how good the model is there, larger is better; without them, the lower the degree the better.

    Raises:
        TocomError: there is no degree, or a number that is not positive and finite.
    """

    seconds: Mapping[int, Mapping[int, float]]
    scores: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        """Refuse what no budget can be held against."""
        values = [value for sizes in self.seconds.values() for pair in sizes.items() for value in pair]
        if not values or not all(self.seconds.values()) or not all(isfinite(v) and v > 0 for v in values):
            raise TocomError("a curve needs degrees with positive sizes and seconds of a batch; measure one")
        if self.scores and set(self.scores) != set(self.seconds):
            raise TocomError("a curve's scores and seconds are of different degrees; give both for each, or no scores")

    @classmethod
    def read(cls, path: str | os.PathLike, scores: Mapping[int, float] | None = None) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            TocomError: the file is missing or no such table.
        """
        table = read_rows(path, _COLUMNS)
        if list(table.columns) != list(_COLUMNS) or any(table[it].dtype.kind not in "iu" for it in _COLUMNS[:2]):
            raise TocomError(f"{path} is no curve; it has columns {', '.join(_COLUMNS)}, the first two whole numbers")
        seconds: dict[int, dict[int, float]] = {}
        for degree, size, value in table.itertuples(index=False):
            seconds.setdefault(int(degree), {})[int(size)] = float(value)
        return cls(seconds, scores or {})

    def write(self, path: str | os.PathLike) -> None:
        """Write the seconds as CSV, from which they come back exactly."""
        rows = [(d, n, s) for d, sizes in self.seconds.items() for n, s in sizes.items()]
        write_rows([dict(zip(_COLUMNS, row, strict=True)) for row in rows], path)

    def time(self, degree: int, batch_size: int) -> float:
        """Return the seconds of a batch: linear between measured sizes, in proportion above the largest."""
        if degree not in self.seconds:
            raise TocomError(f"the curve has no degree {degree}; it has {', '.join(map(str, self.seconds))}")
        sizes = sorted(self.seconds[degree])
        known = [self.seconds[degree][size] for size in sizes]
        return float(np.interp(batch_size, sizes, known)) * max(1.0, batch_size / sizes[-1])

    def degree_for(self, batch_size: int, latency: float | None = None, throughput: float | None = None) -> int:
        """Return the best degree within a budget, or the fastest if none is.

        Args:
            latency: seconds that a batch may take. throughput: images a second that have to be reached.

        Raises:
            TocomError: there is no budget.
        """
        if latency is None and throughput is None:
            raise TocomError("there is no budget to choose a degree for; give latency (seconds) or throughput")
        budget = min(latency if latency is not None else np.inf, batch_size / throughput if throughput else np.inf)
        times = {degree: self.time(degree, batch_size) for degree in self.seconds}
        within = [degree for degree in times if times[degree] <= budget]
        if not within:
            return min(times, key=lambda degree: (times[degree], degree))
        return max(within, key=lambda degree: (self.scores.get(degree, -degree), -times[degree], -degree))


class Server:
    """One model at any degree, for several threads at a time.

    It takes the model over: an attached compensator is taken out of its weights and folded into those of the prepared
    degrees instead. Nobody may change the weights, or the mode, of the model or of what :meth:`at` returns.

    Args:
        model: with its compensator attached, if it has one.
        scale: factor on the compensator's update, or one for each degree; by default the one that it was attached with.
        keep: how many degrees stay prepared, the least recently used gives way. At most so many copies of the weights
            that the compensator changes are held, and those of evicted degrees that are still running.
        precision: "fp32", or autocast in "bf16" or "fp16".
        curve: what a batch takes; see :meth:`measure`.

    Attributes:
        degree: the degree of batches that name none; setting it prepares it.

    Raises:
        TocomError: ``keep`` is below 1.
    """

    def __init__(
        self,
        model: Compressed,
        scale: float | Mapping[int, float] | None = None,
        keep: int = 8,
        precision: str = "fp32",
        curve: Curve | None = None,
    ):
        if keep < 1:
            raise TocomError(f"keep {keep} is out of range: one degree at least stays prepared")
        degree, self.compensator = model.degree, model.compensator
        self._scale = model.scale if scale is None else scale
        self._model = model.detach().eval()
        self.keep, self.precision, self.curve = keep, precision, curve
        self._prepared: OrderedDict[str, Compressed] = OrderedDict()
        self._looking, self._preparing = Lock(), Lock()
        self.degree = degree

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        compensator: str | os.PathLike | None = None,
        device: str = "auto",
        **options: Any,
    ) -> Self:
        """Serve a fine-tuned checkpoint, with a compensator's file; see :func:`load_compressed`."""
        return cls(load_compressed(checkpoint, compensator, device), **options)

    @property
    def degree(self) -> Degree:
        """The degree of batches that name none."""
        return self._degree

    @degree.setter
    def degree(self, degree: Degree) -> None:
        self.at(degree)
        self._degree = degree

    @property
    def prepared(self) -> tuple[Degree, ...]:
        """The degrees that are prepared, the least recently used first."""
        with self._looking:
            return tuple(model.degree for model in self._prepared.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the model and of the prepared degrees, those that are shared counted once."""
        with self._looking:
            models = [self._model, *self._prepared.values()]
        tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        return sum({(tensor.data_ptr(), tensor.device): tensor.nbytes for tensor in tensors}.values())

    def at(self, degree: Degree) -> Compressed:
        """Return the model at a degree, prepared if it is not.

        Raises:
            TocomError: the degree is malformed, or beyond what the compensator was trained for.
        """
        listed = isinstance(degree, Sequence) and not isinstance(degree, Inflected)
        degree = tuple(degree) if listed else degree
        key = repr(degree)  # as values, an Inflected degree equals the pair of its numbers, and True equals 1
        found = self._find(key)
        if found is None:
            with self._preparing:  # one at a time; batches at degrees that are prepared go on
                found = self._find(key) or self._prepare(key, degree)
        return found

    def _find(self, key: str) -> Compressed | None:
        with self._looking:
            if key in self._prepared:
                self._prepared.move_to_end(key)
            return self._prepared.get(key)

    @torch.no_grad()
    def _prepare(self, key: str, degree: Degree) -> Compressed:
        """Return a copy of the model at a degree that shares with it all tensors that the compensator leaves alone."""
        source, model = self._model, self._model.model
        source.compressor.counts(degree, source.depth)  # refuses what is malformed before another gives way
        deltas = {} if self.compensator is None else self.compensator.deltas(source.source_degree, degree)
        scale = self.scale_at(degree) if deltas else 0.0
        check_deltas(model, deltas)
        with self._looking:
            while len(self._prepared) >= self.keep:
                self._prepared.popitem(last=False)
        shared = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
        own = {}
        for name, delta in deltas.items():
            parameter = model.get_parameter(name)
            folded = changed(parameter, delta, scale)
            if not torch.equal(folded, parameter):
                own[id(parameter)] = nn.Parameter(folded, requires_grad=False)
        copy = deepcopy(source, shared | own)  # what it finds in there, it does not copy
        copy.set_degree(degree)
        mark(copy.model, bool(own))
        with self._looking:
            self._prepared[key] = copy
        return copy

    def scale_at(self, degree: Degree) -> float:
        """Return the factor on the compensator's update at a degree.

        Raises:
            TocomError: scales were given, and none for this degree.
        """
        if not isinstance(self._scale, Mapping):
            return self._scale
        if degree not in self._scale:
            raise TocomError(f"no scale was given for degree {degree}; add one, or one scale for all degrees")
        return self._scale[degree]

    def __call__(
        self,
        batch: Tensor,
        degree: Degree | None = None,
        *,
        latency: float | None = None,
        throughput: float | None = None,
    ) -> Tensor:
        """Return the logits of a batch: what the model takes, or uint8 as it is stored.

        Args:
            degree: by default :attr:`degree`, as it is when the batch begins, or the best within a budget.
            latency: seconds that the batch may take. throughput: images a second that have to be reached.

        Raises:
            TocomError: there is a budget and no curve, or a degree is refused.
        """
        if latency is not None or throughput is not None:
            degree = self.choose(len(batch), latency, throughput)
        model = self.at(self.degree if degree is None else degree)
        device = next(model.parameters()).device
        with torch.inference_mode(), autocast(self.precision, device):
            batch = batch.to(device)
            return model(model.inputs(batch, model.model) if batch.dtype == torch.uint8 else batch)

    def choose(self, batch_size: int, latency: float | None = None, throughput: float | None = None) -> int:
        """Return the best degree within a budget; see :meth:`Curve.degree_for`.

        Raises:
            TocomError: there is no curve, or no budget.
        """
        if self.curve is None:
            raise TocomError("there is no curve to choose a degree by; call measure(), or give one")
        return self.curve.degree_for(batch_size, latency, throughput)

    def measure(
        self,
        degrees: Sequence[int],
        batch_sizes: Sequence[int] = (1, 8, 32),
        repeats: int = 20,
        quantile: float = 0.9,
        scores: Mapping[int, float] | None = None,
    ) -> Curve:
        """Measure what a batch takes at some degrees, side by side, and choose by it from now on.

        Args:
            quantile: which of the measured times a budget has to cover; 0.5: the median.
            scores: degree -> how good the model is there.

        Raises:
            TocomError: there are more degrees than stay prepared, or nothing is to be measured.
        """
        if repeats < 1 or not 0 <= quantile <= 1 or not degrees or not batch_sizes or min(batch_sizes) < 1:
            raise TocomError(
                "a curve needs degrees, sizes of batches, repeats of at least 1 and a quantile from 0 to 1"
            )
        if len(degrees) > self.keep:
            raise TocomError(f"{len(degrees)} degrees are to be measured, {self.keep} stay prepared; raise keep")
        models = {degree: self.at(degree) for degree in degrees}
        batches = {size: self._model.example(size) for size in batch_sizes}
        work = {
            (degree, size): inference_work(model, batch, self.precision)
            for degree, model in models.items()
            for size, batch in batches.items()
        }
        device = next(self._model.parameters()).device
        times = side_by_side(work, ThroughputSettings(repeats=repeats), device)
        seconds = {
            degree: {size: float(np.quantile(times[degree, size], quantile)) for size in batch_sizes}
            for degree in degrees
        }
        self.curve = Curve(seconds, scores or {})
        return self.curve


def load_compressed(
    checkpoint: str | os.PathLike, compensator: str | os.PathLike | None = None, device: str = "auto"
) -> Compressed:
    """Read a fine-tuned model behind the compressor that it was trained with, at its train degree.

    Args:
        checkpoint: what `tocom finetune` wrote, or a backbone, which counts as trained at degree 0 of the default one.
        compensator: its file, folder or name on the Hub (:func:`tocom.load_part`); it is attached.

    Raises:
        TocomError: a file is missing, corrupt or of another backbone; the model has no one train degree to compensate
            from, or a head of its own (segmentation), which is not served.
    """
    model, about = load_model(checkpoint)
    if "decoder" in about["beside"]:
        raise TocomError(f"{checkpoint} is for segmentation, which is not served; evaluate it (`tocom evaluate`)")
    with understood(checkpoint):
        source = source_degree(about.get("train_degree", "0"))
        kind = about.get("compressor", DEFAULTS["compressor"])
        compressed = compress(model.to(pick_device(device)), about, kind, source or 0)
    if compensator is not None:
        if source is None:
            raise TocomError(f"{checkpoint} was trained at no one degree, so that there is nothing to compensate from")
        part = load_part(compensator, "compensator")
        check_compensator(checkpoint, {"backbone_sha256": about["sha256"]} | about, model, part)
        compressed.attach(part)
    return compressed.eval()
