# SPDX-License-Identifier: Apache-2.0
"""Masks in stock pipelines, against Algorithm 1 done per pixel on stock pipelines in lockstep."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.pipelines.attach import attach
from msdda_fast.pipelines.latent_grid import latent_scale
from tests.families.lockstep import (
    ancestral,
    draw,
    equal_levels,
    flow_grpo,
    lockstep,
    made,
    unequal_levels,
)
from tests.families.table import FAMILIES, Family
from tests.families.test_families import CLOSE, A, B, error

#: One for each way in which latents lie, once at equal levels and once at unequal ones.
EQUAL, UNEQUAL = ("SD3", "FLUX", "LTX"), ("PixArt-Sigma", "FLUX.2", "Wan 2.1")
#: Sound has no pixels; the size of an image is not among the arguments.
PLACED = {name: one for name, one in FAMILIES.items() if name not in ("LTX-2", "SDXL img2img")}


def families(quick: tuple[str, ...], chosen: dict[str, Family] = PLACED):
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(one, id=name, marks=() if name in quick else pytest.mark.full)
            for name, one in chosen.items()
        ],
    )


def mask_of(call: dict) -> Tensor:
    """Of the first image the left half, of the second a quarter, of each a grey corner."""
    height, width = call["height"], call["width"]
    masks = torch.zeros(len(call["prompt_embeds"]), height, width, dtype=torch.float64)
    masks[0, :, : width // 2] = 1.0
    masks[1:, : height // 2, : width // 2] = 1.0
    masks[:, -2:, -2:] = 0.25
    return masks


def averages(masks: Tensor, scale: int) -> Tensor:
    """(B, H, W) -> (B, h, w)."""
    batch, height, width = masks.shape
    return masks.reshape(batch, height // scale, scale, width // scale, scale).mean((2, 4))


def by_hand(name: str, pipe, mask: Tensor, sample_shape: tuple[int, ...]) -> Tensor:
    """Weights (B, 2, *S) of latents, packed as the papers of these families say."""
    latents = averages(mask, latent_scale(pipe))
    batch, h, w = latents.shape
    if len(sample_shape) == 3:
        patch = 1 if name.startswith("LTX") else 2
        tokens = latents.reshape(batch, h // patch, patch, w // patch, patch)
        tokens = tokens.permute(0, 1, 3, 2, 4).reshape(batch, -1, patch * patch)
        frames = sample_shape[1] // tokens.shape[1]
        tokens = tokens.repeat(1, frames, sample_shape[2] // tokens.shape[2])
        assert tokens.shape == sample_shape
        latents = tokens
    else:
        latents = latents.reshape(batch, *[1] * (len(sample_shape) - 3), h, w)
    return torch.stack([latents, 1 - latents], 1)


def shape_of(pipe, call: dict) -> tuple[int, ...]:
    """Of the state that the loop hands its scheduler."""
    seen, stock = [], pipe.scheduler

    class Watching(type(stock)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            seen.append(tuple(sample.shape))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    Watching.step.__signature__ = __import__("inspect").signature(type(stock).step)
    pipe.scheduler = Watching.from_config(stock.config)
    draw(pipe, call)
    pipe.scheduler = stock
    return seen[0]


@families(EQUAL)
def test_masks_are_algorithm_1_per_pixel(family: Family, request) -> None:
    name = request.node.callspec.id
    pipe, call = made(family.make)
    mask = mask_of(call)
    weights = by_hand(name, pipe, mask, shape_of(pipe, call))
    got = draw(attach(pipe), call, masks={"a": mask}, mask_softness=0)
    expected = lockstep(family.make, [A, B], equal_levels(weights))
    assert error(got, expected) < CLOSE
    # the comparison would notice the same weights in all pixels
    assert error(draw(attach(pipe), call, weights=[0.5, 0.5]), expected) > 0.01


@families(UNEQUAL, {name: one for name, one in PLACED.items() if one.levels})
def test_masks_at_unequal_levels_are_algorithm_1_per_pixel(family: Family, request) -> None:
    pipe, call = made(family.make)
    mask = mask_of(call)
    seeds = [3 + 1000 * i for i in range(len(mask))]
    own, moments = ((0.7, 0.3), flow_grpo) if family.levels == "flow" else ((1.0, 0.6), ancestral)
    levels = [mf.FlowSDE(a) for a in own] if family.levels == "flow" else own
    weights = by_hand(request.node.callspec.id, pipe, mask, shape_of(pipe, call))
    given = dict(masks={"a": mask}, mask_softness=0, levels=levels, seed=seeds)
    got = draw(attach(pipe), call, **given)
    fuse = unequal_levels(weights, seeds, moments, own)
    expected = lockstep(family.make, [A, B], fuse, seeds=seeds)
    assert error(got, expected) < CLOSE


@pytest.fixture
def sd3() -> tuple[object, dict]:
    pipe, call = made(FAMILIES["SD3"].make)
    return attach(pipe), call


SEEDED = dict(seed=[3, 8])
LEVELS = dict(levels=[mf.FlowSDE(0.7), mf.FlowSDE(0.3)])
levels_equal_or_not = pytest.mark.parametrize("levels", [{}, LEVELS], ids=["equal", "unequal"])


@levels_equal_or_not
def test_the_same_mask_everywhere_is_weights(sd3, levels: dict) -> None:
    pipe, call = sd3
    got = draw(pipe, call, masks={"a": np.full((16, 16), 0.3)}, **SEEDED, **levels)
    assert error(got, draw(pipe, call, weights=[0.3, 0.7], **SEEDED, **levels)) < 1e-6


@levels_equal_or_not
def test_images_with_and_without_masks_share_a_batch(sd3, levels: dict) -> None:
    pipe, call = sd3
    left = PIL.Image.fromarray(np.tile(np.repeat(np.uint8([255, 0]), 8), (16, 1)))
    weights = [{"a": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.8}]
    given = {**SEEDED, **levels}
    together = draw(pipe, call, masks=[{"a": left}, None], weights=weights, **given)
    plain = draw(pipe, call, weights=weights, **given)
    masked = draw(pipe, call, masks={"a": left}, weights=weights, **given)
    assert error(together[1], plain[1]) < 1e-6 and error(together[0], masked[0]) < 1e-6
    assert error(together[0], plain[0]) > 0.01 and error(together[1], masked[1]) > 0.01


@levels_equal_or_not
def test_strengths_go_with_masks(sd3, levels: dict) -> None:
    """A strength mixes predictions with those of the base: with 0, it is the base."""
    pipe, call = sd3
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    given = {"masks": {"a": left}, **SEEDED, **levels}
    plain = draw(pipe, call, **given)
    both = draw(pipe, call, objective_strength=[1.0, 0.0], **given)
    base = {"a": mf.Objective("a"), "base": mf.Objective.base()}
    assert error(both, draw(attach(pipe, base), call, **given)) < CLOSE
    assert error(both, plain) > 0.01


def test_weights_by_ranges_of_timesteps_are_a_callable(sd3) -> None:
    pipe, call = sd3
    pipe.scheduler.set_timesteps(3)
    times = pipe.scheduler.timesteps.tolist()
    between = (times[0] + times[1]) / 2
    early, late = {"a": 1, "b": 0}, {"a": 0.2, "b": 0.8}
    ranges = {(between, 1000): early, (0, between): late}
    for levels in ({}, LEVELS):
        given = {**SEEDED, **levels}
        expected = draw(pipe, call, weights=lambda k: late if k else early, **given)
        assert torch.equal(draw(pipe, call, weights=ranges, **given), expected)
        first = draw(pipe, call, weights=[ranges, late], **given)
        assert error(first[0], expected[0]) < 1e-6
        masked = dict(masks=[None, {"b": np.zeros((16, 16))}], **given)
        assert error(draw(pipe, call, weights=ranges, **masked)[0], expected[0]) < 1e-6


def test_what_no_pixel_prefers_is_not_evaluated(sd3) -> None:
    pipe, call = sd3
    got = draw(pipe, call, masks={"a": torch.ones(16, 16)}, weights=[0.1, 0.9])
    assert error(got, draw(pipe, call, weights=[1, 0])) < 1e-6
    assert torch.equal(got, draw(pipe, call, weights=[1, 0]))


BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "another size": (
        {"masks": {"a": torch.ones(16, 8)}},
        mf.InvalidShape,
        r"mask of 'a' has 16 x 8 pixels .* of the image, 16 x 16",
    ),
    "unknown": ({"masks": {"c": torch.ones(16, 16)}}, mf.UnknownObjective, "objective 'c'; known"),
    "uncovered": (
        {"masks": {"a": torch.eye(16)}, "weights": [1, 0]},
        mf.InvalidWeights,
        "row 0, column 1 of image 0: the masks of a sum to 0 there; without a mask, and with "
        "weight 0: b",
    ),
    "eps": (
        {"masks": {"a": torch.eye(16)}, "levels": [mf.CPS(0.9), mf.CPS(0.4)]},
        mf.InvalidSchedule,
        "use fusion='posterior', or equal levels",
    ),
    "kl_weights": (
        {"masks": {"a": torch.eye(16)}, "kl_weights": [1, 2]},
        mf.InvalidWeights,
        "kl_weights with masks",
    ),
    "kl_weights by range": (
        {"weights": {(0, 1000): [1, 0]}, "kl_weights": [1, 2]},
        mf.InvalidWeights,
        "weights by ranges of timesteps are not known before the loop",
    ),
    "ranges": (
        {"weights": {(900, 1000): [1, 0], (0, 300): [1, 0]}},
        mf.InvalidWeights,
        "every timestep that is sampled",
    ),
}


@pytest.mark.parametrize("given, kind, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_before_any_network(
    sd3, given: dict, kind: type[Exception], message: str, monkeypatch
) -> None:
    pipe, call = sd3
    monkeypatch.setattr(type(pipe.transformer), "forward", _never)
    with pytest.raises(kind, match=message):
        draw(pipe, call, **given)


def _never(*args, **kwargs):
    raise AssertionError("a network ran")


def _call_of(name: str) -> tuple[object, dict]:
    pipe, call = made(PLACED.get(name, FAMILIES[name]).make)
    return attach(pipe), call


@pytest.mark.full  # a network that no other test of `make test` needs here
def test_latents_that_are_not_of_an_image_are_named() -> None:
    pipe, call = _call_of("LTX-2")
    mask = torch.ones(call["height"], call["width"])
    with pytest.raises(mf.UnsupportedNetwork, match=r"cannot be placed in latents of shape \(2, 5"):
        draw(pipe, call, masks={"a": mask / 2})


def test_without_a_size_in_the_call_the_first_step_checks() -> None:
    pipe, call = _call_of("SDXL img2img")
    draw(pipe, call, masks={"a": torch.eye(32)})
    with pytest.raises(mf.InvalidShape, match=r"masks of 16 x 16 pixels .* expected 32 x 32"):
        draw(pipe, call, masks={"a": torch.eye(16)})


def test_weights_that_change_need_a_scheduler_of_first_order() -> None:
    """Masks do not change from step to step, and go with multistep schedulers."""
    pipe, call = _call_of("Wan, UniPC")
    mask = torch.full((call["height"], call["width"]), 0.3)
    assert error(draw(pipe, call, masks={"a": mask}), draw(pipe, call, weights=[0.3, 0.7])) < 1e-6
    with pytest.raises(mf.InvalidSchedule, match="remembers earlier predictions"):
        draw(pipe, call, weights={(0, 500): [1, 0], (500, 1000): [0, 1]})


Fused = Callable[..., object]


@pytest.mark.parametrize(
    "levels", [None, [mf.FlowSDE(0.7), mf.FlowSDE(0.3)]], ids=["stock", "table"]
)
def test_a_fused_scheduler_takes_weights_of_every_pixel(levels) -> None:
    """As a tensor (B, M, *S), and by ranges of timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    g = torch.Generator().manual_seed(0)
    x, outputs = torch.randn(2, 4, 6, 6, generator=g), torch.randn(2, 2, 4, 6, 6, generator=g)
    first = torch.rand(2, 1, 1, 6, 6, generator=g, dtype=torch.float64)
    weights = torch.cat([first, 1 - first], 1)

    def step(weights) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler()
        made = mf.fused_scheduler(
            scheduler, count=2, levels=levels, weights=weights, seeds=[1, 2] if levels else None
        )
        made.set_timesteps(4)
        return made.step(outputs, made.timesteps[0], x).prev_sample

    got = step(weights)
    for row, column in ((0, 0), (3, 5)):
        alone = step(weights[:, :, 0, row, column])
        assert torch.allclose(got[..., row, column], alone[..., row, column], atol=2e-6)
    assert torch.equal(step({(500, 1000): [1, 0], (0, 500): [0, 1]}), step([1.0, 0.0]))
    with pytest.raises(mf.InvalidWeights, match="sum to 1"):
        step(weights * 2)
