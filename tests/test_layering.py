# SPDX-License-Identifier: Apache-2.0
"""Imports point down: the rooms of the package, and who may import whom."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "msdda_fast"

#: Level 0 in order: each module may import those before it.
LEVEL_0 = (
    "errors", "types", "files", "resume", "integers", "torch_private", "tracing",
    "weight_ranges", "weights", "levels", "objective",
)  # fmt: skip

MODELS = {"batched", "adapters", "engine", "kernels", "steps", "lora", "assets", *LEVEL_0}
USES = {"pipelines", "rewards", *MODELS}

#: room -> the rooms it may import, itself aside.
ALLOWED: dict[str, set[str]] = {
    **{module: set(LEVEL_0[:index]) for index, module in enumerate(LEVEL_0)},
    "reference": set(LEVEL_0),
    "assets": set(),
    "steps": set(LEVEL_0),
    "kernels": {"_C", *LEVEL_0},  # _C: the compiled kernels
    "lora": set(LEVEL_0),
    "engine": {"kernels", "steps", "lora", *LEVEL_0},
    "adapters": {"engine", "lora", "kernels", "assets", *LEVEL_0},
    "batched": MODELS - {"batched", "steps"},
    "pipelines": MODELS,
    "rewards": {"assets", *LEVEL_0},
    "batching": USES,
    "integrations": {"steps", "kernels", "engine", *LEVEL_0},
    "training": USES,
    "methods": {"training", *USES},
    "emoji": {"training", *USES},
    "evaluation": {"methods", "batching", *USES},
    "serve": {"evaluation", "methods", "batching", *USES},
}
#: Modules that a room may import of one that it may not.
ALSO = {
    "kernels": {"msdda_fast.steps.coefficients", "msdda_fast.steps.shares"},
    "integrations": {"msdda_fast.pipelines.regions"},  # masks; it knows no pipeline
}
#: The front doors may import every room but the judge.
FRONT = ("__init__", "__main__", "cli")
ALLOWED |= {room: {*ALLOWED, *FRONT} - {"reference"} for room in FRONT}

#: Rooms that may import diffusers, and those that may import transformers: `batched` and
#: `adapters` ask diffusers for its layers' classes and its converters of formats.
DIFFUSERS = {"pipelines", "batched", "adapters", "training", "emoji"}
TRANSFORMERS = {"pipelines", "rewards", "emoji"}
#: Rooms that may import nothing but torch (and triton, for kernels) and the standard library.
PURE = {room: {"torch"} for room in (*LEVEL_0, "reference", "steps", "engine")} | {
    "kernels": {"torch", "triton"}
}


def room_of(module: str) -> str:
    """`msdda_fast.engine.loop` -> `engine`; the package itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base == "msdda_fast":  # `from msdda_fast import engine` names a room
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def offences(path: Path) -> Iterator[str]:
    module = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = ".".join(module[:-1])
    room = room_of(".".join(module))
    where = path.relative_to(PACKAGE.parent)
    if room not in ALLOWED:
        yield f"{where}: room {room!r} is not in the table"
        return
    for line, name in imports(path, package):
        top = name.split(".")[0]
        if top == "msdda_fast":
            target = room_of(name)
            allowed = target in ALLOWED[room] or name in ALSO.get(room, ())
            if target != room and not allowed:
                yield f"{where}:{line}: {room} may not import {target} ({name})"
        elif (top == "diffusers" and room not in DIFFUSERS) or (
            top == "transformers" and room not in TRANSFORMERS
        ):
            yield f"{where}:{line}: {room} may not import {top}"
        elif room in PURE and top not in PURE[room] | set(sys.stdlib_module_names):
            yield f"{where}:{line}: {room} may not import {top}, only torch and stdlib"


def test_imports_point_down() -> None:
    found = [offence for path in sorted(PACKAGE.rglob("*.py")) for offence in offences(path)]
    assert not found, "\n".join(found)


def test_only_tests_and_benchmarks_import_the_judge() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert all(room_of(name) != "reference" for _, name in imports(path, "msdda_fast"))


@pytest.mark.parametrize(
    ("file", "source", "culprit"),
    [
        ("engine/x.py", "from msdda_fast.pipelines import loading", "engine may not import pipe"),
        ("engine/x.py", "from ..pipelines.loading import load", "engine may not import pipelines"),
        (
            "engine/x.py",
            "def f():\n    import diffusers",
            "x.py:2: engine may not import diffusers",
        ),
        ("kernels/x.py", "from msdda_fast.lora import stack", "kernels may not import lora"),
        ("kernels/x.py", "import numpy", "kernels may not import numpy"),
        ("errors.py", "from msdda_fast import types", "errors may not import types"),
        ("kernels/x.py", "from msdda_fast.steps import table", "kernels may not import steps"),
        ("cli/x.py", "import msdda_fast.reference", "cli may not import reference"),
        ("training/x.py", "from transformers import CLIPModel", "may not import transformers"),
        ("util/x.py", "", "room 'util' is not in the table"),
    ],
)
def test_offenders_are_named(
    file: str, source: str, culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "msdda_fast"
    path = package / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    assert culprit in "\n".join(offences(path))


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) >= 300
    }
    assert not long, f"split by noun: {long}"
