# SPDX-License-Identifier: Apache-2.0
"""What a stock loop adds to each step when its predictions have a hidden objective axis."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from msdda_fast.pipelines.row_hook import RowHook

__all__ = ["hidden_axis"]

SHAPE = (2, 64, 16)  # guidance branches, tokens, channels
NAMES = ("a", "b")


class _Nothing(nn.Module):
    """A network that computes nothing, with the arguments of one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SHAPE[-1], SHAPE[-1])

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        return (self.proj(hidden_states),)


def hidden_axis(stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Return one step of a loop with guidance: plain, and on M = 2 objectives.

    Args:
        stack: Holds the second one's hook.
    """
    plain, hooked = _Nothing().eval(), _Nothing().eval()
    for name in NAMES:
        config = LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            hooked = inject_adapter_in_model(config, hooked, name)
    hook = RowHook("nothing", hooked)
    stack.enter_context(hook.hooked([((name, 1.0),) for name in NAMES]))
    sample, share = torch.randn(SHAPE[1:])[None], torch.tensor([0.3, 0.7]).view(2, 1, 1, 1)
    prompt, pooled = torch.randn(2, 7, 8), torch.randn(2, 8)

    def step(network: nn.Module) -> Tensor:
        # as diffusers' loops have it
        output = network(
            hidden_states=torch.cat([sample] * 2),
            timestep=torch.full((2,), 500.0),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        uncond, cond = output.chunk(2)
        guided: Tensor = uncond + 5.0 * (cond - uncond)
        return guided

    return {
        "plain": lambda: step(plain),
        "hidden": lambda: (step(hooked).stacked * share).sum(0),
    }
