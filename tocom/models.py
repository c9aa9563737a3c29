"""Backbones and checkpoints: models of timm and transformers in, safetensors out."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tocom import lm
from tocom.bundled import resolve
from tocom.compressed import Compressed
from tocom.errors import TocomError, first_line, suggest
from tocom.files import check_finite, digest, load_metadata, load_tensors, refuse_bomb, save_tensors, understood
from tocom.files import sha256 as sha256_of
from tocom.folding import is_folded
from tocom.gpus import claim
from tocom.hub import download
from tocom.made import made
from tocom.parts import Compressor, describe, is_head, make_part
from tocom.vit import CompressedViT


@dataclass(frozen=True)
class Backbone:
    """A published backbone.

    Attributes:
        architecture: timm's name with the tag of its weights. revision: commit of its repository on the Hub.
        proportional_attention: whether ToMe adds log(token size) to its attention logits.
        note: what has to be known before it is used.
    """

    architecture: str
    revision: str
    proportional_attention: bool = True
    note: str = ""


#: The backbones of the paper (arXiv 2408.06798). The revisions are the commits of the ``timm`` organisation on the Hub
#: that added ``model.safetensors``, read off the Hub's pages; a later commit of AugReg's may have written it anew.
PAPER_BACKBONES = {
    "deit_b": Backbone("deit_base_patch16_224.fb_in1k", "4c8c236981c8902ea7af4e83b6fe0270812e03d4"),
    "deit_s": Backbone("deit_small_patch16_224.fb_in1k", "38e0e3a79073772ea54733b87885d3d7f6348e8a"),
    "vit_b_mae": Backbone(
        "vit_base_patch16_224.mae",
        "9085cfddecbe125d73b95d25b7d4eb4832f216fa",
        proportional_attention=False,
        note="self-supervised, so it has no classifier: ToCom cannot be distilled on it before it is given one",
    ),
    "vit_b_augreg": Backbone(
        "vit_base_patch16_224.augreg_in21k_ft_in1k",
        "b5b38b8f7dd93ce67d12e356a8771556b95c8cf9",
        note="what timm 0.4.12, which the public code asks for, calls vit_base_patch16_224; the paper names no file",
    ),
}


#: Families of models; the first that takes a model wraps it. What builds an architecture that is not timm's.
FAMILIES: tuple[type[Compressed], ...] = (lm.CompressedLM, CompressedViT)
BUILDERS: dict[str, Callable[[str, dict], nn.Module]] = dict.fromkeys(lm.ARCHITECTURES, lm.build)

#: Prefixes of the parameters that are saved beside those of a timm ViT.
BESIDE = ("compressor", "decoder")


def default_proportional_attention(architecture: str) -> bool:
    """Return whether proportional attention suits a timm model, by the tag of its weights.

    It is on for supervised models (DeiT, AugReg) and off for MAE models used off the shelf (ToMe, arXiv 2210.09461,
    section 4).
    """
    return "mae" not in architecture.partition(".")[2].split("_")


def create(architecture: str, kwargs: dict[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """Build a model by name: one of :data:`BUILDERS`, or of timm with overrides of its constructor's arguments.

    Raises:
        TocomError: there is no such model, it refuses an argument, or its weights cannot be fetched.
    """
    if architecture in BUILDERS:
        return BUILDERS[architecture](architecture, kwargs or {})
    _check_name(architecture)
    try:
        return timm.create_model(architecture, pretrained=pretrained, **(kwargs or {}))
    except Exception as error:
        raise TocomError(f"timm could not build {architecture!r}: {first_line(error)}") from error


def family_of(model: nn.Module) -> type[Compressed]:
    """Return the class that puts a compressor into a model."""
    return next(family for family in FAMILIES if family.takes(model))


def _check_name(architecture: str) -> None:
    if not timm.is_model(architecture.split(".")[0]):
        names = [*timm.list_models("*vit*"), *timm.list_models("deit*"), *BUILDERS]
        raise TocomError(f"timm has no model {architecture!r}{suggest(architecture, names)}; see `tocom models`")


def compressible(pattern: str) -> list[tuple[str, str]]:
    """Return (name, module) of the timm models built by the modules whose ViTs can be compressed.

    Some of them have parts that are refused by name when they are wrapped (see :mod:`tocom.vit`).
    """
    modules = ("vision_transformer", "deit")
    return [(name, module) for module in modules for name in timm.list_models(pattern, module=module)]


def save_model(
    path: str | os.PathLike,
    model: nn.Module,
    architecture: str,
    kwargs: dict,
    beside: dict[str, nn.Module] | None = None,
    **metadata,
) -> None:
    """Write a model with what is needed to build it again.

    Args:
        beside: modules that are no part of the timm ViT, by the prefix that the names of their parameters get: a
            compressor with parameters, the head of a segmenter.
        metadata: what else is stored with it; ``tuning`` names what it has besides its architecture's modules.

    Raises:
        TocomError: a compensator is folded into the weights, which would be saved with it.
    """
    if is_folded(model):
        raise TocomError("a compensator is folded into this model; detach it before saving, and save it on its own")
    tensors = model.state_dict()
    for prefix, module in (beside or {}).items():
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    described = {
        "format": 1,
        "kind": "model",
        "architecture": architecture,
        "kwargs": kwargs,
        "sha256": digest(tensors),
    }
    save_tensors(path, tensors, metadata | described)


def load_model(checkpoint: str | os.PathLike, num_classes: int | None = None, **overrides) -> tuple[nn.Module, dict]:
    """Build the model that a checkpoint describes and load its weights.

    Args:
        checkpoint: a bundled name (see :data:`tocom.bundled.BUNDLED`) or a path.
        num_classes: replace the head by a new one for so many classes; its initial weights are zero, so
            that they do not depend on a random state.
        overrides: constructor arguments that do not change the weights (``drop_path_rate``).

    Returns:
        The model in eval mode, with the modules that its ``tuning`` added, and the checkpoint's metadata
        (``proportional_attention`` is absent where it is on). What was saved beside it is under ``beside``: prefix ->
        state.

    Raises:
        TocomError: the file is missing, corrupt, of another kind, a pickle, or does not match its hash.
    """
    path = resolve(checkpoint)
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "model":
        raise TocomError(f"{path} holds {meta.get('kind', 'something else')}, not a model; check the path")
    check_finite(tensors, path)
    with understood(path):
        if digest(tensors) != meta["sha256"]:
            raise TocomError(f"{path} is corrupt: its weights do not match their hash; make or fetch it again")
        architecture, kwargs = str(meta["architecture"]), dict(meta["kwargs"])
        _check_declared(path, architecture, kwargs, tensors)
        model = create(architecture, kwargs | overrides)
        if "tuning" in meta:
            make_part("tuning", meta["tuning"]).restore(model)
    own, meta["beside"] = _separated(tensors)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise TocomError(f"{path} does not fit {meta['architecture']!r} as it is built here: {reason}") from None
    if num_classes is not None:
        model.reset_classifier(num_classes)
        for head in (model.head, getattr(model, "head_dist", None)):
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
    return model.eval(), meta


def _check_declared(path: Path, architecture: str, kwargs: dict, tensors: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose metadata describe a model that is far larger than its weights, before it is built."""
    numbers = [value for value in kwargs.values() if isinstance(value, int | float)]
    depth = max([value for key, value in kwargs.items() if key in ("depth", "num_hidden_layers")], default=0)
    longest = max((side for value in tensors.values() for side in value.shape), default=0)
    larger = depth > len(tensors)
    if not larger and max(numbers, default=0) > 4 * longest:  # few are: to build it without memory takes its time
        with torch.device("meta"):
            built = sum(value.numel() for value in create(architecture, kwargs).parameters())
        larger = built > 2 * sum(value.numel() for value in tensors.values())
    if larger:
        raise TocomError(f"{path} describes a model that is far larger than its weights; take it from its source again")


def _separated(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Separate the weights of a timm ViT from those that were saved beside it."""
    own, beside = {}, {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix in BESIDE:
            beside.setdefault(prefix, {})[rest] = value
        else:
            own[name] = value
    return own, beside


def compress(model: nn.Module, about: dict, compressor: str | dict | Compressor, degree: int = 0) -> Compressed:
    """Wrap a loaded model as its checkpoint's metadata say it is to be run, its compressor's state loaded.

    A model that was trained behind a compressor of another kind, at degree 0, has no state for this one.
    """
    family = family_of(model)
    part = make_part("compressor", compressor, family.shape_of(model), about.get("max_degree", 0))
    state = about.get("beside", {}).get("compressor")
    if state and about.get("compressor", {}).get("kind") in (None, describe(part)["kind"]):
        part.load_state_dict(state)  # before it sees the model, which may have been fine-tuned since
    part.to(next(model.parameters()).device)
    return family(model, part, degree, **family.how(about))


# --- foreign weights ------------------------------------------------------------------------------------------------


def import_backbone(
    output: str | os.PathLike,
    architecture: str,
    *,
    weights: str | os.PathLike | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    kwargs: dict[str, Any] | None = None,
    proportional_attention: bool | None = None,
    num_classes: int | None = None,
    sha256: str | None = None,
    ema: bool = False,
) -> dict:
    """Write a timm ViT with published or local weights as a checkpoint of this project.

    Args:
        output: the checkpoint to write.
        architecture: timm's name, with or without a tag; the tag also decides the mean and std of its input.
        weights: a local file (.safetensors, .npz as AugReg's, or .pth, .pt, .bin, .tar with nothing but tensors);
            by default what timm names for the tag, from the Hub. Of wrappers, ``model``, ``state_dict`` and the
            prefix ``module.`` are taken off.
        revision: commit, tag or branch of the Hub's repository; by default its newest.
        image_size: side of the input in pixels; by default that of the weights' tag. Position embeddings are
            resampled (bicubic) if the weights are for another.
        kwargs: further arguments of the model's constructor.
        proportional_attention: see :func:`default_proportional_attention`, which is the default.
        num_classes: 0 drops the classifier; by default the file's own is kept, or none if it has none.
        sha256: refuse a file of weights with another SHA-256.
        ema: take the averaged weights, where the file holds both.

    Returns:
        The metadata stored with the checkpoint: architecture with its tag, kwargs that build it again, weights (name
        of the file), weights_sha256, revision (the commit, where the weights come from the Hub),
        proportional_attention.

    Raises:
        TocomError: the name or an argument is wrong, the file cannot be had, holds code, has another hash or does not
            fit the architecture (the weights are named), or the model is one that cannot be compressed.
    """
    architecture = _full_name(architecture)
    if weights is not None and revision is not None:
        raise TocomError("a local file of weights has no revision; give either weights or revision")
    if weights is None:
        path, revision = _fetch(architecture, revision)
    else:
        path = Path(weights)
    kwargs = dict(kwargs or {}) | ({} if image_size is None else {"img_size": image_size})
    model, hashed = _build(path, architecture, kwargs, num_classes, sha256, ema)
    if proportional_attention is None:
        proportional_attention = default_proportional_attention(architecture)
    CompressedViT(model)  # refuses by name what cannot be compressed
    height, width = model.patch_embed.img_size
    metadata = {
        "architecture": architecture,
        "kwargs": kwargs
        | {
            "img_size": height if height == width else [height, width],
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
        },
        "weights": path.name,
        "weights_sha256": hashed,
        "revision": revision,
        "proportional_attention": proportional_attention,
    }
    job = {"architecture": architecture, "kwargs": kwargs, "num_classes": num_classes, "revision": revision}
    metadata["made"] = made(job, output, {"weights": path})
    save_model(output, model, **metadata)
    return metadata


def load_fine_tuned(
    weights: str | os.PathLike,
    backbone: str | os.PathLike,
    num_classes: int | None = None,
    train_degree: str | None = None,
    compressor: dict | None = None,
) -> tuple[nn.Module, dict]:
    """Load a model that was fine-tuned elsewhere from a backbone, to be used as it is (off the shelf).

    Args:
        weights: a checkpoint of this project (a bundled name or a path), or any file of weights that
            :func:`import_backbone` reads, for the backbone's architecture.
        backbone: the backbone's checkpoint: what the compensator is distilled on.
        num_classes: refuse a classifier for another number of classes.
        train_degree, compressor: refuse a checkpoint of this project that says it was trained in another way.

    Returns:
        The model in eval mode, and metadata to store it with: the backbone's (``sha256`` is the backbone's, by which
        a compensator knows it), with the model's own kwargs and tuning, and ``fine_tuned``: name and SHA-256 of the
        file.

    Raises:
        TocomError: a file is missing, corrupt or holds code, does not fit the backbone or the number of classes, or
            says that it was trained from another backbone or in another way.
    """
    path = resolve(weights)
    reference, described = load_model(backbone)
    if _is_own(path):
        model, own = load_model(path)
        hashed = sha256_of(path)
        _check_origin(path, own, described, train_degree, compressor)
    else:
        kwargs = {key: value for key, value in described["kwargs"].items() if key != "num_classes"}
        model, hashed = _build(path, described["architecture"], kwargs, None, None, False)
        own = {"architecture": described["architecture"], "kwargs": kwargs | {"num_classes": model.num_classes}}
    shapes = [family_of(it).geometry(it) for it in (model, reference)]
    if shapes[0] != shapes[1]:
        raise TocomError(
            f"{path} is no fine-tuned {backbone}: blocks, width, patch and input size are {shapes[0]}, not {shapes[1]};"
            " name the backbone that it was fine-tuned from"
        )
    classes = family_of(model).outputs(model)
    if num_classes is not None and classes != num_classes:
        raise TocomError(
            f"{path} has a classifier for {classes} classes, the task has {num_classes};"
            " name the model that was fine-tuned for this task"
        )
    for key in ("tuning", "beside"):
        described.pop(key, None)
    kept = {key: own[key] for key in ("architecture", "kwargs", "tuning", "compressor", "beside") if key in own}
    return model.eval(), described | kept | {"fine_tuned": {"file": path.name, "sha256": hashed}}


def _check_origin(path: Path, own: dict, backbone: dict, train_degree: str | None, compressor: dict | None) -> None:
    """Raise TocomError if a checkpoint's metadata say that it was not trained from this backbone in this way.

    At degree 0 nothing is compressed, so that neither the compressor nor the kind of attention made a difference.
    """
    wanted = {"backbone_sha256": backbone["sha256"], "train_degree": train_degree}
    if own.get("train_degree") != "0":
        wanted |= {
            "compressor": compressor,
            "proportional_attention": backbone.get("proportional_attention", True),
        }
    if own["sha256"] == backbone["sha256"]:
        del wanted["backbone_sha256"]  # it is the backbone, which may itself have been fine-tuned from another
    for name, value in wanted.items():
        if value is not None and own.get(name, value) != value:
            raise TocomError(
                f"{path} says that it was trained with {name} {own[name]}, not {value}, so it cannot be used as it is"
                " here; name the model that was, or correct the backbone or train_degrees"
            )


def check_classifier(model: nn.Module, name: str | os.PathLike) -> None:
    """Raise TocomError unless a model has a classifier: distillation compares logits (method: KL of two outputs)."""
    if not family_of(model).outputs(model):
        raise TocomError(
            f"{name} has no classifier, so there are no logits to distil; import weights with one"
            " (for MAE: those fine-tuned on ImageNet-1k)"
        )


def _is_own(path: Path) -> bool:
    """Return whether a file is a checkpoint that :func:`save_model` wrote."""
    return path.suffix == ".safetensors" and load_metadata(path).get("kind") == "model"


def _full_name(architecture: str) -> str:
    """Return timm's name with the tag of its weights, the default one if none is given."""
    _check_name(architecture)
    try:
        cfg = get_pretrained_cfg(architecture)
    except RuntimeError:
        base, _, tag = architecture.partition(".")
        known = timm.list_pretrained(f"{base}.*")
        raise TocomError(
            f"timm has no weights {tag!r} for {base!r}{suggest(architecture, known)};"
            f" it has {', '.join(name.partition('.')[2] for name in known) or 'none'}"
        ) from None
    return architecture if cfg is None or not cfg.tag else f"{cfg.architecture}.{cfg.tag}"


def _fetch(architecture: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the file of timm's weights in the Hub's cache, fetched if it is not there, and its commit."""
    cfg = get_pretrained_cfg(architecture)
    if cfg is None or not cfg.hf_hub_id:
        raise TocomError(f"timm names no weights on the Hub for {architecture!r}; give a local file of weights")
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return download(cfg.hf_hub_id, names, revision, "give a local file of weights")


def _build(
    path: Path, architecture: str, kwargs: dict, num_classes: int | None, expected: str | None, ema: bool
) -> tuple[nn.Module, str]:
    """Build a model with a file's weights, all of them; return it with the file's SHA-256."""
    refuse_bomb(path)
    hashed = sha256_of(path)
    if expected is not None and hashed != expected.lower():
        raise TocomError(f"{path} has SHA-256 {hashed}, not {expected}; fetch it again or correct the hash")
    _check_size(architecture, kwargs)
    if path.suffix == ".npz":
        classes = _npz_classes(path)
        source: dict[str, Any] = {"file": str(path), "custom_load": True}
    else:
        state = _read_weights(path, ema)
        classes = _classes(state, architecture)
        if num_classes == 0:
            state = {name: value for name, value in state.items() if not is_head(name)}
        source = {"state_dict": state}
    if num_classes not in (None, 0, classes):
        raise TocomError(
            f"{path} has {f'a classifier for {classes} classes' if classes else 'no classifier'}, not one for"
            f" {num_classes}; leave num_classes out, a fine-tuning puts in its own"
        )
    wanted = 0 if num_classes == 0 else classes
    overlay = kwargs.get("pretrained_cfg_overlay", {}) | source | {"num_classes": wanted}
    try:
        model = timm.create_model(
            architecture,
            pretrained=True,
            **kwargs | {"num_classes": wanted, "pretrained_cfg_overlay": overlay},
        )
    except Exception as error:  # timm raises key, value and runtime errors alike for weights that do not fit
        raise TocomError(
            f"{path} does not fit {architecture!r}: {_mismatch(error)}; check the architecture and its kwargs"
        ) from None
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of all weights
    return model.eval(), hashed


def _check_size(architecture: str, kwargs: dict) -> None:
    """Refuse an input size that the patches do not tile: timm would leave out a margin of every image."""
    sizes = kwargs.get("img_size")
    for side in sizes if isinstance(sizes, list | tuple) else [sizes]:
        patch = kwargs.get("patch_size") or _patch_size(architecture)
        if side is not None and patch:
            check_patches(side, patch)


def check_patches(side: int, patch: int) -> None:
    """Raise TocomError unless patches of ``patch`` pixels tile images of ``side`` pixels."""
    if side % patch:
        near = max(patch, round(side / patch) * patch)
        raise TocomError(f"image size {side} is no multiple of the {patch}-pixel patches; use {near}")


def set_image_size(model: nn.Module, side: int) -> None:
    """Have a timm ViT take images of ``side`` x ``side`` pixels; its position embedding is resampled."""
    if tuple(model.patch_embed.img_size) != (side, side):
        model.set_input_size(img_size=(side, side))


def _patch_size(architecture: str) -> int | None:
    """Return the side of the patches that timm's name for a ViT tells, if it does."""
    match = re.search(r"patch(\d+)", architecture)
    return int(match[1]) if match else None


def _mismatch(error: Exception) -> str:
    """Return on one line what load_state_dict found missing, unexpected or of another shape."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if lines and lines[0].startswith("Error(s) in loading"):
        shown = [textwrap.shorten(line, 150, placeholder=" ...").rstrip(". ") for line in lines[1:4]]
        return "; ".join(shown) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
    return lines[0] if lines else type(error).__name__


def _read_weights(path: Path, ema: bool) -> dict[str, Tensor]:
    """Read named tensors with timm, which takes off wrappers and prefixes and runs no code."""
    try:
        state = timm.models.load_state_dict(str(path), use_ema=ema)
    except Exception:  # safetensors, zip, pickle and torch raise errors of their own
        raise TocomError(
            f"{path} cannot be read as tensors alone and is refused, since pickles can run code;"
            " save the model's state_dict, best as safetensors"
        ) from None
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        what = f"{strange[0]!r} is no tensor" if strange else "it is empty"
        raise TocomError(f"{path} holds no weights by name ({what}); save the model's state_dict")
    check_finite(state, path)
    return state


def _classes(state: dict[str, Tensor], architecture: str) -> int:
    """Return for how many classes the weights have a classifier, 0 if they have none."""
    if "head.weight" in state:
        return len(state["head.weight"]) if state["head.weight"].ndim else 0
    if "patch_embed.proj.weight" in state:
        return 0
    cfg = get_pretrained_cfg(architecture)  # a layout that timm converts: what it converts to, its registry says
    return cfg.num_classes if cfg else 0


def _npz_classes(path: Path) -> int:
    """Return for how many classes an AugReg file has a classifier, 0 if it has none."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            heads = [name for name in arrays.files if name.endswith("head/bias")]
            return len(arrays[heads[0]]) if heads else 0
    except Exception as error:  # zip, value and OS errors alike
        raise TocomError(f"{path} cannot be read as arrays alone and is refused ({first_line(error)})") from None


def pick_device(device: str = "auto") -> torch.device:
    """Return the device that "auto", "cpu", "cuda" or "cuda:1" stands for.

    "cuda" is a GPU that no other job of this user on this machine has: where several are to be seen, it waits for a
    free one and hides the others from this process (:func:`tocom.gpus.claim`). "auto" and "cuda:1" claim nothing.

    Raises:
        TocomError: there is no such device, or a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise TocomError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")
    if device == "cuda" and not torch.cuda.is_initialized():
        claim()  # before the next line, which starts CUDA
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TocomError(f"device {device!r} was asked for, but torch sees no GPU; set device: cpu")
    return chosen
