# SPDX-License-Identifier: Apache-2.0
"""How a batched forward is built, and which work it shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msdda_fast.kernels.grouped_lora import Design

__all__ = ["DEFAULTS", "BatchedOptions", "Sharing", "saves_launches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Work that is done once where it is the same; each kind can be switched off for an ablation.

    Attributes:
        prompt_cache: Keys and values of the prompt, once per generation.
        time_table: Time embeddings of all steps and resnets, once per generation.
        prefix: Layers before rows differ, once per image instead of once per row.
        inactive: Objectives whose weight is 0 are not run.
    """

    prompt_cache: bool = True
    time_table: bool = True
    prefix: bool = True
    inactive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedOptions:
    """How a batched forward is built.

    Attributes:
        design: Adapted linear layers; see `kernels.grouped_lora`. "separate" copies no weight;
            "folded" and "merged" hold copies of the adapted layers: for Stable Diffusion 1.5 and
            adapters on attention, 9 % of its weights, "merged" once for each objective.
            Convolutions beyond 1x1 are folded. None: on CUDA in half precision "merged" for each
            layer where it is faithful (`kernels.grouped_lora.merge_error`), else "separate".
        fuse_qkv: One GEMM for q, k and v of self-attention, on a concatenated copy (5 %); None:
            only where `design` is None and merges.
        channels_last: Convolution weights in channels_last layout, copied unless the network has it
            already; None: only on CUDA.
        fused_ops: Norms, activations, sums and biases in kernels of `kernels.group_norm` and
            `kernels.rowwise`, see `batched.ops`; None: only on CUDA in half precision.
        attention: "flash", "efficient", "cudnn" or "math" runs that backend only; "auto" takes the
            first of flash, efficient and math that can run, and on CUDA for each shape of a graph
            the fastest of flash, cudnn and efficient, see `batched.attention_choice`.
        sharing: Which work is done once.
    """

    design: Design | None = None
    fuse_qkv: bool | None = None
    channels_last: bool | None = None
    fused_ops: bool | None = None
    attention: str = "auto"
    sharing: Sharing = Sharing()


DEFAULTS = BatchedOptions()


def saves_launches(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether options that are None take what launches the fewest kernels.

    On CUDA in half precision, where small kernels cost their launches. Elsewhere nothing is rounded
    in another order than in the stock network.
    """
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
