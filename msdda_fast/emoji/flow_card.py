# SPDX-License-Identifier: Apache-2.0
"""Write the model card of `msdda-fast/emoji-flow`; no number is typed by hand.

Run `python -m msdda_fast.emoji.flow_card`; the template is `flow_card.md` beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from msdda_fast.assets import ASSETS
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT, PROMPTS, RANK
from msdda_fast.emoji.card import plot_training, read_log, results_table, sizes_table
from msdda_fast.emoji.train_flow import SCENES
from msdda_fast.files import write_atomically

EMOJI_FLOW = ASSETS / "emoji-flow"
_LAST = 10  # rows of a log over which its end is averaged


def flow_card(results: dict[str, Any]) -> str:
    """Return the text of the model card from the results of `emoji.evaluate_flow`."""
    setting = results["setting"]
    base = read_log(EMOJI_FLOW / "training" / "flow.jsonl")
    network = json.loads((EMOJI_FLOW / "transformer" / "config.json").read_text())
    sizes, total = sizes_table(EMOJI_FLOW)
    choice = setting["objects on training prompts by guidance"]
    template = (Path(__file__).parent / "flow_card.md").read_text()
    return template.format(
        **{f"level_{name}": recipe.level for name, recipe in FLOW_ALIGNMENT.items()},
        sizes=sizes,
        total=total,
        layers=network["num_layers"],
        width=network["num_attention_heads"] * network["attention_head_dim"],
        scenes=SCENES,
        base_steps=int(base[-1]["step"]),
        base_minutes=base[-1]["seconds"] / 60,
        base_loss=_end(base, "loss"),
        rank=RANK,
        prompts_aligned=len(PROMPTS),
        recipes="\n".join(_recipe_row(name) for name in FLOW_ALIGNMENT),
        choice=", ".join(f"{100 * found:.0f}% at {scale}" for scale, found in choice.items()),
        table=results_table(results),
        single_table=results_table(results, single=True),
        **setting,
    )


def _recipe_row(name: str) -> str:
    recipe = FLOW_ALIGNMENT[name]
    log = read_log(EMOJI_FLOW / "training" / f"align-{name}.jsonl")
    low, high = recipe.timesteps or (0, 1000)
    return (
        f"| {name} | {recipe.level:g} | {recipe.kl_weight:g} | {low:g} to {high:g} "
        f"| {recipe.steps} | {recipe.lr:g} | {_end(log, 'kl'):.1f} |"
    )


def _end(log: list[dict[str, float]], quantity: str) -> float:
    last = [row[quantity] for row in log[-_LAST:]]
    return sum(last) / len(last)


def main(
    results: Annotated[Path, typer.Option(help="Result file of emoji.evaluate_flow.")] = Path(
        "benchmarks/results/emoji_flow.json"
    ),
) -> None:
    """Write the card and its plot."""
    logs = {"flow": "loss", **{f"align-{name}": "reward" for name in FLOW_ALIGNMENT}}
    plot_training(EMOJI_FLOW / "training", logs, EMOJI_FLOW / "training.png")
    text = flow_card(json.loads(results.read_text()))
    write_atomically(EMOJI_FLOW / "README.md", lambda partial: partial.write_text(text))


if __name__ == "__main__":
    typer.run(main)
