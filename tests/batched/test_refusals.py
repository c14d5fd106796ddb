# SPDX-License-Identifier: Apache-2.0
"""Networks, adapters and shapes that the batched forward refuses, each by its name."""

import pytest
import torch
from torch import nn

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.batched.time import AddedConditions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import AdapterMismatch, BackendUnavailable, InvalidShape, UnsupportedNetwork
from tests.batched.cases import (
    ATTENTION,
    KINDS,
    add_adapter,
    inputs,
    network,
    relative,
)

EXACT = 1e-10


def variants(targets=ATTENTION, kind="sd15", dtype=torch.float64):
    """Adapters a and b are objectives; c and d, of ranks 1 and 4, are not."""
    unet = network(kind, dtype)
    for rank, name in enumerate("cabd", start=1):
        add_adapter(unet, name, targets, rank=rank, seed=rank)
    return [Variant(unet, "a"), Variant(unet, "b"), Variant(unet, None)]


def _replaced(unet, path, module):
    parent, name = path.rsplit(".", 1)
    setattr(unet.get_submodule(parent), name, module)
    return unet


def _config_of(**changes):
    unet = network()
    unet.register_to_config(**changes)
    return unet


@pytest.mark.parametrize(
    ("unet", "error", "match"),
    [
        (lambda: nn.Linear(1, 1), UnsupportedNetwork, "Linear is not a UNet2DConditionModel"),
        (lambda: _config_of(act_fn="gelu"), UnsupportedNetwork, "act_fn='gelu'.*'silu'"),
        (lambda: _config_of(class_embed_type="timestep"), UnsupportedNetwork, "class_embed_type"),
        (
            lambda: _replaced(network(), "down_blocks.1", nn.Identity()),
            UnsupportedNetwork,
            r"down_blocks\.1 is a Identity",
        ),
        (lambda: _freeu(), UnsupportedNetwork, r"up_blocks\.0 has FreeU"),
        (lambda: _fused(), UnsupportedNetwork, "FusedAttnProcessor"),
        (lambda: add_adapter(network(), "a", use_dora=True), AdapterMismatch, "a plain LoRA in"),
        (
            lambda: add_adapter(network(), "a", ["ff.net.2"], lora_bias=True),
            AdapterMismatch,
            "a plain LoRA in",
        ),
        (lambda: _merged(), AdapterMismatch, "unfuse_lora"),
    ],
    ids=["class", "config", "embedding", "block", "freeu", "processor", "dora", "bias", "merged"],
)
def test_networks_and_adapters_it_does_not_know(unet, error, match):
    made = unet()
    if not hasattr(made, "dtype"):
        made.dtype = torch.float32
    with pytest.raises(error, match=match):
        BatchedUNet.of([Variant(made, "a")])


def _freeu():
    unet = network()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return unet


def _fused():
    unet = network()
    unet.fuse_qkv_projections()
    return unet


def _merged():
    unet = add_adapter(network(), "a")
    unet.fuse_lora()
    return unet


def test_variants_that_share_no_network():
    with pytest.raises(UnsupportedNetwork, match="different networks"):
        BatchedUNet.of([Variant(network(), None), Variant(network(), None)])
    with pytest.raises(InvalidShape, match="0 variants"):
        BatchedUNet.of([])
    with pytest.raises(BackendUnavailable, match="'efficient' cannot run here"):
        BatchedUNet.of([Variant(network(), None)], BatchedOptions(attention="efficient"))
    with pytest.raises(ValueError, match="attention must be"):
        BatchedUNet.of([Variant(network(), None)], BatchedOptions(attention="quick"))


def test_wrong_shapes_are_named():
    case = inputs(variants())
    batched = BatchedUNet.of(case.variants)
    k = torch.tensor(0)
    with pytest.raises(InvalidShape, match=r"call begin"):
        batched(case.x, k)
    for bad in (case.prompts[:2], case.prompts[0], case.prompts[..., :3], case.prompts[:, :0]):
        with pytest.raises(InvalidShape, match=r"expected \(3 or 1, K, B, L, 16\)"):
            batched.begin(bad, case.timesteps)
    for bad in (case.timesteps.float(), case.timesteps[None], case.timesteps[:0]):
        with pytest.raises(InvalidShape, match=r"expected int64 \(T,\)"):
            batched.begin(case.prompts, bad)
    batched.begin(case.prompts, case.timesteps)
    for bad in (case.x[:1], case.x[:, :3], case.x[None]):
        with pytest.raises(InvalidShape, match=r"expected \(2, 4, h, w\)"):
            batched(bad, k)
    for bad in (k[None], k.float(), k.to("meta")):
        with pytest.raises(InvalidShape, match="expected 0-d int64"):
            batched(case.x, bad)


def test_conditions_must_fit_the_network():
    xl = inputs(variants(kind="sdxl"))
    batched = BatchedUNet.of(xl.variants)
    with pytest.raises(InvalidShape, match="takes AddedConditions"):
        batched.begin(xl.prompts, xl.timesteps)
    short = AddedConditions(xl.added.text_embeds[:2], xl.added.time_ids[:2])
    with pytest.raises(InvalidShape, match=r"expected \(3, 2, 2\) or \(1, 2, 2\)"):
        batched.begin(xl.prompts, xl.timesteps, short)
    plain = inputs(variants())
    with pytest.raises(InvalidShape, match="takes no added conditions"):
        BatchedUNet.of(plain.variants).begin(plain.prompts, plain.timesteps, xl.added)


@pytest.mark.sweep(kind=1)
@pytest.mark.parametrize("kind", KINDS)
def test_one_set_of_conditions_for_all_objectives(kind):
    case = inputs(variants(kind=kind))
    if case.added is not None:
        case.added.text_embeds[1:] = case.added.text_embeds[:1]
    expected = case.stock()
    if case.added is not None:
        case.added = AddedConditions(case.added.text_embeds[:1], case.added.time_ids[:1])
    assert relative(case.batched(BatchedOptions()), expected) < EXACT
