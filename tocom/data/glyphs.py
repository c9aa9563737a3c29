"""Procedural images of letters, drawn with the font files that matplotlib ships.

They stand in for ImageNet where nothing can be downloaded: every image is a function of a seed, so the
pre-training set is regenerated rather than stored. A light glyph lies on a dark coloured ground; glyphs are
placed by one affine map each. Only NumPy and Pillow are needed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

#: Side of an image, in pixels.
SIZE = 32
#: Side of the mask that a glyph is drawn on before it is placed, in pixels.
_CANVAS = 64
#: 41 letter shapes that stay distinct without a base line; no digits, which are a downstream task.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty"
#: Letters with no rotational symmetry, for the task that asks how far a letter was turned.
ASYMMETRIC = "AEFGJKPRabefhmrt"
FONTS = tuple(
    [f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")]
    + [f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")]
    + [f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")]
    + [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")]
)


@cache
def mask(letter: str, font: str):
    """Return the coverage of one glyph, centred by its bounding box, as a Pillow image of 64 x 64 pixels."""
    from importlib.util import find_spec

    from PIL import Image, ImageDraw, ImageFont

    # Found without importing matplotlib, which takes longer than drawing.
    fonts = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    face = ImageFont.truetype(str(fonts / f"{font}.ttf"), size=44)
    left, top, right, bottom = face.getbbox(letter)
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    corner = ((_CANVAS - right - left) / 2, (_CANVAS - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=face)
    return canvas


def place(letter: str, font: str, angle: float, size: float, shear: float, x: float, y: float) -> np.ndarray:
    """Draw one glyph through an affine map.

    Args:
        letter: one character. font: a name from :data:`FONTS`.
        angle: counter-clockwise rotation in degrees.
        size: side of the glyph's canvas in the image, in pixels; the glyph fills about half of it.
        shear: horizontal shear (pixels per pixel).
        x, y: centre of the glyph in the image, in pixels.

    Returns:
        Coverage [32, 32], float32 in [0, 1].
    """
    from PIL import Image

    radians = np.deg2rad(angle)
    rotation = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
    forward = size / _CANVAS * rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    inverse = np.linalg.inv(forward)
    offset = np.array([_CANVAS / 2, _CANVAS / 2]) - inverse @ np.array([x, y])
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = mask(letter, font).transform((SIZE, SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32) / 255.0


def colourise(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint coverages with a light colour on a dark one and add noise.

    Args:
        coverage: [n, 32, 32], float32 in [0, 1].

    Returns:
        Images [n, 3, 32, 32], uint8.
    """
    n = len(coverage)
    light = rng.uniform(0.55, 1.0, (n, 3, 1, 1)).astype(np.float32)
    dark = rng.uniform(0.0, 0.35, (n, 3, 1, 1)).astype(np.float32)
    images = dark + coverage[:, None] * (light - dark)
    images += rng.normal(0.0, 0.05, images.shape).astype(np.float32)
    return (np.clip(images, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _free_pose(rng: np.random.Generator, angle: float = 25.0) -> dict[str, float]:
    return {
        "angle": rng.uniform(-angle, angle),
        "size": SIZE * rng.uniform(0.9, 1.45),
        "shear": rng.uniform(-0.2, 0.2),
        "x": SIZE / 2 + rng.uniform(-4, 4),
        "y": SIZE / 2 + rng.uniform(-4, 4),
    }


def letters(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pre-training task: which of the 41 letters is it?

    Returns:
        Images [n, 3, 32, 32] uint8 and labels [n] int64.
    """
    rng = np.random.default_rng([seed, 0])
    labels = rng.integers(len(LETTERS), size=n)
    fonts = rng.integers(len(FONTS), size=n)
    drawn = [place(LETTERS[i], FONTS[f], **_free_pose(rng)) for i, f in zip(labels, fonts, strict=True)]
    return colourise(np.stack(drawn), rng), labels.astype(np.int64)


def rotation(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """By which multiple of 45 degrees was the letter turned (8 classes)?"""
    rng = np.random.default_rng([seed, 1])
    labels = rng.integers(8, size=n)
    drawn = []
    for label in labels:
        pose = _free_pose(rng, angle=10.0)
        pose["angle"] += 45.0 * label
        drawn.append(place(rng.choice(list(ASYMMETRIC)), rng.choice(FONTS), **pose))
    return colourise(np.stack(drawn), rng), labels.astype(np.int64)


def counting(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How many letters are there (1 to 6), each in its own cell of a 3 x 3 grid?"""
    rng = np.random.default_rng([seed, 3])
    labels = rng.integers(6, size=n)
    drawn = []
    for label in labels:
        cells = rng.permutation(9)[: label + 1]
        glyphs = [_in_cell(rng, cell) for cell in cells]
        drawn.append(np.clip(np.sum(glyphs, axis=0), 0.0, 1.0))
    return colourise(np.stack(drawn), rng), labels.astype(np.int64)


def _in_cell(rng: np.random.Generator, cell: int) -> np.ndarray:
    step = SIZE / 3
    return place(
        rng.choice(list(LETTERS)),
        rng.choice(FONTS),
        angle=rng.uniform(-25, 25),
        size=SIZE * rng.uniform(0.42, 0.5),
        shear=0.0,
        x=step * (cell % 3 + 0.5) + rng.uniform(-1, 1),
        y=step * (cell // 3 + 0.5) + rng.uniform(-1, 1),
    )
