# SPDX-License-Identifier: Apache-2.0
"""What a Triton kernel becomes on a GPU that need not be there: registers, spills, instructions.

`compiled` is for processes without TRITON_INTERPRET, which is read when a kernel is defined.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(source: ASTSource, arch: int, options: dict[str, int | bool]) -> dict[str, object]:
    """Resource usage, as cuobjdump names it, and how often each instruction stands in the code.

    "offsets" counts the integer types that are added to pointers.
    """
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = Counter(re.findall(r"^\s*/\*\w+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", code, re.M))
    portable = Counter(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s", binary.asm["ptx"], re.M))
    offsets = Counter(re.findall(r"tt\.addptr .*, tensor<(?:\d+x)+(i\d+)>", binary.asm["ttir"]))
    return found | {
        "shared": binary.metadata.shared,
        "offsets": offsets,
        "instructions": instructions,
        "ptx": portable,
    }


def report(module: str, made_once: Callable[..., Path]) -> dict[str, dict]:
    """What `python -m <module>` prints, in a process in which kernels are compiled."""

    def make(folder: Path) -> None:
        (folder / "report.json").write_text(printed_by(module))

    return json.loads((made_once(module, make) / "report.json").read_text())


def printed_by(module: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
