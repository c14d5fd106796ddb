# SPDX-License-Identifier: Apache-2.0
"""Weights decide how many children a particle has."""

import math

import torch

from msdda_fast.methods.resampling import effective_size, systematic


def test_effective_size():
    log_weights = torch.tensor([[0.0, 5.0, 0.0], [0.0, -math.inf, math.log(3)]]).double()
    expected = torch.tensor([2.0, 1.0, 1.6]).double()  # (1 + 3)^2 / (1 + 9)
    torch.testing.assert_close(effective_size(log_weights), expected)


def test_resampling_keeps_each_particle_in_proportion():
    log_weights = torch.randn(7, 1, generator=torch.Generator().manual_seed(0)).double()
    u = (torch.arange(5000) + 0.5) / 5000
    ancestors = systematic(log_weights.expand(7, 5000), u)
    children = torch.nn.functional.one_hot(ancestors, 7).sum(0).double()  # (5000, 7)
    expected = 7 * log_weights[:, 0].softmax(0)
    assert (children - expected).abs().max() < 1
    torch.testing.assert_close(children.mean(0), expected, rtol=0, atol=1e-3)
