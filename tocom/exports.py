"""Write a model at one degree as a program for other runtimes: torch.export (.pt2) and ONNX (.onnx)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tocom.compressed import Compressed
from tocom.errors import TocomError, first_line
from tocom.files import atomic
from tocom.folding import is_folded
from tocom.parts import describe

#: What ONNX needs that the package does not ask for: the extra "export".
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
#: Sizes of the batches that a program for any size is compared on.
_SIZES = (1, 2, 7)
#: Where a program's file says what it is.
_ABOUT = "tocom.about"


class Difference(NamedTuple):
    """How far a written program is from the model: the largest difference of a logit, and the largest logit."""

    largest: float
    logit: float

    @property
    def relative(self) -> float:
        """The one as a share of the other."""
        return self.largest / self.logit if self.logit else self.largest


@torch.no_grad()
def export(
    model: Compressed, path: str | os.PathLike, batch_size: int | None = None, tolerance: float = 1e-4
) -> Difference:
    """Write a model at its present degree, a compensator folded in, and compare what was written with the model.

    The program takes what the model takes (normalised images [B, 3, H, W]) and gives logits. How many tokens a block
    removes is fixed in it; which ones, is found as it runs. The file also says its degree and how images are normalised
    (of ONNX: ``metadata_props``; of torch.export: an extra file; under the key ``tocom.about``, as JSON).

    Args:
        model: on a CPU, in eval mode.
        path: ends in .onnx or .pt2.
        batch_size: the only size of a batch; None: any size.
        tolerance: largest difference from the model, as a share of the largest logit, with which the file is kept.

    Raises:
        TocomError: the ending is another, a package is missing, the model is in train mode, on another device or of a
            server or cannot be exported, or the difference is beyond the tolerance. There is no file then.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise TocomError(f"{path} ends in {path.suffix or 'nothing'!r}; give a file that ends in .onnx or .pt2")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise TocomError(f"ONNX needs {' and '.join(missing)}; pip install {' '.join(_NEEDED)}")
    if model.training or next(model.parameters()).device.type != "cpu":
        raise TocomError("a model is exported from a CPU and in eval mode; call model.cpu().eval() first")
    if model.compensator is None and is_folded(model.model):
        raise TocomError(
            "a compensator is folded into this model of a server, which does not say which; export the model that it is"
            " attached to (tocom.load_compressed)"
        )
    program, sizes = _program(model, batch_size), _SIZES if batch_size is None else (batch_size,)
    write, read = _WRITERS[path.suffix]
    with atomic(path) as temporary:
        write(program, temporary, json.dumps(about(model), sort_keys=True))
        found = _compared(model, read(temporary), sizes)
        if not found.relative <= tolerance:  # NaN is beyond, too
            raise TocomError(
                f"what was exported differs from the model by {found.largest:.2g} where the largest logit is"
                f" {found.logit:.3g}, beyond the tolerance of {tolerance:g} of it, and is not kept; export another"
                " degree, or allow more (tolerance)"
            )
    return found


def about(model: Compressed) -> dict[str, Any]:
    """Return what a program's file says of itself."""
    compensator = model.compensator
    return {
        "degree": model.degree,
        "source_degree": model.source_degree,
        "compressor": describe(model.compressor),
        "compensator": None if compensator is None else describe(compensator),
        "scale": 0.0 if compensator is None else model.scale,
        "input": model.run_as(model.model),
    }


def _program(model: Compressed, batch_size: int | None) -> torch.export.ExportedProgram:
    example = model.example(batch_size or _SIZES[-1])
    shapes = ({0: torch.export.Dim.DYNAMIC},) if batch_size is None else None
    try:
        with _quietly():
            return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises errors of many kinds
        fix = "; name the one size that it is to take (batch_size)" if batch_size is None else ""
        raise TocomError(f"{model.compressor.title} cannot be exported ({first_line(error)}){fix}") from error


def _compared(model: Compressed, run: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> Difference:
    largest, logit = 0.0, 0.0
    for size in sizes:
        batch = model.example(size)
        expected = model(batch)
        difference = (run(batch) - expected).abs().max()
        largest, logit = (
            float(torch.maximum(torch.tensor(largest), difference)),
            max(logit, float(expected.abs().max())),
        )
    return Difference(largest, logit)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, said: str) -> None:
    try:
        with _quietly():
            onnx = torch.onnx.export(program, dynamo=True, verbose=False)
            onnx.model.metadata_props[_ABOUT] = said
            onnx.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise TocomError(f"torch cannot write it as ONNX ({first_line(error)}); write a .pt2 instead") from error


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def _write_pt2(program: torch.export.ExportedProgram, path: Path, said: str) -> None:
    written = BytesIO()  # torch's own writer ends the process where a disk is full
    with _quietly():
        torch.export.save(program, written, extra_files={_ABOUT: said})
    path.write_bytes(written.getbuffer())


def _read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with _quietly():
        return torch.export.load(path).module()


_WRITERS = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_pt2, _read_pt2)}


def _quietly() -> warnings.catch_warnings:
    """Return a context without the warnings of exporters, which are about their own insides."""
    return warnings.catch_warnings(action="ignore")
