# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI nodes with flow models, stacks of LoRAs, masks and percents, in the stub."""

import gc
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.integrations.comfyui import NODE_CLASS_MAPPINGS
from msdda_fast.integrations.comfyui import loras as comfy_loras
from msdda_fast.integrations.k_diffusion import sample_msdda
from tests.integrations import comfy_stub as stub
from tests.integrations.comfy_stub import CONST, SD15, Manager, ModelPatcher, Network
from tests.integrations.test_comfyui import (
    EMPTY,
    OBJECTIVES,
    SEED,
    drawn,
    guider_node,
    loras,
    objective,
    separate,
)

FLOW = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0])
VE = torch.tensor([14.6, 5.0, 1.5, 0.5, 0.1, 0.0])
KINDS = {None: FLOW, "FlowSDE": FLOW, "DanceSDE": FLOW, "CPS": FLOW, "FlowDDIM": FLOW}


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    stub.install(monkeypatch)


def flow_models() -> list[ModelPatcher]:
    network = ModelPatcher(Network(model_sampling=CONST))
    return [network.clone(settings[-1]) for settings in OBJECTIVES]


def run(patchers, more=({}, {}, {}), settings=OBJECTIVES, sigmas=FLOW, **options) -> Tensor:
    made = [
        objective(*pair, **extra) for *pair, extra in zip(settings, patchers, more, strict=True)
    ]
    nodes = guider_node(made, **options)
    return stub.sampler_custom_advanced(SEED, *nodes, sigmas, EMPTY)[0]


def by_hand(sigmas=FLOW, settings=OBJECTIVES, **options) -> Tensor:
    """The same run without ComfyUI."""
    sampling = CONST() if sigmas is FLOW else stub.EPS()

    def denoiser(positive, negative, cfg, lora):
        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            cond = sampling.ideal(x, sigma, positive + lora)
            uncond = sampling.ideal(x, sigma, negative + lora)
            return uncond + cfg * (cond - uncond)

        return denoised

    x_0 = sample_msdda(
        [denoiser(*setting[:3], setting[5]) for setting in settings],
        sampling.noise_scaling(sigmas[0], drawn(), EMPTY, True),
        sigmas,
        flow=sigmas is FLOW,
        seeds=[SEED, 0],
        disable=True,
        **options,
    )
    return x_0 / SD15.scale_factor


def weights(*active: bool) -> list[float]:
    row = [w * on for (_, _, _, w, _, _), on in zip(OBJECTIVES, active or (True,) * 3, strict=True)]
    return [w / sum(row) for w in row]


ETAS = [settings[4] for settings in OBJECTIVES]


@pytest.mark.parametrize("kind", [None, mf.FlowSDE, mf.DanceSDE, mf.CPS, mf.FlowDDIM])
def test_flow_models_are_sampled_with_the_noise_that_was_chosen(kind) -> None:
    found = run(flow_models(), **({"noise": kind.__name__} if kind else {}))
    # a step to sigma 0 adds no noise, which an SDE's would
    levels = [kind(eta, last_step=False) if kind else eta for eta in ETAS]
    expected = by_hand(weights=weights(), levels=levels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_goes_on_where_sampling_stops_early() -> None:
    found = run(flow_models(), sigmas=FLOW[:4], noise="FlowSDE")
    levels = [mf.FlowSDE(eta) for eta in ETAS]
    whole = sample_msdda(
        [lambda x, s, m=m: CONST().ideal(x, s, m) for m in (0.0, 1.0)], drawn(), FLOW[:4],
        levels=levels[:2], seeds=[SEED, 0], disable=True,
    )  # fmt: skip
    assert whole.isfinite().all() and found.isfinite().all()
    settings = [(*one[:4], 0.0, one[5]) for one in OBJECTIVES]
    assert (found - run(flow_models(), settings=settings, sigmas=FLOW[:4])).abs().mean() > 0.1


def stack(*entries: tuple[str, float]):
    made = None
    for name, strength in entries:
        (made,) = NODE_CLASS_MAPPINGS["MSDDALoRA"]().add(f"{name}.safetensors", strength, made)
    return made


#: What they add: strength (alpha / r) up down, or in the weights of the stub, the strength's share.
STACKS = [
    ([("one", 0.8), ("two", 2.0)], 0.8 * 0.5 - 2.0 * 0.5 * 0.4),
    ([("one", 0.8)], 0.8 * 0.5),
    ([("dora", 0.5), ("one", -1.0)], 0.5 * 0.3 - 0.5),
]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_stacks_of_loras_make_objectives_of_a_shared_model(is_compiled: bool) -> None:
    base = ModelPatcher(Network(model_sampling=CONST))
    if is_compiled:
        base.model.diffusion_model._orig_mod = None
    settings = [(*one[:5], value) for one, (_, value) in zip(OBJECTIVES, STACKS, strict=True)]
    if is_compiled:  # LoRAs are patched in, and in the stub a patch is its value
        values = (0.8 * 0.5 - 2.0 * 0.4, 0.8 * 0.5, 0.5 * 0.3 - 0.5)
        settings = [(*one[:5], value) for one, value in zip(OBJECTIVES, values, strict=True)]
    found = run([base] * 3, [{"lora_stack": stack(*entries)} for entries, _ in STACKS])
    expected = by_hand(settings=settings, weights=weights(), etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert base.lora == 0.0 and len(Manager.loaded) == 1


def test_loras_take_turns_without_new_weights_and_are_gone_afterwards() -> None:
    base = ModelPatcher(Network(model_sampling=CONST))
    layer = base.model.diffusion_model
    made = [{"lora_stack": stack(*entries)} for entries, _ in STACKS[:2]] + [{}]
    run([base] * 3, made)
    assert Manager.swaps == 0
    Manager.load_models_gpu([base])
    assert not layer._forward_hooks and not layer(torch.ones(1, 1)).any()


def test_a_patcher_that_is_forgotten_takes_its_loras_with_it() -> None:
    base = ModelPatcher(Network())
    layer = base.model.diffusion_model
    made = objective(OBJECTIVES[0], base, lora_stack=stack(("one", 1.0)))
    Manager.load_models_gpu([made.model])
    assert layer._forward_hooks
    Manager.loaded.clear()
    base.model.patched_by = None
    del made
    gc.collect()
    assert not layer._forward_hooks


def test_a_layer_that_is_not_called_is_warned_of(monkeypatch, caplog) -> None:
    network = Network(model_sampling=CONST)
    network.idle = torch.nn.Linear(1, 1)
    both = {"diffusion_model.weight": stub.LoRA(), "idle.weight": stub.LoRA()}
    monkeypatch.setitem(stub.LORAS, "both.safetensors", both)
    run([ModelPatcher(network)] * 3, [{"lora_stack": stack(("both", 1.0))}, {}, {}])
    assert "1 layers had no effect" in caplog.text and "idle.weight" in caplog.text


def test_a_node_does_not_change_the_stack_it_is_given() -> None:
    first = stack(("one", 0.8))
    NODE_CLASS_MAPPINGS["MSDDALoRA"]().add("two.safetensors", 1.0, first)
    assert len(first) == 1


def test_a_lora_of_another_model_is_refused_by_its_name() -> None:
    for name, message in (
        ("other", r"other\.safetensors has no weight of Network"),
        (
            "wide",
            r"wide\.safetensors has 3 inputs and 1 outputs for diffusion_model\.weight, which",
        ),
    ):
        with pytest.raises(mf.AdapterMismatch, match=message):
            objective(OBJECTIVES[0], loras()[0], lora_stack=stack((name, 1.0)))
        # no file of an objective that is switched off is read
        off = (*OBJECTIVES[0][:3], 0.0, *OBJECTIVES[0][4:])
        objective(off, loras()[0], lora_stack=stack((name, 1.0)))


def test_loras_of_convolutions_and_of_parts_of_a_layer_add_what_their_product_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    network = torch.nn.Module()
    network.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    network.linear = torch.nn.Linear(6, 5).double()
    network.norm = torch.nn.LayerNorm(6).double()
    adapters = {
        "conv.weight": (draw(4, 2, 1, 1), draw(2, 3, 3, 3), 1.0),
        ("linear.weight", (1, 2, 3)): (draw(5, 2), draw(2, 3), None),
        ("linear.weight", (0, 1, 2)): (draw(2, 2), draw(2, 6), None),
    }
    x = {"conv": draw(2, 3, 7, 7), "linear": draw(2, 7, 6)}
    conv = network.conv.weight.detach().clone()
    linear = network.linear.weight.detach().clone()
    up, down, _ = adapters["conv.weight"]
    conv += 0.7 * 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(conv)
    for (_, (axis, start, length)), (up, down, _) in list(adapters.items())[1:]:
        linear.narrow(axis, start, length).add_(0.7 * up @ down)
    expected = {
        "conv": functional.conv2d(x["conv"], conv, network.conv.bias, 2, 1),
        "linear": functional.linear(x["linear"], linear, network.linear.bias),
    }
    for key, (up, down, alpha) in adapters.items():
        adapter = SimpleNamespace(name="lora", weights=(up, down, alpha, None, None, None))
        layer, lora = comfy_loras._read(network, key, adapter, 0.7)
        comfy_loras._check_fits("file", key, layer, lora)
        layer.register_forward_hook(partial(comfy_loras._answer, [lora]))
    with torch.no_grad():
        for name, value in expected.items():
            torch.testing.assert_close(getattr(network, name)(x[name]), value)
    other = SimpleNamespace(name="lora", weights=(draw(6, 1), draw(1, 1), None, None, None, None))
    assert comfy_loras._read(network, "norm.weight", other, 1.0) == (None, None)
    swapped = ("linear.weight", (0, 0, 5), lambda weight: weight)
    assert comfy_loras._read(network, swapped, adapter, 1.0) == (None, None)


def left(columns: int = 20) -> Tensor:
    mask = torch.zeros(1, 48, 40)
    mask[..., :columns] = 1.0
    return mask


@pytest.mark.parametrize(("patchers", "sigmas"), [(flow_models, FLOW), (separate, VE)])
def test_a_mask_is_the_weight_of_its_objective(patchers, sigmas) -> None:
    found = run(patchers(), ({"mask": 0.75 * left(16)}, {}, {}), sigmas=sigmas, mask_softness=0.0)
    w = torch.zeros(2, 3, 1, 6, 5)
    w[:, 0, ..., :2] = 0.75
    rest = weights(False, True, True)
    for m in (1, 2):
        w[:, m] = (1 - w[:, 0]) * rest[m]
    expected = by_hand(sigmas, weights=w, etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_edges_of_masks_are_blurred_by_a_gaussian_of_one_latent_pixel() -> None:
    found = run(flow_models(), ({"mask": left(16)}, {}, {}))
    at = torch.arange(40.0)
    kernel = (-((at[:, None] - at) ** 2) / (2 * 8.0**2)).exp()
    blurred = kernel[:, :16].sum(1) / kernel.sum(1)
    w = torch.zeros(2, 3, 1, 1, 5)
    w[:, 0] = blurred.reshape(5, 8).mean(1)
    for m, rest in enumerate(weights(False, True, True)):
        w[:, m] += (1 - w[:, 0]) * rest if m else 0.0
    expected = by_hand(weights=w, etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_image_has_its_own_mask() -> None:
    masks = torch.cat([left(40), left(0)])
    found = run(flow_models(), ({"mask": masks}, {}, {}))
    expected = by_hand(weights=[[1.0, 0.0, 0.0], weights(False, True, True)], etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("patchers", "sigmas"), [(flow_models, FLOW), (separate, VE)])
def test_percents_say_in_which_steps_an_objective_acts(patchers, sigmas) -> None:
    more = ({"end_percent": 0.5}, {}, {"start_percent": 0.5})
    found = run(patchers(), more, sigmas=sigmas)
    middle = patchers()[0].get_model_object("model_sampling").percent_to_sigma(0.5)
    assert middle not in sigmas
    early, late = weights(True, True, False), weights(False, True, True)
    expected = by_hand(sigmas, weights=lambda k: early if sigmas[k] > middle else late, etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_objective_outside_of_all_steps_is_not_even_loaded() -> None:
    patchers = [ModelPatcher(Network(model_sampling=CONST)) for _ in OBJECTIVES]
    run(patchers, ({"start_percent": 0.95}, {}, {}))
    assert patchers[0].model not in Manager.loaded and patchers[0].model.calls == 0


def test_a_mask_of_an_objective_counts_where_it_acts() -> None:
    more = ({"mask": left(40), "end_percent": 0.5}, {}, {})
    found = run(flow_models(), more)
    rest = weights(False, True, True)
    expected = by_hand(weights=lambda k: [1, 0, 0] if FLOW[k] > 0.5 else rest, etas=ETAS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_at_cfg_1_no_negative_prompt_is_needed() -> None:
    settings = [(*one[:2], 1.0, *one[3:]) for one in OBJECTIVES]
    patchers = flow_models()
    made = [objective(*pair) for pair in zip(settings, patchers, strict=True)]
    without = [
        NODE_CLASS_MAPPINGS["MSDDAObjective"]().make(p, [[one[0], {}]], 1.0, one[3], one[4])[0]
        for p, one in zip(patchers, settings, strict=True)
    ]
    first, second = (
        stub.sampler_custom_advanced(SEED, *guider_node(some), FLOW, EMPTY)[0]
        for some in (made, without)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("more", "options", "error", "message"),
    [
        ({"mask": 2 * left()}, {}, mf.InvalidWeights, "'objective_1' is 2 in row 0, column 0"),
        ({"mask": left()[0, 0]}, {}, mf.InvalidShape, "'objective_1' has shape"),
        ({"mask": left().expand(3, -1, -1)}, {}, mf.InvalidShape, "for 3 images"),
        ({"start_percent": 0.5}, {}, None, None),
        ({}, {"noise": "pink"}, mf.InvalidSchedule, "noise is 'pink'"),
        ({}, {"zero_variance": "never"}, mf.InvalidSchedule, "zero_variance"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(more, options, error, message):
    if error is None:  # nothing is wrong with it
        run(flow_models(), (more, {}, {}), **options)
        return
    with pytest.raises(error, match=message):
        run(flow_models(), (more, {}, {}), **options)
    assert not Manager.loaded


def test_pixels_and_steps_without_an_objective_are_refused_by_name() -> None:
    halves = ({"mask": left()}, {"mask": left()}, {"mask": 0 * left()})
    with pytest.raises(mf.InvalidWeights, match="masks sum to 2 in row 0, column 0"):
        run(flow_models(), halves)
    holes = ({"mask": left()}, {"mask": 0 * left()}, {"mask": 0 * left()})
    with pytest.raises(mf.InvalidWeights, match="masks sum to 0 in row 0, column 20"):
        run(flow_models(), holes)
    early = [{"end_percent": 0.5}] * 3
    with pytest.raises(mf.InvalidWeights, match=r"no objective acts in step 3, at sigma 0.4"):
        run(flow_models(), early)
    assert not Manager.loaded


def test_levels_out_of_range_and_lonely_guidance_are_refused_by_name() -> None:
    loud = [(*OBJECTIVES[0][:4], 1.5, 0.5), *OBJECTIVES[1:]]
    for noise, message in (("CPS", "CPS: a must lie in"), ("ancestral", "must lie in .*LTX")):
        with pytest.raises(mf.InvalidSchedule, match=message):
            run(flow_models(), settings=loud, noise=noise)
    with pytest.raises(mf.InvalidSchedule, match="noise CPS is for flow models"):
        run(separate(), sigmas=VE, noise="CPS")
    lonely = objective(OBJECTIVES[0], flow_models()[0])
    made = NODE_CLASS_MAPPINGS["MSDDAObjective"]().make(
        lonely.model, lonely.positive, 3.0, 1.0, 1.0
    )
    with pytest.raises(mf.InvalidSchedule, match="objective_1 has cfg 3 and no negative prompt"):
        guider_node([*made, lonely])
    with pytest.raises(UnsupportedNetwork, match="share the way noise is added"):
        run([*flow_models()[:2], separate()[2]])
    assert not Manager.loaded


@pytest.mark.parametrize(
    ("start", "end", "is_valid"),
    [(0.0, 1.0, True), (0.2, 0.4, True), (0.4, 0.4, False), (-0.1, 0.5, False), (0.5, 1.1, False),
     (math.nan, 1.0, False)],
)  # fmt: skip
def test_percents_are_validated_before_anything_runs(start, end, is_valid) -> None:
    answer = NODE_CLASS_MAPPINGS["MSDDAObjective"].VALIDATE_INPUTS(start, end)
    assert answer is True if is_valid else "must lie before end_percent" in answer
