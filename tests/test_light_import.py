# SPDX-License-Identifier: Apache-2.0
"""`import msdda_fast` is silent and light: torch, and nothing that takes seconds or a GPU."""

import subprocess
import sys

import pytest

import msdda_fast

HEAVY = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "typer",
    "rich",
    "triton",
)

PROBE = f"""
import sys, os
import torch
before, environment = set(sys.modules), dict(os.environ)
import msdda_fast
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
heavy = sorted(loaded & set({HEAVY!r}))
assert not heavy, f"import msdda_fast loads {{heavy}}"
assert not torch.cuda.is_initialized(), "import msdda_fast made a CUDA context"
assert dict(os.environ) == environment, "import msdda_fast wrote the environment"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_light_and_silent() -> None:
    result = run(PROBE)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_public_names_exist() -> None:
    for name in msdda_fast.__all__:
        assert getattr(msdda_fast, name) is not None


@pytest.mark.full  # a program that imports diffusers
def test_the_pipeline_is_loaded_on_first_use() -> None:
    result = run(
        "import sys, msdda_fast\n"
        "assert 'diffusers' not in sys.modules\n"
        "msdda_fast.MSDDAPipeline\n"
        "assert 'diffusers' in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(msdda_fast, "no_such_name")
