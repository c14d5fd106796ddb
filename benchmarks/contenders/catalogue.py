# SPDX-License-Identifier: Apache-2.0
"""All contenders by name; those that cannot run here have the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import get_args

import torch

from benchmarks.contenders import engine, runtimes, stock
from benchmarks.contenders.contender import Contender, Impossible
from benchmarks.contenders.request import Request
from msdda_fast.batched.options import BatchedOptions, Sharing
from msdda_fast.errors import MSDDAError
from msdda_fast.kernels.grouped_lora import Design

__all__ = ["AGAIN", "AUTO", "DESIGNS", "Entry", "build", "catalogue", "options_of"]

DESIGNS: tuple[str, ...] = get_args(Design)
#: What pipelines do by default: which design that is depends on device, dtype and adapter.
AUTO = "auto"
#: The denominator a second time: how far two medians of the same thing lie apart.
AGAIN = "S again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender before it is built.

    `headline` marks contenders whose whole loop of T steps is timed too.
    """

    name: str
    title: str
    count: int
    make: Callable[[Request], Contender]
    headline: bool = False


def catalogue(counts: Sequence[int], design: str, device: str) -> list[Entry]:
    """Return every contender of a run, for the requested numbers of objectives.

    Args:
        counts: Values of M, each at least 1.
        design: Design of S and M2, M3, ...; the other designs get separate entries.
        device: "cpu" or "cuda".
    """
    several = [count for count in counts if count > 1]
    entries = [Entry("E1", "diffusers, one model", 1, stock.single, headline=True)]
    entries += [_stock("E2", "reward soup", stock.soup, m) for m in several[:1]]
    for m in several:
        entries += [
            _stock("E3", "the paper: set_adapter x M, Eq. 7", stock.adapters_in_turn, m),
            _stock("E4", "merged copies x M, Eq. 7", stock.merged_copies, m),
            _stock("E5", "peft adapter_names", stock.mixed_batch, m),
        ]
    entries += _compiled(several)
    entries += _captured(several, device)
    for m in sorted({1, *counts}):
        entries += _ours(m, design)
    entries += _runtimes(sorted({1, *counts}))
    entries += [_entry(AGAIN, "ours, one objective, again", 1, options_of(design))]
    if several:
        entries += _ablations(several[0], design, device)
    return entries


def build(
    entries: Sequence[Entry], request: Request, patterns: Sequence[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Build what matches `patterns`; return the contenders, and the reasons of those skipped."""
    built, skipped = {}, {}
    for entry in entries:
        if not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            skipped[entry.name] = "not asked for"
            continue
        try:
            contender = entry.make(request)
            contender.first()
            contender.step()  # compiles; whatever cannot run fails here
        except (Impossible, MSDDAError, torch.OutOfMemoryError) as error:
            skipped[entry.name] = f"{type(error).__name__}: {error}".removeprefix("Impossible: ")
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            skipped[entry.name] = f"torch.compile: {type(error).__name__}: {error}".splitlines()[0]
        else:
            built[entry.name] = contender
    return built, skipped


def _stock(name: str, title: str, make: Callable[[Request, int], Contender], count: int) -> Entry:
    suffix = "" if name in ("E2", "C2") else f"-M{count}"
    # the soup is one network, whatever went into it
    objectives = 1 if name in ("E2", "C2") else count
    return Entry(
        name + suffix, title, objectives, lambda request: make(request, count), headline=True
    )


def _compiled(several: Sequence[int]) -> list[Entry]:
    """C1 to C4: E1 to E4 under torch.compile, channels last."""
    entries = [Entry("C1", "E1 compiled", 1, partial(stock.single, compile=True))]
    makes = {"C2": stock.soup, "C3": stock.adapters_in_turn, "C4": stock.merged_copies}
    for m in several:
        for name, make in makes.items():
            if name != "C2" or m == several[0]:
                title = f"{name.replace('C', 'E')} compiled"
                entries.append(_stock(name, title, partial(make, compile=True), m))
        entries.append(
            Entry(f"C5-M{m}", "E5 compiled", m, _impossible(
                "peft's hooks set an attribute that dynamo cannot trace, and every list of names "
                "recompiles"
            ))
        )  # fmt: skip
    return entries


def _captured(several: Sequence[int], device: str) -> list[Entry]:
    """G1 and G4: E1 and E4 in our captured step; code that sets Python attributes cannot be."""
    entries = []
    for m in (0, *several):  # 0: the base model alone
        for kind, compile in (("G", False), ("GC", True)):
            name = f"{kind}4-M{m}" if m else f"{kind}1"
            title = f"E{name.removeprefix(kind)[0]} captured" + (", compiled" if compile else "")
            make = partial(engine.captured_copies, count=m, compile=compile)
            if device == "cpu":
                make = _impossible("the CPU has no graphs")
            entries.append(Entry(name, title, max(m, 1), make))
    return entries


def _entry(name: str, title: str, count: int, options: BatchedOptions, **how: object) -> Entry:
    headline = bool(how.pop("headline", False))
    make = partial(engine.batched, count=count, options=options, **how)
    return Entry(name, title, count, make, headline=headline)


def options_of(design: str, **changes: object) -> BatchedOptions:
    """Return options with one of `DESIGNS`, or with `AUTO` those of pipelines."""
    return BatchedOptions(design=None if design == AUTO else design, **changes)


def _ours(count: int, design: str) -> list[Entry]:
    name = "S" if count == 1 else f"M{count}"
    title = "ours, one objective" if count == 1 else f"ours, M = {count}"
    chosen = options_of(design)
    entries = [_entry(name, f"{title}, {design}", count, chosen, headline=True)]
    entries += [
        _entry(f"{name}/{other}", f"{title}, {other}", count, BatchedOptions(design=other))
        for other in DESIGNS
        if other != design
    ]
    fused = options_of(design, fuse_qkv=True)
    entries.append(_entry(f"{name}/qkv", f"{title}, one GEMM for q, k, v", count, fused))
    entries.append(_entry(f"{name}/compiled", f"{title}, compiled", count, chosen, compile=True))
    exported = {"openvino": True, "headline": True}
    entries.append(_entry(f"{name}/openvino", f"{title}, OpenVINO", count, chosen, **exported))
    return entries


def _runtimes(counts: Sequence[int]) -> list[Entry]:
    """OV1, ORT1, ...: one merged adapter on the rows of M objectives, which are all equal."""
    entries = []
    for kind, title, make in (
        ("OV", "OpenVINO", runtimes.openvino),
        ("ORT", "ONNX Runtime", runtimes.onnx_runtime),
    ):
        for m in counts:
            rows = "rows of one" if m == 1 else f"equal rows for M = {m}"
            made = partial(make, count=m)
            entries.append(Entry(f"{kind}{m}", f"{title}, {rows}", m, made, headline=True))
    return entries


def _ablations(count: int, design: str, device: str) -> list[Entry]:
    def without(what: str, title: str, **how: object) -> Entry:
        sharing = how.pop("sharing", Sharing())
        built = {name: how.pop(name, None) for name in ("channels_last", "fused_ops")}
        options = options_of(design, sharing=sharing, **built)
        return _entry(f"M{count}-no-{what}", f"ours, {title}", count, options, **how)

    entries = [
        without("fused-step", "step in plain torch", backend="eager"),
        without(
            "sharing",
            "nothing shared between rows or steps but K/V",
            sharing=Sharing(prefix=False, time_table=False),
        ),
        without("kv-cache", "prompt K/V every step", sharing=Sharing(prompt_cache=False)),
    ]
    for what, title, how in [
        ("graph", "no graph", {"capture": False}),
        ("nhwc", "NCHW", {"channels_last": False}),
        ("fused-ops", "norms and sums in plain torch", {"fused_ops": False}),
    ]:
        entry = without(what, title, **how)
        if device == "cpu":
            make = _impossible(f"{title} is what runs on the CPU")
            entry = Entry(entry.name, entry.title, count, make)
        entries.append(entry)
    return entries


def _impossible(reason: str) -> Callable[[Request], Contender]:
    def make(request: Request) -> Contender:
        raise Impossible(reason)

    return make
