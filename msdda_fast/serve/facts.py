# SPDX-License-Identifier: Apache-2.0
"""What a service says of its model: objectives, sizes, and what requests may ask of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from msdda_fast.batching.engine import Engine
from msdda_fast.batching.request import ImageRequest
from msdda_fast.errors import MSDDAError, UnsupportedNetwork
from msdda_fast.levels import noise_to_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.serve.settings import ServeSettings, sides

__all__ = ["Facts", "check_draws_images"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A model as clients see it; can be pickled.

    Attributes:
        sizes: The served sizes, "WIDTHxHEIGHT", the default first.
        objectives: By the names that weights use.
        family: The class of diffusers that draws.
        capabilities: For each optional field of a request, whether the model can follow it;
            "image" and "mask" are those of edits, "partial_images" and "progress" of streams.
        timesteps: How many the model was trained with: ranges of weights end there.
        accelerator: What it draws with few steps with; None: nothing.
    """

    sizes: Sequence[str]
    objectives: Mapping[str, Objective]
    family: str
    capabilities: Mapping[str, bool]
    timesteps: int
    accelerator: Accelerator | None

    @classmethod
    def of(cls, engine: Engine, settings: ServeSettings) -> Facts:
        """Ask an engine, which knows the family of its model.

        Raises:
            InvalidShape: The model cannot draw one of the sizes in the settings.
            UnsupportedNetwork: It makes videos.
        """
        pipe = engine.pipe
        check_draws_images(type(pipe))
        can = _capabilities(engine)
        sizes = settings.sizes or ("{}x{}".format(*engine.native_size),)
        for width, height in map(sides, sizes):
            image = None if can["text"] else Image.new("RGB", (width, height))
            engine.check(_request(height=height, width=width, image=image))
        return cls(
            sizes=sizes,
            objectives=pipe.objectives,
            family=_family(pipe),
            capabilities=can,
            timesteps=int(pipe.scheduler.config.num_train_timesteps),
            accelerator=pipe.accelerator,
        )

    def described(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        data = [
            {
                "id": name,
                "eta": o.eta,
                "guidance_scale": o.guidance_scale,
                "noise": None if o.noise is None else noise_to_json(o.noise),
            }
            for name, o in self.objectives.items()
        ]
        few = self.accelerator  # without its source, which may be a path
        return {
            "data": data,
            "family": self.family,
            "sizes": list(self.sizes),
            "timesteps": self.timesteps,
            "capabilities": dict(self.capabilities),
            "accelerator": few and {"scheduler": few.scheduler, "steps": few.steps},
        }


def check_draws_images(kind: type) -> None:
    """Refuse a class of pipelines whose results are no images.

    Raises:
        UnsupportedNetwork: They are videos.
    """
    if "num_frames" in inspect.signature(kind.__call__).parameters:
        raise UnsupportedNetwork(f"{kind.__name__} makes videos, and the API is one of images")


def _family(pipe: Any) -> str:  # noqa: ANN401 - of any class
    return "StableDiffusionPipeline" if isinstance(pipe, MSDDAPipeline) else type(pipe).__name__


def _capabilities(engine: Engine) -> dict[str, bool]:
    size = engine.native_size
    image, white = Image.new("RGB", size), Image.new("L", size, 255)
    fields: Mapping[str, Mapping[str, Any]] = {
        "text": {},
        "image": {"image": image},
        "mask": {"image": image, "mask_image": white},
        "masks": {"masks": {next(iter(engine.pipe.objectives)): white}},
        "negative_prompt": {"negative_prompt": "a"},
        "guidance_scale": {"guidance_scale": 2.0},
        "partial_images": {"preview_steps": (1,), "on_step": print},
        "progress": {"on_step": print},
    }
    can = {name: _admits(engine, given) for name, given in fields.items()}
    if not can["text"]:  # what draws from images alone says the rest beside one
        for name in ("masks", "negative_prompt", "guidance_scale", "partial_images", "progress"):
            can[name] = _admits(engine, {"image": image, **fields[name]})
    return can


def _admits(engine: Engine, given: Mapping[str, Any]) -> bool:
    try:
        engine.check(_request(**given))
    except MSDDAError:
        return False
    return True


def _request(**given: Any) -> ImageRequest:  # noqa: ANN401 - fields of a request
    return ImageRequest("", seed=0, num_inference_steps=4, **given)
