# SPDX-License-Identifier: Apache-2.0
"""Which arguments of a network have one entry per row, by class of network.

Every tensor whose first axis is as long as the first argument's has rows, unless its class says
otherwise here: a size alone does not tell the ids of four tokens from those of four rows. What a
class needs beyond that is one entry of `ROW_ARGUMENTS`; `verify` finds out where one is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from msdda_fast.adapters.layers import uncompiled

__all__ = ["ROW_ARGUMENTS", "RowArguments", "row_arguments"]


@dataclass(frozen=True, slots=True)
class RowArguments:
    """What is special about the arguments of one class of networks.

    Attributes:
        shared: Names of tensors that all rows share, whatever their size.
        lists: Names of lists with one entry per row.
        axes: Axis of the rows by name, where it is not 0.
    """

    shared: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    axes: MappingProxyType[str, int] = field(default_factory=lambda: MappingProxyType({}))


def _rows(shared: str = "", lists: str = "", axes: dict[str, int] | None = None) -> RowArguments:
    return RowArguments(
        frozenset(shared.split()), frozenset(lists.split()), MappingProxyType(axes or {})
    )


_IDS = _rows(shared="img_ids txt_ids")
_ROPE = _rows(shared="image_rotary_emb")

ROW_ARGUMENTS: dict[str, RowArguments] = {
    "ChromaTransformer2DModel": _IDS,
    "CogVideoXTransformer3DModel": _ROPE,
    "CogView4Transformer2DModel": _ROPE,
    "CosmosTransformer3DModel": _rows(shared="padding_mask"),
    "FluxControlNetModel": _IDS,
    "FluxTransformer2DModel": _IDS,
    "HiDreamImageTransformer2DModel": _rows(
        shared="img_ids", axes={"encoder_hidden_states_llama3": 1}
    ),
    "HunyuanDiT2DModel": _rows(shared="image_rotary_emb style"),
    "LTXVideoTransformer3DModel": _rows(shared="rope_interpolation_scale"),
    "Lumina2Transformer2DModel": _ROPE,
    "OmniGenTransformer2DModel": _rows(lists="input_img_latents"),
    "QwenImageControlNetModel": _rows(lists="img_shapes txt_seq_lens"),
    "QwenImageTransformer2DModel": _rows(lists="img_shapes txt_seq_lens"),
    "ZImageTransformer2DModel": _rows(lists="x cap_feats"),
}

_PLAIN = RowArguments()


def row_arguments(network: nn.Module) -> RowArguments:
    """Return the entry for the network's class, or for the first of its bases that has one."""
    for kind in type(uncompiled(network)).__mro__:
        if kind.__name__ in ROW_ARGUMENTS:
            return ROW_ARGUMENTS[kind.__name__]
    return _PLAIN
