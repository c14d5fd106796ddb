# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast serve`: a model served over HTTP."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Any

import typer

from msdda_fast.cli.draw_options import ACCELERATED_STEPS, STEPS, AcceleratorOption
from msdda_fast.cli.session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    ModelOption,
    ObjectiveOption,
    guidance_for,
    load,
    reported,
    saved_class,
)

#: Holds the API key: what is on a command line can be read by everybody on the machine.
API_KEY = "MSDDA_API_KEY"


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    accelerator: AcceleratorOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum images per batch.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds to wait for more requests to fill a batch.")
    ] = 20.0,
    queue_limit: Annotated[
        int, typer.Option(min=1, help="Maximum images in the queue; more are refused with 429.")
    ] = 64,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes, each with its own model and queue.")
    ] = 1,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size that requests may ask for. Repeatable; the first is the default.",
            show_default="the model's own",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps T of requests that do not set them.",
            show_default=f"{STEPS}; {ACCELERATED_STEPS} with an accelerator",
        ),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Largest T a request may set.")] = 64,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum images per request.")] = 8,
    max_cost: Annotated[
        float,
        typer.Option(
            min=1, help="Largest n * T * pixels of a request; pixels in images of default size."
        ),
    ] = 512.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request is abandoned.")
    ] = 120.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to finish accepted requests when told to stop.")
    ] = 8.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Also log prompts.")] = False,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI's images API, with weights in every request.

    Requests with different weights, prompts and seeds share batches. Set MSDDA_API_KEY to require
    that key of every client, or one of several keys, one a line. A running server documents its
    API at /docs.

    [dim]msdda-fast serve --port 8000[/dim]
    """
    with reported("the server has shut down"):
        try:
            from msdda_fast.serve.process import Process
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is missing; install it with: pip install 'msdda-fast[serve]'"
            ) from None
        from msdda_fast.serve.facts import check_draws_images
        from msdda_fast.serve.settings import ServeSettings, client_limit, public_name

        check_draws_images(saved_class(model))
        process = Process(
            load=partial(_load, model, objective, dtype, device, accelerator),
            settings=ServeSettings(
                model=public_name(model),
                sizes=tuple(size or ()),
                steps=steps or (STEPS if accelerator is None else ACCELERATED_STEPS),
                guidance_scale=guidance_for(model, None),
                max_steps=max_steps,
                max_images=max_images,
                max_cost=max_cost,
                timeout_s=timeout,
                api_key=os.environ.get(API_KEY),
                log_prompts=log_prompts,
            ),
            engine={
                "max_batch": max_batch,
                "max_wait_ms": max_wait_ms,
                "queue_limit": queue_limit,
                "client_limit": client_limit(queue_limit, max_images),
            },
            host=host,
            port=port,
            grace_s=grace,
        )
        if workers > 1:
            process.run_many(workers)
        else:
            process.run()


def _load(
    model: str,
    objectives: list[str] | None,
    dtype: DType,
    device: str | None,
    accelerator: str | None,
) -> Any:  # noqa: ANN401 - a pipeline of any class
    from msdda_fast.pipelines.notices import quieten

    quieten()
    return load(model, objectives, dtype, device, accelerator)
