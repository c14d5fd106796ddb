# SPDX-License-Identifier: Apache-2.0
"""Every file of examples/ runs, or, for ComfyUI, fits the nodes that there are."""

import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from msdda_fast.integrations.comfyui import NODE_CLASS_MAPPINGS
from tests.integrations import comfy_stub

EXAMPLES = Path(__file__).parent.parent / "examples"
#: What each one leaves behind.
WRITES = {
    "pipeline.py": {"dog.png", "apple.png"},
    "any_pipeline.py": set(),
    "drop_in_step.py": set(),
    "flow_model.py": {"flow.png"},
    "k_diffusion_sampler.py": set(),
    "regions.py": {"regions.png"},
    "train_adapter.py": {"dark", "dark.png"},
}
WORKFLOWS = ("comfyui_workflow.json", "comfyui_flow_workflow.json")
RUN = [sys.executable, "-W", "error::DeprecationWarning:__main__"]


def test_every_example_is_tested_and_named_in_the_index():
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert files == {*WRITES, "engine_server.py", *WORKFLOWS}
    assert set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())) == files


@pytest.mark.full  # programs of ten seconds; `make test` runs the README's first block
@pytest.mark.parametrize("name", WRITES)
def test_it_runs(name, tmp_path):
    done = subprocess.run(
        [*RUN, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == WRITES[name]
    if found := re.search(r"mean (\S+), expected (\S+); standard deviation (\S+)", done.stdout):
        mean, expected, deviation = map(float, found.groups())
        assert mean == pytest.approx(expected, abs=0.03)
        assert deviation == pytest.approx(0.5, abs=0.03)


@pytest.mark.full
def test_the_server_draws_and_refuses():
    server = subprocess.Popen(
        [*RUN, EXAMPLES / "engine_server.py", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        url = server.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}?prompt=A%20red%20hat.&steps=2", timeout=300) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}?consistency=2", timeout=300)
        assert refused.value.code == 422
        refused.value.close()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_fits_the_nodes(name, monkeypatch):
    comfy_stub.install(monkeypatch)
    nodes = json.loads((EXAMPLES / name).read_text())
    files = [node["inputs"].get("lora_name") for node in nodes.values()]
    monkeypatch.setattr(comfy_stub, "LORAS", dict.fromkeys(file for file in files if file))
    ours = {key for key, node in nodes.items() if node["class_type"] in NODE_CLASS_MAPPINGS}
    assert {nodes[key]["class_type"] for key in ours} == set(NODE_CLASS_MAPPINGS)
    for key, node in nodes.items():
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        assert {source for source, _ in links.values()} <= set(nodes)
        if key not in ours:
            continue
        sockets = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        assert set(sockets["required"]) <= set(node["inputs"])
        known = sockets["required"] | sockets.get("optional", {})
        for name, value in node["inputs"].items():
            kind = known[name][0]
            if name in links and value[0] in ours:
                source = NODE_CLASS_MAPPINGS[nodes[value[0]]["class_type"]]
                assert source.RETURN_TYPES[value[1]] == kind
            elif isinstance(kind, list):
                assert value in kind
            elif kind == "FLOAT":
                assert known[name][1]["min"] <= value <= known[name][1]["max"]
    (sampler,) = (n for n in nodes.values() if n["class_type"] == "SamplerCustomAdvanced")
    guider, kind = sampler["inputs"]["guider"], sampler["inputs"]["sampler"]
    assert guider[0] == kind[0] in ours  # both outputs of one node: neither works without the other
