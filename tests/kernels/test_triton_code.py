# SPDX-License-Identifier: Apache-2.0
"""What the fused step's Triton kernels become on sm_80 and sm_90, without a GPU."""

import pytest

from msdda_fast.kernels import registry
from tests.kernels.ahead_of_time import report

pytestmark = pytest.mark.full  # compiles for a minute; test_triton_cases.py interprets the kernels


@pytest.fixture(scope="module")
def compiled(made_once) -> dict[str, dict]:
    if not registry.available("triton"):
        pytest.skip(registry.explain()["triton"])
    return report("tests.kernels.compiled_fused_step", made_once)


@pytest.fixture
def builds(compiled) -> dict[str, dict]:
    return compiled["builds"]


def of(builds: dict[str, dict], *parts: str) -> dict[str, dict]:
    found = {name: build for name, build in builds.items() if all(part in name for part in parts)}
    assert found
    return found


def accesses(build: dict, kind: str) -> dict[str, int]:
    return {name: n for name, n in build["instructions"].items() if name.startswith(kind)}


def test_both_architectures_are_compiled(builds):
    for arch in ("arch=80", "arch=90"):
        for kernel in ("kernel=linear", "kernel=moments"):
            assert of(builds, arch, kernel)


def test_nothing_spills(builds):
    for name, build in builds.items():
        assert (build["STACK"], build["LOCAL"]) == (0, 0), name
        assert not accesses(build, "LDL") and not accesses(build, "STL"), name


def test_nothing_is_contracted_or_approximated(builds):
    for name, build in builds.items():
        inexact = [op for op in build["ptx"] if "fma" in op or ".approx" in op or ".full" in op]
        assert not inexact, f"{name}: {inexact}"


@pytest.mark.parametrize(
    "name",
    [
        "arch=80 outputs=fp16 count=2 drawn=True layout=0",
        "arch=80 outputs=fp32 count=2 drawn=True layout=0",
        "arch=90 outputs=fp16 count=2 drawn=True layout=0",
        "arch=90 outputs=bf16 count=2 drawn=True layout=0",
        "arch=90 outputs=fp32 count=2 drawn=True layout=0",
        "arch=90 outputs=fp16 count=2 drawn=True layout=2",
    ],
)
def test_a_large_step_of_two_objectives_moves_16_bytes_at_a_time(name, builds):
    build = builds[f"kernel=linear {name} clip_range=None"]
    loads, stores = accesses(build, "LDG"), accesses(build, "STG")
    assert loads["LDG.E.128"] >= 20, loads
    # the rest: seed, step and six coefficients
    assert sum(loads.values()) - loads["LDG.E.128"] == 8, loads
    assert set(stores) == {"STG.E.128"}, stores


def test_every_input_is_read_once(builds):
    # four channels times: variances, weights and means of 16 objectives; and the seed and the step
    (build,) = of(builds, "kernel=moments", "count=16", "pixelwise=True").values()
    loads = accesses(build, "LDG")
    assert sum(loads.values()) == 4 * 3 * 16 + 2, loads


def test_offsets_have_64_bits(builds):
    for name, build in builds.items():
        assert set(build["offsets"]) == {"i64"}, name


def test_what_changes_from_call_to_call_compiles_nothing(compiled):
    common = {"step", "batch", "tiles"}
    linear, moments = (
        set(compiled["not specialised"][name]) for name in ("linear_step", "moments_step")
    )
    assert linear == common | {"row_step", "row_sample", "copies"}
    assert moments == common | {"variance_samples", "weight_samples"}
