"""A second implementation of the block drafter and its losses, from the paper's equations: one block at a
time, python loops, whole softmaxes, autograd. Slow, and meant to share no line with the package but its
parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import TrainBatch
from draftkit.settings import LossSettings


@dataclass(frozen=True)
class PlainRow:
    """One drafted position that counts."""

    cell: int  # in the flattened [B, A, G] grid
    logits: Tensor
    target_logits: Tensor
    confidence: Tensor | None
    slot: int
    token: int


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return out if weight is None else out * weight


def turn(x: Tensor, position: int, theta: float, share: float) -> Tensor:
    """Rotary embedding of one vector [D]: pairs (i, i + D / 2) turn by position / theta^(2 i / D)."""
    half = len(x) // 2
    out = []
    for i in range(half):
        angle = position / theta ** (2 * i / len(x)) if i < int(share * half) else 0.0
        out.append(x[i] * math.cos(angle) - x[half + i] * math.sin(angle))
    for i in range(half):
        angle = position / theta ** (2 * i / len(x)) if i < int(share * half) else 0.0
        out.append(x[half + i] * math.cos(angle) + x[i] * math.sin(angle))
    return torch.stack(out)


def block_hidden(
    drafter: BlockDrafter, features: Tensor, start: int, anchor_token: int, position: int
) -> Tensor:
    """Hidden states of the drafting positions [G, H] of a block whose anchor is at `position`, from the
    features [position - start, F] of the context it sees."""
    c, w = drafter.config, {**dict(drafter.named_parameters()), **dict(drafter.named_buffers())}
    gemma, size = c.style == "gemma4", c.head_dim
    context = rms(features @ w["fc.weight"].T, w["hidden_norm.weight"], c.rms_eps)
    x = w["embed_tokens.weight"][torch.tensor([anchor_token] + [c.mask_token_id] * (c.block_size - 1))]
    if gemma:
        x = x * math.sqrt(c.hidden_size)
    for n in range(c.num_layers):
        p = f"layers.{n}."
        normed = rms(x, w[p + "input_layernorm.weight"], c.rms_eps)

        def per_head(inputs: Tensor, name: str, norm: str | None, first: int | None, p: str = p) -> Tensor:
            out = (inputs @ w[f"{p}self_attn.{name}.weight"].T).view(len(inputs), -1, size)
            if norm is not None and c.style != "llama":
                out = rms(out, w[f"{p}self_attn.{norm}.weight"], c.rms_eps)
            if first is None:
                return out
            rows = [
                [turn(v, first + t, c.rope_theta, c.rotary_share) for v in row] for t, row in enumerate(out)
            ]
            return torch.stack([torch.stack(row) for row in rows]) if rows else out

        value = "k_proj" if c.shared_key_value else "v_proj"
        q = per_head(normed, "q_proj", "q_norm", position)
        keys = torch.cat(
            [per_head(context, "k_proj", "k_norm", start), per_head(normed, "k_proj", "k_norm", position)]
        )
        values = torch.cat([per_head(context, value, None, None), per_head(normed, value, None, None)])
        if gemma:
            values = rms(values, None, c.rms_eps)
        mixed = []
        for h in range(c.num_heads):
            kv = h // (c.num_heads // c.num_kv_heads)
            scores = q[:, h] @ keys[:, kv].T / (1 if gemma else math.sqrt(size))
            mixed.append(torch.softmax(scores, -1) @ values[:, kv])
        attended = torch.cat(mixed, -1) @ w[p + "self_attn.o_proj.weight"].T
        if gemma:
            attended = rms(attended, w[p + "post_attention_layernorm.weight"], c.rms_eps)
        x = x + attended
        normed = rms(
            x,
            w[p + ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm") + ".weight"],
            c.rms_eps,
        )
        gate = normed @ w[p + "mlp.gate_proj.weight"].T
        if gemma:
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate * torch.sigmoid(gate)
        update = (gate * (normed @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        if gemma:
            x = (x + rms(update, w[p + "post_feedforward_layernorm.weight"], c.rms_eps)) * w[
                p + "layer_scalar"
            ]
        else:
            x = x + update
    return rms(x, w["norm.weight"], c.rms_eps)[c.block_size - drafter.gamma :]


def head_logits(drafter: BlockDrafter, hidden: Tensor) -> Tensor:
    c = drafter.config
    raw = drafter.lm_head.weight @ hidden * c.logit_scale
    return raw if c.soft_cap is None else c.soft_cap * torch.tanh(raw / c.soft_cap)


def head_rows(drafter: BlockDrafter, hidden: Tensor, tokens: list[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Draft logits [V] and confidence of each position, given the tokens x_0, x_1, ... that stand before
    it."""
    c, w, out, state = drafter.config, dict(drafter.named_parameters()), [], None
    for k, h in enumerate(hidden):
        logits, seen = head_logits(drafter, h), [h]
        if c.head != "none":
            before = w["markov_head.markov_w1.weight"][tokens[k]]
            m = before
            if c.head == "gated":
                joined = torch.cat([h, before])
                m = before * torch.sigmoid(
                    w["markov_head.gate_proj.weight"] @ joined + w["markov_head.gate_proj.bias"]
                )
            if c.head == "rnn":
                state = torch.zeros_like(before) if state is None else state
                z = (
                    w["markov_head.joint_proj.weight"] @ torch.cat([state, before, h])
                    + w["markov_head.joint_proj.bias"]
                )
                keep, candidate, output = z.view(3, -1)
                keep = torch.sigmoid(keep)
                m, state = torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)
            logits = logits + w["markov_head.markov_w2.weight"] @ m
            seen += [before] if c.confidence_with_markov else []
        guess = None
        if c.confidence:
            joined = torch.cat(seen)
            joined = joined.detach() if c.confidence_stop_gradient else joined
            guess = torch.sigmoid(
                w["confidence_head.proj.weight"][0] @ joined + w["confidence_head.proj.bias"][0]
            )
        out.append((logits, guess))
    return out


def plain_rows(drafter: BlockDrafter, batch: TrainBatch) -> list[PlainRow]:
    """All drafted positions of a batch that count."""
    c, gamma, out = drafter.config, drafter.gamma, []
    rows, anchors = batch.anchors_BA.shape
    for b in range(rows):
        documents = batch.document_BT[b].tolist()
        for a in range(anchors):
            if not batch.anchor_mask_BA[b, a]:
                continue
            place = int(batch.anchors_BA[b, a])
            first = documents.index(documents[place])
            position = place - first
            start = 0 if c.window is None else max(0, position - c.window)
            tokens = batch.tokens_BT[b, place : place + gamma + 1].tolist()
            tokens += [0] * (gamma + 1 - len(tokens))
            features = batch.features_BTF[b, first + start : place]
            hidden = block_hidden(drafter, features, start, tokens[0], position)
            logits = head_rows(drafter, hidden, tokens)
            for k in range(gamma):
                t = place + 1 + k
                if t >= len(documents) or documents[t] != documents[place] or not batch.loss_mask_BT[b, t]:
                    break
                target = head_logits(drafter, batch.last_hidden_BTH[b, t - 1])
                out.append(
                    PlainRow(
                        (b * anchors + a) * gamma + k, logits[k][0], target, logits[k][1], k, tokens[k + 1]
                    )
                )
    return out


def plain_loss(rows: list[PlainRow], settings: LossSettings) -> Tensor:
    """The weighted sum of all terms."""
    total = torch.zeros((), dtype=torch.float64)
    blocks: dict[int, list[PlainRow]] = {}
    for row in rows:
        blocks.setdefault(row.cell - row.slot, []).append(row)
    for block in blocks.values():
        own = [float(torch.softmax(r.logits.detach(), -1)[r.token]) for r in block]
        for row in block:
            fixed = math.exp(-row.slot / settings.decay)
            weight = fixed
            if settings.weighting == "dpace":
                weight = 0.0
                for m in range(row.slot, len(block)):
                    product = 1.0
                    for i in range(m + 1):
                        product *= 0.5 * own[i] + 0.5
                    weight += product
            q, p = torch.softmax(row.logits, -1), torch.softmax(row.target_logits, -1)
            tv = (q - p).abs().sum()
            kl = (p * (p.log() - q.log())).sum()
            accept = float(1 - tv.detach() / 2)
            share = math.exp(-3 * accept)
            lk = share * kl + (1 - share) * (1 - torch.minimum(p, q).sum())
            total = total + weight * (settings.ce * -q[row.token].log() + settings.tv * tv + settings.kl * kl)
            total = total + weight * settings.lk * lk
            if row.confidence is not None:
                bce = -(accept * row.confidence.log() + (1 - accept) * (1 - row.confidence).log())
                total = total + settings.confidence * fixed * bce
    return total
