"""Linear probing: the classifier alone is trained."""

from __future__ import annotations

from torch import nn

from tocom.errors import TocomError
from tocom.parts import Tuning, train_heads


class Head(Tuning):
    """Train the head; the backbone stays as it was pre-trained."""

    title = "linear probe"
    reference = "common practice"
    trains = "the head"
    needs = "labelled images of the task"

    def prepare(self, model: nn.Module) -> None:
        """Train the classifier.

        Raises:
            TocomError: the model has none.
        """
        if not train_heads(model):
            raise TocomError("tuning 'head' has nothing to train: the model has no classifier; give it num_classes")
