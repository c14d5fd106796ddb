# SPDX-License-Identifier: Apache-2.0
"""One DPOK run: its task, its state, one loop, and the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast import resume
from msdda_fast.files import write_atomically
from msdda_fast.rewards import Reward
from msdda_fast.training.adapter import (
    base_model,
    lora_parameters,
    lora_state,
    network_identity,
    restore_lora,
)
from msdda_fast.training.checkpoint import load_checkpoint
from msdda_fast.training.dpok import dpok_loss, kl_term
from msdda_fast.training.dpok_config import DPOKConfig
from msdda_fast.training.policy import DDIMPolicy, Transitions, gaussian_log_prob
from msdda_fast.training.rollout import DecodeFn, roll_out
from msdda_fast.training.storage import canonical
from msdda_fast.training.value import ValueNetwork
from msdda_fast.types import Scheduler

CHECKPOINT_NAME = "checkpoint.pt"
# May differ between a run and its continuation: none of them alters a loop already made.
_FREE_FIELDS = ("loops", "checkpoint_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a policy is trained for: prompts, their embeddings, and the reward of images."""

    reward: Reward
    decode: DecodeFn
    prompts: Sequence[str]  # P, without repetition
    prompt_embeds: Tensor  # text encoder output, (P, L, D)
    latent_shape: Sequence[int]  # S, of one latent
    null_embeds: Tensor | None = None  # of the empty prompt, (L, D); needed for guidance


class DPOKRun:
    """The state that a checkpoint holds: both networks, optimisers, buffer, random generator."""

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Scheduler,
        task: Task,
        config: DPOKConfig,
        weight_dtype: torch.dtype,
        out_dir: Path,
        accelerator: Accelerator,
    ) -> None:
        prompts = list(task.prompts)
        if len(set(prompts)) != len(prompts) or len(prompts) < config.prompts_per_loop:
            raise ValueError(
                f"prompts must be without repetition and at least prompts_per_loop = "
                f"{config.prompts_per_loop}, got {len(prompts)} with {len(set(prompts))} different"
            )
        if task.prompt_embeds.shape[0] != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many rows of prompt_embeds, "
                f"got shape {tuple(task.prompt_embeds.shape)}"
            )
        self.task, self.config, self.accelerator = task, config, accelerator
        self.path = out_dir / CHECKPOINT_NAME
        self.parameters = lora_parameters(unet)
        self.unet = unet.to(accelerator.device).eval()
        self.policy = DDIMPolicy(
            unet,
            scheduler,
            task.prompt_embeds,
            task.null_embeds,
            num_steps=config.num_steps,
            eta=config.eta,
            guidance_scale=config.guidance_scale,
            autocast=accelerator.autocast,
        )
        self.optimizer = accelerator.prepare(
            torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)
        )
        accelerator.step = 0  # a run killed in the middle of an accumulation may have shared it
        self.text = task.prompt_embeds.detach().float().mean(1).to(accelerator.device)
        dims = torch.Size(task.latent_shape).numel()
        self.value = ValueNetwork(dims, self.text.shape[1], config.num_steps, seed=config.seed)
        self.value.to(accelerator.device)
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), lr=config.value_lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer: Transitions | None = None
        fixed = {k: v for k, v in asdict(config).items() if k not in _FREE_FIELDS}
        self.identity = {
            **fixed,
            "reward": resume.named(task.reward),
            "decode": resume.named(task.decode),
            "latent_shape": list(task.latent_shape),
            "prompts": prompts,
            "prompt_embeds": resume.digest(task.prompt_embeds, task.null_embeds),
            "alphas_cumprod": resume.digest(scheduler.alphas_cumprod),
            **network_identity(unet, weight_dtype),
        }

    def advance(self, loop: int) -> dict[str, float]:
        """Do a rollout, a value step and the policy steps; return the loop's row of the log."""
        began, config, task = time.perf_counter(), self.config, self.task
        fresh, rewards = roll_out(
            self.policy, task.reward, task.decode, task.prompts, task.latent_shape, config,
            self.generator,
        )  # fmt: skip
        kept = [fresh] if self.buffer is None else [self.buffer, fresh]
        self.buffer = Transitions.cat(kept)[-config.buffer_size :]
        row = {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
        if config.advantage == "value":
            row["value_loss"] = self._value_step()
        steps = [self._policy_step(loop) for _ in range(config.policy_steps)]
        row |= {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
        return row | {"seconds": round(time.perf_counter() - began, 3)}

    def _draw(self, count: int) -> Transitions:
        assert self.buffer is not None
        index = torch.randperm(len(self.buffer), generator=self.generator)[:count]
        return self.buffer[index]

    def _values(self, batch: Transitions) -> Tensor:
        device = self.accelerator.device
        text = self.text[batch.prompt_index.to(device)]
        values: Tensor = self.value(batch.x_t.to(device), text, batch.step.to(device))
        return values

    def _value_step(self) -> float:
        total = 0.0
        self.value_optimizer.zero_grad()
        for _ in range(self.config.value_batches):
            batch = self._draw(self.config.value_batch_size)
            reward = batch.reward.to(self.accelerator.device)
            loss = functional.mse_loss(self._values(batch), reward) / self.config.value_batches
            torch.autograd.backward(loss)
            total += loss.item()
        self.value_optimizer.step()
        return total

    def _policy_step(self, loop: int) -> dict[str, float]:
        config, device = self.config, self.accelerator.device
        sums: dict[str, float] = {}
        norm = 0.0
        for _ in range(config.accumulation_steps):
            batch = self._draw(config.batch_size)
            with self.accelerator.accumulate(self.unet):
                x_t, x_prev = batch.x_t.to(device), batch.x_prev.to(device)
                with torch.no_grad(), base_model(self.unet):
                    pre = self.policy.moments(x_t, batch.step, batch.prompt_index)
                theta = self.policy.moments(x_t, batch.step, batch.prompt_index)
                result = dpok_loss(
                    gaussian_log_prob(x_prev, theta.mean, theta.std),
                    batch.log_prob.to(device),
                    self._advantage(batch),
                    kl_term(theta, pre, config.kl),
                    reward_weight=config.reward_weight,
                    kl_weight=config.kl_weight,
                    clip=config.clip,
                )
                self.accelerator.backward(result.loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, config.grad_clip)
                    self._require_finite(loop, float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            row = {
                "policy_loss": result.policy.item(),
                "kl": result.kl.item(),
                "clip_fraction": result.clip_fraction.item(),
                "ratio_deviation": (result.ratio.detach() - 1).abs().mean().item(),
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in row.items()}
        means = {name: value / config.accumulation_steps for name, value in sums.items()}
        return means | {"grad_norm": float(norm)}

    def _advantage(self, batch: Transitions) -> Tensor:
        device = self.accelerator.device
        if self.config.advantage == "prompt":
            return batch.advantage.to(device)
        with torch.no_grad():
            return batch.reward.to(device) - self._values(batch)

    def _require_finite(self, loop: int, norm: float) -> None:
        if not torch.tensor(norm).isfinite():
            raise FloatingPointError(
                f"loop {loop}: gradient norm {norm}; a smaller lr than {self.config.lr} may help"
            )

    def bind(self) -> None:
        """Make the folder that of this run, before a result is written."""
        resume.bind(self.path.parent, self.identity)

    def save(self, loop: int) -> None:
        """Write the checkpoint after `loop`, atomically."""
        assert self.buffer is not None
        state = {
            "identity": resume.mark(self.identity),
            "loop": loop,
            "adapter": lora_state(self.unet),
            "optimizer": self.optimizer.state_dict(),
            "value": self.value.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "buffer": {name: column.clone() for name, column in self.buffer.columns().items()},
            "generator": self.generator.get_state(),
        }
        state = canonical(state)
        write_atomically(self.path, lambda partial: torch.save(state, partial))

    def resume(self) -> int:
        """Restore the checkpoint, if there is one, and return the number of loops done."""
        if not self.path.is_file():
            resume.check(self.path.parent, self.identity)
            return 0
        # The generator's state must stay on the CPU; the rest is copied to where it belongs.
        state = load_checkpoint(self.path)
        kept = (self.path, state["identity"], self.identity)
        resume.check(self.path.parent, self.identity, results=[kept])
        if state["loop"] > self.config.loops:
            raise ValueError(
                f"{self.path} has done {state['loop']} loops; loops = {self.config.loops} is fewer"
            )
        restore_lora(self.unet, state["adapter"], source=str(self.path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.value.load_state_dict(state["value"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.buffer = Transitions(**state["buffer"])
        self.generator.set_state(state["generator"])
        loop: int = state["loop"]
        return loop
