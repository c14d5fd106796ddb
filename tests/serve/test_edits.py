# SPDX-License-Identifier: Apache-2.0
"""Images that clients send: OpenAI's form, and what it becomes."""

import json
from concurrent.futures import Future

import numpy as np
import openai
import pytest
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from PIL import Image

from msdda_fast.batching.request import GeneratedImage
from msdda_fast.serve import forms
from msdda_fast.serve.body import EditBody
from msdda_fast.serve.settings import ServeSettings
from tests.serve.pictures import PNG, SIZE, base64_png, halves, picture, saved
from tests.serve.test_api import WEIGHTS, pixels


@pytest.fixture
def noted(served, monkeypatch):
    """The requests that reach the engine, which draws none of them."""
    found = []

    def note(request, count=1, **options):
        served.engine.check(request, count)
        found.append(request)
        drawn = GeneratedImage(
            image=picture(), seed=request.seed, is_flagged=False, batch_size=1, waited_s=0,
            drawn_s=0,
        )  # fmt: skip
        futures = [Future() for _ in range(count)]
        for future in futures:
            future.set_result(drawn)
        return futures

    monkeypatch.setattr(served.engine, "submit_images", note)
    return found


class TestWhatIsAsked:
    def test_fields_and_files(self, edit, noted):
        masks = {"warm": base64_png(picture(mode="L"))}
        answer = edit(
            mask=saved(halves()), n="1", seed="5", steps="2", image_strength="0.5", size="auto",
            strength='{"warm": 0.5}', weights=json.dumps(WEIGHTS), mask_softness="3",
            negative_prompt="5", guidance_scale="2", masks=json.dumps(masks),
        )  # fmt: skip
        assert answer.status_code == 200 and answer.json()["size"] == "32x32"
        (request,) = noted
        assert np.array_equal(request.image, picture()) and request.image.mode == "RGB"
        assert request.mask_image.mode == "L"
        assert np.array_equal(np.asarray(request.mask_image)[0], [255] * 16 + [0] * 16)
        assert request.masks.keys() == {"warm"} and request.masks["warm"].mode == "L"
        assert np.array_equal(request.masks["warm"], picture(mode="L"))
        assert (request.seed, request.num_inference_steps, request.image_strength) == (5, 2, 0.5)
        assert request.weights == WEIGHTS and request.strength == {"warm": 0.5}
        assert (request.negative_prompt, request.guidance_scale) == ("5", 2)
        assert request.mask_softness == 3

    def test_entries_of_mappings_as_fields(self, edit, noted):
        given = {"weights[warm]": "0.25", "weights[cool]": "0.75", "strength[cool]": "2"}
        assert edit(**given).status_code == 200
        given = {
            "weights[500-999][warm]": "1", "weights[500-999][cool]": "0",
            "weights[0-499][warm]": "0", "weights[0-499][cool]": "1",
        }  # fmt: skip
        assert edit(**given).status_code == 200
        assert edit(**{"masks[warm]": base64_png(picture(mode="L"))}).status_code == 200
        assert noted[0].weights == {"warm": 0.25, "cool": 0.75} and noted[0].strength == {"cool": 2}
        assert noted[1].weights == {
            "500-999": {"warm": 1, "cool": 0}, "0-499": {"warm": 0, "cool": 1},
        }  # fmt: skip
        assert noted[2].masks.keys() == {"warm"}

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    def test_formats_and_modes(self, edit, noted, kind, mode):
        image = picture(mode="RGB").convert(mode)
        if (kind == "JPEG" and mode in ("LA", "P", "RGBA")) or (kind, mode) == ("PNG", "CMYK"):
            return
        sent = saved(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert edit(sent, steps="2").status_code == 200
        assert noted[0].image.mode == "RGB" and noted[0].image.size == SIZE

    def test_what_is_transparent_is_white(self, edit, noted):
        assert edit(saved(halves()), steps="2").status_code == 200
        assert np.asarray(noted[0].image)[0, :, 0].tolist() == [255] * 16 + [9] * 16

    def test_cameras_say_what_is_up(self, edit, noted):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image = picture()
        assert edit(saved(image, exif=exif), steps="2").status_code == 200
        assert np.array_equal(noted[0].image, image.transpose(Image.Transpose.ROTATE_270))

    def test_the_middle_is_taken_of_another_shape(self, edit, noted):
        image = Image.new("RGB", (96, 64), "black")
        image.paste("white", (16, 0, 80, 64))
        mask = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
        mask.paste((0, 0, 0, 255), (16, 0, 80, 64))
        assert edit(saved(image), mask=saved(mask), steps="2").status_code == 200
        assert np.asarray(noted[0].image).min() > 200  # the filter sees a little of its outside
        assert np.asarray(noted[0].mask_image).max() == 0
        assert noted[0].image.size == noted[0].mask_image.size == SIZE

    def test_guidance_of_the_service_is_that_of_requests_without(self):
        settings = ServeSettings(model="x", guidance_scale=1.0)
        for given, scale in ((None, 1), (2.5, 2.5)):
            body = EditBody(prompt="a", guidance_scale=given)
            assert body.checked(settings, ["32x32"]).guidance_scale == scale

    def test_its_own_size_is_the_default_if_it_is_served(self):
        body, settings = EditBody(prompt="a"), ServeSettings(model="x")
        for own, drawn in (("64x64", 64), ("48x48", 32), (None, 32)):
            assert body.checked(settings, ["32x32", "64x64"], own).width == drawn


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0,
        _strict_response_validation=True,
    ) as client:  # fmt: skip
        yield client


class TestOpenAI:
    def test_what_its_types_allow(self, client, asked):
        ours = {"weights": WEIGHTS, "seed": 5, "steps": 2, "image_strength": 0.5}
        answer = client.images.edit(
            image=("a.png", PNG), mask=saved(halves()), prompt="a red dog", n=2, size="32x32",
            background="auto", quality="auto", output_format="png", output_compression=100,
            response_format="b64_json", model="tiny", user="me", extra_body=ours,
        )  # fmt: skip
        assert [image.seed for image in answer.data] == [5, 6] and answer.size == "32x32"
        assert pixels(answer.data[0].b64_json).shape == (32, 32, 3)
        assert asked[0].weights == WEIGHTS and asked[0].image_strength == 0.5
        client.images.edit(
            image=[PNG], prompt="a", n=None, size=None, stream=None, partial_images=None,
            quality=None, background=None, extra_body={"steps": 2, "weights": None},
        )  # fmt: skip
        assert asked[1].mask_image is None and asked[1].image_strength is None

    def test_every_event_is_of_its_types(self, client, asked):
        (done,) = client.images.edit(image=PNG, prompt="a", stream=True, extra_body={"steps": 4})
        assert type(done) is ImageEditCompletedEvent and done.b64_json

    def test_refusals_are_bad_requests(self, client):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(image=[PNG, PNG], prompt="a")
        assert refused.value.param == "image" and refused.value.request_id
        with pytest.raises(openai.BadRequestError, match="previews are of") as refused:
            client.images.edit(image=PNG, prompt="a", stream=True, partial_images=2)
        assert refused.value.param == "partial_images"


def test_text_is_what_the_schema_calls_text():
    assert {"prompt", "size", "quality", "user", "model", "negative_prompt"} <= forms.TEXTS
    assert not forms.TEXTS & {"n", "seed", "weights", "strength", "stream", "masks"}


def test_edits_are_documented(served):
    described = served.http.get("/openapi.json").json()["paths"]["/v1/images/edits"]["post"]
    form = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image", "prompt"] and "image_strength" in form["properties"]
    page = served.http.get("/docs").text
    assert "POST /v1/images/edits" in page and "image_strength" in page
