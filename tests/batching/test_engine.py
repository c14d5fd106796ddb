# SPDX-License-Identifier: Apache-2.0
"""Requests of strangers share batches; each gets the image that it would get alone."""

import asyncio
import itertools
import re
import threading
import time
from concurrent.futures import CancelledError, as_completed
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import msdda_fast as mf
from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.engine import graph
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler
from tests.batching.conftest import SOON, Plug, assert_close, request, together
from tests.engine.small_world import TracedGraphs
from tests.tiny_model import quiet

STRANGERS = [
    dict(prompt="a red dog", weights={"warm": 0.2, "cool": 0.8}, seed=3, guidance_scale=3.0),
    dict(prompt="a blue cat", weights={"warm": 1.0, "cool": 0.0}, seed=-(2**63)),
    dict(prompt="a cat", seed=2**64 - 1, guidance_scale=1.0, negative_prompt="blurry"),
    dict(
        prompt="a dog",
        weights=lambda k: (0, 1) if k else (0.5, 0.5),
        seed=9,
        guidance_scale={"warm": 2.0, "cool": 4.0},
        negative_prompt="blurry",
    ),
]


class TestSameImage:
    def test_strangers_share_a_batch_and_get_the_images_they_would_get_alone(self, start, own_pipe):
        results = together(start(), [request(**fields) for fields in STRANGERS])
        assert {result.batch_size for result in results} == {4}
        for result, fields in zip(results, STRANGERS, strict=True):
            alone = own_pipe(**{"output_type": "latent", "num_inference_steps": 3, **fields})
            assert_close(result.image, alone.images[0])
            assert result.seed == fields["seed"]

    def test_strangers_have_strengths_of_their_own(self, start, own_pipe):
        fields = [STRANGERS[0] | {"strength": 2.0}, STRANGERS[1] | {"strength": {"cool": 0.5}}]
        results = together(start(), [request(**one) for one in fields])
        assert {result.batch_size for result in results} == {2}
        for result, one in zip(results, fields, strict=True):
            alone = own_pipe(**{"output_type": "latent", "num_inference_steps": 3, **one})
            assert_close(result.image, alone.images[0])

    def test_company_of_one_size_changes_no_bit(self, start):
        engine = start(batch_sizes=[4])
        mine = request(**STRANGERS[0])
        others = [request(**fields) for fields in STRANGERS[1:]]
        alone = engine.submit(mine).result(SOON)
        in_company = together(engine, [mine, *others])[0]
        assert (alone.batch_size, in_company.batch_size) == (1, 4)
        assert torch.equal(alone.image, in_company.image)

    def test_noise_is_that_of_the_own_seed_to_the_bit(self, start, monkeypatch):
        begun = []
        begin = CapturedSampler.begin

        def noted(self, table, noise, x_T, *arguments, **options):
            begun.append((noise.seeds.tolist(), x_T.clone()))
            return begin(self, table, noise, x_T, *arguments, **options)

        monkeypatch.setattr(CapturedSampler, "begin", noted)
        together(start(), [request(**fields) for fields in STRANGERS])
        seeds, x_T = begun[-1]
        for i, fields in enumerate(STRANGERS):
            assert (seeds[i] - fields["seed"]) % 2**64 == 0  # z of each step is drawn from these
            alone = mf.counter_noise([fields["seed"]], (1, *x_T.shape[1:]), stream=0)
            assert torch.equal(x_T[i], alone[0])

    @pytest.mark.full  # strangers share a batch above, on a smaller model
    def test_pictures_of_the_shipped_model_are_within_one_level(self, start):
        pipe = quiet(mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji"))
        engine = start(pipe, output_type="pil")
        prompts, weights = ["A red dog.", "A cup.", "A blue car."], [(0.3, 0.7), (1, 0), (0.5, 0.5)]
        requests = [
            request(p, weights=w, seed=i)
            for i, (p, w) in enumerate(zip(prompts, weights, strict=True))
        ]
        for one, result in zip(requests, together(engine, requests), strict=True):
            alone = pipe(one.prompt, weights=one.weights, seed=one.seed, num_inference_steps=3)
            apart = np.asarray(alone.images[0], int) - np.asarray(result.image, int)
            assert abs(apart).max() <= 1

    def test_images_of_one_request_have_seeds_that_count_up(self, start):
        engine = start()
        futures = engine.submit_images(request(seed=2**64 - 1), 3)
        results = [future.result(SOON) for future in futures]
        assert [result.seed for result in results] == [2**64 - 1, 0, 1]
        assert_close(results[1].image, engine.submit(request(seed=0)).result(SOON).image)

    def test_integers_of_numpy_are_integers(self, start):
        engine = start()
        same = dict(seed=np.int64(3), num_inference_steps=np.int64(3), height=np.int64(32))
        results = [engine.submit(request(**fields)).result(SOON) for fields in (same, {"seed": 3})]
        assert type(results[0].seed) is int and results[0].seed == 3
        assert torch.equal(results[0].image, results[1].image)

    def test_without_a_seed_images_differ_and_say_theirs(self, start):
        engine = start()
        one, other = (engine.submit(request(seed=None)).result(SOON) for _ in range(2))
        assert one.seed != other.seed
        assert torch.equal(engine.submit(request(seed=one.seed)).result(SOON).image, one.image)

    def test_networks_one_after_another_serve_too(self, start, own_pipe):
        pipe = quiet(mf.MSDDAPipeline.from_pipe(own_pipe))
        pipe.set_forward("sequential")
        results = together(start(pipe), [request(**fields) for fields in STRANGERS[:2]])
        for result, expected in zip(
            results, together(start(), [request(**f) for f in STRANGERS[:2]]), strict=True
        ):
            assert_close(result.image, expected.image)


class CountedGraphs(TracedGraphs):
    """Counts, and runs the step again instead of tracing it, which takes a second."""

    def capture(self, advance, buffers):
        self.captures += 1
        return SimpleNamespace(replay=lambda: advance(buffers), release=lambda: None)


class TestGraphs:
    @pytest.mark.full  # every shape; one is captured in tests/pipelines/test_captured.py
    def test_prepare_captures_all_and_no_occupancy_weight_or_guidance_again(
        self, start, monkeypatch
    ):
        graphs = CountedGraphs()
        monkeypatch.setattr(graph, "graphs_for", lambda device: graphs)
        engine = start()
        engine.prepare(num_inference_steps=3)
        assert graphs.captures == 3 * 2  # sizes 1, 2, 4, with guidance and without
        for count in (1, 2, 3, 4):
            results = together(engine, [request(**fields) for fields in STRANGERS[:count]])
            assert {result.batch_size for result in results} == {count}
        together(engine, [request(weights=(0, 1), guidance_scale=1.0, num_inference_steps=5)] * 3)
        assert graphs.captures == 6

    def test_batches_are_padded(self, start):
        engine = start()
        together(engine, [request()] * 3)
        stats = engine.stats()
        assert stats.batch_sizes == {1: 1, 3: 1} and stats.rows == 5

    @pytest.mark.parametrize("sizes", [[], [1, 2], [4, 2], [0, 4], [2, 2, 4]], ids=str)
    def test_odd_sizes_are_refused(self, start, sizes):
        with pytest.raises(ValueError, match="must increase up to max_batch=4"):
            start(batch_sizes=sizes)

    def test_the_pipeline_stays_as_it_was(self, start, own_pipe):
        before = own_pipe.forward_settings
        start().submit(request(weights=(1, 0))).result(SOON)
        assert own_pipe.forward_settings == before and type(own_pipe) is mf.MSDDAPipeline


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "error", "field"),
        [
            ({"weights": {"warm": 1}}, mf.InvalidWeights, "weights"),
            ({"weights": {"warm": 0.5, "cool": 0.4}}, mf.InvalidWeights, "weights"),
            ({"weights": {"hot": 1}}, mf.UnknownObjective, "weights"),
            ({"weights": (1, 0, 0)}, mf.InvalidShape, "weights"),
            ({"weights": (float("nan"), 1)}, mf.InvalidWeights, "weights"),
            ({"num_inference_steps": 0}, mf.InvalidSchedule, "num_inference_steps"),
            ({"num_inference_steps": 2.0}, mf.InvalidRequest, "num_inference_steps"),
            ({"guidance_scale": 0.5}, mf.InvalidSchedule, "guidance_scale"),
            ({"guidance_scale": {"hot": 2}}, mf.UnknownObjective, "guidance_scale"),
            ({"height": 30}, mf.InvalidShape, "height"),
            ({"width": -8}, mf.InvalidShape, "width"),
            ({"seed": 2**64}, mf.InvalidRequest, "seed"),
            ({"seed": "1"}, mf.InvalidRequest, "seed"),
            ({"timeout_s": 0}, mf.InvalidRequest, "timeout_s"),
            ({"prompt": 5}, mf.InvalidRequest, "prompt"),
            ({"prompt": "a dog " * 100}, mf.InvalidRequest, "prompt"),
            ({"prompt": "\ud800"}, mf.InvalidRequest, "prompt"),
            ({"negative_prompt": "a dog " * 100}, mf.InvalidRequest, "negative_prompt"),
            ({"height": 10**9}, mf.InvalidRequest, "height"),
            ({"height": 32, "width": 2**18}, mf.InvalidRequest, "height"),
            ({"height": 10**9, "width": 10**9}, mf.InvalidRequest, "height"),
            ({"num_inference_steps": 10**9}, mf.InvalidSchedule, "num_inference_steps"),
            ({"timeout_s": "soon"}, mf.InvalidRequest, "timeout_s"),
            ({"on_step": 5}, mf.InvalidRequest, "on_step"),
            ({"on_step": asyncio.sleep}, mf.InvalidRequest, "on_step"),
            ({"preview_steps": itertools.count(1)}, mf.InvalidRequest, "preview_steps"),
            ({"preview_steps": 2}, mf.InvalidRequest, "preview_steps"),
            ({"weights": lambda k: [][k]}, mf.InvalidWeights, "weights"),
            ({"weights": object()}, mf.InvalidShape, "weights"),
            ({"guidance_scale": "much"}, mf.MSDDAError, "guidance_scale"),
        ],
        ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same in every worker
    )
    def test_bad_requests_by_field_before_they_stand_in_line(self, start, fields, error, field):
        engine = start()
        with pytest.raises(error) as raised:
            engine.submit(request(**fields))
        assert raised.value.field == field
        assert engine.stats().waiting == engine.stats().batches == 0

    @pytest.mark.parametrize("others", [{}, {"max_wait_ms": 1e300}], ids=str)
    def test_times_beyond_any_clock_are_no_limit(self, start, others):
        engine = start(**others)
        future = engine.submit(request(timeout_s=1e300))
        engine.close()
        assert future.result(SOON)

    def test_what_costs_more_than_one_request_may(self, start):
        engine = start(max_pixels=32 * 32, max_cost=2 * 3 * 32 * 32)
        assert all(f.result(SOON) for f in engine.submit_images(request(), 2))
        with pytest.raises(mf.InvalidRequest, match=r"3 images x 32 x 32 .* max_cost=6144"):
            engine.submit_images(request(), 3)
        with pytest.raises(mf.InvalidRequest, match="max_cost"):
            engine.submit(request(num_inference_steps=7))
        with pytest.raises(mf.InvalidRequest, match="32 x 40 pixels has more than max_pixels=1024"):
            engine.submit(request(width=40))

    @pytest.mark.parametrize("options", [{"max_pixels": 0}, {"max_cost": 0}, {"max_cost": 9}])
    def test_bounds_that_leave_nothing(self, start, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            start(**options)

    def test_what_is_no_request_and_no_number(self, start):
        engine = start()
        with pytest.raises(mf.InvalidRequest, match="expected an ImageRequest, got dict"):
            engine.submit({"prompt": "a dog"})
        with pytest.raises(mf.InvalidRequest, match="count must be an integer"):
            engine.submit_images(request(), 1.5)
        plain = request(num_inference_steps=np.int64(3))
        assert all(f.result(SOON) for f in engine.submit_images(plain, np.int64(1)))

    def test_a_full_line(self, start):
        engine = start(queue_limit=2)
        plug = Plug(engine)
        first = engine.submit_images(request(), 2)
        with pytest.raises(mf.QueueFull):
            engine.submit(request())
        plug.pull()
        assert all(future.result(SOON) for future in first)
        assert engine.stats().refused == 1

    def test_a_full_line_reads_no_request(self, start, monkeypatch):
        engine = start(queue_limit=2)
        plug = Plug(engine)
        engine.submit_images(request(), 2)
        monkeypatch.setattr(engine._admission, "tickets", pytest.fail)
        with pytest.raises(mf.QueueFull):
            engine.submit(request())
        plug.pull()

    def test_a_client_with_too_many_by_its_name_and_when_to_come_back(self, start):
        engine = start(queue_limit=4)
        plug = Plug(engine)
        engine.submit_images(request(), 2, client="greedy")
        with pytest.raises(mf.QueueFull, match="client 'greedy' has 2 images") as raised:
            engine.submit(request(), client="greedy")
        # nothing was drawn yet: a second for each of the two, and for the one being drawn
        assert (raised.value.client, raised.value.retry_after_s) == ("greedy", 3.0)
        engine.submit(request(), client="small")
        plug.pull()

    def test_the_time_to_come_back_follows_what_images_took(self, start):
        engine = start(queue_limit=2)
        for size, seconds in ((1, 0.5), (3, 3.5)):
            engine._tally.count_batch(size, rows=4, seconds=seconds)
        plug = Plug(engine)
        engine.submit_images(request(), 2)
        with pytest.raises(mf.QueueFull) as raised:
            engine.submit(request())
        assert (raised.value.client, raised.value.retry_after_s) == (None, 3.0)
        plug.pull()

    @pytest.mark.parametrize("count", [0, 3])
    def test_more_images_than_may_ever_wait(self, start, count):
        with pytest.raises(ValueError, match="from 1 to 2"):
            start(queue_limit=2).submit_images(request(), count)
        with pytest.raises(ValueError, match="from 1 to 2"):
            start(queue_limit=4).submit_images(request(), count, client="one")

    @pytest.mark.parametrize("limit", [0, 5])
    def test_limits_of_clients_outside_their_range(self, start, limit):
        with pytest.raises(ValueError, match="client_limit must be from 1 to queue_limit=4"):
            start(queue_limit=4, client_limit=limit)

    @pytest.mark.parametrize("client", [5, b"me", ""], ids=repr)
    def test_clients_without_a_name(self, start, client):
        with pytest.raises(mf.InvalidRequest, match="client must be a name or None"):
            start().submit(request(), client=client)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_batch": 0}, {"queue_limit": 0}, {"max_batch": 0.5}, {"max_wait_ms": -1},
            {"max_wait_ms": "20"}, {"max_wait_ms": None}, {"max_wait_ms": float("inf")},
            {"batch_sizes": 4}, {"batch_sizes": "4"}, {"batch_sizes": ["4"]},
        ],
        ids=str,
    )  # fmt: skip
    def test_numbers_outside_their_range(self, start, options):
        (name,) = options
        with pytest.raises(ValueError, match=rf"{name} must be (at least|an integer|a list)"):
            start(**options)

    @pytest.mark.parametrize("what", [None, "a model", torch.nn.Linear(1, 1)], ids=repr)
    def test_what_is_no_pipeline(self, start, what):
        with pytest.raises(UnsupportedNetwork, match=f"got {type(what).__name__}"):
            start(what)

    def test_a_pipeline_of_several_processes(self, start, own_pipe):
        pipe = quiet(mf.MSDDAPipeline.from_pipe(own_pipe))
        pipe.enable_parallel(object())
        with pytest.raises(ValueError, match="disable_parallel"):
            start(pipe)


class TestLeaving:
    def test_a_cancelled_request_leaves_the_line(self, start):
        engine = start(queue_limit=2)
        plug = Plug(engine)
        kept, gone = engine.submit_images(request(), 2)
        assert gone.cancel()
        assert engine.stats().waiting == 1
        plug.pull()
        assert kept.result(SOON).batch_size == 1
        assert list(as_completed([gone], SOON)) == [gone]
        assert engine.stats().cancelled == 1

    def test_a_batch_that_nobody_waits_for_ends_at_its_next_step(self, start):
        engine, steps = start(), []
        plug = Plug(engine)
        futures = engine.submit_images(request(on_step=steps.append, num_inference_steps=500), 2)
        plug.pull()
        while not steps:
            time.sleep(0.001)
        assert all(future.cancel() for future in futures)
        engine.submit(request()).result(SOON)
        assert len(steps) < 500
        assert engine.stats().cancelled == 2 and engine.stats().failed == 0

    def test_one_who_leaves_a_batch_does_not_disturb_the_others(self, start):
        engine = start()
        plug = Plug(engine)
        kept = engine.submit(request(on_step=lambda progress: gone.cancel()))
        gone = engine.submit(request(seed=1))
        plug.pull()
        image = kept.result(SOON).image
        assert gone.cancelled()
        assert_close(image, engine.submit(request()).result(SOON).image)

    def test_time_is_up_in_line(self, start):
        engine = start(max_wait_ms=1e6)
        future = engine.submit(request(timeout_s=0.05))
        with pytest.raises(mf.RequestTimeout, match="no image after 0"):
            future.result(SOON)
        assert engine.stats().timed_out == 1

    def test_time_is_up_behind_another_batch_and_inside_one(self, start):
        engine = start(max_batch=1)
        slow = request(num_inference_steps=500, timeout_s=0.3)
        for future in [engine.submit(slow), engine.submit(slow)]:
            with pytest.raises(mf.RequestTimeout):
                future.result(SOON)
        assert engine.stats().timed_out == 2 and engine.stats().completed == 0


class TestWatching:
    def test_progress_counts_every_step_of_every_image(self, start):
        seen = []
        for future in start().submit_images(request(on_step=seen.append), 2):
            future.result(SOON)
        steps = [(image, step, 3, None) for image in (0, 1) for step in (1, 2, 3)]
        assert sorted(seen) == steps

    def test_what_on_step_raises_is_the_outcome_of_its_own_request_only(self, start):
        def fall(progress):
            raise ZeroDivisionError("mine")

        engine = start()
        plug = Plug(engine)
        good, bad = engine.submit(request()), engine.submit(request(on_step=fall))
        plug.pull()
        with pytest.raises(ZeroDivisionError, match="mine"):
            bad.result(SOON)
        assert good.result(SOON).batch_size == 2

    def test_coroutines_wait_and_cancel(self, start):
        engine = start(max_wait_ms=1e6)

        async def both():
            quick = asyncio.wrap_future(engine.submit_images(request(), 4)[0])
            waiting = engine.submit(request())
            slow = asyncio.wait_for(asyncio.wrap_future(waiting), 0.05)
            result = await quick
            with pytest.raises(TimeoutError):
                await slow
            return result, waiting

        result, waiting = asyncio.run(both())
        assert result.image.shape == (4, 8, 8)
        assert waiting.cancelled() and engine.stats().waiting == 0

    def test_many_threads_submit(self, start):
        engine, images = start(), {}

        def ask(seed):
            for future in engine.submit_images(request(seed=seed, num_inference_steps=1), 2):
                result = future.result(SOON)
                images[result.seed] = result.image

        threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert sorted(images) == sorted(10 * i + j for i in range(8) for j in range(2))
        stats = engine.stats()
        assert (stats.completed, stats.waiting, stats.failed) == (16, 0, 0)
        assert sum(size * count for size, count in stats.batch_sizes.items()) == 16


class TestPreviews:
    @pytest.mark.sweep(forward=1)
    @pytest.mark.parametrize("forward", ["batched", "sequential"])
    def test_are_the_state_then_decoded_and_change_no_bit_of_any_image(
        self, start, own_pipe, monkeypatch, forward
    ):
        monkeypatch.setattr(graph, "graphs_for", lambda device: CountedGraphs())
        pipe = quiet(mf.MSDDAPipeline.from_pipe(own_pipe))
        pipe.set_forward(forward)
        engine, seen, decoded = start(pipe), [], []
        preview = BatchDrawer.preview

        def noted(self, x_t, output_type):
            decoded.append(len(x_t))
            return preview(self, x_t, output_type)

        monkeypatch.setattr(BatchDrawer, "preview", noted)
        plain = [request(**fields) for fields in STRANGERS]
        asking = replace(plain[2], on_step=seen.append, preview_steps=[1, 2])
        before = together(engine, plain)
        after = together(engine, [*plain[:2], asking, plain[3]])
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.image, other.image)
        assert [(p.step, p.preview is not None) for p in seen] == [(1, True), (2, True), (3, False)]
        assert decoded == [1, 1]  # only rows that asked
        states = []
        own_pipe(
            "a cat", seed=2**64 - 1, guidance_scale=1.0, negative_prompt="blurry",
            num_inference_steps=3, output_type="latent",
            callback_on_step_end=lambda p, k, t, tensors: states.append(tensors["latents"]) or {},
        )  # fmt: skip
        for progress, state in zip(seen[:2], states[:2], strict=True):
            assert_close(progress.preview, state[0])

    def test_look_like_the_images_of_the_engine(self, start):
        seen = []
        asking = request(on_step=seen.append, preview_steps=(2,))
        result = start(output_type="pil").submit(asking).result(SOON)
        assert seen[1].preview.size == result.image.size and seen[0].preview is None

    def test_one_that_cannot_be_decoded_costs_nobody_the_image(self, start, monkeypatch, caplog):
        def fail(self, x_t, output_type):
            raise MemoryError("no room")

        monkeypatch.setattr(BatchDrawer, "preview", fail)
        seen = []
        asking = request(on_step=seen.append, preview_steps=(2,))
        assert all(result.image is not None for result in together(start(), [asking, request()]))
        assert [progress.preview for progress in seen] == [None] * 3
        assert "no previews after step 2" in caplog.text

    @pytest.mark.parametrize("steps", [[0], [4]], ids=str)
    def test_of_steps_that_there_are_not(self, start, steps):
        with pytest.raises(mf.InvalidRequest, match="must be from 1 to 3") as raised:
            start().submit(request(preview_steps=steps))
        assert raised.value.field == "preview_steps"


class TestClosing:
    def test_draining_draws_what_was_admitted(self, start):
        with start(max_wait_ms=1e6) as engine:
            future = engine.submit(request())
        assert future.result(0).batch_size == 1
        for ask in (lambda: engine.submit(request()), engine.prepare):
            with pytest.raises(mf.EngineClosed):
                ask()
        engine.close()
        assert engine.stats().is_closed and engine.stats().failure is None

    def test_without_draining_all_are_refused_within_a_step(self, start):
        engine = start(max_batch=1)
        running = engine.submit(request(num_inference_steps=500))
        waiting = engine.submit(request())
        engine.close(drain=False, timeout_s=SOON)
        for future in (running, waiting):
            with pytest.raises(mf.EngineClosed):
                future.result(0)

    def test_draining_takes_no_longer_than_it_may(self, start):
        engine = start(max_batch=1)
        futures = [engine.submit(request(num_inference_steps=500)) for _ in range(2)]
        engine.close(timeout_s=0.1)
        assert all(isinstance(future.exception(0), mf.EngineClosed) for future in futures)

    def test_an_error_in_the_with_block_does_not_wait(self, start):
        with pytest.raises(KeyError), start(max_wait_ms=1e6) as engine:
            future = engine.submit(request())
            raise KeyError
        assert isinstance(future.exception(0), mf.EngineClosed)

    def test_a_callback_may_close(self, start):
        engine = start()
        future = engine.submit(request(on_step=lambda progress: engine.close(drain=False)))
        assert isinstance(future.exception(SOON), mf.EngineClosed)


class TestPreparing:
    @pytest.fixture
    def failing(self, monkeypatch):
        """Batches fail with these errors, in turn, and work afterwards."""
        errors = []
        sample = BatchDrawer.sample

        def fail(self, *arguments, **options):
            if errors:
                raise errors.pop(0)
            return sample(self, *arguments, **options)

        monkeypatch.setattr(BatchDrawer, "sample", fail)
        return errors

    def test_inside_on_step_would_wait_for_itself(self, start):
        engine = start()
        future = engine.submit(request(on_step=lambda progress: engine.prepare()))
        with pytest.raises(mf.InvalidRequest, match=r"prepare.. cannot be called from on_step"):
            future.result(SOON)

    def test_prepare_says_what_failed(self, start, failing):
        engine = start()
        failing.append(OSError("no graph"))
        with pytest.raises(OSError, match="no graph"):
            engine.prepare(num_inference_steps=3)
        assert engine.submit(request()).result(SOON)

    def test_prepare_does_not_outlive_the_engine(self, start):
        engine = start()
        plug = Plug(engine)
        outcome = []

        def prepare():
            try:
                engine.prepare()
            except mf.EngineClosed as error:
                outcome.append(error)

        thread = threading.Thread(target=prepare)
        thread.start()
        while not engine._queue._chores:
            time.sleep(0.001)
        closing = threading.Thread(target=engine.close, kwargs={"drain": False})
        closing.start()
        plug.pull()
        thread.join(SOON)
        closing.join(SOON)
        assert outcome


def test_cancelled_futures_raise_as_futures_do(start):
    engine = start(max_wait_ms=1e6)
    future = engine.submit(request())
    future.cancel()
    with pytest.raises(CancelledError):
        future.result(0)
