# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA adapter on a reward with DPOK; resumes after a kill."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from msdda_fast.training.adapter import save_lora
from msdda_fast.training.curves import LiveCurves
from msdda_fast.training.dpok_config import DPOKConfig
from msdda_fast.training.dpok_run import DPOKRun, Task
from msdda_fast.training.log import RunLog
from msdda_fast.training.progress import training_bar
from msdda_fast.types import Scheduler


def train_dpok(
    unet: nn.Module,
    scheduler: Scheduler,
    task: Task,
    config: DPOKConfig,
    out_dir: str | Path,
    *,
    accelerator: Accelerator | None = None,
    weight_dtype: torch.dtype = torch.float32,
    curves: bool = True,
    progress: bool = True,
) -> Path:
    """Train the adapter of `unet` (see `add_lora`) by policy gradient and save it in `out_dir`.

    `out_dir` receives `log.jsonl` (reward, losses, KL, share of clipped transitions, gradient
    norm), `curves.png`, redrawn during training, `checkpoint.pt`, a LoRA folder `loop-000100/` at
    each checkpoint, and at the end `pytorch_lora_weights.safetensors`. Called again with the same
    arguments after a kill, it continues from the last checkpoint and ends with exactly the files
    of an uninterrupted run on the same machine, but for the `seconds` of the log; with larger
    `loops` it continues the run.

    Args:
        unet: Called as a diffusers UNet; trained in evaluation mode, so that dropout is not
            mistaken for drift. Moved to the accelerator's device. On return it holds the saved
            adapter.
        scheduler: A diffusers DDIM scheduler; copied.
        task: Reward and prompts.
        config: The hyper-parameters.
        out_dir: Created if missing.
        accelerator: Chooses the device; None: made from `config`.
        weight_dtype: Data type of the saved adapters; training itself uses float32.
        curves: Draw `curves.png`, which needs matplotlib.
        progress: Show a progress bar with the time left.

    Returns: the path of the saved LoRA file.

    Raises:
        BackendUnavailable: matplotlib is missing and `curves` is set.
        ValueError: No trainable LoRA layer, prompts that repeat or are fewer than a loop draws, an
            accelerator with several processes or with settings that differ from `config`, a reward
            that is not finite, or fewer loops than already done.
        InvalidShape: Embeddings or rewards have the wrong shape.
        InvalidSchedule: With this scheduler or eta no step is a Gaussian.
        ResumeMismatch: `out_dir` holds a run of another network, configuration or other data.
        FloatingPointError: A loss or gradient is not finite; the last checkpoint is kept.
    """
    out_dir = Path(out_dir)
    title = f"DPOK, {task.reward.name}, eta {config.eta:g}"
    picture = LiveCurves(out_dir, title, enabled=curves)
    run = DPOKRun(
        unet, scheduler, task, config, weight_dtype, out_dir, _accelerator(accelerator, config)
    )
    start = run.resume()
    log = RunLog(out_dir, start, "loop")
    with training_bar("DPOK", enabled=progress) as bar:
        shown = bar.add_task("", total=config.loops, completed=start, status="")
        for loop in range(start + 1, config.loops + 1):
            row = run.advance(loop)
            if loop == start + 1:
                run.bind()
            status = f"reward {row['reward']:+.3f}, kl {row['kl']:.2g}"
            bar.update(shown, advance=1, status=status)
            log.write({"loop": loop, **row})
            is_last = loop == config.loops
            if is_last or loop % config.checkpoint_every == 0:
                save_lora(unet, out_dir / f"loop-{loop:06d}", dtype=weight_dtype)
                run.save(loop)
            picture.refresh()
    run.bind()
    picture.refresh(now=True)
    return save_lora(unet, out_dir, dtype=weight_dtype)


def _accelerator(given: Accelerator | None, config: DPOKConfig) -> Accelerator:
    accelerator = given or Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation_steps,
    )
    if accelerator.num_processes > 1:
        raise ValueError(
            f"DPOK trains in one process, but the accelerator has {accelerator.num_processes}; "
            "start it without a launcher"
        )
    for name, own, wanted in (
        ("mixed_precision", accelerator.mixed_precision, config.mixed_precision),
        (
            "accumulation_steps",
            accelerator.gradient_accumulation_steps,
            config.accumulation_steps,
        ),
    ):
        if own != wanted:
            raise ValueError(f"{name} is {own!r} in the accelerator and {wanted!r} in the config")
    return accelerator
