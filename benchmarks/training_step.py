"""Our training step against the same step written plainly, in supervised drafted tokens per second.

    python -m benchmarks.training_step --features features --steps 20 --set train.anchors=512

With the paper's 512 anchors per conversation, those with fewer places are padded to the most of the batch in
the plain step.

Both take the same conversations, anchors and drafter, and give the same loss (checked before anything is
timed). The plain step pads every conversation to the longest, masks attention with a dense [Q, C + Q] mask,
and computes all logits and probabilities at every position of every anchor under autograd. Reading, packing
or padding and the optimizer are part of both. Steps alternate; the speed is the median of the ratios of
neighbours.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.result_file import print_result
from draftkit import stages, train_stages
from draftkit.config import load_recipe
from draftkit.draft.backbone import rope_table, rotate
from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import TrainBatch
from draftkit.features.store import FeatureStore
from draftkit.settings import LossSettings
from draftkit.train.batches import BatchMaker, Cut, choose_anchors, collate
from draftkit.train.optim import new_optimizer, take_step
from draftkit.train.parallel import ParallelDrafter, World


def plain_batch(maker: BatchMaker, step: int) -> TrainBatch:
    """The step's conversations, each in a row of its own, with the anchors that our step gives them."""
    chosen = maker.samples(step)
    samples = maker.source.read(chosen)
    seed = maker.seed * 1_000_003 + step
    anchors = [
        [choose_anchors(s.loss_mask_T, maker.anchors, seed * 2_097_143 + i)]
        for i, s in zip(chosen, samples, strict=True)
    ]
    return collate([[s] for s in samples], anchors, maker.domains)


def plain_loss(
    drafter: BlockDrafter, batch: TrainBatch, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """DSpark's loss from the paper's equations: the sum, its weight, and how many drafted tokens count."""
    config, gamma = drafter.config, drafter.gamma
    rows, length = batch.tokens_BT.shape
    anchors = batch.anchors_BA.shape[1]
    offsets = torch.arange(gamma)
    places_BAG = batch.anchors_BA[..., None] + 1 + offsets
    inside = places_BAG < length
    places_BAG = places_BAG.clamp_max(length - 1)
    row_B11 = torch.arange(rows)[:, None, None]
    counted = inside & batch.anchor_mask_BA[..., None] & batch.loss_mask_BT[row_B11, places_BAG]
    counted = counted.long().cumprod(-1).bool()

    tokens_BAG = torch.full((rows, anchors, gamma), config.mask_token_id)
    tokens_BAG[..., 0] = batch.tokens_BT.gather(1, batch.anchors_BA)
    x = drafter.embed_tokens(tokens_BAG.flatten(1))
    context = drafter.hidden_norm(drafter.fc(batch.features_BTF.float()))
    table = rope_table(config, length + gamma)
    at_context, at_block = (
        table[p][:, None] for p in (batch.positions_BT, (batch.anchors_BA[..., None] + offsets).flatten(1))
    )
    block_Q = torch.arange(anchors * gamma) // gamma
    before = torch.arange(length) < batch.anchors_BA.repeat_interleave(gamma, 1)[..., None]
    same = (block_Q[:, None] == block_Q).expand(rows, -1, -1)
    mask_B1QS = torch.cat([before, same], -1)[:, None]
    for layer in drafter.layers:
        a, normed = layer.self_attn, layer.input_layernorm(x)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

        q = rotate(a.q_norm(heads(a.q_proj(normed))), at_block[..., 0, :], at_block[..., 1, :])
        own_k = rotate(a.k_norm(heads(a.k_proj(normed))), at_block[..., 0, :], at_block[..., 1, :])
        seen_k = rotate(a.k_norm(heads(a.k_proj(context))), at_context[..., 0, :], at_context[..., 1, :])
        k, v = (
            torch.cat([seen_k, own_k], 2),
            torch.cat([heads(a.v_proj(context)), heads(a.v_proj(normed))], 2),
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1QS, enable_gqa=True)
        x = x + a.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    hidden = drafter.norm(x).unflatten(1, (anchors, gamma))

    markov = drafter.markov_head.markov_w1(batch.tokens_BT[row_B11, places_BAG - 1])
    logits = drafter.lm_head(hidden) + drafter.markov_head.markov_w2(markov)
    target_logits = drafter.lm_head(batch.last_hidden_BTH[row_B11, places_BAG - 1].float())
    log_q, p = torch.log_softmax(logits, -1), torch.softmax(target_logits, -1)
    ce = -log_q.gather(-1, batch.tokens_BT[row_B11, places_BAG][..., None]).squeeze(-1)
    tv = (log_q.exp() - p).abs().sum(-1)
    guess = drafter.confidence_head(hidden, markov)
    bce = F.binary_cross_entropy_with_logits(guess, (1 - tv / 2).detach(), reduction="none")
    weight = torch.exp(-offsets / settings.decay) * counted
    loss = weight * (settings.ce * ce + settings.tv * tv + settings.confidence * bce)
    return loss.sum(), weight.sum(), counted.sum()


def main() -> None:
    """Check that both losses agree, time both, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--recipe", default="tiny-dspark")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, options.set)
    drafter = train_stages.new_drafter_for(recipe, *stages.open_target(recipe))
    plain = copy.deepcopy(drafter)
    settings, store = recipe.train, FeatureStore(options.features)
    maker = BatchMaker(
        store, range(len(store)), settings.batch_size, settings.anchors, 0, Cut(settings.row_tokens)
    )
    parallel = ParallelDrafter(drafter, World(0, 1, torch.device("cpu")), False, torch.float32)
    optimizer = new_optimizer(parallel, settings.lr, 0.0)
    trained = [p for p in plain.parameters() if p.requires_grad]
    plain_optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True
    )

    def our_step(step: int) -> tuple[float, int]:
        done = take_step(parallel, optimizer, maker.batches(step), settings.loss, settings.grad_clip)
        return done.loss, done.rows

    def plain_step(step: int) -> tuple[float, int]:
        loss, weight, count = plain_loss(plain, plain_batch(maker, step), settings.loss)
        (loss / weight).backward()
        nn.utils.clip_grad_norm_(trained, settings.grad_clip)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        return float(loss.detach() / weight), int(count)

    def timed(step: Callable[[int], tuple[float, int]], number: int) -> tuple[float, float, int]:
        began = time.perf_counter()
        loss, count = step(number)
        return count / (time.perf_counter() - began), loss, count

    ours, plains, differences = [], [], []
    for number in range(options.steps + 2):  # the first two warm up
        first, second = timed(our_step, number), timed(plain_step, number)
        if first[2] != second[2] or abs(first[1] - second[1]) > 1e-3 * abs(second[1]):
            raise SystemExit(
                f"error: step {number}: losses {first[1]} and {second[1]} over {first[2]} and {second[2]} "
                f"tokens"
            )
        differences.append(abs(first[1] - second[1]) / abs(second[1]))
        if number >= 2:
            ours.append(first[0])
            plains.append(second[0])
    ratios = [a / b for a, b in zip(ours, plains, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    result = {
        "threads": options.threads,
        "recipe": options.recipe,
        "set": options.set,
        "steps": options.steps,
        "tokens_per_s": round(median(ours)),
        "plain_tokens_per_s": round(median(plains)),
        "ratio": round(median(ratios), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "largest_relative_loss_difference": max(differences),
    }
    print_result(result, options.out)


if __name__ == "__main__":
    main()
