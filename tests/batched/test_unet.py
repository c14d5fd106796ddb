# SPDX-License-Identifier: Apache-2.0
"""One batched forward is the stock forward of every objective, however much of it is shared."""

import itertools
from functools import cache

import pytest
import torch

import msdda_fast as mf
from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import BatchedOptions, Sharing
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.kernels import registry
from tests.batched.cases import (
    ATTENTION,
    CONVOLUTIONS,
    EVERYTHING,
    KINDS,
    LINEAR,
    UP_BLOCKS,
    add_adapter,
    inputs,
    network,
    relative,
)
from tests.tiny_model import quiet

UNSHARED = Sharing(prompt_cache=False, time_table=False, prefix=False, inactive=False)
#: Sixteen decimals less what some tens of layers lose; float32 is judged by stock's own error.
EXACT = 1e-10


def mixed(kind="sd15", targets=ATTENTION, dtype=torch.float64):
    """Three objectives with ranks 2, 3 and none, and a scale that is not 1."""
    unet = add_adapter(network(kind, dtype), "a", targets, rank=2, seed=1)
    add_adapter(unet, "b", ATTENTION, rank=3, seed=2)
    return [Variant(unet, "a"), Variant(unet, "b", 0.5), Variant(unet, None)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets",
    [ATTENTION, LINEAR, CONVOLUTIONS, EVERYTHING, UP_BLOCKS],
    ids=["attention", "linear", "convolutions", "everything", "up blocks"],
)
def test_equals_stock_for_every_target_of_an_adapter(kind, targets):
    case = inputs(mixed(kind, targets))
    expected = case.stock()
    assert relative(expected[0], expected[2]) > 0.01  # the adapters matter
    assert relative(expected[:, 0], expected[:, 1]) > 0.01  # so do the prompts
    for fused in (False, True):
        assert relative(case.batched(BatchedOptions(fused_ops=fused)), expected) < EXACT


@pytest.mark.sweep(1)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(("k", "b"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_equals_stock_for_any_number_of_rows(m, k, b):
    variants = mixed()
    add_adapter(variants[0].network, "c", ["to_k", "ff.net.2"], rank=5, seed=3)
    variants.append(Variant(variants[0].network, "c"))
    case = inputs(variants[:m], k=k, b=b)
    expected = case.stock()
    for fused in (False, True):
        assert relative(case.batched(BatchedOptions(fused_ops=fused)), expected) < EXACT


@cache
def everything_adapted(kind):
    """A case whose adapters are on all layers, and stock's answer: nobody changes it."""
    case = inputs(mixed(kind, EVERYTHING))
    return case, case.stock()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        BatchedOptions(design="separate"),
        BatchedOptions(design="folded"),
        BatchedOptions(design="merged"),
        BatchedOptions(fuse_qkv=True),
        BatchedOptions(fuse_qkv=True, design="folded"),
        BatchedOptions(channels_last=True),
        BatchedOptions(channels_last=True, design="folded"),
        BatchedOptions(attention="math"),
        BatchedOptions(fused_ops=True),
        BatchedOptions(fused_ops=True, channels_last=True, design="merged", fuse_qkv=True),
    ],
    ids=[
        *("separate", "folded", "merged", "fused", "fused folded", "nhwc", "nhwc folded", "math"),
        *("fused ops", "fewest kernels"),
    ],
)
def test_equals_stock_however_it_is_built(kind, options):
    case, expected = everything_adapted(kind)
    assert relative(case.batched(options), expected) < EXACT


@pytest.mark.sweep(kind=1, targets=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_prompt", [False, True], ids=["own prompts", "one prompt"])
@pytest.mark.parametrize("targets", [ATTENTION, UP_BLOCKS], ids=["attention", "up blocks"])
def test_every_sharing_changes_nothing(kind, shared_prompt, targets):
    unet = add_adapter(network(kind), "a", targets, seed=1)
    case = inputs([Variant(unet, "a"), Variant(unet, None)], shared_prompt=shared_prompt)
    expected = case.stock()
    if shared_prompt:
        case.prompts = case.prompts[:1]
    names = ("prompt_cache", "time_table", "prefix")
    for flags in itertools.product([False, True], repeat=3):
        sharing = Sharing(**dict(zip(names, flags, strict=True)))
        for fused in (False, True):
            options = BatchedOptions(sharing=sharing, fused_ops=fused)
            assert relative(case.batched(options), expected) < EXACT, (flags, fused)


@pytest.mark.sweep(kind=1, options=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        BatchedOptions(),
        BatchedOptions(design="folded", fuse_qkv=True),
        BatchedOptions(sharing=UNSHARED),
    ],
    ids=["default", "folded", "unshared"],
)
def test_float32_is_no_worse_than_twice_stock(kind, options):
    exact = inputs(mixed(kind)).stock()
    case = inputs(mixed(kind, dtype=torch.float32), dtype=torch.float32)
    error = relative(case.stock(), exact)
    assert relative(case.batched(options), exact) <= 2 * error + torch.finfo(torch.float32).eps


@pytest.mark.full  # interprets a network for 10 s; tests/kernels has each kernel by itself
@pytest.mark.parametrize("kind", KINDS)
def test_our_kernels_are_as_exact_as_those_of_torch(kind, monkeypatch):
    """In Triton's interpreter, where a network of a GPU would have them."""
    if not registry.available("triton"):
        pytest.skip(registry.explain()["triton"])
    exact = inputs(mixed(kind, EVERYTHING)).stock()
    case = inputs(mixed(kind, EVERYTHING, torch.float32), dtype=torch.float32)
    monkeypatch.setenv("MSDDA_BACKEND", "triton")
    options = BatchedOptions(fused_ops=True, channels_last=True)
    error = relative(case.stock(), exact)
    assert relative(case.batched(options), exact) <= 2 * error + torch.finfo(torch.float32).eps


def test_equal_objectives_share_every_row():
    unet = add_adapter(network(), "a", seed=1)
    case = inputs([Variant(unet, "a"), Variant(unet, "a")], shared_prompt=True)
    expected = case.stock()
    case.prompts = case.prompts[:1]
    batched = BatchedUNet.of(case.variants)
    assert batched.frontier is None
    assert relative(case.run(batched), expected) < EXACT


def test_an_adapter_without_effect_does_not_part_the_rows():
    unet = add_adapter(network(), "zero", size=0.0)
    for name, parameter in unet.named_parameters():
        if "lora_A.zero" in name:
            parameter.data.fill_(1.0)  # as before training: A random, B zero
    add_adapter(unet, "up", UP_BLOCKS, seed=2)
    batched = BatchedUNet.of([Variant(unet, "zero"), Variant(unet, "up"), Variant(unet, "up", 0.0)])
    assert batched.frontier.startswith("up_blocks.1.attentions.0")


def test_scale_and_rslora_count_as_when_switching():
    unet = add_adapter(network(), "a", seed=1, rank=4, use_rslora=True)
    for layer in unet.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("a", 7.0)  # as left behind by set_adapters: sampling sets its own
    case = inputs([Variant(unet, "a", 0.3), Variant(unet, None)])
    assert relative(case.batched(BatchedOptions()), case.stock()) < EXACT


def test_latents_that_do_not_halve_evenly():
    case = inputs(mixed(), size=7)
    assert relative(case.batched(BatchedOptions()), case.stock()) < EXACT


@pytest.mark.sweep(k=1)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_every_step_of_the_table(k):
    case = inputs(mixed("sdxl"))
    assert relative(case.batched(BatchedOptions(), k), case.stock(k)) < EXACT


def test_a_new_prompt_and_schedule_leave_nothing_of_the_old():
    case, other = inputs(mixed("sdxl")), inputs(mixed("sdxl"))
    batched = BatchedUNet.of(case.variants)
    case.run(batched)
    mine = case.prompts.clone(), case.timesteps.clone()
    kept = [t.x.data_ptr() for layer in batched._cross for t in layer._kept]
    other.prompts, other.timesteps = -other.prompts, torch.tensor([999, 500, 250])
    other.added.text_embeds.mul_(2)
    other.variants = case.variants
    assert relative(other.run(batched), other.stock()) < EXACT
    assert [t.x.data_ptr() for layer in batched._cross for t in layer._kept] == kept
    assert torch.equal(case.prompts, mine[0]) and torch.equal(case.timesteps, mine[1])
    narrow = inputs(case.variants, k=1, b=1)  # other shapes
    assert relative(narrow.run(batched), narrow.stock()) < EXACT


@pytest.mark.sweep(1)
@pytest.mark.parametrize("chosen", [(0, 1), (1, 2), (2,)], ids=str)
def test_some_objectives_run_as_themselves(chosen):
    case = inputs(mixed(targets=EVERYTHING))
    expected = case.stock()[list(chosen)]
    some = BatchedUNet(LoadedAdapters(case.variants), objectives=chosen)
    case.prompts = case.prompts[list(chosen)]
    assert relative(case.run(some), expected) < EXACT


@pytest.mark.full  # larger; tests/pipelines/test_shipped.py draws with it
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_shipped_model(dtype):
    pipe = quiet(mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji", dtype=torch.float64))
    variants = list(pipe.variants.values())
    exact = inputs(variants, size=16).stock()
    pipe.unet.to(dtype)
    case = inputs(variants, size=16, dtype=dtype)
    error = EXACT if dtype == torch.float64 else 2 * relative(case.stock(), exact)
    assert relative(case.batched(BatchedOptions()), exact) <= error


@pytest.mark.sweep(mine=1)
@pytest.mark.parametrize("mine", ["warm", "cool"])
def test_files_as_the_pipeline_loads_them(tiny, mine):
    pipe = tiny.load(dtype=torch.float64)
    case = inputs([*pipe.variants.values()], b=1)
    stock = tiny.stock(mine, dtype=torch.float64).unet  # loaded by diffusers
    m = list(pipe.variants).index(mine)
    embeds = case.prompts[m].flatten(0, 1)
    with torch.no_grad():
        expected = stock(case.x.repeat(2, 1, 1, 1), case.timesteps[1], embeds).sample
    actual = case.batched(BatchedOptions())[m].flatten(0, 1)
    assert relative(actual, expected) < EXACT
