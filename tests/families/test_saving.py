# SPDX-License-Identifier: Apache-2.0
"""Folders of any family: loaded with objectives, written, and loaded by stock diffusers."""

import json

import diffusers
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch
from tests.families import images, xl
from tests.families.lockstep import draw, quiet, use
from tests.families.test_pipelines import assert_close, attached

MAKERS = {"SD3": images.sd3, "FLUX": images.flux, "SDXL": xl.text}


def absent(pipe) -> dict:
    """As diffusers wants to be told of components that a folder lacks."""
    return {name: None for name, part in pipe.components.items() if part is None}


@pytest.fixture(params=MAKERS, ids=str)
def saved(request, tmp_path):
    """(pipeline with objectives, its call, a stock folder of its base, files of its adapters)."""
    stock, call = MAKERS[request.param]()
    name = "unet" if "unet" in stock.components else "transformer"
    network = getattr(stock, name)
    for adapter in "ab":
        state = get_peft_model_state_dict(network, adapter_name=adapter)
        config = network.peft_config[adapter].to_dict()
        header = json.dumps({f"{name}.{key}": value for key, value in config.items()}, default=list)
        save_file(
            {f"{name}.{key}": value.contiguous() for key, value in state.items()},
            tmp_path / f"{adapter}.safetensors",
            {"format": "pt", "lora_adapter_metadata": header},
        )
    bare = type(network).from_config(network.config)
    plain = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items()}
    bare.load_state_dict({k: v for k, v in plain.items() if ".lora_" not in k})
    parts = {**stock.components, name: bare}
    type(stock)(**parts).save_pretrained(tmp_path / "base")
    return quiet(mf.MSDDAPipeline.from_pipe(stock)), call, tmp_path


def test_from_pretrained_with_files(saved):
    pipe, call, folder = saved
    loaded = mf.MSDDAPipeline.from_pretrained(
        folder / "base",
        objectives={
            "a": mf.Objective(folder / "a.safetensors"),
            "both": mf.Objective(
                [folder / "a.safetensors", folder / "b.safetensors"], scale=[0.8, 0.5]
            ),
            "base": mf.Objective.base(),
        },
        **absent(pipe),
    )
    assert type(loaded).__name__ == type(pipe).__name__
    expected = mf.MSDDAPipeline.from_pipe(
        pipe,
        objectives={
            "a": mf.Objective("a"),
            "both": mf.Objective(["a", "b"], scale=[0.8, 0.5]),
            "base": mf.Objective.base(),
        },
    )
    weights = [0.2, 0.5, 0.3]
    assert_close(
        draw(quiet(loaded), call, weights=weights), draw(quiet(expected), call, weights=weights)
    )


def test_save_and_load(saved):
    pipe, call, folder = saved
    flow = "Flow" in type(pipe.scheduler).__name__
    more = {"noise": mf.FlowSDE(0.7)} if flow else {"eta": 0.8}
    objectives = {
        "a": mf.Objective("a", **more),
        "both": mf.Objective(["a", "b"], scale=[0.8, 0.5], **more),
        "base": mf.Objective(None, **more),
    }
    pipe = quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives))
    assert pipe.save_pretrained(folder / "out") is None
    index = json.loads((folder / "out/model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__

    loaded = quiet(mf.MSDDAPipeline.from_pretrained(folder / "out", **absent(pipe)))
    assert list(loaded.objectives) == ["a", "both", "base"]
    for name, objective in loaded.objectives.items():
        assert (objective.noise, objective.eta) == (objectives[name].noise, objectives[name].eta)
    weights = [0.2, 0.5, 0.3]
    got = draw(loaded, call, weights=weights, seed=0)
    assert_close(got, draw(pipe, call, weights=weights, seed=0))
    loaded.save_pretrained(folder / "again")
    again = quiet(mf.MSDDAPipeline.from_pretrained(folder / "again", **absent(pipe)))
    assert torch.equal(draw(again, call, weights=weights, seed=0), got)

    stock = quiet(diffusers.DiffusionPipeline.from_pretrained(folder / "out", **absent(pipe)))
    assert type(stock) is type(pipe).stock_class
    base = pipe.detach()
    use(base, {})
    assert torch.equal(draw(stock, call), draw(base, call))


def test_an_adapter_of_another_base_names_its_first_module(saved):
    pipe, _, folder = saved
    file = folder / "a.safetensors"
    options = {"objectives": {"x": mf.Objective(file)}, **absent(pipe)}
    state = load_file(file)
    first = next(key for key in sorted(state) if key.endswith("lora_A.weight"))
    state[first] = torch.zeros(4, 1 + state[first].shape[1], *state[first].shape[2:])
    save_file(state, file)
    module = first.removesuffix(".lora_A.weight").partition(".")[2]
    with pytest.raises(AdapterMismatch, match=rf"'x'.*{module}"):
        mf.MSDDAPipeline.from_pretrained(folder / "base", **options)
    other = {
        f"{first.partition('.')[0]}.nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"
    }
    save_file(other, file)
    with pytest.raises(AdapterMismatch, match=r"'x'.*nowhere"):
        mf.MSDDAPipeline.from_pretrained(folder / "base", **options)


def test_a_failed_save_leaves_no_folder(tmp_path):
    pipe, _ = attached()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.lora_bias["a"] = True
    with pytest.raises(AdapterMismatch, match="'a' is not a plain LoRA"):
        pipe.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
