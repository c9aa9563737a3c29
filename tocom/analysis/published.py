"""Figures of the paper (arXiv 2408.06798) that ours are put beside; always marked as published."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from tocom.errors import TocomError
from tocom.settings import Settings, explain

PATH = Path(__file__).parents[1] / "assets" / "published.yaml"
#: The model whose largest gains were published: its compressor, and how timm's names of DeiT-B start.
COMPRESSOR, TIMM = "tome", "deit_base_patch16_224"


class Published(Settings):
    """One published figure."""

    of: Literal["largest gain", "miou", "gflops"] = Field(description="which figure it is")
    what: str = Field(description="the same in words, for tables")
    group: str = Field(description="group of tasks or data set that it is an average over")
    tasks: int | None = Field(None, ge=1, description="how many tasks that group has")
    backbone: str | None = Field(None, description="model, where the paper's figure is known to be of one")
    train_degree: int | None = Field(None, ge=0, description="degree the model was trained at")
    infer_degree: int | None = Field(None, ge=0, description="degree it was run at")
    compensated: bool | None = Field(None, description="with ToCom or without")
    value: float = Field(description="the figure, in its unit")
    unit: Literal["points", "%", "GFLOPs"] = Field(description="unit of the value")
    source: str = Field(description="where it was published")

    def text(self) -> str:
        """Return the value; a gain has a sign."""
        return f"{self.value:+.1f}" if self.unit == "points" else f"{self.value:.1f}"


@cache
def read_published(path: Path = PATH) -> tuple[Published, ...]:
    """Read the figures that ship with the package, or those of another file of the same form.

    Raises:
        TocomError: the file is missing or an entry is not a published figure.
    """
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return tuple(TypeAdapter(list[Published]).validate_python(entries))
    except (OSError, yaml.YAMLError) as error:
        raise TocomError(f"cannot read {path}: {' '.join(str(error).split())}; install the package again") from None
    except ValidationError as error:
        raise explain(error, str(path)) from None


def largest_gain(group: str, n_tasks: int, compressor: str, timm: str | None) -> Published | None:
    """Return the published largest average gain that may stand beside a model's, or None if there is none.

    Args:
        group: name of the group of tasks. n_tasks: how many of them there are; a part of a group has no figure.
        compressor: name of the model's compressor. timm: timm's name of its backbone, if it is one of timm's.
    """
    if compressor != COMPRESSOR or not (timm or "").startswith(TIMM):
        return None
    wanted = ("largest gain", group, n_tasks)
    return next((figure for figure in read_published() if (figure.of, figure.group, figure.tasks) == wanted), None)
