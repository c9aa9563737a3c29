"""Figures of the paper (arXiv 2408.06798) that ours are put beside; always marked as published."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field

from tocom.analysis.planned import Scope
from tocom.bundled import ASSETS
from tocom.files import read_yaml
from tocom.settings import Settings


class Published(Settings):
    """One published figure, and what ours have to be of to stand beside it."""

    of: Literal["largest gain", "miou", "gflops"] = Field(description="which figure it is")
    what: str = Field(description="the same in words, for tables")
    group: str = Field(description="group of tasks, or the one task, that it is an average over")
    tasks: int = Field(1, ge=1, description="how many tasks that group has")
    backbone: str | None = Field(None, description="model, where the paper's figure is known to be of one")
    timm: str = Field("", description="how timm's name of that model starts; nothing: any model")
    compressor: str = Field(description="compressor that it is of")
    compensator: str | None = Field(None, description="compensator that it is of; null: of the model without")
    train_degree: int | None = Field(None, ge=0, description="degree the model was trained at")
    infer_degree: int | None = Field(None, ge=0, description="degree it was run at")
    value: float = Field(description="the figure, in its unit")
    unit: Literal["points", "%", "GFLOPs"] = Field(description="unit of the value")
    source: str = Field(description="where it was published")

    def text(self) -> str:
        """Return the value; a gain has a sign."""
        return f"{self.value:+.1f}" if self.unit == "points" else f"{self.value:.1f}"

    def is_of(self, scope: Scope, timm: str | None, compressor: str, compensator: str | None) -> bool:
        """Return whether it may stand beside a figure of ours: of the same tasks, all of them, and the same model."""
        same_tasks = self.group in (scope.name, *scope.tasks) and self.tasks == len(scope.tasks)
        same_method = (self.compressor, self.compensator) == (compressor, compensator)
        return same_tasks and same_method and (timm or "").startswith(self.timm)


@cache
def read_published() -> tuple[Published, ...]:
    """Read the figures that ship with the package."""
    return tuple(map(Published.model_validate, read_yaml(ASSETS / "published.yaml")))
