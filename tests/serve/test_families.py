# SPDX-License-Identifier: Apache-2.0
"""Any pipeline that has objectives is served, and what its family cannot do is refused by name."""

import diffusers
import numpy as np
import pytest
from PIL import Image

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.serve.app import create_app
from msdda_fast.serve.settings import ServeSettings
from tests.families import images, videos, xl
from tests.families.encoders import with_encoders
from tests.serve.conftest import Running, until
from tests.serve.pictures import base64_png, halves, picture, saved
from tests.serve.test_api import pixels
from tests.serve.test_fields import check
from tests.tiny_model import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),
]

WEIGHTS = {"a": 0.3, "b": 0.7}
SIZES = {"sizes": ("32x32", "16x16")}


def pipe_of(make):
    stock, _ = with_encoders(make)
    return quiet(mf.MSDDAPipeline.from_pipe(stock))


def running(make):
    one = Running(mf.Engine(pipe_of(make), max_batch=2, max_wait_ms=0), **SIZES)
    until(lambda: one.service.is_ready)
    return one


@pytest.fixture(scope="module")
def xl_served():
    one = running(xl.text)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def flux_served():
    one = running(images.flux)
    yield one
    one.stop()


def edited(one, **more):
    """Pixels of an edit by a service."""
    fields = {"prompt": "a red dog", "steps": "4", "seed": "5", "image_strength": "0.7"}
    fields |= {f"weights[{name}]": str(weight) for name, weight in WEIGHTS.items()}
    files = [("image", ("a.png", saved(picture()))), *more.items()]
    answer = one.http.post("/v1/images/edits", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def expected(pipe, **more):
    images = pipe(
        "a red dog", weights=WEIGHTS, seed=5, num_inference_steps=4, image=picture(),
        strength=0.7, **more,
    ).images  # fmt: skip
    return np.asarray(images[0], int)


def test_images_are_those_of_the_pipeline(xl_served):
    answer = xl_served.draw(weights=WEIGHTS, seed=5, steps=4, size="16x16", negative_prompt="a")
    found = xl_served.engine.pipe(
        "a red dog", weights=WEIGHTS, seed=5, num_inference_steps=4, height=16, width=16,
        negative_prompt="a",
    ).images[0]  # fmt: skip
    assert abs(pixels(answer.json()["data"][0]["b64_json"]) - np.asarray(found, int)).max() <= 1


def test_masks_and_ranges_are_those_of_the_pipeline(served, flux_served):
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    masks = {"masks": {name: base64_png(left) for name in ("warm",)}, "mask_softness": 2}
    late = {"weights": {"500-999": {"warm": 1, "cool": 0}, "0-499": {"warm": 0, "cool": 1}}}
    found = []
    for ours, theirs in [
        (masks, {"masks": {"warm": left}, "mask_softness": 2}),
        (late, late),
        ({}, {}),
    ]:
        answer = served.draw(seed=5, steps=4, **ours)
        found.append(pixels(answer.json()["data"][0]["b64_json"]))
        wanted = served.engine.pipe("a red dog", seed=5, num_inference_steps=4, **theirs).images[0]
        assert abs(found[-1] - np.asarray(wanted, int)).max() <= 1
    assert all(abs(one - found[2]).max() > 1 for one in found[:2])
    masks["masks"] = {"a": masks["masks"]["warm"]}
    assert flux_served.draw(steps=2, **masks).status_code == 200


class TestMasks:
    @pytest.mark.parametrize(
        ("masks", "param", "reason"),
        [
            ({"hot": 255}, "masks", "hot"),
            ({"warm": 100, "cool": 100}, "masks", "row 0, column 0"),
            ({"warm": 200, "cool": 200}, "masks", "row 0, column 0"),
        ],
    )
    def test_that_make_no_preference_are_refused(self, served, masks, param, reason):
        masks = {name: base64_png(Image.new("L", (32, 32), value)) for name, value in masks.items()}
        answer = served.draw(masks=masks)
        check(answer, param)
        assert reason in answer.json()["error"]["message"]

    def test_ranges_that_do_not_cover(self, served):
        answer = served.draw(weights={"500-999": {"warm": 1, "cool": 0}})
        check(answer, "weights")
        assert "cover every timestep" in answer.json()["error"]["message"]


class TestEdits:
    def test_start_from_the_image(self, xl_served):
        parts = xl_served.engine.pipe.detach().components
        stock = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
        pipe = quiet(mf.MSDDAPipeline.from_pipe(stock))
        assert abs(edited(xl_served) - expected(pipe)).max() <= 1

    def test_change_what_is_transparent(self, xl_served):
        parts = xl_served.engine.pipe.detach().components
        stock = diffusers.StableDiffusionXLInpaintPipeline(**parts)
        pipe = quiet(mf.MSDDAPipeline.from_pipe(stock))
        left = Image.new("L", (32, 32))
        left.paste(255, (0, 0, 16, 32))
        found = edited(xl_served, mask=("m.png", saved(halves())))
        wanted = expected(pipe, mask_image=left, height=32, width=32)
        assert abs(found - wanted).max() <= 1

    def test_of_stable_diffusion(self, served):
        """The captured pipeline draws texts, and stock ones of its networks the others."""
        answer = served.http.post(
            "/v1/images/edits", data={"prompt": "a red dog", "steps": "4", "seed": "5"},
            files={"image": ("a.png", saved(picture()))},
        )  # fmt: skip
        again = served.draw(steps=4, seed=5)
        first, second = (pixels(a.json()["data"][0]["b64_json"]) for a in (answer, again))
        assert abs(first - second).max() > 1

    def test_are_streamed(self, flux_served):
        with flux_served.http.stream(
            "POST",
            "/v1/images/edits",
            data={"prompt": "a", "steps": "4", "stream": "true", "progress": "true"},
            files={"image": ("a.png", saved(picture()))},
        ) as answer:
            text = "".join(answer.iter_text())
        assert text.count("event: image_edit.progress") >= 2 and "image_edit.completed" in text


class TestRefused:
    def test_at_the_start(self):
        """A service of images has no answer for a video."""
        engine = mf.Engine(pipe_of(videos.wan))
        try:
            with pytest.raises(UnsupportedNetwork, match="WanPipeline makes videos"):
                create_app(engine, ServeSettings(model="x", sizes=("16x16",)))
        finally:
            engine.close(drain=False)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"negative_prompt": "a"}, "negative_prompt"),
            ({"stream": True, "partial_images": 1}, "partial_images"),
            ({"weights": {"a": 1}}, "weights"),
            ({"guidance_scale": 101}, "guidance_scale"),
        ],
    )
    def test_by_field(self, flux_served, body, param):
        check(flux_served.draw(**body), param)

    def test_images_where_no_pipeline_takes_them(self, flux_served, monkeypatch):
        def refuse(request):
            if request.image is not None:
                error = mf.errors.InvalidRequest("no class starts from images")
                error.field = "mask_image" if request.mask_image else "image"
                raise error
            return checks(request)

        routes = flux_served.engine._routes
        checks = routes.checks
        monkeypatch.setattr(flux_served.engine._admission, "_checks", refuse)
        for files, param in [({}, "image"), ({"mask": ("m.png", saved(halves()))}, "mask")]:
            files = {"image": ("a.png", saved(picture())), **files}
            answer = flux_served.http.post("/v1/images/edits", data={"prompt": "a"}, files=files)
            check(answer, param)


def test_what_a_model_can_do_is_told(xl_served, flux_served, served):
    told = [one.http.get("/v1/objectives").json() for one in (xl_served, flux_served, served)]
    assert [one["family"] for one in told] == [
        "StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusionPipeline",
    ]  # fmt: skip
    for name, expected in {
        "image": [True, True, True],
        "mask": [True, True, True],
        "masks": [True, True, True],
        "negative_prompt": [True, False, True],
        "partial_images": [False, False, True],
        "progress": [True, True, True],
    }.items():
        assert [one["capabilities"][name] for one in told] == expected, name
    assert [one["timesteps"] for one in told] == [1000] * 3
    assert told[0]["sizes"] == ["32x32", "16x16"]
    assert told[1]["data"][0].keys() == {"id", "eta", "guidance_scale", "noise"}


def test_an_accelerator_is_told_without_its_path_and_draws(tiny):
    pipe = tiny.load(objectives={"cool": mf.Objective(tiny.cool)}, accelerator=str(tiny.warm))
    one = Running(mf.Engine(pipe, max_batch=1), steps=2, max_steps=64)
    try:
        until(lambda: one.service.is_ready)
        answer = one.http.get("/v1/objectives")
        assert answer.json()["accelerator"] == {"scheduler": "LCMScheduler", "steps": 4}
        assert str(tiny.folder) not in answer.text
        assert one.draw().status_code == 200
        check(one.draw(steps=51), "steps")  # more than it was made of
        files = {"image": ("a.png", saved(picture()))}
        answer = one.http.post("/v1/images/edits", data={"prompt": "a", "steps": "51"}, files=files)
        check(answer, "steps")
        assert "refuses 51 steps" in answer.text
    finally:
        one.stop()
