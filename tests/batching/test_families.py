# SPDX-License-Identifier: Apache-2.0
"""An engine draws with any pipeline that has objectives, from texts, from images, inpainting."""

import functools
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

import msdda_fast as mf
from msdda_fast.batching import worker
from msdda_fast.batching.stock_drawing import StockDrawer
from msdda_fast.errors import UnsupportedNetwork
from tests.batching.conftest import SOON, Plug, assert_close, request, together
from tests.families import images, videos, xl
from tests.families.encoders import with_encoders
from tests.tiny_model import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),
]

NOISE = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
PICTURES = [Image.fromarray(one) for one in NOISE]
MASK = Image.new("L", (32, 32))
MASK.paste(255, (8, 8, 24, 32))
HALF = Image.new("L", (32, 32))
HALF.paste(255, (0, 0, 16, 32))


class Kind(NamedTuple):
    """A tiny family, and what its requests have in common."""

    make: object
    fields: dict


KINDS = {
    "SD3": Kind(images.sd3, {"height": 16, "width": 16, "guidance_scale": 3.0}),
    "SDXL": Kind(xl.text, {"height": 32, "width": 32, "negative_prompt": "blurry"}),
    "FLUX": Kind(images.flux, {"height": 8, "width": 8}),
    "Wan": Kind(videos.wan, {"height": 16, "width": 16}),
}
#: Wan's own is 81, of which no test needs more than these.
FRAMES = 5


@functools.cache
def pipe_of(name: str):
    stock, _ = with_encoders(KINDS[name].make)
    return quiet(mf.MSDDAPipeline.from_pipe(stock))


@pytest.fixture(autouse=True)
def few_frames(monkeypatch):
    call = diffusers.WanPipeline.__call__
    names = call.__wrapped__.__code__.co_varnames[1 : call.__wrapped__.__code__.co_argcount]
    place = len(call.__wrapped__.__defaults__) - len(names) + names.index("num_frames")
    defaults = list(call.__wrapped__.__defaults__)
    defaults[place] = FRAMES
    monkeypatch.setattr(call.__wrapped__, "__defaults__", tuple(defaults))


def strangers(name: str, **more) -> list:
    """Requests that differ in prompt, weights and seed."""
    fields = KINDS[name].fields | more
    return [
        request("a red dog", weights={"a": 0.3, "b": 0.7}, seed=3, **fields),
        request("a blue cat", weights={"a": 1.0, "b": 0.0}, seed=2**64 - 1, **fields),
        request("a red cat", weights=lambda k: (0.0, 1.0) if k else (0.5, 0.5), seed=9, **fields),
    ]


def alone(pipe, one, **more):
    """The latent of a request by a call of the pipeline."""
    given = {"guidance_scale": one.guidance_scale, "objective_strength": one.strength}
    given |= {"negative_prompt": one.negative_prompt or None, "strength": one.image_strength}
    given |= {"image": one.image, "mask_image": one.mask_image}
    size = {"height": one.height, "width": one.width} if one.image is None else {}
    given = {name: value for name, value in {**given, **size}.items() if value is not None}
    return pipe(
        one.prompt, weights=one.weights, seed=one.seed, num_inference_steps=3,
        output_type="latent", return_dict=False, **given, **more,
    )[0][0]  # fmt: skip


def some(*names, full) -> list:
    """Names of families; of `full`, which show nothing that the others do not, by test-all."""
    return [*names, *(pytest.param(name, marks=pytest.mark.full) for name in full)]


class TestTexts:
    @pytest.mark.parametrize("name", some("SD3", "FLUX", "Wan", full=["SDXL"]))
    def test_strangers_share_a_batch_and_get_the_images_they_would_get_alone(self, start, name):
        pipe = pipe_of(name)
        asked = strangers(name)
        results = together(start(pipe), asked, height=16, width=16)
        assert {result.batch_size for result in results} == {3}
        for result, one in zip(results, asked, strict=True):
            assert_close(result.image, alone(pipe, one))
            assert result.seed == one.seed

    def test_company_of_one_size_changes_no_bit(self, start):
        engine = start(pipe_of("SD3"), batch_sizes=[4])
        first = engine.submit(strangers("SD3")[0]).result(SOON)
        again = together(engine, strangers("SD3"))[0]
        assert (first.batch_size, again.batch_size) == (1, 3)
        assert torch.equal(first.image, again.image)

    def test_strengths_are_of_each_image_and_share_no_batch_with_none(self, start):
        pipe = pipe_of("SD3")
        asked = strangers("SD3", strength=2.0)[:2] + strangers("SD3", strength={"a": 0.5})[:1]
        results = together(start(pipe), [*asked, strangers("SD3")[0]])
        assert [result.batch_size for result in results] == [3, 3, 3, 1]
        for result, one in zip(results, asked, strict=False):
            assert_close(result.image, alone(pipe, one))

    @pytest.mark.full  # equal shapes share a batch in test_queue.py
    def test_what_a_call_has_once_is_shared_by_a_batch(self, start):
        engine = start(pipe_of("SDXL"))
        base = KINDS["SDXL"].fields
        kinds = [base, base | {"guidance_scale": 3.0}, base | {"negative_prompt": ""}]
        results = together(engine, [request(**fields) for fields in kinds for _ in range(2)])
        assert [result.batch_size for result in results] == [2] * 6

    def test_an_objective_that_nobody_weighs_does_not_run(self, start):
        pipe, rows = pipe_of("SD3"), []
        engine = start(pipe)
        engine.submit(strangers("SD3")[0]).result(SOON)
        block = pipe.transformer.transformer_blocks[0]

        def note(module, args, kwargs):
            rows.append(len(kwargs["hidden_states"]))

        with block.register_forward_pre_hook(note, with_kwargs=True):
            for one in strangers("SD3")[:2]:
                engine.submit(one).result(SOON)
        assert rows == [4] * 3 + [2] * 3  # with guidance two rows per objective

    @pytest.mark.full  # one scheduler whose own level is another than its objectives'
    def test_levels_that_a_scheduler_has_and_others_share_no_batch(self, start):
        """Alone each image is drawn as here; together the levels of all would be mixed."""
        levels = {"a": mf.Objective(), "b": mf.Objective(eta=0.5)}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(pipe_of("SD3"), objectives=levels))
        asked = [request(weights=w, **KINDS["SD3"].fields) for w in ([1, 0], [0, 1])]
        results = together(start(pipe), asked, weights=[1, 0])
        assert [result.batch_size for result in results] == [1, 1]
        for result, one in zip(results, asked, strict=True):
            assert_close(result.image, alone(pipe, one))

    def test_pictures_are_those_of_the_pipeline(self, start):
        pipe = pipe_of("SD3")
        one = strangers("SD3")[0]
        result = start(pipe, output_type="pil").submit(one).result(SOON)
        expected = pipe(
            one.prompt, weights=one.weights, seed=one.seed, num_inference_steps=3, height=16,
            width=16, guidance_scale=3.0,
        ).images[0]  # fmt: skip
        assert result.image.tobytes() == expected.tobytes()
        assert not result.is_flagged

    def test_a_video_is_a_list_of_its_frames(self, start):
        engine = start(pipe_of("Wan"), output_type="pil")
        frames = engine.submit(strangers("Wan")[0]).result(SOON).image
        assert [frame.size for frame in frames] == [(16, 16)] * FRAMES

    @pytest.mark.parametrize(("name", "size"), [("SD3", (16, 16)), ("FLUX", (128, 128))])
    def test_sizes_are_the_models_own_unless_told(self, start, name, size):
        assert start(pipe_of(name)).native_size == size

    def test_the_pipeline_stays_as_it_was(self, start):
        pipe = pipe_of("SD3")
        before = dict(pipe.__dict__), dict(pipe.components)
        engine = start(pipe)
        engine.submit(strangers("SD3")[0]).result(SOON)
        assert (pipe.__dict__, pipe.components) == before
        assert engine.pipe.objectives == pipe.objectives


class TestImages:
    @pytest.mark.parametrize("name", some("SDXL", full=["SD3", "FLUX"]))
    def test_each_starts_from_its_own(self, start, name):
        pipe = pipe_of(name)
        fields = {"image_strength": 0.7, "height": None, "width": None}
        asked = strangers(name, **fields)[:2]
        asked = [replace(one, image=p) for one, p in zip(asked, PICTURES, strict=True)]
        engine = start(pipe)
        results = together(engine, asked)
        assert {result.batch_size for result in results} == {2}
        other = engine._routes._routes["image-to-image"].drawer.pipe
        assert "Img2Img" in type(other).__name__
        for result, one in zip(results, asked, strict=True):
            assert_close(result.image, alone(other, one, **sized(name)))

    @pytest.mark.full  # of Stable Diffusion below
    @pytest.mark.parametrize("name", ["SDXL", "FLUX"])
    def test_each_has_its_own_mask(self, start, name):
        pipe = pipe_of(name)
        fields = {"image_strength": 0.9, "height": None, "width": None}
        asked = [
            replace(one, image=picture, mask_image=mask)
            for one, picture, mask in zip(
                strangers(name, **fields)[:2], PICTURES, [MASK, HALF], strict=True
            )
        ]
        engine = start(pipe)
        results = together(engine, asked)
        assert {result.batch_size for result in results} == {2}
        other = engine._routes._routes["inpaint"].drawer.pipe
        for result, one in zip(results, asked, strict=True):
            assert_close(result.image, alone(other, one, height=32, width=32))

    def test_stable_diffusion_does_too(self, start, tiny):
        """The captured pipeline draws texts, and stock ones of its networks the others."""
        pipe = tiny.shared()
        engine = start(pipe)
        fields = dict(weights={"warm": 0.3, "cool": 0.7}, guidance_scale=3.0)
        asked = [
            request(image=PICTURES[0], image_strength=0.7, seed=3, **fields),
            request("a blue cat", image=PICTURES[1], image_strength=0.7, **fields),
            request(image=PICTURES[0], mask_image=MASK, **fields),
            request(**fields),
        ]
        results = together(engine, asked)
        assert [result.batch_size for result in results] == [2, 2, 1, 1]
        kinds = [diffusers.StableDiffusionImg2ImgPipeline] * 2
        kinds.append(diffusers.StableDiffusionInpaintPipeline)
        names = {name: one.adapter for name, one in pipe.variants.items()}
        objectives = {n: mf.Objective(names[n], eta=o.eta) for n, o in pipe.objectives.items()}
        for result, one, kind in zip(results, asked, kinds, strict=False):
            stock = kind(**pipe.components, requires_safety_checker=False)
            other = quiet(mf.MSDDAPipeline.from_pipe(stock, objectives=objectives))
            assert_close(result.image, alone(other, one))
        assert_close(results[3].image, engine.submit(asked[3]).result(SOON).image)

    def test_is_resized_where_another_size_is_asked_for(self, start):
        engine = start(pipe_of("SDXL"), output_type="pil")
        one = request(image=PICTURES[0], mask_image=MASK, height=16, width=24)
        assert engine.submit(one).result(SOON).image.size == (24, 16)

    def test_an_engine_of_such_a_pipeline_draws_nothing_else(self, start):
        stock = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe_of("SDXL").components)
        engine = start(quiet(mf.MSDDAPipeline.from_pipe(stock)), max_batch=1)
        engine.prepare(32, 32, num_inference_steps=3)
        one = request(image=PICTURES[0], image_strength=0.7)
        assert engine.submit(one).result(SOON)
        with pytest.raises(mf.InvalidRequest, match="starts from an image") as raised:
            engine.submit(request())
        assert raised.value.field == "image"

    @pytest.mark.full  # shared_guidance is tested in tests/families
    def test_guidance_is_that_of_the_objectives(self, start, tiny):
        engine = start(tiny.load(objectives=tiny.objectives(guidance_scale=3.0)))
        own = request(image=PICTURES[0], image_strength=0.7)
        given = replace(own, guidance_scale=3.0)
        results = together(engine, [own, given])
        assert {result.batch_size for result in results} == {2}
        assert_close(results[0].image, results[1].image)

    def test_one_whose_images_belong_to_all_prompts_is_drawn_alone(self, start, monkeypatch):
        monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 16)])
        other = diffusers.FluxKontextPipeline(**pipe_of("FLUX").components)
        engine = start(quiet(mf.MSDDAPipeline.from_pipe(other)), output_type="pil")
        asked = [request(image=picture, height=16, width=8) for picture in PICTURES]
        results = together(engine, [*asked, *[request(height=16, width=8)] * 2], height=8, width=8)
        assert [result.batch_size for result in results] == [1, 1, 2, 2]
        assert {result.image.size for result in results} == {(8, 16)}


def sized(name):
    return {} if name == "SDXL" else {"height": 32, "width": 32}


RANGES = [
    {(500, 1000): {"a": 1.0, "b": 0.0}, (0, 500): {"a": 0.2, "b": 0.8}},
    {"0-1000": [0.3, 0.7]},
]


class TestWhereAndWhen:
    @pytest.mark.parametrize("name", some("SD3", full=["FLUX", "SDXL", "Wan"]))
    def test_masks_are_of_each_image(self, start, name):
        pipe = pipe_of(name)
        size = KINDS[name].fields["width"]
        left = Image.new("L", (size, size))
        left.paste(255, (0, 0, size // 2, size))
        asked = strangers(name)
        asked[0] = replace(asked[0], masks={"a": left})
        asked[2] = replace(asked[2], masks={"a": MASK.resize((size, size))})
        results = together(start(pipe), asked, height=16, width=16)
        assert {result.batch_size for result in results} == {3}
        for result, one in zip(results, asked, strict=True):
            assert_close(result.image, alone(pipe, one, masks=one.masks))

    @pytest.mark.full  # one more of what shapes have
    def test_softness_is_one_for_all_with_masks(self, start):
        engine = start(pipe_of("SD3"))
        mask = {"a": MASK.crop((0, 0, 16, 16))}
        soft = [{"masks": mask, "mask_softness": 3.0}] * 2 + [{"masks": mask}, {}]
        results = together(engine, [request(**one) for one in soft])
        assert [result.batch_size for result in results] == [2] * 4
        assert_close(results[0].image, alone(engine.pipe, request(), masks=mask, mask_softness=3.0))

    def test_ranges_of_timesteps_are_of_each_image(self, start):
        pipe = pipe_of("SD3")
        asked = [replace(one, weights=w) for one, w in zip(strangers("SD3"), RANGES, strict=False)]
        results = together(start(pipe), [*asked, strangers("SD3")[0]])
        assert [result.batch_size for result in results] == [2, 2, 1]
        for result, one in zip(results, asked, strict=False):
            assert_close(result.image, alone(pipe, one))

    def test_stable_diffusion_has_all_of_it_in_one_batch(self, start, own_pipe):
        ranges = {(500, 999): {"warm": 1.0, "cool": 0.0}, (0, 499): {"warm": 0.2, "cool": 0.8}}
        fields = [
            {"masks": {"warm": HALF}, "mask_softness": 2.0},
            {"masks": {"cool": MASK}, "weights": ranges},
            {"weights": ranges},
            {"weights": [0.3, 0.7]},
        ]
        asked = [request(seed=seed, **one) for seed, one in enumerate(fields)]
        results = together(start(own_pipe), asked)
        assert {result.batch_size for result in results} == {4}
        for result, one, given in zip(results, asked, fields, strict=True):
            latents = own_pipe(
                one.prompt, seed=one.seed, num_inference_steps=3, output_type="latent", **given
            ).images
            assert_close(result.image, latents[0])

    @pytest.mark.parametrize(
        ("fields", "error", "field"),
        [
            ({"masks": {"c": MASK}}, mf.UnknownObjective, "masks"),
            ({"masks": [{"a": MASK}]}, mf.InvalidRequest, "masks"),
            ({"masks": {"a": MASK}, "height": 16}, mf.InvalidShape, "masks"),
            ({"masks": {"a": MASK, "b": MASK}}, mf.InvalidWeights, "masks"),
            ({"masks": {"a": MASK}, "weights": [1, 0]}, mf.InvalidWeights, "masks"),
            ({"mask_softness": 1.0}, mf.InvalidWeights, "mask_softness"),
            ({"masks": {"a": MASK}, "mask_softness": -1}, mf.InvalidWeights, "mask_softness"),
            ({"masks": {"a": MASK}, "mask_softness": 10**400}, mf.InvalidWeights, "mask_softness"),
            ({"weights": {"500-999": [1, 0]}}, mf.InvalidWeights, "weights"),
            ({"weights": {"5-9": [1, 0], "7-20": [0, 1]}}, mf.InvalidWeights, "weights"),
        ],
    )
    @pytest.mark.parametrize("captured", [False, True], ids=["stock", "captured"])
    def test_bad_ones_by_field(self, start, tiny, captured, fields, error, field):
        pipe = pipe_of("SDXL")
        if captured:
            adapters = [variant.adapter for variant in tiny.shared().variants.values()]
            names = dict(zip("ab", map(mf.Objective, adapters), strict=True))
            pipe = mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=names)
        with pytest.raises(error) as raised:
            start(pipe).submit(request(**{"height": 32, "width": 32, **fields}))
        assert raised.value.field == field

    def test_a_list_of_one_is_that_one(self, start):
        engine = start(pipe_of("SDXL"))
        weights = {"500-999": [1, 0], "0-499": [0, 1]}
        one, other = (
            engine.submit(request(height=32, width=32, weights=given)).result(SOON).image
            for given in (weights, [weights])
        )
        assert torch.equal(one, other)


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "fields", "error", "field"),
        [
            ("SD3", {"weights": {"a": 1}}, mf.InvalidWeights, "weights"),
            ("SD3", {"weights": {"c": 1}}, mf.UnknownObjective, "weights"),
            ("SD3", {"strength": -1}, mf.InvalidWeights, "strength"),
            ("SD3", {"num_inference_steps": 0}, mf.InvalidSchedule, "num_inference_steps"),
            ("SD3", {"num_inference_steps": 10**9}, mf.InvalidRequest, "num_inference_steps"),
            ("SD3", {"guidance_scale": {"a": 2.0}}, mf.InvalidRequest, "guidance_scale"),
            ("SD3", {"guidance_scale": [2.0, 3.0]}, mf.InvalidRequest, "guidance_scale"),
            ("SD3", {"guidance_scale": -1.0}, mf.InvalidSchedule, "guidance_scale"),
            ("SD3", {"height": 15}, mf.InvalidShape, "height"),
            ("SD3", {"width": -2}, mf.InvalidShape, "width"),
            ("SD3", {"height": 2**20}, mf.InvalidRequest, "height"),
            ("FLUX", {"width": 9}, mf.InvalidShape, "width"),
            ("Wan", {"height": 24}, mf.InvalidShape, "height"),
            ("SDXL", {"prompt": "a dog " * 100, "height": 12}, mf.InvalidShape, "height"),
            ("SD3", {"prompt": 5}, mf.InvalidRequest, "prompt"),
            ("SD3", {"preview_steps": [1]}, mf.InvalidRequest, "preview_steps"),
            ("FLUX", {"negative_prompt": "blurry"}, mf.InvalidRequest, "negative_prompt"),
            ("SD3", {"image": NOISE[0]}, mf.InvalidRequest, "image"),
            ("SD3", {"mask_image": MASK}, mf.InvalidRequest, "mask_image"),
            ("SD3", {"image_strength": 0.5}, mf.InvalidRequest, "image_strength"),
            ("SD3", {"image": PICTURES[0], "mask_image": MASK}, mf.InvalidRequest, "mask_image"),
            ("Wan", {"image": PICTURES[0]}, mf.InvalidRequest, "image"),
            ("SDXL", {"image": Image.new("L", (30, 32))}, mf.InvalidShape, "image"),
            (
                "SDXL",
                {"image": PICTURES[0], "mask_image": Image.new("L", (8, 8))},
                mf.InvalidShape,
                "mask_image",
            ),
            (
                "SDXL",
                {"image": PICTURES[0], "image_strength": 2},
                mf.InvalidRequest,
                "image_strength",
            ),
            (
                "SDXL",
                {"image": PICTURES[0], "image_strength": 0.1},
                mf.InvalidRequest,
                "image_strength",
            ),
        ],
    )
    def test_by_field_before_it_stands_in_line(self, start, name, fields, error, field):
        engine = start(pipe_of(name))
        size = {"height": None, "width": None} if "image" in fields else {}
        with pytest.raises(error) as raised:
            engine.submit(request(**{**KINDS[name].fields, **size, **fields}))
        assert raised.value.field == field
        assert engine.stats().waiting == engine.stats().batches == 0

    @pytest.mark.parametrize("name", ["SD3", None], ids=["stock", "captured"])
    def test_one_can_ask_without_drawing(self, start, own_pipe, name):
        engine = start(own_pipe if name is None else pipe_of(name), max_cost=2**20)
        engine.check(request(), 2)
        with pytest.raises(mf.InvalidRequest, match="max_cost"):
            engine.check(request(), 2**20)
        with pytest.raises(mf.UnknownObjective):
            engine.check(request(weights={"hot": 1}))
        stats = engine.stats()
        assert (stats.waiting, stats.drawing, stats.batches) == (0, 0, 0)

    def test_what_the_stock_call_would_refuse(self, start, monkeypatch):
        def check_inputs(self, prompt, width):
            if width != 16:
                raise ValueError("`width` and `height` must be those of a stamp")

        engine = start(pipe_of("SD3"))
        monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "check_inputs", check_inputs)
        with pytest.raises(mf.InvalidRequest, match="those of a stamp") as raised:
            engine.submit(request(width=18))
        assert raised.value.field == "width"
        engine.check(request(width=16))

    def test_levels_of_zero_beside_others(self, start):
        levels = {
            "a": mf.Objective(noise=mf.FlowSDE(0.7)),
            "b": mf.Objective(noise=mf.FlowSDE(0.0)),
        }
        pipe = quiet(mf.MSDDAPipeline.from_pipe(pipe_of("SD3"), objectives=levels))
        engine = start(pipe)
        with pytest.raises(mf.ZeroVariance) as raised:
            engine.submit(strangers("SD3")[0])
        assert raised.value.field == "weights"
        assert engine.submit(strangers("SD3")[1]).result(SOON)
        engine.prepare(16, 16, num_inference_steps=2)

    def test_more_work_than_one_request_may_ask_for_counts_frames(self, start):
        engine = start(pipe_of("Wan"), max_cost=2 * FRAMES * 480 * 832)
        assert engine.submit(strangers("Wan")[0]).result(SOON)
        with pytest.raises(mf.InvalidRequest, match=r"1 images x 5 frames x 480 x 832"):
            engine.submit(request(num_inference_steps=3))

    @pytest.mark.full  # attaching refuses them in tests/families
    def test_objectives_with_what_stock_pipelines_cannot(self, start, tiny):
        objectives = tiny.objectives()
        objectives["cool"] = replace(objectives["cool"], guidance_scale=3.0)
        engine = start(tiny.load(objectives=objectives))
        with pytest.raises(mf.InvalidRequest, match="guidance_scale of its own") as raised:
            engine.submit(request(image=PICTURES[0]))
        assert raised.value.field == "image"

    def test_previews_of_stable_diffusion_from_images(self, start, own_pipe):
        engine = start(own_pipe)
        with pytest.raises(mf.InvalidRequest, match="previews are of Stable Diffusion"):
            engine.submit(request(image=PICTURES[0], preview_steps=[1]))

    def test_pipelines_whose_call_needs_more_than_a_request_has(self, start):
        with pytest.raises(UnsupportedNetwork, match="control image"):
            start(mf.MSDDAPipeline.from_pipe(xl.controlnet()[0]))
        with pytest.raises(UnsupportedNetwork, match="makes sound"):
            start(mf.MSDDAPipeline.from_pipe(videos.ltx2()[0]))
        with pytest.raises(UnsupportedNetwork, match="no tokenizer"):
            start(mf.MSDDAPipeline.from_pipe(images.sd3()[0]))
        with pytest.raises(UnsupportedNetwork, match=r"has objectives.*StableDiffusion3Pipeline"):
            start(images.sd3()[0])


class TestLeaving:
    def test_a_batch_that_nobody_waits_for_ends_at_its_next_step(self, start):
        engine, steps = start(pipe_of("SD3")), []
        plug = Plug(engine)
        fields = KINDS["SD3"].fields | {"num_inference_steps": 500}
        futures = []

        def leave(progress):
            steps.append(progress.step)
            if len(steps) == 4:
                for future in futures:
                    future.cancel()

        futures += engine.submit_images(request(on_step=leave, **fields), 2)
        plug.pull()
        with pytest.raises(CancelledError):
            futures[0].result(SOON)
        assert engine.submit(strangers("SD3")[0]).result(SOON)
        assert len(steps) == 4 and engine.stats().cancelled == 2 and engine.stats().failed == 0

    def test_progress_counts_the_steps_that_are_done(self, start):
        seen, engine = [], start(pipe_of("SDXL"))
        engine.submit(request(on_step=seen.append, image=PICTURES[0], image_strength=0.7)).result(
            SOON
        )
        assert [(one.step, one.steps) for one in seen] == [(1, 2), (2, 2)]

    def test_what_on_step_raises_is_the_outcome_of_its_own_request_only(self, start):
        def fall(progress):
            raise ZeroDivisionError("mine")

        engine = start(pipe_of("SD3"))
        plug = Plug(engine)
        good, bad = engine.submit(request()), engine.submit(request(on_step=fall))
        plug.pull()
        assert isinstance(bad.exception(SOON), ZeroDivisionError)
        assert good.result(SOON).batch_size == 2

    def test_closing_ends_a_batch_within_a_step(self, start):
        engine = start(pipe_of("SD3"))
        running = engine.submit(request(num_inference_steps=500))
        engine.close(drain=False, timeout_s=SOON)
        assert isinstance(running.exception(0), mf.EngineClosed)


class TestFailing:
    def test_one_that_fails_fails_alone_and_the_pipeline_goes_on(self, start, monkeypatch):
        engine = start(pipe_of("SD3"))
        plug = Plug(engine)
        encode = diffusers.StableDiffusion3Pipeline.encode_prompt

        def poisoned(self, prompt, *args, **kwargs):
            if "a red cat" in prompt:
                raise OSError("no text for a red cat")
            return encode(self, prompt, *args, **kwargs)

        monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "encode_prompt", poisoned)
        good, bad = (engine.submit(request(p)) for p in ("a red dog", "a red cat"))
        plug.pull()
        with pytest.raises(mf.EngineFailed, match="no text for a red cat"):
            bad.result(SOON)
        assert good.result(SOON).batch_size == 1  # drawn again, alone
        assert engine.stats().failure is None and engine.stats().restarting is None

    def test_images_that_are_not_finite_are_no_pictures(self, start, monkeypatch):
        pipe = pipe_of("SD3")
        engine = start(pipe, output_type="pil")
        decode = pipe.vae.decode

        def spoiled(latents, **options):
            (image,) = decode(latents, **options)
            image[0, 0, 0, 0] = float("nan")
            return (image,)

        plug = Plug(engine)
        monkeypatch.setattr(pipe.vae, "decode", spoiled)
        bad, good = engine.submit_images(request(), 2)
        plug.pull()
        with pytest.raises(mf.EngineFailed, match="NaN or infinite"):
            bad.result(SOON)
        assert good.result(SOON).image.size == (16, 16)

    def test_a_failing_network_is_restarted(self, start, monkeypatch):
        monkeypatch.setattr(worker, "BACK_OFF_S", (0.0, 0.0, 0.0))
        engine, left = start(pipe_of("SD3"), max_batch=1), [3]
        call, restarts = StockDrawer._call, []

        def sick(self, *arguments):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError("the device is lost")
            return call(self, *arguments)

        restart = StockDrawer.restart
        monkeypatch.setattr(StockDrawer, "_call", sick)
        monkeypatch.setattr(StockDrawer, "restart", lambda s: (restarts.append(1), restart(s)))
        first, other = engine.submit_images(request(), 2)
        assert isinstance(first.exception(SOON), mf.EngineFailed)
        assert other.result(SOON) and restarts == [1]
