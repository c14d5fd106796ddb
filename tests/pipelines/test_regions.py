# SPDX-License-Identifier: Apache-2.0
"""Masks: what they say about pixels, and what Stable Diffusion's own pipeline makes of them."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import msdda_fast as mf
from msdda_fast.pipelines.attach import attach
from msdda_fast.pipelines.regions import check_masks
from msdda_fast.reference import algorithm_1
from tests.pipelines.test_equivalence import (
    PROMPTS,
    ROUNDINGS,
    STEPS,
    in_float64,
    posterior,
    relative_error,
)
from tests.tiny_model import quiet

SIZE, GRID = 32, 8
SHORT = dict(num_inference_steps=3, guidance_scale=3.0, seed=0, output_type="latent")
NAMES = ["warm", "cool"]


def left(value: float = 1.0) -> Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    mask[:, : SIZE // 2] = value
    return mask


@pytest.fixture
def own(tiny) -> mf.MSDDAPipeline:
    """Of this test alone: its settings change."""
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


def drawn(pipe, prompt=PROMPTS, **request) -> Tensor:
    return pipe(prompt, **{**SHORT, **request}).images


class TestWeightsOfPixels:
    def test_they_sum_to_1_on_any_grid(self) -> None:
        grey = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)
        regions = check_masks({"warm": grey}, NAMES, 2, SIZE, SIZE)
        for height, width in ((8, 8), (32, 16), (5, 7)):
            weights = regions.on(height, width, 4)
            assert weights.shape == (2, 2, height, width)
            total = weights.own.sum(1) + weights.rest
            assert (total - 1).abs().max() < 1e-14 and (weights.own >= 0).all()

    def test_without_softness_they_are_averages(self) -> None:
        mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
        weights = check_masks({"warm": mask}, NAMES, 1, softness=0).on(GRID, GRID, 4)
        expected = mask.reshape(GRID, 4, GRID, 4).mean((1, 3))
        assert (weights.own[0, 0] - expected).abs().max() < 1e-14
        assert (weights.own[0, 1] == 0).all()

    @pytest.mark.parametrize(("softness", "as_is"), [(1e-300, True), (1e300, False)])
    def test_no_softness_is_too_small_or_too_large(self, softness, as_is) -> None:
        weights = check_masks({"warm": left()}, NAMES, 1, softness=softness).on(32, 32, 1).own[0, 0]
        assert torch.equal(weights, left().double() if as_is else torch.full((32, 32), 0.5))

    def test_softness_is_a_gaussian_of_that_many_pixels(self) -> None:
        """A step becomes its cumulative distribution, the further from the border the closer."""
        mask = torch.zeros(4, 256, dtype=torch.float64)
        mask[:, :128] = 1
        weights = check_masks({"warm": mask}, NAMES, 1, softness=10).on(4, 256, 1)
        position = torch.arange(256, dtype=torch.float64) - 127.5
        expected = 0.5 * (1 - torch.erf(position / (10 * 2**0.5)))
        assert (weights.own[0, 0] - expected).abs().max() < 1e-3
        default = check_masks({"warm": mask}, NAMES, 1).on(4, 256, 10)
        assert torch.equal(default.own, weights.own)

    def test_images_of_pillow_are_read_by_their_brightness(self) -> None:
        grey = PIL.Image.new("L", (SIZE, SIZE), 51)
        for image in (grey, grey.convert("RGB"), grey.convert("RGBA")):
            regions = check_masks({"cool": image}, NAMES, 1, SIZE, SIZE)
            assert (regions.masks[0, 1] == 0.2).all()
        wide = check_masks({"cool": PIL.Image.new("1", (8, 4), 1)}, NAMES, 1)
        assert wide.size == (4, 8) and (wide.masks[0, 1] == 1).all()

    def test_8_bits_need_not_sum_to_1_exactly(self) -> None:
        dark, light = (PIL.Image.new("L", (4, 4), value) for value in (100, 154))
        regions = check_masks({"warm": dark, "cool": light}, NAMES, 1)
        assert (regions.masks.sum(1) - 1).abs().max() < 1e-15
        lighter = PIL.Image.new("L", (4, 4), 156)
        three = check_masks({"warm": dark, "cool": lighter}, [*NAMES, "third"], 1)
        assert (three.masks.sum(1) <= 1 + 1e-15).all()
        nearly = check_masks({"warm": PIL.Image.new("L", (4, 4), 254)}, NAMES, 1)
        whole = nearly.covered_with(torch.tensor([[[0.3, 0.0]]], dtype=torch.float64))
        assert (whole.masks[:, 0] == 1).all()

    def test_a_list_has_a_mapping_for_each_prompt(self) -> None:
        regions = check_masks([{"warm": left()}, None], NAMES, 4, images_per_prompt=2)
        assert regions.masked.tolist() == [[True, False]] * 2 + [[False, False]] * 2
        assert torch.equal(regions.masks[1, 0], left()) and (regions.masks[2:] == 0).all()
        by_image = check_masks({"cool": torch.stack([left(), 1 - left()])}, NAMES, 2)
        assert torch.equal(by_image.masks[1, 1], 1 - left())
        assert check_masks(None, NAMES, 1) is None and check_masks([None], NAMES, 1) is None

    @pytest.mark.parametrize(
        "masks, kind, message",
        [
            (
                {"hot": left()},
                mf.UnknownObjective,
                "masks: unknown objective 'hot'; known: warm, co",
            ),
            ({"warm": left()[:16]}, mf.InvalidShape, "'warm' has 16 x 32 .* the image, 32 x 32"),
            ({"warm": left()[0]}, mf.InvalidShape, r"shape \(32,\), expected \(H, W\) or \(B, H"),
            ({"warm": "a.png"}, mf.InvalidShape, "the mask of 'warm' is no image"),
            ({"warm": torch.zeros(3, SIZE, SIZE)}, mf.InvalidShape, "are for 3 images, expected 2"),
            (
                [{"warm": torch.zeros(2, SIZE, SIZE)}, None],
                mf.InvalidShape,
                "for 2 images, expected 1",
            ),
            (
                [None],
                mf.InvalidShape,
                "a list of 1, expected one mapping, or None, for each of the 2",
            ),
            (left(), mf.InvalidShape, "must be a mapping .*, got Tensor"),
            (
                {"warm": left(1.5)},
                mf.InvalidWeights,
                r"'warm' is 1.5 in row 0, column 0: .*\[0, 1\]",
            ),
            ({"warm": left(float("nan"))}, mf.InvalidWeights, "'warm' is nan in row 0, column 0"),
            (
                {"warm": left(), "cool": left(0.5)},
                mf.InvalidWeights,
                r"sum to 1.5 in row 0, column 0 of image 0 \(warm 1, cool 0.5\): it must be 1,",
            ),
            (
                {"warm": left(), "cool": left(0.0)},
                mf.InvalidWeights,
                "sum to 0 in row 0, column 16 of image 0",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, masks, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            check_masks(masks, NAMES, 2, SIZE, SIZE)

    def test_masks_that_overlap_leave_others_nothing(self) -> None:
        with pytest.raises(mf.InvalidWeights, match=r"sum to 1.5 .* it must be at most 1"):
            check_masks({"warm": left(), "cool": left(0.5)}, [*NAMES, "third"], 1)

    @pytest.mark.parametrize("softness", [-1, float("nan"), float("inf"), 10**400, "2"])
    def test_softness_is_a_number_of_pixels(self, softness) -> None:
        with pytest.raises(mf.InvalidWeights, match="mask_softness must be a finite number"):
            check_masks({"warm": left()}, NAMES, 1, softness=softness)
        with pytest.raises(mf.InvalidWeights, match="without masks"):
            check_masks(None, NAMES, 1, softness=softness)


def test_masks_are_algorithm_1_per_pixel_over_two_stock_unets(tiny) -> None:
    """With etas and guidance that differ, in float64."""
    seeds, shape = [11, 12], (2, 4, GRID, GRID)
    x_T = mf.counter_noise(seeds, shape, stream=0, dtype=torch.float64)
    noise = torch.stack(
        [mf.counter_noise(seeds, shape, step=k, dtype=torch.float64) for k in range(STEPS)]
    )
    mask = torch.stack([left(), torch.linspace(0, 1, SIZE).double().expand(SIZE, SIZE)])
    first = mask.reshape(2, 1, GRID, 4, GRID, 4).mean((3, 5))
    posteriors = [
        posterior(tiny.stock("warm", torch.float64), 1.0, 3.0, None),
        posterior(tiny.stock("cool", torch.float64), 0.8, 1.5, None),
    ]
    expected = algorithm_1(posteriors, torch.stack([first, 1 - first]), x_T, noise)
    actual = tiny.shared(torch.float64)(
        PROMPTS,
        num_inference_steps=STEPS,
        masks={"warm": mask},
        mask_softness=0,
        guidance_scale={"warm": 3.0, "cool": 1.5},
        seed=seeds,
        output_type="latent",
    ).images
    assert relative_error(actual, expected) < ROUNDINGS * torch.finfo(torch.float64).eps


def test_the_same_mask_everywhere_is_weights(own) -> None:
    weights = {"warm": 0.3, "cool": 0.7}
    expected = drawn(own, weights=weights)
    got = drawn(own, masks={"warm": torch.full((SIZE, SIZE), 0.3)})
    assert relative_error(got, expected) < 1e-5
    both = {"warm": torch.full((SIZE, SIZE), 0.3), "cool": torch.full((SIZE, SIZE), 0.7)}
    assert relative_error(drawn(own, masks=both), expected) < 1e-5


def test_images_with_and_without_masks_share_a_batch(own) -> None:
    weights = [{"warm": 0.2, "cool": 0.8}, {"warm": 0.5, "cool": 0.5}]
    for forward in ("batched", "sequential"):
        own.set_forward(forward)
        together = drawn(own, masks=[None, {"warm": left()}], weights=weights)
        plain = drawn(own, weights=weights)
        masked = drawn(own, masks={"warm": left()}, weights=weights)
        assert relative_error(together[0], plain[0]) < 1e-4
        assert relative_error(together[1], masked[1]) < 1e-4
        assert relative_error(together[1], plain[1]) > 0.01


def test_both_forwards_and_generators(own) -> None:
    """One network after another, and all in one; with noise from a table, too."""
    request = dict(masks={"cool": left(0.8)}, strength={"warm": 0.5}, etas=[1.0, 0.4])
    for noise in ({}, {"seed": None}):
        results = []
        for forward in ("batched", "sequential"):
            own.set_forward(forward)
            given = {**noise, "generator": torch.manual_seed(3)} if noise else {}
            results.append(drawn(own, **request, **given))
        assert (results[0] - results[1]).norm() < 2e-4 * results[0].norm()


def test_other_masks_do_not_capture_again(own, counted) -> None:
    masks = [{"warm": 1 - left(), "cool": left()}, [None, {"cool": left(0.3)}]]
    results = [
        drawn(own, masks=one, mask_softness=soft) for one, soft in zip(masks, (0, 9), strict=True)
    ]
    assert counted.captures == 1
    assert len({tuple(one.flatten().tolist()) for one in results}) == len(results)
    plain = drawn(own)
    assert counted.captures == 2
    assert relative_error(plain, drawn(own, masks={"warm": torch.full((SIZE, SIZE), 0.5)})) < 1e-5


def test_weights_go_on_changing_with_the_step(own) -> None:
    """Masks are for all steps; the objectives without one share the rest by the step's weights."""
    in_turn = {(500, 999): {"warm": 1, "cool": 0}, (0, 499): {"warm": 0.3, "cool": 0.7}}
    times = own.scheduler.config.num_train_timesteps

    def called(k: int) -> dict[str, float]:
        own.scheduler.set_timesteps(3)
        return in_turn[(500, 999)] if own.scheduler.timesteps[k] >= times / 2 else in_turn[(0, 499)]

    expected = drawn(own, weights=called)
    assert torch.equal(drawn(own, weights=in_turn), expected)
    text = {"500-999": in_turn[(500, 999)], "0-499": in_turn[(0, 499)]}
    assert torch.equal(drawn(own, weights=[text, text]), expected)
    half = drawn(own, weights=in_turn, masks=[None, {"cool": left()}])
    assert relative_error(half[0], expected[0]) < 1e-4 < relative_error(half[1], expected[1])


@pytest.mark.parametrize(
    "given, kind, message",
    [
        ({"masks": {"warm": left()}, "mode": "merged"}, mf.InvalidMode, 'masks need mode="exact"'),
        ({"masks": {"warm": left()}, "kl_weights": [1, 2]}, mf.InvalidWeights, "give strengths"),
        ({"masks": {"warm": left()}, "height": 64}, mf.InvalidShape, "of the image, 64 x 32"),
        (
            {"masks": {"warm": left()}, "weights": [1, 0]},
            mf.InvalidWeights,
            "row 0, column 16 of image 0: the masks of warm sum to 0",
        ),
        ({"masks": {"warm": left()}, "fusion": "eps"}, mf.InvalidSchedule, "or equal levels"),
        ({"masks": {"warm": left()}, "etas": [0, 1]}, mf.ZeroVariance, "mix zero and positive"),
        (
            {"masks": {"warm": left()}, "weights": [1.5, -0.5], "extrapolate": True},
            mf.InvalidWeights,
            "negative weights",
        ),
        ({"weights": {(0, 499): [1, 0]}}, mf.InvalidWeights, "667 is in none of 0-499"),
    ],
)
def test_bad_input_is_named_before_any_network(
    own, calls, given: dict, kind: type[Exception], message: str
) -> None:
    own.set_forward("sequential")
    with pytest.raises(kind, match=message):
        drawn(own, **given)
    assert calls == []


def test_several_processes_take_no_masks(own) -> None:
    own.enable_parallel(object())
    with pytest.raises(mf.InvalidMode, match="masks are for one process"):
        drawn(own, masks={"warm": left()})


def test_a_stock_pipeline_draws_the_same(tiny, own) -> None:
    """The same masks through the loop of diffusers."""
    objectives = {"warm": mf.Objective(eta=1.0), "cool": mf.Objective(eta=0.8)}
    stock = quiet(tiny.shared())
    plain = StableDiffusionPipeline(**stock.components, requires_safety_checker=False)
    attached = in_float64(attach(plain, objectives))
    x_T = mf.counter_noise([0, 1], (2, 4, GRID, GRID), stream=0)
    given = dict(masks={"warm": left()}, latents=x_T)
    got = quiet(attached)(PROMPTS, **{**SHORT, **given}).images
    assert relative_error(got, drawn(own, **given)) < 1e-4
