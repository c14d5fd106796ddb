# SPDX-License-Identifier: Apache-2.0
"""Everything to measure and check on a machine with a GPU, in stages of under nine minutes.

    make gpu OUT=out/gpu
    python benchmarks/gpu_runbook.py --out out/gpu --stages "latency*,profile"

Needs no network. The output of a stage goes to OUT/<stage>.txt, its results to OUT/*.jsonl, and one
line about it to OUT/stages.jsonl. Stages that passed are not run again: after an interruption, or
after installing a missing wheel, run the same command again. A stage whose wheels or tools are
missing is skipped, and the missing ones are listed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 530
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "typer", "rich")
TESTS = (*LIBRARIES, "pytest", "hypothesis", "triton")


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, run in the root of the repository, and the wheels and tools that it needs."""

    name: str
    command: Sequence[str]
    wheels: Sequence[str] = LIBRARIES
    tools: Sequence[str] = ()

    def missing(self) -> list[str]:
        wheels = [name for name in self.wheels if find_spec(name) is None]
        return wheels + [name for name in self.tools if shutil.which(name) is None]


def stages(out: Path) -> list[Stage]:
    """Return all stages in order; those that later ones depend on come first."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    cuda = ["--device", "cuda", "--dtype", "fp16", "--results", str(out)]

    def sanitizer(tool: str) -> Stage:
        return Stage(
            tool,
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, "-m", "gpu",
             "-k", "not huge", "tests/kernels/test_on_gpu.py"],
            TESTS,
            ["compute-sanitizer"],
        )  # fmt: skip

    def kernels(name: str) -> Stage:
        command = [*pytest, f"benchmarks/bench_{name}.py", "--benchmark-only"]
        return Stage(name, command, (*TESTS, "pytest_benchmark"))

    def latency(name: str, contenders: str, *more: str, model: str = "sd15") -> Stage:
        given = ["--model", model, "--contenders", contenders, *more]
        command = [*python, "benchmarks/latency.py", *cuda, *given]
        return Stage(name, command, (*LIBRARIES, "matplotlib", "triton"))

    anchors, two = "E1,S,S again", ("--objectives", "1,2")
    return [
        Stage("machine", ["nvidia-smi", "-q"], (), ["nvidia-smi"]),
        Stage("build", [*python, "setup.py", "build_ext", "--inplace"],
              ("setuptools", "pybind11", "ninja"), ["nvcc"]),
        Stage("doctor", [*python, "-m", "msdda_fast", "doctor"]),
        Stage("tests", [*pytest, "-m", "gpu", "tests"], TESTS),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Stage("curve", [*python, "benchmarks/batch_curve.py", "--model", "sd15", *cuda]),
        latency("latency", f"{anchors},E*,M?,G1,G4*"),
        latency("latency-designs", f"{anchors},M2,S/*ed,S/separate,M?/separate,M?/fol*,M?/fus*"),
        latency("latency-ablations", f"{anchors},M2,M2-no-*,M2/qkv,S/qkv", *two),
        latency("latency-batch4", f"{anchors},E3*,E4*,M?", "--batch", "4", *two),
        latency("latency-rank16", f"{anchors},M?,M?/*ed,M?/separate", "--rank", "16", *two),
        latency("latency-rank64", f"{anchors},M?,M?/*ed,M?/separate", "--rank", "64", *two),
        latency("latency-sdxl", f"{anchors},E3*,E4*,M?", *two, model="sdxl"),
        Stage("profile", [*python, "benchmarks/step_profile.py", "--model", "sd15", *cuda]),
        kernels("fused_step"),
        kernels("grouped_lora"),
        # each fills the compiler's cache, so that the last one times them all
        latency("compiled-C1", f"{anchors},C1", *two),
        latency("compiled-C3", f"{anchors},C3-M2", *two),
        latency("compiled-C4", f"{anchors},C4-M2,GC1,GC4-M2", *two),
        latency("compiled-ours", f"{anchors},S/compiled,M2/compiled", *two),
        latency("compiled", f"{anchors},M2,C*,GC*,S/compiled,M2/compiled", *two),
    ]  # fmt: skip


def run(stage: Stage, out: Path) -> dict[str, object]:
    """Run one stage and return its record."""
    record: dict[str, object] = {
        "stage": stage.name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(stage.command),
    }
    if missing := stage.missing():
        return record | {"status": "missing", "missing": missing}
    sizes = {path: path.stat().st_size for path in RESULTS.glob("*.jsonl")}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor"),
        "TRITON_CACHE_DIR": str(out / "triton"),
    }
    if stage.name in ("memcheck", "racecheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    with (out / f"{stage.name}.txt").open("w") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(LIMIT_S)
        except BaseException as error:  # nothing it started may go on and disturb the next stage
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    for path in RESULTS.glob("*.jsonl"):  # benchmarks append there: keep a copy of what is new
        with path.open("rb") as source:
            source.seek(sizes.get(path, 0))
            if new := source.read():
                with (out / path.name).open("ab") as copy:
                    copy.write(new)
    status = {0: "passed", -signal.SIGKILL: "cut off"}.get(code, "failed")
    return record | {"status": status, "rc": code, "seconds": round(time.monotonic() - start, 1)}


def passed(out: Path) -> set[str]:
    """Return the names of the stages that passed."""
    journal = out / "stages.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["stage"] for record in records if record["status"] == "passed"}


def run_all(todo: Sequence[Stage], out: Path) -> bool:
    """Run the stages that have not passed yet; return whether all have passed now."""
    out.mkdir(parents=True, exist_ok=True)
    done = passed(out)
    for stage in todo:
        if stage.name in done:
            print(f"{stage.name}: passed before", flush=True)
            continue
        record = run(stage, out)
        with (out / "stages.jsonl").open("a") as journal:
            journal.write(json.dumps(record) + "\n")
        named = f": {', '.join(record['missing'])}" if "missing" in record else ""
        took = f" after {record['seconds']} s" if "seconds" in record else ""
        print(f"{stage.name}: {record['status']}{named}{took}", flush=True)
    return {stage.name for stage in todo} <= passed(out)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all output")
    parser.add_argument("--stages", default="*", help='names or patterns, e.g. "latency*,profile"')
    args = parser.parse_args(given)
    patterns = args.stages.split(",")
    chosen = [
        stage
        for stage in stages(args.out.resolve())
        if any(fnmatchcase(stage.name, pattern) for pattern in patterns)
    ]
    return 0 if run_all(chosen, args.out.resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())
