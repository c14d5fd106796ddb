# SPDX-License-Identifier: Apache-2.0
"""Which column of a row holds which coefficient is said once, and every reader goes by it."""

import re
from pathlib import Path

import pytest
import torch

from msdda_fast import InvalidShape, fused_ddim_step
from msdda_fast.engine.buffers import ShapeKey
from msdda_fast.kernels import registry
from msdda_fast.steps.coefficients import Layout, StepCoefficients

PACKAGE = Path(__file__).parents[2] / "msdda_fast"
CLIPPED = pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])


@CLIPPED
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_the_columns_follow_each_other_without_gap_or_overlap(count: int, clips: bool) -> None:
    layout = Layout(count, clips)
    columns = list(range(layout.width))
    found = [columns[layout.x_scale], *columns[layout.uncond], *columns[layout.cond]]
    found += [columns[layout.noise_scale]]
    if clips:
        found += [columns[layout.x0_x], *columns[layout.x0_uncond], *columns[layout.x0_cond]]
        found += columns[layout.x0_scale]
    assert found == columns
    assert layout.width == (5 * count + 3 if clips else 2 * count + 2)


@CLIPPED
def test_the_outputs_own_every_column_but_those_of_x_and_the_noise(clips: bool) -> None:
    layout = Layout(3, clips)
    owned = [layout.of_output(m, uncond_only=False) for m in range(3)]
    others = {layout.x_scale, layout.noise_scale} | ({layout.x0_x} if clips else set())
    assert sorted(column for columns in owned for column in columns) == sorted(
        set(range(layout.width)) - others
    )
    for m in range(3):
        assert set(layout.of_output(m, uncond_only=True)) < set(owned[m])


def test_buffers_have_as_many_columns_as_the_layout() -> None:
    for clip_range in (None, 0.5):
        key = ShapeKey(shape=(2, 4, 8, 8), active=(True,) * 3, clip_range=clip_range)
        assert key.columns == Layout(3, clip_range is not None).width


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
@CLIPPED
def test_every_backend_reads_the_columns_of_the_layout(clips: bool, backend: str) -> None:
    """One coefficient at a time: 1 in a column gives the input that the column is said to scale."""
    if not registry.available(backend):
        pytest.skip(registry.explain()[backend])
    count, shape = 3, (1, 4, 2, 3)
    layout = Layout(count, clips)
    x, z = torch.randn(2, *shape).unbind()
    outputs = torch.randn(count, 2, *shape)
    clip_range = 100.0 if clips else None  # larger than any x_0 here

    def given(**ones: int) -> torch.Tensor:
        row = torch.zeros(1, layout.width)
        row[0, list(ones.values())] = 1.0
        step = StepCoefficients(row, count, clip_range)
        return fused_ddim_step(x, outputs, step, noise=z, backend=backend)

    assert torch.equal(given(column=layout.x_scale), x)
    assert torch.equal(given(column=layout.noise_scale), z)
    for m in range(count):
        for branch, group in enumerate((layout.uncond, layout.cond)):
            assert torch.equal(given(column=group.start + m), outputs[m, branch])
        if clips:
            scale = layout.x0_scale.start + m
            assert torch.equal(given(scale=scale, x0=layout.x0_x), x)
            for branch, group in enumerate((layout.x0_uncond, layout.x0_cond)):
                assert torch.equal(given(scale=scale, x0=group.start + m), outputs[m, branch])


@CLIPPED
def test_an_absent_output_is_refused_by_each_of_its_coefficients(clips: bool) -> None:
    layout, shape = Layout(2, clips), (1, 4, 2, 2)
    x, output = torch.zeros(shape), torch.zeros(2, *shape)
    for half, outputs in ((False, [output, None]), (True, [output, output[1:]])):
        owned = layout.of_output(1, uncond_only=half)
        for column in range(layout.width):
            row = torch.zeros(1, layout.width)
            row[0, column] = 0.5
            step = StepCoefficients(row, 2, 1.0 if clips else None)
            if column in owned:
                with pytest.raises(InvalidShape, match=r"outputs\[1\]"):
                    fused_ddim_step(x, outputs, step, noise=x)
            else:
                fused_ddim_step(x, outputs, step, noise=x)


def test_nobody_else_counts_columns() -> None:
    counting = re.compile(r"5 \* \w+ \+ 3|2 \* \w+ \+ 2\b|\+ 2 \* M\b|4 \* \w+ \+ 3")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for room in ("steps", "kernels", "engine", "pipelines", "integrations", "batching")
        for path in sorted((PACKAGE / room).rglob("*.py"))
        if path.name != "coefficients.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if counting.search(line)
    ]
    assert not found, "\n".join(found)
