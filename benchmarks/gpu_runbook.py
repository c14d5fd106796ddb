# SPDX-License-Identifier: Apache-2.0
"""Everything to measure and check on a machine with a GPU, in stages of under four minutes.

    make gpu OUT=out/gpu
    python benchmarks/gpu_runbook.py --out out/gpu --stages "latency*,profile" --budget 540

All stages fit in 25 minutes, the most telling first: what builds, what is right, the step alone,
one and two objectives of a real size. Needs no network. A stage whose wheels or tools are missing
is skipped, and the missing ones are listed.

What a stage has done is kept in build/gpu, so that the same command goes on where it stopped, also
after an interruption, with an output folder that is new and empty. There it puts the summary and
the results, at most eight files, the logs as one archive.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATE = ROOT / "build" / "gpu"
BUDGET_S = 1500
MOST_FILES = 8
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "typer", "rich")
TESTS = (*LIBRARIES, "pytest", "hypothesis", "triton", "filelock")
#: The files that have tests for a GPU; others need packages that are not on every such machine.
GPU_TESTS = (
    "tests/kernels/test_on_gpu.py",
    "tests/kernels/test_grouped_lora_triton.py",
    "tests/kernels/test_norms_and_rows.py",
    "tests/engine/test_cuda_graphs.py",
    "tests/families/test_graphs.py",
    "tests/parallel/test_engine.py",
    "tests/parallel/test_captured.py",
)
#: It provokes an error of the CUDA API, which the sanitizer would count.
PROVOKES = "not huge and not names_the_cuda_error"


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, run in the root of the repository.

    Attributes:
        name: Of its log.
        command: Program and arguments.
        limit_s: Seconds after which it is cut off.
        wheels, tools: What it needs.
        environment: Variables to set.
        tests: Whether it fails unless a test passed.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    wheels: Sequence[str] = LIBRARIES
    tools: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: bool = False

    def missing(self) -> list[str]:
        wheels = [name for name in self.wheels if find_spec(name) is None]
        return wheels + [name for name in self.tools if shutil.which(name) is None]


def stages(state: Path) -> list[Stage]:
    """Return all stages in order; those that later ones depend on come first."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    cuda = ["--device", "cuda", "--dtype", "fp16", "--results", str(state)]

    def sanitizer(tool: str) -> Stage:
        return Stage(
            tool,
            ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode",
             "1", *pytest, "-m", "gpu", "-k", PROVOKES, "tests/kernels/test_on_gpu.py"],
            150,
            TESTS,
            ["compute-sanitizer"],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            tests=True,
        )  # fmt: skip

    def kernels(name: str, limit_s: float) -> Stage:
        command = [*pytest, f"benchmarks/bench_{name}.py", "--benchmark-only"]
        return Stage(name, command, limit_s, (*TESTS, "pytest_benchmark"), tests=True)

    def latency(name: str, limit_s: float, contenders: str, *more: str) -> Stage:
        command = [*python, "benchmarks/latency.py", *cuda, "--contenders", contenders, *more]
        return Stage(name, command, limit_s, (*LIBRARIES, "matplotlib", "triton"))

    anchors, two = "E1,S,S again", ("--objectives", "1,2")
    sd15, sdxl = ("--model", "sd15"), ("--model", "sdxl")
    return [
        Stage("machine", ["nvidia-smi", "-q"], 10, (), ["nvidia-smi"]),
        Stage("build", [*python, "setup.py", "build_ext", "--inplace"], 120,
              ("setuptools", "pybind11", "ninja"), ["nvcc"], {"MSDDA_BUILD_CUDA": "1"}),
        Stage("doctor", [*python, "-m", "msdda_fast", "doctor"], 60),
        Stage("tests", [*pytest, "-m", "gpu", *GPU_TESTS], 180, TESTS, tests=True),
        kernels("fused_step", 90),
        latency("latency", 150, f"{anchors},E3-M2,M2", *two, *sd15),
        Stage("curve", [*python, "benchmarks/batch_curve.py", "--modes", "eager;captured",
                        "--seconds", "40", *sd15, *cuda], 90),
        Stage("profile", [*python, "benchmarks/step_profile.py", *sd15, *cuda], 60),
        latency("latency-sdxl", 100, f"{anchors},E3-M2,M2", *two, *sdxl),
        latency("latency-stock", 100, f"{anchors},E*,M?,G1,G4*", *sd15),
        latency("latency-ablations", 90, f"{anchors},M2,M2-no-*,M2/qkv,S/qkv", *two, *sd15),
        latency("latency-families", 60, "rows,turns,mixed,ours,*/captured", "--objectives", "2",
                "--rounds", "10", "--model", "sd3", "--size", "real"),
        sanitizer("memcheck"),
        kernels("grouped_lora", 60),
        # minutes of compilation each: what is left of the time
        latency("compiled", 180, f"{anchors},M2,C1,S/compiled,M2/compiled", *two, *sd15),
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
        **stage.environment,
    }
    start = time.monotonic()
    with (out / f"{stage.name}.txt").open("w") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(stage.limit_s)
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
    if stage.tests and status == "passed" and not passed_tests(out / f"{stage.name}.txt"):
        status = "failed"  # everything was skipped
    return record | {"status": status, "rc": code, "seconds": round(time.monotonic() - start, 1)}


def passed_tests(log: Path) -> int:
    """Return how many tests passed, by pytest's last line."""
    counts = re.findall(r"(\d+) passed", log.read_text())
    return int(counts[-1]) if counts else 0


def passed(out: Path) -> set[str]:
    """Return the names of the stages that passed."""
    journal = out / "stages.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["stage"] for record in records if record["status"] == "passed"}


def run_all(todo: Sequence[Stage], state: Path, budget_s: float = BUDGET_S) -> bool:
    """Run the stages that have not passed yet, while there is time; return whether all have."""
    state.mkdir(parents=True, exist_ok=True)
    done, end = passed(state), time.monotonic() + budget_s
    for stage in todo:
        if stage.name in done:
            print(f"{stage.name}: passed before", flush=True)
            continue
        left = end - time.monotonic()
        if stage.limit_s > left:
            print(f"{stage.name}: not begun, {left:.0f} s are left of {budget_s:.0f}", flush=True)
            break
        print(f"{stage.name}: up to {stage.limit_s:g} of {left:.0f} s", flush=True)
        record = run(stage, state)
        with (state / "stages.jsonl").open("a") as journal:
            journal.write(json.dumps(record) + "\n")
        named = f": {', '.join(record['missing'])}" if "missing" in record else ""
        took = f" after {record['seconds']} s" if "seconds" in record else ""
        print(f"{stage.name}: {record['status']}{named}{took}", flush=True)
    return {stage.name for stage in todo} <= passed(state)


def deliver(state: Path, out: Path) -> None:
    """Copy the summary and the results to `out`, at most `MOST_FILES`, the rest as one archive."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in state.iterdir() if path.is_file())
    first = [state / "stages.jsonl", *(path for path in files if path.suffix == ".jsonl")]
    alone = [path for path in dict.fromkeys(first) if path.exists()][: MOST_FILES - 1]
    for path in alone:
        shutil.copy2(path, out)
    with tarfile.open(out / "rest.tar.gz", "w:gz") as archive:
        for path in files:
            if path not in alone:
                archive.add(path, path.name)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", default="*", help='names or patterns, e.g. "latency*,profile"')
    budget = "seconds; no stage begins that might exceed it"
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=budget)
    args = parser.parse_args(given)
    patterns = args.stages.split(",")
    chosen = [
        stage
        for stage in stages(STATE)
        if any(fnmatchcase(stage.name, pattern) for pattern in patterns)
    ]
    try:
        return 0 if run_all(chosen, STATE, args.budget) else 1
    finally:
        deliver(STATE, args.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
