# SPDX-License-Identifier: Apache-2.0
"""Every rank replays graphs of its share of the networks, and gathers without its host."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import msdda_fast as mf
from msdda_fast.engine import graph
from msdda_fast.engine.exchange import Exchange
from msdda_fast.engine.parallel import MEET_EVERY
from msdda_fast.errors import RanksDiffer
from msdda_fast.pipelines.stable_diffusion import captured
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler
from msdda_fast.pipelines.stable_diffusion.captured_generation import CapturedGeneration
from msdda_fast.pipelines.stable_diffusion.exact import step_kind
from msdda_fast.pipelines.stable_diffusion.rank_network import RankNetwork
from msdda_fast.torch_private import TorchDispatchMode
from tests.engine.small_world import TracedGraphs
from tests.parallel.ranks import run_ranks, values
from tests.tiny_model import quiet

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=3, guidance_scale=3.0, seed=0, output_type="latent")

REQUESTS = {
    "both": {},
    "weights per prompt": dict(weights=[(1, 0), (0.3, 0.7)]),
    "one objective": dict(weights=(0, 1)),
    "another objective in each step": dict(weights=lambda k: (1, 0) if k == 0 else (0, 1)),
    "the base is one more": dict(strength=(1.5, 0.5)),
    "no guidance": dict(guidance_scale=1.0),
    "a generator": dict(seed=None, generator=torch.Generator().manual_seed(3)),
}


def draw(pipe, name):
    return pipe(PROMPTS, **{**SHORT, **REQUESTS[name]}).images


def draw_captured(parallel, tiny, names):
    """Latents by request; then how many steps were captured and how many were replays."""
    graphs = TracedGraphs()
    graph.graphs_for = lambda device: graphs
    pipe = tiny.load()
    pipe.set_forward("batched", capture="required")
    pipe.enable_parallel(parallel)
    found = {name: draw(pipe, name) for name in names}
    counts = graphs.captures, graphs.replays
    again = draw(pipe, "both")
    assert graphs.captures == counts[0], "the same shape captured again"
    assert torch.equal(again, found["both"])
    pipe.disable_parallel()
    found["alone"] = draw(pipe, "both")
    return found, counts


class InTurn:
    """The forwards of all ranks in one process, for the step of one process."""

    step_kl = merged_kl = None

    def __init__(self, size, split, key, members, device):
        def exchanges(rank):
            return {
                step_kind("exact", runs): Exchange(
                    runs, key.branches, key.shape, rank=rank, size=size, split_guidance=split,
                    dtype=key.dtype, device=device,
                )
                for runs in key.runs
            }  # fmt: skip

        class Nobody:
            gather = None

        self.ranks = [RankNetwork(Nobody, exchanges(r), members, key.dtype) for r in range(size)]
        self.forwards = self.ranks[0].forwards
        self.kinds = {
            kind: lambda x, k, kind=kind: self.predict(kind, x, k) for kind in self.forwards
        }

    def predict(self, kind, x, k):
        found = {}
        for rank in self.ranks:
            rank.kinds[kind].evaluate(x, k)
            exchange = rank.exchanges[kind]
            rows = [row for work in exchange.works for row in work.rows]
            found |= {row: exchange.mine[slot].clone() for slot, row in enumerate(rows)}
        return [
            torch.stack([found[m, b] for b in range(exchange.branches)]) if on else None
            for m, on in enumerate(exchange.active)
        ]

    def storages(self):
        return {}

    def begin(self, *args, **kwargs):
        for rank in self.ranks:
            rank.begin(*args, **kwargs)

    def mix(self, k):
        pass


def in_one_process(monkeypatch, tiny, size, split=True):
    """A pipeline with the predictions of so many ranks."""

    def build(sampler, key, buffers):
        network = InTurn(size, split, key, sampler._members, buffers.x.device)
        nothing = torch.zeros(key.context[1:], dtype=key.dtype)
        embeds = {m: nothing for m, runs in enumerate(key.active) if runs}
        network.begin(embeds, buffers.timesteps, shared=key.shared_context, k=0)
        return network

    monkeypatch.setattr(CapturedSampler, "_build", build)
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward("batched")
    return pipe


#: captures are traces here, seconds each
ALL = pytest.mark.full


@pytest.mark.parametrize(
    "size, names",
    [(2, ["both"]), *(pytest.param(size, list(REQUESTS), marks=ALL) for size in (2, 3, 4))],
    ids=["2", "2-all", "3-all", "4-all"],
)
def test_captured_ranks_have_the_bits_of_one_process_given_equal_predictions(
    tiny, monkeypatch, size, names
):
    found = values(run_ranks(size, draw_captured, tiny, names))
    alone = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    alone.set_forward("batched")
    together = in_one_process(monkeypatch, tiny, size)
    for name in names:
        REQUESTS["a generator"]["generator"].manual_seed(3)
        expected = draw(together, name)
        assert all(torch.equal(images[name], expected) for images, _ in found), name
    monkeypatch.undo()
    # one forward for all rows rounds in another order
    images, one = found[0][0], draw(alone, "both")
    assert (images["both"] - one).norm() < 2e-4 * one.norm()
    assert all((other["alone"] - one).norm() < 1e-6 * one.norm() for other, _ in found)
    for _, (captures, replays) in found:
        assert captures <= len(names) + 1 and replays == 3 * len(names)


class Reads(TorchFunctionMode):
    """Notes the dtypes of tensors whose values go to the host."""

    NAMES = frozenset({"cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__"})

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES and isinstance(args[0], torch.Tensor):
            self.dtypes.append(args[0].dtype)
        return func(*args, **kwargs or {})


class Copies(TorchDispatchMode):
    """Notes operators that copy to another device or dtype, or read a value."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(("aten._to_copy", "aten._local_scalar_dense")):
            self.dtypes.append(args[0].dtype)
        return func(*args, **kwargs or {})


def watched(parallel, tiny):
    """What the host reads in each step, and what operators copy outside of meetings."""
    graphs = TracedGraphs()
    graph.graphs_for = lambda device: graphs
    pipe = tiny.load()
    pipe.set_forward("batched", capture="required")
    pipe.enable_parallel(parallel)
    reads, copies, step = {}, {}, CapturedGeneration.step

    def watching(generation, k):
        with Copies() as copied, Reads() as read:
            step(generation, k)
        reads[k], copies[k] = read.dtypes, copied.dtypes

    CapturedGeneration.step = watching
    pipe("a red dog", **{**SHORT, "num_inference_steps": 2 * MEET_EVERY})
    return reads, copies


#: Messages, whether they are the same, and a checksum.
HOSTS_READ = {torch.uint8, torch.bool, torch.int64}


def test_the_host_does_not_read_the_latents(tiny):
    for reads, copies in values(run_ranks(2, watched, tiny)):
        for k in range(2 * MEET_EVERY):
            if k % MEET_EVERY == 0:
                assert reads[k] and set(reads[k]) <= HOSTS_READ, (k, reads[k])
            else:
                assert not reads[k] and not copies[k], (k, reads[k], copies[k])


def on_gpus(parallel, tiny):
    """Latents by request, where nothing but a meeting may wait for the device."""
    pipe = tiny.load().to("cuda")
    pipe.set_forward("batched", capture="required")
    pipe.enable_parallel(parallel)
    draw(pipe, "both")  # what starts NCCL and captures waits
    step = CapturedGeneration.step

    def watching(generation, k):
        torch.cuda.set_sync_debug_mode("default" if k % MEET_EVERY == 0 else "error")
        try:
            step(generation, k)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    CapturedGeneration.step = watching
    return {name: draw(pipe, name).cpu() for name in ("both", "no guidance")}


@pytest.mark.gpu
def test_graphs_and_nccl(tiny):
    """On all GPUs of the machine; one still goes through NCCL, with the bits of one process."""
    size = torch.cuda.device_count()
    found = values(run_ranks(size, on_gpus, tiny, backend="nccl"))
    alone = tiny.load().to("cuda")
    alone.set_forward("batched", capture="required")
    for name, images in found[0].items():
        one = draw(alone, name).cpu()
        assert all(torch.equal(other[name], images) for other in found), name
        assert (images - one).norm() <= (2e-4 if size > 1 else 0) * one.norm(), name


def stray(parallel, tiny):
    """The error when a callback of one rank changes latents in step 1, and who has seen what."""
    pipe = tiny.load()
    pipe.enable_parallel(parallel)
    seen = []

    def callback(pipe, k, t, tensors):
        seen.append(k)
        return {"latents": tensors["latents"] + 1} if (k, parallel.rank) == (1, 1) else {}

    try:
        pipe("a red dog", **{**SHORT, "num_inference_steps": 12}, callback_on_step_end=callback)
    except RanksDiffer as error:
        images, exports = draw(pipe, "both"), []
        captured.ExportedForward = lambda unet, shape: (
            lambda x, k: (exports.append(shape), unet(x, k))[1]
        )
        pipe.set_forward(compile="openvino")
        assert torch.equal(draw(pipe, "both"), images) and len(exports) == 3
        return str(error), seen, images


def test_a_callback_that_changes_latents_is_found_at_the_next_meeting(tiny):
    found = values(run_ranks(2, stray, tiny))
    for error, seen, _ in found:
        assert error.startswith("every rank must have the same at step 10; ")
        assert error.endswith(": rank 1 in latents")
        assert seen == list(range(10))
    assert torch.equal(found[0][2], found[1][2])
