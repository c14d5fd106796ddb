# SPDX-License-Identifier: Apache-2.0
"""What is no dense tensor here is refused by name; derivatives of the weights are kept."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import msdda_fast as mf
from msdda_fast.errors import InvalidShape
from msdda_fast.steps.coefficients import StepCoefficients

MEANS = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.tensor([0.3, 0.7])
VARIANCES = torch.tensor([0.5, 2.0])


def fuse(weights=WEIGHTS, **options):
    given = {"means": MEANS, "variances": VARIANCES, "noise": NOISE, "backend": "eager"}
    return mf.fast_fuse_step(weights=weights, **(given | options))


def freed(values):
    values.untyped_storage().resize_(0)
    return values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"means": MEANS.numpy()}, "means must be a tensor or a list of tensors, got numpy.ndarr"),
        ({"means": list(MEANS.numpy())}, r"means\[0\] must be a tensor, got numpy.ndarray"),
        ({"means": [MEANS[0], None]}, r"means\[1\] must be a tensor, got NoneType"),
        ({"means": None}, "means must be a tensor or a list of tensors, got NoneType"),
        ({"means": MEANS.to_mkldnn()}, "means has layout torch._mkldnn"),
        ({"noise": NOISE.numpy()}, "noise must be a tensor, got numpy.ndarray"),
        ({"out": (NOISE,)}, "out must be a tensor, got tuple"),
        ({"variances": VARIANCES.to_sparse()}, "variances has layout torch.sparse_coo"),
        ({"weights": WEIGHTS.to_sparse()}, "weights has layout torch.sparse_coo"),
        ({"variances": VARIANCES.to(torch.float8_e5m2)}, "variances must be real numbers, got dty"),
        ({"noise": None, "generator": 5}, "generator must be a torch.Generator .* got 5"),
        ({"noise": None, "generator": np.random.default_rng()}, "generator must be a torch.Gener"),
        ({"noise": None, "seeds": torch.ones(3, dtype=int).to("meta")}, "seeds is on meta"),
        ({"noise": None, "seeds": torch.ones(3, dtype=int).to_sparse()}, "seeds has layout"),
        ({"noise": None, "seeds": [1, 2, 3], "step": freed(torch.tensor(1))}, "step has no memory"),
        (
            {"zero_variance": "ratio", "rates": torch.ones(2, device="meta")},
            "rates is on meta, expected cpu",
        ),
    ],
)
def test_refused_by_name(options, message):
    with pytest.raises(InvalidShape, match=message):
        fuse(**options)


@pytest.mark.parametrize("name", ["x_t", "outputs"])
def test_ddim_takes_tensors_alone(name):
    given = {"x_t": NOISE, "outputs": [NOISE[None]], name: NOISE.numpy()}
    row = StepCoefficients(torch.tensor([[1.0, 0.0, 0.5, 0.3]]), 1, None)
    with pytest.raises(InvalidShape, match=f"{name} must be a tensor"):
        mf.fused_ddim_step(**given, coefficients=row, noise=NOISE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward_ad itself
def test_weights_keep_their_tangent():
    direction = torch.tensor([1.0, -1.0])
    steps = [fuse(WEIGHTS.double() + h * direction.double()) for h in (1e-3, -1e-3)]
    expected = (steps[0] - steps[1]) / 2e-3
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(fuse(forward_ad.make_dual(WEIGHTS, direction))).tangent
    assert torch.allclose(tangent, expected, rtol=1e-2, atol=1e-2)
    tangent = torch.func.jvp(fuse, (WEIGHTS,), (direction,))[1]
    assert torch.allclose(tangent, expected, rtol=1e-2, atol=1e-2)


def test_vmap_maps_over_weights_with_the_means():
    weights = torch.stack([WEIGHTS, WEIGHTS.flip(0)])
    means = MEANS.expand(2, *MEANS.shape)
    got = torch.func.vmap(lambda w, m: fuse(w, means=m))(weights, means)
    assert torch.allclose(got, torch.stack([fuse(w) for w in weights]), atol=1e-6)
    with pytest.raises(InvalidShape, match=r"vmap .* map over that one too"):
        torch.func.vmap(fuse)(weights)
