"""How a target wants to be sampled: the fields of its generation_config.json, for requests that leave them
out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError, TargetError
from draftkit.target.loading import resolve_target

log = logging.getLogger("draftkit.serve")
_FILE = "generation_config.json"
_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # those that vLLM takes


def sampling_defaults(target: str) -> dict[str, Any]:
    """What the file sets, and nothing that it leaves out; nothing at all where it says `do_sample: false`, or
    is not there.

    The file itself is read, because Transformers' object also has defaults of its own. Raises TargetError for
    values that cannot work.
    """
    try:
        told = json.loads(Path(str(cached_file(resolve_target(target), _FILE))).read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise TargetError(
            f"{target}: {_FILE} is not JSON: {error}; mend it or give --generation-config none"
        ) from error
    if not isinstance(told, dict) or told.get("do_sample") is False:
        return {}
    found = {name: told[name] for name in _FIELDS if told.get(name) is not None}
    try:
        SamplingParams(**found)
    except (DataError, TypeError) as error:
        raise TargetError(f"{target}: {_FILE}: {error}; mend it or give --generation-config none") from error
    if found:
        log.info(
            "sampling of requests that leave it out, by %s: %s",
            _FILE,
            ", ".join(f"{k} {v:g}" for k, v in found.items()),
        )
    return found
