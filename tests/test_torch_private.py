# SPDX-License-Identifier: Apache-2.0
"""Private parts of torch are used in one file, and each of them does what it is used for."""

import ast
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from msdda_fast import torch_private

PACKAGE = Path(__file__).parents[1] / "msdda_fast"
HOME = PACKAGE / "torch_private.py"

#: Private attributes of torch's tensors, modules and storages; `self._x` is a class's own.
ATTRIBUTES = {
    "_version", "_base", "_cdata", "_is_view", "_make_subclass", "_to_copy", "_conv_forward",
    "_parameters", "_buffers", "_modules", "_apply", "_call_impl", "_named_members",
    "_forward_hooks", "_forward_pre_hooks", "_get_current_dispatch_mode", "_lazy_init",
}  # fmt: skip


def dotted(node: ast.expr) -> list[str]:
    """`torch.utils._pytree` -> [torch, utils, _pytree]; empty if it does not start with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (parents := dotted(node.value)):
        return [*parents, node.attr]
    return []


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of each private part of torch that a file imports or reads."""
    for node in ast.walk(ast.parse(source)):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in ATTRIBUTES and not own:
                yield node.lineno, node.attr
        for parts in names:
            hidden = any(part.startswith("_") and not part.endswith("__") for part in parts)
            if parts[:1] == ["torch"] and hidden:
                yield node.lineno, ".".join(parts)


def test_private_parts_of_torch_are_used_in_one_file() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {what}; put it into torch_private.py"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != HOME
        for line, what in private_uses(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses import FakeTensorMode",
        "from torch import _dynamo",
        "import torch._inductor.config",
        "def f():\n    from torch.utils._pytree import tree_map",
        "torch._C._log_api_usage_once('x')",
        "torch.utils._python_dispatch",
        "tensor._version",
        "layer.conv._conv_forward(x, w, None)",
    ],
)
def test_a_private_use_is_seen(source: str) -> None:
    assert list(private_uses(source))


def test_public_parts_are_no_offence() -> None:
    for source in (
        "from torch import nn",
        "from msdda_fast import _C",
        "self._base",
        "torch.__version__",
    ):
        assert not list(private_uses(source))


def test_the_compiler_is_not_imported_before_it_is_wanted() -> None:
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport msdda_fast\n"
        "new = {n for n in set(sys.modules) - before if n.startswith('torch._')}\n"
        "assert not new, sorted(new)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_versions_count_changes_in_place() -> None:
    x = torch.zeros(2)
    before = torch_private.versions_of([x])
    x.add_(1)
    assert torch_private.versions_of([x]) > before
    with torch.inference_mode():
        assert torch_private.versions_of([torch.zeros(2).add_(1)]) == [0]


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_convolution_runs_with_another_weight(padding_mode: str) -> None:
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode=padding_mode, bias=False)
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    other = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=padding_mode, bias=False)
    other.weight = nn.Parameter(weight)
    assert torch.equal(torch_private.conv_forward(conv, x, weight), other(x))


def test_a_shallow_copy_gets_parameters_of_its_own() -> None:
    layer = nn.Linear(2, 2)
    weight, clone = layer.weight, copy.copy(layer)
    torch_private.replace_parameters(clone, weight=nn.Parameter(torch.ones(2, 2)))
    assert layer.weight is weight and clone.bias is layer.bias
    assert torch.equal(clone.weight, torch.ones(2, 2))


def test_dispatch_modes_are_seen() -> None:
    assert not torch_private.in_dispatch_mode()
    with torch_private.FakeTensorMode():
        assert torch_private.in_dispatch_mode()
        assert isinstance(torch.zeros(2), torch_private.FakeTensor)
