"""What the files say by themselves: fields and tensors that contradict each other, or the target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from draftkit.doctor.findings import Finding
from draftkit.doctor.pair import Pair

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_SPECULATION_ONLY = "speed alone: the answers stay the target's"
_FAILS = "engines refuse it when they start"
_USELESS = "nearly all acceptance, without an error"


def check_files(pair: Pair) -> list[Finding]:
    """All findings of this family; nothing is run."""
    return [
        finding
        for check in (
            _quantised,
            _names,
            _vocabulary,
            _draft_ids,
            _heads,
            _defaults,
            _mask,
            _layers,
            _range,
            _copies,
            _recipe,
        )
        for finding in check(pair)
    ]


def without_prefix(pair: Pair) -> Pair:
    """The pair with tensor names as every engine wants them: without a leading `model.`."""
    return pair.changed(tensors={name.removeprefix("model."): t for name, t in pair.tensors.items()})


def drafter_quantisation(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str | None:
    """How a drafter's weights are quantised, None when they are not."""
    described = raw.get("quantization_config")
    if described:
        return str(
            described.get("quant_method", "an unnamed method") if isinstance(described, dict) else described
        )
    small = [n for n, t in tensors.items() if t.is_floating_point() and t.element_size() == 1]
    whole = [n for n, t in tensors.items() if t.dtype in (torch.int8, torch.uint8) and n.endswith("weight")]
    return (
        f"{small[0]} is {tensors[small[0]].dtype}" if small else f"{whole[0]} is integer" if whole else None
    )


def _quantised(pair: Pair) -> Iterator[Finding]:
    how = drafter_quantisation(pair.raw, pair.tensors)
    if how:
        yield Finding(
            "quantised drafter",
            f"its weights are quantised ({how})",
            "draftkit does not load it; vLLM fails or drafts noise (vllm#53116, #51581)",
            "give the bfloat16 weights that it was made of",
        )


def _names(pair: Pair) -> Iterator[Finding]:
    prefixed = sorted(name for name in pair.tensors if name.startswith("model."))
    if prefixed:
        yield Finding(
            "tensor names",
            f"{len(prefixed)} tensors begin with 'model.', {prefixed[0]} first",
            f"{_FAILS}: vLLM puts a prefix of its own before them, SGLang misses the heads",
            "write it again: draftkit export",
        )


def _vocabulary(pair: Pair) -> Iterator[Finding]:
    info = pair.target.info
    for name, wanted in (("vocab_size", info.vocab_size), ("hidden_size", info.hidden_size)):
        found = _number(pair.raw, name)
        if found is not None and found != wanted:
            yield Finding(
                name.replace("_", " "),
                f"the drafter's {name} is {found}, the target's {wanted}",
                _FAILS,
                "give the target that this drafter was trained for, or train one for this target",
            )
    embedding = pair.tensors.get(EMBEDDING)
    if embedding is not None and embedding.shape[0] != _number(pair.raw, "vocab_size"):
        yield Finding(
            "embedding rows",
            f"{EMBEDDING} has {embedding.shape[0]} rows, vocab_size is {pair.raw.get('vocab_size')}",
            _FAILS,
            "write vocab_size as the embedding has it, or copy the weights again",
        )


def _draft_ids(pair: Pair) -> Iterator[Finding]:
    reduced, vocabulary = _number(pair.raw, "draft_vocab_size"), pair.target.info.vocab_size
    offsets = pair.tensors.get("d2t")
    if reduced and reduced < vocabulary and offsets is None:
        yield Finding(
            "draft vocabulary",
            f"draft_vocab_size is {reduced} and there is no d2t, which says which tokens these are",
            f"{_FAILS}, or drafts the first {reduced} ids",
            "copy d2t from the training's folder",
        )
    if offsets is not None and len(offsets):
        ids = offsets.long() + torch.arange(len(offsets))
        beyond = int(ids.max()) >= vocabulary or int(ids.min()) < 0
        if beyond or len(ids.unique()) < len(ids):
            absolute = int(offsets.max()) < vocabulary and len(offsets.unique()) == len(offsets)
            yield Finding(
                "draft vocabulary",
                "d2t holds target ids; engines read offsets"
                if absolute
                else "d2t names tokens twice or none",
                _USELESS,
                "subtract 0, 1, 2, ... from it" if absolute else "copy d2t from the training's folder",
            )


def _heads(pair: Pair) -> Iterator[Finding]:
    kinds = (
        (
            "confidence head",
            "confidence_head.",
            bool(pair.raw.get("enable_confidence_head")),
            "enable_confidence_head",
        ),
        ("Markov head", "markov_head.", bool(_number(pair.raw, "markov_rank")), "markov_rank"),
    )
    for check, start, wanted, name in kinds:
        there = any(n.removeprefix("model.").startswith(start) for n in pair.tensors)
        if wanted and not there:
            yield Finding(
                check,
                f"{name} is {pair.raw[name]!r} and no tensor begins with {start}",
                "vLLM goes on without it and says nothing (vllm#51009), SGLang stops",
                f"copy the weights again, or set {name} to {'false' if name.startswith('enable') else 0}",
            )
        if there and not wanted:
            yield Finding(
                check,
                f"tensors begin with {start} and {name} is {pair.raw.get(name)!r}",
                "the head is not used, or the load fails",
                f"set {name} as the training had it",
            )


def _defaults(pair: Pair) -> Iterator[Finding]:
    if pair.raw.get("enable_confidence_head") and pair.raw.get("confidence_head_with_markov") is None:
        yield Finding(
            "confidence defaults",
            "confidence_head_with_markov is not written",
            "vLLM takes false, SGLang true where there is a Markov head: one of them reads wrong confidences",
            "write the field as the training had it",
        )


def _mask(pair: Pair) -> Iterator[Finding]:
    mask = _mask_of(pair.raw)
    if mask is None:
        return
    if not 0 <= mask < pair.target.info.vocab_size:
        yield Finding(
            "mask token",
            f"mask_token_id is {mask}, the embedding has {pair.target.info.vocab_size} rows",
            _FAILS,
            "write the id of the training",
        )
    elif mask < len(pair.tokenizer) and mask not in _special(pair.tokenizer):
        word = pair.tokenizer.convert_ids_to_tokens(mask)
        yield Finding(
            "mask token",
            f"mask_token_id {mask} is {word!r}, a token of ordinary text",
            _SPECULATION_ONLY,
            "write the id of the training",
        )


def _layers(pair: Pair) -> Iterator[Finding]:
    top, nested = pair.raw.get("eagle_aux_hidden_state_layer_ids"), pair.raw.get("eagle_config")
    inner = nested.get("eagle_aux_hidden_state_layer_ids") if isinstance(nested, dict) else None
    if top and inner and [i - 1 for i in top] != list(inner):
        yield Finding(
            "layer ids",
            f"the top level names {top}, eagle_config {inner}: not the same layers (the top counts from 1)",
            "vLLM and llama.cpp read the first, SGLang the second: one of them reads other layers",
            f"write {[i + 1 for i in inner]} at the top, or {[i - 1 for i in top]} in eagle_config",
        )
    names = ("target_layer_ids", "eagle_aux_hidden_state_layer_ids")
    last = pair.target.info.num_layers - 2
    for name in names:
        ids = pair.raw.get(name) or []
        outputs = [i - 1 for i in ids] if name.startswith("eagle") else list(ids)
        if outputs and (min(outputs) < 0 or max(outputs) > last):
            yield Finding(
                "layer ids",
                f"{name} is {list(ids)}: layer outputs {outputs}, engines agree on 0 to {last} alone",
                "engines fail, or read the layer after the final norm",
                "write the ids of the training; target_layer_ids counts layer outputs from 0",
            )


def _range(pair: Pair) -> Iterator[Finding]:
    longest, target = _number(pair.raw, "max_position_embeddings"), pair.target.info.max_length
    if longest and longest < target:
        yield Finding(
            "context range",
            f"the drafter's max_position_embeddings is {longest}, the target's {target}",
            f"engines do not draft, or stop, beyond {longest} tokens of context",
            f"write {target} if acceptance holds there (see the facts), else train on longer text",
        )


def _copies(pair: Pair) -> Iterator[Finding]:
    """Embedding and head are frozen copies of the target's: what differs was not trained with."""
    ids = pair.tensors.get("d2t")
    rows = ids.long() + torch.arange(len(ids)) if ids is not None else None
    for name, read in ((EMBEDDING, pair.target.embedding_weight), (HEAD, pair.target.head_weight)):
        own = pair.tensors.get(name)
        if own is None:
            continue
        theirs = read().detach().cpu().float()
        if name == HEAD and rows is not None:
            if int(rows.max()) >= len(theirs) or int(rows.min()) < 0:
                continue  # told by d2t already
            theirs = theirs[rows]
        if own.shape != theirs.shape:
            continue  # told by the vocabulary already
        size = float(theirs.abs().max()) or 1.0
        ratio = float(own.float().norm() / theirs.norm().clamp_min(1e-12))
        if float((own.float() - theirs).abs().max()) <= 0.01 * size:
            continue
        scaled = float((own.float() - ratio * theirs).abs().max()) <= 0.01 * size * max(ratio, 1.0)
        what = f"{ratio:.3g} times the target's" if scaled else "not the target's"
        yield Finding(
            "embedding" if name == EMBEDDING else "head",
            f"{name} is {what}",
            "an engine that takes the target's (SGLang, z-lab's DFlash) drafts other tokens than one "
            "that does not",
            "train on this target's weights, or write it without its copies: draftkit export --borrow",
        )


def _recipe(pair: Pair) -> Iterator[Finding]:
    """Fields that must be those of the recipe that the folder's own note holds."""
    trained = (pair.note.get("recipe") or {}).get("drafter") or {}
    anchor = pair.raw.get("sample_from_anchor")
    now = {
        "feature_layers": pair.raw.get("target_layer_ids"),
        "block_size": _number(pair.raw, "block_size"),
        "layout": None if anchor is None else "anchor" if anchor else "one_plus_n",
    }
    checks = {"feature_layers": "layer ids", "block_size": "block size", "layout": "block layout"}
    for name, found in now.items():
        wanted = trained.get(name)
        if wanted is not None and found is not None and wanted != found:
            yield Finding(
                checks[name],
                f"{name} was {wanted} in the training, config.json says {found}",
                "acceptance, without an error (vllm#42505, z-lab/dflash#118)",
                f"write {wanted}",
            )


def _mask_of(raw: dict[str, Any]) -> int | None:
    nested = raw.get("dflash_config")
    places = [raw, *([nested] if isinstance(nested, dict) else [])]
    return next((mask for place in places if (mask := _number(place, "mask_token_id")) is not None), None)


def _number(raw: dict[str, Any], name: str) -> int | None:
    value = raw.get(name)
    return value if type(value) is int else None


def _special(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
