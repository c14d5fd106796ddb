# SPDX-License-Identifier: Apache-2.0
"""As much of ComfyUI as sampling takes, around a network whose every answer is known.

The classes keep ComfyUI's names, signatures and order of calls, for which they are written anew: a
guider loads its model, scales the latent, encodes its conditioning and hands over to the sampler,
which scales the noise, wraps the guider for inpainting and calls a k-diffusion function.

The network is the ideal denoiser of N(prompt + weights, var): `weights` is what a LoRA patches, in
place, as in ComfyUI, so that a network asked while another's patch is in it gives another's answer.
`memory` says how many networks may be loaded at once.
"""

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

VAR = 0.25


class InterruptProcessingException(Exception):
    pass


class CONST:
    """Flow models: x = (1 - sigma) x_0 + sigma eps."""

    sigma_max = 1.0

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)

    def percent_to_sigma(self, percent):
        return 1.0 - percent

    def ideal(self, x, sigma, mean):
        """E[x_0 | x] of N(mean, VAR)."""
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        return ((1 - s) * VAR * x + s**2 * mean) / ((1 - s) ** 2 * VAR + s**2)


class EPS:
    sigma_max = 14.6

    def percent_to_sigma(self, percent):
        if percent <= 0.0:
            return 999999999.9
        return 0.0 if percent >= 1.0 else 5.0 * (1.0 - percent)

    def ideal(self, x, sigma, mean):
        """E[x_0 | x] of N(mean, VAR)."""
        return ideal(x, sigma, mean)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class SD15:
    scale_factor = 0.18215


class SDXL(SD15):
    scale_factor = 0.13025


class Network(torch.nn.Module):
    """comfy's BaseModel: takes x and sigma, returns the denoised x_0.

    `diffusion_model` is a layer of weight 0, for LoRAs that act on its output.
    """

    def __init__(self, base=0.0, latent_format=SD15, model_sampling=EPS):
        super().__init__()
        self.diffusion_model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.diffusion_model.weight)
        self.weights, self.patched_by, self.base = base, None, base
        self.latent_format, self.model_sampling = latent_format(), model_sampling()
        self.current_patcher, self.calls = None, 0

    def process_latent_in(self, latent):
        return latent * self.latent_format.scale_factor

    def process_latent_out(self, latent):
        return latent / self.latent_format.scale_factor

    def scale_latent_inpaint(self, sigma, noise, latent_image, **kwargs):
        return self.model_sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1), noise, latent_image)

    def apply_model(self, x, sigma, prompt):
        assert self in Manager.loaded and self.patched_by is self.current_patcher, "not loaded"
        self.calls += 1
        added = float(self.diffusion_model(torch.ones(1, 1)))
        return self.model_sampling.ideal(x, sigma, prompt + self.weights + added)


def ideal(x: Tensor, sigma: Tensor, mean: float) -> Tensor:
    """E[x_0 | x] of N(mean, VAR) at x = x_0 + sigma eps."""
    noise_var = sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2
    return (VAR * x + noise_var * mean) / (VAR + noise_var)


class ModelPatcher:
    """A network and the patch that is to be in it; clones share the network."""

    load_device = torch.device("cpu")

    def __init__(self, model, lora=0.0, model_sampling=None):
        self.model, self.lora, self.model_options = model, lora, {"transformer_options": {}}
        self.object_patches = {"model_sampling": model_sampling or model.model_sampling}
        self.injections, self.wrappers, self.callbacks = {}, {}, []

    def clone(self, lora=None, model_sampling=None):
        return ModelPatcher(self.model, self.lora if lora is None else lora, model_sampling)

    def get_injections(self, key):
        return self.injections.get(key)

    def set_injections(self, key, injections):
        self.injections[key] = injections

    def add_callback(self, call_type, callback):
        assert call_type == "on_cleanup"
        self.callbacks.append(callback)

    def add_patches(self, patches, strength):
        """Into the weights; here each is a number."""
        self.lora += strength * sum(one.value for one in patches.values())

    def inject(self, method):
        for injection in [one for many in self.injections.values() for one in many]:
            getattr(injection, method)(self)

    def get_model_object(self, name):
        return self.object_patches.get(name) or getattr(self.model, name)

    def pre_run(self):
        self.model.current_patcher = self

    def cleanup(self):
        self.model.current_patcher = None
        for callback in self.callbacks:
            callback(self)


class Manager(ModuleType):
    """comfy.model_management."""

    loaded: ClassVar[list[Network]] = []
    memory = 8
    swaps = 0  # of one patch for another in the same network
    interrupted_in: int | None = None  # after so many checks

    @classmethod
    def load_models_gpu(cls, patchers):
        for patcher in patchers:
            network = patcher.model
            if network in cls.loaded:
                cls.loaded.remove(network)
            before = network.patched_by
            cls.swaps += before not in (None, patcher) and before.lora != patcher.lora
            if before is not None:
                before.inject("eject")
            patcher.inject("inject")
            network.weights, network.patched_by = network.base + patcher.lora, patcher
            network.model_sampling = patcher.get_model_object("model_sampling")
            cls.loaded = [*cls.loaded, network][-cls.memory :]

    @classmethod
    def throw_exception_if_processing_interrupted(cls):
        if cls.interrupted_in is not None:
            cls.interrupted_in -= 1
            if cls.interrupted_in < 0:
                cls.interrupted_in = None
                raise InterruptProcessingException


class LoRA:
    """comfy.weight_adapter's LoRAAdapter, or another adapter, which has a value alone."""

    def __init__(self, value=0.5, name="lora", alpha=None, dora_scale=None, width=1):
        self.name, self.value = name, value
        up, down = torch.full((1, 2), value), torch.full((2, width), 0.5)
        self.weights = (up, down, alpha, None, dora_scale, None)


#: Files of LoRAs: what each has for the network's layer.
LORAS = {
    "one.safetensors": {"diffusion_model.weight": LoRA(0.5)},
    "two.safetensors": {("diffusion_model.weight", (0, 0, 1)): LoRA(-0.4, alpha=1.0)},
    "dora.safetensors": {"diffusion_model.weight": LoRA(0.3, dora_scale=torch.ones(1))},
    "wide.safetensors": {"diffusion_model.weight": LoRA(width=3)},
    "other.safetensors": {},
}


class PatcherInjection:
    def __init__(self, inject, eject):
        self.inject, self.eject = inject, eject


def load_torch_file(path, safe_load=False):
    assert safe_load
    return LORAS[path.removeprefix("loras/")]


def prepare_sampling(model, noise_shape, conds, model_options=None):
    Manager.load_models_gpu([model])
    return model.model, conds, []


def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None):
    answer = model.apply_model(x, timestep, cond[0]["prompt"])
    if not math.isclose(cond_scale, 1.0):
        other = model.apply_model(x, timestep, uncond[0]["prompt"])
        answer = other + (answer - other) * cond_scale
    return answer


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher = model_patcher
        self.model_options, self.original_conds, self.cfg = model_patcher.model_options, {}, 1.0

    def set_conds(self, positive, negative):
        self.inner_set_conds({"positive": positive, "negative": negative})

    def inner_set_conds(self, conds):
        self.original_conds = conds

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - as in comfy
        assert model_options["transformer_options"]["of"] is self, "another model's options"
        conds = self.conds.get("negative"), self.conds["positive"]
        return sampling_function(
            self.inner_model, x, timestep, *conds, self.cfg, model_options, seed
        )

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
        disable_pbar=False, seed=None,
    ):  # fmt: skip
        if sigmas.shape[-1] == 0:
            return latent_image
        self.conds = {
            name: [{"prompt": prompt, **extra} for prompt, extra in cond]
            for name, cond in self.original_conds.items()
        }
        self.inner_model, self.conds, _ = prepare_sampling(
            self.model_patcher, noise.shape, self.conds, self.model_options
        )
        try:
            self.model_patcher.pre_run()
            if torch.count_nonzero(latent_image) > 0:
                latent_image = self.inner_model.process_latent_in(latent_image)
            options = {"transformer_options": {"of": self}}
            extra_args = {"model_options": options, "seed": seed}
            samples = sampler.sample(
                self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
            output = self.inner_model.process_latent_out(samples.to(torch.float32))
        finally:
            self.model_patcher.cleanup()
        del self.inner_model, self.conds
        return output


class KSamplerX0Inpaint:
    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006
        if denoise_mask is not None:
            kept = self.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
            )
            x = x * denoise_mask + kept * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            out = out * denoise_mask + self.latent_image * (1 - denoise_mask)
        return out


class KSAMPLER:
    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ):  # fmt: skip
        extra_args["denoise_mask"] = denoise_mask
        model_k = KSamplerX0Inpaint(model_wrap, sigmas)
        model_k.latent_image, model_k.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        assert model_wrap.model_patcher is not None and model_wrap.cfg is not None  # it logs them
        from_the_top = math.isclose(sampling.sigma_max, float(sigmas[0]), rel_tol=1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, from_the_top)

        def k_callback(event):
            if callback is not None:
                callback(event["i"], event["denoised"], event["x"], len(sigmas) - 1)

        samples = self.sampler_function(
            model_k, x, sigmas, extra_args=extra_args, callback=k_callback, disable=disable_pbar,
            **self.extra_options,
        )  # fmt: skip
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `comfy` importable, with nothing loaded."""
    contents = {
        "samplers": {"CFGGuider": CFGGuider, "KSAMPLER": KSAMPLER},
        "sampler_helpers": {"prepare_sampling": prepare_sampling},
        "model_sampling": {"CONST": CONST, "EPS": EPS},
        "utils": {"load_torch_file": load_torch_file},
        "lora": {
            "model_lora_keys_unet": lambda model, keys: {"layer": "diffusion_model.weight"},
            "load_lora": lambda state, keys: dict(state),
        },
        "lora_convert": {"convert_lora": lambda state: state},
        "patcher_extension": {
            "PatcherInjection": PatcherInjection,
            "CallbacksMP": SimpleNamespace(ON_CLEANUP="on_cleanup"),
        },
        "model_management": {
            "throw_exception_if_processing_interrupted": (
                Manager.throw_exception_if_processing_interrupted
            )
        },
    }
    package = ModuleType("comfy")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, content in contents.items():
        module = ModuleType(f"comfy.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    folders = ModuleType("folder_paths")
    folders.get_filename_list = lambda folder: list(LORAS) if folder == "loras" else []
    folders.get_full_path_or_raise = lambda folder, name: f"{folder}/{name}"
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    monkeypatch.setattr(Manager, "loaded", [])
    monkeypatch.setattr(Manager, "swaps", 0)


@torch.inference_mode()  # as all nodes are
def sampler_custom_advanced(seed, guider, sampler, sigmas, latent, mask=None, noise=None):
    """The node of that name: (output, the x_0 of the last preview, the previews' steps)."""
    previews: dict[int, Tensor] = {}
    if noise is None:
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    samples = guider.sample(
        noise,
        latent,
        sampler,
        sigmas,
        denoise_mask=mask,
        callback=lambda step, x0, x, total_steps: previews.update({step: x0}),
        disable_pbar=True,
        seed=seed,
    )
    denoised = guider.model_patcher.model.process_latent_out(list(previews.values())[-1])
    return samples, denoised, list(previews)
