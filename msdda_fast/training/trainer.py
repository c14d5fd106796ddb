# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA adapter on preference pairs with the step-level DPO loss; resumes after a kill."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from msdda_fast import resume
from msdda_fast.files import write_atomically
from msdda_fast.training.adapter import (
    lora_parameters,
    lora_state,
    network_identity,
    restore_lora,
    save_lora,
)
from msdda_fast.training.checkpoint import load_checkpoint
from msdda_fast.training.config import StepDPOConfig
from msdda_fast.training.curves import LiveCurves
from msdda_fast.training.log import RunLog
from msdda_fast.training.noising import NoisedPairs, NoiseSchedule
from msdda_fast.training.pairs import PreferencePairs
from msdda_fast.training.progress import training_bar
from msdda_fast.training.storage import canonical

CHECKPOINT_NAME = "checkpoint.pt"
# May differ between a run and its continuation: none of them alters a step already made.
_FREE_FIELDS = ("steps", "log_every", "checkpoint_every")


def train_step_dpo(
    unet: nn.Module,
    scheduler: NoiseSchedule,
    pairs: PreferencePairs,
    prompt_embeds: Tensor,
    config: StepDPOConfig,
    out_dir: str | Path,
    *,
    null_embeds: Tensor | None = None,
    weight_dtype: torch.dtype = torch.float32,
    curves: bool = True,
    progress: bool = True,
) -> Path:
    """Train the adapter of `unet` (see `add_lora`) on `pairs` and save it in `out_dir`.

    `out_dir` receives `log.jsonl` (loss, accuracy, drift, gradient norm), `curves.png`, redrawn
    during training, `checkpoint.pt`, a LoRA folder `step-000100/` at each checkpoint, and at the
    end `pytorch_lora_weights.safetensors`.
    Called again with the same arguments after a kill, it continues from the last checkpoint and
    ends with exactly the files of an uninterrupted run on the same machine, but for the `seconds`
    of the log; with a larger `steps` it continues the run.

    Args:
        unet: Called as a diffusers UNet; trained in evaluation mode, so that dropout is not
            mistaken for drift. On return it holds the saved adapter.
        scheduler: Gives `alphas_cumprod` and the prediction type (epsilon or v_prediction).
        pairs: Clean latents with prompt indices.
        prompt_embeds: Text encoder output per prompt, (P, L, D).
        config: The hyper-parameters.
        out_dir: Created if missing.
        null_embeds: Text encoder output of the empty prompt, (L, D); needed for prompt dropout.
        weight_dtype: Data type of the saved adapters; training itself uses float32.
        curves: Draw `curves.png`, which needs matplotlib.
        progress: Show a progress bar with the time left.

    Returns: the path of the saved LoRA file.

    Raises:
        BackendUnavailable: matplotlib is missing and `curves` is set.
        ValueError: No trainable LoRA layer, an unknown prediction type, a prompt index without
            embedding, prompt dropout without `null_embeds`, or fewer steps than already done.
        InvalidShape: The embeddings have the wrong shape.
        ResumeMismatch: `out_dir` holds a run of another network, configuration or other data.
        FloatingPointError: A loss or gradient is not finite; the last checkpoint is kept.
    """
    out_dir = Path(out_dir)
    picture = LiveCurves(out_dir, f"Step-level DPO, gamma {config.gamma:g}", enabled=curves)
    batches = NoisedPairs(scheduler, pairs, prompt_embeds, null_embeds, config)
    run = _Run(unet, batches, config, weight_dtype, out_dir)
    start = run.resume()
    unet.eval()
    log = RunLog(out_dir, start, "step")
    with training_bar("step-level DPO", enabled=progress) as bar:
        task = bar.add_task("", total=config.steps, completed=start, status="")
        for step in range(start + 1, config.steps + 1):
            row = run.advance(step)
            if step == start + 1:
                run.bind()
            status = f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.2f}"
            bar.update(task, advance=1, status=status)
            is_last = step == config.steps
            if is_last or step % config.log_every == 0:
                log.write({"step": step, **row})
            if is_last or step % config.checkpoint_every == 0:
                with run.averaged():
                    save_lora(unet, out_dir / f"step-{step:06d}", dtype=weight_dtype)
                run.save(step)
            picture.refresh()
    run.bind()
    picture.refresh(now=True)
    run.keep_average()
    return save_lora(unet, out_dir, dtype=weight_dtype)


class _Run:
    """The state that a checkpoint holds: adapter, optimiser, moving average, random generator."""

    def __init__(
        self,
        unet: nn.Module,
        batches: NoisedPairs,
        config: StepDPOConfig,
        weight_dtype: torch.dtype,
        out_dir: Path,
    ) -> None:
        self.unet, self.batches, self.config = unet, batches, config
        self.path = out_dir / CHECKPOINT_NAME
        self.parameters = lora_parameters(unet)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.average = [p.detach().clone() for p in self.parameters if config.ema_decay > 0.0]
        fixed = {k: v for k, v in asdict(config).items() if k not in _FREE_FIELDS}
        self.identity = fixed | batches.fingerprint() | network_identity(unet, weight_dtype)

    def advance(self, step: int) -> dict[str, float]:
        """Do one optimiser step, the `step`-th from 1, and return its row of the log."""
        began, config = time.perf_counter(), self.config
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = self.batches.loss(self.unet, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(result.loss)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        row = {
            "loss": result.loss.item(),
            "accuracy": result.accuracy.item(),
            "drift_chosen": result.drift_chosen.mean().item(),
            "drift_rejected": result.drift_rejected.mean().item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
        }
        if not torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all():
            raise FloatingPointError(
                f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                f"a smaller lr or beta_dpo may help (lr {lr}, beta_dpo {config.beta_dpo})"
            )
        self.optimizer.step()
        # The average of few steps would be the start itself: it follows closely at first.
        keep = min(config.ema_decay, step / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(self.average, self.parameters, strict=False):
                mean.lerp_(parameter, 1.0 - keep)
        return row | {"seconds": round(time.perf_counter() - began, 4)}

    def bind(self) -> None:
        """Make the folder that of this run, before a result is written."""
        resume.bind(self.path.parent, self.identity)

    def save(self, step: int) -> None:
        """Write the checkpoint after `step`, atomically."""
        state = {
            "identity": resume.mark(self.identity),
            "step": step,
            "adapter": lora_state(self.unet),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
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
        restore_lora(self.unet, state["adapter"], source=str(self.path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for mean, stored in zip(self.average, state["average"], strict=True):
            mean.copy_(stored)
        step: int = state["step"]
        return step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the adapter is its moving average, if there is one."""
        latest = [p.detach().clone() for p in self.parameters]
        self.keep_average()
        try:
            yield
        finally:
            self._fill(latest)

    def keep_average(self) -> None:
        """Replace the adapter with its moving average, if there is one."""
        self._fill(self.average or self.parameters)

    @torch.no_grad()
    def _fill(self, values: list[Tensor] | list[nn.Parameter]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
