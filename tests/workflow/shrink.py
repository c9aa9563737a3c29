"""The studies of config/, small enough to run in a minute: same tasks' formats, recipes and tables, tiny models."""

import yaml

ARCHITECTURE = {
    "architecture": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 41},
    "image_size": 32,
    "patch_size": 8,
}
TINY = {
    "pretrain": {"device": "cpu", "epochs": 1, "images": 96, "held_out": 32, "threads": 1},
    "throughput": {"device": "cpu", "batch_size": 4, "repeats": 2, "warmup": 1},
    "analysis": {"resamples": 50},
    "seeds": [0, 1],
    "infer_degrees": [0, 4],
    "max_degree": 4,
    "checkpoints_per_job": 100,
}
#: Variants of ToCom that a tiny run keeps: one of each kind, as every other would take as long again.
VARIANTS = ("tocom", "rank1", "scale_half", "qkv", "images10", "birds", "step2")
#: What a tiny run takes from a study's own recipe.
RECIPE = ("augmentation", "mixup", "cutmix", "label_smoothing", "drop_path", "tuning", "lr_batch")


def shrink(path, root):
    """Return a study's config with tiny models, degrees up to 4, two tasks, and data sets below ``root``."""
    config = yaml.safe_load(path.read_text())
    small = config | TINY
    small.pop("resources")
    small["throughput"] = TINY["throughput"] | {"training": config["throughput"].get("training", False)}
    small["backbones"] = [ARCHITECTURE | {"name": backbone["name"]} for backbone in config["backbones"][:2]]
    rivals = [degree for degree in config["train_degrees"] if degree == "random"]
    small["train_degrees"] = [0, 4, *rivals]
    small["compressors"] = config.get("compressors", ["tome"])[:2]
    names = [task if isinstance(task, str) else task["name"] for task in config["tasks"]]
    small["tasks"] = names[:2]
    small["data"] = {"root": str(root), "resize": config.get("data", {}).get("resize", "crop")}
    recipe = {key: value for key, value in config["finetune"].items() if key in RECIPE}
    small["finetune"] = recipe | {"device": "cpu", "epochs": 1, "batch_size": 8, "min_lr": 0}
    small["distil"] = {"device": "cpu", "epochs": 2, "images": 32, "held_out": 16, "pairs": 4, "batch_size": 16}
    small["evaluate"] = {"device": "cpu", "scales": [0, 1]}
    variants = config.get("compensators", {"tocom": {}})
    small["compensators"] = {name: changes for name, changes in variants.items() if name in VARIANTS}
    for changes in small["compensators"].values():
        if "images" in changes:
            changes["images"] = 16
    return small
