# SPDX-License-Identifier: Apache-2.0
"""M adapters in one layer: each design against the layer without adapters, and against peft.

    pytest benchmarks/bench_grouped_lora.py

The layers are the attention projections of Stable Diffusion 1.5 at 512 x 512, two guidance branches
per objective, rank 4. Every contender is checked against each objective's LoRA in float64 before
anything is timed; `base` is the layer without adapters, on the same rows. On a GPU (float16) all
but peft run as CUDA graphs, so that launches from Python do not hide the time of the kernels.
peft's mixed batch cannot be captured; both peft contenders are timed as a user would run them.
Times, with spread, machine and commit, are appended to results/grouped_lora.jsonl with the number
of operators per call.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.harness import append, captured, interleaved, operators, surroundings
from msdda_fast.kernels.grouped_lora import grouped_site, merge_error

RANK = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
EFFECT = 0.1  # size of the update relative to the weight


class Case(NamedTuple):
    """M objectives, two branches each, of `tokens` rows through a layer C -> N."""

    name: str
    tokens: int
    c: int
    n: int
    count: int = 2

    def __str__(self) -> str:
        return f"{self.name}-{self.n}-{self.tokens}-M{self.count}"


CASES = [
    Case("self", 4096, 320, 320),
    Case("self", 1024, 640, 640),
    Case("self", 256, 1280, 1280),
    Case("self", 64, 1280, 1280),
    *(Case("cross k/v", 77, 768, n) for n in (320, 640, 1280)),
    Case("self", 4096, 320, 320, 4),
]


class Layer:
    """A linear layer with M adapters, in peft and as stacked factors."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.names = [f"objective{m}" for m in range(case.count)]
        self.peft = get_peft_model(
            nn.Sequential(nn.Linear(case.c, case.n, bias=False)), self.config(), self.names[0]
        )
        for name in self.names[1:]:
            self.peft.add_adapter(name, self.config())
        self.peft.to(DEVICE, DTYPE).eval().requires_grad_(False)
        layer = self.peft.base_model.model[0]
        self.base = layer.base_layer
        weight = self.base.weight.double()
        for name in self.names:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            up.normal_()
            up.mul_(EFFECT * weight.norm() / (up.double() @ down.double()).norm())
        self.down = torch.stack([layer.lora_A[name].weight for name in self.names])
        self.up = torch.stack([layer.lora_B[name].weight for name in self.names])
        self.x = torch.randn(2 * case.count, case.tokens, case.c, device=DEVICE, dtype=DTYPE)

    def config(self) -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])

    def one_at_a_time(self) -> Tensor:
        """The paper in peft: one pass per objective."""
        outputs = []
        for name, part in zip(self.names, self.x.chunk(len(self.names)), strict=True):
            self.peft.base_model.set_adapter(name)
            outputs.append(self.peft(part))
        return torch.cat(outputs)

    def exact(self) -> Tensor:
        weight, down, up = (t.double() for t in (self.base.weight, self.down, self.up))
        parts = self.x.double().chunk(len(self.names))
        updates = zip(parts, down, up, strict=True)
        return torch.cat([x @ weight.T + (x @ a.T) @ b.T for x, a, b in updates])

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        designs = ("separate", "folded", "merged", *(("fused",) if DEVICE == "cuda" else ()))
        sites = {
            design: grouped_site(self.base, self.down, self.up, design=design) for design in designs
        }
        layers = {"base": self.base, **sites}
        mixed = [name for name in self.names for _ in range(2)]
        return {
            **{name: captured(partial(layer, self.x), DEVICE) for name, layer in layers.items()},
            "peft, one at a time": self.one_at_a_time,
            "peft, mixed batch": lambda: self.peft(self.x, adapter_names=mixed),
        }


def verify(layer: Layer, runs: dict[str, Callable[[], Tensor]]) -> None:
    """Check that errors are at most twice those of peft, one adapter at a time, plus one ulp."""
    exact = layer.exact()
    error = {
        name: float((run().double() - exact).abs().max())
        for name, run in runs.items()
        if name != "base"
    }
    allowed = 2 * error["peft, one at a time"] + torch.finfo(DTYPE).eps * float(exact.abs().max())
    wrong = {name: e for name, e in error.items() if not e <= allowed}
    assert not wrong, f"not timed, because wrong: {wrong}; allowed: {allowed}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_lora(case: Case, benchmark) -> None:
    layer = Layer(case)
    with torch.no_grad():
        runs = layer.contenders()
        verify(layer, runs)
        # counted on the host, where nothing is captured
        counts = {name: operators(run) for name, run in runs.items()} if DEVICE == "cpu" else {}
        timings = interleaved(runs, seconds=4.0, device=DEVICE)
        benchmark.pedantic(runs["folded"], rounds=5, warmup_rounds=1)
    shared = surroundings(DEVICE) | {
        "case": case.name,
        "shape": [case.tokens, case.c, case.n],
        "num_objectives": case.count,
        "rank": RANK,
        "device": DEVICE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "merge_error": round(float(merge_error(layer.base.weight, layer.down, layer.up).max()), 5),
    }
    append(
        "grouped_lora",
        [
            shared | {"contender": name} | timing | counts.get(name, {})
            for name, timing in timings.items()
        ],
    )
    base = timings["base"]["median_us"]
    benchmark.extra_info |= {
        f"{name} / base": round(timing["median_us"] / base, 3) for name, timing in timings.items()
    }
