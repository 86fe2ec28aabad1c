"""EAGLE-3 as its recipes train it: all places of an answer, averaged over conversations as DeepSpec does, and
before Gemma 4 the block that DeepSpec gives it, made here of Transformers' own modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftkit.config import load_recipe
from draftkit.draft.drafter import TrainBatch
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.draft.eagle3_training import unrolled_states
from draftkit.draft.layout import lay_out
from draftkit.features.source import FeatureSample
from draftkit.settings import LossSettings
from draftkit.target.interface import TargetInfo
from draftkit.train.batches import choose_anchors, collate
from draftkit.train_stages import drafter_config
from support.drafters import EAGLE_CONFIG, block_drafter

RECIPES = [f"{target}-eagle3" for target in ("qwen3-4b", "qwen3-8b", "qwen3-14b", "gemma4-12b")]
ANSWERS = {12: [(3, 12)], 30: [(20, 26), (27, 30)], 7: [(5, 7)]}  # tokens of a conversation, and its answers


def sample(length: int, seed: int) -> FeatureSample:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(length, dtype=torch.bool)
    for start, end in ANSWERS[length]:
        mask[start:end] = True
    return FeatureSample(
        str(length),
        "all",
        torch.randint(0, 40, (length,), generator=generator),
        mask,
        torch.randn(length, 32, generator=generator),
        torch.randn(length, 16, generator=generator),
    )


def batch_of(rows: list[list[FeatureSample]], count: int = 4096) -> TrainBatch:
    anchors = [[choose_anchors(s.loss_mask_T, count, 0) for s in row] for row in rows]
    return collate(rows, anchors, ("all",))


def eagle() -> EagleDrafter:
    torch.manual_seed(0)
    drafter = EagleDrafter(EAGLE_CONFIG)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.train()


@pytest.mark.parametrize("packed", [False, True])
def test_the_objective_is_the_mean_over_conversations_of_sums_over_their_lengths(packed: bool) -> None:
    """DeepSpec: for each conversation the steps' sums of soft cross-entropies, 0.8 to the power of the step,
    over all its tokens; the mean of these. Here number by number."""
    settings = load_recipe(RECIPES[0]).train.loss
    drafter, samples = eagle(), [sample(n, i) for i, n in enumerate(ANSWERS)]
    batch = batch_of([[samples[0], samples[1]], [samples[2]]] if packed else [[s] for s in samples])
    report = drafter.loss(batch, settings)
    report.loss_sum.backward()
    found = {n: p.grad / report.weight_sum for n, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()

    total, counted = torch.zeros(()), 0
    for one in samples:
        alone = batch_of([[one]])
        layout = lay_out(alone, drafter.gamma, None)
        states_XGH = unrolled_states(drafter, alone, layout)
        of_conversation = torch.zeros(())
        for block, anchor in enumerate(layout.anchor_X.tolist()):
            for k in range(drafter.gamma):
                place = anchor + 1 + k
                if place >= len(one.tokens_T) or not one.loss_mask_T[place]:
                    break
                head = drafter.lm_head.weight
                log_q = (head @ drafter.norm(states_XGH[block, k])).log_softmax(-1)
                p = (head @ one.last_hidden_TH[place - 1]).softmax(-1)
                of_conversation = of_conversation + 0.8**k * (p * (p.log() - log_q)).sum()
                counted += 1
        total = total + of_conversation / len(one.tokens_T) / 3
    total.backward()
    objective = report.loss_sum / report.weight_sum
    torch.testing.assert_close(objective.detach(), total.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(report.sums["kl"] / report.weight_sum, total.detach(), atol=1e-5, rtol=1e-4)
    assert (
        len(report.rows_N)
        == counted
        == sum(
            max(0, min(4, end - anchor - 1))
            for n in ANSWERS
            for start, end in ANSWERS[n]
            for anchor in range(start, end)
        )
    )
    for name, parameter in drafter.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_without_conversations_changes_no_mean_and_dspark_may_average_so_too() -> None:
    one, rest = sample(12, 0), sample(7, 1)
    no = torch.zeros(1, dtype=torch.bool)
    nothing = FeatureSample("", "all", rest.tokens_T[:1], no, rest.features_TF[:1], rest.last_hidden_TH[:1])
    settings = LossSettings(average="conversations")
    for drafter in (eagle(), block_drafter().train()):
        assert float(drafter.loss(batch_of([[nothing]]), settings).weight_sum) == 0
        together = drafter.loss(batch_of([[one, rest]]), settings)
        apart = [drafter.loss(batch_of([[s]]), settings) for s in (one, rest)]
        assert float(together.weight_sum) == 2
        wanted = sum(float(r.loss_sum.detach()) for r in apart)
        assert float(together.loss_sum.detach()) == pytest.approx(wanted, rel=1e-4)
        tokens = drafter.loss(batch_of([[one]]), LossSettings())
        assert float(apart[0].loss_sum.detach()) == pytest.approx(
            float(tokens.loss_sum.detach()) / 12, rel=1e-4
        )


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_take_all_places_and_average_as_deepspec(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.train.anchors == recipe.capture.max_length == 4096
    assert recipe.train.loss.average == "conversations"
    mask = torch.ones(4096, dtype=torch.bool)
    assert choose_anchors(mask, recipe.train.anchors, 0).tolist() == list(range(4095))
    assert recipe.drafter.style == ("gemma4" if name.startswith("gemma4") else "qwen3")


@torch.no_grad()
def test_gemma4_12b_eagle3_has_gemmas_block() -> None:
    """A small Gemma 4 target and the recipe's drafter: its first step is that of DeepSpec's layer, put
    together of Transformers' norms, attention and MLP."""
    text = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=300,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        global_head_dim=16,
        final_logit_softcapping=5.0,
        max_position_embeddings=256,
    )
    text._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(text).eval()
    theirs = model.model.layers[5]  # with global attention
    for name in ("q_proj", "k_proj"):
        setattr(
            theirs.self_attn, name, torch.nn.Linear(64, getattr(theirs.self_attn, name).out_features, False)
        )
    torch.manual_seed(0)
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        tensor.data.normal_(mean=0.3, std=0.3)
    model.lm_head.weight.mul_(30)  # tied: the embedding too

    recipe = load_recipe("gemma4-12b-eagle3", ["drafter.feature_layers=[0,1,2,3,4]"])
    info = TargetInfo("g", None, "f", 300, 32, 6, (2,), 256, "gemma4_text")
    config = drafter_config(recipe, SimpleNamespace(text_config=text, info=info), None)  # type: ignore[arg-type]
    assert isinstance(config, EagleConfig)
    drafter = EagleDrafter(config)
    drafter.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    drafter.lm_head.weight.copy_(model.lm_head.weight)
    hidden_norm = drafter.midlayer.hidden_norm
    hidden_norm.weight.normal_(mean=1, std=0.3)
    drafter.midlayer.load_state_dict(
        theirs.state_dict() | {"hidden_norm.weight": hidden_norm.weight}  # strict: the same names and shapes
    )
    length = 9
    tokens, features = torch.randint(0, 300, (1, length)), torch.randn(1, length, 5 * 32)

    state = features @ drafter.fc.weight.T
    embedded = model.model.embed_tokens(tokens.roll(-1, 1))  # row i has token i + 1
    joined = torch.cat([theirs.input_layernorm(embedded), hidden_norm(state)], -1)
    rope = model.model.rotary_emb(state, torch.arange(length)[None], "full_attention")
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
    mixed = theirs.self_attn(joined, rope, causal, shared_kv_states={})[0]
    state = state + theirs.post_attention_layernorm(mixed)
    mixed = theirs.mlp(theirs.pre_feedforward_layernorm(state))
    state = (state + theirs.post_feedforward_layernorm(mixed)) * theirs.layer_scalar
    capped = 5 * torch.tanh(drafter.norm(state) @ model.lm_head.weight.T / 5)

    answer = FeatureSample(
        "", "all", tokens[0], torch.ones(length, dtype=torch.bool), features[0], features[0]
    )
    batch = batch_of([[answer]])
    layout = lay_out(batch, drafter.gamma, None)
    # of anchors 0, 1, ...; that of anchor a is row a - 1
    found = unrolled_states(drafter, batch, layout)[:, 0]
    torch.testing.assert_close(found[1:], state[0, : len(found) - 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(drafter.logits(found[1:]), capped[0, : len(found) - 1], atol=1e-5, rtol=1e-4)
