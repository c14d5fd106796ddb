# SPDX-License-Identifier: Apache-2.0
"""Images as masks: gray values, and what cannot be seen."""

import numpy as np
import pytest
import torch
from PIL import Image

import msdda_fast as mf
from msdda_fast.pipelines.regions import check_masks


def read(image) -> torch.Tensor:
    found = check_masks({"a": image}, ["a", "b"], 1)
    assert found is not None
    return found.masks[0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_8_bits(mode) -> None:
    bright = np.array([[0, 255], [255, 0]], np.uint8)
    image = Image.fromarray(bright).convert("RGB").convert(mode)
    torch.testing.assert_close(read(image), torch.from_numpy(bright / 255))


def test_what_is_transparent_is_no_part_of_a_mask() -> None:
    image = Image.new("LA", (2, 1), (255, 255))
    image.putpixel((1, 0), (255, 51))
    torch.testing.assert_close(read(image), torch.tensor([[1, 0.2]]).double())


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_bits_are_refused_rather_than_cut_off(mode) -> None:
    with pytest.raises(mf.InvalidShape, match=f"mask of 'a'.*8 bits a channel, not mode {mode}"):
        read(Image.new(mode, (2, 2)))
