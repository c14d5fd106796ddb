# SPDX-License-Identifier: Apache-2.0
"""What the call of a pipeline takes, read off its signature: nothing is written per family."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msdda_fast.errors import UnsupportedNetwork

__all__ = ["StockCall"]

_COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_VIDEO = ("num_frames", "num_videos_per_prompt")
#: Our names of arguments, where the families have several.
_OURS = ("guidance_scale", "strength", "image_strength", "num_images")


@dataclass(frozen=True, slots=True)
class StockCall:
    """The call of a class of pipelines.

    Attributes:
        kind: Name of the class.
        captured: Whether it is `MSDDAPipeline`, whose call has `mode` and guidance by objective.
        defaults: The arguments of the call, with their defaults.
    """

    kind: str
    captured: bool
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, kind: Any) -> StockCall:  # noqa: ANN401 - a class of pipelines, stock or ours
        """Read the call of a class of pipelines, with objectives or without."""
        parameters = inspect.signature(kind.__call__).parameters.values()
        return cls(
            kind=kind.__name__,
            captured=kind.__name__ == "MSDDAPipeline",
            defaults={p.name: p.default for p in parameters if p.name != "self"},
        )

    @property
    def makes(self) -> Literal["images", "video", "audio"]:
        """What it draws."""
        if "num_waveforms_per_prompt" in self.defaults or "audio_length_in_s" in self.defaults:
            return "audio"
        return "video" if any(name in self.defaults for name in _VIDEO) else "images"

    @property
    def guidance(self) -> str | None:
        """The argument for guidance: where there are two, that which has a number by default.

        FLUX has guidance_scale, an input of its network; Qwen-Image true_cfg_scale.
        """
        names = [name for name in ("guidance_scale", "true_cfg_scale") if name in self.defaults]
        return next((name for name in names if self.defaults[name] is not None), (*names, None)[0])

    def argument(self, name: str) -> str | None:
        """Return the stock argument that one of ours stands for; None: the family has none.

        Args:
            name: A name of the stock call, "guidance_scale" for guidance whatever it is called,
                "strength" of the objectives, "image_strength" (diffusers' `strength` of image to
                image), or "num_images" of each prompt.
        """
        if name == "negative_prompt" and self.defaults.get("true_cfg_scale") == 1.0:
            return None  # ignored, with the guidance that the family has by default
        if name not in _OURS:
            return name if name in self.defaults else None
        if name == "guidance_scale":
            return name if self.captured else self.guidance
        if name == "num_images":
            return next((copies for copies in _COPIES if copies in self.defaults), None)
        if name == "strength":
            return "strength" if self.captured else "objective_strength"
        return "strength" if "strength" in self.defaults and not self.captured else None

    def check(self, names: Collection[str], labels: Mapping[str, str] | None = None) -> None:
        """Refuse arguments that the family does not have, or would ignore.

        Args:
            names: As in `argument`; all that will be given.
            labels: What messages call them; None: by their names.

        Raises:
            UnsupportedNetwork: The family does not have one of them; `field` is its name.
        """
        given = set(names)
        for name in names:
            if reason := self._refusal(name, given):
                error = UnsupportedNetwork(f"{(labels or {}).get(name, name)}: {reason}")
                error.field = name
                raise error

    def _refusal(self, name: str, given: set[str]) -> str | None:
        if self.argument(name) is None:
            if name in self.defaults:
                return f"{self.kind} ignores it unless true_cfg_scale is above 1; call it in Python"
            return f"{self.kind} takes no {name}"
        ours = name == "guidance_scale" and self.argument(name) == "true_cfg_scale"
        if ours and "negative_prompt" not in given:
            return f"{self.kind} guides away from a negative prompt only; give one, such as ' '"
        return None

    def arguments(self, **wanted: Any) -> dict[str, Any]:  # noqa: ANN401 - of any call
        """Return arguments of the stock call.

        Args:
            wanted: By the names of `argument`; those that are None are left to the family.

        Raises:
            UnsupportedNetwork: As `check`.
        """
        given = {name: value for name, value in wanted.items() if value is not None}
        self.check(given)
        return {str(self.argument(name)): value for name, value in given.items()}
