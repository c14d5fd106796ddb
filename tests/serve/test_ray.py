# SPDX-License-Identifier: Apache-2.0
"""Replicas on two nodes: the same API, and every request has its one answer when a replica dies."""

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

import msdda_fast as mf
from msdda_fast.serve.ray import RayArgs, build
from tests.ray_cluster import cluster, free_port, nodes  # noqa: F401 - fixtures
from tests.serve.pictures import picture, saved
from tests.serve.test_api import events

pytestmark = pytest.mark.full  # a cluster takes half a minute; test_ray_parts.py needs none
SOON = 120  # seconds; a replica is a process that imports and loads
STEPS = 12


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def http(cluster, tiny):  # noqa: F811
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    args = RayArgs(
        model=str(tiny.folder), device="cpu", num_gpus=0, min_replicas=2, max_replicas=2,
        max_batch=2, batch_sizes=[2], steps=STEPS, timeout_s=SOON,
    )  # fmt: skip
    serve.run(build(args), name="tiny", route_prefix="/")
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=SOON) as client:
        yield client
    serve.shutdown()


def draw(http, **body):
    return http.post("/v1/images/generations", json={"prompt": "a red dog", **body})


def replicas():
    stats = serve.get_deployment_handle("drawer", "tiny").broadcast("stats")
    return stats.results(timeout_s=SOON)


def test_a_killed_replica_loses_no_request_and_changes_no_bit(http, own_pipe):
    bodies = [
        {"n": 1 + seed % 2, "stream": seed % 3 == 0, "weights": {"warm": w, "cool": 1 - w}}
        | ({} if seed % 5 == 0 else {"seed": seed})
        | ({} if seed % 3 else {"progress": True})
        for seed, w in enumerate(np.linspace(0, 1, 16))
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = [pool.submit(draw, http, **body) for body in bodies]
        until(lambda: all(stats.drawing and stats.waiting for stats in replicas()))
        actors = ray.util.list_named_actors(all_namespaces=True)
        victim = next(actor for actor in actors if "#drawer#" in actor["name"])
        ray.kill(ray.get_actor(**victim))
        answers = [answer.result(SOON) for answer in asked]
    with mf.Engine(own_pipe, max_batch=2, batch_sizes=[2]) as engine:
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.status_code == 200, answer.text
            if body["stream"]:
                images, steps = [None] * body["n"], []
                for kind, data in events(answer.text.splitlines()):
                    if kind == "image_generation.completed" and data != "[DONE]":
                        assert images[data["index"]] is None, "answered twice"
                        images[data["index"]] = data
                    elif data != "[DONE]":
                        steps.append((data["index"], data["step"]))
                assert sorted(steps) == [(i, k + 1) for i in range(body["n"]) for k in range(STEPS)]
            else:
                images = answer.json()["data"]
            request = mf.ImageRequest(
                "a red dog", weights=body["weights"], num_inference_steps=STEPS,
                seed=body.get("seed", images[0]["seed"]),
            )  # fmt: skip
            expected = [future.result(SOON) for future in engine.submit_images(request, body["n"])]
            for image, wanted in zip(images, expected, strict=True):
                assert image["seed"] == wanted.seed
                assert np.array_equal(pixels(image["b64_json"]), np.asarray(wanted.image))


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_refusals_of_replicas_are_those_of_one_process(http, stream):
    answer = draw(http, weights={"warm": 1}, stream=stream)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "weights"
    answer = draw(http, n=99, stream=stream)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_images_are_sent_to_replicas(http):
    files = {"image": ("a.png", saved(picture()))}
    answer = http.post("/v1/images/edits", data={"prompt": "a", "steps": "2"}, files=files)
    assert answer.status_code == 200 and answer.json()["size"] == "32x32"


def test_for_operators(http):
    assert [o["id"] for o in http.get("/v1/objectives").json()["data"]] == ["warm", "cool"]
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert http.get("/v1/x").json()["error"]["code"] == "not_found"
    draw(http, n=0)
    text = http.get("/metrics").text
    assert 'msdda_refusals_total{code="invalid_value"}' in text
    assert "msdda_queue_images 0.0" in text


def test_a_client_that_hangs_up_leaves_the_line_of_the_replica(http):
    with pytest.raises(httpx2.TimeoutException):
        http.post("/v1/images/generations", json={"prompt": "a", "n": 8, "steps": 64}, timeout=1)
    until(lambda: sum(stats.cancelled for stats in replicas()))
    until(lambda: not any(stats.waiting or stats.drawing for stats in replicas()))
