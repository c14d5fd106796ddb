# SPDX-License-Identifier: Apache-2.0
"""How far a request travels through the package before its first denoising step, and what it costs.

    python benchmarks/request_path.py                # a warm call of the pipeline
    python benchmarks/request_path.py --http         # one request to the server, too
    python benchmarks/request_path.py --http --label now    # and keep it under that name

`sys.setprofile` watches one warm call with T = 2 on the shipped model until the first forward of
its networks. A hop is a call from one file of the package into another. The way of the weights is
the files whose functions are given the preference, or something computed from it, until the
coefficients are where the kernel reads them.

Host time is processor time of the calling thread, without the profiler: of the whole call up to
the first forward, of encoding the prompt, of starting the networks on it (keys, values and time
table), and of looking whether networks and storage are what was built, with a recorder in place of
CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

import msdda_fast as mf
from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine import graph
from msdda_fast.engine.buffers import StepBuffers
from msdda_fast.files import write_atomically
from msdda_fast.pipelines.stable_diffusion import sampling

PACKAGE = Path(mf.__file__).parent
RESULTS = Path(__file__).parent / "results" / "request_path.json"
PROMPT = "A purple colored dog."
WEIGHTS = {"aesthetic": 0.3, "consistency": 0.7}
ROUNDS = 30


class Way:
    """Files, functions and hops until the first forward of the networks."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()
        self.hops = 0
        self._is_over = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """See `sys.setprofile`."""
        if event != "call" or self._is_over or (file := file_of(frame)) is None:
            return
        name = frame.f_code.co_qualname
        self._is_over = name == "BatchedUNet.forward"
        if not self._is_over:
            self.files.add(file)
            self.functions.add((file, name))
            self.hops += caller_of(frame) not in (None, file)


class WayOfWeights:
    """The files whose functions are given the weights, or what was made of them."""

    def __init__(self, weights: object) -> None:
        self.files: list[str] = []
        self._made: dict[int, object] = {id(weights): weights}  # kept, so that ids stay taken
        self._given: set[FrameType] = set()
        self._is_over = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if self._is_over or (file := file_of(frame)) is None:
            return
        code = frame.f_code
        # the coefficients are where the kernel reads them
        self._is_over = code.co_qualname == "StepBuffers.load" and event == "return"
        if event == "call" and not code.co_name.startswith("<"):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            given = [frame.f_locals.get(name) for name in names]
            owner = given.pop(0) if names[:1] == ("self",) else None
            if id(owner) in self._made:  # what a method makes of them, in the file they live in
                self._given.add(frame)
            elif any(self._holds(value) for value in given):
                self._given.add(frame)
                if file not in self.files:
                    self.files.append(file)
        elif event == "return" and frame in self._given:
            self._given.discard(frame)
            for part in argument if isinstance(argument, tuple) else (argument,):
                if not isinstance(part, (bool, int, float, str, type(None))):
                    self._made[id(part)] = part

    def _holds(self, value: object) -> bool:
        parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else []
        return any(id(part) in self._made for part in (value, *parts))


class Replay:
    """Stands in for CUDA graphs: a step is repeated by doing it, and its storage is checked."""

    def capture(self, advance: Any, buffers: StepBuffers) -> Replay:
        """See `GraphBackend.capture`."""
        self.replay = lambda: advance(buffers)
        return self

    def free_bytes(self) -> int:
        """See `GraphBackend.free_bytes`."""
        return 2**40

    def release(self) -> None:
        """See `Graph.release`."""


def file_of(frame: FrameType) -> str | None:
    """The file of a frame within the package; None outside."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def caller_of(frame: FrameType) -> str | None:
    """The file of the nearest frame of the package that called."""
    above = frame.f_back
    while above is not None:
        if (file := file_of(above)) is not None:
            return file
        above = above.f_back
    return None


@contextmanager
def profiled(watch: Callable[..., None]) -> Iterator[None]:
    """Watch this thread, and those that start meanwhile."""
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def call(pipe: Any, seed: int) -> None:
    """One warm request."""
    pipe(PROMPT, weights=WEIGHTS, seed=seed, num_inference_steps=2, output_type="latent")


def host_ms(pipe: Any) -> dict[str, float]:
    """Median milliseconds of the calling thread, by part of a request."""
    spent: dict[str, float] = {}
    forward = BatchedUNet.forward

    def first(self: BatchedUNet, *arguments: Any, **named: Any) -> Any:
        spent.setdefault("at", time.thread_time())
        return forward(self, *arguments, **named)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.thread_time() - start

        return run

    rounds = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(BatchedUNet, "forward", first))
        for name, owner, attribute in (
            ("prompt", sampling, "_encode"),
            ("start of the networks", BatchedUNet, "begin"),
            ("unchanged networks", LoadedAdapters, "is_current"),
            ("unchanged storage", graph.CapturedStep, "_check_places"),
        ):
            function = timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        for seed in range(ROUNDS):
            spent.clear()
            start = time.thread_time()
            call(pipe, seed)
            whole = spent.pop("at") - start
            apart = spent["prompt"] + spent["start of the networks"]
            rounds.append({"up to the first forward": whole, "host": whole - apart, **spent})
    names = rounds[0]
    return {n: round(1e3 * statistics.median(row[n] for row in rounds), 2) for n in names}


def http_files(pipe: Any) -> int:
    """How many files one request to the server crosses, in all threads."""
    from fastapi.testclient import TestClient

    from msdda_fast.serve.app import create_app
    from msdda_fast.serve.settings import ServeSettings

    way = Way()
    with profiled(way), mf.Engine(pipe, max_batch=1) as engine:
        with TestClient(create_app(engine, ServeSettings(model="msdda-fast/emoji"))) as client:
            while client.get("/ready").status_code != 200:  # it warms up first
                time.sleep(0.1)
            way.begin()
            body = {"prompt": PROMPT, "weights": WEIGHTS, "steps": 2, "seed": 0}
            client.post("/v1/images/generations", json=body).raise_for_status()
    return len(way.files)


def commit() -> str:
    """The commit of the package that was measured."""
    asked = ["git", "-C", PACKAGE, "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Print what was counted and measured as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--http", action="store_true", help="Also one request to the server.")
    parser.add_argument("--label", help=f"Keep the result under this name in {RESULTS.name}.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji")
    pipe.set_progress_bar_config(disable=True)
    with mock.patch.object(graph, "graphs_for", lambda device: Replay()):
        for seed in range(2):
            call(pipe, seed)
    way, weights = Way(), WayOfWeights(WEIGHTS)
    with profiled(way):
        call(pipe, 0)
    with profiled(weights):
        call(pipe, 0)
    found: dict[str, Any] = {
        "files": len(way.files),
        "functions": len(way.functions),
        "hops": way.hops,
        "way of the weights": weights.files,
        "milliseconds": host_ms(pipe),
    }
    if arguments.http:
        found["files of a request to the server"] = http_files(pipe)
    print(json.dumps(found, indent=2))
    if arguments.label:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[arguments.label] = {**found, "commit": commit()}
        text = json.dumps(kept, indent=1) + "\n"
        write_atomically(RESULTS, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
