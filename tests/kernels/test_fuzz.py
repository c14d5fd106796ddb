# SPDX-License-Identifier: Apache-2.0
"""Random shapes, strides, dtypes, tables, masks, NaN, Inf: every backend gives the bits of eager.

The judge is eager on plain contiguous copies, with whatever a zero weight or coefficient masks set
to 0. So on eager itself this shows that strides, overlap with x_t, NaN behind masks and the dtype
of `out` change nothing. `test_fuzz_bad_input.py` is the counterpart for input that must be refused.
"""

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.drawing import (
    DTYPES,
    POISON,
    Draw,
    Placed,
    dtypes,
    flags,
    fuzz,
    same_bits,
    shapes,
)


def check_result(
    got: Tensor, exact: Tensor, like: Tensor, out: Placed | None, slack: Tensor | None = None
) -> None:
    """`exact`, rounded to the dtype of `out` or `like`; nothing is written around `out`."""
    dtype = like.dtype if out is None else out.tensor.dtype
    want = exact.to(dtype)
    if slack is not None:  # then an ulp of the result on top, where it is finite
        near = (got.double() - exact).abs() <= slack + torch.finfo(dtype).eps * exact.abs()
        near |= (got.double() - exact).abs() <= torch.finfo(dtype).tiny
        want = torch.where(near, got, want)
    assert same_bits(got, want)
    if out is not None:
        assert got is out.tensor
        got.fill_(7.0)
        assert (out.memory == 7.0).all()


def any_over(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`mask`, reduced by `any` over the axes where `shape` has size 1."""
    for axis, n in enumerate(shape):
        mask = mask.any(axis, keepdim=True) if n == 1 else mask
    return mask


@pytest.mark.sweep(backend=2)  # Triton's random cases are in test_triton_cases.py
def test_random_moments_fuse_to_the_bits_of_eager(backend):
    def check(data: st.DataObject) -> None:
        draw = Draw(data)
        shape, count = draw.pick(shapes), draw.pick(st.integers(1, 4))
        full = (count, *shape)
        means = draw.placed(draw.poisoned(draw.normal(full, draw.pick(dtypes(backend)))))
        like = means.tensor[0]
        forms = st.sampled_from([full[:1], full[:2], full])
        tables = st.sampled_from([torch.float32, torch.float64])

        raw = draw.normal(draw.pick(forms)).exp()
        off = draw.chance(raw.shape, 0.3).index_fill(0, torch.tensor([0]), False)  # one is active
        raw = raw.masked_fill(off.roll(draw.pick(st.integers(0, 3)), 0), 0.0)
        weights = draw.placed((raw / raw.sum(0)).to(draw.pick(tables)))

        var = draw.normal(draw.pick(forms), draw.pick(tables)).exp()
        if draw.pick(flags):
            var = var.masked_fill(draw.chance(var.shape, 0.2), 0.0)

        def spread(t: Tensor) -> Tensor:  # with all axes
            return t.reshape(*t.shape, *(1,) * (len(full) - t.ndim))

        active, _ = torch.broadcast_tensors(spread(weights.tensor) != 0, spread(var))
        masked = ~any_over(active, spread(var).shape).reshape(var.shape)
        poison = draw.pick(st.sampled_from([*POISON, -1.0]))
        variances = draw.placed(var.masked_fill(masked, poison))
        policy = draw.pick(st.sampled_from(["dominate", "ratio"]))
        rates = {"rates": draw.normal((count,)).exp().tolist()} if policy == "ratio" else {}
        options = {"zero_variance": policy, **rates}
        request, z, placed = draw.source(like, backend)
        out = draw.out(like, backend)
        placed += [means, weights, variances]
        before = [p.memory.clone() for p in placed]
        got = fast_fuse_step(
            means.tensor,
            variances.tensor,
            weights.tensor,
            out=None if out is None else out.tensor,
            backend=backend,
            return_moments=(with_moments := draw.pick(flags)),
            **request,
            **options,
        )
        assert all(map(Placed.unchanged, placed, before))
        exact = fast_fuse_step(
            means.tensor.masked_fill(~active, 0.0).contiguous(),
            var.masked_fill(masked, 1.0).contiguous(),
            weights.tensor.contiguous(),
            noise=z.contiguous(),
            out=torch.empty(shape, dtype=torch.float64),
            backend="eager",
            return_moments=True,
            **options,
        )
        if with_moments:
            assert same_bits(got.mean, exact.mean) and same_bits(got.variance, exact.variance)
            got = got.prev_sample
        slack = None
        if any(n != 1 for t in (weights.tensor, var) for n in t.shape[2:]):
            # sigma_w is a root per element, and torch's is an ulp off on some CPUs
            std = exact.variance.double().sqrt().nan_to_num(posinf=0)
            size = (std * z.double()).abs() + exact.prev_sample.abs()
            slack = 2 * torch.finfo(exact.mean.dtype).eps * size
        check_result(got, exact.prev_sample, like, out, slack)

    fuzz(backend, st.data(), check)


@pytest.mark.sweep(backend=2)  # likewise
def test_random_coefficients_step_to_the_bits_of_eager(backend):
    def check(data: st.DataObject) -> None:
        draw = Draw(data)
        shape, count = draw.pick(shapes), draw.pick(st.integers(0, 4))
        clip_range = draw.pick(st.sampled_from([None, 0.5]))
        x = draw.placed(draw.poisoned(draw.normal(shape, draw.pick(dtypes(backend)))))
        wide = x.tensor.dtype == torch.float64
        kinds = dtypes(backend) if wide else dtypes(backend).filter(lambda d: d != torch.float64)
        dtype = draw.pick(kinds)

        width = 2 * count + 2 if clip_range is None else 5 * count + 3
        row = draw.normal((draw.pick(st.sampled_from([1, shape[0]])), width))
        row = row.masked_fill(
            draw.chance(row.shape, draw.pick(st.sampled_from([0.0, 0.3, 0.8]))), 0.0
        )
        x_scale, uncond, cond, noise_scale, *clipped = row.split(
            [1, count, count, 1] + ([1, count, count, count] if clip_range else []), dim=1
        )
        used = [x_scale[:, 0] != 0, uncond != 0, cond != 0]
        if clipped:
            x0_x, x0_uncond, x0_cond, x0_scale = (part != 0 for part in clipped)
            used[0] = used[0] | (x0_x & x0_scale).any(1)
            used[1:] = [used[1] | (x0_uncond & x0_scale), used[2] | (x0_cond & x0_scale)]
            named = [uncond != 0, cond != 0, x0_uncond, x0_cond, x0_scale]
        else:
            named = used[1:]
        # what the door wants to see, which is more than what counts
        uncond_named = torch.stack(named[::2][:2] if clipped else named[:1]).any(0).any(0)
        anything_named = torch.stack(named).any(0).any(0)

        def spread(mask: Tensor) -> Tensor:  # (B | 1) to (B, *S)
            return mask.view(-1, *(1,) * (len(shape) - 1)).expand(shape)

        outputs, clean = [], []
        for m in range(count):
            both = draw.placed(draw.poisoned(draw.normal((2, *shape), dtype)))
            masks = torch.stack([spread(used[1][:, m]), spread(used[2][:, m])])
            clean.append(both.tensor.masked_fill(~masks, 0.0).contiguous())
            keep = both.tensor
            if not uncond_named[m] and draw.pick(flags):
                keep = keep[1:]
            if not anything_named[m] and draw.pick(flags):
                keep = None
            outputs.append(Placed(keep, both.memory))
        as_tensor = count > 0 and all(o.tensor is not None and len(o.tensor) == 2 for o in outputs)
        given = [o.tensor for o in outputs]
        if as_tensor and draw.pick(flags):
            given = torch.stack(given)

        request, z, placed = draw.source(x.tensor, backend)
        z = z.masked_fill(~spread(noise_scale[:, 0] != 0), 0.0).contiguous()
        out = draw.out(x.tensor, backend)
        plain = x.tensor.masked_fill(~spread(used[0]), 0.0).contiguous()
        in_place = x.memory is x.tensor and draw.pick(flags)
        target = x.tensor if in_place else None if out is None else out.tensor
        table = row.to(torch.float64 if wide else draw.pick(st.sampled_from(DTYPES[:2])))
        coefficients = draw.placed(table)
        placed += [*outputs, coefficients, *([] if in_place else [x])]
        before = [p.memory.clone() for p in placed]
        got = fused_ddim_step(
            x.tensor,
            given,
            StepCoefficients(coefficients.tensor, count, clip_range),
            out=target,
            backend=backend,
            **request,
        )
        assert all(map(Placed.unchanged, placed, before))
        exact = fused_ddim_step(
            plain,
            clean,
            StepCoefficients(table, count, clip_range),
            noise=z,
            out=torch.empty(shape, dtype=torch.float64),
            backend="eager",
        )
        if in_place:
            assert got is x.tensor
            assert same_bits(got, exact.to(got.dtype))
        else:
            check_result(got, exact, x.tensor, out)

    fuzz(backend, st.data(), check)


@pytest.mark.sweep(backend=2)  # likewise
def test_random_seeds_and_counters_draw_the_bits_of_eager(backend):
    def check(data: st.DataObject) -> None:
        draw = Draw(data)
        shape = draw.pick(shapes.filter(lambda s: len(s) > 1))
        words, counters = st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1)
        seeds = draw.pick(st.lists(words, min_size=shape[0], max_size=shape[0]))
        step, stream = draw.pick(counters), draw.pick(counters)
        signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
        strided = torch.tensor(signed, dtype=torch.int64).repeat_interleave(2)[::2]
        got = counter_noise(
            strided if draw.pick(flags) else seeds,
            shape,
            step=torch.tensor(step) if draw.pick(flags) else step,
            stream=stream,
            dtype=(dtype := draw.pick(dtypes(backend))),
            backend=backend,
        )
        for b, seed in enumerate(seeds):  # whatever shares the batch
            one = counter_noise([seed], (1, *shape[1:]), step=step, stream=stream, backend="eager")
            assert same_bits(got[b : b + 1], one.to(dtype))
        assert got.shape == shape and got.is_contiguous()

    fuzz(backend, st.data(), check)
