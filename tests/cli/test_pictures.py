# SPDX-License-Identifier: Apache-2.0
"""Images that options name: what is read off them, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from msdda_fast.cli import pictures


def half_clear(colour) -> Image.Image:
    """8 x 8 pixels of a colour, of which the left ones are transparent."""
    image = Image.new("RGBA", (8, 8), (*colour, 0))
    image.paste((*colour, 255), (4, 0, 8, 8))
    return image


def test_what_is_transparent_is_white_and_black_in_masks(tmp_path):
    half_clear((255, 0, 0)).save(tmp_path / "red.png")
    image = pictures.read_image(str(tmp_path / "red.png"), "--image")
    assert image.mode == "RGB"
    assert (image.getpixel((0, 0)), image.getpixel((7, 0))) == ((255, 255, 255), (255, 0, 0))
    half_clear((255, 255, 255)).save(tmp_path / "white.png")
    mask = pictures.masks([f"a={tmp_path / 'white.png'}"])["a"]
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((7, 0))) == ("L", 0, 255)


@pytest.mark.parametrize("option", ["--image", "--mask"])
def test_files_that_are_no_images_are_named_with_their_option(tmp_path, option):
    def refused(name, message):
        file = str(tmp_path / name)
        with pytest.raises(ValueError, match=message) as error:
            pictures.read_image(file, option, mask=option == "--mask")
        assert str(error.value).startswith(f"{option} {file}: ")

    refused("no.png", "No such file or directory")
    refused("", "Is a directory")
    (tmp_path / "text.png").write_text("no image")
    refused("text.png", "not an image that Pillow reads")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    refused("part.png", "truncated")
    Image.fromarray(np.full((8, 8), 2**15, np.uint16)).save(tmp_path / "deep.png")
    refused("deep.png", "it must have 8 bits a channel, not mode I;16")
