"""Which parameters a fine-tuning trains: all, the head, AdaptFormer's adapters, LoRA's, or none.

Imports neither torch nor timm nor peft until it is used, so that a workflow is planned quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tocom.errors import TocomError, suggest
from tocom.settings import TuningSettings

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TuningSettings", "apply_tuning", "is_head", "merge_tuning", "restore_adapters", "trainable"]


def is_head(name: str) -> bool:
    """Return whether a parameter of a timm ViT belongs to its classifier, which no two tasks share."""
    return name.startswith(("head.", "head_dist."))


def apply_tuning(model: nn.Module, settings: TuningSettings) -> nn.Module:
    """Prepare a timm ViT for training as ``settings`` say: add modules, and freeze what is not to be trained.

    At the start the model computes what it computed before. The initial weights of what is added are drawn from
    torch's global random state: set it first.

    Returns:
        The model, changed in place, with ``requires_grad`` set on just what is trained.

    Raises:
        TocomError: LoRA's targets are no linear layers of a block, peft is not installed, or only the head would be
            trained and there is none.
    """
    if settings.mode == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if settings.mode == "none":
        return model
    heads = [parameter for name, parameter in model.named_parameters() if is_head(name)]
    if settings.mode == "head" and not heads:
        raise TocomError("tuning mode 'head' has nothing to train: the model has no classifier; give it num_classes")
    if settings.mode == "adaptformer":
        restore_adapters(model, settings)
        for block in model.blocks:
            block.mlp.down.requires_grad_(True)
            block.mlp.up.requires_grad_(True)
    elif settings.mode == "lora":
        _add_lora(model, settings)
    for parameter in heads:
        parameter.requires_grad_(True)
    return model


def restore_adapters(model: nn.Module, settings: TuningSettings) -> None:
    """Add the modules that a checkpoint tuned with these settings has besides its architecture's (AdaptFormer's)."""
    if settings.mode == "adaptformer":
        from tocom.adapters import add_adapters, describe_adapters

        if describe_adapters(model):
            raise TocomError("the model already has AdaptFormer's adapters; start from its backbone")
        add_adapters(model, settings.adapter_width, settings.adapter_scale, settings.adapter_dropout)


def merge_tuning(model: nn.Module) -> nn.Module:
    """Add LoRA's updates to the weights they belong to, so that the model is an ordinary timm ViT again.

    A model without LoRA stays as it is; AdaptFormer's bottleneck is not linear and cannot be merged.

    Returns:
        The model, changed in place.

    Raises:
        TocomError: an update makes a weight NaN or infinite.
    """
    if not hasattr(model, "peft_config"):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except ValueError:
            raise TocomError(f"LoRA's update of {name} is not finite; lower the learning rate") from None
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def trainable(model: nn.Module) -> dict[str, int]:
    """Return how many numbers there are in each parameter that is trained: name -> count."""
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _add_lora(model: nn.Module, settings: TuningSettings) -> None:
    from torch import nn

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise TocomError("tuning mode 'lora' needs peft; pip install peft") from None
    linear = {name for name, module in model.blocks[0].named_modules() if isinstance(module, nn.Linear)}
    for target in settings.lora_targets:
        if target not in linear:
            raise TocomError(
                f"lora_targets: a block has no linear layer {target!r}{suggest(target, linear)};"
                f" it has {', '.join(sorted(linear))}"
            )
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets)
    )
    inject_adapter_in_model(config, model)
