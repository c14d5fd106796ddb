# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI nodes in a stub of its sampling: the sampler's real maths on Gaussian denoisers."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.integrations import comfyui
from msdda_fast.integrations.k_diffusion import sample_msdda
from tests.integrations import comfy_stub as stub
from tests.integrations.comfy_stub import (
    EPS,
    SD15,
    SDXL,
    Manager,
    ModelPatcher,
    Network,
    sampler_custom_advanced,
)

MAPPINGS = comfyui.NODE_CLASS_MAPPINGS
SIGMAS = torch.tensor([14.6, 5.0, 1.5, 0.5, 0.1, 0.0])
EMPTY = torch.zeros(2, 4, 6, 5)
SEED = 2**64 - 1  # the largest of ComfyUI; image 1 has seed 0

#: positive prompt, negative prompt, cfg, weight, eta, LoRA: what makes an objective here.
OBJECTIVES = [
    (0.7, -0.2, 3.0, 0.6, 1.0, 0.5),
    (-0.4, 0.1, 1.0, 1.2, 0.8, -0.3),
    (0.2, 0.2, 5.0, 0.2, 0.5, 0.1),
]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    stub.install(monkeypatch)


def objective(settings, patcher, **more):
    positive, negative, cfg, weight, eta, _ = settings
    node = MAPPINGS["MSDDAObjective"]()
    (made,) = getattr(node, node.FUNCTION)(
        model=patcher,
        positive=[[positive, {}]],
        negative=[[negative, {}]],
        cfg=cfg,
        weight=weight,
        eta=eta,
        **more,
    )
    return made


def guider_node(objectives, s_noise=1.0, zero_variance="error", **more):
    node = MAPPINGS["MSDDAGuider"]()
    sockets = {f"objective_{m}": made for m, made in enumerate(objectives, start=1)}
    return getattr(node, node.FUNCTION)(
        **sockets, s_noise=s_noise, zero_variance=zero_variance, **more
    )


def separate() -> list[ModelPatcher]:
    return [ModelPatcher(Network(), settings[-1]) for settings in OBJECTIVES]


def loras() -> list[ModelPatcher]:
    base = ModelPatcher(Network())
    return [base.clone(settings[-1]) for settings in OBJECTIVES]


def fuse(patchers, settings=OBJECTIVES, latent: Tensor = EMPTY, sigmas: Tensor = SIGMAS, **options):
    pairs = zip(settings, patchers, strict=True)
    guider, sampler = guider_node([objective(*pair) for pair in pairs])
    return sampler_custom_advanced(SEED, guider, sampler, sigmas, latent, **options)


def fuse_only(patchers, latent: Tensor, sigmas: Tensor):
    """The fused samples of a run without a step, and how often a network was asked."""
    guider, sampler = guider_node(list(map(objective, OBJECTIVES, patchers)))
    with torch.inference_mode():
        output = guider.sample(drawn(), latent, sampler, sigmas, disable_pbar=True, seed=SEED)
    return output, sum(patcher.model.calls for patcher in patchers)


def by_hand(start: Tensor, settings=OBJECTIVES, sigmas: Tensor = SIGMAS) -> Tensor:
    """The same run without ComfyUI, from x at sigma_0 in the network's scale."""

    def denoiser(positive, negative, cfg, lora):
        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            cond = stub.ideal(x, sigma, positive + lora)
            uncond = stub.ideal(x, sigma, negative + lora)
            return uncond + cfg * (cond - uncond)

        return denoised

    total = sum(setting[3] for setting in settings)
    return sample_msdda(
        [denoiser(*setting[:3], setting[5]) for setting in settings],
        start,
        sigmas,
        weights=[setting[3] / total for setting in settings],
        etas=[setting[4] for setting in settings],
        seeds=[SEED, 0],
        disable=True,
    )


def drawn() -> Tensor:
    return torch.randn(EMPTY.shape, generator=torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("memory", [8, 1], ids=["all fit", "one fits"])
@pytest.mark.parametrize("patchers", [separate, loras])
def test_the_nodes_sample_what_the_sampler_samples(comfy, patchers, memory, monkeypatch) -> None:
    monkeypatch.setattr(Manager, "memory", memory)
    output, denoised, steps = fuse(patchers())
    expected = by_hand(drawn() * (1 + SIGMAS[0] ** 2).sqrt()) / SD15.scale_factor
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    # the preview of the last step, to sigma 0, is where it goes
    torch.testing.assert_close(denoised, output, rtol=1e-6, atol=1e-6)
    assert steps == list(range(len(SIGMAS) - 1))


def test_loras_over_one_network_take_turns_with_few_swaps(comfy) -> None:
    fuse(loras())
    opening, per_step = len(OBJECTIVES) - 1, len(OBJECTIVES) - 1
    assert Manager.swaps == opening + per_step * (len(SIGMAS) - 1)


def test_an_image_starts_from_a_latent_in_the_models_scale(comfy) -> None:
    latent, sigmas = torch.randn(EMPTY.shape), SIGMAS[2:]
    output, _, _ = fuse(separate(), latent=latent, sigmas=sigmas)
    start = latent * SD15.scale_factor + drawn() * sigmas[0]
    expected = by_hand(start, sigmas=sigmas) / SD15.scale_factor
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patchers", [separate, loras])
def test_what_the_mask_protects_stays(comfy, patchers) -> None:
    latent, mask = torch.randn(EMPTY.shape), torch.zeros(EMPTY.shape)
    mask[..., :3, :] = 1.0
    output, _, _ = fuse(patchers(), latent=latent, mask=mask)
    kept = mask == 0
    torch.testing.assert_close(output[kept], latent[kept], rtol=1e-5, atol=1e-5)
    assert (output[~kept] - latent[~kept]).abs().mean() > 0.1


def test_an_objective_without_weight_is_not_even_loaded(comfy) -> None:
    settings = [*OBJECTIVES[:2], (*OBJECTIVES[2][:3], 0.0, *OBJECTIVES[2][4:])]
    patchers = separate()
    output, _, _ = fuse(patchers, settings)
    assert patchers[2].model not in Manager.loaded and patchers[2].model.calls == 0
    expected, _, _ = fuse(separate()[:2], settings[:2])
    assert torch.equal(output, expected)
    # one answer a step at cfg 1, two with guidance
    assert [p.model.calls for p in patchers[:2]] == [2 * (len(SIGMAS) - 1), len(SIGMAS) - 1]


def test_an_image_does_not_depend_on_its_batch(comfy) -> None:
    together, _, _ = fuse(separate())
    guider, sampler = guider_node(list(map(objective, OBJECTIVES, separate())))
    alone, _, _ = sampler_custom_advanced(0, guider, sampler, SIGMAS, EMPTY[1:], noise=drawn()[1:])
    assert torch.equal(alone, together[1:])


def test_an_interrupt_stops_before_the_next_model_and_leaves_the_nodes_usable(
    comfy, monkeypatch
) -> None:
    patchers = loras()
    guider, sampler = guider_node(list(map(objective, OBJECTIVES, patchers)))
    monkeypatch.setattr(Manager, "interrupted_in", 4)
    with pytest.raises(stub.InterruptProcessingException):
        sampler_custom_advanced(SEED, guider, sampler, SIGMAS, EMPTY)
    network = patchers[0].model
    assert network.calls == 2 + 1 + 2 + 2 and network.current_patcher is None
    again, _, _ = sampler_custom_advanced(SEED, guider, sampler, SIGMAS, EMPTY)
    fresh, _, _ = fuse(separate())
    torch.testing.assert_close(again, fresh, rtol=1e-6, atol=1e-6)


def test_noise_and_zero_variance_reach_the_sampler(comfy) -> None:
    settings = [(*OBJECTIVES[0][:4], 0.0, 0.5), (*OBJECTIVES[1][:4], 1.0, -0.3)]
    made = list(map(objective, settings, separate()))
    guider, sampler = guider_node(made)
    with pytest.raises(mf.ZeroVariance, match="mix zero and positive"):
        sampler_custom_advanced(SEED, guider, sampler, SIGMAS, EMPTY)
    guider, sampler = guider_node(made, zero_variance="dominate")
    dominated, _, _ = sampler_custom_advanced(SEED, guider, sampler, SIGMAS, EMPTY)
    alone = by_hand(drawn() * (1 + SIGMAS[0] ** 2).sqrt(), settings[:1]) / SD15.scale_factor
    torch.testing.assert_close(dominated, alone, rtol=1e-5, atol=1e-5)

    runs = []
    for seed in (1, 2):
        nodes = guider_node(list(map(objective, OBJECTIVES, separate())), s_noise=0.0)
        runs.append(sampler_custom_advanced(seed, *nodes, SIGMAS, EMPTY, noise=drawn())[0])
    assert torch.equal(*runs)  # whatever the seed


def test_the_guider_and_the_sampler_belong_together(comfy) -> None:
    guider, sampler = guider_node(list(map(objective, OBJECTIVES, separate())))
    euler = stub.KSAMPLER(lambda model, x, sigmas, **kwargs: x)
    with pytest.raises(mf.InvalidSchedule, match="its own SAMPLER output"):
        sampler_custom_advanced(SEED, guider, euler, SIGMAS, EMPTY)
    stock = stub.CFGGuider(ModelPatcher(Network()))
    stock.set_conds([[0.0, {}]], [[0.0, {}]])
    with pytest.raises(mf.InvalidSchedule, match="got a CFGGuider"):
        sampler_custom_advanced(SEED, stock, sampler, SIGMAS, EMPTY)


class FarFromTheTop(EPS):
    """What a ModelSampling node makes of a model for zero terminal SNR."""

    sigma_max = 4518.0


@pytest.mark.parametrize("first_is_patched", [False, True])
def test_the_first_model_scales_the_noise_whichever_was_loaded_last(comfy, first_is_patched):
    base, other = ModelPatcher(Network()), FarFromTheTop()
    samplings = [other, None, None] if first_is_patched else [None, None, other]
    settings = zip(OBJECTIVES, samplings, strict=True)
    output, _, _ = fuse([base.clone(s[-1], sampling) for s, sampling in settings])
    sigma = SIGMAS[0]
    scale = sigma if first_is_patched else (1 + sigma**2).sqrt()
    expected = by_hand(drawn() * scale) / SD15.scale_factor
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patchers", [separate, loras])
def test_one_noise_level_gives_the_noised_latent_back_as_stock_samplers_do(comfy, patchers):
    latent, sigmas = torch.randn(EMPTY.shape), SIGMAS[2:3]
    output, calls = fuse_only(patchers(), latent, sigmas)
    assert calls == 0
    start = latent * SD15.scale_factor + drawn() * sigmas[0]
    torch.testing.assert_close(output, start / SD15.scale_factor, rtol=1e-5, atol=1e-5)


class Flow(stub.CONST):
    pass


@pytest.mark.parametrize(
    ("weights", "network", "error", "message"),
    [
        ((0.0, 0.0), {}, mf.InvalidWeights, "not negative and not all 0"),
        ((1.0, -0.5), {}, mf.InvalidWeights, "not negative and not all 0"),
        ((1.0, float("nan")), {}, mf.InvalidWeights, "nan"),
        ((1.0, 1.0), {"latent_format": SDXL}, UnsupportedNetwork, "latents of SDXL, .* of SD15"),
        ((1.0, 1.0), {"model_sampling": Flow}, UnsupportedNetwork, "objective_2, .* a flow model"),
    ],
)
def test_bad_input_is_named(comfy, weights, network, error, message) -> None:
    patchers = [ModelPatcher(Network()), ModelPatcher(Network(**network))]
    made = [
        objective((0.0, 0.0, 1.0, w, 1.0, 0.0), p) for w, p in zip(weights, patchers, strict=True)
    ]
    with pytest.raises(error, match=message):
        guider_node(made)


def test_without_comfyui_a_node_says_so_when_it_runs() -> None:
    made = list(map(objective, OBJECTIVES, separate()))
    with pytest.raises(mf.BackendUnavailable, match="only inside ComfyUI"):
        guider_node(made)


@pytest.mark.full  # a program; the nodes themselves are tested above
def test_importing_the_nodes_is_silent_and_needs_no_comfyui() -> None:
    code = "import sys, msdda_fast.integrations.comfyui; assert 'comfy' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_link_in_custom_nodes_is_a_node_pack(tmp_path: Path) -> None:
    link = tmp_path / "custom_nodes" / "msdda_fast"
    link.parent.mkdir()
    link.symlink_to(comfyui.__path__[0], target_is_directory=True)
    name = str(link).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == MAPPINGS.keys()


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_node_declares_what_comfyui_reads(comfy, name: str) -> None:
    node = MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional"}
    for kind, *options in [spec for group in inputs.values() for spec in group.values()]:
        assert isinstance(kind, str | list) and all(isinstance(o, dict) for o in options)
        for option in options:
            assert option["tooltip"]
            if kind == "FLOAT":
                assert option["min"] <= option["default"] <= option["max"]
    assert callable(getattr(node, node.FUNCTION)) and isinstance(node.CATEGORY, str)
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    if name == "MSDDAGuider":
        sockets = [f"objective_{m}" for m in range(1, 7)]
        assert [key for key in inputs["required"] if key in sockets] == sockets[:2]
        assert [key for key in inputs["optional"] if key in sockets] == sockets[2:]
