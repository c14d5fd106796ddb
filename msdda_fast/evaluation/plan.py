# SPDX-License-Identifier: Apache-2.0
"""Which systems are compared, with which settings, at which preferences, on how many seeds.

Systems that use aligned models draw every seed. Those that search or follow gradients while
sampling cost up to a hundred times as much and draw the subset `search_seeds`; the special cases
of TFG only at w = 0.5. They need Stable Diffusion's captured pipeline; the others run on any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.evaluation.rotations import ROTATED
from msdda_fast.evaluation.runs import Entry
from msdda_fast.levels import TimestepRange
from msdda_fast.methods.best_of_n import BestOfDraws, BestOfN
from msdda_fast.methods.code import CoDe
from msdda_fast.methods.das import DAS
from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.db_mpa_ls import DBMPALS
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.method import Method, Pipeline, is_stock, needs_captured
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.mudm import MUDM
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.rgg import RGG
from msdda_fast.methods.sd import SD
from msdda_fast.methods.tfg import PRESETS, TFG

__all__ = ["Plan", "plan_for", "published_searches"]

#: KL strengths of the systems of one objective: beyond the aligned model, half as far again.
STRENGTHS = (1.5,)
#: Random rotations of the factors that the factor merge is averaged over.
ROTATIONS = 8


def _best_of_equal_forwards() -> list[tuple[Method, str]]:
    """Return best-of-N on top of systems, at the forwards of four images of the base."""
    chosen = ((SD(), "SD", 4), (RewardedSoup(), "RS", 4), (MSDDA(), "MSDDA", 2))
    return [
        (BestOfDraws(of=method, num_draws=count), f"of {name}, N = {count}")
        for method, name, count in chosen
    ]


def published_searches() -> dict[tuple[str, str], Method]:
    """Return the published systems that evaluate rewards while sampling, by name and variant."""
    return {
        ("Best-of-N", "N = 20"): BestOfN(num_particles=20),
        ("CoDe", "official"): CoDe(variant="official"),
        ("CoDe", "one-step"): CoDe(variant="one-step"),
        ("RGG", "published"): RGG(),
        ("RGG", "through UNet"): RGG(jacobian="unet", norm="global"),
        ("DAS", "published"): DAS(),
        ("TFG", "published"): TFG(),
        ("MUDM", "independent"): MUDM(),
        ("MUDM", "dependent"): MUDM(dependency="dependent"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to draw.

    Args:
        objectives: Two or three names; w is the weight of the first, 1 - w of the second.
        preferences: Weights w in [0, 1] of the tables, for all systems.
        seeds: Seeds for systems that evaluate no rewards, except variants.
        search_preferences, search_seeds: Preferences (None: all) and seeds for systems that
            evaluate rewards while sampling.
        front: Additional weights w for the Pareto figure: MSDDA, RS and DB-MPA.
        front_seeds: Seeds for those, for the variants of MSDDA, RS and TFG, and for `simplex`.
        simplex: Preferences over three objectives, for MSDDA.
        tuned: Further settings of searches, beside the published ones, by name and variant.
        oracles: Adapter folders by w.
        oracle_timesteps: First and last timestep in which those act; None: all.
        path_kl_seeds: Seeds for the path KL to the base, of systems that have one.
        factor_soup: Include RS with merged factors, which needs adapters of equal rank.
        reweighted: Include systems with re-mapped weights.
        searches: Include systems that evaluate rewards while sampling.
        common_level: What the variant of DB-MPA is called whose networks share a noise level.
        systems: Names of methods; None: all.

    Raises:
        ValueError: A system is unknown, or a weight is outside [0, 1].
    """

    objectives: Sequence[str]
    preferences: Sequence[float] = (0.2, 0.5, 0.8)
    seeds: Sequence[int] = tuple(range(32))
    search_preferences: Sequence[float] | None = None
    search_seeds: Sequence[int] = (0, 1)
    front: Sequence[float] = (0.0, 0.1, 0.35, 0.65, 0.9, 1.0)
    front_seeds: Sequence[int] = tuple(range(8))
    simplex: Sequence[Sequence[float]] = ()
    tuned: Mapping[tuple[str, str], Method] = field(default_factory=dict)
    oracles: Mapping[float, Path] = field(default_factory=dict)
    oracle_timesteps: TimestepRange | None = None
    path_kl_seeds: Sequence[int] = ()
    factor_soup: bool = True
    reweighted: bool = True
    searches: bool = True
    common_level: str = "eta 1"
    systems: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for w in (*self.preferences, *self.front):
            if not 0 <= w <= 1:
                raise ValueError(f"preference weights lie in [0, 1], got {w!r}")
        known = sorted({entry.method.name for entry in self._all()})
        if unknown := [name for name in self.systems or () if name not in known]:
            raise ValueError(f"unknown system {unknown[0]!r}; known: {', '.join(known)}")

    def entries(self) -> list[Entry]:
        """Return what to draw, cheap systems first."""
        chosen = self.systems
        return [e for e in self._all() if chosen is None or e.method.name in chosen]

    def at(self, w: float) -> dict[str, float]:
        """Return the weights by objective: w for the first, 1 - w for the second."""
        first, second = self.objectives[:2]
        return {first: w, second: round(1 - w, 10)}

    def _all(self) -> Iterator[Entry]:
        middle = self.at(0.5)
        yield Entry(SD(), "", middle, self.seeds, weighted=False)
        main: list[tuple[Method, str]] = [
            (MSDDA(), ""),
            (RewardedSoup(), "product"),
            (DBMPA(), self.common_level),
        ]
        remapped = [DBMPA(remapped=True), RewardedSoup(remapped=True)] if self.reweighted else []
        for method, variant in (*main, (DBMPALS(), ""), *((m, "re-weighted") for m in remapped)):
            for w in self.preferences:
                yield Entry(method, variant, self.at(w), self.seeds)
        for w, folder in self.oracles.items():
            oracle = MORLOracle(
                objective=self.objectives[0], adapters={w: folder}, timesteps=self.oracle_timesteps
            )
            yield Entry(oracle, "", self.at(w), self.seeds)
        for objective in self.objectives[:2]:
            for strength in STRENGTHS:
                variant = f"{objective}, lambda {strength:g}"
                for single in (
                    DBKLA(objective=objective, strength=strength),
                    DeRaDiff(objective=objective, strength=strength),
                ):
                    yield Entry(single, variant, middle, self.seeds, weighted=False)
        variants: list[tuple[Method, str]] = [(MSDDA(fusion="eps"), "eps")]
        if self.factor_soup:
            variants.append((RewardedSoup(merge="factor"), "factor"))
            variants += [
                (RewardedSoup(merge="factor", rotation=seed), f"{ROTATED} {seed}")
                for seed in range(ROTATIONS)
            ]
        for method, variant in variants:
            for w in self.preferences:
                yield Entry(method, variant, self.at(w), self.front_seeds)
        for method, variant in main:
            for w in self.front:
                yield Entry(method, variant, self.at(w), self.front_seeds)
        for row in self.simplex:
            weights = dict(zip(self.objectives, row, strict=True))
            yield Entry(MSDDA(), "", weights, self.front_seeds)
        if self.searches:
            yield from self._searches(middle)

    def _searches(self, middle: Mapping[str, float]) -> Iterator[Entry]:
        for method, variant in _best_of_equal_forwards():
            for w in self.search_preferences or self.preferences:
                yield Entry(method, variant, self.at(w), self.front_seeds)
        searches = {**published_searches(), **self.tuned}
        for (_, variant), method in searches.items():
            for w in self.search_preferences or self.preferences:
                yield Entry(method, variant, self.at(w), self.search_seeds)
        for variant, preset in PRESETS.items():
            yield Entry(preset, variant, middle, self.front_seeds)


def plan_for(pipe: Pipeline, **settings: Any) -> Plan:  # noqa: ANN401 - of `Plan`
    """Return the plan with those systems that a pipeline can draw.

    A pipeline with a loop of its own has no systems that evaluate rewards, and re-mapped weights
    only where its levels have them; DB-MPA has the noise of MSDDA, unless levels are DDIM's.

    Args:
        pipe: Its objectives are the aligned models.
        settings: Of `Plan`.

    Raises:
        UnsupportedNetwork: The pipeline cannot draw what was asked for by name; or it draws no
            images from prompts.
        InvalidSchedule: Some objectives have a noise level and others have none.
        ValueError: As `Plan`.
    """
    if not is_stock(pipe):
        return Plan(**settings)
    from msdda_fast.methods.stock_levels import has_common_weights, is_ddim
    from msdda_fast.methods.stock_model import check_draws_images, own_levels, scheduler_of

    check_draws_images(pipe)
    plan = Plan(**settings)
    asked = [entry.method for entry in plan.entries()] if plan.systems is not None else []
    refused = [f"systems: {method.name}" for method in asked if method.needs_rewards]
    refused += [name for name in ("tuned", "path_kl_seeds") if getattr(plan, name)]
    if refused:
        raise UnsupportedNetwork(f"{refused[0]} {needs_captured(pipe)}")
    return replace(
        plan,
        searches=False,
        reweighted=has_common_weights(own_levels(pipe)),
        common_level="eta 1" if is_ddim(scheduler_of(pipe)) else "equal noise",
    )
