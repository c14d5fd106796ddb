# SPDX-License-Identifier: Apache-2.0
"""Preprocessing without 8-bit steps against the published one, on 8-bit images.

The published one rounds to 8 bits after each of its two passes (rows, columns): one grey level at
most together with the cast, a third of one on average.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from msdda_fast.rewards.preprocess import CLIP_STD, crop_square, normalise, pad_square

LEVEL = 1 / 255
SIZES = [(64, 64), (512, 512), (96, 64), (300, 401), (225, 224), (231, 224)]
IDS = [f"{h}x{w}" for h, w in SIZES]


def picture(height, width):
    """Smooth colours with hard edges and noise, 8 bits; as a PIL image and as a tensor in [0, 1]"""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.stack([np.sin(9 * x) / 2 + 0.5, y, (x + y) % 0.5 * 2], -1)
    image[height // 4 : height // 2, width // 3 : width // 2] = rng.random(3) > 0.5
    image += 0.1 * rng.standard_normal(image.shape)
    pixels = (255 * image.clip(0, 1)).round().astype(np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return Image.fromarray(pixels), tensor


def assert_within_rounding(found, published):
    error = (found - published).abs()
    assert error.max() <= 1.5 * LEVEL, f"{error.max() / LEVEL:.2f} grey levels"
    assert error.mean() <= 0.4 * LEVEL, f"{error.mean() / LEVEL:.2f} grey levels"


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("height", "width"), SIZES, ids=IDS)
def test_crop_is_that_of_transformers(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image, tensor = picture(height, width)
    published = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    found = normalise(crop_square(tensor, 224, floor=True))
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    assert_within_rounding(found * std, published * std)


@pytest.mark.parametrize(("height", "width"), SIZES, ids=IDS)
def test_crop_is_that_of_torchvision_over_pil(height, width):
    """torchvision's Resize and CenterCrop, which ImageReward, CLIP and LAION use: the sides are
    int(224 long / short), the offset is round((side - 224) / 2)."""
    image, tensor = picture(height, width)
    short = min(height, width)
    width, height = int(224 * width / short), int(224 * height / short)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    assert_within_rounding(crop_square(tensor, 224), as_tensor(image))


@pytest.mark.parametrize(("height", "width"), SIZES, ids=IDS)
def test_padding_is_that_of_hpsv2(height, width):
    """The longest side becomes 224, both sides of the shorter are filled with black."""
    image, tensor = picture(height, width)
    scale = 224 / max(height, width)
    width, height = round(width * scale), round(height * scale)
    board = Image.new("RGB", (224, 224))
    resized = image.resize((width, height), Image.BICUBIC)
    board.paste(resized, ((224 - width) // 2, (224 - height) // 2))
    assert_within_rounding(pad_square(tensor, 224), as_tensor(board))


def test_half_a_margin_is_rounded_as_each_library_does():
    ramp = torch.arange(227.0).view(1, 1, 227, 1).expand(1, 3, 227, 224) / 255
    assert crop_square(ramp, 224)[0, 0, 0, 0] == 2 * LEVEL  # 1.5 to even
    assert crop_square(ramp, 224, floor=True)[0, 0, 0, 0] == LEVEL


@pytest.mark.parametrize("fit", [crop_square, pad_square])
def test_the_gradient_reaches_every_pixel_that_is_seen(fit):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64).mul(0.4).add(0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise(fit(x, 4)), (images,))
    (gradient,) = torch.autograd.grad(fit(images, 4).sum(), images)
    assert (gradient != 0).all()
