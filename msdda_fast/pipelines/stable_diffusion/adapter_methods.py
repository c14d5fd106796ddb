# SPDX-License-Identifier: Apache-2.0
"""What diffusers' adapter methods do on a pipeline whose objectives switch adapters themselves.

Those that change what is loaded work as in stock pipelines, and the next call refuses what the
objectives cannot follow; those that only choose what is active are refused.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from msdda_fast.adapters.switching import adapter_names
from msdda_fast.errors import AdapterMismatch, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.accelerated import Accelerated
from msdda_fast.pipelines.stable_diffusion.held_adapters import HeldAdapters

__all__ = ["AdapterMethods"]


class AdapterMethods(Accelerated, DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Mixin before a diffusers pipeline with a UNet."""

    _held: HeldAdapters

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Load an adapter; it becomes an objective in `from_pipe(pipe)`, not in this pipeline.

        Until it is removed or used under the name of an objective, calls raise `AdapterMismatch`.
        """
        if self._held.spare is None:
            self._held.spare = frozenset(adapter_names(self.unet, self.text_encoder))
        super().load_lora_weights(*args, **kwargs)
        self.watch_adapters()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete adapters; calls raise `AdapterMismatch` while an objective misses its own."""
        super().delete_adapters(adapter_names)
        self.watch_adapters()

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Take fused adapters out of the weights."""
        super().unfuse_lora(*args, **kwargs)
        self.watch_adapters()

    def get_active_adapters(self) -> list[str]:
        """Return the adapters of the objectives, each of which runs alone in its turn."""
        adapters = (variant.adapter for variant in self.variants.values())
        return [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Raise `AdapterMismatch`: preferences between adapters are `weights=` of the call."""
        raise AdapterMismatch(
            "set_adapters() has no effect on objectives, which run with their own adapter each: "
            "use weights= in the call, Objective(scale=...), or from_pipe(pipe, objectives=...)"
        )

    def disable_lora(self) -> None:
        """Raise `AdapterMismatch`: the model without adapters is `Objective.base()`."""
        raise AdapterMismatch(
            "disable_lora() has no effect on objectives, which run with their own adapter each: "
            'use from_pipe(pipe, objectives={"base": Objective.base()})'
        )

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Raise `UnsupportedNetwork`: image prompts are not supported."""
        raise UnsupportedNetwork("IP-Adapters are not supported: objectives take no image prompts")

    def unused_adapters(self) -> list[str]:
        """Return the adapters loaded since the objectives were set that are none of them."""
        return list(dict.fromkeys(self._held.unused(self.all_variants, self.text_encoder)))

    def watch_adapters(self) -> None:
        """From now on, calls refuse what others activate, scale or disable in the networks."""
        if self._held.spare is not None:
            self._held.watch([self.unet, self.text_encoder])
