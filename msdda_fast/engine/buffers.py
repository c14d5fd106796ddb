# SPDX-License-Identifier: Apache-2.0
"""Static tensors of one captured step: allocated once per shape, overwritten by each request.

A captured graph replays the addresses it was captured with. So everything that distinguishes one
request from another of the same shape (latents, coefficients, seeds, prompt) is copied into these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from msdda_fast.engine.pixel_buffers import PixelBuffers
from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.kernels.counter_noise import as_seeds
from msdda_fast.steps.coefficients import CoefficientTable, Layout

if TYPE_CHECKING:
    from msdda_fast.types import SeedsLike

__all__ = ["ShapeKey", "StepBuffers", "padded_steps"]


def padded_steps(num_steps: int) -> int:
    """Length of the tables that hold `num_steps` steps: a power of two, at least 64."""
    return max(64, 1 << (num_steps - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeKey:
    """Everything that a captured step fixes; requests with equal keys share one graph.

    Attributes:
        shape: (B, *S) of the latents.
        active: (M,) flags; outputs of inactive objectives are not computed.
        runs: The sets of objectives that steps run, as flags; none: all steps, the active ones.
        branches: K, 2 (uncond, cond) or 1 (cond).
        clip_range: As in the `CoefficientTable`, latent units; None: x_0 is not clipped.
        dtype: Dtype of the network's input.
        input_rows: R, the number of copies of each latent that the network takes: 1 when it makes
            its own rows, else one per active objective and branch.
        channels_last: Memory format of the network's input; S is then (C, H, W).
        max_steps: Length of the tables, the most steps of a request.
        timestep_dtype: Of the timesteps: int64, or float32 for flow models.
        noise_table: Whether z comes from a table (T, B, *S) rather than from one seed per sample.
        context: Shape of the data that the network itself keeps for a request, such as embeddings.
        shared_context: Whether that data is the same for all objectives.
        pixelwise: How many objectives have weights of every pixel; 0: steps have the same for all.
        mode: Name of the network to build, for the builder to interpret.
    """

    shape: tuple[int, ...]
    active: tuple[bool, ...]
    runs: tuple[tuple[bool, ...], ...] = ()
    branches: int = 1
    clip_range: float | None = None
    dtype: torch.dtype = torch.float32
    input_rows: int = 1
    channels_last: bool = False
    max_steps: int = 64
    timestep_dtype: torch.dtype = torch.int64
    noise_table: bool = False
    context: tuple[int, ...] = ()
    shared_context: bool = False
    pixelwise: int = 0
    mode: str = "exact"

    @property
    def columns(self) -> int:
        """C, the number of coefficients per sample and step."""
        return Layout(len(self.active), self.clip_range is not None).width


class _Write(NamedTuple):
    name: str
    static: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepBuffers:
    """The tensors that a step reads and writes, apart from the network's own; see `allocate`.

    Attributes:
        key: The shapes and dtype.
        x: The state x_t, (B, *S) float32, latent units; the step overwrites it with x_{t-1}.
        next_input: `x` repeated R times, (R, B, *S), in the network's dtype and memory format.
        rows: (max_steps, B, C) float32 coefficients; see `coefficients.Layout`.
        timesteps: (max_steps,) in the key's dtype.
        seeds: (B,) int64.
        noise: (max_steps, B, *S) float32; None: noise comes from the seeds.
        counter: 0-d int64, the index k of the next step; the step adds 1.
        pixels: What weights of every pixel need; None: the key has none.
        conditioning: Static tensors that the network reads and each request overwrites, added by
            the network's builder.
    """

    key: ShapeKey
    x: Tensor
    next_input: Tensor
    rows: Tensor
    timesteps: Tensor
    seeds: Tensor
    noise: Tensor | None
    counter: Tensor
    pixels: PixelBuffers | None = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(cls, key: ShapeKey, device: torch.device | str) -> StepBuffers:
        """Make the tensors for `key`, filled with zeros."""
        batch, steps = key.shape[0], key.max_steps
        # (R, B, C, H, W) has no channels-last format of its own: allocate R B rows and split them
        rows = torch.zeros((key.input_rows * batch, *key.shape[1:]), dtype=key.dtype, device=device)
        if key.channels_last:
            rows = rows.to(memory_format=torch.channels_last)
        return cls(
            key=key,
            x=torch.zeros(key.shape, device=device),
            next_input=rows.view(key.input_rows, *key.shape),
            rows=torch.zeros(steps, batch, key.columns, device=device),
            timesteps=torch.zeros(steps, dtype=key.timestep_dtype, device=device),
            seeds=torch.zeros(batch, dtype=torch.int64, device=device),
            noise=torch.zeros(steps, *key.shape, device=device) if key.noise_table else None,
            counter=torch.zeros((), dtype=torch.int64, device=device),
            pixels=PixelBuffers.allocate(key.pixelwise, key.shape, key.columns, steps, device)
            if key.pixelwise
            else None,
        )

    @classmethod
    def nbytes(cls, key: ShapeKey) -> int:
        """Return the bytes that `allocate` would take, without allocating them."""
        made = cls.allocate(key, "meta")
        tensors = (getattr(made, entry.name) for entry in fields(made))
        own = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return own + (0 if made.pixels is None else made.pixels.nbytes())

    def load(
        self,
        table: CoefficientTable,
        x_T: Tensor,
        *,
        seeds: SeedsLike | None = None,
        noise: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a request in place; if any part does not fit, nothing is written.

        Args:
            table: T <= max_steps steps, rows (T, B | 1, C) float32.
            x_T: (B, *S), latent units.
            seeds: (B,), only for keys without a noise table.
            noise: z of every step (T, B, *S), only for keys with a noise table.
            conditioning: A value for each of `self.conditioning`.

        Raises:
            InvalidShape: An argument has the wrong shape, or needs objectives or branches that the
                key leaves out.
            InvalidSchedule: More than `max_steps` steps, a different `clip_range`, or networks that
                take a scaled input.
            ValueError: The wrong kind of noise for the key, or conditioning names that differ from
                `self.conditioning`.
        """
        self._check_table(table)
        if (noise is None) == self.key.noise_table or (seeds is None) != self.key.noise_table:
            wanted = "a noise table" if self.key.noise_table else "seeds"
            raise ValueError(f"these buffers are for {wanted}; give that and no other noise")
        given, count = conditioning or {}, len(table)
        if given.keys() != self.conditioning.keys():
            raise ValueError(
                f"conditioning names {sorted(given)}, expected {sorted(self.conditioning)}"
            )
        writes = [
            _Write("x_T", self.x, x_T),
            _Write("rows", self.rows[:count], table.rows.expand(-1, len(self.x), -1)),
            _Write("timesteps", self.timesteps[:count], table.timesteps),
            *self._pixel_writes(table),
            *self._conditioning_writes(given),
        ]
        if seeds is not None:
            host = seeds.device if isinstance(seeds, Tensor) else torch.device("cpu")
            writes.append(_Write("seeds", self.seeds, as_seeds(seeds, len(self.x), host)))
        if noise is not None and self.noise is not None:
            writes.append(_Write("noise", self.noise[:count], noise))
        _write(writes)
        self.next_input.copy_(self.x)
        self.counter.zero_()

    def replace_x(self, x: Tensor) -> None:
        """Continue from another state (B, *S), between two steps.

        Raises:
            InvalidShape: `x` has the wrong shape or device.
        """
        _write([_Write("x", self.x, x)])
        self.next_input.copy_(self.x)

    def replace_table(self, table: CoefficientTable) -> None:
        """Continue with other coefficients of the same T steps, between two steps.

        Raises:
            InvalidShape, InvalidSchedule: The table does not fit; see `load`.
        """
        self._check_table(table)
        rows = table.rows.expand(-1, len(self.x), -1)
        _write([_Write("rows", self.rows[: len(table)], rows), *self._pixel_writes(table)])

    def replace_conditioning(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite some of the conditioning, between two steps.

        Raises:
            InvalidShape: A value has the wrong shape or device.
            ValueError: A name is not one of `self.conditioning`.
        """
        if unknown := values.keys() - self.conditioning.keys():
            raise ValueError(
                f"conditioning names {sorted(unknown)}, expected {sorted(self.conditioning)}"
            )
        _write(self._conditioning_writes(values))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore on exit the tensors that steps change."""
        changed = (self.x, self.next_input, self.counter)
        copies = [tensor.clone() for tensor in changed]
        try:
            yield
        finally:
            for tensor, copy in zip(changed, copies, strict=True):
                tensor.copy_(copy)

    def _conditioning_writes(self, values: Mapping[str, Tensor]) -> list[_Write]:
        return [_Write(name, self.conditioning[name], value) for name, value in values.items()]

    def _pixel_writes(self, table: CoefficientTable) -> list[_Write]:
        if self.pixels is None or table.pixels is None:
            return []
        return [_Write(*part) for part in self.pixels.parts(table.pixels)]

    def _check_table(self, table: CoefficientTable) -> None:
        key = self.key
        if len(table) > key.max_steps or table.clip_range != key.clip_range:
            raise InvalidSchedule(
                f"a table of {len(table)} steps with clip_range={table.clip_range}, expected at "
                f"most {key.max_steps} with clip_range={key.clip_range}"
            )
        batch, count = table.rows.shape[1], table.num_objectives
        if count != len(key.active) or batch not in (1, len(self.x)):
            raise InvalidShape(
                f"a table for B = {batch} and M = {count}, expected 1 or {len(self.x)} and "
                f"{len(key.active)}"
            )
        own = 0 if table.pixels is None else len(table.pixels.own)
        if own != key.pixelwise:
            raise InvalidShape(
                f"a table with weights of every pixel for {own} objectives, expected "
                f"{key.pixelwise}"
            )
        if table.input_scale is not None:
            raise InvalidSchedule("these buffers hand x_t to the networks, which take it scaled")
        if table.rows.dtype != torch.float32:
            raise InvalidShape(f"a table in {table.rows.dtype}, expected torch.float32")
        missing = [m for m, on in enumerate(table.active) if on and not key.active[m]]
        if missing or (table.needs_uncond and key.branches == 1):
            raise InvalidShape(
                f"the table needs active={table.active} and needs_uncond={table.needs_uncond}; "
                f"these buffers are for active={list(key.active)} and K = {key.branches}"
            )


def _write(writes: list[_Write]) -> None:
    """Check all, then copy all, without waiting for the device."""
    for name, static, value in writes:
        if value.shape != static.shape:
            raise InvalidShape(
                f"{name} has shape {tuple(value.shape)}, expected {tuple(static.shape)}"
            )
        if value.device.type != "cpu" and value.device != static.device:
            raise InvalidShape(f"{name} is on {value.device}, expected {static.device} or the CPU")
        if value.is_floating_point() != static.is_floating_point():
            raise InvalidShape(f"{name} has dtype {value.dtype}, expected {static.dtype}")
    for _, static, value in writes:
        if static.is_cuda and value.device.type == "cpu":
            # only a pinned copy of the same dtype and layout runs without the host
            value = value.to(static.dtype).contiguous().pin_memory()
        static.copy_(value, non_blocking=True)
