# SPDX-License-Identifier: Apache-2.0
"""Where pipelines, objectives and adapters come from, and where they go."""

import copy
import json
import logging
import math
import re
import shutil

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import msdda_fast as mf
from msdda_fast.adapters import sources
from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import StableDiffusionFormat
from msdda_fast.pipelines.manifest import parse_objectives
from msdda_fast.pipelines.scheduler_config import check_scheduler_file
from tests.tiny_model import WEIGHTS, quiet, small_unet, write_adapter

SHORT = dict(num_inference_steps=2, guidance_scale=3.0, seed=0, output_type="latent")
PROMPTS = ["a red dog", "a blue cat"]
#: They sample in another way than DDIM, or another model.
REFUSED = [
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    DDIMInverseScheduler,
]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def parameters(pipe):
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        f"{part}.{name}": (id(p), p.dtype, p.requires_grad, p.detach().clone())
        for part, module in modules.items()
        for name, p in module.named_parameters()
    }


def assert_close(actual, expected):
    """Equal up to float32 rounding, which depends on where matrices lie and how many rows share."""
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def peft_folder(tiny, folder):
    """The adapter "warm" as peft's own `save_pretrained` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = load_file(tiny.warm / "pytorch_lora_weights.safetensors")
    renamed = {key.replace("unet.", "base_model.model."): v for key, v in state.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ATTENTION}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class TestFromPretrained:
    def test_objectives_json_is_used_when_none_are_given(self, tiny, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(tiny.folder, folder)
        entries = {"warm": {"source": "warm", "eta": 0.9, "scale": 0.5}, "plain": {"eta": 0.7}}
        (folder / "objectives.json").write_text(json.dumps(entries))
        pipe = mf.MSDDAPipeline.from_pretrained(folder)
        assert list(pipe.objectives) == ["warm", "plain"]
        assert pipe.objectives["warm"].eta == 0.9 and pipe.objectives["warm"].scale == 0.5
        assert pipe.objectives["plain"] == mf.Objective.base(eta=0.7)
        given = mf.MSDDAPipeline.from_pretrained(folder, objectives={"b": mf.Objective.base()})
        assert list(given.objectives) == ["b"]

    def test_without_any_the_base_model_is_the_objective(self, tiny_kl):
        pipe = mf.MSDDAPipeline.from_pretrained(tiny_kl.folder)
        assert list(pipe.objectives.values()) == [mf.Objective.base()]

    def test_components_load_in_one_dtype(self, tiny):
        def dtypes(pipe):
            networks = (pipe.unet, pipe.text_encoder, pipe.vae)
            return {p.dtype for network in networks for p in network.parameters()}

        assert dtypes(tiny.shared()) == {torch.float32}
        assert dtypes(tiny.shared(torch.bfloat16)) == {torch.bfloat16}
        assert dtypes(tiny.load(torch_dtype=torch.float16)) == {torch.float16}
        own = {"own": mf.Objective(unet=small_unet())}
        pipe = tiny.load(objectives=own, dtype=torch.bfloat16)
        assert pipe.variants["own"].network.dtype == torch.bfloat16
        assert pipe.to(torch.float32).variants["own"].network.dtype == torch.float32

    def test_components_may_be_replaced(self, tiny):
        unet = small_unet()
        assert tiny.load(unet=unet, objectives={"x": mf.Objective()}).unet is unet

    def test_another_scheduler_becomes_ddim_and_is_said_once(self, tiny_kl, caplog):
        with caplog.at_level(logging.WARNING, logger="msdda_fast"):
            pipe = tiny_kl.load(objectives={"x": mf.Objective()})
            assert isinstance(pipe.scheduler, DDIMScheduler)
            pipe("a red dog", **SHORT)
        assert [r.message for r in caplog.records if "PNDMScheduler" in r.message] == [
            "PNDMScheduler is not DDIM: sampling with DDIMScheduler.from_config"
        ]
        # Stable Diffusion's flags (ALGORITHMS.md 1): no clipping, alpha_bar_0 = 0.99915 at the end
        assert pipe.scheduler.config.clip_sample is False
        assert pipe.scheduler.final_alpha_cumprod == pytest.approx(0.99915)

    def test_a_scheduler_assigned_later_becomes_ddim_too(self, tiny, caplog):
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
        expected = pipe("a red dog", **SHORT).images
        for kind in (PNDMScheduler, DDPMScheduler, DDIMParallelScheduler):
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
            assert torch.equal(pipe("a red dog", **SHORT).images, expected)
        assert len([r for r in caplog.records if "is not DDIM" in r.message]) == 2

    @pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
    def test_schedulers_that_sample_otherwise_are_refused_by_name(self, tiny, calls, kind):
        """Assigned, handed to the constructor, or of a pipeline that `from_pipe` is given."""
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
        ddim = pipe.scheduler
        other = kind() if "Flow" in kind.__name__ else kind.from_config(ddim.config)
        pipe.scheduler = other
        with pytest.raises(
            mf.InvalidSchedule, match=rf"{kind.__name__}.*DDIMScheduler.from_config"
        ):
            pipe("a red dog", **SHORT)
        with pytest.raises(mf.InvalidSchedule, match=kind.__name__):
            mf.MSDDAPipeline.from_pipe(tiny.shared(), scheduler=other)
        assert not calls
        pipe.scheduler = ddim
        assert len(pipe("a red dog", **SHORT).images) == 1

    def test_a_folder_with_such_a_scheduler_is_refused_before_its_weights_are_read(
        self, tiny, tmp_path
    ):
        folder = shutil.copytree(tiny.folder, tmp_path / "model")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(folder / "unet")
        with pytest.raises(mf.InvalidSchedule, match="EulerDiscreteScheduler"):
            mf.MSDDAPipeline.from_pretrained(folder)

    def test_adapters_are_in_training_mode_for_nobody(self, tiny, tmp_path):
        """peft puts adapters in with their dropout on."""
        state = StableDiffusionPipeline.lora_state_dict(tiny.warm, weight_name=WEIGHTS)[0]
        layers = {key.removeprefix("unet."): value for key, value in state.items()}
        config = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": ATTENTION}
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )
        pipe = tiny.load(objectives={"dropped": mf.Objective(tmp_path)})
        first, second = (pipe("a red dog", **SHORT).images for _ in range(2))
        assert torch.equal(first, second)


class TestAdapterFormats:
    """One adapter in every format gives one image."""

    @pytest.fixture(scope="class")
    @staticmethod
    def expected(tiny):
        return tiny.only(mf.Objective("warm"))("a red dog", **SHORT).images

    @staticmethod
    def run(tiny, source, **options):
        objectives = {"warm": mf.Objective(source, **options)}
        return tiny.load(objectives=objectives)("a red dog", **SHORT).images

    @pytest.mark.full  # three loads; places are told apart in TestHub
    def test_file_folder_and_subfolder(self, tiny, expected):
        name = "pytorch_lora_weights.safetensors"
        for source, options in (
            (tiny.warm / name, {}),
            (str(tiny.warm), {"weight_name": name}),
            (tiny.warm.parent, {"subfolder": "warm"}),
        ):
            assert torch.equal(self.run(tiny, source, **options), expected)

    def test_saved_from_the_network_itself(self, tiny, expected, tmp_path):
        stock = tiny.stock("warm")
        stock.unet.save_lora_adapter(tmp_path, adapter_name="warm")
        assert torch.equal(self.run(tiny, tmp_path), expected)

    def test_peft_folder(self, tiny, expected, tmp_path):
        peft_folder(tiny, tmp_path)
        assert torch.equal(self.run(tiny, tmp_path), expected)

    def test_kohya_file(self, tiny, expected, tmp_path):
        state = load_file(tiny.warm / "pytorch_lora_weights.safetensors")
        kohya = {}
        for key, value in state.items():
            module, _, kind = key.removeprefix("unet.").rpartition(".lora_")
            name = "lora_unet_" + module.replace(".", "_")
            part = "lora_down" if kind.startswith("A") else "lora_up"
            kohya[f"{name}.{part}.weight"] = value
            kohya[f"{name}.alpha"] = torch.tensor(6.0)
        save_file(kohya, tmp_path / "kohya.safetensors")
        assert torch.allclose(self.run(tiny, tmp_path), expected, atol=1e-5)

    def test_text_encoder_part_changes_its_own_objective_only(self, tiny, tmp_path):
        text_encoder = copy.deepcopy(tiny.stock().text_encoder)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            both = write_adapter(tmp_path, small_unet(), text_encoder=text_encoder)
        objectives = {"both": mf.Objective(both), "plain": mf.Objective.base()}
        pipe = tiny.load(objectives=objectives)
        stock = quiet(StableDiffusionPipeline.from_pretrained(tiny.folder))
        stock.load_lora_weights(both, weight_name=WEIGHTS, adapter_name="both")
        request = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
        expected = stock(PROMPTS, generator=torch.manual_seed(1), eta=1.0, **request).images
        actual = pipe(PROMPTS, generator=torch.manual_seed(1), weights=(1, 0), **request).images
        assert torch.allclose(actual, expected, atol=1e-4)
        plain = tiny.only(mf.Objective.base())
        assert torch.equal(
            pipe(PROMPTS, weights=(0, 1), **SHORT).images, plain(PROMPTS, **SHORT).images
        )


class TestHub:
    """A repository is what the hub client says it is; here, a folder."""

    @pytest.fixture
    def repository(self, tmp_path, monkeypatch):
        folder = tmp_path / "repository"

        def download(repo, file, **options):
            assert repo == "owner/lora" and options == {"token": "t"}
            if not (folder / file).is_file():
                raise EntryNotFoundError(file)
            return str(folder / file)

        def listing(api, repo):
            return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]

        monkeypatch.setattr(sources, "hf_hub_download", download)
        monkeypatch.setattr(sources.HfApi, "list_repo_files", listing)
        return folder

    def test_adapters_by_subfolder_and_by_weight_name(self, tiny, repository):
        shutil.copytree(tiny.warm, repository / "sub")
        shutil.copy(tiny.cool / "pytorch_lora_weights.safetensors", repository / "c.safetensors")
        objectives = {
            "warm": mf.Objective("owner/lora", subfolder="sub"),
            "cool": mf.Objective("owner/lora", weight_name="c.safetensors", eta=0.8),
            "only": mf.Objective("owner/lora", eta=0.8),  # the one at the top
        }
        pipe = tiny.load(objectives=objectives, token="t")
        expected = tiny.shared()(PROMPTS, weights=(0.3, 0.7), **SHORT).images
        for weights in ((0.3, 0.7, 0), (0.3, 0, 0.7)):
            assert_close(pipe(PROMPTS, weights=weights, **SHORT).images, expected)

    @pytest.mark.parametrize("subfolder", [None, "sub"])
    def test_peft_keeps_its_config_by_weight_name(self, tiny, repository, subfolder):
        name = "adapter_model.safetensors"
        folder = peft_folder(tiny, repository / (subfolder or "."))
        assert (folder / name).is_file()
        objective = mf.Objective("owner/lora", weight_name=name, subfolder=subfolder)
        (file,) = sources.adapter_files(objective, {"token": "t"})
        adapter = AdapterFile.read("x", file, StableDiffusionFormat(small_unet()))
        assert set(adapter.parts["unet"].alphas.values()) == {6.0}

    def test_what_is_not_there_is_named(self, tiny, repository):
        repository.mkdir()
        for options, error, message in (
            ({}, ValueError, "owner/lora.*weight_name.*none"),
            ({"weight_name": "x.safetensors"}, FileNotFoundError, r"owner/lora.*x\.safetensors"),
        ):
            with pytest.raises(error, match=message):
                tiny.load(objectives={"x": mf.Objective("owner/lora", **options)}, token="t")

    def test_relative_places_in_a_repository_become_its_subfolders(self):
        text = '{"a": {"source": "a", "subfolder": "b"}, "n": {"unet": "n"}, "p": {"eta": 0.5}}'
        objectives = parse_objectives(text, "owner/model")
        assert (objectives["a"].source, objectives["a"].subfolder) == ("owner/model", "a/b")
        assert (objectives["n"].unet, objectives["n"].subfolder) == ("owner/model", "n")
        assert objectives["p"] == mf.Objective.base(eta=0.5)


class TestRefused:
    """Every one before a network runs, and by name."""

    @pytest.mark.parametrize(
        "source, message",
        [
            ("/no/such/folder", "no file or folder at /no/such/folder"),
            ("owner/no.safetensors", "no file or folder at owner/no.safetensors"),
            ("owner/no-such-repository", "owner/no-such-repository.*neither a local"),
        ],
    )
    def test_missing_model_and_missing_adapter(self, tiny, source, message):
        with pytest.raises(FileNotFoundError, match=message):
            mf.MSDDAPipeline.from_pretrained(source)
        with pytest.raises(FileNotFoundError, match=message):
            tiny.load(objectives={"x": mf.Objective(source)})

    def test_a_folder_that_is_no_pipeline(self, tiny):
        with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
            mf.MSDDAPipeline.from_pretrained(tiny.warm)

    def test_an_adapter_for_another_base_names_the_first_module(self, tiny, tmp_path):
        with torch.random.fork_rng():
            other = write_adapter(tmp_path, small_unet(channels=32))
        first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
        with pytest.raises(mf.AdapterMismatch, match=rf"'x'.*{first}.*\(32, 32\).*\(16, 16\)"):
            tiny.load(objectives={**tiny.objectives(), "x": mf.Objective(other)})

    def test_an_adapter_for_another_text_width(self, tiny, tmp_path):
        with torch.random.fork_rng():
            other = write_adapter(tmp_path, small_unet(width=24))
        with pytest.raises(mf.AdapterMismatch, match=r"attn2.*\(16, 24\).*\(16, 16\)"):
            tiny.load(objectives={"x": mf.Objective(other)})

    def test_a_network_for_another_text_width(self, tiny):
        with pytest.raises(mf.AdapterMismatch, match=r"'x'.*cross_attention_dim 24.*16"):
            tiny.load(objectives={"x": mf.Objective(unet=small_unet(width=24))})

    def test_a_unet_that_is_none_and_a_distilled_one(self, tiny):
        with pytest.raises(ValueError, match=r"'x'.*UNet2DConditionModel.*Linear"):
            tiny.load(objectives={"x": mf.Objective(unet=torch.nn.Linear(1, 1))})
        distilled = small_unet()
        distilled.register_to_config(time_cond_proj_dim=32)
        with pytest.raises(ValueError, match="time_cond_proj_dim is 32"):
            tiny.load(unet=distilled)

    @pytest.mark.parametrize(
        "objectives", [{}, {" ": mf.Objective()}, {"a": "path"}, {"": mf.Objective()}]
    )
    def test_objectives_that_are_none(self, tiny, objectives):
        with pytest.raises(ValueError, match="objective"):
            tiny.load(objectives=objectives)

    def test_dtypes(self, tiny):
        with pytest.raises(ValueError, match=r"torch\.float16.*int8"):
            tiny.load(dtype=torch.int8)
        with pytest.raises(ValueError, match="give only one"):
            tiny.load(dtype=torch.float16, torch_dtype=torch.float32)

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{", "not JSON"),
            ("[1]", "map names"),
            ('{"a": {"etta": 1}}', "'etta'.*eta"),
            ("{}", "empty"),
            pytest.param("[" * 100_000, "not JSON", id="deep"),
            ('{"a": {"eta": "1"}}', "objective 'a': eta must be a number, got '1'"),
            ('{"a": {"scale": null}}', "scale must be a number"),
            ('{"a": {"eta": NaN}}', "objective 'a'.*eta must lie in"),
            ('{"a": {"source": 1}}', "source must be a text"),
            ('{"a": {"source": "../warm"}}', "'../warm' lies outside this folder"),
            ('{"a": {"source": "warm/../../warm"}}', "lies outside"),
            ('{"a": {"source": "/etc"}}', "'/etc' lies outside"),
            ('{"a": {"unet": "/etc"}}', "'/etc' lies outside"),
            ('{"a": {"source": "..\\\\warm"}}', "lies outside"),
            ('{"a": {"source": "warm", "subfolder": "../.."}}', "lies outside"),
            ('{"a": {"source": "warm", "weight_name": "/etc/x.safetensors"}}', "lies outside"),
        ],
    )
    def test_objectives_json(self, tiny, tmp_path, text, message):
        shutil.copytree(tiny.folder, tmp_path / "model")
        (tmp_path / "model" / "objectives.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            mf.MSDDAPipeline.from_pretrained(tmp_path / "model")

    def test_places_of_a_repository_stay_inside_it(self):
        for entry in ('{"source": "../x"}', '{"unet": "/x"}', '{"source": "x", "subfolder": ".."}'):
            with pytest.raises(ValueError, match=r"owner/model.*outside"):
                parse_objectives(f'{{"a": {entry}}}', "owner/model")

    def test_links_count_where_they_lead(self, tiny, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "link").symlink_to(tiny.warm)
        (folder / "inside").symlink_to(folder)
        with pytest.raises(ValueError, match="'link' lies outside"):
            parse_objectives('{"a": {"source": "link"}}', folder)
        assert parse_objectives('{"a": {"source": "inside"}}', folder)
        # the hub's cache
        snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (blobs / "2").write_bytes(b"")
        (snapshot / "a.safetensors").symlink_to(blobs / "2")
        assert parse_objectives('{"a": {"source": "a.safetensors"}}', snapshot)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"num_train_timesteps": 10**10}, "num_train_timesteps must be 1 to 100000, got 10000"),
            ({"num_train_timesteps": 0}, "num_train_timesteps"),
            ({"num_train_timesteps": 1e3}, "num_train_timesteps"),
            ({"beta_start": math.nan}, r"beta_start must lie in \(0, 1\], got nan"),
            ({"beta_end": math.inf}, "beta_end"),
            ({"beta_start": 0, "beta_end": 0}, "beta_start"),
            ({"beta_end": "0.1"}, "beta_end"),
            ({"trained_betas": [0.1, 0.0]}, "trained_betas"),
            ({"clip_sample_range": -1}, "clip_sample_range"),
        ],
    )
    def test_numbers_of_a_scheduler(self, tmp_path, changes, message):
        file = tmp_path / "scheduler_config.json"
        file.write_text(json.dumps({**DDIMScheduler().config, **changes}))
        with pytest.raises(mf.InvalidSchedule, match=message) as raised:
            check_scheduler_file(file)
        assert str(file) in str(raised.value)

    def test_damaged_folders(self, tiny, tmp_path):
        """Each is named before anything is loaded: there is nothing else in the folder."""
        index = json.loads((tiny.folder / "model_index.json").read_text())
        for text, message in (
            ("{", r"model_index\.json is not a diffusers pipeline's index in JSON"),
            (
                json.dumps({**index, "scheduler": None}),
                r"index\.json must name the scheduler",
            ),
            (json.dumps({**index, "scheduler": ["x"]}), "must name the scheduler"),
            (json.dumps(index), "num_train_timesteps"),
        ):
            (tmp_path / "model_index.json").write_text(text)
            (tmp_path / "scheduler").mkdir(exist_ok=True)
            config = tmp_path / "scheduler" / "scheduler_config.json"
            config.write_text('{"num_train_timesteps": 10000000000}')
            with pytest.raises(ValueError, match=message):
                mf.MSDDAPipeline.from_pretrained(tmp_path)
        assert mf.MSDDAPipeline.from_pretrained(tiny.folder).scheduler.config


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # stock loading of two adapters
class TestFromPipe:
    @pytest.fixture(scope="class")
    @staticmethod
    def stock(tiny):
        stock = tiny.stock.__wrapped__(tiny, "warm")
        stock.load_lora_weights(tiny.cool, weight_name=WEIGHTS, adapter_name="cool")
        stock.set_adapters(["cool", "warm"], [0.25, 0.5])
        return stock

    def test_adapters_by_name(self, tiny, stock):
        expected = tiny.shared()(PROMPTS, weights=(0.3, 0.7), **SHORT).images
        for objectives in (
            {"warm": mf.Objective("warm", eta=1.0), "cool": mf.Objective("cool", eta=0.8)},
            {"warm": mf.Objective(eta=1.0), "cool": mf.Objective(eta=0.8)},
        ):
            pipe = mf.MSDDAPipeline.from_pipe(stock, objectives=objectives)
            assert_close(pipe(PROMPTS, weights=(0.3, 0.7), **SHORT).images, expected)

    def test_every_adapter_without_objectives(self, stock):
        pipe = mf.MSDDAPipeline.from_pipe(stock)
        assert {name: o.eta for name, o in pipe.objectives.items()} == {"warm": 1.0, "cool": 1.0}

    def test_one_adapter_at_two_scales_and_the_base(self, tiny, stock, calls):
        objectives = {
            "full": mf.Objective("warm"),
            "half": mf.Objective("warm", scale=0.5),
            "plain": mf.Objective.base(),
        }
        pipe = mf.MSDDAPipeline.from_pipe(stock, objectives=objectives)
        half = pipe(PROMPTS, weights=(0, 1, 0), **SHORT).images
        alone = tiny.only(mf.Objective("warm", scale=0.5))
        assert_close(half, alone(PROMPTS, **SHORT).images)
        pipe.set_forward("sequential")
        calls.clear()
        pipe(PROMPTS, **SHORT)
        assert calls == [("warm",), ("warm",), ()] * 2
        # a product does not depend on its order
        swapped = {name: objectives[name] for name in ("half", "full", "plain")}
        other = mf.MSDDAPipeline.from_pipe(stock, objectives=swapped)
        both, same = (p(PROMPTS, weights=(0.5, 0.5, 0), **SHORT).images for p in (pipe, other))
        assert torch.allclose(both, same, atol=1e-4)

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_source_stays_as_it_was(self, stock, fails):
        request = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
        before = parameters(stock)
        scheduler = dict(stock.scheduler.config)
        image = stock("a red dog", generator=torch.manual_seed(0), **request).images
        training = [name for name, module in stock.unet.named_modules() if module.training]
        pipe = mf.MSDDAPipeline.from_pipe(stock)

        def stop(*_):
            raise RuntimeError("stop")

        if fails:
            with pytest.raises(RuntimeError, match="stop"):
                pipe(PROMPTS, callback_on_step_end=stop, **SHORT)
        else:
            pipe(PROMPTS, **SHORT)
        after = parameters(stock)
        assert before.keys() == after.keys()
        for name, (identity, dtype, grad, values) in before.items():
            assert after[name][:3] == (identity, dtype, grad), name
            assert torch.equal(after[name][3], values), name
        assert stock.get_active_adapters() == ["cool", "warm"]
        assert dict(stock.scheduler.config) == scheduler
        assert [n for n, module in stock.unet.named_modules() if module.training] == training
        again = stock("a red dog", generator=torch.manual_seed(0), **request).images
        assert torch.equal(image, again)

    def test_the_dtype_of_every_component_is_kept(self, stock):
        source = StableDiffusionPipeline(
            **{
                **stock.components,
                "vae": copy.deepcopy(stock.vae).to(torch.float64),
                "unet": copy.deepcopy(stock.unet).to(torch.bfloat16),
            },
            requires_safety_checker=False,
        )
        pipe = mf.MSDDAPipeline.from_pipe(source)
        assert (pipe.vae.dtype, pipe.unet.dtype) == (torch.float64, torch.bfloat16)
        assert pipe.vae is source.vae and pipe.unet is source.unet

    def test_objectives_of_another_of_our_pipelines_carry_over(self, tiny):
        first = tiny.shared()
        second = mf.MSDDAPipeline.from_pipe(first)
        assert second.objectives == first.objectives and second.unet is first.unet
        base = mf.MSDDAPipeline.from_pipe(first, objectives={"base": mf.Objective.base()})
        assert list(base.objectives) == ["base"]

    def test_refused(self, tiny, stock):
        with pytest.raises(mf.UnknownObjective, match=r"'hot'.*warm, cool.*load_lora_weights"):
            mf.MSDDAPipeline.from_pipe(stock, objectives={"x": mf.Objective("hot")})
        stock.fuse_lora(adapter_names=["warm"])
        with pytest.raises(ValueError, match=r"warm.*unfuse_lora"):
            mf.MSDDAPipeline.from_pipe(stock)
        stock.unfuse_lora()


class TestSavePretrained:
    def test_round_trip(self, tiny, tmp_path):
        objectives = {
            "warm": mf.Objective(tiny.warm, eta=1.0, guidance_scale=2.0),
            "cool": mf.Objective(tiny.cool, eta=0.8, scale=0.5),
            "own": mf.Objective(unet=small_unet(), eta=0.9),
            "plain": mf.Objective.base(eta=0.7),
        }
        pipe = tiny.load(objectives=objectives)
        expected = pipe(PROMPTS, **{**SHORT, "guidance_scale": None}).images
        pipe.save_pretrained(tmp_path / "saved")
        moved = shutil.move(tmp_path / "saved", tmp_path / "moved")  # nothing points outside
        loaded = quiet(mf.MSDDAPipeline.from_pretrained(moved))
        assert torch.equal(loaded(PROMPTS, **{**SHORT, "guidance_scale": None}).images, expected)
        for name, objective in objectives.items():
            again = loaded.objectives[name]
            assert (again.eta, again.scale, again.guidance_scale) == (
                objective.eta, objective.scale, objective.guidance_scale,
            )  # fmt: skip
        assert sorted(p.name for p in tmp_path.iterdir()) == ["moved"]

    def test_any_name_a_person_types(self, tiny, tmp_path):
        """Names of modules, of what modules have, and of places; each keeps all its tensors."""
        names = ["1", "to_q", "type", "../a.b", "A/B", "a_b"]
        sources = [tiny.warm, tiny.cool]
        pipe = tiny.load(
            objectives={n: mf.Objective(sources[i % 2], eta=0.8) for i, n in enumerate(names)}
        )
        weights = {name: (1 + i) / 21 for i, name in enumerate(names)}
        expected = pipe("a red dog", weights=weights, **SHORT).images
        assert list(pipe.objectives) == names
        two = tiny.shared()("a red dog", weights=(9 / 21, 12 / 21), etas=(0.8, 0.8), **SHORT)
        assert_close(expected, two.images)
        pipe.save_pretrained(tmp_path / "saved")
        folders = sorted((tmp_path / "saved" / "objectives").iterdir())
        assert len(folders) == len(names) == len({f.name.casefold() for f in folders})
        assert all(re.fullmatch(r"[\w-]+", folder.name, re.ASCII) for folder in folders)
        for folder in folders:
            assert len(load_file(folder / "pytorch_lora_weights.safetensors")) == 64
        loaded = quiet(mf.MSDDAPipeline.from_pretrained(tmp_path / "saved"))
        assert list(loaded.objectives) == names
        assert torch.equal(loaded("a red dog", weights=weights, **SHORT).images, expected)

    def test_alphas_and_ranks_of_modules_are_saved(self, tiny, tmp_path):
        """Ours and stock diffusers read them back."""
        state = load_file(tiny.warm / "pytorch_lora_weights.safetensors")
        stems = [key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key]
        for at, stem in enumerate(stems):
            state[f"{stem}.alpha"] = torch.tensor(1.0 + at % 3)
        for side, axis in (("A", 0), ("B", 1)):  # the first module has rank 1
            key = f"{stems[0]}.lora_{side}.weight"
            state[key] = state[key].narrow(axis, 0, 1).contiguous()
        save_file(state, tmp_path / "x.safetensors")
        pipe = tiny.load(objectives={"x": mf.Objective(tmp_path / "x.safetensors")})
        pipe.save_pretrained(tmp_path / "saved")
        again = quiet(mf.MSDDAPipeline.from_pretrained(tmp_path / "saved"))
        expected = pipe("a red dog", **SHORT).images
        assert torch.equal(again("a red dog", **SHORT).images, expected)
        stock = StableDiffusionPipeline.from_pretrained(tiny.folder)
        saved = tmp_path / "saved" / "objectives" / "x"
        stock.load_lora_weights(saved, weight_name=WEIGHTS, adapter_name="x")
        for at, stem in enumerate(stems):
            scale = (1.0 + at % 3) / (1 if at == 0 else 2)
            for network in (pipe.unet, stock.unet):
                path = stem.removeprefix("unet.")
                assert network.get_submodule(path).scaling["x"] == scale, path

    def test_what_is_no_plain_lora_is_not_saved_as_one(self, tiny, tmp_path):
        stock = StableDiffusionPipeline.from_pretrained(tiny.folder)
        config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
        stock.unet.add_adapter(config, "x")
        pipe = mf.MSDDAPipeline.from_pipe(stock, objectives={"x": mf.Objective("x")})
        with pytest.raises(mf.AdapterMismatch, match=r"'x' is not a plain LoRA in '.*to_q'"):
            pipe.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())

    @pytest.mark.full  # the round trip is above
    def test_text_encoder_adapters_are_saved(self, tiny, tmp_path):
        text_encoder = copy.deepcopy(tiny.stock().text_encoder)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            both = write_adapter(tmp_path / "a", small_unet(), text_encoder=text_encoder)
        pipe = tiny.load(objectives={"both": mf.Objective(both)})
        pipe.save_pretrained(tmp_path / "saved")
        loaded = quiet(mf.MSDDAPipeline.from_pretrained(tmp_path / "saved"))
        assert torch.equal(loaded(PROMPTS, **SHORT).images, pipe(PROMPTS, **SHORT).images)

    def test_stock_diffusers_loads_the_base(self, tiny, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "saved")
        stock = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved"))
        assert type(stock) is StableDiffusionPipeline
        request = dict(num_inference_steps=2, output_type="latent")
        expected = tiny.stock()("a red dog", generator=torch.manual_seed(0), **request).images
        actual = stock("a red dog", generator=torch.manual_seed(0), **request).images
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_stock_diffusers_draws_with_what_was_saved_in_half_precision(
        self, tiny, tmp_path, dtype
    ):
        tiny.shared(dtype).save_pretrained(tmp_path / "model")
        stock = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "model"))
        networks = (stock.unet, stock.vae, stock.text_encoder)
        assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
        ours = mf.MSDDAPipeline.from_pretrained(
            tmp_path / "model", objectives={"base": mf.Objective.base()}
        )
        request = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
        expected = stock(PROMPTS, generator=torch.manual_seed(0), eta=1.0, **request).images
        assert_close(ours(PROMPTS, generator=torch.manual_seed(0), **request).images, expected)
        kept = tiny.shared(dtype).text_encoder.state_dict()  # float32 holds the same numbers
        for key, value in stock.text_encoder.state_dict().items():
            assert torch.equal(value.to(dtype), kept[key]), key

    def test_a_failed_save_leaves_the_folder_as_it_was(self, pipe, tmp_path, monkeypatch):
        folder = tmp_path / "saved"
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text("mine")
        files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            pipe.save_pretrained(folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
        monkeypatch.undo()
        pipe.save_pretrained(folder)
        assert (folder / "README.md").read_text() == "mine"
        assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_conventions_of_diffusers(tiny, pipe):
    assert isinstance(pipe, DiffusionPipeline)
    assert set(pipe.components) == set(tiny.stock().components)
    assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
    assert pipe.to("cpu") is pipe
    rebuilt = quiet(mf.MSDDAPipeline(**pipe.components, requires_safety_checker=False))
    assert list(rebuilt.objectives) == ["base"]
