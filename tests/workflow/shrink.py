"""The studies of config/, small enough to run in a minute: same methods, recipes and tables, tiny models and data."""

from tocom.study import read_config

ARCHITECTURE = {
    "architecture": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 41},
    "image_size": 32,
    "patch_size": 8,
}
TINY = {
    "pretrain": {"device": "cpu", "epochs": 1, "images": 96, "held_out": 32, "threads": 1},
    "learn": {"device": "cpu", "epochs": 2, "images": 32, "held_out": 16, "pairs": 4, "batch_size": 16},
    "evaluate": {"device": "cpu", "scales": [0, 1]},
    "analysis": {"resamples": 50},
    "seeds": [0, 1],
    "train_degrees": [0, 4],
    "infer_degrees": [0, 4],
    "max_degree": 4,
    "checkpoints_per_job": 100,
}
#: Methods that a tiny run of the ablations keeps: one of each kind, as every other would take as long again.
VARIANTS = ("tome", "tocom", "rank1", "scale_half", "qkv", "images10", "birds", "step2")
#: What a tiny run takes from a study's own recipe.
RECIPE = ("augmentation", "mixup", "cutmix", "label_smoothing", "drop_path", "lr_batch")


def shrink(path, root):
    """Return a study's config with tiny models, degrees up to 4, two tasks, and data sets below ``root``."""
    config = read_config(path)
    small = config | TINY
    speed = {"device": "cpu", "batch_size": 4, "repeats": 2, "warmup": 1}
    small["throughput"] = speed | {"training": config["throughput"].get("training", False)}
    small["backbones"] = [ARCHITECTURE | {"name": backbone["name"]} for backbone in config["backbones"][:2]]
    small["tasks"] = [task if isinstance(task, str) else task["name"] for task in config["tasks"]][:2]
    small["data"] = {"root": str(root), "resize": config.get("data", {}).get("resize", "crop")}
    recipe = {key: value for key, value in config["finetune"].items() if key in RECIPE}
    small["finetune"] = recipe | {"device": "cpu", "epochs": 1, "batch_size": 8, "min_lr": 0}
    if config.get("paper") == "ablation":
        small["methods"] = {name: entry for name, entry in config["methods"].items() if name in VARIANTS}
        small["compare"] = [pair for pair in config["compare"] if set(pair) <= set(VARIANTS)]
    for method in small["methods"].values():
        learn = {key: value for key, value in method.get("learn", {}).items() if key in ("images", "source", "epochs")}
        if learn:
            method["learn"] = learn | ({"images": 16} if "images" in learn else {})
    return small
