# SPDX-License-Identifier: Apache-2.0
"""The peft layers of any network, run for M objectives at once.

An objective is a set of adapters with scales; the empty set is the base. The rows of every layer's
input are objective-major, (M R, ...): the base layer runs once on all of them, and each adapter on
the rows of its objective. A plain LoRA of a linear layer costs two batched products whatever M and
the number of adapters, since the factors of a set are concatenated; everything else that peft knows
(convolutions, embeddings, DoRA, LoKr, ...) runs objective by objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msdda_fast.adapters.grouped_sites import site_of
from msdda_fast.adapters.network_state import AdapterState
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.errors import AdapterMismatch

__all__ = ["GroupedAdapters", "tuner_layers"]


def tuner_layers(network: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """Return the paths and layers that hold adapters, in the network's order."""
    return [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


class GroupedAdapters:
    """The adapters of M objectives in one network, applied to objective-major rows.

    Args:
        network: Any network with or without peft layers.
        sets: The adapters of each objective, M >= 1.

    Raises:
        AdapterMismatch: An adapter is not in the network, or adapters are merged into its weights.
    """

    def __init__(self, network: nn.Module, sets: Sequence[AdapterSet]) -> None:
        layers = tuner_layers(network)
        for path, layer in layers:
            if layer.merged:
                raise AdapterMismatch(
                    f"adapters {layer.merged_adapters} are fused into the weights of {path!r}; "
                    "call unfuse_lora() first"
                )
        self._sites = [(layer, site_of(layer, path, sets)) for path, layer in layers]
        used = dict.fromkeys(entry for adapters in sets for entry in adapters)
        variants = [Variant(network, *entry) for entry in used]
        self._network = network
        self._state = AdapterState([layer for _, layer in layers], variants)

    def is_current(self) -> bool:
        """Return whether the network's adapters and their scales are still those that were read."""
        layers = [layer for _, layer in tuner_layers(self._network)]
        known = [layer for layer, _ in self._sites]
        return (
            len(layers) == len(known)
            and all(now is then for now, then in zip(layers, known, strict=True))
            and not any(layer.merged for layer in layers)
            and self._state.is_current()
        )

    def take(self, other: GroupedAdapters) -> bool:
        """Run as `other` from now on, at the addresses of this; False: their shapes differ."""
        if [layer for layer, _ in self._sites] != [layer for layer, _ in other._sites]:
            return False
        pairs = [(own, new) for (_, own), (_, new) in zip(self._sites, other._sites, strict=True)]
        if not all(own.fits(new) for own, new in pairs):
            return False
        for own, new in pairs:
            own.take(new)
        self._state = other._state
        return True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network run for all objectives inside this context."""
        for layer, site in self._sites:
            # on the instance: the layer stays where hooks, offloading and `named_modules` find it
            layer.__dict__["forward"] = site
        try:
            yield
        finally:
            for layer, _ in self._sites:
                del layer.__dict__["forward"]
