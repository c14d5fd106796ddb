# SPDX-License-Identifier: Apache-2.0
"""The command line with other pipelines than Stable Diffusion: the shipped one, and tiny ones."""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import msdda_fast as mf
from msdda_fast.cli import app as cli
from msdda_fast.cli import drawing
from msdda_fast.cli import generate as cli_generate
from msdda_fast.cli import sweep as cli_sweep
from msdda_fast.cli.session import SHIPPED_FLOW, DType, load
from msdda_fast.pipelines import mp4
from tests.families import encoders, images, videos, xl
from tests.tiny_model import quiet

#: diffusers' own, of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

runner = CliRunner()
W = ("-w", "a=0.3", "-w", "b=0.7")


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


def assert_refused(done, message):
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def folder(tmp_path):
    """A model of which there is nothing but the name of its class."""

    def make(kind):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        return tmp_path / kind

    return make


@pytest.fixture
def use(monkeypatch):
    """Let `generate` use a pipeline of this maker, and return it and the calls of it."""

    def make(maker):
        pipe, call = maker(1)
        pipe = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        monkeypatch.setattr(cli_generate, "load", lambda *_: pipe)
        monkeypatch.setattr(cli_generate, "saved_class", lambda _: type(pipe))
        return pipe, call

    return make


def flux(batch):
    return encoders.with_encoders(images.flux, batch)


def sdxl(batch):
    return encoders.with_encoders(xl.text, batch)


def wan(batch):
    pipe, call = videos.wan(batch)
    texts = {"text_encoder": encoders.t5(), "tokenizer": encoders.Tokenizer()}
    return type(pipe)(**{**pipe.components, **texts}), call


@pytest.fixture(scope="module")
def flow():
    return quiet(load(SHIPPED_FLOW, None, DType.float32, "cpu"))


class TestFlowModel:
    def test_generate_is_the_call_in_python(self, flow, tmp_path):
        done = run(
            "generate", "A red car.", "-m", SHIPPED_FLOW, "-w", "aesthetic=0.3", "-w",
            "consistency=0.7", "-s", "consistency=0.5", "--seed", 5, "--steps", 2, "--guidance", 1,
            "-n", 2, "-o", tmp_path / "x.png", "--height", 64, "--device", "cpu",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        expected = flow(
            "A red car.",
            weights={"aesthetic": 0.3, "consistency": 0.7},
            objective_strength={"consistency": 0.5},
            seed=5,
            num_inference_steps=2,
            guidance_scale=1.0,
            num_images_per_prompt=2,
        ).images
        for index, image in enumerate(expected):
            assert np.array_equal(pixels(tmp_path / f"x-{index}.png"), np.asarray(image))

    def test_sweep_continues(self, flow, monkeypatch, tmp_path):
        monkeypatch.setattr(cli_sweep, "load", lambda *_: flow)
        model = ["-m", SHIPPED_FLOW, "--device", "cpu", "-o", tmp_path]
        sweep = ["sweep", *model, "-p", "A red car.", "--weights", "0,1", "--steps"]
        done = run(*sweep, 1)
        assert done.exit_code == 0 and "base" in done.stdout, done.output
        cells = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*.png")}
        assert len(cells) == 3
        settings = json.loads((tmp_path / "settings.json").read_text())
        assert settings["pipeline"] == "StableDiffusion3Pipeline"
        assert settings["guidance_scale"] == 1.0  # that of its adapters' training
        next(iter(cells)).unlink()
        assert run(*sweep, 1).exit_code == 0
        now = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*.png")}
        assert len(now) == 3 and sum(now[file] == time for file, time in cells.items()) == 2
        assert_refused(run(*sweep, 3), "num_inference_steps was 1, is 3")

    def test_a_prompt_that_all_text_encoders_cut_is_refused(self, flow, monkeypatch, tmp_path):
        monkeypatch.setattr(cli_generate, "load", lambda *_: flow)
        done = run("generate", "a red dog " * 9, "-m", SHIPPED_FLOW, "-o", tmp_path / "x.png")
        assert_refused(done, "has 29 tokens, but the text encoder reads at most 24")


class TestImages:
    def test_sizes_and_guidance_reach_the_family(self, use, tmp_path):
        pipe, _ = use(flux)
        size = ["--height", 16, "--width", 24]
        done = run("generate", "a dog", *W, *size, "--guidance", 2, "--seed", 1, "--steps", 2,
                   "-o", tmp_path / "x.png")  # fmt: skip
        assert done.exit_code == 0, done.output
        expected = pipe(
            "a dog", weights={"a": 0.3, "b": 0.7}, height=16, width=24, guidance_scale=2.0, seed=1,
            num_inference_steps=2,
        ).images[0]  # fmt: skip
        assert np.array_equal(pixels(tmp_path / "x.png"), np.asarray(expected))

    def test_an_image_to_start_from_decides_the_size(self, use, tmp_path):
        pipe, _ = use(flux)
        Image.new("RGB", (41, 34), "red").save(tmp_path / "from.png")
        more = ["--image-strength", 0.6, "--seed", 1, "--steps", 4, "-o", tmp_path / "x.png"]
        done = run("generate", "a dog", *W, "--image", tmp_path / "from.png", *more)
        assert done.exit_code == 0, done.output
        unit = 2 * pipe.vae_scale_factor
        assert pixels(tmp_path / "x.png").shape == (34 - 34 % unit, 41 - 41 % unit, 3)

    @pytest.mark.parametrize("more", [["--image-strength", 0], ["--steps", 1]])
    def test_a_strength_without_steps_is_refused(self, use, tmp_path, more):
        use(sdxl)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "from.png")
        done = run("generate", "a dog", *W, "--image", tmp_path / "from.png", *more)
        assert_refused(done, "--image-strength 0")

    def test_a_mask_says_what_is_repainted(self, use, tmp_path):
        use(sdxl)
        gradient = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
        Image.fromarray(gradient).save(tmp_path / "from.png")
        for name, colour in (("all", "white"), ("none", "black")):
            Image.new("L", (32, 32), colour).save(tmp_path / f"{name}.png")
            done = run(
                "generate", "a dog", *W, "--image", tmp_path / "from.png", "--mask-image",
                tmp_path / f"{name}.png", "--image-strength", 1, "--seed", 1, "--steps", 2, "-o",
                tmp_path / f"made-{name}.png",
            )  # fmt: skip
            assert done.exit_code == 0, done.output
        first, second = (pixels(tmp_path / f"made-{name}.png") for name in ("all", "none"))
        assert not np.array_equal(first, second)

    def test_stable_diffusion_keeps_its_objectives_guidance(self, tiny, monkeypatch, tmp_path):
        guided = {"warm": mf.Objective("warm", guidance_scale=3.0)}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=guided))
        monkeypatch.setattr(cli_generate, "load", lambda *_: pipe)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "from.png")
        asked = []
        monkeypatch.setattr(drawing, "for_task", lambda pipe, task: lambda **k: asked.append(k))
        run("generate", "a dog", "--image", tmp_path / "from.png", "-o", tmp_path / "x.png")
        assert asked[0]["guidance_scale"] == 3.0 and asked[0]["image"].size == (32, 32)
        run("generate", "a dog", "--image", tmp_path / "from.png", "--guidance", 2)
        assert asked[1]["guidance_scale"] == 2.0


class TestVideos:
    @pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
    def test_frames(self, use, tmp_path, suffix):
        use(wan)
        file = tmp_path / f"x.{suffix}"
        size = ["--height", 16, "--width", 16, "--num-frames", 5, "--fps", 8]
        done = run("generate", "a dog", *W, *size, "--seed", 1, "--steps", 1, "-o", file)
        assert done.exit_code == 0, done.output
        with Image.open(file) as video:
            video.load()
            assert (video.n_frames, video.size) == (5, (16, 16))
            assert video.info["duration"] == pytest.approx(125, abs=5)

    def test_mp4_needs_a_package_and_goes_through_diffusers(self, monkeypatch, tmp_path):
        call = drawing.StockCall.of(diffusers.WanPipeline)
        video = drawing.Drawing(call, None, {}, 16.0)
        monkeypatch.setattr(mp4, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"mp4 needs another package \(pip install imageio"):
            video.file("x.mp4")
        monkeypatch.setattr(mp4, "find_spec", lambda name: name)
        written = []
        monkeypatch.setattr(mp4, "export_to_video", lambda *a, **k: written.append((a, k)))
        path, kind = video.file("x.MP4")
        frame = Image.new("RGB", (8, 8))
        video.write([frame], kind, path)
        assert written == [(([frame], "x.MP4"), {"fps": 16})]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("FluxPipeline", ["--negative-prompt", "x"], "--negative-prompt: FluxPipeline ignores it"),
        ("Flux2Pipeline", ["--negative-prompt", "x"], "--negative-prompt: Flux2Pipeline takes no"),
        ("QwenImagePipeline", ["--guidance", 2], "--guidance: QwenImagePipeline guides away from"),
        ("FluxPipeline", ["--mode", "auto"], "--mode auto: FluxPipeline runs exact steps only"),
        ("FluxPipeline", ["--kl-budget", 1], "--kl-budget: FluxPipeline has no --mode auto"),
        ("FluxPipeline", ["--num-frames", 5], "--num-frames: FluxPipeline takes no num_frames"),
        ("FluxPipeline", ["--fps", 5], "--fps: FluxPipeline draws images, not videos"),
        ("FluxPipeline", ["--image-strength", 0.5], "--image-strength needs --image"),
        ("FluxPipeline", ["--mask-image", "x.png"], "--mask-image needs --image"),
        ("FluxPipeline", ["--mask-softness", 2], "--mask-softness needs --mask"),
        ("FluxPipeline", ["--mask", "a=/no.png"], "--mask /no.png: No such file or directory"),
        ("FluxPipeline", ["--mask", "a"], "--mask 'a' must be NAME=FILE"),
        ("FluxPipeline", ["--image", __file__], "not an image that Pillow reads"),
        ("WanPipeline", ["--image", "x.png"], "WanPipeline cannot do image-to-image"),
        ("LTXImageToVideoPipeline", [], "LTXImageToVideoPipeline starts from an image"),
        ("FluxControlNetPipeline", [], "FluxControlNetPipeline needs a control image"),
        ("WanPipeline", ["-o", "x.jpg"], "must end in .webp, .gif, .png, .apng or .mp4"),
        ("StableAudioPipeline", [], "StableAudioPipeline makes sound"),
        ("FluxPipeline", ["-w", "0-499:a=1", "-w", "b=1"], "--weight: give a range of timesteps"),
        ("FluxPipeline", ["--guidance", "nan"], "--guidance must be finite, got nan"),
        (
            "StableDiffusion3Pipeline",
            ["--guidance", 1, "--negative-prompt", "x"],
            "--negative-prompt has no effect with a guidance of 1",
        ),
        ("NoSuchPipeline", [], "names the class 'NoSuchPipeline', which diffusers"),
    ],
)
def test_what_a_family_lacks_is_named_before_it_is_loaded(
    folder, monkeypatch, tmp_path, kind, arguments, message
):
    monkeypatch.setattr(cli_generate, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    assert_refused(run("generate", "a dog", "-m", folder(kind), *arguments), message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("WanPipeline", "WanPipeline makes video, not images"),
        ("FluxFillPipeline", "FluxFillPipeline starts from an image"),
    ],
)
def test_sweeps_draw_images_from_texts(folder, tmp_path, kind, message):
    assert_refused(run("sweep", "-m", folder(kind), "-o", tmp_path / "out"), message)


def test_masks_ranges_and_an_accelerator_are_handed_on(tiny, monkeypatch, tmp_path):
    loaded, asked = [], []
    pipe = tiny.shared()

    def noted(self, **given):
        asked.append(given)
        raise mf.InvalidWeights("noted")

    accelerator = property(lambda _: SimpleNamespace(steps=6))
    monkeypatch.setattr(mf.MSDDAPipeline, "accelerator", accelerator)
    monkeypatch.setattr(mf.MSDDAPipeline, "__call__", noted)
    monkeypatch.setattr(
        mf.MSDDAPipeline, "from_pretrained", lambda *_, **given: loaded.append(given) or pipe
    )
    Image.new("L", (32, 32), 128).save(tmp_path / "half.png")
    run(
        "generate", "a dog", "--mask", f"warm={tmp_path / 'half.png'}", "--mask-softness", 2,
        "-w", "500-999:warm=1", "-w", "500-999:cool=0", "-w", "0-499:warm=0.5", "-w",
        "0-499:cool=0.5", "--accelerator", "own", "-m", tiny.folder, "-o", tmp_path / "x.png",
    )  # fmt: skip
    assert loaded[0]["accelerator"] == "own"
    assert asked[0]["masks"]["warm"].getextrema() == (128, 128) and asked[0]["mask_softness"] == 2
    assert asked[0]["num_inference_steps"] == 6
    assert asked[0]["weights"] == {
        (500, 999): {"warm": 1.0, "cool": 0.0},
        (0, 499): {"warm": 0.5, "cool": 0.5},
    }
