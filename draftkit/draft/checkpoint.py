"""Drafter checkpoints: Hugging Face folders that other engines load unchanged (`checkpoint_forms.py`: which
form is what).

A folder has a flat `config.json`, safetensors in one file or in shards with an index, and, when draftkit
wrote it, `draftkit.json` with provenance. Embedding and head are the target's, so a folder may leave them
out: it is then loaded together with its target. Nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draftkit import __version__
from draftkit.artefact import sealed
from draftkit.draft.algorithms import build, form_for, held_by, read_shape, tensors_from_form, tensors_to_form
from draftkit.draft.bounds import check_bounds
from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.checkpoint_files import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    read_note,
    read_provenance,
    read_tensors,
)
from draftkit.draft.drafter import Drafter, DrafterShape
from draftkit.errors import CheckpointError, ConfigError
from draftkit.output import as_json, sha256_of, write_tensors, write_text
from draftkit.target.interface import TargetWeights

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def new_drafter(
    config: DrafterShape, embedding_VH: Tensor, head_VH: Tensor, draft_ids_W: Tensor | None = None
) -> Drafter:
    """A fresh drafter, in float32 on the CPU, over the target's embedding and head: the very tensors where
    they are so, too.

    `draft_ids_W` (int64) are the target ids of a reduced draft vocabulary. Raises CheckpointError when sizes
    do not fit.
    """
    drafter = build(config)
    drafter.choose_vocabulary(draft_ids_W, head_VH)
    head_VH = head_VH if draft_ids_W is None else head_VH[draft_ids_W]
    for module, source in ((drafter.embed_tokens, embedding_VH), (drafter.lm_head, head_VH)):
        if module.weight.shape != source.shape:
            raise CheckpointError(
                f"target embedding {tuple(source.shape)} does not fit a drafter of "
                f"{tuple(module.weight.shape)}"
            )
        # the same tensor where nothing differs
        own = source.detach().to(module.weight.device, module.weight.dtype)
        module.weight = torch.nn.Parameter(own, requires_grad=False)
    return drafter


def save_drafter(
    drafter: Drafter,
    folder: Path,
    provenance: dict[str, Any],
    dtype: torch.dtype,
    form: str = "portable",
    lender: TargetWeights | None = None,
    lend_rows: bool = False,
) -> None:
    """Write the folder; weights are replaced in one rename, last, so that a broken write is never taken for a
    drafter.

    `form` is one of `checkpoint_forms.FORMS`. With a `lender`, embedding and head are left out; a reduced
    head is only with `lend_rows`, since other engines look for it in the folder. Raises CheckpointError when
    the form cannot hold this drafter, or when they are not the lender's, and OSError when the disk does not
    take it.
    """
    chosen = form_for(drafter.config, form)
    fields = chosen.write(drafter.config) | {"dtype": str(dtype).removeprefix("torch.")}
    tensors = {k: v.detach().to("cpu", dtype).clone().contiguous() for k, v in drafter.state_dict().items()}
    if lender is not None:
        _leave_out_borrowed(drafter, tensors, lender, dtype, lend_rows)
    if drafter.draft_ids_W is not None:
        ids_W = drafter.draft_ids_W.cpu()
        tensors["d2t"] = ids_W - torch.arange(len(ids_W))
        tensors["t2d"] = torch.zeros(drafter.config.vocab_size, dtype=torch.bool).index_fill_(0, ids_W, True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(fields, indent=1) + "\n")
    partial = folder / (WEIGHTS + ".partial")
    write_tensors(partial, tensors_to_form(tensors, chosen, drafter.config), save_file, {"format": "pt"})
    note = {"draftkit": __version__, "algorithm": drafter.config.algorithm} | provenance
    note |= {"sha256": sha256_of(partial), "config_sha256": sha256_of(folder / CONFIG)}
    write_text(folder / PROVENANCE, as_json(sealed(json.loads(as_json(note))), indent=1) + "\n")
    partial.replace(folder / WEIGHTS)


def load_drafter(
    folder: Path, dtype: torch.dtype = torch.float32, target: TargetWeights | None = None
) -> Drafter:
    """Read a folder in any known form; what it leaves out, or holds with the same numbers, are the very
    tensors of `target`.

    Raises CheckpointError naming the file, the field or the tensor that is wrong, or that only the target can
    give.
    """
    config = read_config(folder, target.info.num_layers if target else None)
    if (folder / "mask_embedding.pt").exists():
        raise CheckpointError(
            f"{folder}: holds a pickled mask_embedding.pt, which draftkit neither reads nor ignores"
        )
    return assemble(str(folder), config, read_tensors(folder, held_by(config)), dtype, target)


def assemble(
    where: str,
    config: DrafterShape,
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    target: TargetWeights | None = None,
) -> Drafter:
    """A drafter of this shape from tensors under the names of any form. Raises CheckpointError as
    `load_drafter`; `where` is what its message begins with."""
    try:
        tensors = tensors_from_form(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    ids_W = _take_draft_ids(where, config, tensors)
    for name in (EMBEDDING, HEAD):
        if name not in tensors:
            tensors[name] = _borrowed(where, name, target, ids_W)
    with torch.device("meta"):  # no memory until the sizes are known to be those of the tensors
        wanted = {k: v.shape for k, v in build(config).state_dict().items()}
    if config.attention_bias:  # engines' EAGLE-3 has none after its attention
        ends = {name: shape for name, shape in wanted.items() if name.endswith("o_proj.bias")}
        tensors |= {name: torch.zeros(shape) for name, shape in ends.items() if name not in tensors}
    check_tensors(where, wanted, tensors)
    drafter = build(config)
    shared = _shared(tensors, target, ids_W) if target is not None else {}
    # files are mapped: copied
    own = {name: t.to(dtype, copy=True) for name, t in tensors.items() if name not in shared}
    drafter.load_state_dict(own | shared, assign=True)
    drafter.choose_vocabulary(ids_W, _head_to_train_with(drafter, target))
    return drafter.to(dtype).eval()


def open_drafter(folder: Path, target: TargetWeights, dtype: torch.dtype | None = None) -> Drafter:
    """Read a folder onto the target's device, in its dtype unless another is given, and check that the
    drafter fits the target. Raises CheckpointError when it does not."""
    config = read_config(folder, target.info.num_layers)
    if (config.vocab_size, config.hidden_size) != (target.info.vocab_size, target.info.hidden_size):
        differ = f"vocabulary or hidden size differ from those of {target.info.name}"
        raise CheckpointError(f"{folder}: is for another target ({differ}); give the drafter of this one")
    made_for = read_provenance(folder).get("target_fingerprint")
    if made_for and made_for != target.info.fingerprint:
        raise CheckpointError(
            f"{folder}: was trained for another target than {target.info.name}; train it again"
        )
    return load_drafter(folder, dtype or target.head_weight().dtype, target).to(target.device)


def read_config(folder: Path, num_target_layers: int | None = None) -> DrafterShape:
    """The drafter's shape from `config.json`. Raises CheckpointError when it is missing, broken or of another
    kind."""
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder of a drafter")
    return shape_of(read_note(path), str(path), num_target_layers)


def shape_of(raw: Any, where: str, num_target_layers: int | None = None) -> DrafterShape:
    """The drafter's shape from what `config.json` holds. Raises CheckpointError that begins with `where`."""
    try:
        config = read_shape(Fields(raw, where), num_target_layers)[0]
        check_bounds(config)
        return config
    except ConfigError as error:  # of the shape itself, which does not know where it was read
        raise CheckpointError(f"{where}: {error}") from error
    except ArithmeticError as error:  # no heads, or a number that no float holds
        raise CheckpointError(
            f"{where}: holds sizes that cannot be ({error}); copy or write it again"
        ) from error


def check_tensors(where: str, wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> None:
    """Raise CheckpointError that names the missing, unknown or wrongly shaped tensors."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        parts = [
            f"{what} {', '.join(names[:4])}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{where}: tensors do not fit the configuration: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(found[name].shape)}, the configuration says {tuple(shape)}"
            )


def _take_draft_ids(where: str, config: DrafterShape, tensors: dict[str, Tensor]) -> Tensor | None:
    """Remove d2t and t2d (what d2t says again) and return the draft vocabulary's target ids, None for the
    whole."""
    offsets_W = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    if config.draft_vocab_size is None:
        if offsets_W is not None and bool(offsets_W.any()):
            raise CheckpointError(
                f"{where}: d2t renames tokens, but draft_vocab_size is the whole vocabulary"
            )
        return None
    if offsets_W is None or offsets_W.shape != (config.draft_vocab_size,):
        found = "missing" if offsets_W is None else tuple(offsets_W.shape)
        raise CheckpointError(
            f"{where}: d2t is {found}; draft_vocab_size {config.draft_vocab_size} needs one id each"
        )
    ids_W = offsets_W.long() + torch.arange(len(offsets_W))
    if int(ids_W.min()) < 0 or int(ids_W.max()) >= config.vocab_size or len(ids_W.unique()) < len(ids_W):
        raise CheckpointError(
            f"{where}: d2t + 0, 1, 2, ... must be distinct ids below {config.vocab_size}; where it holds "
            f"target ids, subtract 0, 1, 2, ... from it"
        )
    return ids_W


def _borrowed(where: str, name: str, target: TargetWeights | None, draft_ids_W: Tensor | None) -> Tensor:
    if target is None:
        raise CheckpointError(
            f"{where}: has no {name}, which is its target's; give the target too (--target)"
        )
    if name == EMBEDDING:
        return target.embedding_weight().detach()
    head_VH = target.head_weight().detach()
    return head_VH if draft_ids_W is None else head_VH[draft_ids_W]


def _shared(
    tensors: dict[str, Tensor], target: TargetWeights, draft_ids_W: Tensor | None
) -> dict[str, Tensor]:
    """The target's embedding and head, those of them that hold the drafter's numbers in the same dtype."""
    names = (EMBEDDING, HEAD) if draft_ids_W is None else (EMBEDDING,)
    theirs = {name: _borrowed("drafter", name, target, None) for name in names}
    return {
        n: t
        for n, t in theirs.items()
        if t.dtype == tensors[n].dtype and torch.equal(tensors[n].to(t.device), t)
    }


def _head_to_train_with(drafter: Drafter, target: TargetWeights | None) -> Tensor | None:
    """The target's head, unless the drafter's own is the same."""
    if target is None:
        return None
    theirs, own = target.head_weight(), drafter.lm_head.weight
    return None if theirs.shape == own.shape and torch.equal(theirs.to(own), own) else theirs


def _leave_out_borrowed(
    drafter: Drafter, tensors: dict[str, Tensor], lender: TargetWeights, dtype: torch.dtype, lend_rows: bool
) -> None:
    ids_W = drafter.draft_ids_W
    for name in (EMBEDDING, HEAD):
        theirs = _borrowed("drafter", name, lender, ids_W).to("cpu", dtype)
        rounded = theirs.to(torch.bfloat16).to(dtype)  # what a drafter has that was once saved in bfloat16
        if not any(torch.equal(tensors[name], weights) for weights in (theirs, rounded)):
            raise CheckpointError(f"{name} is not the one of {lender.info.name}: it must be written")
        if name == EMBEDDING or ids_W is None or lend_rows:
            del tensors[name]
