# SPDX-License-Identifier: Apache-2.0
"""t(B): one forward of the stock UNet on B rows, eager, compiled, captured, and both.

    python benchmarks/batch_curve.py --device cuda --model sd15 --rows 1,2,3,4,6,8

M objectives with guidance are B = 2M rows per image. The intercept of the curve is the cost that
rows share, the slope the cost of each; they predict the ratio of M objectives to one. All points
take turns in one run. Appends to batch_curve.jsonl in `--results`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from torch import Tensor, nn

from benchmarks.contenders.configs import CONFIGS
from benchmarks.contenders.models import load
from benchmarks.harness import RESULTS, append, captured, interleaved, surroundings

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("eager", "captured", "compiled", "compiled, captured")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    add("--model", choices=CONFIGS, default="sd15")
    add("--rows", default="1,2,3,4,6,8", help="comma-separated batch sizes B")
    add("--dtype", choices=DTYPES, default="fp16" if on_gpu else "fp32")
    add("--modes", default=";".join(MODES), help="some of " + ";".join(MODES))
    add("--seconds", type=float, default=60.0, help="total time to spend")
    add("--results", type=Path, default=RESULTS, help="folder of batch_curve.jsonl")
    args = parser.parse_args(given)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    counts = [int(part) for part in args.rows.split(",")]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = load(args.model, num_objectives=0, rank=0, device=device, dtype=dtype)
    plain, nhwc = model.plain(), model.plain({}).to(memory_format=torch.channels_last)
    # the default mode: tuning six batch sizes takes longer than a stage may
    fast = torch.compile(nhwc, dynamic=False)
    modes = [mode for mode in args.modes.split(";") if args.device == "cuda" or "capt" not in mode]
    runs = {}
    with torch.no_grad():
        for rows in counts:
            for mode in modes:
                network = fast if "compiled" in mode else plain
                run = forward(network, model.unet.config, rows, device, dtype)
                runs[mode, rows] = captured(run, args.device) if "captured" in mode else run
        timings = interleaved(runs, args.seconds, args.device)
    shared = surroundings(args.device) | {
        "device": args.device, "model": args.model, "dtype": args.dtype,
    }  # fmt: skip
    records = []
    for mode in modes:
        times = [timings[mode, rows]["median_us"] / 1e3 for rows in counts]
        fit = statistics.linear_regression(counts, times)
        points = [f"t({b}) = {t:.2f}" for b, t in zip(counts, times, strict=True)]
        print(f"{mode}: {', '.join(points)} ms; {fit.intercept:.2f} + {fit.slope:.2f} B")
        line = {"intercept_ms": round(fit.intercept, 4), "slope_ms": round(fit.slope, 4)}
        records += [
            shared | {"mode": mode, "rows": rows} | timings[mode, rows] | line for rows in counts
        ]
    args.results.mkdir(parents=True, exist_ok=True)
    append(str(args.results.resolve() / "batch_curve"), records)
    return 0


def forward(
    network: nn.Module, config: object, rows: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Return a call of a stock UNet on random latents and prompts."""
    random = partial(torch.randn, device=device, dtype=dtype)
    x = random(rows, config.in_channels, config.sample_size, config.sample_size)
    given = {"encoder_hidden_states": random(rows, 77, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": random(rows, pooled),
            "time_ids": torch.full((rows, 6), 1024.0, device=device, dtype=dtype),
        }
    t = torch.tensor(501, device=device)
    return lambda: network(x, t, return_dict=False, **given)[0]


if __name__ == "__main__":
    sys.exit(main())
