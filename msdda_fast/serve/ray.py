# SPDX-License-Identifier: Apache-2.0
"""The same API on a Ray cluster, with replicas: `serve run msdda_fast.serve.ray:app`.

`ray.yaml` beside this file holds all settings: `serve run .../msdda_fast/serve/ray.yaml`.
"""

# no `from __future__ import annotations`: Ray reads the type that `build` takes from its signature

import os
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from msdda_fast.levels import noise_from_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.notices import quieten
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.serve.ray_drawer import Drawer
from msdda_fast.serve.ray_ingress import Ingress
from msdda_fast.serve.settings import ServeSettings, client_limit, public_name

__all__ = ["ObjectiveArgs", "RayArgs", "app", "build"]

#: More than replicas admit together; they are who refuses.
MANY = 10_000
#: Seconds between two looks at a replica's engine; three bad ones and Ray replaces it.
HEALTH_S = 2.0


class ObjectiveArgs(BaseModel):
    """The arguments of an `Objective`; without a source it is the base model."""

    model_config = ConfigDict(extra="forbid")

    source: str | None = None
    eta: float = 1.0
    timesteps: tuple[float, float] | None = None
    scale: float = 1.0
    weight_name: str | None = None
    subfolder: str | None = None
    guidance_scale: float | None = None
    noise: dict[str, Any] | None = Field(
        None,
        description='Of flow models, as in objectives.json: {"kind": "FlowSDE", "level": 0.7}.',
    )

    def objective(self) -> Objective:
        """Return the objective.

        Raises:
            ValueError: A setting is out of range.
        """
        noise = None if self.noise is None else noise_from_json(self.noise)
        return Objective(**{**dict(self), "noise": noise})


class RayArgs(BaseModel):
    """The `args:` of an application: the options of `msdda-fast serve`, and those of replicas."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "msdda-fast/emoji", description="Hub id, folder on every node, or the shipped model."
    )
    objectives: dict[str, ObjectiveArgs] | None = Field(None, description="None: the model's own.")
    accelerator: str | None = Field(
        None, description="Adapter for few steps: a file, folder or hub id, or own for the model's."
    )
    dtype: str = Field("float32", pattern="^(float32|bfloat16|float16)$")
    device: str | None = Field(None, description="None: cuda if a replica has a GPU, else cpu.")
    max_batch: int = Field(8, ge=1)
    max_wait_ms: float = Field(20.0, ge=0)
    queue_limit: int = Field(64, ge=1, description="Maximum images in the queue of each replica.")
    batch_sizes: list[int] | None = Field(
        None, description="Of `Engine`; with one size, images on the CPU agree to the bit."
    )
    sizes: list[str] = []
    steps: int = 25
    max_steps: int = 64
    max_images: int = 8
    max_cost: float = 512.0
    timeout_s: float = 120.0
    grace_s: float = Field(30.0, ge=0, description="Seconds for a stopping replica to finish.")
    log_prompts: bool = False
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs per replica; None: 1 if the machine that builds the app has one, else 0.",
    )
    num_cpus: float = Field(1.0, ge=0, description="CPUs per replica, which has as many threads.")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    ingresses: int = Field(1, ge=1, description="Processes that check requests and encode images.")


def build(args: RayArgs) -> Application:
    """Return the application. The API key is read from MSDDA_API_KEY where this function runs.

    Raises:
        ValueError: A setting is out of range; nothing has been started.
    """
    settings = ServeSettings(
        model=public_name(args.model),
        sizes=tuple(args.sizes),
        steps=args.steps,
        max_steps=args.max_steps,
        max_images=args.max_images,
        max_cost=args.max_cost,
        timeout_s=args.timeout_s,
        api_key=os.environ.get("MSDDA_API_KEY"),
        log_prompts=args.log_prompts,
    )
    gpus = float(torch.cuda.is_available()) if args.num_gpus is None else args.num_gpus
    drawer = serve.deployment(
        name="drawer",
        ray_actor_options={"num_gpus": gpus, "num_cpus": args.num_cpus},
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": max(args.min_replicas, args.max_replicas),
            # one batch is drawn while the next one waits
            "target_ongoing_requests": 2 * args.max_batch,
        },
        # the engine's own line is what bounds requests, and refuses them with a time to come back
        max_ongoing_requests=2 * args.max_batch + args.queue_limit,
        max_queued_requests=args.queue_limit,
        graceful_shutdown_timeout_s=args.grace_s,
        health_check_period_s=HEALTH_S,
    )(Drawer)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=args.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=args.grace_s,
    )(serve.ingress()(Ingress))
    engine = {
        "max_batch": args.max_batch,
        "max_wait_ms": args.max_wait_ms,
        "queue_limit": args.queue_limit,
        "client_limit": client_limit(args.queue_limit, args.max_images),
        "batch_sizes": args.batch_sizes,
    }
    replicas = drawer.bind(partial(_load, args), settings, engine)
    application: Application = ingress.bind(replicas, settings)
    return application


def _load(args: RayArgs) -> Any:  # noqa: ANN401 - of any class
    quieten()
    objectives = {name: one.objective() for name, one in (args.objectives or {}).items()}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = MSDDAPipeline.from_pretrained(
        args.model,
        objectives=objectives or None,
        dtype=getattr(torch, args.dtype),
        accelerator=args.accelerator,
    )
    return pipe.to(torch.device(device))


#: The shipped model, or with `serve run msdda_fast.serve.ray:build model=...` any other.
app = build(RayArgs.model_validate({}))
