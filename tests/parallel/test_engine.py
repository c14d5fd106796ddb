# SPDX-License-Identifier: Apache-2.0
"""Several ranks make the step that one process makes, bit for bit, given the same outputs."""

import itertools

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler

import msdda_fast as mf
from msdda_fast.engine.assignment import Work, assign
from msdda_fast.engine.parallel import ObjectiveParallel
from tests.parallel.ranks import run_ranks, values

SHAPE = (2, 4, 3, 5)
ETAS = (1.0, 0.8, 0.3)
CASES = list(
    itertools.product(
        [(0.2, 0.5, 0.3), (0.0, 0.6, 0.4), (0.0, 0.0, 1.0)],  # weights
        [1.0, 5.0],  # guidance
        [torch.float32, torch.bfloat16, torch.float16],
    )
)


def table_of(weights, guidance, device):
    return mf.coefficient_table(
        DDIMScheduler(clip_sample=False),
        2,
        etas=ETAS,
        weights=weights,
        guidance_scale=guidance,
        device=device,
    )


def one_step(weights, guidance, dtype, evaluate, device="cpu"):
    table = table_of(weights, guidance, device)
    draw = torch.Generator().manual_seed(1)
    x_t = torch.randn(SHAPE, generator=draw).to(device)
    branches = 2 if table.needs_uncond else 1
    outputs = torch.randn((3, branches, *SHAPE), generator=draw).to(device, dtype)
    found = evaluate(outputs, x_t, table.active)
    return mf.fused_ddim_step(x_t, found, table[0], seeds=[3, 4])


def alone(outputs, x_t, active):
    return [
        output if is_active else None for output, is_active in zip(outputs, active, strict=True)
    ]


def steps_of_all_cases(parallel, device="cpu"):
    """x_prev of each case, and the rows that this rank evaluated."""
    steps, rows = [], []

    def evaluate(outputs, x_t, active):
        def run(work):
            rows.append(len(work.rows))
            return [outputs[m, work.start : work.stop] for m in work.objectives]

        return parallel.evaluate(run, x_t)

    with parallel.generation({}):
        tables = [
            (table_of(weights, guidance, device), dtype) for weights, guidance, dtype in CASES
        ]
        parallel.begin(
            [
                parallel.exchange(
                    table.active, 1 + table.needs_uncond, SHAPE, dtype, torch.device(device)
                )
                for table, dtype in tables
            ]
        )
        for case in CASES:
            steps.append(one_step(*case, evaluate, device).cpu())
    return steps, sum(rows)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_step_has_the_bits_of_one_process(size, split):
    found = values(run_ranks(size, steps_of_all_cases, split_guidance=split))
    for case, *steps in zip(CASES, *(steps for steps, _ in found), strict=True):
        expected = one_step(*case, alone)
        for step in steps:
            assert torch.equal(step, expected), case
    active = sum(sum(w > 0 for w in weights) * (1 + (g > 1)) for weights, g, _ in CASES)
    assert sum(rows for _, rows in found) == active  # nothing twice, nothing that is inactive


@pytest.mark.gpu
def test_gpus_over_nccl():
    """On all GPUs of the machine; one still goes through NCCL."""
    size = torch.cuda.device_count()
    found = values(run_ranks(size, steps_of_all_cases, "cuda", backend="nccl"))
    for case, *steps in zip(CASES, *(steps for steps, _ in found), strict=True):
        expected = one_step(*case, alone, "cuda").cpu()
        assert all(torch.equal(step, expected) for step in steps), case


class TestAssignment:
    @pytest.mark.sweep
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("branches", [1, 2])
    @pytest.mark.parametrize("split", [True, False])
    def test_every_row_of_an_active_objective_has_one_rank(self, size, branches, split):
        for active in itertools.product([True, False], repeat=4):
            if not any(active):
                continue
            shares = assign(active, branches, size, split_guidance=split)
            rows = [row for share in shares for work in share for row in work.rows]
            expected = {(m, k) for m in range(4) if active[m] for k in range(branches)}
            assert len(shares) == size and len(rows) == len(expected) and set(rows) == expected

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_the_busiest_rank_has_as_little_as_possible(self, size, count):
        def busiest(split, branches):
            shares = assign([True] * count, branches, size, split_guidance=split)
            return max(sum(len(work.rows) for work in share) for share in shares)

        assert busiest(True, 2) == -(-2 * count // size)
        assert busiest(False, 2) == 2 * -(-count // size)
        assert busiest(True, 1) == -(-count // size)

    def test_rank_i_runs_objective_i(self):
        for split in (True, False):
            shares = assign([True] * 3, 2, 3, split_guidance=split)
            assert shares == [[Work((m,), 0, 2)] for m in range(3)]

    def test_twice_as_many_ranks_split_guidance(self):
        shares = assign([True, True], 2, 4, split_guidance=True)
        assert shares == [[Work((m,), k, k + 1)] for m in (0, 1) for k in (0, 1)]

    def test_two_objectives_of_one_rank_are_one_forward(self):
        shares = assign([True] * 4, 2, 2, split_guidance=True)
        assert shares == [[Work((0, 1), 0, 2)], [Work((2, 3), 0, 2)]]

    def test_the_last_ranks_are_idle(self):
        shares = assign([False, True, True], 1, 4, split_guidance=True)
        assert shares == [[Work((1,), 0, 1)], [Work((2,), 0, 1)], [], []]


def in_a_group_of_the_last_two(parallel):
    group = dist.new_group([1, 2])
    try:
        parallel = ObjectiveParallel(group, timeout=60.0)
    except ValueError as error:
        return str(error)
    return parallel.rank, parallel.size, steps_of_all_cases(parallel)[0][0]


def test_a_group_of_some_ranks():
    outside, first, second = values(run_ranks(3, in_a_group_of_the_last_two))
    assert outside == "this process is not in the group"
    assert first[:2] == (0, 2) and second[:2] == (1, 2)
    assert torch.equal(first[2], one_step(*CASES[0], alone)) and torch.equal(first[2], second[2])


def wrong_outputs(parallel):
    """The errors of outputs that broadcast, or would be rounded, if nobody looked."""
    errors = []
    for wrong in (torch.zeros(1, *SHAPE), torch.zeros(2, *SHAPE, dtype=torch.float64)):
        with pytest.raises(mf.MSDDAError) as caught, parallel.generation({}):
            both = [True, True]
            parallel.begin([parallel.exchange(both, 2, SHAPE, torch.float32, wrong.device)])
            parallel.evaluate(lambda work, wrong=wrong: [wrong], torch.zeros(SHAPE))
        errors.append(caught.value)
    return errors


class TestBadInput:
    def test_outputs_of_another_shape_or_dtype(self):
        first, _ = values(run_ranks(2, wrong_outputs))
        assert [type(error) for error in first] == [mf.InvalidShape] * 2
        assert "(1, 2, 4, 3, 5), expected torch.float32 (2, 2, 4, 3, 5) for" in str(first[0])
        assert "torch.float64 (2, 2, 4, 3, 5)" in str(first[1])

    def test_without_a_group(self):
        with pytest.raises(mf.BackendUnavailable, match="init_process_group"):
            ObjectiveParallel()

    @pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
    def test_timeouts_that_are_none(self, timeout):
        with pytest.raises(ValueError, match="timeout"):
            ObjectiveParallel(timeout=timeout)
