"""The command line: a table of commands. Each imports what it runs when it runs; `--help` imports neither
torch nor the recipes."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftkit import __version__
from draftkit.commands import doctor, evaluate, export, push, report, suite
from draftkit.commands.chat import chat
from draftkit.commands.early import check_given, check_inputs, check_pair, check_serving, check_simulation
from draftkit.commands.numbers import whole_numbers
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    LogFormatOption,
    OutOption,
    PromptsOption,
    RecipeOption,
    SetOption,
    SkipOption,
    StartOption,
    TargetOption,
    with_target,
)
from draftkit.commands.recipes import recipes
from draftkit.commands.user_defaults import user_defaults
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ConfigError, DraftkitError, Interrupted
from draftkit.interrupt import raise_on_signals
from draftkit.output import as_json, check_file, make_folder
from draftkit.progress import doing
from draftkit.serve.settings import LoadSettings, ServeSettings
from draftkit.suggest import following

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftkit.config import Recipe
    from draftkit.data.messages import Conversation

app = typer.Typer(
    help="Train, measure and serve drafters that make an unchanged large model answer faster.",
    epilog="Begin with: draftkit quickstart --out runs/quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

features_app = typer.Typer(help="Look after feature stores.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(features_app, name="features")

FromOption = Annotated[
    str | None, typer.Option("--from", help="vllm=URL: a vLLM server reads them (docs/features.md)")
]
ProbeOption = Annotated[
    bool, typer.Option("--probe/--no-probe", help="compare the server's layers with the target's first")
]

# Commands that keep what is finished when they are interrupted, and take it up when they are given again.
GOES_ON = {"quickstart", "specialise", "generate", "capture", "train", "evaluate", "calibrate"}

# Commands that have a file of their own, by name.
TABLE = {
    "evaluate": evaluate,
    "suite": suite,
    "report": report,
    "export": export,
    "doctor": doctor,
    "push": push,
}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """draftkit."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def parse_from(text: str) -> str:
    """The URL of "vllm=URL". Raises ConfigError for anything else."""
    kind, _, url = text.partition("=")
    if kind != "vllm" or not url.startswith(("http://", "https://")):
        raise ConfigError(f"--from {text}: give vllm=http://HOST:PORT")
    return url


def _recipe(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe, read before anything heavy is imported: a mistake in it shows at once."""
    from draftkit.config import load_recipe

    return load_recipe(name, overrides or [])


@app.command(epilog="Example: draftkit quickstart --out runs/quickstart --minutes 6")
def quickstart(
    out: OutOption = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="time for all stages together", min=1)] = 6,
    recipe: RecipeOption = "tiny-quickstart",
    overrides: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """All stages on the embedded target, in a few minutes."""
    settings = _recipe(recipe, overrides)
    check_inputs(settings)
    # The machine is this command's alone: cores that wait for the next operation stay awake a few ms longer
    # (libgomp reads this when torch is imported), which makes small training steps 5 to 10 % faster.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000000")
    from draftkit.quickstart import run_quickstart

    run_quickstart(settings, out, minutes, json_output)


@app.command(
    epilog="Example: draftkit generate -p prompts.jsonl -o answers.jsonl --set generate.temperature=0.7"
)
def generate(
    out: OutOption,
    prompts: PromptsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    skip_invalid: SkipOption = False,
    servers: Annotated[
        list[str] | None, typer.Option("--server", help="OpenAI-compatible server that answers; repeatable")
    ] = None,
    model: Annotated[str | None, typer.Option(help="its name at the servers; default: their first")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="of the servers")] = None,
) -> None:
    """Let the target answer prompts. The same command goes on where it was interrupted, and several processes
    that are given the same command share the work."""
    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    if any(out.resolve() == path.resolve() for path in prompts or []):
        raise ConfigError(f"--out {out} is the file of prompts; choose another")
    check_file(out)
    from draftkit.data.conversations import (
        SkippedRows,
        check_beginning,
        count_rows,
        iterate_conversations,
    )

    check_beginning(prompts or [], skip_invalid)
    check_inputs(settings)
    with doing(LIBRARIES):
        from draftkit import stages

    paths = prompts or [stages.TINY_PROMPTS]
    skipped = SkippedRows() if skip_invalid else None

    def read(first: int) -> Iterator[Conversation]:
        if skipped is None:
            return iterate_conversations(paths, first=first)
        return islice(iterate_conversations(paths, skipped.anew()), first, None)

    total = count_rows(paths)
    if servers:
        report = stages.run_generate_by_servers(settings, read, out, servers, model, api_key, total, skipped)
    else:
        opened = stages.open_target(settings)
        report = stages.run_generate(*opened, settings, read, out, total=total, skipped=skipped)
    if skipped:
        skipped.report()
    ends = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
    typer.echo(
        f"{report.records} conversations ({ends}) in {out}; next: "
        f"{following(f'capture -c {out} -o features', recipe, overrides)}"
    )


@app.command(epilog="Example: draftkit capture -c answers.jsonl -o features")
def capture(
    out: OutOption,
    conversations: Annotated[list[Path], typer.Option("--conversations", "-c", help="JSONL with answers")],
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    skip_invalid: SkipOption = False,
    source: FromOption = None,
    probe: ProbeOption = True,
    append: Annotated[
        bool, typer.Option("--append", help="add other conversations to a finished store")
    ] = False,
) -> None:
    """Let the target read conversations into a feature store. The same command goes on where it was
    interrupted. Several processes may share the work: start all of them, or torchrun, with the same
    command."""
    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    make_folder(out)
    from draftkit.data.conversations import SkippedRows, check_beginning

    check_beginning(conversations, skip_invalid)
    check_inputs(settings)
    with doing(LIBRARIES):
        from draftkit import feature_stages, stages

    skipped = SkippedRows() if skip_invalid else None
    if source:
        files, tokenizer = stages.read_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations, skipped)
        reader = feature_stages.server_reader(settings, files, parse_from(source), probe)
        report = feature_stages.capture_by(files, reader, tokenizer, settings, read, out, append)
    else:
        model, tokenizer = stages.open_target(settings, split=True)
        read = stages.answers_of(settings, tokenizer, conversations, skipped)
        report = feature_stages.run_capture(model, tokenizer, settings, read, out, append)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return
    if skipped:
        skipped.report()
    typer.echo(
        f"{report.samples} samples, {report.tokens} tokens in {out} ({report.left_out()}); "
        f"next: {following(f'train -f {out} -o drafter', recipe, overrides)}"
    )


@app.command(
    epilog="Examples: draftkit train -f features -o drafter --set train.epochs=4; draftkit train -c "
    "answers.jsonl -o drafter"
)
def train(
    out: OutOption,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features", "-f", help="feature store; repeatable, FOLDER=0.5 takes a half in an epoch"
        ),
    ] = None,
    conversations: Annotated[
        list[Path] | None,
        typer.Option(
            "--conversations", "-c", help="JSONL with answers: the target reads them while the drafter trains"
        ),
    ] = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    start_from: StartOption = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="feature store to validate on; default: a share of what is learnt from"),
    ] = None,
    source: FromOption = None,
    probe: ProbeOption = True,
) -> None:
    """Train a drafter. On a feature store, on live features of conversations, or on both: then the first
    epoch fills the store. The same command goes on where it was interrupted."""
    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    if not features and not conversations:
        raise ConfigError("give --features (a store), --conversations (live), or both (live, and kept)")
    if source and not conversations:
        raise ConfigError("--from reads --conversations; give some, or leave --from out")
    if conversations and len(features or []) > 1:
        raise ConfigError("--conversations fill one store; give one --features, or none")
    make_folder(out)
    for store in features or []:
        if not conversations:  # which would fill it
            check_given("--features", Path(store if Path(store).exists() else store.partition("=")[0]))
    check_inputs(settings, start_from, conversations or [])
    with doing(LIBRARIES):
        from draftkit import feature_stages, stages

    keep = Path(features[0]) if features else None

    def aside(target: Any, tokenizer: Any) -> Any:
        folders = [validation] if validation else []
        return feature_stages.open_features(settings, target, tokenizer, folders) if folders else None

    if source and conversations:
        files, tokenizer = stages.read_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations)
        reader = feature_stages.server_reader(settings, files, parse_from(source), probe)
        live = feature_stages.live_features_by(files, reader, True, tokenizer, settings, read, out, keep)
        held = aside(files, tokenizer)
        report = stages.run_train(files, tokenizer, settings, live, out, None, start_from, held)
    elif conversations:
        model, tokenizer = stages.open_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations)
        live = feature_stages.live_features(model, tokenizer, settings, read, out, keep)
        held = aside(model, tokenizer)
        report = stages.run_train(model, tokenizer, settings, live, out, lambda: model, start_from, held)
    else:
        files, tokenizer = stages.read_target(settings)
        stored = feature_stages.open_features(settings, files, tokenizer, features or [])
        held = aside(files, tokenizer)
        report = stages.run_train(files, tokenizer, settings, stored, out, None, start_from, held)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return
    best = out / "best"
    typer.echo(
        f"{report.steps} steps in {report.seconds:.0f} s, simulated accepted length {report.best:.2f}; "
        f"next: {following(f'evaluate -d {best} -o results', recipe, overrides)}"
    )


@app.command(epilog="Example: draftkit plan -r qwen3-4b-dspark --count 1000000 --tokens 4096")
def plan(
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    conversations: Annotated[
        list[Path] | None, typer.Option("--conversations", "-c", help="JSONL with answers; some are rendered")
    ] = None,
    count: Annotated[int, typer.Option(help="without files: so many conversations", min=1)] = 100_000,
    tokens: Annotated[int, typer.Option(help="without files: tokens of each", min=8)] = 2048,
    answers: Annotated[float, typer.Option(help="without files: share of answers", min=0.01, max=1)] = 0.5,
    devices: Annotated[int, typer.Option(help="devices that share each stage (torchrun)", min=1)] = 1,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s of one, instead of measuring this machine's", min=1e-3)
    ] = None,
    out: OutOption = Path(),
    json_output: JsonOption = False,
) -> None:
    """Bytes, hours and memory of each stage, before it runs. And whether features are better live or stored;
    no weights are needed. Exit code 2 where the disk of --out cannot hold the store."""
    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    from draftkit.plan import plan as planning

    made = planning.plan(settings, conversations or [], (count, tokens, answers), out, devices, tflops)
    if json_output:
        typer.echo(as_json(made.as_dict(), indent=1))
    else:
        for line in planning.lines(made):
            typer.echo(line)
    if not made.fits:
        raise planning.refuse(made, settings.capture.dtype)


@features_app.command("verify", epilog="Example: draftkit features verify features --repair")
def features_verify(
    folder: Annotated[Path, typer.Argument(help="feature store")],
    repair: Annotated[
        bool, typer.Option("--repair", help="leave out what is damaged, so that capture writes it again")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Read a whole feature store and name each record that is damaged; exit code 1 where one is."""
    from dataclasses import asdict

    from draftkit.feature_stages import run_verify

    found = run_verify(folder, repair)
    if json_output:
        typer.echo(as_json(asdict(found)))
    else:
        for line in found.damaged:
            typer.echo(line)
        said = (
            "left out; run the same `draftkit capture` again" if repair else "give --repair to leave them out"
        )
        typer.echo(
            f"{found.records} records, {found.bytes / 1e6:,.1f} MB, {len(found.damaged)} faults"
            + (f": {said}" if found.damaged else "")
        )
    raise typer.Exit(1 if found.damaged and not repair else 0)


@app.command(epilog="Example: draftkit traces requests.jsonl ~/.codex/sessions/rollout.jsonl -o traces")
def traces(
    logs: Annotated[list[Path], typer.Argument(help="logs, as they lie on disk")],
    out: OutOption,
    form: LogFormatOption = None,
    validation_share: Annotated[float, typer.Option(help="of the conversations", min=0, max=0.5)] = 0.05,
    held_out_share: Annotated[float, typer.Option(help="of the conversations", min=0, max=0.5)] = 0.1,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="mask no keys, tokens and mail addresses")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make conversations of the logs of your traffic.

    They are split by conversation into train.jsonl, validation.jsonl and heldout.jsonl.

    Formats: bodies (requests and responses of the chat API, LiteLLM's log, conversations), vllm (its log with
    --enable-log-requests), otel (OpenTelemetry GenAI spans), claude-code and codex (their session files)."""
    from dataclasses import asdict

    from draftkit.data.traces import make_traces

    report, skipped = make_traces(logs, out, form, validation_share, held_out_share, keep_secrets)
    skipped.report()
    if json_output:
        typer.echo(as_json(asdict(report)))
        return
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"next: {following(f'capture -c {out}/train.jsonl -o features')}, or draftkit specialise")


@app.command(epilog="Example: draftkit mix mixture.yaml -o prompts.jsonl --limit 50000")
def mix(
    mixture: Annotated[
        Path, typer.Argument(help="YAML with sources: presets, hub ids or files, weights, caps in tokens")
    ],
    out: OutOption,
    limit: Annotated[int | None, typer.Option(help="conversations in all", min=1)] = None,
    skip_invalid: SkipOption = False,
    json_output: JsonOption = False,
) -> None:
    """Mix data sets into one file, each question once.

    Presets: open-perfectblend, sharegpt, ultrachat, magpie, nemotron-chat, nemotron-code, nemotron-math,
    toolace and hermes-tools; they and hub ids are read through `datasets` (extra `data`)."""
    from dataclasses import asdict

    from draftkit.data.conversations import SkippedRows
    from draftkit.data.sources import mix as write_mixture
    from draftkit.data.sources import read_mixture

    chosen = read_mixture(mixture)
    check_file(out)
    skipped = SkippedRows() if skip_invalid else None
    report = write_mixture(chosen, out, limit, skipped)
    if skipped:
        skipped.report()
    if json_output:
        typer.echo(as_json(asdict(report)))
        return
    for name, count in report.conversations.items():
        typer.echo(f"{name}: {count} conversations, about {report.tokens[name]:,} tokens")
    typer.echo(
        f"{report.repeated} left out as there before; next: "
        f"{following(f'generate -p {out} -o answers.jsonl')}"
    )


@app.command(epilog="Example: draftkit specialise --traces requests.jsonl --start-from drafter/best -o mine")
def specialise(
    out: OutOption,
    logs: Annotated[
        list[Path], typer.Option("--traces", help="logs; repeatable; formats: draftkit traces --help")
    ],
    start_from: StartOption = None,
    target: Annotated[str | None, typer.Option(help="folder or hub id; default: the recipe's")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="default: that of the drafter to start from, else tiny-dspark"),
    ] = None,
    overrides: SetOption = None,
    regenerate: Annotated[
        bool, typer.Option("--regenerate", help="let the target answer anew what was asked")
    ] = False,
    form: LogFormatOption = None,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="mask no keys, tokens and mail addresses")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make a drafter for your own traffic. Runs traces, capture and train, and prints a table of before and
    after on held-out conversations."""
    for log in logs:
        check_given("--traces", log)
    if target:
        check_pair(target, None, start_from)
    from draftkit.specialise import print_specialised, recipe_for, run_specialise

    settings = recipe_for(recipe, with_target(overrides, target), start_from, out)
    say = lambda line: typer.echo(line, err=json_output)  # noqa: E731
    found = run_specialise(settings, logs, out, start_from, regenerate, form, keep_secrets, say)
    if json_output:
        typer.echo(as_json(found.rows(), indent=1))
        return
    print_specialised(found)
    typer.echo(f"next: {following(f'serve --target {settings.target.path} --drafter {out}/drafter/best')}")


@app.command(epilog="Example: draftkit calibrate -d drafter/best -o calibration")
def calibrate(
    out: OutOption,
    drafter: Annotated[Path, typer.Option("--drafter", "-d", help="drafter folder")],
    prompts: PromptsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    temperature: Annotated[float, typer.Option(help="of the target's sampling", min=0)] = 1.0,
    json_output: JsonOption = False,
) -> None:
    """Fit a drafter's confidences to what is accepted. Proposals are recorded along held-out answers; SGLang
    reads the result."""
    from dataclasses import asdict

    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    make_folder(out)
    check_inputs(settings, drafter, prompts or [])
    from draftkit import schedule_stages, stages
    from draftkit.draft.checkpoint import open_drafter
    from draftkit.evaluate.schedule_report import calibration_notes, print_calibration
    from draftkit.ops.sampling import Sampling

    read = stages.read_prompts(prompts or [stages.TINY_HELD_OUT])
    model, tokenizer = stages.open_target(settings)
    stages.check_drafter_switches(settings, drafter)
    shown = stages.prompt_format(settings, tokenizer)
    chosen = stages.first_turns(shown, read, settings.evaluate.prompts_per_domain)
    limit, seed = settings.evaluate.max_new_tokens, settings.evaluate.seed
    opened, file = open_drafter(drafter, model), out / schedule_stages.TRACES
    traces = schedule_stages.run_record(
        model, opened, drafter, chosen, Sampling(temperature), limit, seed, file
    )
    found = schedule_stages.run_calibrate(traces, out)
    if json_output:
        typer.echo(as_json(asdict(found)))
    else:
        print_calibration(
            found.calibration.temperatures, found.before, found.after, found.held_out_rows, found.missing
        )
        for note in calibration_notes(found.before, found.after, found.prompts, found.refused):
            typer.echo(note)
        typer.echo(
            f"written to {out / schedule_stages.CALIBRATION}; next: "
            f"{following(f'profile -d {drafter} -o step_rate.json', recipe, overrides)}, then "
            f"{following(f'simulate --traces {file} --calibration {out / schedule_stages.CALIBRATION}')} "
            "--step-rate step_rate.json"
        )


@app.command(epilog="Example: draftkit profile -d drafter/best -o step_rate.json")
def profile(
    out: OutOption,
    drafter: Annotated[
        Path | None, typer.Option("--drafter", "-d", help="drafter folder; none = the target only")
    ] = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens per pass, at least 1; repeatable")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="tokens a request has already; repeatable")
    ] = None,
    repeats: Annotated[int, typer.Option(help="medians of so many", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="torch threads", min=1)] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure what a step costs on this machine. By tokens, context and requests; SGLang reads the result."""
    overrides = with_target(overrides, target)
    settings = _recipe(recipe, overrides)
    if out.suffix == ".png":
        raise ConfigError(
            f"--out {out} is the name of the plot, which lies beside the result; give one that ends in .json"
        )
    check_file(out)
    check_inputs(settings, drafter)
    import torch

    from draftkit import schedule_stages, stages
    from draftkit.draft.checkpoint import open_drafter
    from draftkit.evaluate.profile import profile_settings
    from draftkit.evaluate.schedule_report import print_step_rate

    if threads:
        torch.set_num_threads(threads)
    model, _ = stages.open_target(settings)
    opened = open_drafter(drafter, model) if drafter else None
    table = schedule_stages.run_profile(
        model, opened, drafter, profile_settings(tokens, context, repeats), out
    )
    if json_output:
        typer.echo(out.read_text("utf-8"))
    else:
        print_step_rate(table)
        serving = f"serve --target {settings.target.path}"
        known = f" --drafter {drafter} --step-rate {out}" if drafter else ""
        typer.echo(f"written to {out}; next: {following(serving + known)}")


@app.command(epilog="Example: draftkit simulate --step-rate balanced --concurrency 1,64 -o simulation")
def simulate(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for simulation.png")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="of draftkit calibrate; none = the embedded pair's")
    ] = None,
    step_rate: Annotated[
        str | None,
        typer.Option(help="file, memory-bound, balanced or compute-bound; none = the embedded pair's"),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="of draftkit calibrate")] = None,
    concurrency: Annotated[list[str] | None, typer.Option(help="requests at once, as 1,8,64")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Poisson arrivals per second; repeatable")] = None,
    requests: Annotated[int, typer.Option(help="per load", min=1)] = 1000,
    seed: int = 0,
    json_output: JsonOption = False,
) -> None:
    """Ask what drafting would bring at a load. Recorded proposals are replayed on a step-rate table, arm by
    arm."""
    if out is not None:
        make_folder(out)
    check_simulation(traces, step_rate, calibration)
    from dataclasses import asdict

    from draftkit import schedule_stages
    from draftkit.evaluate.schedule_report import print_simulation
    from draftkit.schedule.simulate import Load

    source = schedule_stages.open_simulation(traces, step_rate, calibration)
    levels = whole_numbers("--concurrency", concurrency) or ([256] if rate else [1, 4, 16, 64])
    arrivals: list[float | None] = [*rate] if rate else [None]
    loads = [Load(requests, level, one, seed) for level in levels for one in arrivals]
    outcomes, assumptions = schedule_stages.run_simulate(source, loads, out)
    if json_output:
        typer.echo(as_json({"outcomes": [asdict(o) for o in outcomes], "assumptions": assumptions}))
    else:
        print_simulation(outcomes, assumptions)


@app.command("verify-lossless", epilog="Example: draftkit verify-lossless --tables 200")
def verify_lossless(
    vocab: Annotated[int, typer.Option(help="tokens in the vocabulary", min=2, max=3)] = 3,
    gamma: Annotated[
        list[int] | None, typer.Option(help="drafted tokens, 1 to 3; repeatable; default: 2 and 3")
    ] = None,
    tables: Annotated[int, typer.Option(help="random (target, drafter, confidence) tables", min=1)] = 6,
    json_output: JsonOption = False,
) -> None:
    """Prove that drafting leaves the distribution unchanged. By enumeration, for each rule and planner; exit
    code 1 if it does not."""
    from draftkit.evaluate.lossless import print_lossless, run_lossless

    findings = run_lossless(vocab, gamma or [2, 3], tables)
    if not print_lossless(findings, tables, vocab, json_output):
        raise typer.Exit(1)


@app.command(epilog="Example: draftkit serve --drafter drafter/best")
def serve(
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
    check_given("--step-rate", step_rate)
    check_given("--calibration", calibration)
    check_serving(target, drafter, engine)
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


app.command(epilog='Example: draftkit chat --target smollm2, or: draftkit chat "What is a list?"')(chat)


@app.command(epilog="Example: draftkit bench --url http://127.0.0.1:8000 --compare-drafts --concurrency 1,8")
def bench(
    urls: Annotated[list[str], typer.Option("--url", help="server; give two to compare them")],
    compare_drafts: Annotated[
        bool, typer.Option("--compare-drafts", help="one draftkit server, with its drafts and without")
    ] = False,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(help="users at once, as 1,8; default: 1, with --rate 256, the most at once"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Poisson arrivals per second instead of waiting users")
    ] = None,
    requests: Annotated[
        int, typer.Option(help="per level; without --rate at least two per user")
    ] = LoadSettings.requests,
    warmup: int = LoadSettings.warmup,
    max_tokens: int = LoadSettings.max_tokens,
    temperature: float = LoadSettings.temperature,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="answers go on to --max-tokens, so that all servers make as many tokens"),
    ] = LoadSettings.ignore_eos,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", "-p", help="JSONL; default: the embedded ones")
    ] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="per server, in order")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder for bench.json and bench.png")
    ] = None,
    seed: int = LoadSettings.seed,
    json_output: JsonOption = False,
) -> None:
    """Measure latency and speed of a server under load.

    One OpenAI-compatible server, or two to compare them.

    Exit code 2 when a request fails; what was measured is printed and written all the same."""

    from draftkit.serve.bench import read_prompts, run_bench
    from draftkit.serve.bench_report import print_bench

    source = prompts or Path(__file__).parent / "assets" / "tiny" / "heldout.jsonl"
    settings = LoadSettings(
        read_prompts(source), requests, warmup, 1, rate, max_tokens, temperature, ignore_eos, seed=seed
    )

    def show(results: dict[str, Any]) -> None:
        typer.echo(as_json(results)) if json_output else print_bench(results)

    # By default nothing but the server holds arrivals up.
    levels = whole_numbers("--concurrency", concurrency) or [1 if rate is None else 256]
    run_bench(urls, levels, settings, out, api_key or (), show, compare_drafts)


app.command(epilog="Example: draftkit recipes dspark-plus")(recipes)


for _name, _module in TABLE.items():
    app.command(_name, epilog=_module.EXAMPLE)(_module.command)


@app.command("compile", epilog="Example: draftkit compile")
def compile_now() -> None:
    """Build the C++ functions now, before they are needed."""
    import time

    from draftkit.ops.native_build import NoNative, library_names, load_library

    for name in library_names():
        began = time.perf_counter()
        try:
            load_library(name)
            typer.echo(f"{name}: ready ({time.perf_counter() - began:.0f} s)")
        except NoNative as error:
            typer.echo(f"{name}: not compiled, PyTorch operations do the same slower: {error}")


def main() -> None:
    """Entry point: mistakes end with one line and exit code 2, a disk that fails with 1, signals with 130 or
    143."""
    raise_on_signals()
    try:
        app(default_map=user_defaults(app))
    except (DraftkitError, Interrupted, OSError) as error:
        goes_on = isinstance(error, Interrupted) and GOES_ON.intersection(sys.argv[1:2])
        hint = "; run the same command again to go on" if goes_on else ""
        typer.echo(f"error: {' '.join(str(error).split())}{hint}", err=True)
        sys.exit(1 if isinstance(error, OSError) else error.exit_code)


if __name__ == "__main__":
    main()
