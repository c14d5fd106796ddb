# SPDX-License-Identifier: Apache-2.0
r"""Train a LoRA adapter through the gradient of a differentiable reward; resumes after a kill.

The policy draws its own trajectories under a sampler's rule. At a few random steps k of each,

    loss = -r(decode(x0hat_k)) + lambda n KL_k,

where x0hat_k is the clean sample that step k predicts, KL_k the exact divergence of the step from
the base's, and n the number of steps that learn: n times the mean of KL_k is the KL of the path.
The state x_t is taken as given, so one step's memory is enough, however long the path.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from msdda_fast import resume
from msdda_fast.files import write_atomically
from msdda_fast.rewards import Reward
from msdda_fast.steps.rules import Rule
from msdda_fast.training.adapter import (
    lora_parameters,
    lora_state,
    network_identity,
    restore_lora,
    save_lora,
)
from msdda_fast.training.checkpoint import load_checkpoint
from msdda_fast.training.curves import LiveCurves
from msdda_fast.training.log import RunLog
from msdda_fast.training.progress import training_bar
from msdda_fast.training.reward_gradient_config import RewardGradientConfig
from msdda_fast.training.rollout import DecodeFn, checked_score
from msdda_fast.training.rule_policy import RulePolicy
from msdda_fast.training.storage import canonical

CHECKPOINT_NAME = "checkpoint.pt"
# May differ between a run and its continuation: none of them alters a step already made.
_FREE_FIELDS = ("steps", "checkpoint_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTask:
    """What a policy is trained for: prompts as the network takes them, and a reward of images."""

    reward: Reward  # differentiable with respect to the images
    decode: DecodeFn  # gradients flow from its images to the latents
    prompts: Sequence[str]  # P
    conditions: Mapping[str, Tensor]  # arguments of the network with a row per prompt, (P, ...)
    latent_shape: Sequence[int]  # S, of one latent
    null_conditions: Mapping[str, Tensor] | None = None  # of the empty prompt; needed for guidance


def train_reward_gradient(
    network: nn.Module,
    rule: Rule,
    task: RewardTask,
    config: RewardGradientConfig,
    out_dir: str | Path,
    *,
    weight_dtype: torch.dtype = torch.float32,
    curves: bool = True,
    progress: bool = True,
) -> Path:
    """Train the adapter of `network` (see `add_lora`) up the reward and save it in `out_dir`.

    `out_dir` receives `log.jsonl` (reward of x0hat, estimate of the path KL in nats, gradient
    norm), `curves.png`, redrawn during training, `checkpoint.pt`, and at the end
    `pytorch_lora_weights.safetensors`. Called again with the same arguments after a kill, it
    continues from the last checkpoint and ends with exactly the files of an uninterrupted run on
    the same machine, but for the `seconds` of the log; with larger `steps` it continues the run.

    Args:
        network: Called as `network(x_t, timestep=t, **conditions, return_dict=False)[0]`: a UNet or
            a transformer of diffusers. Trained on its own device and in evaluation mode, so that
            dropout is not mistaken for drift. On return it holds the saved adapter.
        rule: How it is sampled, such as `DDIMRule(ddim_grid(scheduler, 25))` or a `FlowSDERule`.
        task: Reward and prompts.
        config: The hyper-parameters.
        out_dir: Created if missing.
        weight_dtype: Data type of the saved adapter; training itself uses float32.
        curves: Draw `curves.png`, which needs matplotlib.
        progress: Show a progress bar with the time left.

    Returns: the path of the saved LoRA file.

    Raises:
        BackendUnavailable: matplotlib is missing and `curves` is set.
        ValueError: No trainable LoRA layer, a reward that is not differentiable or not finite,
            another number of prompts than of their rows, guidance without `null_conditions`, or
            fewer steps than already done.
        InvalidShape: Conditions or rewards have the wrong shape.
        InvalidSchedule: At this level no step of the range is a Gaussian, or x0hat is clipped.
        ResumeMismatch: `out_dir` holds a run of another network, configuration or other data.
        FloatingPointError: A gradient is not finite; the last checkpoint is kept.
    """
    out_dir = Path(out_dir)
    title = f"Reward gradient, {task.reward.name}, level {config.level:g}"
    picture = LiveCurves(out_dir, title, enabled=curves)
    run = _Run(network, rule, task, config, weight_dtype, out_dir)
    start = run.resume()
    network.eval()
    log = RunLog(out_dir, start, "step")
    with training_bar("reward gradient", enabled=progress) as bar:
        shown = bar.add_task("", total=config.steps, completed=start, status="")
        for step in range(start + 1, config.steps + 1):
            row = run.advance(step)
            if step == start + 1:
                run.bind()
            status = f"reward {row['reward']:+.3f}, kl {row['kl']:.2g}"
            bar.update(shown, advance=1, status=status)
            log.write({"step": step, **row})
            if step == config.steps or step % config.checkpoint_every == 0:
                run.save(step)
            picture.refresh()
    run.bind()
    picture.refresh(now=True)
    return save_lora(network, out_dir, dtype=weight_dtype)


class _Run:
    """The state that a checkpoint holds: adapter, optimiser, random generator."""

    def __init__(
        self,
        network: nn.Module,
        rule: Rule,
        task: RewardTask,
        config: RewardGradientConfig,
        weight_dtype: torch.dtype,
        out_dir: Path,
    ) -> None:
        if not task.reward.differentiable:
            raise ValueError(
                f"the reward {task.reward.name!r} is not differentiable; DPOK (train_dpok) takes it"
            )
        counts = {len(task.prompts), *(len(rows) for rows in task.conditions.values())}
        if len(counts) != 1 or not task.prompts:
            raise ValueError(
                f"{len(task.prompts)} prompts need as many rows of conditions, got "
                f"{ {name: len(rows) for name, rows in task.conditions.items()} }"
            )
        self.network, self.task, self.config = network, task, config
        self.path = out_dir / CHECKPOINT_NAME
        self.parameters = lora_parameters(network)
        self.device = self.parameters[0].device
        self.policy = RulePolicy(
            network,
            rule,
            config.level,
            task.conditions,
            task.null_conditions,
            guidance_scale=config.guidance_scale,
            timesteps=config.timesteps,
            autocast=self._autocast if config.mixed_precision == "bf16" else nullcontext,
        )
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        fixed = {k: v for k, v in asdict(config).items() if k not in _FREE_FIELDS}
        policy = self.policy
        given = {**task.conditions, **{f"null {k}": v for k, v in policy.null_conditions.items()}}
        self.identity = {
            **fixed,
            "timesteps": config.timesteps and list(config.timesteps),
            "reward": resume.named(task.reward),
            "decode": resume.named(task.decode),
            "latent_shape": list(task.latent_shape),
            "prompts": list(task.prompts),
            "conditions": {name: resume.digest(rows) for name, rows in sorted(given.items())},
            "rule": type(rule).__name__,
            "grid": resume.digest(
                policy.timesteps, policy.x_scale, policy.output_scale, policy.std, policy.x0_x,
                policy.x0_output,
            ),
            **network_identity(network, weight_dtype),
        }  # fmt: skip

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def advance(self, step: int) -> dict[str, float]:
        """Do one optimiser step, the `step`-th from 1, and return its row of the log."""
        began, config = time.perf_counter(), self.config
        self.optimizer.zero_grad(set_to_none=True)
        reward, kl = self._trajectories()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip).item()
        if not torch.tensor([reward, kl, norm]).isfinite().all():
            raise FloatingPointError(
                f"step {step}: gradient norm {norm}, KL {kl}; a smaller lr than {config.lr} may "
                "help"
            )
        self.optimizer.step()
        row = {"reward": reward, "kl": kl, "grad_norm": norm}
        return row | {"seconds": round(time.perf_counter() - began, 3)}

    def _trajectories(self) -> tuple[float, float]:
        """Draw a batch, up to its last scored step, and add to the gradients.

        Returns: mean reward of x0hat, and the estimate of the path KL.
        """
        config, policy, task = self.config, self.policy, self.task
        many = range(-(-config.batch_size // len(task.prompts)))
        drawn = [torch.randperm(len(task.prompts), generator=self.generator) for _ in many]
        rows = torch.cat(drawn)[: config.batch_size]
        prompts = [task.prompts[index] for index in rows]
        count = min(config.scored_steps, len(policy.trained))
        chosen = torch.randperm(len(policy.trained), generator=self.generator)[:count]
        scored = set(policy.trained[chosen].tolist())
        x_t, total_reward, total_kl = self._noise(), 0.0, 0.0
        for k in range(max(scored) + 1):
            if k in scored:
                base = policy.base_output(x_t, k, rows)
                output = policy.output(x_t, k, rows)
                images = task.decode(policy.clean(x_t, output, k))
                reward = checked_score(task.reward, images, prompts).mean()
                kl = len(policy.trained) * policy.kl(output, base, k).mean()
                torch.autograd.backward((config.kl_weight * kl - reward.to(kl)) / count)
                total_reward += reward.item() / count
                total_kl += kl.item() / count
                output = output.detach()
            else:
                output = policy.acting_output(x_t, k, rows)
            x_t = policy.step(x_t, output, k, self._noise())
        return total_reward, total_kl

    def _noise(self) -> Tensor:
        """Draw on the CPU, so that a seed gives the same trajectories on every device."""
        shape = self.config.batch_size, *self.task.latent_shape
        return torch.randn(shape, generator=self.generator).to(self.device)

    def bind(self) -> None:
        """Make the folder that of this run, before a result is written."""
        resume.bind(self.path.parent, self.identity)

    def save(self, step: int) -> None:
        """Write the checkpoint after `step`, atomically."""
        state = {
            "identity": resume.mark(self.identity),
            "step": step,
            "adapter": lora_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        state = canonical(state)
        write_atomically(self.path, lambda partial: torch.save(state, partial))

    def resume(self) -> int:
        """Restore the checkpoint, if there is one, and return the number of steps done."""
        if not self.path.is_file():
            resume.check(self.path.parent, self.identity)
            return 0
        # The generator's state must stay on the CPU; the rest is copied to where it belongs.
        state = load_checkpoint(self.path)
        kept = (self.path, state["identity"], self.identity)
        resume.check(self.path.parent, self.identity, results=[kept])
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{self.path} has done {state['step']} steps; steps = {self.config.steps} is fewer"
            )
        restore_lora(self.network, state["adapter"], source=str(self.path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        step: int = state["step"]
        return step
