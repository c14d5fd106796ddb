# SPDX-License-Identifier: Apache-2.0
"""An exported forward is the forward of the network, whatever the request."""

import pytest
import torch

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched import exported
from msdda_fast.batched.exported import ExportedForward
from msdda_fast.batched.options import BatchedOptions, Sharing
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import BackendUnavailable, UnsupportedNetwork
from tests.batched.cases import EVERYTHING, TOKENS, WIDTH, add_adapter, network

SHAPE, OBJECTIVES, BRANCHES = (2, 4, 8, 8), 3, 2


def begun(options=None, dtype=torch.float32) -> BatchedUNet:
    """Two adapters on every layer, and the base."""
    unet = add_adapter(network("sd15", dtype), "a", EVERYTHING, rank=2, seed=1)
    add_adapter(unet, "b", rank=3, seed=2)
    variants = [Variant(unet, "a"), Variant(unet, "b", 0.5), Variant(unet, None)]
    made = BatchedUNet.of(variants, options or BatchedOptions())
    request(made, seed=0)
    return made


def request(unet, *, seed, shared=True):
    torch.manual_seed(seed)
    count = 1 if shared else OBJECTIVES
    prompts = torch.randn(count, BRANCHES, SHAPE[0], TOKENS, WIDTH)
    unet.begin(prompts, torch.randint(1000, (5,)))


def assert_same(forward, unet):
    for k in map(torch.tensor, (0, 4)):
        x = torch.randn(SHAPE)
        # float32, sums in another order
        torch.testing.assert_close(forward(x, k), unet(x, k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        None,
        pytest.param(
            BatchedOptions(sharing=Sharing(prompt_cache=False, time_table=False, prefix=False)),
            marks=pytest.mark.full,  # an export takes seconds
        ),
    ],
    ids=["shared", "unshared"],
)
def test_equals_the_forward_for_every_request_of_a_shape(options):
    pytest.importorskip("openvino")
    unet = begun(options)
    forward = ExportedForward(unet, SHAPE)
    assert_same(forward, unet)
    request(unet, seed=3)
    assert_same(forward, unet)
    kept, x, k = forward(torch.randn(SHAPE), torch.tensor(1)), torch.randn(SHAPE), torch.tensor(2)
    before = kept.clone()
    forward(x, k)
    assert torch.equal(kept, before)  # the next call has its own output


def test_a_model_that_computes_something_else_is_refused(monkeypatch):
    unet = begun()

    class Wrong:
        def set_input_tensor(self, i, tensor):
            pass

        def infer(self, **_):
            return [torch.ones(OBJECTIVES, BRANCHES, *SHAPE).numpy()]

    monkeypatch.setattr(exported, "check_exportable", lambda unet: None)
    monkeypatch.setattr(exported, "_shared", lambda tensor: tensor)
    monkeypatch.setattr(exported, "inference_request", lambda *_: Wrong())
    with pytest.raises(UnsupportedNetwork, match="outputs differ by"):
        ExportedForward(unet, SHAPE)


def test_what_openvino_raises_has_a_name(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(exported, "check_exportable", lambda unet: None)
    monkeypatch.setattr(exported, "inference_request", broken)
    with pytest.raises(UnsupportedNetwork, match="no such operation"):
        ExportedForward(begun(), SHAPE)


def test_openvino_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"msdda-fast\[openvino\]"):
        ExportedForward(begun(), SHAPE)


def test_other_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr(exported, "find_spec", lambda name: object())
    unet = begun()
    unet.dtype = torch.bfloat16  # bfloat16 itself is slow on CPUs without it
    with pytest.raises(UnsupportedNetwork, match="float32"):
        ExportedForward(unet, SHAPE)
