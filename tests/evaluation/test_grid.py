# SPDX-License-Identifier: Apache-2.0
"""The grid: every image where its labels say, nothing cut off, white around."""

import numpy as np
import pytest
from PIL import Image

import msdda_fast as mf
from msdda_fast.evaluation.grid import labelled_grid

COLORS = [["red", "lime"], ["blue", "yellow"], ["magenta", "cyan"]]
ROWS = ["A purple colored dog.", "A blue car and a pink sheep.", "Supercalifragilistic"]
COLUMNS = ["SD\nbase model", "w = 1\nconsistency only"]


def grid(cell=160, size=(64, 64)):
    images = [[Image.new("RGB", size, color) for color in row] for row in COLORS]
    return labelled_grid(images, ROWS, COLUMNS, cell=cell)


def where(picture, color):
    """Rectangle (x0, y0, x1, y1) of the pixels of one colour, and how many there are."""
    rgb = np.array(Image.new("RGB", (1, 1), color))[0, 0]
    y, x = np.nonzero((np.asarray(picture) == rgb).all(-1))
    return (x.min(), y.min(), x.max() + 1, y.max() + 1), len(x)


@pytest.mark.parametrize("cell, size, height", [(160, (64, 64), 160), (100, (32, 16), 50)])
def test_every_image_has_its_place(cell, size, height):
    picture = grid(cell, size)
    boxes = [[where(picture, color) for color in row] for row in COLORS]
    for row in boxes:
        for (x0, y0, x1, y1), count in row:
            assert (x1 - x0, y1 - y0) == (cell, height) and count == cell * height
        assert row[0][0][2] < row[1][0][0] and row[0][0][1] == row[1][0][1]
    assert boxes[0][0][0][3] < boxes[1][0][0][1]


def test_labels_stay_on_the_paper_and_off_the_images():
    pixels = np.asarray(grid())
    border = np.concatenate([pixels[:8].reshape(-1, 3), pixels[-8:].reshape(-1, 3)])
    sides = np.concatenate([pixels[:, :8].reshape(-1, 3), pixels[:, -8:].reshape(-1, 3)])
    assert (border == 255).all() and (sides == 255).all()
    (x0, y0, _, _), _ = where(grid(), "red")
    assert (pixels[:y0, x0:] < 128).any()  # column labels
    assert (pixels[y0 : y0 + 160, :x0] < 128).any()  # row labels
    assert (pixels[:, x0 - 8 : x0] == 255).all()  # a gap between


def test_shapes():
    image = Image.new("RGB", (8, 8))
    for images, rows, columns in (
        ([], [], ["a"]),
        ([[image]], ["a"], []),
        ([[image]], ["a"], ["a", "b"]),
        ([[image], []], ["a", "b"], ["a"]),
        ([[image]], ["a", "b"], ["a"]),
    ):
        with pytest.raises(mf.InvalidShape):
            labelled_grid(images, rows, columns)
