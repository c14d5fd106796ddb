# SPDX-License-Identifier: Apache-2.0
"""Sources of noise: one at most, checked first, and diffusers' order for generators."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from msdda_fast import InvalidShape, counter_noise
from msdda_fast.engine.noise import image_seeds, noise_source
from msdda_fast.kernels.counter_noise import STREAM_INITIAL, STREAM_STEP

SHAPE = (2, 4, 3, 3)


def test_seeds_use_stream_0_for_x_T_and_stream_1_for_steps() -> None:
    source = noise_source(SHAPE, 5, "cpu", seeds=[3, 4])
    assert source.initial("cpu").equal(counter_noise([3, 4], SHAPE, stream=STREAM_INITIAL))
    step = source.step(2, torch.empty(SHAPE))
    assert step["seeds"].tolist() == [3, 4] and step["step"] == 2 and "noise" not in step
    assert not source.initial("cpu").equal(counter_noise([3, 4], SHAPE, stream=STREAM_STEP))


def test_given_noise_is_handed_out_by_step() -> None:
    noise = torch.randn(5, *SHAPE)
    source = noise_source(SHAPE, 5, "cpu", noise=noise)
    step = source.step(3, torch.empty(SHAPE))
    assert list(step) == ["noise"] and step["noise"].equal(noise[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_image", [False, True], ids=["one", "one per image"])
def test_generators_draw_as_diffusers_does(dtype: torch.dtype, per_image: bool) -> None:
    def generators():
        if per_image:
            return [torch.Generator().manual_seed(s) for s in (1, 2)]
        return torch.Generator().manual_seed(1)

    source, stock = noise_source(SHAPE, 2, "cpu", generator=generators()), generators()
    like = torch.empty(SHAPE, dtype=dtype)
    assert source.initial("cpu", dtype).equal(randn_tensor(SHAPE, stock, dtype=dtype))
    for k in (0, 1):
        drawn = source.step(k, like)["noise"]
        assert drawn.dtype == dtype
        assert drawn.equal(randn_tensor(SHAPE, stock, dtype=dtype))


def test_without_a_source_torch_default_generator_draws() -> None:
    torch.manual_seed(0)
    drawn = noise_source(SHAPE, 1, "cpu").step(0, torch.empty(SHAPE))["noise"]
    torch.manual_seed(0)
    assert drawn.equal(torch.randn(SHAPE))


def test_image_seeds() -> None:
    assert image_seeds(7, 3) == [7, 8, 9]
    assert image_seeds([5, 1], 2) == [5, 1]
    assert image_seeds(2**64 - 1, 2) == [2**64 - 1, 0]
    with pytest.raises(InvalidShape, match="got 2 seeds for 3 images"):
        image_seeds([5, 1], 3)


def test_one_source_at_most() -> None:
    with pytest.raises(ValueError, match=r"at most one.*seeds and generator"):
        noise_source(SHAPE, 1, "cpu", seeds=[1, 2], generator=torch.Generator())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(noise=torch.zeros(4, *SHAPE)), r"\(4, 2, 4, 3, 3\), expected \(T, B, \*S\) = \(5, "),
        (dict(noise=torch.zeros(5, *SHAPE, dtype=torch.int64)), "floating point on cpu"),
        (dict(noise=torch.zeros(5, *SHAPE, device="meta")), "on meta, expected"),
        (dict(seeds=[1]), r"\(1,\), expected \(2,\)"),
        (dict(generator=[torch.Generator()] * 3), "got 3 generators"),
    ],
    ids=["T", "dtype", "device", "seeds", "generators"],
)
def test_sources_that_do_not_fit(source: dict, message: str) -> None:
    with pytest.raises(InvalidShape, match=message):
        noise_source(SHAPE, 5, "cpu", **source)


def test_seeds_need_a_channel_axis() -> None:
    with pytest.raises(InvalidShape, match="channel axis"):
        noise_source((2,), 5, "cpu", seeds=[1, 2])
