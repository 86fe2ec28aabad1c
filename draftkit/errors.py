"""The errors that draftkit raises on purpose: one line that says what was given, what is allowed, what to
do."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """Why something could not be read, for a line about it. `repr` will not do: a decoder's error holds all
    that it read."""
    return f"{type(error).__name__}: {error}"


class DraftkitError(Exception):
    """Root of all errors that the command line shows as one line; `exit_code` is what the process returns."""

    exit_code = 2


class ConfigError(DraftkitError):
    """A recipe or a setting is wrong."""


class DataError(DraftkitError):
    """Conversations or prompts are wrong."""


class TargetError(DraftkitError):
    """The target cannot be loaded or used."""


class CheckpointError(DraftkitError):
    """A drafter checkpoint or a training state cannot be read."""


class FeatureStoreError(DraftkitError):
    """A feature store is damaged, does not match, or does not fit the disk."""


class ScheduleError(DraftkitError):
    """A step-rate table, a calibration or a plan is wrong."""


class ServeError(DraftkitError):
    """The server or a benchmark of one cannot run."""


class Interrupted(BaseException):
    """The run was stopped by a signal. `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM). No Exception, as
    KeyboardInterrupt is none: it may come inside a chat template or a tokenizer, whose errors are told as the
    user's."""

    def __init__(self, exit_code: int = 130) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """The first line that an error of another library says, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
