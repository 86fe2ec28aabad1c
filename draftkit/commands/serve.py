"""`draftkit serve`: serve a target and its drafter through the OpenAI API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_planning, check_serving
from draftkit.commands.options import LIBRARIES
from draftkit.engine.settings import EngineSettings
from draftkit.progress import doing
from draftkit.serve.settings import ServeSettings

EXAMPLE = "Example: draftkit serve --drafter drafter/best"


def command(
    target: Annotated[str, typer.Option(help="folder, GGUF file or hub name; or tiny, smollm2")] = "tiny",
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", "-d", help="drafter folder, or none; default: the packaged one, if any"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address; only this machine reaches 127.0.0.1")
    ] = ServeSettings.host,
    port: Annotated[int, typer.Option(help="0 = any free one")] = ServeSettings.port,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="DRAFTKIT_API_KEY", help="opens the API; repeatable")
    ] = None,
    name: Annotated[str | None, typer.Option(help="model name in the API")] = None,
    max_waiting: Annotated[
        int, typer.Option(help="answers that may wait; more get 429")
    ] = ServeSettings.max_waiting,
    max_body: Annotated[
        int, typer.Option(help="bytes of a request; more get 413")
    ] = ServeSettings.max_body_bytes,
    drain_seconds: Annotated[
        float, typer.Option(help="time for running answers after SIGTERM")
    ] = ServeSettings.drain_seconds,
    plan: Annotated[
        str, typer.Option(help="drafted tokens to verify: planned (by confidence and load) or fixed")
    ] = EngineSettings.plan,
    step_rate: Annotated[
        Path | None, typer.Option(help="of draftkit profile; none = measured at the start")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="of draftkit calibrate; none = the packaged drafter's own, else as they are"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: a GPU where there is one")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16; default: float32 on a CPU, else bfloat16")
    ] = None,
    max_running: Annotated[
        int, typer.Option(help="answers that are made at the same time")
    ] = EngineSettings.max_running,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of prompt and answer; default: the target's")
    ] = None,
    kv_gib: Annotated[
        float | None,
        typer.Option(
            help="memory for keys and values; default: most of a GPU's; on a CPU 1, or for one request"
        ),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="auto: sampling fields that a request leaves out are the target's own; none: the API's"
        ),
    ] = ServeSettings.generation_config,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="web pages of this origin may ask (CORS); * = all; repeatable")
    ] = None,
    honour_special_tokens: Annotated[
        bool,
        typer.Option(help="special tokens in contents count, as in most servers; default: they are text"),
    ] = False,
    template_switch: Annotated[
        list[str] | None,
        typer.Option(help="variable of the chat template, e.g. enable_thinking=false; repeatable"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads", min=1)] = None,
) -> None:
    """Serve a target and its drafter through the OpenAI API. A chat page is at /."""
    from draftkit.errors import ServeError
    from draftkit.serve.settings import option_names, switches_of

    if kv_gib is not None and not 0 < kv_gib < float("inf"):
        raise ServeError(f"--kv-gib is {kv_gib:g}; give the GiB of memory for keys and values, above 0")
    if name is not None and not name.strip():
        raise ServeError(
            "--name is empty; give the model's name in the API, or leave it out to take the target's"
        )
    # a secret that is missing must not leave the door open
    if os.environ.get("DRAFTKIT_API_KEY") == "" and not api_key:
        raise ServeError("DRAFTKIT_API_KEY is empty; give a key, or unset it to serve without one")
    keys = tuple(api_key or ())
    with option_names():
        settings = ServeSettings(
            host,
            port,
            keys,
            max_body,
            max_waiting,
            drain_seconds=drain_seconds,
            generation_config=generation_config,
            allow_origins=tuple(allow_origin or ()),
        )
        engine = EngineSettings(
            plan=plan,  # type: ignore[arg-type]  # checked there
            device=device,
            dtype=dtype,
            max_running=max_running,
            max_length=max_length,
            kv_bytes=max(1, int(kv_gib * 2**30)) if kv_gib is not None else None,
        )
    check_planning(step_rate, calibration)
    check_serving(target, drafter, engine)
    with doing(LIBRARIES):
        from draftkit.serve.server import load_served, run_server

    pair = (
        target,
        drafter,
        name,
        engine,
        threads,
        step_rate,
        calibration,
        generation_config,
        honour_special_tokens,
        switches_of(template_switch or ()),
    )
    run_server(lambda: load_served(*pair), settings)
