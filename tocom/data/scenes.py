"""Generated scenes to segment: coloured shapes and textures on a shaded ground, a function of a seed.

They stand in for ADE20k where nothing can be downloaded. The class of a pixel is the kind of shape that covers it,
whatever its colour. As in ADE20k, some of what can be seen has no label: crosses. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Label of pixels that count neither in training nor in testing.
IGNORED = 255
#: Kinds of shape; the place in the tuple is the label.
CLASSES = ("ground", "disc", "square", "triangle", "ring", "stripes", "checks")
#: Share of the shapes that are crosses, which have no label.
_UNLABELLED = 0.1

# Each takes coordinates in units of the shape's radius [H, W], turned with the shape, and says what is covered.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (y > -0.6) & (y < 1 - 1.8 * abs(x)),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "stripes": lambda x, y: np.maximum(abs(x), abs(y)) < 0.95,
    "checks": lambda x, y: np.maximum(abs(x), abs(y)) < 0.95,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 1),
}
# Which of what is covered takes the second colour.
_TEXTURE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda x, y: np.floor(3 * x) % 2 == 0,
    "checks": lambda x, y: (np.floor(2 * x) + np.floor(2 * y)) % 2 == 0,
}


def scene(size: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene of two to five shapes; later ones cover earlier ones.

    Args:
        size: its side in pixels.

    Returns:
        image [3, size, size] uint8 and labels [size, size] uint8.
    """
    rng = np.random.default_rng((seed, index))
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    light = 0.8 + 0.4 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    image = rng.uniform(0.1, 0.6, (3, 1, 1)) * light
    labels = np.zeros((size, size), dtype=np.uint8)
    for _ in range(rng.integers(2, 6)):
        kind = "cross" if rng.random() < _UNLABELLED else CLASSES[rng.integers(1, len(CLASSES))]
        radius, angle = rng.uniform(0.12, 0.28), rng.uniform(0, 2 * np.pi)
        dx, dy = (x - rng.uniform(0.1, 0.9)) / radius, (y - rng.uniform(0.1, 0.9)) / radius
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        covered = _INSIDE[kind](u, v)
        colours = rng.uniform(0.2, 1.0, (2, 3, 1, 1))
        second = _TEXTURE[kind](u, v) if kind in _TEXTURE else np.zeros_like(covered)
        image = np.where(covered, np.where(second, colours[1], colours[0]), image)
        labels[covered] = CLASSES.index(kind) if kind in CLASSES else IGNORED
    image = image + rng.normal(0, 0.03, image.shape)
    return np.round(255 * image.clip(0, 1)).astype(np.uint8), labels


def scenes(n: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw n scenes.

    Returns:
        images [n, 3, size, size] uint8 and labels [n, size, size] uint8.
    """
    images, labels = zip(*(scene(size, seed, index) for index in range(n)), strict=True)
    return np.stack(images), np.stack(labels)
