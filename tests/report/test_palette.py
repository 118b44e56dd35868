"""Colours that stay apart, for everyone."""

from itertools import pairwise

import numpy as np
import pytest

from attnprof.palette import COLOURS, STACK, colour_of, stack_order
from attnprof.report.words import MEANINGS
from attnprof.vocabulary import Category

# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "typical": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
# Ottosson 2020, linear sRGB to OKLab.
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
          [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def see(colour: str, vision: str) -> np.ndarray:
    """Return a colour in OKLab as someone with that vision sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_CONES) @ seen)


def test_palette_has_every_category_once() -> None:
    assert set(COLOURS) == set(STACK) == set(MEANINGS) == set(Category)
    assert len(set(COLOURS.values())) == len(Category)


@pytest.mark.parametrize("vision", VISION)
def test_palette_neighbours_stay_apart(vision: str) -> None:
    for below, above in pairwise(STACK):
        distance = np.linalg.norm(see(COLOURS[below], vision) - see(COLOURS[above], vision))
        assert distance > 0.11, (below, above)  # several times what is just noticeable


def test_palette_shows_unknown_words_as_unattributed() -> None:
    assert colour_of("of the future") == COLOURS[Category.UNATTRIBUTED]
    assert stack_order("of the future") == len(STACK)
