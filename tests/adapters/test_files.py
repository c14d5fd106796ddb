# SPDX-License-Identifier: Apache-2.0
"""Adapters of every format: the update of each module, and a base that stays as it was."""

import copy
import hashlib
import json
import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

import msdda_fast as mf
from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import StableDiffusionFormat
from msdda_fast.adapters.injection import peft_names
from msdda_fast.emoji.architectures import small_text_encoder, word_tokenizer
from tests.tiny_model import WIDTH, small_unet

NAME = "pytorch_lora_weights.safetensors"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
#: Modules of the UNet by how ComfyUI calls them: every kind of place in the original checkpoints.
COMFY = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    ),
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.1.conv1": "output_blocks.1.0.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.attentions.1.proj_in": "output_blocks.3.1.proj_in",
    "conv_out": "out.2",
}
ATTENTION = [path for path in COMFY if ".attn" in path]


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer(["a", "red", "dog"])
        return small_unet(), small_text_encoder(tokenizer, WIDTH).eval()


@pytest.fixture
def networks(base):
    return copy.deepcopy(base)


def module(networks, path):
    unet, text_encoder = networks
    if path.startswith("text_model.") and not hasattr(text_encoder, "text_model"):
        path = path.removeprefix("text_model.")
    return (text_encoder if "self_attn" in path else unet).get_submodule(path)


def factors(networks, paths, ranks=(2,)):
    """Random (down, up) by module; ranks in turn."""
    draw = torch.Generator().manual_seed(1)
    made = {}
    for at, path in enumerate(paths):
        weight, rank = module(networks, path).weight, ranks[at % len(ranks)]
        kernel = weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=draw)
        up = torch.randn(len(weight), rank, *(1 for _ in kernel), generator=draw)
        made[path] = (down, up)
    return made


def digest(networks):
    """Of all weights that are not an adapter's."""
    total = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            if ".lora_" not in name:
                total.update(name.replace(".base_layer", "").encode())
                total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def put(networks, file, name="a"):
    unet, text_encoder = networks
    adapter = AdapterFile.read(name, file, StableDiffusionFormat(unet))
    adapter.check({"unet": unet, "text_encoder": text_encoder})
    before = digest(networks)
    adapter.put_into({"unet": unet, "text_encoder": text_encoder})
    assert digest(networks) == before


def assert_updates(networks, expected, name="a"):
    """Each module computes W x + alpha / rank B A x, and no other module has an adapter."""
    layers = [m for n in networks for m in n.modules() if isinstance(m, LoraLayer)]
    assert sum(name in layer.lora_A for layer in layers) == len(expected)
    for path, (down, up, scale) in expected.items():
        layer = module(networks, path)
        layer.set_adapter([name])
        whole = copy.deepcopy(layer.get_base_layer())
        with torch.no_grad():
            whole.weight += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
        shape = (1, whole.weight.shape[1], *(4 for _ in whole.weight.shape[2:]))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(layer(x), whole(x), atol=1e-4, rtol=1e-4)


def tensors(made, key, down=".lora_A.weight", up=".lora_B.weight"):
    return {
        key(path) + kind: tensor
        for path, pair in made.items()
        for kind, tensor in zip((down, up), pair, strict=True)
    }


def kohya(path):
    return ("lora_te_" if "self_attn" in path else "lora_unet_") + path.replace(".", "_")


def of_pipeline(path):
    return ("text_encoder." if "self_attn" in path else "unet.") + path


def comfyui(path):
    return "diffusion_model." + COMFY[path]


class TestFormats:
    def test_kohya_has_an_alpha_per_module(self, networks, tmp_path):
        """As resize_lora.py and block weights leave them: alpha is 1/2 of each rank, or its own."""
        paths = [path for path in COMFY if "resnets" not in path and "conv" not in path]
        paths = [path for path in paths if "time" not in path] + [TEXT, TEXT.replace("q_p", "v_p")]
        made = factors(networks, paths, ranks=(1, 3, 2, 5))
        state = tensors(made, kohya, ".lora_down.weight", ".lora_up.weight")
        scales = {path: 0.5 if at % 2 else 1.0 + at for at, path in enumerate(paths)}
        for path, (down, _) in made.items():
            if path != paths[1]:  # one without: alpha is its rank
                state[kohya(path) + ".alpha"] = torch.tensor(scales[path] * len(down))
        save_file(state, tmp_path / NAME)
        put(networks, tmp_path / NAME)
        scales[paths[1]] = 1.0
        assert_updates(networks, {p: (*made[p], scales[p]) for p in paths})

    def test_kohya_with_an_integer_alpha(self, networks, tmp_path):
        made = factors(networks, ATTENTION)
        state = tensors(made, kohya, ".lora_down.weight", ".lora_up.weight")
        state |= {kohya(path) + ".alpha": torch.tensor(6) for path in made}
        save_file(state, tmp_path / NAME)
        put(networks, tmp_path / NAME)
        assert_updates(networks, {path: (*pair, 3.0) for path, pair in made.items()})

    @pytest.mark.parametrize("kind", ["lora_A", "lora_down"])
    def test_comfyui_names_the_modules_of_the_original_checkpoint(self, networks, tmp_path, kind):
        made = factors(networks, COMFY)
        ends = (".lora_A.weight", ".lora_B.weight")
        if kind == "lora_down":
            ends = (".lora_down.weight", ".lora_up.weight")
        state = tensors(made, comfyui, *ends)
        state |= {f"diffusion_model.{COMFY['conv_in']}.alpha": torch.tensor(5.0)}
        text = factors(networks, [TEXT])
        state |= tensors(text, lambda path: "text_encoders.clip_l.transformer." + path, *ends)
        save_file(state, tmp_path / NAME)
        put(networks, tmp_path / NAME)
        expected = {path: (*pair, 1.0) for path, pair in {**made, **text}.items()}
        expected["conv_in"] = (*made["conv_in"], 2.5)
        assert_updates(networks, expected)

    @pytest.mark.parametrize("paths", [ATTENTION, [TEXT]], ids=["unet", "text_encoder"])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_peft_folders(self, networks, tmp_path, paths, rslora):
        made = factors(networks, paths, ranks=(4, 2))
        save_file(
            tensors(made, lambda path: "base_model.model." + path),
            tmp_path / "adapter_model.safetensors",
        )
        config = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": rslora,
            "rank_pattern": {path.split(".", 3)[3]: 2 for path in paths[1:]},
            "alpha_pattern": {"^" + path.replace(".", r"\."): 5 for path in paths[1:]},
            "target_modules": "(a+)+$", "exclude_modules": "(a+)+$",
        }  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        put(networks, tmp_path / "adapter_model.safetensors")
        expected = {}
        for path, (down, up) in made.items():
            alpha, rank = (5, 2) if path in paths[1:] else (8, 4)
            expected[path] = (down, up, alpha / (math.sqrt(rank) if rslora else rank))
        assert_updates(networks, expected)

    def test_diffusers_with_a_description_of_both_networks(self, networks, tmp_path):
        made = factors(networks, [*ATTENTION, TEXT], ranks=(4,))
        fields = {"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.lora_alpha": 12}
        header = {"lora_adapter_metadata": json.dumps(fields)}
        save_file(tensors(made, of_pipeline), tmp_path / NAME, metadata=header)
        put(networks, tmp_path / NAME)
        scales = {path: 3.0 if path == TEXT else 0.5 for path in made}
        assert_updates(networks, {path: (*pair, scales[path]) for path, pair in made.items()})

    def test_float8(self, networks, tmp_path):
        made = {
            path: tuple(t.to(torch.float8_e4m3fn) for t in pair)
            for path, pair in factors(networks, ATTENTION).items()
        }
        save_file(tensors(made, of_pipeline), tmp_path / NAME)
        put(networks, tmp_path / NAME)
        assert_updates(
            networks, {path: (*(t.float() for t in pair), 1.0) for path, pair in made.items()}
        )

    def test_the_adapters_before_stay_as_they_are(self, networks, tmp_path):
        first = factors(networks, ATTENTION)
        save_file(tensors(first, of_pipeline), tmp_path / NAME)
        put(networks, tmp_path / NAME, "first")
        second = {path: (-down, up) for path, (down, up) in first.items()}
        save_file(tensors(second, of_pipeline), tmp_path / NAME)
        put(networks, tmp_path / NAME, "second")
        assert_updates(networks, {path: (*pair, 1.0) for path, pair in first.items()}, "first")


DAMAGED = [
    ("not JSON", "{", "lora_adapter_metadata is not JSON"),
    ("no object", "[1]", "lora_adapter_metadata is not JSON"),
    ("half", {"unet.r": 2}, "changes 'text_encoder'.*of 'unet' only"),
    ("another rank", {"r": 3}, "rank 3 in .*attn1.to_q.*factors 2"),
    ("a rank that is none", {"r": "2"}, "r must be a finite number, got '2'"),
    ("no alpha", {"lora_alpha": None}, "lora_alpha is null"),
    ("an endless alpha", {"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
    ("two alphas", '{"lora_alpha": 1, "lora_alpha": 2}', "'lora_alpha' is there twice"),
    ("an alpha that is none", {"lora_alpha": math.inf}, "lora_alpha must be a finite number"),
    ("a pattern that is none", {"alpha_pattern": [1]}, "alpha_pattern is no object"),
    ("a pattern's number", {"alpha_pattern": {"to_q": None}}, "alpha_pattern of 'to_q'"),
    ("a regex for alpha", {"alpha_pattern": {"(a+)+$": 1}}, r"'\(a\+\)\+\$', a regular expression"),
    ("a regex for rank", {"rank_pattern": {".*to_q": 2}}, "regular expression"),
    *((start, {"init_lora_weights": start}, f"init_lora_weights='{start}'")
      for start in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")),
    ("another start", {"init_lora_weights": {"a": 1}}, "init_lora_weights={'a': 1}"),
    ("DoRA", {"use_dora": True}, "use_dora"),
    ("aLoRA", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ("LoHa", {"peft_type": "LOHA"}, "type LOHA"),
]  # fmt: skip


class TestRefused:
    """Each in one line with the file's name, before anything is changed."""

    @staticmethod
    def refused(networks, file, error, message):
        with pytest.raises(error, match=message) as raised:
            put(networks, file, "x")
        text = str(raised.value)
        assert text.startswith("adapter 'x'") and str(file) in text and "\n" not in text
        assert not any(isinstance(m, LoraLayer) for n in networks for m in n.modules())

    @pytest.mark.parametrize("key", ["unet.conv_out", f"unet.{ATTENTION[0]}.lora_A"])
    def test_an_alpha_of_no_factors(self, networks, tmp_path, key):
        state = tensors(factors(networks, ATTENTION), of_pipeline)
        save_file({**state, f"{key}.alpha": torch.tensor(4.0)}, tmp_path / NAME)
        message = f"'{key}' has an alpha and no factors"
        self.refused(networks, tmp_path / NAME, mf.InvalidAdapter, message)

    @pytest.mark.parametrize("description, message", [case[1:] for case in DAMAGED],
                             ids=[case[0] for case in DAMAGED])  # fmt: skip
    def test_descriptions_in_the_header(self, networks, tmp_path, description, message):
        if isinstance(description, dict):
            both = ("",) if "unet.r" in description else ("unet.", "text_encoder.")
            fields = {network + k: v for network in both for k, v in description.items()}
            description = json.dumps(fields)
        state = tensors(factors(networks, [*ATTENTION, TEXT]), of_pipeline)
        file = tmp_path / NAME
        save_file(state, file, metadata={"lora_adapter_metadata": description})
        self.refused(networks, file, mf.InvalidAdapter, message)

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{", r"adapter_config\.json is not a description"),
            (json.dumps({"init_lora_weights": "olora"}), r"adapter_config\.json.*olora"),
            (json.dumps({"r": 64}), r"adapter_config\.json.*rank 64"),
            (None, r"without the adapter_config\.json"),
        ],
    )
    def test_descriptions_beside_a_file_of_peft(self, networks, tmp_path, text, message):
        state = tensors(factors(networks, ATTENTION), lambda path: "base_model.model." + path)
        file = tmp_path / "adapter_model.safetensors"
        save_file(state, file)
        if text is not None:
            (tmp_path / "adapter_config.json").write_text(text)
        self.refused(networks, file, mf.InvalidAdapter, message)

    @pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
    def test_factors(self, networks, tmp_path, form):
        file = tmp_path / NAME
        made = factors(networks, ATTENTION)
        key = {"diffusers": of_pipeline, "kohya": kohya, "comfyui": comfyui}[form]
        down, up = ".lora_down.weight", ".lora_up.weight"
        if form == "diffusers":
            down, up = ".lora_A.weight", ".lora_B.weight"
        state, first = tensors(made, key, down, up), key(ATTENTION[0])
        for end, missing in ((down, "(down|A)"), (up, "(up|B)")):
            save_file({k: v for k, v in state.items() if k != first + end}, file)
            message = f"attn1.to_q' has no lora_{missing}.weight"
            self.refused(networks, file, mf.InvalidAdapter, message)
        for changes, message in (
            ({down: torch.ones(7, 16)}, r"attn1.to_q.*\(7, 16\).*\(16, 2\)"),
            ({".alpha": torch.ones(2)}, r"alpha' has shape \(2,\)"),
            ({".diff": torch.ones(2)}, "diff"),
        ):
            save_file({**state, **{first + end: t for end, t in changes.items()}}, file)
            self.refused(networks, file, mf.InvalidAdapter, message)

    def test_layers_that_take_no_lora(self, networks, tmp_path):
        path = "down_blocks.0.resnets.0.norm1"
        state = {f"unet.{path}.lora_A.weight": torch.ones(2, 1)}
        state[f"unet.{path}.lora_B.weight"] = torch.ones(16, 2)
        save_file(state, tmp_path / NAME)
        self.refused(networks, tmp_path / NAME, mf.AdapterMismatch, f"{path}.*shape")

    def test_other_bases_and_pipelines(self, networks, tmp_path):
        for key, message in (
            ("diffusion_model.double_blocks.0.img_attn.qkv", "another base.*double_blocks"),
            ("transformer.blocks.0.to_q", "another base"),
            ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "another kind"),
        ):
            state = {f"{key}.lora_A.weight": torch.ones(2, 6)}
            state[f"{key}.lora_B.weight"] = torch.ones(6, 2)
            save_file(state, tmp_path / NAME)
            self.refused(networks, tmp_path / NAME, mf.AdapterMismatch, message)


class TestNames:
    def test_plain_names_stay_and_others_are_replaced(self, base):
        odd = [
            "1", "type", "half", "train", "items", "to_q", "lora_A", "weight", "unet.lora_A.x",
            "a.b", "a/b", "a b", "änder", "default", "objective-0", "self", "down_blocks", "[red]",
        ]  # fmt: skip
        plain = ["aesthetic", "soup-0", "a_b", "A"]
        names = peft_names([*odd, *plain], *base)
        assert list(names) == [*odd, *plain]
        assert [names[name] for name in plain] == plain
        assert len(set(names.values())) == len(names)
        holder = nn.ModuleDict()
        for name in names.values():
            holder[name] = nn.Identity()

    @pytest.mark.parametrize("name", ["to_q", "1", "type", "attn1"])
    def test_a_name_says_nothing_of_the_base(self, networks, tmp_path, name):
        made = factors(networks, ATTENTION)
        save_file(tensors(made, of_pipeline), tmp_path / NAME)
        adapter = AdapterFile.read(name, tmp_path / NAME, StableDiffusionFormat(networks[0]))
        inside = peft_names([name], *networks)[name]
        adapter.put_into(dict(zip(("unet", "text_encoder"), networks, strict=True)), inside)
        assert_updates(networks, {path: (*pair, 1.0) for path, pair in made.items()}, inside)
