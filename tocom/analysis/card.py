"""The model card of a pre-trained backbone, written from the metadata of its checkpoint."""

from __future__ import annotations

from tabulate import tabulate

from tocom.bundled import resolve
from tocom.errors import TocomError
from tocom.files import load_arrays, sha256


def card(checkpoint: str) -> str:
    """Return the card as Markdown.

    Raises:
        TocomError: the file is missing or was not written by `tocom pretrain`.
    """
    path = resolve(checkpoint)
    arrays, meta = load_arrays(path)
    if "accuracy" not in meta or "recipe" not in meta:
        raise TocomError(f"{path} does not say how it was pre-trained; give a file that `tocom pretrain` wrote")
    parameters = sum(array.size for array in arrays.values())
    by_degree = sorted((int(degree), f"{100 * value:.2f}") for degree, value in meta["accuracy"].items())
    recipe = tabulate(sorted(meta["recipe"].items()), ("setting", "value"), tablefmt="pipe")
    accuracy = tabulate(by_degree, ("degree", "accuracy (%)"), tablefmt="pipe", disable_numparse=True)
    return f"""# {path.stem}

A small Vision Transformer for studies that can download nothing: timm's `{meta["architecture"]}` with
`{meta["kwargs"]}`, {parameters:,} parameters, pre-trained from scratch to tell
{meta["kwargs"].get("num_classes", "the")} letter shapes apart.

- **Data:** {meta["recipe"]["images"]:,} images of letters, drawn by `tocom/data/glyphs.py` in 16 of the fonts that
  matplotlib ships, each rotated, scaled, sheared, shifted, coloured and with noise. No image is stored: a seed makes
  them again. There are no digits among them.
- **Seed:** {meta["seed"]}. Best of {meta["recipe"]["epochs"]} epochs on {meta["recipe"]["held_out"]:,} held-out
  letters: epoch {meta["best_epoch"]}.
- **Time:** {meta.get("minutes", float("nan")):.0f} minutes on {meta["recipe"]["threads"]} CPU threads.
- **Make it again:** `make backbone`.
- **Use:** `tocom.load_model("{path.stem}")`; inputs are RGB images of {meta["kwargs"].get("img_size", 224)} pixels a
  side, `(pixel / 255 - mean) / std` with the mean and std of `model.pretrained_cfg`.
- **Limits:** it knows letters on plain grounds and nothing else; it stands for the *procedure* of the paper
  (pre-train, distil once, fine-tune many times), not for its models.
- **Licence:** Apache-2.0, like the code. The fonts are under the licences that matplotlib ships with them.
- **SHA-256 of the file:** `{sha256(path)}`

## Accuracy off the shelf

ToMe, held-out letters, no ToCom. The degree is the number of tokens removed in each block, or as many as a block
may lose (half of its patches).

{accuracy}

## Recipe

{recipe}
"""
