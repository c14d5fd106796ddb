# SPDX-License-Identifier: Apache-2.0
"""The noise is Philox4x32-10 and Box-Muller, bit for bit, and depends on nothing but its seed."""

import json
import math
from pathlib import Path

import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.counter_noise._eager import philox, standard_normals

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Random123's known answers (kat_vectors): counter, key, output
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zero", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert [int(word) for word in words] == expected


def test_normals_follow_box_muller():
    even = torch.arange(0, 2**32, 2**32 // 50_000 + 1)
    odd = even.flip(0)
    u, angle = ((even >> 8) + 1).double() / 2**24, (odd >> 8).double() / 2**24 * 2 * math.pi
    radius = (-2 * u.log()).sqrt()
    x, y = standard_normals(even, odd)
    # a dozen float32 roundings of values up to the radius
    bound = 6 * torch.finfo(torch.float32).eps * (radius + 1)
    assert ((x - radius * angle.cos()).abs() < bound).all()
    assert ((y - radius * angle.sin()).abs() < bound).all()


@pytest.mark.parametrize("seed", [0x89ABCDEF01234567, -3])
def test_seed_and_counter_reach_philox_in_the_documented_order(seed, backend):
    step, stream = 0x12345678, 0x9ABCDEF0
    key = (torch.tensor(seed % 2**32), torch.tensor((seed >> 32) % 2**32))
    noise = counter_noise([seed], (1, 6, 3), step=step, stream=stream, backend=backend)
    for block, pixel in ((0, 0), (0, 2), (1, 1)):
        words = philox(key, tuple(map(torch.tensor, (pixel, block, step, stream))))
        z = (*standard_normals(*words[:2]), *standard_normals(*words[2:]))
        channels = noise[0, 4 * block : 4 * block + 4, pixel].tolist()
        assert channels == [float(value) for value in z][: len(channels)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_vectors(case, backend):
    noise = counter_noise(
        case["seeds"], case["shape"], step=case["step"], stream=case["stream"], backend=backend
    )
    assert noise.view(torch.int32).flatten().tolist() == case["bits"]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 64, 64), (2, 5, 7, 9), (2, 13), (1, 1), (2, 16, 3, 20, 20), (1, 2050), (2, 3, 1500)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_every_backend_is_bitwise_equal_to_eager(shape, dtype, fast_backend):
    seeds = [-5, 2**63 + 1][: shape[0]]
    eager, fast = (
        counter_noise(seeds, shape, step=3, dtype=dtype, backend=name)
        for name in ("eager", fast_backend)
    )
    assert torch.equal(eager, fast)


def test_an_empty_batch_or_image_is_fine(backend):
    assert counter_noise([], (0, 4, 8, 8), backend=backend).shape == (0, 4, 8, 8)
    assert counter_noise([1], (1, 4, 0, 8), backend=backend).numel() == 0


def test_a_sample_does_not_depend_on_its_neighbours(backend):
    batch = counter_noise([11, 12, 13], (3, 4, 9, 7), step=5, backend=backend)
    alone = counter_noise([12], (1, 4, 9, 7), step=5, backend=backend)
    assert torch.equal(batch[1], alone[0])


def test_more_channels_leave_the_first_ones_alone(backend):
    few = counter_noise([3], (1, 4, 6, 6), backend=backend)
    many = counter_noise([3], (1, 9, 6, 6), backend=backend)
    assert torch.equal(few, many[:, :4])


def test_threads_do_not_change_a_bit(native):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(counter_noise([1, 2], (2, 4, 160, 200), backend=native))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_step_tensor_counts_as_its_value(backend):
    by_tensor = counter_noise([7], (1, 4, 5), step=torch.tensor(9), backend=backend)
    assert torch.equal(by_tensor, counter_noise([7], (1, 4, 5), step=9, backend=backend))


def test_negative_and_large_seeds_are_their_64_bits(backend):
    wrapped = counter_noise([-1, 2**64 - 1], (2, 4, 5), backend=backend)
    assert torch.equal(wrapped[0], wrapped[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes_hold_the_float32_value(dtype, backend):
    wide = counter_noise([7], (1, 4, 40), backend=backend)
    assert torch.equal(counter_noise([7], (1, 4, 40), dtype=dtype, backend=backend), wide.to(dtype))


def test_moments_and_tails_are_those_of_a_standard_normal(quick_backend):
    z = counter_noise([1, 2], (2, 4, 256, 512), backend=quick_backend).double().flatten()
    n = z.numel()
    # each bound is five standard errors of the statistic under N(0, 1)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for edge in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(edge / math.sqrt(2))
        assert abs((z.abs() > edge).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert z.abs().max() <= math.sqrt(48 * math.log(2)) * (1 + 1e-6)  # sqrt(-2 log 2^-24)


def test_seeds_steps_streams_and_elements_are_uncorrelated(quick_backend):
    shape = (1, 4, 128, 128)
    base = counter_noise([5], shape, backend=quick_backend).double().flatten()
    others = {
        "next seed": counter_noise([6], shape, backend=quick_backend),
        "high word of the seed": counter_noise([5 + 2**32], shape, backend=quick_backend),
        "next step": counter_noise([5], shape, step=1, backend=quick_backend),
        "other stream": counter_noise([5], shape, stream=0, backend=quick_backend),
        "next pixel": base.view(4, -1).roll(1, dims=1),
        "next channel": base.view(4, -1).roll(1, dims=0),
    }
    for name, other in others.items():
        correlation = (base * other.double().flatten()).mean()
        assert abs(correlation) < 5 / math.sqrt(base.numel()), name


@pytest.mark.slow
def test_kolmogorov_smirnov_at_1e7_draws(quick_backend):
    z = counter_noise(list(range(10)), (10, 4, 500, 500), backend=quick_backend).double()
    z = z.flatten().sort().values
    n = z.numel()
    cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((rank + 1) / n - cdf, cdf - rank / n).max()
    # P(sqrt(n) D > 1.95) = 0.1 % (Kolmogorov); the seeds are fixed, so this never flickers
    assert math.sqrt(n) * distance < 1.95


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(seeds=[1], shape=(2, 4)), InvalidShape, r"seeds have shape \(1,\), expected \(2,\)"),
        (dict(seeds=[1], shape=(1,)), InvalidShape, r"\(B, C, ...\), got \(1,\)"),
        (dict(seeds=[2**64], shape=(1, 4)), ValueError, "18446744073709551616"),
        (dict(seeds=[1.5], shape=(1, 4)), ValueError, "got 1.5"),
        (dict(seeds=torch.ones(1), shape=(1, 4)), ValueError, "integers, got torch.float32"),
        (dict(seeds=[1], shape=(1, 4), step=-1), ValueError, "got -1"),
        (dict(seeds=[1], shape=(1, 4), step=2**32), ValueError, "got 4294967296"),
        (dict(seeds=[1], shape=(1, 4), step=torch.ones(1)), InvalidShape, "torch.float32"),
        (dict(seeds=[1], shape=(1, 4), stream=-1), ValueError, "got -1"),
        (dict(seeds=[1], shape=(1, 4), dtype=torch.int32), ValueError, "torch.int32"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        counter_noise(**arguments)
