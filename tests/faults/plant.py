# SPDX-License-Identifier: Apache-2.0
"""Put faults into a copy of the tree, one at a time, and see which test of `make test` fails.

    python -m tests.faults.plant                 all of `list.py`; goes on where it was stopped
    python -m tests.faults.plant --only files-not-atomic

A fault meets the tests that its entry names first, as `make test` selects them, and all that
`make test` runs if those pass: a failure of either is one of `make test`. In the end every test
that noticed a fault must pass without it. Results are in `results.json`, by fault; one whose text
has not changed since is not planted again.

Tests run in forks of a process that has imported torch and diffusers, and nothing of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.list import FAULTS, Fault

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
#: Seconds; tests that a fault stops for good have noticed it, too.
LIMIT = 900
#: What `make test` selects is in pyproject.toml.
PYTEST = ("-p", "no:benchmark", "-p", "no:cacheprovider", "--assert=plain", "-q", "--tb=no", "-rfE")
NOTICED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
#: As `tests/conftest.py` sets it before these are imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
IMPORTED = ("torch", "diffusers.pipelines.stable_diffusion", "peft", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant what is missing in the results; 1 if a fault goes unnoticed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", action="append", metavar="ID", help="again; repeat it")
    parser.add_argument("--named", action="store_true", help="ask the named tests alone")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree at work")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - {fault.id for fault in FAULTS}:
        parser.error(f"unknown fault {sorted(unknown)[0]!r}")
    for fault in FAULTS:
        planted(ROOT, fault)
    results = kept()
    chosen = [f for f in FAULTS if f.id in options.only] if options.only else missing(results)
    print(f"{len(chosen)} of {len(FAULTS)} faults to plant", flush=True)
    os.environ |= ENVIRONMENT
    for module in IMPORTED:
        importlib.import_module(module)
    forks = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        with ProcessPoolExecutor(options.jobs, forks, copy_the_tree, (Path(scratch),)) as pool:
            planting = pool.map(partial(plant, only_named=options.named), chosen)
            for fault, result in zip(chosen, planting, strict=True):
                if result["noticed_by"] is not None or not options.named:
                    results[fault.id] = result
                    keep(results)
                print(row(fault.id, result), flush=True)
            noticed = {str(result["noticed_by"]) for result in results.values()}
            tests = sorted(test for test in noticed if test.startswith("tests/"))
            wrong = pool.submit(not_passing, tests).result()
    for test in wrong:
        print(f"fails without a fault: {test}")
    unnoticed = [f.id for f in FAULTS if results.get(f.id, {}).get("noticed_by") is None]
    print(f"{len(FAULTS) - len(unnoticed)} of {len(FAULTS)} noticed; not: {unnoticed or 'none'}")
    return int(bool(wrong or unnoticed))


def planted(root: Path, fault: Fault) -> str:
    """The text of the file with the fault in it.

    Raises:
        ValueError: What it replaces is not there exactly once.
    """
    text = (root / fault.file).read_text("utf-8")
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"fault {fault.id!r}: its text is {count} times in {fault.file}, not once")
    return text.replace(fault.old, fault.new)


def copy_the_tree(scratch: Path) -> None:
    """Work from now on in a copy of what git knows or would add, and of the compiled kernels."""
    folder = scratch / str(os.getpid())
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    compiled = [str(path.relative_to(ROOT)) for path in ROOT.glob("msdda_fast/_C*.so")]
    for name in filter(None, [*listed, *compiled]):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)


def plant(fault: Fault, *, only_named: bool = False) -> dict[str, Any]:
    """Which test notices, and after how long."""
    start = time.monotonic()
    with in_place(Path.cwd(), fault):
        first = failing(*fault.tests)
        noticed = failing() if first is None and not only_named else first
    return {
        "says": fault.says,
        "text": digest(fault),
        "noticed_by": noticed,
        "by_named_tests": first is not None,
        "seconds": round(time.monotonic() - start, 1),
    }


@contextmanager
def in_place(copy: Path, fault: Fault) -> Iterator[None]:
    file, sound = copy / fault.file, ROOT / fault.file
    file.write_text(planted(copy, fault), "utf-8")
    try:
        yield
    finally:
        shutil.copy2(sound, file)  # with its own time, so that nothing compiled outlives the fault


def failing(*tests: str) -> str | None:
    """The first test that fails, of some or of all that `make test` runs.

    Raises:
        RuntimeError: Pytest ended otherwise, which says nothing of the fault.
    """
    code, said = run_tests("-x", *tests)
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    found = NOTICED.search(said)
    if found is None:
        raise RuntimeError(f"pytest ended with {code}: {said}")
    return found[1]


def not_passing(tests: Sequence[str]) -> list[str]:
    """Those of some tests that fail in a sound tree."""
    code, said = run_tests(*tests) if tests else (0, "")
    return [] if code == 0 else NOTICED.findall(said) or [f"pytest ended with {code}: {said}"]


def run_tests(*arguments: str) -> tuple[int, str]:
    """Pytest in a fork, which imports the copy: its exit code and what it said."""
    with tempfile.TemporaryFile("w+") as said:
        if (pid := os.fork()) == 0:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os._exit(_tests_of_the_copy(arguments))
        end = time.monotonic() + LIMIT
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return 124, f"ERROR no end within {LIMIT} s"
            time.sleep(0.05)
        said.seek(0)
        return os.waitstatus_to_exitcode(done[1]), said.read()


def _tests_of_the_copy(arguments: Sequence[str]) -> int:
    try:
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "msdda_fast")]:
            del sys.modules[name]
        code = int(pytest.main([*PYTEST, *arguments]))
        place = importlib.import_module("msdda_fast").__file__ or ""
        assert place.startswith(str(Path.cwd())), f"these were tests of {place}"
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 70
    return code


def kept() -> dict[str, Any]:
    """Results of faults that are still in the list."""
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return {fault.id: stored[fault.id] for fault in FAULTS if fault.id in stored}


def keep(results: dict[str, Any]) -> None:
    ordered = {fault.id: results[fault.id] for fault in FAULTS if fault.id in results}
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    partial.replace(RESULTS)


def missing(results: dict[str, Any]) -> list[Fault]:
    return [f for f in FAULTS if results.get(f.id, {}).get("text") != digest(f)]


def digest(fault: Fault) -> str:
    return hashlib.sha256(repr((fault.file, fault.old, fault.new)).encode()).hexdigest()[:16]


def row(name: str, result: dict[str, Any]) -> str:
    where = result["noticed_by"] or "NOT NOTICED"
    return f"{name:34s} {result['seconds']:6.1f} s  {where}"


if __name__ == "__main__":
    sys.exit(main())
