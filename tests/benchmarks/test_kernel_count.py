# SPDX-License-Identifier: Apache-2.0
"""Kernels are counted without a GPU: what each operator launches, and what a step does."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import kernel_count
from benchmarks.inductor_count import scheduled
from benchmarks.kernel_count import STEPS, UnknownOperator, advance, by_kind, count, network
from benchmarks.tables import launches, results

HALF = {"dtype": torch.float16}
ROWS, BATCH = torch.ones(4, 8, **HALF), torch.ones(2, 4, 8, **HALF)
SQUARE = torch.ones(8, 8, **HALF)
PICTURE = torch.ones(2, 8, 4, 4, **HALF).to(memory_format=torch.channels_last)
CASES = {
    "a view": (lambda: BATCH.transpose(0, 1)[0].unsqueeze(0), {}),
    "a dense copy": (lambda: BATCH.mT.contiguous(), {"clone": 1}),
    "what is dense is not copied": (lambda: BATCH.contiguous(), {}),
    "a bias of rows is in the epilogue": (
        lambda: torch.addmm(ROWS[0], ROWS, SQUARE),
        {"addmm": 1},
    ),
    "a bias of batched products is copied": (
        lambda: torch.baddbmm(ROWS[0, :4], BATCH, BATCH.mT),
        {"baddbmm": 2},
    ),
    "a sum in place is not": (
        lambda: torch.empty(2, 4, 4, **HALF).baddbmm_(BATCH, BATCH.mT),
        {"baddbmm_": 1},
    ),
    "a convolution's bias": (
        lambda: functional.conv2d(PICTURE, ROWS[:, :, None, None], ROWS[0, :4]),
        {"convolution": 2},
    ),
    "a convolution without": (
        lambda: functional.conv2d(PICTURE, ROWS[:, :, None, None]),
        {"convolution": 1},
    ),
    "CUDA's group norm takes NCHW": (
        lambda: functional.group_norm(PICTURE, 2),
        {"to NCHW": 1, "native_group_norm": 3},
    ),
    "and does not copy that": (
        lambda: functional.group_norm(PICTURE.contiguous(), 2),
        {"clone": 1, "native_group_norm": 3},
    ),
    "attention": (
        lambda: functional.scaled_dot_product_attention(*[BATCH[None]] * 3),
        {"_scaled_dot_product_flash_attention_for_cpu": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case):
    run, expected = CASES[case]
    assert count(run) == expected


def test_an_operator_that_the_map_lacks_is_an_error():
    with pytest.raises(UnknownOperator, match=r"aten\.erfinv\.default: say in KERNELS"):
        count(lambda: torch.erfinv(ROWS))


def test_operators_see_no_data():
    seen = []
    count(lambda: seen.append(type(ROWS + ROWS).__name__))
    assert seen == ["FakeTensor"]


def test_kinds_are_those_of_known_operators():
    named = [name for names in kernel_count.KINDS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) - set(kernel_count.KERNELS) == {"to NCHW"}
    assert by_kind({"bmm": 3, "cat": 2, "clone": 1}) == {
        **dict.fromkeys(kernel_count.KINDS, 0),
        "matrix products": 3,
        "group norms, with SiLU and layouts": 1,
        "other": 2,
    }


@pytest.fixture(scope="module")
def variants():
    return network(2)


#: How many kernels each step launches. Fewer is the aim; more needs a reason.
PINNED = {
    "M = 2, separate": 1074,
    "M = 2, merged": 914,
    "M = 2, separate, fused ops": 720,
    "M = 2, merged, fused ops": 528,
    "M = 2": 496,
    "S, merged": 881,
    "S": 494,
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("title", STEPS)
def test_a_step_launches_no_more_kernels_than_it_did(variants, title):
    number, options = STEPS[title]
    seen = count(advance(variants[:number], options))
    assert sum(seen.values()) == PINNED[title], seen


def test_the_committed_counts_are_the_pinned_ones():
    kept = json.loads((results.RESULTS / "kernel_count.json").read_text())
    assert {title: step["kernels"] for title, step in kept["steps"].items()} == PINNED
    assert all(step["kernels"] == sum(step["kinds"].values()) for step in kept["steps"].values())
    table = launches.kernel_count_table()
    assert "| M = 2, separate | 1,074 |" in table and "| M = 2 | 496 |" in table
    assert f"Inductor would make {kept['inductor']['kernels']}" in table


@pytest.mark.full  # imports Inductor, which takes seconds
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch itself
def test_the_nodes_of_inductor_are_counted_after_fusion():
    square = SQUARE.float()

    def run():
        return functional.silu(torch.mm(square + 1, square)).mul(2) + 1

    assert scheduled(run) == {"generated": 2, "mm": 1}  # before the product, and after it


def test_every_layer_is_counted_once(variants):
    seen = count(advance(variants, STEPS["M = 2, separate"][1]))
    layers = list(variants[0].network.modules())
    norms = sum(isinstance(layer, nn.GroupNorm) for layer in layers)
    assert seen["native_group_norm"] == 3 * norms == 183
    assert seen["convolution"] == 2 * 66
    assert seen["native_layer_norm"] == sum(isinstance(layer, nn.LayerNorm) for layer in layers)
