# SPDX-License-Identifier: Apache-2.0
"""Server processes, and the check that all of them draw the same images."""

import argparse
import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import load

__all__ = ["ARMS", "Server", "verify"]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "msdda_fast", "serve"]
ONE_WEIGHT = [sys.executable, str(ROOT / "benchmarks/contenders/one_weight.py")]
ARMS = {"off": COMMAND, "mixed": COMMAND, "one weight": ONE_WEIGHT}


class Server:
    """A process that serves on a free port; a context manager that stops it.

    Args:
        arm: One of `ARMS`, or another name for what `msdda-fast serve` does.
        args: Options of the benchmark.
        root: The checkout whose code runs.
    """

    def __init__(self, arm: str, args: argparse.Namespace, root: Path = ROOT) -> None:
        options = {
            "port": 0, "model": args.model, "device": "cpu", "steps": args.steps,
            "max-batch": 1 if arm == "off" else args.max_batch, "queue-limit": args.queue_limit,
            "timeout": 600, "grace": 0,
        }  # fmt: skip
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*ARMS.get(arm, COMMAND), *given], stderr=self.log, stdout=self.log, cwd=root
        )
        self.arm, self.port = arm, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()

    def wait(self, seconds: float = 300) -> None:
        """Wait until the server is ready.

        Raises:
            RuntimeError: It has died, or is not ready after `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            self.log.seek(0)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read()):
                self.port = int(found[1])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5)
                    return
                except OSError:
                    pass
            time.sleep(0.2)
        self.log.seek(0)
        raise RuntimeError(
            f"the server {self.arm!r} did not become ready:\n{self.log.read()[-2000:]}"
        )

    def wait_idle(self) -> None:
        """Wait until no image is queued or being drawn, such as after the client left."""
        while sum(load.scrape(self.port)[f"msdda_{n}_images"] for n in ("queue", "drawing")):
            time.sleep(0.05)


def verify(pipe, servers, bodies, steps) -> dict[str, float]:
    """Return each arm's largest difference, in levels of 255, from images drawn alone.

    Raises:
        RuntimeError: It is above 1, a seed is wrong, or batches are shared when they should not be,
            or not shared when they should.
    """
    expected = [
        np.asarray(
            pipe(
                body["prompt"], weights=body["weights"], seed=body["seed"],
                num_inference_steps=steps,
            ).images[0], int,
        )
        for body in bodies
    ]  # fmt: skip
    found = {}

    async def together(port):
        return await asyncio.gather(*(load.ask(port, body) for body in bodies))

    for server in servers.values():
        before = load.scrape(server.port)
        worst = 0
        for reply, body, wanted in zip(
            asyncio.run(together(server.port)), bodies, expected, strict=True
        ):
            if reply.status != 200:
                raise RuntimeError(f"{server.arm}: status {reply.status}")
            (image,) = json.loads(reply.content)["data"]
            drawn = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
            worst = max(worst, int(abs(np.asarray(drawn, int) - wanted).max()))
            if image["seed"] != body["seed"]:
                raise RuntimeError(f"{server.arm}: seed {image['seed']}, not {body['seed']}")
        shared = occupancy(before, load.scrape(server.port))
        if worst > 1 or (server.arm == "mixed") != (shared > 1):
            raise RuntimeError(f"{server.arm}: {worst} levels apart, {shared:.1f} per batch")
        found[server.arm] = worst
    return found


def occupancy(before: dict, after: dict) -> float:
    """Return the images per batch drawn between two scrapes."""
    images, batches = (
        after[f"msdda_batch_size_{name}"] - before[f"msdda_batch_size_{name}"]
        for name in ("sum", "count")
    )
    return images / batches if batches else 0.0
