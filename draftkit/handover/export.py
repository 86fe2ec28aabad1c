"""Handing a drafter to another engine: what is written, what was changed for it, and the command that runs
it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from draftkit.artefact import read_json
from draftkit.draft.checkpoint import load_drafter, open_drafter, save_drafter
from draftkit.draft.checkpoint_files import INDEX, WEIGHTS, read_provenance
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.deepseek_v4_checkpoint import STYLES as V4_STYLES
from draftkit.draft.drafter import Drafter, DrafterConfig, DrafterShape
from draftkit.errors import CheckpointError, ConfigError
from draftkit.handover.deepseek_v4 import commands
from draftkit.handover.deepseek_v4_gguf import SCRIPT, write_v4_gguf
from draftkit.handover.engines import Engine, engine_named
from draftkit.handover.full_vocabulary import with_full_vocabulary
from draftkit.handover.llamacpp import target_gguf, write_gguf
from draftkit.output import check_free, make_folder
from draftkit.target.transformers import DTYPES
from draftkit.target.weights import TargetFiles

OWN_NOTES = ("draftkit", "algorithm", "sha256", "config_sha256", "digest")  # of a folder, written anew


@dataclass(frozen=True)
class HandedOver:
    """A folder or file for one engine. `changes` are what it holds otherwise than the drafter it was made of,
    `notes` what its owner must know."""

    engine: str
    checked: str
    path: Path
    size: int  # bytes of weights
    command: str
    changes: tuple[str, ...]
    notes: tuple[str, ...]


def hand_over(
    name: str,
    folder: Path,
    out: Path,
    target: str,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    converter: Path | None = None,
) -> HandedOver:
    """Write the drafter of `folder` for an engine; a DeepSeek-V4 module by llama.cpp's own `converter`.
    Raises ConfigError for an unknown engine or dtype, one place for both, or one that holds weights and is
    not to be overwritten; CheckpointError when the engine
    cannot run this drafter, and why."""
    engine = engine_named(name)
    if is_v4(folder):
        return _hand_over_v4(engine, folder, out, target, converter, overwrite)
    if converter is not None:
        raise ConfigError("--converter: is for DeepSeek-V4 modules alone; leave it out")
    if dtype not in DTYPES or dtype == "float64":
        raise ConfigError(f"--dtype {dtype}: engines take bfloat16 or float32")
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the drafter's own folder, choose another")
    if name != "llama.cpp":
        check_free(out, WEIGHTS, INDEX, overwrite=overwrite)
    served = target_gguf(target) if name == "llama.cpp" else None  # a mistake shows before weights are read
    files = TargetFiles(target)
    trained_for = read_provenance(folder).get("target_fingerprint")
    quantised_anew = served is not None and trained_for not in (None, files.info.fingerprint)
    if quantised_anew:  # another GGUF of the same model than that of the training
        drafter = load_drafter(folder, DTYPES["float32"], files)
    else:
        drafter = open_drafter(folder, files, DTYPES["float32"])
    drafter, changes = _made_to_fit(engine, drafter, files)
    if served is not None:
        path = out if out.suffix == ".gguf" else out / f"{drafter.config.algorithm}.gguf"
        check_free(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(drafter, served, path, DTYPES[dtype])
        size, model = path.stat().st_size, str(served)
    else:
        make_folder(out)
        note = {k: v for k, v in read_provenance(folder).items() if k not in OWN_NOTES}
        save_drafter(drafter, out, note | {"handed_to": name}, DTYPES[dtype])
        path, size, model = out, (out / WEIGHTS).stat().st_size, target
    return HandedOver(
        name,
        engine.checked,
        path,
        size,
        command_for(name, drafter.config, model, path),
        changes,
        (
            *engine.differences(drafter.config),
            *engine.all_notes(drafter.config),
            *(
                ["this GGUF is not the very target of the training: measure acceptance"]
                if quantised_anew
                else ()
            ),
        ),
    )


def is_v4(folder: Path) -> bool:
    """Whether the folder holds a DeepSeek-V4 module."""
    raw = read_json(folder / "config.json", CheckpointError)
    names = raw.get("architectures") if isinstance(raw, dict) else None
    return isinstance(names, list) and any(name in V4_STYLES for name in names if isinstance(name, str))


def _hand_over_v4(
    engine: Engine, folder: Path, out: Path, target: str, converter: Path | None, overwrite: bool
) -> HandedOver:
    if engine.name != "llama.cpp":
        raise CheckpointError(
            f"{engine.name} takes a DeepSeek-V4 module from its checkpoint: draftkit export -d {folder} "
            f"-o {target} --form bundled (or --form dspark, for SGLang alone)"
        )
    if converter is None:
        raise ConfigError(f"--for llama.cpp: a DeepSeek-V4 module needs --converter, llama.cpp's {SCRIPT}")
    drafter = open_drafter(folder, TargetFiles(target), DTYPES["float32"])
    if not isinstance(drafter, DeepseekV4Drafter):
        raise CheckpointError(f"{folder}: is {drafter.config.algorithm}, no DeepSeek-V4 module")
    path = out if out.suffix == ".gguf" else out / "dspark.gguf"
    check_free(path, overwrite=overwrite)
    write_v4_gguf(drafter, Path(target), converter, path)
    command = commands(target, drafter.config)["llama.cpp"].replace("dspark.gguf", shlex.quote(str(path)))
    differs = ["experts are stored in FP4, the rest in Q8_0: measure acceptance"]
    return HandedOver(
        engine.name, engine.checked, path, path.stat().st_size, command, (), (*differs, *engine.notes[""])
    )


def _made_to_fit(engine: Engine, drafter: Drafter, target: TargetFiles) -> tuple[Drafter, tuple[str, ...]]:
    """The drafter as the engine can run it, and what was changed. Raises CheckpointError when it cannot."""
    reasons = engine.refusals(drafter.config)
    if not reasons:
        return drafter, ()
    size = drafter.config.draft_vocab_size
    if size and drafter.config.algorithm != "eagle3":
        whole = with_full_vocabulary(drafter, target)
        if not engine.refusals(whole.config):
            return whole, (
                f"expanded from {size:,} to all {drafter.config.vocab_size:,} tokens, because "
                f"{reasons[0]}; tokens "
                "that it could not draft before have no Markov bias: measure it again",
            )
    raise CheckpointError(f"{engine.name} ({engine.checked}) does not run this drafter: {'; '.join(reasons)}")


def command_for(engine: str, config: DrafterShape, target: str, drafter: Path) -> str:
    """The command that serves the pair. All proposals of the drafter; `draftkit doctor` says how many pay."""
    count, place = config.gamma, str(drafter)
    method = "dflash" if config.algorithm == "dflash2" else config.algorithm  # engines tell them apart
    anchor = isinstance(config, DrafterConfig) and config.layout == "anchor"
    if engine == "vllm":
        speculative = {"method": method, "model": place, "num_speculative_tokens": count}
        if config.algorithm == "dspark":
            speculative["draft_sample_method"] = "probabilistic"
        return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(speculative)])
    if engine == "sglang":
        words = ["python", "-m", "sglang.launch_server", "--model-path", target, "--speculative-algorithm"]
        words += [method.upper(), "--speculative-draft-model-path", place]
        if config.algorithm == "eagle3":
            sizes = {"num-steps": count, "eagle-topk": 1, "num-draft-tokens": count + 1}
        else:
            sizes = {f"{method}-block-size": config.block_size}
        return shlex.join([*words, *(w for n, v in sizes.items() for w in (f"--speculative-{n}", str(v)))])
    if engine == "llama.cpp":
        kind = "draft-dspark" if anchor else "draft-dflash"
        words = [
            "llama-server",
            "-m",
            target,
            "-md",
            place,
            "--spec-type",
            kind,
            "--spec-draft-n-max",
            str(count),
        ]
        return shlex.join([*words, "--jinja", "--metrics"])
    return shlex.join(["mlx-dspark", "serve", "--model", target, "--drafter", place, "--mode", method])


def print_handed_over(made: HandedOver) -> None:
    """Where it lies, the command, and what to know."""
    print(f"{made.size / 1e6:.1f} MB for {made.engine} (checked against {made.checked}) in {made.path}")
    for line in made.changes:
        print(f"  changed: {line}")
    for line in made.notes:
        print(f"  note: {line}")
    print(f"run it:\n  {made.command}")
