# SPDX-License-Identifier: Apache-2.0
"""Faults that somebody could make, one or more for every room, and the tests that must notice.

`plant.py` puts them into a copy of the tree, one at a time, and says which test fails. A fault is
one exact piece of text and what stands there instead; `test_faults.py` fails by name when the text
is not found exactly once any more, so that the list follows the code.
"""

from typing import NamedTuple

__all__ = ["FAULTS", "Fault"]


class Fault(NamedTuple):
    """A mistake.

    Attributes:
        id: The room, and a word.
        says: What goes wrong, in one sentence.
        file: Below the root of the repository.
        old, new: Text that is there once, and the fault.
        tests: Files that should notice; all of `make test` is asked where they do not.
    """

    id: str
    says: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # steps: one Gaussian step of a sampler
    Fault(
        "steps-epsilon-sign",
        "An epsilon prediction adds noise to x_0 instead of taking it away.",
        "msdda_fast/steps/ddim.py",
        "PredictionTerms(1 / signal, -noise / signal, zero, one)",
        "PredictionTerms(1 / signal, noise / signal, zero, one)",
        ("tests/steps",),
    ),
    Fault(
        "steps-v-sign",
        "A v prediction has the wrong sign in x_0.",
        "msdda_fast/steps/ddim.py",
        "PredictionTerms(signal, -noise, noise, signal)",
        "PredictionTerms(signal, noise, noise, signal)",
        ("tests/steps",),
    ),
    Fault(
        "steps-variance-inverted",
        "The posterior variance has (1 - a) / (1 - p) for (1 - p) / (1 - a).",
        "msdda_fast/steps/ddim.py",
        "return (1 - p) / (1 - a) * (1 - a / p)",
        "return (1 - a) / (1 - p) * (1 - a / p)",
        ("tests/steps", "tests/test_theorem1.py"),
    ),
    Fault(
        "steps-direction-without-sigma",
        "The direction to x_t is sqrt(1 - p) instead of sqrt(1 - p - sigma^2).",
        "msdda_fast/steps/ddim.py",
        "return (1 - self._prev - level**2 * self.grid.var[:, None, None])",
        "return (1 - self._prev - 0 * level)",
        ("tests/steps",),
    ),
    Fault(
        "steps-previous-timestep",
        "A step goes to the timestep after the one it should go to.",
        "msdda_fast/steps/ddim.py",
        "previous = timesteps - num_train_steps // num_steps",
        "previous = timesteps - num_train_steps // num_steps + 1",
        ("tests/steps",),
    ),
    Fault(
        "steps-final-alpha",
        "set_alpha_to_one is ignored at the last step.",
        "msdda_fast/steps/ddim.py",
        "torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else alpha_bar[0]",
        "alpha_bar[0]",
        ("tests/steps",),
    ),
    Fault(
        "steps-share-not-squared",
        "Shares go by standard deviations instead of variances.",
        "msdda_fast/steps/shares.py",
        "        ratio = ratio**2\n",
        "        ratio = ratio\n",
        ("tests/steps",),
    ),
    Fault(
        "steps-etas-swapped",
        "Every objective gets the eta of another one.",
        "msdda_fast/steps/table.py",
        "fusion_shares(weight, terms.rate, zero",
        "fusion_shares(weight, terms.rate.flip(-1), zero",
        ("tests/steps",),
    ),
    Fault(
        "steps-inactive-eta",
        "An objective of weight 0 still has a say in what the smallest eta is.",
        "msdda_fast/steps/shares.py",
        "    active = weights != 0\n    vanishing",
        "    active = weights == weights\n    vanishing",
        ("tests/steps",),
    ),
    Fault(
        "steps-guidance-halves",
        "Guidance gives 1 - g to the conditional half, too.",
        "msdda_fast/steps/table_rows.py",
        "uncond, cond = output_scale * (1 - guidance), output_scale * guidance",
        "uncond, cond = output_scale * (1 - guidance), output_scale * (1 - guidance)",
        (
            "tests/steps",
            "tests/pipelines/test_equivalence.py",
        ),
    ),
    Fault(
        "steps-ancestral-down",
        "Euler ancestral goes down to r^2 + up^2.",
        "msdda_fast/steps/ancestral.py",
        "(end**2 - up**2)",
        "(end**2 + up**2)",
        ("tests/integrations/test_k_diffusion.py", "tests/steps"),
    ),
    # level 0
    Fault(
        "weights-not-renormalised",
        "Weights that sum to 1.0005 stay as they are.",
        "msdda_fast/weights.py",
        "return values / total",
        "return values",
        ("tests/test_weights.py",),
    ),
    Fault(
        "weights-order-of-the-dict",
        "A dict of weights is read in its own order instead of that of the objectives.",
        "msdda_fast/weights.py",
        "[weights[name] for name in names]",
        "list(weights.values())",
        ("tests/test_weights.py",),
    ),
    Fault(
        "files-not-atomic",
        "A file is written where it belongs, so that a failed write destroys the old one.",
        "msdda_fast/files.py",
        "            _fill(partial, write)\n            os.replace(partial, path)\n",
        "            _fill(path, write)\n",
        ("tests/test_files.py",),
    ),
    # kernels
    Fault(
        "kernels-mask-dropped",
        "NaN of an objective of weight 0 reaches the image.",
        "msdda_fast/kernels/fused_step/_eager.py",
        "safe = torch.where(coefficient != 0, value.to(total.dtype), 0.0)",
        "safe = value.to(total.dtype)",
        ("tests/kernels/test_masks_and_limits.py",),
    ),
    Fault(
        "kernels-clip-missing",
        "x_0 is not clipped.",
        "msdda_fast/kernels/fused_step/_eager.py",
        "x_0.clamp(-clip_range, clip_range)",
        "x_0",
        ("tests/kernels/test_accuracy.py",),
    ),
    Fault(
        "kernels-noise-dropped",
        "A step adds no noise.",
        "msdda_fast/kernels/fused_step/_eager.py",
        "out.copy_(total if z is None else _add(total, columns[layout.noise_scale], z))",
        "out.copy_(total)",
        ("tests/kernels/test_accuracy.py",),
    ),
    Fault(
        "kernels-least-of-all",
        "The smallest variance is sought among inactive objectives too.",
        "msdda_fast/steps/shares.py",
        "least = torch.where(active, spreads, torch.inf).amin(axis, keepdim=True)",
        "least = spreads.expand(active.shape).amin(axis, keepdim=True)",
        (
            "tests/kernels/test_masks_and_limits.py",
            "tests/kernels/test_cuda_threads.py",
        ),
    ),
    Fault(
        "kernels-counter-words-swapped",
        "Pixel and channel block change places in the counter of the noise.",
        "msdda_fast/kernels/counter_noise/_eager.py",
        "        torch.arange(pixels, device=device).view(1, 1, -1),\n"
        "        torch.arange(blocks, device=device).view(1, -1, 1),\n",
        "        torch.arange(blocks, device=device).view(1, -1, 1),\n"
        "        torch.arange(pixels, device=device).view(1, 1, -1),\n",
        ("tests/kernels/test_counter_noise.py",),
    ),
    Fault(
        "kernels-triton-stream",
        "Triton draws the noise of steps on the stream of x_T.",
        "msdda_fast/kernels/fused_step/_triton_tile.py",
        "at[3].to(tl.uint32), k, 1)",
        "at[3].to(tl.uint32), k, 0)",
        ("tests/kernels/test_dtypes_and_layouts.py", "tests/kernels/test_triton_cases.py"),
    ),
    Fault(
        "kernels-triton-clip-below",
        "Triton clips x_0 from above only.",
        "msdda_fast/kernels/fused_step/_triton_linear.py",
        "low = tl.where(values[i] < -RANGE, -RANGE, values[i])",
        "low = values[i]",
        ("tests/kernels/test_triton_cases.py",),
    ),
    Fault(
        "kernels-triton-channel",
        "Triton stores the noise of a block of four channels two channels apart.",
        "msdda_fast/kernels/counter_noise/_triton.py",
        "channel = 4 * block + i",
        "channel = 2 * block + i",
        ("tests/kernels/test_counter_noise.py",),
    ),
    Fault(
        "kernels-cuda-channel-block",
        "A CUDA thread counts channels instead of blocks of four.",
        "csrc/include/msdda/threads.h",
        "static_cast<std::uint32_t>(place.channel / kChannels)",
        "static_cast<std::uint32_t>(place.channel)",
        ("tests/kernels/test_cuda_threads.py",),
    ),
    Fault(
        "kernels-cuda-mask-dropped",
        "A CUDA thread multiplies what a coefficient of 0 should mask.",
        "csrc/include/msdda/fused_step.h",
        "return coefficient != A{0} ? total + coefficient * value : total;",
        "return total + coefficient * value;",
        ("tests/kernels/test_cuda_threads.py",),
    ),
    Fault(
        "kernels-merge-in-half",
        "A merged weight is summed in the dtype of the network.",
        "msdda_fast/kernels/grouped_lora/_merge.py",
        "wide = torch.promote_types(weight.dtype, torch.float32)",
        "wide = weight.dtype",
        ("tests/kernels/test_grouped_lora.py", "tests/kernels/test_grouped_lora_sites.py"),
    ),
    Fault(
        "kernels-fold-bias",
        "The folded base adds its bias to the rows of the adapters.",
        "msdda_fast/kernels/grouped_lora/_eager.py",
        "functional.pad(bias, (0, len(folded) - len(bias)))",
        "functional.pad(bias, (0, len(folded) - len(bias)), value=1.0)",
        ("tests/kernels/test_grouped_lora.py",),
    ),
    # engine
    Fault(
        "engine-counter-stands",
        "Every step of a request is its first one.",
        "msdda_fast/engine/step.py",
        "buffers.counter.add_(1)",
        "buffers.counter.add_(0)",
        ("tests/engine/test_step.py", "tests/engine/test_graph.py"),
    ),
    Fault(
        "engine-counter-not-reset",
        "A request goes on counting where the last one ended.",
        "msdda_fast/engine/buffers.py",
        "        self.counter.zero_()\n",
        "",
        ("tests/engine",),
    ),
    Fault(
        "engine-next-input-stale",
        "The network does not see a state that a callback has replaced.",
        "msdda_fast/engine/buffers.py",
        '        _write([_Write("x", self.x, x)])\n        self.next_input.copy_(self.x)\n',
        '        _write([_Write("x", self.x, x)])\n',
        ("tests/engine",),
    ),
    Fault(
        "engine-key-without-noise",
        "Requests with seeds and with a generator share a captured step.",
        "msdda_fast/engine/buffers.py",
        "noise_table: bool = False",
        "noise_table: bool = field(default=False, compare=False)",
        ("tests/engine", "tests/pipelines/test_captured.py"),
    ),
    Fault(
        "engine-wrong-plan",
        "Every step of a plan is of the kind of its first one.",
        "msdda_fast/engine/graph.py",
        "[self._moves[kind] for kind in kinds]",
        "[self._moves[kinds[0]] for kind in kinds]",
        ("tests/engine/test_kinds.py",),
    ),
    Fault(
        "engine-oldest-first",
        "The cache drops the step that was made first, however often it is used.",
        "msdda_fast/engine/graph.py",
        "self._steps.move_to_end(key)",
        "self._steps[key]",
        ("tests/engine",),
    ),
    Fault(
        "engine-seed-not-counted",
        "All images of a request start from the same seed.",
        "msdda_fast/engine/noise.py",
        "[(seed + index) % 2**64 for index in range(batch_size)]",
        "[seed % 2**64 for index in range(batch_size)]",
        ("tests/engine",),
    ),
    Fault(
        "engine-step-off-by-one",
        "The noise of a step is that of the next one.",
        "msdda_fast/engine/noise.py",
        'return {"seeds": self.seeds, "step": k}',
        'return {"seeds": self.seeds, "step": k + 1}',
        ("tests/engine/test_noise.py", "tests/engine/test_loop.py"),
    ),
    Fault(
        "engine-rank-does-nothing",
        "Ranks after the first do work that another one does.",
        "msdda_fast/engine/assignment.py",
        "begin = rank * each + min(rank, more)",
        "begin = rank * each",
        ("tests/parallel/test_engine.py",),
    ),
    # batched
    Fault(
        "batched-rows-swapped",
        "Rows are (K, M, B) in one place and (M, K, B) in all others.",
        "msdda_fast/batched/rows.py",
        "self.x.view(self.objectives, self.branches, -1, *self.x.shape[1:])",
        "self.x.view(self.branches, self.objectives, -1, *self.x.shape[1:])",
        ("tests/batched/test_network.py", "tests/batched/test_unet.py"),
    ),
    Fault(
        "batched-adapter-of-another",
        "A forward of some objectives runs with the adapters of the first ones.",
        "msdda_fast/batched/sites.py",
        "torch.tensor(objectives)",
        "torch.arange(len(objectives))",
        ("tests/batched",),
    ),
    Fault(
        "batched-old-prompt",
        "A second prompt is ignored.",
        "msdda_fast/batched/unet.py",
        "self._prompts = hold(self._prompts, prompts)",
        "self._prompts = hold(self._prompts, self._prompts or prompts)",
        ("tests/batched",),
    ),
    Fault(
        "batched-time-of-next-step",
        "A step reads the time embedding of the next one.",
        "msdda_fast/batched/unet.py",
        "self._table.x.index_select(0, k[None])[0]",
        "self._table.x.roll(-1, 0).index_select(0, k[None])[0]",
        ("tests/batched",),
    ),
    # lora and adapters
    Fault(
        "lora-alpha-over-rank",
        "An adapter's alpha is not divided by its rank.",
        "msdda_fast/lora/stack.py",
        "(alpha or {}).get(path, len(entry.down)) / len(entry.down)",
        "(alpha or {}).get(path, len(entry.down)) / 1",
        ("tests/lora/test_stack.py",),
    ),
    Fault(
        "lora-soup-unweighted",
        "A soup adds adapters up with weight 1.",
        "msdda_fast/lora/soup.py",
        "torch.cat([weight * up for weight, _, up in parts], dim=1)",
        "torch.cat([up for weight, _, up in parts], dim=1)",
        ("tests/lora/test_soup.py",),
    ),
    Fault(
        "adapters-scale-ignored",
        "An objective's scale does not reach the batched forward.",
        "msdda_fast/adapters/network_state.py",
        "layer.set_scale(variant.adapter, variant.scale)",
        "layer.set_scale(variant.adapter, 1.0)",
        (
            "tests/batched",
            "tests/pipelines/test_equivalence.py",
        ),
    ),
    Fault(
        "adapters-change-unnoticed",
        "Adapter weights that changed in place are not read again.",
        "msdda_fast/adapters/network_state.py",
        "return torch.equal(_together(self._memory), self._numbers)",
        "return True",
        (
            "tests/batched/test_changes.py",
            "tests/pipelines/test_captured.py",
        ),
    ),
    Fault(
        "adapters-left-switched",
        "A call leaves the adapters of the pipeline at another scale.",
        "msdda_fast/adapters/switching.py",
        "        layer.scaling.update(self.scaling)\n",
        "",
        ("tests/adapters/test_switching.py",),
    ),
    # pipelines
    Fault(
        "pipelines-uncond-missing",
        "The unconditional half sees the prompt.",
        "msdda_fast/pipelines/stable_diffusion/sampling.py",
        "[uncond, cond] if table.needs_uncond",
        "[cond, cond] if table.needs_uncond",
        ("tests/pipelines/test_equivalence.py",),
    ),
    Fault(
        "pipelines-auto-other-network",
        "Where both networks run, each image goes on with the one it should not.",
        "msdda_fast/pipelines/stable_diffusion/merged_network.py",
        "exact[:, None, None, None], outputs, merged)",
        "exact[:, None, None, None], merged, outputs)",
        ("tests/pipelines/test_auto.py",),
    ),
    Fault(
        "pipelines-auto-over-budget",
        "One step more is merged than the budget allows.",
        "msdda_fast/pipelines/stable_diffusion/path_kl.py",
        "order, place > merged)",
        "order, place > merged + 1)",
        ("tests/pipelines/test_auto.py",),
    ),
    Fault(
        "pipelines-auto-narrow-pilot",
        "A pilot of narrow networks takes their rounding for merging.",
        "msdda_fast/pipelines/stable_diffusion/pilot.py",
        "    variants = _cast(networks, torch.float32)\n",
        "    variants = dict(networks.variants)\n",
        ("tests/pipelines/test_auto.py",),
    ),
    Fault(
        "pipelines-decode-unscaled",
        "Latents are decoded without the scaling factor of the VAE.",
        "msdda_fast/pipelines/stable_diffusion/decoding.py",
        "x_0.to(vae.dtype) / vae.config.scaling_factor",
        "x_0.to(vae.dtype)",
        (
            "tests/pipelines/test_equivalence.py",
            "tests/pipelines/test_call.py",
        ),
    ),
    Fault(
        "pipelines-sides-swapped",
        "Height and width change places.",
        "msdda_fast/pipelines/request.py",
        "(batch_size, unet_config.in_channels, sides[0], sides[1])",
        "(batch_size, unet_config.in_channels, sides[1], sides[0])",
        ("tests/pipelines/test_equivalence.py", "tests/pipelines/test_call.py"),
    ),
    Fault(
        "pipelines-weights-by-turns",
        "Weights per prompt go round the images instead of staying with their prompt.",
        "msdda_fast/weights.py",
        "values.repeat_interleave(images_per_prompt, 0)",
        "values.repeat(images_per_prompt, 1)",
        ("tests/pipelines/test_call.py",),
    ),
    # batching
    Fault(
        "batching-unlocked",
        "Two threads look for room in the queue at the same time.",
        "msdda_fast/batching/queue.py",
        "        with self._changed:\n"
        "            client = tickets[0].client\n"
        "            self.check_room(len(tickets), client)\n"
        "            self._lines.setdefault(client, deque()).extend(tickets)\n"
        "            self._changed.notify_all()\n",
        "        client = tickets[0].client\n"
        "        self.check_room(len(tickets), client)\n"
        "        self._lines.setdefault(client, deque()).extend(tickets)\n"
        "        with self._changed:\n"
        "            self._changed.notify_all()\n",
        ("tests/batching",),
    ),
    Fault(
        "batching-served-twice",
        "A batch that is handed out stays in the queue.",
        "msdda_fast/batching/queue.py",
        "                        for ticket in batch:\n"
        "                            self._serve(ticket)\n",
        "",
        ("tests/batching/test_queue.py",),
    ),
    Fault(
        "batching-cancelled-stays",
        "A cancelled image keeps its place in the queue.",
        "msdda_fast/batching/leaving.py",
        '        tally.count("cancelled")\n',
        '        tally.count("cancelled")\n        return\n',
        ("tests/batching/test_engine.py",),
    ),
    Fault(
        "batching-seed-not-counted",
        "All images of a request have one seed.",
        "msdda_fast/batching/admission.py",
        "seed_list([seed]) if count == 1 else image_seeds(seed, count)",
        "[seed] * count",
        ("tests/batching/test_engine.py",),
    ),
    Fault(
        "batching-shapes-mixed",
        "Images of several sizes get into one batch.",
        "msdda_fast/batching/queue.py",
        "return other.shape == first.shape",
        "return True",
        ("tests/batching/test_queue.py",),
    ),
    # serve
    Fault(
        "serve-key-not-checked",
        "Any key opens the service.",
        "msdda_fast/serve/guard.py",
        'if scheme.lower() != "bearer" or not is_known:',
        'if scheme.lower() != "bearer":',
        ("tests/serve",),
    ),
    Fault(
        "serve-blames-itself",
        "A wrong field is answered with 500.",
        "msdda_fast/serve/refusals.py",
        "return cls(400, message, param=param",
        "return cls(500, message, param=param",
        ("tests/serve/test_api.py", "tests/serve/test_fields.py"),
    ),
    Fault(
        "serve-body-in-pieces",
        "A body that comes in pieces may be of any length.",
        "msdda_fast/serve/guard.py",
        'read += len(message.get("body", b""))',
        'read = len(message.get("body", b""))',
        ("tests/serve/test_guard.py", "tests/serve/test_api.py"),
    ),
    # evaluation
    Fault(
        "evaluation-lost-shard",
        "The shards of all seeds are one file.",
        "msdda_fast/evaluation/runs.py",
        'f"seed-{seed:04d}.json"',
        'f"seed-{0:04d}.json"',
        ("tests/evaluation/test_runs.py",),
    ),
    Fault(
        "evaluation-drawn-again",
        "A run that continues draws its finished shards again.",
        "msdda_fast/evaluation/runs.py",
        "for entry, seed, file in mine if not file.exists()]",
        "for entry, seed, file in mine]",
        ("tests/evaluation/test_runs.py",),
    ),
    Fault(
        "evaluation-half-interval",
        "95 % intervals hold half of the resamples.",
        "msdda_fast/evaluation/statistics.py",
        "[0.025, 0.975]",
        "[0.25, 0.75]",
        ("tests/evaluation/test_statistics.py",),
    ),
    Fault(
        "evaluation-bootstrap-axis",
        "Resamples run along the axis of the arms' pairs unevenly: one pair is never drawn.",
        "msdda_fast/evaluation/statistics.py",
        "rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).T / count",
        "rng.multinomial(count, np.eye(count)[0], size=RESAMPLES).T / count",
        ("tests/evaluation/test_statistics.py",),
    ),
    Fault(
        "evaluation-sweep-mirrored",
        "A sweep weighs the other objective.",
        "msdda_fast/evaluation/sweep.py",
        "{sweep.toward: weight, self._other: 1.0 - weight}",
        "{sweep.toward: 1.0 - weight, self._other: weight}",
        ("tests/evaluation/test_sweep.py",),
    ),
    # training
    Fault(
        "training-kl-sign",
        "DPOK is paid for leaving the base model.",
        "msdda_fast/training/dpok.py",
        "policy + kl_weight * kl.mean()",
        "policy - kl_weight * kl.mean()",
        ("tests/training/test_dpok.py",),
    ),
    Fault(
        "training-loser-preferred",
        "Step-level DPO prefers the rejected sample.",
        "msdda_fast/training/step_dpo.py",
        "inner_gap = inner_chosen - inner_rejected",
        "inner_gap = inner_rejected - inner_chosen",
        ("tests/training/test_step_dpo.py",),
    ),
    Fault(
        "training-checkpoint-not-atomic",
        "A kill while the checkpoint is written leaves half of one.",
        "msdda_fast/training/trainer.py",
        "write_atomically(self.path, lambda partial: torch.save(state, partial))",
        "torch.save(state, self.path)",
        ("tests/training/test_trainer.py",),
    ),
    Fault(
        "training-noise-starts-anew",
        "A resumed run draws the noise of its first steps again.",
        "msdda_fast/training/trainer.py",
        '        self.generator.set_state(state["generator"])\n',
        "",
        ("tests/training/test_trainer.py",),
    ),
    Fault(
        "training-advantage-axis",
        "Rewards are compared between prompts instead of within each.",
        "msdda_fast/training/rollout.py",
        "rewards.mean(1, keepdim=True)",
        "rewards.mean(0, keepdim=True)",
        ("tests/training",),
    ),
    # methods
    Fault(
        "methods-soup-merge",
        "Rewarded Soups by factors are those by products.",
        "msdda_fast/methods/rewarded_soup.py",
        "model.soup(weights, self.merge, self.rotation)",
        'model.soup(weights, "product")',
        ("tests/methods/test_rewarded_soup.py",),
    ),
    Fault(
        "methods-remap-ignored",
        "The remapped DB-MPA keeps the weights as they are.",
        "msdda_fast/methods/model.py",
        "return dict(zip(w, what.tolist(), strict=True)), float(eta_w)",
        "return dict(w), float(eta_w)",
        ("tests/methods/test_db_mpa.py",),
    ),
    Fault(
        "methods-stock-weights",
        "On any pipeline re-mapped weights are the shares of Eq. 7 alone.",
        "msdda_fast/methods/stock_levels.py",
        "share * (1 + c * values**2) / (1 + c * rate**2)",
        "share",
        ("tests/methods/test_stock_levels.py",),
    ),
    Fault(
        "methods-stock-merge",
        "On any pipeline a merge acts in all timesteps.",
        "msdda_fast/methods/stock_model.py",
        "self._put(adapter, next(iter(ranges.values())))",
        "self._put(adapter, None)",
        ("tests/methods/test_stock_model.py",),
    ),
    Fault(
        "methods-worst-of-n",
        "The worst of the candidates is kept.",
        "msdda_fast/methods/particles.py",
        ".argmax(0)",
        ".argmin(0)",
        ("tests/methods/test_best_of_n.py",),
    ),
    # rewards
    Fault(
        "rewards-negative-clip",
        "CLIPScore falls below 0.",
        "msdda_fast/rewards/clip_score.py",
        "cosine.clamp_min(0)",
        "cosine",
        ("tests/rewards",),
    ),
    Fault(
        "rewards-cold-is-warm",
        "Warmth looks along the mirrored hue.",
        "msdda_fast/rewards/warmth.py",
        "a * math.cos(_WARM_HUE) + b * math.sin(_WARM_HUE)",
        "a * math.cos(_WARM_HUE) - b * math.sin(_WARM_HUE)",
        ("tests/rewards/test_warmth.py",),
    ),
    # integrations, emoji, cli
    Fault(
        "integrations-noise-at-the-end",
        "k-diffusion's noise sampler is asked at the step to sigma 0.",
        "msdda_fast/integrations/k_diffusion.py",
        "if is_silent[k]:",
        "if False:",
        ("tests/integrations/test_k_diffusion.py",),
    ),
    Fault(
        "emoji-test-prompts-leak",
        "Training sees the pairs of the test prompts in the other order.",
        "msdda_fast/emoji/prompts.py",
        " or pair in pairs or pair[::-1] in pairs",
        " or pair in pairs",
        ("tests/emoji/test_data.py",),
    ),
    Fault(
        "cli-success-on-bad-input",
        "A command that refuses its input says that all is well.",
        "msdda_fast/cli/session.py",
        "raise typer.Exit(2 if is_input and not has_failed else 1) from None",
        "raise typer.Exit(0) from None",
        ("tests/cli/test_cli.py",),
    ),
    Fault(
        "cli-one-file",
        "Several images are written to one file.",
        "msdda_fast/cli/generate.py",
        'f"{file.stem}-{index}"',
        'f"{file.stem}-0"',
        ("tests/cli/test_cli.py",),
    ),
)
