"""What a command is given, looked at before anything heavy is imported: a mistake shows at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from draftkit.errors import ConfigError, ServeError
from draftkit.suggest import nearest, nearest_path

if TYPE_CHECKING:
    from draftkit.config import Recipe
    from draftkit.engine.settings import EngineSettings


def check_pair(target: str, revision: str | None = None, drafter: Path | None = None) -> None:
    """Raise TargetError unless there is such a target, CheckpointError unless the drafter is there and, as
    far as its files say, for this target."""
    from draftkit.draft.place import check_drafter
    from draftkit.target.place import find_target

    place = find_target(target, revision)
    if drafter is not None:
        check_drafter(drafter, place)


def check_inputs(recipe: Recipe, drafter: Path | None = None, prompts: Iterable[Path] = ()) -> None:
    """The recipe's target, a drafter for it, and the first rows of files of conversations. Raises
    DraftkitError."""
    from draftkit.data.conversations import check_beginning

    check_beginning(prompts, skip_invalid=False)
    check_pair(recipe.target.path, recipe.target.revision, drafter)


def check_given(option: str, path: Path | None) -> None:
    """Raise ConfigError when an option names a file or a folder that is not there."""
    if path is not None and not path.exists():
        raise ConfigError(f"{option} {path}: no such file or folder{nearest_path(path)}")


def check_simulation(traces: Path | None, step_rate: str | None, calibration: Path | None) -> None:
    """Raise ConfigError when the files of a simulation are not there, or the kind of machine is not known."""
    from draftkit.schedule.machines import MACHINES

    check_given("--traces", traces)
    check_given("--calibration", calibration)
    if step_rate is not None and step_rate not in MACHINES and not Path(step_rate).exists():
        hint = nearest(step_rate, MACHINES) or nearest_path(Path(step_rate))
        allowed = f"; give a file of draftkit profile, or one of {', '.join(MACHINES)}"
        raise ConfigError(f"--step-rate {step_rate}: no such file{hint or allowed}")


def check_serving(target: str, drafter: str | None, settings: EngineSettings) -> None:
    """A server's target, drafter, device and memory. Raises DraftkitError."""
    from draftkit.target.device import check_device, may_have_gpu, memory_bytes

    check_device(settings.device)
    check_pair(target, None, None if drafter in (None, "none") else Path(str(drafter)))
    on_processor = settings.device == "cpu" or not may_have_gpu()
    asked, has = settings.kv_bytes, memory_bytes()
    if on_processor and asked is not None and asked > has:
        raise ServeError(
            f"--kv-gib is {asked / 2**30:g}, and this machine has {has / 2**30:.1f} GiB of memory; "
            f"give less, or leave it out to take what one request needs"
        )
