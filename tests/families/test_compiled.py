# SPDX-License-Identifier: Apache-2.0
"""A denoiser that its user compiled compiles once for all weights, prompts, seeds and adapters."""

import warnings

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from tests.families import images, videos, xl
from tests.families.lockstep import draw
from tests.families.test_mechanisms import said  # noqa: F401 - a fixture
from tests.families.test_pipelines import W, assert_close, attached


class Counting:
    """A compiler that compiles nothing, and counts what it is asked to."""

    def __init__(self):
        self.compilations = 0

    @property
    def options(self):
        return {"backend": self, "fullgraph": True, "dynamic": False}

    def __call__(self, module, inputs):
        self.compilations += 1
        return module.forward


def whole(pipe, compiler):
    for name in ("unet", "transformer"):
        if (network := getattr(pipe, name, None)) is not None:
            network.compile(**compiler.options)


def wrapped(pipe, compiler):
    pipe.transformer = torch.compile(pipe.transformer, **compiler.options)


def blocks(pipe, compiler):
    pipe.transformer.compile_repeated_blocks(**compiler.options)


def one_block(pipe, compiler):
    pipe.transformer.single_transformer_blocks[0].compile(**compiler.options)


def other_numbers(network: nn.Module) -> None:
    """Put other adapters of the same ranks in the places of the old ones."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(-1.1 * parameter.flip(0))


def other_adapter(network: nn.Module) -> None:
    """Load another adapter of the same ranks by the name of an old one."""
    config = network.peft_config["a"]
    network.delete_adapters("a")
    torch.manual_seed(9)
    with warnings.catch_warnings():  # of a second adapter, which is the purpose
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, network, "a")


CASES = [
    pytest.param(images.flux, one_block, id="a block of FLUX"),  # the others take half a minute
    pytest.param(images.flux, blocks, id="FLUX, its blocks", marks=pytest.mark.full),
    pytest.param(images.flux, wrapped, id="FLUX, wrapped", marks=pytest.mark.full),
    pytest.param(images.sd3, whole, id="SD3", marks=pytest.mark.full),
    pytest.param(videos.wan, whole, id="Wan", marks=pytest.mark.full),
    pytest.param(xl.text, whole, id="SDXL", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("make", "how"), CASES)
def test_nothing_but_shapes_compiles_again(make, how, said):  # noqa: F811
    plain, _ = attached(make)
    pipe, call = attached(make)
    network = getattr(pipe, "unet", None) or pipe.transformer
    compiler = Counting()
    how(pipe, compiler)

    def draws(**more):
        got = draw(pipe, {**call, **prompt}, **more)
        assert_close(got, draw(plain, {**call, **prompt}, **more))
        return compiler.compilations

    prompt = {}
    first = draws(weights=W)
    assert first == (2 if how is blocks else 1)  # the check of the rows was not compiled
    prompt = {"prompt_embeds": call["prompt_embeds"] + 0.1}
    assert draws(weights=[{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}], seed=[3, 4]) == first
    for change in (other_numbers, other_adapter):
        for changed in (network, getattr(plain, "unet", None) or plain.transformer):
            change(changed)
        assert draws(weights=W) == first
    three = draws(weights=W, objective_strength=[0.5, 0.5])  # and the base: more rows
    assert three == 2 * first
    assert draws(weights=W) == three
    assert draws(weights=W, objective_strength=[0.5, 0.5]) == three
    assert not said()
    assert "forward" not in vars(network)
    assert (network._compiled_call_impl is not None) == (how is whole)
