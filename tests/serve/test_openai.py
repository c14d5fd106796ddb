# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client: everything its types allow, and answers that its types can read."""

import json

import openai
import pytest
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent

from msdda_fast.serve.body import EXACT


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,  # an answer of another type is an error
    ) as client:
        yield client


NULLS = {
    **dict.fromkeys(["background", "model", "moderation", "n", "output_compression", "size"]),
    **dict.fromkeys(["output_format", "partial_images", "quality", "response_format", "style"]),
    **dict.fromkeys(["stream", "safety_identifier", "frame_count", "svg"]),
}


def test_nulls_are_defaults(client, served):
    assert len(client.images.generate(prompt="a", n=None, size=None, quality=None).data) == 1
    assert served.draw(**NULLS).status_code == 200
    assert served.draw(typo=None).status_code == 400


def test_what_is_automatic_or_true_is_accepted(client):
    answer = client.images.generate(
        prompt="a", quality="auto", background="auto", moderation="auto", size="auto",
        output_compression=100, output_format="png", safety_identifier="me", user="me",
    )  # fmt: skip
    assert len(answer.data) == 1 and answer.background == "opaque" and answer.size == "32x32"
    assert answer._request_id.startswith("req_")


@pytest.mark.parametrize("more", [{}, {"partial_images": 2}], ids=["plain", "previews"])
def test_every_event_is_of_its_types(client, more):
    stream = client.images.generate(prompt="a", stream=True, extra_body={"steps": 8}, **more)
    *partial, done = stream
    assert type(done) is ImageGenCompletedEvent and done.b64_json and done.usage.total_tokens == 0
    assert [type(event) for event in partial] == [ImageGenPartialImageEvent] * len(partial)
    assert len(partial) == more.get("partial_images", 0) and all(e.b64_json for e in partial)


def test_the_model(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.object == "model" and model.created > 1.7e9
    assert client.models.retrieve("tiny") == model
    for other in ("gpt-image-1", "org/tiny"):
        with pytest.raises(openai.NotFoundError, match="the model served here is 'tiny'"):
            client.models.retrieve(other)


def test_refusals_are_bad_requests(client):
    with pytest.raises(openai.BadRequestError, match="no image is stored") as refused:
        client.images.generate(prompt="a", response_format="url")
    assert refused.value.param == "response_format" and refused.value.request_id


class TestSeeds:
    def test_that_are_returned_can_be_sent_by_any_client(self, served):
        answer = served.draw(n=3).json()["data"]
        seeds = [image["seed"] for image in answer]
        assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2] and max(seeds) < EXACT
        again = served.draw(seed=int(float(seeds[2])))  # as a client that knows doubles only
        assert again.json()["data"][0]["seed"] == seeds[2]

    def test_up_to_the_last_one(self, served):
        last = 2**63 - 1
        answer = served.draw(n=2, seed=last - 1, steps=1).json()["data"]
        assert [image["seed"] for image in answer] == [last - 1, last]
        refused = served.draw(n=2, seed=last)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "seed"


@pytest.mark.parametrize(
    "body",
    [
        {"k" * 60_000: 1},
        {"weights": {"k" * 60_000: 1}},
        {"weights": {"k" * 60_000: "x"}},
        {"weights": {f"k {i}": 1 for i in range(5000)}},
        {"model": "k" * 60_000},
        {"size": "k" * 60_000},
        {"prompt": "k " * 30_000},
        {"user": "k" * 60_000},
    ],
    ids=lambda body: next(iter(body))[:20],
)
def test_errors_repeat_little_of_what_was_sent(served, body):
    answer = served.draw(**body)
    assert answer.status_code in (400, 404)
    assert answer.text.count("k") < 200 and len(answer.content) < 450
    if "weights" in body:
        assert answer.json()["error"]["param"].startswith("weights")


def test_the_largest_request_is_bounded(serve):
    running = serve(settings={"max_cost": 8, "sizes": ("32x32", "64x64"), "steps": 2})
    for body, status in [
        ({"n": 2, "steps": 4}, 200),
        ({"n": 3, "steps": 3}, 400),
        ({"size": "64x64", "steps": 2}, 200),
        ({"size": "64x64", "steps": 3}, 400),
    ]:
        answer = running.draw(**body)
        assert answer.status_code == status
        if status == 400:
            assert answer.json()["error"]["param"] == "n" and "more than 8" in answer.text
    assert running.http.get("/v1/objectives").json()["max_cost"] == 8
    with pytest.raises(ValueError, match="admits no image of 64x64 with 3 steps"):
        serve(settings={"max_cost": 8, "sizes": ("32x32", "64x64")})


def test_docs_need_no_other_site(served):
    page = served.http.get("/docs")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for text in ("POST /v1/images/generations", "guidance_scale", "GET /v1/models", "b64_json"):
        assert text in page.text
    assert "http" not in page.text and "<script" not in page.text
    assert served.http.get("/redoc").status_code == 404
    assert json.loads(served.http.get("/openapi.json").text)["info"]["title"] == "msdda-fast: tiny"
