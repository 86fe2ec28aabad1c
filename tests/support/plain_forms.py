"""Drafters in others' forms, computed from the tensors of their folders by the names that they have there:
python loops, whole softmaxes, one position after the other. Shares no line with the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.plain_drafter import rms, turn

Tensors = Mapping[str, Tensor]
EPS, THETA = 1e-6, 10_000.0


@dataclass(frozen=True)
class Block:
    """What a block's folder says: sizes, each layer's (window, causal), and DFlash2's parts."""

    layers: tuple[tuple[int | None, bool], ...]
    heads: int
    kv_heads: int
    head_dim: int
    mask: int
    size: int
    taps: int = 0
    group: int = 0
    candidates: int = 0


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    out = x @ t[name + ".weight"].T
    return out + t[name + ".bias"] if name + ".bias" in t else out


def attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], heads: int, kv_heads: int) -> Tensor:
    """One position [N * D] over those that it sees."""
    size, parts = len(q) // heads, []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        other = slice(h // (heads // kv_heads) * size, (h // (heads // kv_heads) + 1) * size)
        scores = torch.stack([q[own] @ k[other] / math.sqrt(size) for k in keys])
        parts.append(torch.stack([v[other] for v in values]).T @ torch.softmax(scores, 0))
    return torch.cat(parts)


def turned(x: Tensor, position: int, size: int, norm: Tensor | None) -> Tensor:
    """Each head of a position normed and turned."""
    rows = [turn(v if norm is None else rms(v, norm, EPS), position, THETA, 1.0) for v in x.view(-1, size)]
    return torch.cat(rows)


def mlp(t: Tensors, p: str, x: Tensor) -> Tensor:
    gate = linear(t, p + "mlp.gate_proj", x)
    return linear(t, p + "mlp.down_proj", gate * torch.sigmoid(gate) * linear(t, p + "mlp.up_proj", x))


def convolved(t: Tensors, name: str, x: Tensor, source: Tensor, side: int, b: Block) -> Tensor:
    """DFlash2's convolution of a block [P, H]; the kernel follows from `source`."""
    base, groups = t[name + ".base_kernel"], x.shape[1] // b.group
    out = torch.zeros_like(x)
    for place in range(len(x)):
        delta = (t[name + ".kernel_projection.weight"] @ source[place]).view(2, b.taps, groups)
        for tap in range(min(b.taps, place + 1)):
            for channel in range(x.shape[1]):
                weight = base[side, tap, channel] + delta[side, tap, channel // b.group]
                out[place, channel] += weight * x[place - tap, channel]
    return out


def block_hidden(t: Tensors, b: Block, features: Tensor, anchor: int) -> Tensor:
    """Hidden states of all positions of the block, [P, H]."""
    length = len(features)
    context = [rms(t["fc.weight"] @ f, t["hidden_norm.weight"], EPS) for f in features]
    x = torch.stack([t["embed_tokens.weight"][i] for i in [anchor] + [b.mask] * (b.size - 1)])
    for n, (window, causal) in enumerate(b.layers):
        p = f"layers.{n}."
        a, q_norm, k_norm = (
            p + "self_attn.",
            t[p + "self_attn.q_norm.weight"],
            t[p + "self_attn.k_norm.weight"],
        )
        entering = rms(x, t[p + "input_layernorm.weight"], EPS)
        read = convolved(t, p + "attention_conv", entering, entering, 0, b) if b.taps else entering
        seen = [*context, *read]
        keys = [turned(linear(t, a + "k_proj", h), place, b.head_dim, k_norm) for place, h in enumerate(seen)]
        values = [linear(t, a + "v_proj", h) for h in seen]
        rows = []
        for j in range(b.size):
            here = length + j
            near = [
                place
                for place in range(len(seen))
                if (window is None or abs(here - place) < window) and (place <= here or not causal)
            ]
            q = turned(linear(t, a + "q_proj", read[j]), here, b.head_dim, q_norm)
            rows.append(attend(q, [keys[i] for i in near], [values[i] for i in near], b.heads, b.kv_heads))
        update = linear(t, a + "o_proj", torch.stack(rows))
        x = x + (convolved(t, p + "attention_conv", update, entering, 1, b) if b.taps else update)
        entering = rms(x, t[p + "post_attention_layernorm.weight"], EPS)
        read = convolved(t, p + "mlp_conv", entering, entering, 0, b) if b.taps else entering
        update = mlp(t, p, read)
        x = x + (convolved(t, p + "mlp_conv", update, entering, 1, b) if b.taps else update)
    return rms(x, t["norm.weight"], EPS)


def block_proposal(t: Tensors, b: Block, features: Tensor, anchor: int) -> tuple[list[int], list[Tensor]]:
    """The likeliest tokens, and the distribution each is the likeliest of."""
    tokens, rows, previous = [], [], anchor
    for h in block_hidden(t, b, features, anchor)[1:]:
        logits = t["lm_head.weight"] @ h
        if b.candidates:
            selected = torch.full_like(logits, -math.inf)
            asked = t["candidate_selector.hidden_projection.weight"] @ h
            asked = asked * t["candidate_selector.predecessor_codebook"][previous]
            for i in logits.topk(b.candidates).indices.tolist():
                selected[i] = logits[i] + asked @ t["candidate_selector.successor_codebook"][i]
            logits = selected
        previous = int(logits.argmax())
        tokens.append(previous)
        rows.append(torch.softmax(logits, -1))
    return tokens, rows


def xpress_proposal(
    t: Tensors, b: Block, features: Tensor, anchor: int, passes: int, first: int, uniforms: list[float] | None
) -> tuple[list[int], list[Tensor]]:
    """XPress: tokens and the distribution each is drawn from (without uniforms: the likeliest of), all
    chosen anew in every pass; `first`: the first position that drafts."""
    p = "xpress_head."
    hidden = block_hidden(t, b, features, anchor)
    mean = sum(hidden) / b.size
    base = [t["lm_head.weight"] @ h for h in hidden]
    tokens, rows = [int(logits.argmax()) for logits in base[first:]], []
    for _ in range(passes):
        before = ([anchor] * (first + 1) + tokens)[: b.size]
        entering = [
            linear(
                t, p + "in_proj", torch.cat([linear(t, p + "down_h", h), linear(t, p + "down_g", mean), e])
            )
            for h, e in zip(hidden, (t[p + "w1.weight"][i] for i in before), strict=True)
        ]
        rows = []
        for k in range(first, b.size):
            x = entering[k] + sum(t[p + "mix.L"][:, k, j] * entering[j] for j in range(k + 1))
            rows.append(torch.softmax(base[k] + linear(t, p + "w2", x + mlp(t, p, x)), -1))
        if uniforms is None:
            tokens = [int(row.argmax()) for row in rows]
        else:
            tokens = [int((row.cumsum(0) <= u).sum()) for row, u in zip(rows, uniforms, strict=True)]
    return tokens, rows


def eagle_proposal(
    t: Tensors, c: Mapping[str, Any], features: Tensor, after: Sequence[int], drafted: int
) -> tuple[list[int], list[Tensor]]:
    """EAGLE-3 and 3.1: features with the token after each, the anchor last."""
    size, heads, kv_heads = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    p, a = "midlayer.", "midlayer.self_attn."

    def projected(f: Tensor) -> Tensor:
        if c.get("norm_before_fc"):
            f = rms(f, t["input_norm.weight"], EPS)
        if c.get("fc_norm"):
            parts = f.view(-1, c["hidden_size"])
            f = torch.cat([rms(part, t[f"fc_norm.{i}.weight"], EPS) for i, part in enumerate(parts)])
        return t["fc.weight"] @ f

    keys: list[Tensor] = []
    values: list[Tensor] = []

    def row(place: int, state: Tensor, token: int) -> Tensor:
        normed = rms(state, t[p + "hidden_norm.weight"], EPS)
        embedded = rms(t["embed_tokens.weight"][token], t[p + "input_layernorm.weight"], EPS)
        u = torch.cat([embedded, normed])
        keys.append(turned(linear(t, a + "k_proj", u), place, size, None))
        values.append(linear(t, a + "v_proj", u))
        q = turned(linear(t, a + "q_proj", u), place, size, None)
        x = (normed if c.get("norm_before_residual") else state) + linear(
            t, a + "o_proj", attend(q, keys, values, heads, kv_heads)
        )
        return x + mlp(t, p, rms(x, t[p + "post_attention_layernorm.weight"], EPS))

    for place, (feature, token) in enumerate(zip(features, after, strict=True)):
        state = row(place, projected(feature), token)
    tokens, rows = [], []
    for k in range(drafted):
        normed = rms(state, t["norm.weight"], EPS)
        rows.append(torch.softmax(t["lm_head.weight"] @ normed, -1))
        tokens.append(int(rows[-1].argmax()))
        state = row(len(features) + k, normed if c.get("norm_output") else state, tokens[-1])
    return tokens, rows
