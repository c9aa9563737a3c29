"""LoRA (arXiv 2106.09685) by peft: low-rank updates of linear layers, merged into them once training is over."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from tocom.errors import TocomError, suggest
from tocom.parts import Tuning, TuningOptions, train_heads
from tocom.settings import Fraction, Positive


class LoRAOptions(TuningOptions):
    """Options of :class:`LoRA`."""

    rank: Positive = Field(8, description="rank of the update")
    alpha: float = Field(8.0, gt=0, description="the update is scaled by alpha / rank")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("attn.qkv",), description="linear layers of a block that are updated (attn.qkv, attn.proj, mlp.fc1, ...)"
    )
    dropout: Fraction = Field(0.0, description="dropout on the input of the updates while training")


class LoRA(Tuning):
    """Train low-rank updates of some linear layers, and the head."""

    Options = LoRAOptions
    title = "LoRA"
    reference = "arXiv 2106.09685"
    trains = "low-rank updates and the head"
    needs = "labelled images of the task"

    def prepare(self, model: nn.Module) -> None:
        """Put the updates beside their layers.

        Raises:
            TocomError: a target is no linear layer of a block.
        """
        from peft import LoraConfig, inject_adapter_in_model

        options = self.options
        linear = {name for name, module in model.blocks[0].named_modules() if isinstance(module, nn.Linear)}
        for target in options.targets:
            if target not in linear:
                raise TocomError(
                    f"lora targets: a block has no linear layer {target!r}{suggest(target, linear)};"
                    f" it has {', '.join(sorted(linear))}"
                )
        train_heads(model)
        heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout}
        config = LoraConfig(**settings, target_modules=list(options.targets))
        inject_adapter_in_model(config, model)
        for parameter in heads:
            parameter.requires_grad_(True)

    def finish(self, model: nn.Module) -> None:
        """Add the updates to the weights they belong to, so that the model is an ordinary timm ViT again.

        Raises:
            TocomError: an update makes a weight NaN or infinite.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, layer in layers:
            try:
                layer.merge(safe_merge=True)
            except ValueError:
                raise TocomError(f"LoRA's update of {name} is not finite; lower the learning rate") from None
            model.set_submodule(name, layer.get_base_layer())
        del model.peft_config
