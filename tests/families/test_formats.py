# SPDX-License-Identifier: Apache-2.0
"""Adapter files as people hold them, read as diffusers' own converters read them.

Each test writes a tiny file, draws with the stock pipeline after `load_lora_weights` and
`set_adapters`, and with `from_pretrained`'s reading of the same file.
"""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch, InvalidAdapter
from msdda_fast.pipelines.attach import attach
from msdda_fast.pipelines.attach_files import load_objectives
from msdda_fast.pipelines.loading import LoadPlan
from tests.families import encoders, images, videos, xl
from tests.families.encoders import with_encoders
from tests.families.lockstep import draw, quiet, use
from tests.families.parts import normal
from tests.families.test_pipelines import assert_close


@pytest.fixture(autouse=True)
def bare_networks(monkeypatch):
    for module in (encoders, images, videos, xl):
        monkeypatch.setattr(module, "adapt", lambda network, *targets: network.eval())


def bare(make):
    """A pipeline without adapters."""
    pipe, call = make()
    return quiet(pipe), call


def loaded(make, files, scales=1.0):
    """The pipeline with one objective "x" of these files, by what `from_pretrained` does."""
    pipe, call = bare(make)
    sources = [str(file) for file in files]
    objectives = {"x": mf.Objective(sources if len(sources) > 1 else sources[0], scale=scales)}
    plan = LoadPlan("", "", {}, None, objectives, {"x": list(files)}, None, joins=False)
    return attach(pipe, objectives, load_objectives(pipe, plan)), call


def stock(make, files, scales=(1.0,)):
    pipe, call = bare(make)
    names = [f"file{i}" for i in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, list(scales))
    return pipe, call


def check(make, file, **options):
    """The file does the same here and there, and does something."""
    mine, call = loaded(make, [file])
    theirs, _ = stock(make, [file])
    got = draw(mine, call, **options)
    assert_close(got, draw(theirs, call, **options))
    plain, _ = bare(make)
    assert not torch.allclose(got, draw(plain, call, **options), rtol=0.02)


def pair(stem, n_in, n_out, *, names=("lora_A", "lora_B"), rank=4, alpha=None, seed=0, conv=()):
    """Both factors of a module, and its alpha."""
    found = {
        f"{stem}.{names[0]}.weight": normal(rank, n_in, *conv, seed=2 * seed) / n_in**0.5,
        f"{stem}.{names[1]}.weight": normal(n_out, rank, *[1] * len(conv), seed=2 * seed + 1),
    }
    if alpha is not None:
        found[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return found


KOHYA = ("lora_down", "lora_up")


def of_modules(network, targets, stem, **options):
    """Factors for the modules of a network whose paths end in one of `targets`."""
    found = {}
    for seed, (path, module) in enumerate(network.named_modules()):
        if path.endswith(targets) and isinstance(module, torch.nn.Linear):
            shape = (module.in_features, module.out_features)
            found |= pair(stem(path), *shape, seed=seed, **options)
    return found


ATTENTION = ("to_q", "to_k", "to_v")
MAKERS = {
    "SDXL": (xl.text, "unet"),
    "SD3": (images.sd3, "transformer"),
    "FLUX": (images.flux, "transformer"),
    "Qwen-Image": (images.qwen, "transformer"),
    "Z-Image": (images.z_image, "transformer"),
    "Wan": (videos.wan, "transformer"),
    "LTX": (videos.ltx, "transformer"),
}


@pytest.mark.parametrize("family", MAKERS)
def test_diffusers(family, tmp_path):
    make, name = MAKERS[family]
    network = getattr(bare(make)[0], name)
    state = of_modules(network, ATTENTION, lambda path: f"{name}.{path}")
    save_file(state, tmp_path / "x.safetensors")
    check(make, tmp_path / "x.safetensors")


def test_diffusers_with_a_description(tmp_path):
    network = bare(images.sd3)[0].transformer
    state = of_modules(network, ATTENTION, lambda path: f"transformer.{path}")
    described = {"transformer.r": 4, "transformer.lora_alpha": 8.0}
    described["transformer.target_modules"] = list(ATTENTION)
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(described)}
    save_file(state, tmp_path / "x.safetensors", header)
    check(images.sd3, tmp_path / "x.safetensors")


def test_a_folder_of_peft(tmp_path):
    """Flow-GRPO's trainers leave these: lora_alpha 64 over rank 32, keys of the bare network."""
    network = bare(images.sd3)[0].transformer
    state = of_modules(network, ATTENTION, lambda path: f"transformer.{path}")
    plain = {key.replace("transformer.", "base_model.model.", 1): v for key, v in state.items()}
    save_file(plain, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": list(ATTENTION)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mine, call = loaded(images.sd3, [tmp_path / "adapter_model.safetensors"])
    theirs, _ = bare(images.sd3)
    theirs.load_lora_weights(state)
    use(theirs, {"default_0": 2.0})  # alpha / rank
    assert_close(draw(mine, call), draw(theirs, call))


def test_kohya_xl_has_an_alpha_per_module(tmp_path):
    """Equal to factors with each module's own alpha / rank multiplied in."""
    network = bare(xl.text)[0].unet
    state, expected = {}, {}
    for seed, (path, module) in enumerate(network.named_modules()):
        if path.endswith(ATTENTION):
            alpha = 1 + seed % 5
            stem = f"lora_unet_{path.replace('.', '_')}"
            shape = (module.in_features, module.out_features)
            state |= pair(stem, *shape, names=KOHYA, alpha=alpha, seed=seed)
            factors = pair(f"unet.{path}", *shape, seed=seed)
            factors[f"unet.{path}.lora_B.weight"] *= alpha / 4
            expected |= factors
    save_file(state, tmp_path / "x.safetensors")
    save_file(expected, tmp_path / "expected.safetensors")
    mine, call = loaded(xl.text, [tmp_path / "x.safetensors"])
    theirs, _ = stock(xl.text, [tmp_path / "expected.safetensors"])
    assert_close(draw(mine, call), draw(theirs, call))


def test_kohya_xl_with_text_encoders(tmp_path):
    def make():
        return with_encoders(xl.text)

    pipe, _ = bare(make)
    state = {}
    for short, network in (
        ("te1", pipe.text_encoder),
        ("te2", pipe.text_encoder_2),
        ("unet", pipe.unet),
    ):
        for seed, (path, module) in enumerate(network.named_modules()):
            if path.endswith(("q_proj", "k_proj", "v_proj", "out_proj", *ATTENTION)):
                full = path
                if short != "unet" and not path.startswith("text_model"):
                    full = f"text_model.{path}"
                stem = f"lora_{short}_{full.replace('.', '_')}"
                shape = (module.in_features, module.out_features)
                state |= pair(stem, *shape, names=KOHYA, alpha=4, seed=seed)
    save_file(state, tmp_path / "x.safetensors")
    mine, _ = loaded(make, [tmp_path / "x.safetensors"])
    changed = [
        name
        for name in ("text_encoder", "text_encoder_2", "unet")
        if any(isinstance(m, BaseTunerLayer) for m in getattr(mine, name).modules())
    ]
    assert changed == ["text_encoder", "text_encoder_2", "unet"]
    check(make, tmp_path / "x.safetensors")


def flux_kohya():
    """Without `single_blocks_0_linear1`, which diffusers splits by the sizes of the real FLUX."""
    state = {}
    for seed, (stem, n_in, n_out) in enumerate(
        [
            ("double_blocks_0_img_attn_qkv", 32, 96),
            ("double_blocks_0_img_attn_proj", 32, 32),
            ("double_blocks_0_img_mlp_0", 32, 128),
            ("double_blocks_0_txt_attn_qkv", 32, 96),
            ("double_blocks_0_txt_mlp_2", 128, 32),
            ("single_blocks_0_linear2", 32 + 128, 32),
        ]
    ):
        state |= pair(f"lora_unet_{stem}", n_in, n_out, names=KOHYA, alpha=1 + seed, seed=seed)
    return state


def test_kohya_flux(tmp_path):
    save_file(flux_kohya(), tmp_path / "x.safetensors")
    check(images.flux, tmp_path / "x.safetensors")


def test_ai_toolkit_flux(tmp_path):
    network = bare(images.flux)[0].transformer
    save_file(
        of_modules(network, ("to_q", "add_q_proj"), lambda path: f"transformer.{path}"),
        tmp_path / "x.safetensors",
    )
    check(images.flux, tmp_path / "x.safetensors")


def comfy(network, rename, targets=ATTENTION, **options):
    return of_modules(network, targets, lambda path: f"diffusion_model.{rename(path)}", **options)


@pytest.mark.parametrize(
    ("make", "rename", "targets"),
    [
        pytest.param(
            videos.wan,
            lambda path: (
                path.replace("attn1.", "self_attn.")
                .replace("attn2.", "cross_attn.")
                .replace("to_", "")
            ),
            ATTENTION,
            id="Wan",
        ),
        pytest.param(images.qwen, lambda path: path, ATTENTION, id="Qwen-Image"),
        pytest.param(images.z_image, lambda path: path, ATTENTION, id="Z-Image"),
    ],
)
def test_comfy(make, rename, targets, tmp_path):
    network = bare(make)[0].transformer
    save_file(comfy(network, rename, targets), tmp_path / "x.safetensors")
    check(make, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=["bf16", "fp16", "fp8"]
)
def test_files_of_few_bits(dtype, tmp_path):
    """Their numbers are those of float32 files with the same numbers."""
    network = bare(images.sd3)[0].transformer
    state = of_modules(network, ATTENTION, lambda path: f"transformer.{path}")
    few = {key: value.to(dtype) for key, value in state.items()}
    save_file(few, tmp_path / "few.safetensors")
    save_file({key: v.float() for key, v in few.items()}, tmp_path / "wide.safetensors")
    mine, call = loaded(images.sd3, [tmp_path / "few.safetensors"])
    theirs, _ = stock(images.sd3, [tmp_path / "wide.safetensors"])
    assert_close(draw(mine, call), draw(theirs, call))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_list_with_scales(tmp_path):
    network = bare(images.sd3)[0].transformer
    files = []
    for seed, targets in enumerate([("to_q", "to_k"), ("to_k", "to_v")]):
        state = of_modules(network, targets, lambda path: f"transformer.{path}", rank=3 + seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file({key: v * (1 - 2 * seed) for key, v in state.items()}, files[-1])
    mine, call = loaded(images.sd3, files, [0.8, -0.5])
    theirs, _ = stock(images.sd3, files, [0.8, -0.5])
    assert_close(draw(mine, call), draw(theirs, call))


def test_a_list_with_scales_on_stable_diffusion(tiny):
    both = mf.Objective([tiny.warm, tiny.cool], scale=[0.8, 0.5])
    pipe = quiet(mf.MSDDAPipeline.from_pretrained(tiny.folder, objectives={"x": both}))
    request = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = mf.MSDDAPipeline.from_pretrained(
        tiny.folder, objectives={"a": mf.Objective(tiny.warm), "b": mf.Objective(tiny.cool)}
    )
    got = pipe("a red dog", **request, generator=torch.Generator().manual_seed(0)).images
    stock_pipe = quiet(StableDiffusionPipeline(**theirs.components, requires_safety_checker=False))
    stock_pipe.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    names = list(stock_pipe.unet.peft_config)
    stock_pipe.set_adapters(names, [0.8, 0.5])
    expected = stock_pipe(
        "a red dog", **request, eta=1.0, generator=torch.Generator().manual_seed(0)
    ).images
    assert_close(got.float(), expected.float())


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (pair("transformer.nowhere.to_q", 8, 8), AdapterMismatch, "nowhere.to_q"),
        (pair("unet.mid_block.attn.to_q", 8, 8), AdapterMismatch, "unet.mid_block"),
        (pair("text_encoder.layers.0.q_proj", 8, 8), AdapterMismatch, "text_encoder"),
        ({"transformer.context_embedder.diff": torch.ones(1)}, InvalidAdapter, "diff"),
    ],
    ids=["no such module", "another kind", "no text encoder", "no factors"],
)
def test_adapters_for_another_base(state, kind, message, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(kind, match=message):
        loaded(images.sd3, [tmp_path / "x.safetensors"])
