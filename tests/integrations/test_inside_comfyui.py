# SPDX-License-Identifier: Apache-2.0
"""The nodes inside of ComfyUI itself, on the CPU, with tiny random models of its own classes.

    MSDDA_COMFYUI=/path/to/ComfyUI python -m pytest tests/integrations/test_inside_comfyui.py

A checkout of ComfyUI and what its requirements.txt names, torchvision and torchaudio aside; without
it these tests are skipped. `test_comfyui.py` runs the same nodes in a stand-in for ComfyUI.
"""

import asyncio
import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msdda_fast.integrations import comfyui
from msdda_fast.integrations.k_diffusion import sample_msdda
from msdda_fast.levels import FlowSDE
from tests.integrations import tiny_comfy as tiny

CHECKOUT = os.environ.get("MSDDA_COMFYUI")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="needs MSDDA_COMFYUI, a checkout of ComfyUI"),
    pytest.mark.filterwarnings("ignore"),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
EXTRAS = ("custom_sampler", "flux", "mask", "sd3")
#: In which folder an input looks for its file.
FILES = {
    "ckpt_name": "checkpoints", "unet_name": "diffusion_models", "clip_name1": "text_encoders",
    "clip_name2": "text_encoders", "vae_name": "vae", "lora_name": "loras",
}  # fmt: skip
WORKFLOWS = {
    "comfyui_workflow.json": "Stable Diffusion 1",
    "comfyui_flow_workflow.json": "FLUX",
}
SEED, STEPS, BATCH = 7, 4, 2


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """ComfyUI's `nodes`, with ours linked into its custom nodes, and folders of our own."""
    tiny.start(Path(CHECKOUT))
    folders, nodes = importlib.import_module("folder_paths"), importlib.import_module("nodes")
    home = tmp_path_factory.mktemp("comfyui")
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras"):
        (home / name).mkdir()
        folders.folder_names_and_paths[name] = ([str(home / name)], {".safetensors"})
    folders.set_output_directory(str(home / "output"))
    link = home / "custom_nodes" / "msdda_fast"
    link.parent.mkdir()
    link.symlink_to(comfyui.__path__[0], target_is_directory=True)

    async def load() -> list[bool]:
        extras = Path(CHECKOUT) / "comfy_extras"
        done = [
            await nodes.load_custom_node(str(extras / f"nodes_{name}.py"), module_parent="extras")
            for name in EXTRAS
        ]
        return [*done, await nodes.load_custom_node(str(link))]

    assert all(asyncio.run(load()))
    nodes.home = home
    return nodes


@pytest.fixture
def workflow(nodes, request):
    """A workflow of `examples/`, with empty files where it names some."""
    graph = json.loads((EXAMPLES / request.param).read_text())
    for node in graph.values():
        for key, folder in FILES.items():
            if key in node["inputs"]:
                (nodes.home / folder / node["inputs"][key]).touch()
    return graph


def call(nodes, name: str, **inputs):
    """Run a node as ComfyUI does."""
    node = nodes.NODE_CLASS_MAPPINGS[name]()
    with torch.inference_mode():
        return getattr(node, node.FUNCTION)(**inputs)


def stack(nodes, *entries: tuple[str, float]):
    made = None
    for name, strength in entries:
        (made,) = call(nodes, "MSDDALoRA", lora_name=name, strength=strength, lora_stack=made)
    return made


def stored_loras(nodes, model) -> dict[str, dict[str, Tensor]]:
    states = {f"{name}.safetensors": tiny.lora(model, seed) for seed, name in enumerate("abc", 1)}
    for name, state in states.items():
        save_file(state, nodes.home / "loras" / name)
    return states


#: Of each objective: LoRAs, cfg, weight, eta, seeds of its prompts.
OBJECTIVES = [
    ([("a.safetensors", 1.0), ("b.safetensors", -0.5)], 2.5, 0.6, 0.9, (11, 12)),
    ([("c.safetensors", 0.7)], 1.0, 0.3, 0.5, (13, 14)),
    ([], 1.0, 0.1, 0.7, (15, 16)),
]


def objectives(nodes, family, model, **more):
    made = []
    for index, (loras, cfg, weight, eta, prompts) in enumerate(OBJECTIVES):
        positive, negative = (tiny.conditioning(family, seed) for seed in prompts)
        extra = {name: values[index] for name, values in more.items()}
        if cfg != 1.0:
            extra["negative"] = negative
        (one,) = call(
            nodes, "MSDDAObjective", model=model, positive=positive, cfg=cfg, weight=weight,
            eta=eta, lora_stack=stack(nodes, *loras), **extra,
        )  # fmt: skip
        made.append(one)
    return {f"objective_{m}": one for m, one in enumerate(made, start=1)}


def sigmas_of(model) -> Tensor:
    samplers = importlib.import_module("comfy.samplers")
    return samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)


def sampled(nodes, guider, sampler, sigmas: Tensor, latent: Tensor) -> Tensor:
    noise = nodes.NODE_CLASS_MAPPINGS["RandomNoise"]()
    (noise,) = getattr(noise, noise.FUNCTION)(SEED)
    output = call(
        nodes, "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
        latent_image={"samples": latent},
    )  # fmt: skip
    return output[0]["samples"]


def own_denoisers(family, states):
    """One stock guider for each objective over a network of its own, LoRAs merged by hand."""
    samplers = importlib.import_module("comfy.samplers")

    def denoiser(loras, cfg, prompts):
        model = tiny.patcher(family)
        for name, strength in loras:
            tiny.merge(model.model, states[name], strength)
        positive, negative = (tiny.conditioning(family, seed) for seed in prompts)

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            found = []

            def once(model_k, _, sigmas, extra_args, callback, disable):
                found.append(model_k(x, sigma, **extra_args))
                return x

            guider = samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
            guider.sample(x, 0 * x, samplers.KSAMPLER(once), sigma[:1].repeat(2), disable_pbar=True)
            return found[0]

        return denoised

    return [denoiser(loras, cfg, prompts) for loras, cfg, _, _, prompts in OBJECTIVES]


def by_hand(model, family, states, sigmas, **options) -> Tensor:
    """What the nodes are to draw, from ComfyUI's own noise."""
    shape = (BATCH, *family.latent)
    noise = torch.randn(shape, generator=torch.manual_seed(SEED))
    sampling = model.get_model_object("model_sampling")
    top = float(sigmas[0]) >= float(sampling.sigma_max) * (1 - 1e-5)
    with torch.inference_mode():
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros(shape), top)
        x = sample_msdda(
            own_denoisers(family, states),
            x,
            sigmas,
            seeds=[SEED, SEED + 1],
            disable=True,
            **options,
        )
        return model.model.process_latent_out(x)


WEIGHTS = [weight for _, _, weight, _, _ in OBJECTIVES]
ETAS = [eta for _, _, _, eta, _ in OBJECTIVES]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_lora_stacks_on_one_model_draw_what_merged_networks_draw(nodes, name, monkeypatch) -> None:
    family = tiny.FAMILIES[name]
    model, is_flow = tiny.patcher(family), name != "Stable Diffusion 1"
    states, sigmas = stored_loras(nodes, model.model), sigmas_of(model)
    made = objectives(nodes, family, model)
    guider, sampler = call(nodes, "MSDDAGuider", **made, s_noise=1.0, zero_variance="error")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    loads, load = [], type(model).load
    counted = lambda self, *rest, **more: loads.append(1) or load(self, *rest, **more)  # noqa: E731
    monkeypatch.setattr(type(model), "load", counted)
    found = sampled(nodes, guider, sampler, sigmas, torch.zeros(BATCH, *family.latent))
    assert len(loads) == 1  # objectives take turns without moving or patching the network
    expected = by_hand(model, family, states, sigmas, weights=WEIGHTS, etas=ETAS, flow=is_flow)
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * scale
    assert (found[0] - found[1]).abs().max() > 0.01 * scale
    importlib.import_module("comfy.model_management").unload_all_models()
    assert not any(layer._forward_hooks for layer in model.model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@pytest.mark.parametrize("name", ["FLUX", "Wan"])
def test_masks_percents_and_noise_of_flow_models(nodes, name) -> None:
    family = tiny.FAMILIES[name]
    model = tiny.patcher(family)
    states, sigmas = stored_loras(nodes, model.model), sigmas_of(model)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1.0
    made = objectives(
        nodes, family, model, mask=[left, None, None], start_percent=[0.0, 0.0, 0.45],
    )  # fmt: skip
    guider, sampler = call(
        nodes, "MSDDAGuider", **made, s_noise=1.0, zero_variance="error", noise="FlowSDE",
        mask_softness=0.0,
    )  # fmt: skip
    found = sampled(nodes, guider, sampler, sigmas, torch.zeros(BATCH, *family.latent))
    late = float(model.get_model_object("model_sampling").percent_to_sigma(0.45))
    assert {sigma <= late for sigma in sigmas[:-1].tolist()} == {True, False}

    def weights(sigma: float) -> Tensor:
        w = torch.zeros(BATCH, 3, *(1,) * (len(family.latent) - 2), 8, 8)
        w[:, 0, ..., :4] = 1.0
        w[:, 1, ..., 4:] = 0.75 if sigma <= late else 1.0
        w[:, 2, ..., 4:] = 0.25 if sigma <= late else 0.0
        return w

    of_step = [weights(sigma) for sigma in sigmas[:-1].tolist()]
    levels = [FlowSDE(eta, last_step=False) for eta in ETAS]
    expected = by_hand(model, family, states, sigmas, weights=of_step.__getitem__, levels=levels)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["a.safetensors", "diffusers.safetensors"])
def test_without_noise_one_objective_is_stock_euler(nodes, name) -> None:
    """Through ComfyUI's own loader of LoRAs, guider and sampler on the other side."""
    family = tiny.FAMILIES["FLUX"]
    model = tiny.patcher(family)
    stored_loras(nodes, model.model)
    save_file(tiny.flux_lora_of_diffusers(family, 4), nodes.home / "loras/diffusers.safetensors")
    positive, latent = tiny.conditioning(family, 11), torch.zeros(BATCH, *family.latent)
    common = {"model": model, "positive": positive, "cfg": 1.0, "eta": 0.0}
    one, other = (
        call(nodes, "MSDDAObjective", **common, weight=w, lora_stack=stack(nodes, (file, 0.8)))[0]
        for w, file in ((1.0, name), (0.0, "b.safetensors"))
    )
    pair = call(
        nodes, "MSDDAGuider", objective_1=one, objective_2=other, s_noise=1.0, zero_variance="error"
    )
    found = sampled(nodes, *pair, sigmas_of(model), latent)
    (patched,) = call(nodes, "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=0.8)
    (guider,) = call(nodes, "BasicGuider", model=patched, conditioning=positive)
    (euler,) = call(nodes, "KSamplerSelect", sampler_name="euler")
    expected = sampled(nodes, guider, euler, sigmas_of(model), latent)
    (guider,) = call(nodes, "BasicGuider", model=model, conditioning=positive)
    without = sampled(nodes, guider, euler, sigmas_of(model), latent)
    assert (without - expected).abs().max() > 0.01 * expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_comfyui_accepts_the_workflow(nodes, workflow) -> None:
    execution = importlib.import_module("execution")
    valid, error, outputs, found = asyncio.run(execution.validate_prompt("1", workflow, None))
    assert valid and not error and not found and len(outputs) == 1


@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfyui_refuses_percents_in_the_wrong_order(nodes, name) -> None:
    execution = importlib.import_module("execution")
    graph = json.loads((EXAMPLES / name).read_text())
    key = next(key for key, node in graph.items() if node["class_type"] == "MSDDAObjective")
    graph[key]["inputs"] |= {"start_percent": 0.5, "end_percent": 0.5}
    _, _, _, found = asyncio.run(execution.validate_prompt("1", graph, None))
    assert "must lie before end_percent" in json.dumps(found[key]["errors"])


@pytest.mark.parametrize(("workflow", "name"), WORKFLOWS.items(), indirect=["workflow"])
def test_comfyui_runs_the_workflow(nodes, workflow, name, monkeypatch) -> None:
    """All of it but for what reads files: a tiny model and its LoRAs in place of those named."""
    execution, family = importlib.import_module("execution"), tiny.FAMILIES[name]
    model = tiny.patcher(family)
    for seed, node in enumerate(workflow.values()):
        if "lora_name" in node["inputs"]:
            save_file(
                tiny.lora(model.model, seed), nodes.home / "loras" / node["inputs"]["lora_name"]
            )
        if "width" in node["inputs"]:
            width, height = node["inputs"]["width"], node["inputs"]["height"]
            node["inputs"] |= {"width": 64, "height": 64 * height // width}
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = STEPS
    seeds = iter(range(20, 30))
    image = torch.zeros(1, 64, 64, 3)
    decoded: list[Tensor] = []
    replaced = {
        "CheckpointLoaderSimple": lambda **_: (model, None, None),
        "UNETLoader": lambda **_: (model,),
        "DualCLIPLoader": lambda **_: (None,),
        "VAELoader": lambda **_: (None,),
        "CLIPTextEncode": lambda **_: (tiny.conditioning(family, next(seeds)),),
        "VAEDecode": lambda samples, **_: decoded.append(samples["samples"]) or (image,),
    }
    for node, run in replaced.items():
        cls = nodes.NODE_CLASS_MAPPINGS[node]
        monkeypatch.setattr(cls, cls.FUNCTION, lambda self, run=run, **inputs: run(**inputs))
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server)
    valid, _, outputs, _ = asyncio.run(execution.validate_prompt("1", workflow, None))
    assert valid
    executor.execute(workflow, "1", {}, outputs)
    assert executor.success, executor.status_messages
    (latent,) = decoded
    assert latent.shape[1:] == family.latent and latent.isfinite().all() and latent.std() > 0.1
    assert list((nodes.home / "output").glob("*.png"))
    shutil.rmtree(nodes.home / "output")
