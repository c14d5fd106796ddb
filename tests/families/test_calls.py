# SPDX-License-Identifier: Apache-2.0
"""What a call of a stock pipeline with objectives takes, gives, and leaves alone."""

import copy
import functools
import pickle
import threading

import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import PipelineBusy
from msdda_fast.pipelines.batch import Batch
from tests.families import images, xl
from tests.families.encoders import with_encoders
from tests.families.lockstep import draw, equal_levels, lockstep, quiet, use
from tests.families.test_pipelines import W, assert_close, attached

A, B = {"a": 1.0}, {"b": 1.0}


def counted(network, kept: list):
    """Note the number of rows of every forward of a block."""

    def note(module, args, kwargs):
        kept.append(len(args[0] if args else kwargs["hidden_states"]))

    return network.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)


class TestSeeds:
    @pytest.mark.parametrize(
        ("make", "levels"),
        [
            pytest.param(images.sd3, {"a": mf.FlowSDE(0.7), "b": mf.FlowSDE(0.3)}, id="rule"),
            pytest.param(xl.text, None, id="ancestral"),
        ],
    )
    def test_an_image_does_not_depend_on_what_shares_its_batch(self, make, levels):
        pipe, call = attached(make)
        one = {name: v[1:] if torch.is_tensor(v) else v for name, v in call.items()}
        weights = {"a": 0.3, "b": 0.7}
        both = draw(pipe, call, weights=weights, levels=levels, seed=[3, 11])
        alone = draw(pipe, one, weights=weights, levels=levels, seed=11)
        assert_close(alone[0], both[1])
        assert not torch.allclose(both[0], both[1])

    def test_a_number_is_the_seed_of_the_first_image(self):
        pipe, call = attached()
        got = draw(pipe, call, weights=W, seed=3)
        assert torch.equal(got, draw(pipe, call, weights=W, seed=[3, 4]))

    def test_noise_of_a_generator_is_that_of_the_stock_pipeline(self):
        pipe, call = attached(xl.text)
        use(stock := quiet(xl.text()[0]), A)
        generators = [[torch.Generator().manual_seed(i) for i in (5, 6)] for _ in range(2)]
        expected = draw(stock, call, generator=generators[0])
        assert torch.equal(draw(pipe, call, weights=[1, 0], generator=generators[1]), expected)

    def test_latents_are_the_beginning(self):
        pipe, call = attached()
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        got = draw(pipe, call, weights=W, latents=latents, seed=0)
        expected = draw(pipe, call, weights=W, latents=latents, seed=99)  # an ODE: no noise
        assert torch.equal(got, expected)
        assert not torch.equal(got, draw(pipe, call, weights=W, latents=-latents, seed=0))


class TestWeights:
    @pytest.mark.parametrize("family", [images.sd3, xl.text], ids=["SD3", "SDXL"])
    def test_several_images_of_each_prompt(self, family):
        """Weights per prompt, and per image; texts go through text encoders with adapters."""
        make = functools.partial(with_encoders, family)
        pipe, call = attached(make)
        per_prompt = [{"a": 0.2, "b": 0.8}, {"a": 0.9, "b": 0.1}]
        per_image = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.9, 0.1], [0.9, 0.1]])
        got = draw(pipe, call, weights=per_prompt, num_images_per_prompt=2)
        assert torch.equal(got, draw(pipe, call, weights=per_image, num_images_per_prompt=2))
        fuse = equal_levels(per_image.double())
        assert_close(got, lockstep(make, [A, B], fuse, num_images_per_prompt=2))

    def test_weights_that_change_from_step_to_step(self):
        """Constant ones are those of a number; else each step has its own."""
        pipe, call = attached()
        asked = []

        def weights(k):
            asked.append(k)
            return {"a": 1.0, "b": 0.0} if k < 2 else {"a": 0.0, "b": 1.0}

        got = draw(pipe, call, weights=weights)
        assert asked == [0, 1, 2]  # before the first step
        whole = draw(pipe, call, weights=lambda k: W)
        assert torch.equal(whole, draw(pipe, call, weights=W))

        stock, _ = images.sd3()

        def switch(pipe, k, t, tensors):
            if k == 1:
                use(pipe, {"b": 1.0})
            return {}

        use(quiet(stock), {"a": 1.0})
        assert_close(got, draw(stock, call, callback_on_step_end=switch))

    def test_image_to_image_counts_the_steps_that_it_skips(self):
        """k is the position in all timesteps, the same noise level whatever the strength."""
        pipe, call = attached(xl.img2img)
        call["strength"] = 0.5

        def weights(k):
            return [1, 0] if k < 2 else [0, 1]

        got = draw(pipe, call, weights=weights, num_inference_steps=4)
        assert_close(got, draw(pipe, call, weights=[0, 1], num_inference_steps=4))

    def test_an_objective_of_weight_0_does_not_run(self):
        pipe, call = attached()
        rows = []
        with counted(pipe.transformer, rows):
            draw(pipe, call, weights=W)
            draw(pipe, call, weights=W)
            assert rows == [8, 4, 4, *[8] * 5]  # the first is verified, objective by objective
            rows.clear()
            draw(pipe, call, weights={"a": 0, "b": 1})
        assert rows == [4] * 3
        pipe.transformer.delete_adapters("a")
        draw(pipe, call, weights={"a": 0, "b": 1})


class TestOutput:
    @pytest.mark.parametrize("kind", ["pil", "np", "pt"])
    def test_it_is_that_of_the_stock_pipeline(self, kind):
        pipe, call = attached()
        use(stock := quiet(images.sd3()[0]), {"a": 1.0})
        expected = draw(stock, call, output_type=kind)
        got = draw(pipe, call, weights=[1, 0], output_type=kind)
        assert type(got) is type(expected)
        for one, other in zip(got, expected, strict=True):
            assert one.tobytes() == other.tobytes() if kind != "pt" else torch.equal(one, other)
        two = draw(pipe, call, weights=W, output_type=kind)
        assert type(two) is type(expected) and len(two) == 2

    def test_an_object_as_in_diffusers(self):
        pipe, call = attached()
        result = draw_output(pipe, call)
        assert type(result).__name__ == "StableDiffusion3PipelineOutput"
        assert result.images[0].size == (16, 16)

    def test_the_state_is_float32_between_steps(self):
        """A half-precision pipeline ends where float32 steps on its predictions end."""
        pipe, call = attached()
        pipe.to(torch.bfloat16)
        call = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in call.items()}
        predictions, seen, fused = [], [], []
        scheduler = pipe.scheduler
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()

        def look(pipe, k, t, tensors):
            seen.append(tensors["latents"])
            kept = pipe.scheduler.fusing._handed_out
            fused.append(kept[2])
            return {}

        draw(pipe, call, weights=W, latents=latents, callback_on_step_end=look)
        assert all(one.dtype == torch.bfloat16 for one in seen)
        assert all(one.dtype == torch.float32 for one in fused)
        # the stock scheduler would have rounded each state
        assert all((a.float() != b).any() for a, b in zip(seen, fused, strict=True))
        assert scheduler is pipe.scheduler and not predictions


def draw_output(pipe, call):
    generator = torch.Generator().manual_seed(7)
    return pipe(**call, weights=W, num_inference_steps=2, generator=generator)


class TestCallbacks:
    def test_they_see_and_replace_latents(self):
        pipe, call = attached()
        shapes = []

        def look(pipe, k, t, tensors):
            shapes.append(tuple(tensors["latents"].shape))
            assert type(tensors["latents"]) is torch.Tensor
            return {}

        before = draw(pipe, call, weights=W, callback_on_step_end=look)
        assert shapes == [(2, 4, 8, 8)] * 3

        def replace(pipe, k, t, tensors):
            return {"latents": torch.zeros_like(tensors["latents"]) if k == 2 else before}

        assert not draw(pipe, call, weights=W, callback_on_step_end=replace).any()

    def test_interrupt(self):
        pipe, call = attached()
        steps = []

        def stop(pipe, k, t, tensors):
            steps.append(k)
            pipe._interrupt = True
            return {}

        draw(pipe, call, weights=W, callback_on_step_end=stop)
        assert steps == [0]

    def test_they_may_call_another_pipeline_but_not_their_own(self):
        pipe, call = attached()
        other = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        alone = draw(pipe, call, weights=W), draw(pipe, call, weights=[0, 1])
        inside = []

        def nested(called):
            def run(*_):
                inside.append(draw(called, call, weights=W))
                inside.append(draw(called, call, weights=[0, 1]))
                return {}

            return run

        assert torch.equal(
            draw(pipe, call, weights=W, callback_on_step_end=nested(other)), alone[0]
        )
        assert len(inside) == 6
        assert all(torch.equal(got, alone[i % 2]) for i, got in enumerate(inside))
        with pytest.raises(PipelineBusy, match="from_pipe"):
            draw(pipe, call, weights=W, callback_on_step_end=nested(pipe))
        assert torch.equal(draw(pipe, call, weights=W), alone[0])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_of_a_pipeline_that_was_called(copied):
    pipe, call = attached()
    expected = draw(pipe, call, weights=W)
    made = copied(pipe)
    assert type(made) is type(pipe) and made.objectives == pipe.objectives
    assert made.transformer is not pipe.transformer
    assert torch.equal(draw(made, call, weights=W), expected)


def test_threads_wait_for_each_other():
    pipe, call = attached()
    pipes = [pipe, quiet(mf.MSDDAPipeline.from_pipe(pipe))]  # over the same networks
    weights = [W, {"a": 0.9, "b": 0.1}]

    def run(i):
        return pipes[i](
            **call,
            weights=weights[i],
            seed=i,
            num_inference_steps=2,
            output_type="latent",
            return_dict=False,
        )[0]

    alone, found = [run(0), run(1)], {}
    ready = threading.Barrier(2)

    def work(i):
        ready.wait()
        found[i] = [run(i) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(torch.equal(got, alone[i]) for got in found[i])


def test_the_size_of_a_batch_is_read_off_whatever_holds_prompts():
    def call(prompt=None, image=None, prompt_embeds_t5=None, num_inference_steps=5):
        pass

    def images_of(**given):
        return Batch.of(call, (), given).images

    assert images_of(prompt=["a", "b"]) == 2
    assert images_of(prompt="a") == 1
    assert images_of(prompt_embeds_t5=torch.zeros(3, 7, 4), image=torch.zeros(1, 3, 8, 8)) == 3
    assert images_of(image=[torch.zeros(3, 8, 8)] * 2) == 2
