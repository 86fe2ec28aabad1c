"""What may be wrong with a drafter that loads: one change of fields or weights for each such fault."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from draftkit.doctor.pair import Pair
from draftkit.draft.families import block_shape

_IDS = (
    "target_layer_ids",
    "dspark_target_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "aux_hidden_state_layer_ids",
)


@dataclass(frozen=True)
class Trial:
    """One change: what it would mend, in the words of a finding, and the pair with it."""

    check: str
    what: str
    mend: str
    pair: Pair


def trials(pair: Pair) -> Iterator[Trial]:
    """Every change that may mend a pair; those that make no drafter are passed over."""
    for make in (_layers, _order, _layout, _masks, _rope, _norms, _weights, _windows, _reading):
        yield from make(pair)


def _layers(pair: Pair) -> Iterator[Trial]:
    for shift in (-1, 1):
        raw = copy.deepcopy(pair.raw)
        places = [raw, *(v for v in raw.values() if isinstance(v, dict))]
        told: list[int] = []
        for place in places:
            for name in _IDS:
                if isinstance(place.get(name), list):
                    place[name] = [i + shift for i in place[name]]
                    told = told or place[name]
        if told:
            yield Trial(
                "layer ids",
                f"the layer {'before' if shift < 0 else 'after'} each one that is named fits better",
                f"write {told}: the ids are off by one (vllm#42505, z-lab/dflash#118)",
                pair.changed(raw=raw),
            )


def _order(pair: Pair) -> Iterator[Trial]:
    """Features are concatenated in the order of their layers; some trainers take the order written."""
    ids, fc = pair.raw.get("target_layer_ids"), pair.tensors.get("fc.weight")
    if not isinstance(ids, list) or fc is None or len(ids) < 2 or fc.shape[1] % len(ids):
        return
    parts = fc.chunk(len(ids), 1)
    ascending = sorted(ids)
    if ids != ascending:
        as_written = torch.cat([parts[ids.index(i)] for i in ascending], 1)
        for what, weight in (
            ("trained in the order that is written", as_written),
            ("trained in ascending order", fc),
        ):
            yield Trial(
                "layer order",
                f"target_layer_ids {ids} are not ascending; the drafter was {what}",
                "write ascending ids"
                + ("" if weight is fc else ", and the columns of fc.weight in their order"),
                pair.with_fields(target_layer_ids=ascending).changed(
                    tensors=pair.tensors | {"fc.weight": weight.contiguous()}
                ),
            )
    else:
        yield Trial(
            "layer order",
            "the columns of fc.weight fit the layers in the opposite order",
            "write the columns of fc.weight in ascending order of layers",
            pair.changed(tensors=pair.tensors | {"fc.weight": torch.cat(parts[::-1], 1).contiguous()}),
        )


def _layout(pair: Pair) -> Iterator[Trial]:
    names = pair.raw.get("architectures") or [""]
    if names[0] == "DFlashDraftModel":
        nested = pair.raw.get("dflash_config") or {}
        fields = {"architectures": ["Qwen3DSparkModel"], "sample_from_anchor": True, "markov_rank": 0}
        for name in ("mask_token_id", "target_layer_ids", "block_size"):
            fields |= {name: nested[name]} if name in nested else {}
        changed = pair.with_fields(**fields)
    elif str(names[0]).endswith("DSparkModel") or names[0] == "DSparkDraftModel":
        changed = pair.with_fields(sample_from_anchor=not pair.raw.get("sample_from_anchor", True))
    else:
        return
    anchor = changed.raw["sample_from_anchor"]
    yield Trial(
        "block layout",
        f"its blocks draft from {'the anchor on' if anchor else 'the masks alone'}, the folder says "
        "otherwise",
        "write DSpark's layout (sample_from_anchor: true)"
        if anchor
        else "write the 1 + N layout (z-lab's DFlashDraftModel, or sample_from_anchor: false)",
        changed,
    )


def _masks(pair: Pair) -> Iterator[Trial]:
    nested = pair.raw.get("dflash_config")
    inside = isinstance(nested, dict) and "mask_token_id" in nested
    if not inside and "mask_token_id" not in pair.raw:
        return
    written = nested["mask_token_id"] if inside and isinstance(nested, dict) else pair.raw["mask_token_id"]
    for mask in _mask_candidates(pair):
        if mask == written:
            continue
        fields: dict[str, Any] = {"mask_token_id": mask}
        if inside and isinstance(nested, dict):
            fields = {"dflash_config": nested | fields}
        yield Trial(
            "mask token",
            f"mask_token_id is {written}, token {mask} fits better",
            f"write {mask}, the token that stood for masks in the training",
            pair.with_fields(**fields),
        )


def _mask_candidates(pair: Pair) -> list[int]:
    """What trainers take: the training's own choice, the tokenizer's mask, special tokens, unused rows."""
    tokenizer, vocabulary = pair.tokenizer, pair.target.info.vocab_size
    trained = ((pair.note.get("recipe") or {}).get("drafter") or {}).get("mask_token_id")
    special = sorted(
        {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    )
    asked = [trained, tokenizer.mask_token_id, len(tokenizer), *special[:4], *special[-4:]]
    return list(dict.fromkeys(i for i in asked if i is not None and 0 <= i < vocabulary))


def _rope(pair: Pair) -> Iterator[Trial]:
    theta = block_shape(pair.target.text_config, "qwen3").rope_theta
    section = pair.raw.get("rope_parameters") or {}
    written = pair.raw.get("rope_theta") or section.get("rope_theta")
    if written is not None and float(written) != theta and "full_attention" not in section:
        changed = {"rope_theta": theta} | (
            {"rope_parameters": section | {"rope_theta": theta}} if section else {}
        )
        yield Trial(
            "rotary embedding",
            f"rope_theta is {written:g}, the target's is {theta:g}",
            f"write {theta:g}",
            pair.with_fields(**changed),
        )


def _norms(pair: Pair) -> Iterator[Trial]:
    """EAGLE-3's flags, which releases write or leave out as they like."""
    if "eagle_config" in pair.raw or str((pair.raw.get("architectures") or [""])[0]).find("agle3") >= 0:
        flag = bool(pair.raw.get("norm_before_residual"))
        yield Trial(
            "norm_before_residual",
            f"norm_before_residual is {str(flag).lower()}, the other value fits better",
            f"write {str(not flag).lower()} (speculators' default is true, everybody else's false)",
            pair.with_fields(norm_before_residual=not flag),
        )


def _weights(pair: Pair) -> Iterator[Trial]:
    for name, check in (("embed_tokens.weight", "embedding"), ("lm_head.weight", "head")):
        if name in pair.tensors:
            yield Trial(
                check,
                f"the target's own {name} fits better than the folder's",
                "write the drafter without its copy: draftkit export --borrow",
                pair.changed(tensors={n: t for n, t in pair.tensors.items() if n != name}),
            )
    offsets = pair.tensors.get("d2t")
    if offsets is not None:
        absolute = offsets.long() - torch.arange(len(offsets))
        yield Trial(
            "draft vocabulary",
            "d2t holds target ids; engines read offsets",
            "subtract 0, 1, 2, ... from d2t",
            pair.changed(tensors=pair.tensors | {"d2t": absolute}),
        )


def _windows(pair: Pair) -> Iterator[Trial]:
    window = pair.raw.get("context_window")
    if window:
        yield Trial(
            "context window",
            f"context_window is {window}, the whole context fits better",
            "leave context_window out",
            pair.with_fields(context_window=None),
        )


def _reading(pair: Pair) -> Iterator[Trial]:
    """Fields without which tensors that are there are not read, or fields whose tensors are missing."""
    first = pair.tensors.get("markov_head.markov_w1.weight")
    if first is not None and not pair.raw.get("markov_rank"):
        yield Trial(
            "Markov head",
            "its tensors are there and markov_rank is not",
            f"write markov_rank {first.shape[1]}",
            pair.with_fields(markov_rank=first.shape[1]),
        )
    if first is None and pair.raw.get("markov_rank"):
        yield Trial(
            "Markov head",
            "markov_rank is written and its tensors are not there",
            "copy the weights again",
            pair.with_fields(markov_rank=0, confidence_head_with_markov=False),
        )
    there = any(name.startswith("confidence_head.") for name in pair.tensors)
    if there != bool(pair.raw.get("enable_confidence_head")):
        yield Trial(
            "confidence head",
            f"its tensors are {'there' if there else 'missing'} and enable_confidence_head is {not there}",
            f"write enable_confidence_head: {str(there).lower()}"
            + ("" if there else ", or copy the weights again"),
            pair.with_fields(enable_confidence_head=there),
        )
    embedding = pair.tensors.get("embed_tokens.weight")
    if embedding is not None and embedding.shape[0] != pair.raw.get("vocab_size"):
        yield Trial(
            "embedding rows",
            f"vocab_size is {pair.raw.get('vocab_size')}, the embedding has {embedding.shape[0]} rows",
            f"write {embedding.shape[0]}",
            pair.with_fields(vocab_size=embedding.shape[0]),
        )
