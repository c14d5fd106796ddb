# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: images for OpenAI's client, refusals by field, what operators read."""

import base64
import io
import json
import re

import numpy as np
import openai
import pytest
from PIL import Image

from msdda_fast.errors import InvalidShape
from msdda_fast.serve.app import create_app
from msdda_fast.serve.settings import ServeSettings

WEIGHTS = {"warm": 0.3, "cool": 0.7}


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), int)


def events(lines):
    """(event, data) of a stream."""
    kind, found = None, []
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            text = line.removeprefix("data: ")
            found.append((kind, text if text == "[DONE]" else json.loads(text)))
    return found


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class TestOpenAI:
    def test_images_are_those_of_the_pipeline(self, client, own_pipe):
        ours = dict(weights=WEIGHTS, seed=5, steps=4, guidance_scale=3, negative_prompt="blurry")
        response = client.images.generate(
            prompt="a red dog", model="tiny", n=2, size="32x32", response_format="b64_json",
            user="me", extra_body=ours,
        )  # fmt: skip
        expected = own_pipe(
            "a red dog", weights=WEIGHTS, seed=5, num_inference_steps=4, guidance_scale=3.0,
            negative_prompt="blurry", num_images_per_prompt=2,
        ).images  # fmt: skip
        assert [image.seed for image in response.data] == [5, 6]
        for image, wanted in zip(response.data, expected, strict=True):
            assert abs(pixels(image.b64_json) - np.asarray(wanted, int)).max() <= 1
        assert response.size == "32x32" and response.output_format == "png"

    def test_streamed(self, client):
        stream = client.images.generate(
            prompt="a red dog",
            n=2,
            stream=True,
            extra_body={"seed": 5, "steps": 4, "progress": True},
        )
        seen = list(stream)
        progress = [e for e in seen if e.type == "image_generation.progress"]
        done = [e for e in seen if e.type == "image_generation.completed"]
        steps = sorted((e.index, e.step, e.steps) for e in progress)
        assert steps == [(i, k, 4) for i in (0, 1) for k in (1, 2, 3, 4)]
        assert sorted((e.index, e.seed, e.size) for e in done) == [(0, 5, "32x32"), (1, 6, "32x32")]
        plain = client.images.generate(prompt="a red dog", n=2, extra_body={"seed": 5, "steps": 4})
        for event in done:
            apart = pixels(event.b64_json) - pixels(plain.data[event.index].b64_json)
            assert abs(apart).max() <= 1

    @pytest.mark.parametrize(
        ("steps", "asked", "shown"), [(8, 3, [5, 6, 7]), (8, 1, [6]), (2, 3, [1]), (1, 3, [])]
    )
    def test_partial_images(self, client, steps, asked, shown):
        stream = client.images.generate(
            prompt="a red dog", n=2, stream=True, partial_images=asked,
            extra_body={"seed": 5, "steps": steps},
        )  # fmt: skip
        seen = list(stream)
        assert {e.type for e in seen} <= {
            f"image_generation.{x}" for x in ("partial_image", "completed")
        }
        partial = [e for e in seen if e.type == "image_generation.partial_image"]
        expected = [
            (i, k, index) for i in (0, 1) for k, index in zip(shown, range(3), strict=False)
        ]
        assert sorted((e.index, e.step, e.partial_image_index) for e in partial) == expected
        plain = client.images.generate(
            prompt="a red dog", n=2, extra_body={"seed": 5, "steps": steps}
        )
        for event in seen:
            if event.type == "image_generation.completed":
                assert event.b64_json == plain.data[event.index].b64_json
                assert event.batch_size in (1, 2) and event.waited_s >= 0 and event.drawn_s > 0
            elif event in partial:
                assert pixels(event.b64_json).shape == (32, 32, 3) and event.size == "32x32"
                assert event.b64_json != plain.data[event.index].b64_json

    def test_errors_are_its_errors(self, client):
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(prompt="a", extra_body={"weights": {"warm": 1}})
        assert raised.value.param == "weights" and raised.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError, match="the model served here is 'tiny'"):
            client.images.generate(prompt="a", model="dall-e-3")


BAD_FIELDS = [
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": 5}, "prompt", "valid string"),
    ({"prompt": "a" * 201}, "prompt", "at most 200 characters"),
    ({"prompt": "a " * 99}, "prompt", "tokens"),
    ({"negative_prompt": "a" * 201}, "negative_prompt", "at most 200 characters"),
    ({"negative_prompt": 1}, "negative_prompt", "valid string"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 4}, "n", "at most 3 images"),
    ({"n": True}, "n", "valid integer"),
    ({"n": 1.5}, "n", "valid integer"),
    ({"size": "64x64"}, "size", "must be one of 32x32"),
    ({"size": "../etc"}, "size", "must be one of 32x32"),
    ({"size": 32}, "size", "valid string"),
    ({"response_format": "url"}, "response_format", "no image is stored"),
    ({"quality": "high"}, "quality", "auto"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"style": "vivid"}, "style", "not permitted"),
    ({"progress": True}, "progress", "only with stream=true"),
    ({"output_format": "webp"}, "output_format", "png"),
    ({"steps": 0}, "steps", "greater than or equal to 1"),
    ({"steps": 51}, "steps", "at most 50 steps"),
    ({"steps": "3"}, "steps", "valid integer"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"guidance_scale": -0.5}, "guidance_scale", "greater than or equal to 0"),
    ({"guidance_scale": 0.5}, "guidance_scale", "1"),
    ({"guidance_scale": "7"}, "guidance_scale", "valid number"),
    ({"weights": [0.5, 0.5]}, "weights", "valid dictionary"),
    ({"weights": {"warm": 1}}, "weights", "miss cool"),
    ({"weights": {"warm": 0.6, "cool": 0.6}}, "weights", "sum to 1.2"),
    ({"weights": {"warm": 1.5, "cool": -0.5}}, "weights", "not negative"),
    ({"weights": {"hot": 1}}, "weights", "unknown objective 'hot'; known: warm, cool"),
    ({"weights": {"warm": "much", "cool": 0}}, "weights.warm", "valid number"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"partial_images": 1}, "partial_images", "only with stream=true"),
    ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
    ({"user": "u" * 257}, "user", "at most 256"),
    ({"objective": "/etc/passwd"}, "objective", "not permitted"),
    ({"lora": "x"}, "lora", "not permitted"),
]


class TestRefusals:
    @pytest.mark.parametrize(("body", "param", "reason"), BAD_FIELDS, ids=lambda v: str(v)[:40])
    def test_a_bad_field_is_400_with_its_name_and_the_reason(self, served, body, param, reason):
        answer = served.draw(**body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param
        assert reason in error["message"]

    @pytest.mark.parametrize(
        ("content", "status", "param"),
        [
            (b"{", 400, None),
            (b"", 400, None),
            (b"[]", 400, None),
            (b"null", 400, None),
            (b"\xff\xfe", 400, None),
            (b'{"prompt": "\\ud800"}', 400, "prompt"),
            (b'{"prompt": "a", "\\ud800": 1}', 400, None),
            (b'{"prompt": "a", "weights": {"warm": NaN, "cool": 1}}', 400, "weights.warm"),
            (b'{"prompt": "a", "guidance_scale": Infinity}', 400, "guidance_scale"),
            (b'{"prompt": "a", "guidance_scale": 1e999}', 400, "guidance_scale"),
            (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, None),
            (b"[" * 30_000, 400, None),
        ],
        ids=lambda v: str(v)[:40],
    )
    def test_malformed_bodies(self, served, content, status, param):
        headers = {"content-type": "application/json"}
        answer = served.http.post("/v1/images/generations", content=content, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"type", "message", "param", "code"}
        assert answer.json()["error"]["param"] == param

    @pytest.mark.parametrize("chunked", [False, True], ids=["said", "chunked"])
    def test_a_long_body_is_not_read_to_its_end(self, served, chunked):
        body = b'{"prompt": "' + b"a" * 2_000_000
        content = (body[i : i + 99_999] for i in range(0, len(body), 99_999)) if chunked else body
        answer = served.http.post("/v1/images/generations", content=content)
        assert answer.status_code == 413
        assert "longer than 1048576 bytes" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "body_too_large"

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/v1/images", 404), ("GET", "/v1/images/generations", 405), ("GET", "/x", 404)],
    )
    def test_unknown_paths_and_methods(self, served, method, path, status):
        answer = served.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"

    def test_other_sites_may_not_ask(self, served):
        answer = served.http.options(
            "/v1/images/generations",
            headers={"Origin": "http://x.example", "Access-Control-Request-Method": "POST"},
        )
        assert not any(name.startswith("access-control") for name in answer.headers)


class TestForOperators:
    def test_objectives_sizes_and_limits(self, served):
        answer = served.http.get("/v1/objectives").json()
        assert [(o["id"], o["eta"]) for o in answer["data"]] == [("warm", 1.0), ("cool", 0.8)]
        assert answer["sizes"] == ["32x32"] and answer["steps"] == 3
        assert (answer["max_steps"], answer["max_images"]) == (50, 3)

    def test_health_ready_and_docs(self, served):
        assert served.http.get("/health").json() == {"status": "ok"}
        assert served.http.get("/ready").json() == {"status": "ready"}
        described = served.http.get("/openapi.json").json()
        post = described["paths"]["/v1/images/generations"]["post"]
        assert {"400", "401", "413", "429", "503", "504"} <= post["responses"].keys()

    def test_metrics_count_images_batches_latency_and_refusals(self, serve):
        running = serve()
        running.draw(n=3)
        running.draw(n=0)
        text = running.http.get("/metrics").text
        values = dict(re.findall(r"^(msdda_[^ ]+) ([0-9.e+]+)$", text, re.M))
        assert values['msdda_images_total{outcome="completed"}'] == "3.0"
        assert values['msdda_batch_size_bucket{le="1.0"}'] == "1.0"
        assert values['msdda_batch_size_bucket{le="2.0"}'] == "2.0"
        assert values["msdda_batch_size_sum"] == "3.0"
        assert values["msdda_request_seconds_count"] == "1.0"
        assert values['msdda_refusals_total{code="invalid_value"}'] == "1.0"
        assert values["msdda_queue_images"] == "0.0"

    def test_logs_are_json_without_prompts_unless_asked(self, serve, caplog):
        from msdda_fast.serve.logs import JSONLines

        for log_prompts in (False, True):
            caplog.clear()
            running = serve(settings={"log_prompts": log_prompts})
            with caplog.at_level("INFO", logger="msdda_fast.serve"):
                running.draw(prompt="a blue cat", seed=1)
                running.draw(prompt="a blue cat" * 99)
                running.stop()
            lines = [JSONLines().format(record) for record in caplog.records]
            drawn, refused = [json.loads(x) for x in lines if json.loads(x)["event"] == "request"]
            assert drawn["status"] == 200 and drawn["batch_sizes"] == [1]
            assert refused["status"] == 400 and refused["error"] == "invalid_value"
            assert ("blue cat" in "".join(lines)) == log_prompts

    def test_the_key(self, serve):
        running = serve(settings={"api_key": "sésame"})
        for headers, status in [
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Basic sésame".encode()}, 401),
            ({"Authorization": "Bearer"}, 401),
            ({"Authorization": "Bearer sésame".encode()}, 200),
        ]:
            for path in ("/v1/objectives", "/metrics"):
                answer = running.http.get(path, headers=headers)
                assert answer.status_code == status, (path, headers)
                if status == 401:
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        assert running.draw().status_code == 401
        assert running.http.get("/health").status_code == 200
        assert "sésame" not in repr(running.service.settings)


@pytest.mark.parametrize(
    "wrong",
    [{"sizes": ("32",)}, {"steps": 99}, {"max_images": 0}, {"timeout_s": 0}, {"api_key": " "}],
    ids=str,
)
def test_settings_are_checked_at_birth(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s").replace("api_", "")):
        ServeSettings(model="x", **wrong)


def test_a_size_that_the_model_cannot_draw(served):
    with pytest.raises(InvalidShape, match="multiple of 8"):
        create_app(served.engine, ServeSettings(model="x", sizes=("33x32",)))
