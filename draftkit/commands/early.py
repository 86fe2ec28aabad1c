"""What a command is given, looked at before anything heavy is imported: a mistake shows at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from draftkit.errors import ConfigError, ServeError
from draftkit.suggest import nearest, nearest_path, no_file, no_folder

# one of these is in the folder of features that draftkit, DeepSpec or speculators wrote
STORES = ("manifest.json", "samples.idx", "state.json")
ENGINE_NAMES = ("vllm", "sglang", "llama.cpp", "mlx")

if TYPE_CHECKING:
    from draftkit.config import Recipe
    from draftkit.engine.settings import EngineSettings


def check_pair(target: str, revision: str | None = None, drafter: Path | None = None) -> None:
    """Raise TargetError unless there is such a target, with weights of the sizes that its configuration says;
    CheckpointError unless the drafter is there and, as far as its files say, for this target."""
    from draftkit.draft.place import check_drafter
    from draftkit.target.config_sizes import check_counts, held_in
    from draftkit.target.place import find_target, sizes_of

    place = find_target(target, revision)
    if place is not None and place.is_dir():
        check_counts(target, sizes_of(place), held_in(place))
    if drafter is not None:
        check_drafter(drafter, place)


def check_inputs(recipe: Recipe, drafter: Path | None = None, prompts: Iterable[Path] = ()) -> None:
    """The recipe's target, a drafter for it, and the first rows of files of conversations. Raises
    DraftkitError."""
    from draftkit.data.conversations import check_beginning
    from draftkit.target.place import deepseek_v4_switches

    check_beginning(prompts, False, deepseek_v4_switches(recipe.target))
    check_pair(recipe.target.path, recipe.target.revision, drafter)


def check_given(option: str, path: Path | None, give: str = "a file") -> None:
    """Raise ConfigError when an option, or an argument (""), names no file; `give` says what it takes."""
    if path is not None and (path.is_dir() or not path.exists()):  # a pipe is fine
        raise ConfigError(f"{option} {path}: {no_file(path, give)}".lstrip())


def check_folder(option: str, path: Path | None, give: str) -> None:
    """The same of a folder."""
    if path is not None and not path.is_dir():
        raise ConfigError(f"{option} {path}: {no_folder(path, give)}")


def check_store(option: str, folder: Path) -> None:
    """Raise ConfigError when an option names no folder of features."""
    check_folder(option, folder, "a feature store")
    if not any((folder / name).exists() for name in STORES):
        raise ConfigError(f"{option} {folder}: is no feature store; give the folder that `capture` wrote")


def check_engine(name: str | None) -> None:
    """Raise ConfigError for an engine that no drafter can be handed to."""
    if name is not None and name not in ENGINE_NAMES:
        allowed = f"choose one of {', '.join(ENGINE_NAMES)}"
        raise ConfigError(f"engine {name!r} is not known{nearest(name, ENGINE_NAMES)}; {allowed}")


def check_answers(out: Path, prompts: Sequence[Path], skip_invalid: bool) -> None:
    """Raise DataError when a file of answers holds answers to other prompts than these, as far as the first
    rows say."""
    from draftkit.data.conversations import CHECKED_FIRST, SkippedRows, iterate_conversations
    from draftkit.data.parts import SharedWork

    if prompts and (work := SharedWork(out)).begun:
        rows = iterate_conversations(prompts, SkippedRows() if skip_invalid else None)
        work.check(islice(rows, CHECKED_FIRST))


def check_simulation(traces: Path | None, step_rate: str | None, calibration: Path | None) -> None:
    """Raise ConfigError when a simulation's files are not there, or the kind of machine is not known;
    ScheduleError when a file cannot be read as what it is given for."""
    from draftkit.schedule.machines import MACHINES

    check_given("--traces", traces, "a file of draftkit calibrate")
    named = step_rate in MACHINES
    if step_rate is not None and not named and not Path(step_rate).is_file():
        hint = nearest(step_rate, MACHINES) or nearest_path(Path(step_rate))
        allowed = f"; give a file of draftkit profile, or one of {', '.join(MACHINES)}"
        what = "is a folder" if Path(step_rate).is_dir() else "no such file"
        raise ConfigError(f"--step-rate {step_rate}: {what}{hint or allowed}")
    check_planning(None if step_rate is None or named else Path(step_rate), calibration)


def check_planning(step_rate: Path | None, calibration: Path | None) -> None:
    """Raise ConfigError where an option names no file, ScheduleError where the file cannot be read as what
    `profile` or `calibrate` writes."""
    check_given("--step-rate", step_rate, "a file of draftkit profile")
    check_given("--calibration", calibration, "a file of draftkit calibrate")
    if step_rate is not None:
        from draftkit.schedule.step_rate_table import load_step_rate

        load_step_rate(step_rate)
    if calibration is not None:
        from draftkit.schedule.calibration import read_calibration

        read_calibration(calibration)


def check_length(target: str, asked: int | None) -> None:
    """Raise ServeError when requests may be longer than the target's own context, as far as its
    configuration says."""
    from draftkit.target.place import find_target, sizes_of

    place = find_target(target)
    holds = sizes_of(place).get("max_position_embeddings") if place is not None and place.is_dir() else None
    if asked is not None and isinstance(holds, int) and asked > holds:
        raise ServeError(f"--max-length is {asked}; {target} allows {holds} at most")


def check_serving(target: str, drafter: str | None, settings: EngineSettings) -> None:
    """A server's target, drafter, device and memory. Raises DraftkitError."""
    from draftkit.target.device import check_device, may_have_gpu, memory_bytes

    check_device(settings.device)
    check_pair(target, None, None if drafter in (None, "none") else Path(str(drafter)))
    check_length(target, settings.max_length)
    on_processor = settings.device == "cpu" or not may_have_gpu()
    asked, has = settings.kv_bytes, memory_bytes()
    if on_processor and asked is not None and asked > has:
        raise ServeError(
            f"--kv-gib is {asked / 2**30:g}, and this machine has {has / 2**30:.1f} GiB of memory; "
            f"give less, or leave it out to take what one request needs"
        )
