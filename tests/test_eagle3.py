"""EAGLE-3: drafting and training take the same steps, and states, loss and gradients are what the equations
say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from draftkit import feature_stages, stages, train_stages
from draftkit.config import load_recipe
from draftkit.data.conversations import Conversation, Message, read_conversations
from draftkit.decode import decode
from draftkit.draft.checkpoint import new_drafter, open_drafter, save_drafter
from draftkit.draft.drafter import TrainBatch
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.eagle3_shape import NORMS
from draftkit.draft.eagle3_training import unrolled_states
from draftkit.draft.layout import lay_out
from draftkit.errors import ConfigError
from draftkit.features.draft_vocabulary import choose_draft_vocabulary, count_answer_tokens
from draftkit.features.store import FeatureStore
from draftkit.ops.sampling import Sampling
from draftkit.settings import LossSettings
from draftkit.target.transformers import TransformersTarget
from support.drafters import EAGLE_CONFIG as CONFIG
from support.drafters import GEMMA, eagle_for

LENGTH, STEPS = 20, 4
VARIANTS: list[dict[str, object]] = [
    {},
    {"style": "qwen3"},
    {"norm_before_residual": True},
    GEMMA,
    {"norm_before_fc": True, "fc_norm": True, "norm_output": True},
    {"feature_layers": (0, 1, 2)},
]
ROPE_ERROR = {"atol": 1e-6, "rtol": 1e-6}  # the package turns by float32 angles


def drafter_with(**changes: object) -> EagleDrafter:
    torch.manual_seed(0)
    drafter = EagleDrafter(replace(CONFIG, **changes))  # type: ignore[arg-type]
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if drafter.config.style == "gemma4":
        drafter.midlayer.layer_scalar.fill_(0.7)
    return drafter.double()


def random_batch(features: int = 2) -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 5:18] = True
    mask[1, 8:] = True
    return TrainBatch(
        tokens_BT=torch.randint(0, 40, (2, LENGTH), generator=generator),
        loss_mask_BT=mask,
        features_BTF=torch.randn(2, LENGTH, 16 * features, generator=generator, dtype=torch.float64),
        last_hidden_BTH=torch.randn(2, LENGTH, 16, generator=generator, dtype=torch.float64),
        anchors_BA=torch.tensor([[6, 15, 0], [9, 12, 17]]),
        anchor_mask_BA=torch.tensor([[True, True, False], [True, True, True]]),
        document_BT=torch.zeros(2, LENGTH, dtype=torch.long),
        positions_BT=torch.arange(LENGTH).expand(2, -1),
        domain_BA=torch.tensor([[1, 1, 0], [0, 0, 0]]),
        domains=("chat", "code"),
    )


def rms(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def rotated(x_TND: torch.Tensor, positions: torch.Tensor, share: float) -> torch.Tensor:
    half = x_TND.shape[-1] // 2
    angles = (
        positions[:, None] * 10_000.0 ** (-torch.arange(half) / half) * (torch.arange(half) < share * half)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.complex(x_TND[..., :half], x_TND[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def plain_states(drafter: EagleDrafter, tokens_T: torch.Tensor, features_TF: torch.Tensor) -> torch.Tensor:
    """All rows of one conversation through all steps with dense masks over all steps' keys: [steps, T, H].

    The second implementation: step j's keys of row i are seen by row i alone, those of step 0 causally.
    """
    layer, attention, length, config = (
        drafter.midlayer,
        drafter.midlayer.self_attn,
        len(tokens_T),
        drafter.config,
    )
    gemma = config.style == "gemma4"
    rows = torch.arange(length)
    if config.norm_before_fc:
        features_TF = rms(features_TF, drafter.input_norm)
    if config.fc_norm:
        parts = features_TF.split(config.hidden_size, -1)
        features_TF = torch.cat([rms(x, n) for x, n in zip(parts, drafter.fc_norm, strict=True)], -1)
    state = features_TF @ drafter.fc.weight.T
    keys, values, masks, states = [], [], [], []
    for step in range(STEPS):
        embedded = drafter.embed_tokens.weight[tokens_T[(rows + 1 + step).clamp_max(length - 1)]] * (
            4 if gemma else 1
        )
        normed = rms(state, layer.hidden_norm)
        u = torch.cat([rms(embedded, layer.input_layernorm), normed], -1)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj or attention.k_proj)
        q, k, v = ((u @ p.weight.T).view(length, -1, 8) for p in projections)
        q, k = (
            rotated(rms(x, n), rows + step, config.rotary_share)
            for x, n in ((q, attention.q_norm), (k, attention.k_norm))
        )
        if gemma:
            v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        keys.append(k.repeat_interleave(2, 1))
        values.append(v.repeat_interleave(2, 1))
        masks.append(rows[:, None] >= rows if step == 0 else rows[:, None] == rows)
        scores = torch.einsum("tnd,snd->nts", q, torch.cat(keys)) / (1 if gemma else 8**0.5)
        probs = scores.masked_fill(~torch.cat(masks, 1), float("-inf")).softmax(-1)
        mixed = torch.einsum("nts,snd->tnd", probs, torch.cat(values)).flatten(1)
        update, x = mixed @ attention.o_proj.weight.T, normed if config.norm_before_residual else state
        state = x + (rms(update, layer.post_attention_layernorm) if gemma else update)
        x = rms(state, layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm)
        gate = x @ layer.mlp.gate_proj.weight.T
        gate = F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)
        update = (gate * (x @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
        state = (state + rms(update, layer.post_feedforward_layernorm)) * 0.7 if gemma else state + update
        states.append(state)
        state = rms(state, drafter.norm) if config.norm_output else state
    return torch.stack(states)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: next(iter(c), "plain"))
def test_states_loss_and_gradients_equal_a_second_implementation(changes: dict[str, object]) -> None:
    settings = LossSettings(ce=0.3, tv=0.6, decay=3.0)
    drafter, batch = drafter_with(**changes).train(), random_batch(3 if "feature_layers" in changes else 2)
    report = drafter.loss(batch, settings)
    report.loss_sum.backward()
    found = {n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()
    states_XGH = unrolled_states(drafter, batch, lay_out(batch, STEPS, None))

    loss, weights, accepts, rows = torch.zeros(()), 0.0, [], []
    anchors = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    for b in range(2):
        states = plain_states(drafter, batch.tokens_BT[b], batch.features_BTF[b])
        for a, anchor in enumerate(batch.anchors_BA[b].tolist()):
            if not batch.anchor_mask_BA[b, a]:
                continue
            for k in range(STEPS):
                place = anchor + 1 + k
                if place >= LENGTH or not batch.loss_mask_BT[b, place]:
                    break
                torch.testing.assert_close(
                    states_XGH[anchors.index((b, a)), k], states[k, anchor - 1], **ROPE_ERROR
                )
                both = torch.stack(
                    [rms(states[k, anchor - 1], drafter.norm), batch.last_hidden_BTH[b, place - 1]]
                )
                logits = both @ drafter.lm_head.weight.T
                q, p = torch.softmax(5 * torch.tanh(logits / 5) if "soft_cap" in changes else logits, -1)
                tv, weight = (q - p).abs().sum(), torch.exp(torch.tensor(-k / 3.0))
                loss = loss + weight * (0.6 * tv - 0.3 * q[batch.tokens_BT[b, place]].log())
                weights += float(weight)
                accepts.append(float(1 - tv.detach() / 2))
                rows.append((b * 3 + a) * STEPS + k)
    loss.backward()
    torch.testing.assert_close(
        report.loss_sum.detach(), loss.detach(), check_dtype=False, atol=1e-5, rtol=1e-5
    )
    assert float(report.weight_sum) == pytest.approx(weights, rel=1e-5)
    assert report.rows_N.tolist() == rows
    assert report.accept_N.tolist() == pytest.approx(accepts, abs=1e-5)
    wanted = {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def test_a_reduced_vocabulary_is_trained_against_the_targets_whole_distribution() -> None:
    """Every row by hand: acceptance counts the target's mass outside; a token that cannot be drafted has no
    CE."""
    drafter, batch = drafter_with(draft_vocab_size=12).train(), random_batch()
    with pytest.raises(ConfigError, match="together with its target"):
        drafter.loss(batch, LossSettings())
    target_head, ids = torch.randn(40, 16, dtype=torch.float64), torch.arange(0, 36, 3)
    drafter.choose_vocabulary(ids, target_head)
    report = drafter.loss(batch, LossSettings(ce=1.0, tv=0.5, decay=3.0))
    layout = lay_out(batch, STEPS, None)
    states = unrolled_states(drafter, batch, layout).flatten(0, 1)[layout.row_N]
    q = torch.zeros(len(states), 40, dtype=torch.float64)
    q[:, ids] = torch.softmax(rms(states, drafter.norm) @ drafter.lm_head.weight.T, -1)
    loss = torch.zeros((), dtype=torch.float64)
    for n, cell in enumerate(report.rows_N.tolist()):
        b, a, k = cell // 12, cell % 12 // STEPS, cell % STEPS
        place = int(batch.anchors_BA[b, a]) + 1 + k
        p = torch.softmax(target_head @ batch.last_hidden_BTH[b, place - 1], -1)
        tv, token = (q[n] - p).abs().sum(), int(batch.tokens_BT[b, place])
        assert float(report.accept_N[n]) == pytest.approx(float(torch.minimum(q[n], p).sum().detach()))
        weight = torch.exp(torch.tensor(-k / 3.0))
        loss = loss + weight * (0.5 * tv - (q[n, token].log() if token in ids else 0))
    torch.testing.assert_close(report.loss_sum, loss, atol=1e-5, rtol=1e-5)
    report.loss_sum.backward()
    assert float(drafter.fc.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert drafter.lm_head.weight.grad is None


def test_the_draft_vocabulary_is_what_the_target_writes_most() -> None:
    counts = torch.tensor([3, 0, 7, 7, 1, 3, 0])
    assert choose_draft_vocabulary(counts, 3).tolist() == [0, 2, 3]
    assert choose_draft_vocabulary(counts, 7).tolist() == list(range(7))


@pytest.mark.parametrize("changes", VARIANTS[:5], ids=lambda c: next(iter(c), "plain"))
def test_training_and_drafting_take_the_same_steps(changes: dict[str, object]) -> None:
    """All anchors at once, against one at a time with a context that grows in pieces and is cropped."""
    drafter, batch = drafter_with(**changes).eval(), random_batch()
    together = unrolled_states(drafter, batch, lay_out(batch, STEPS, None))
    for block, row, anchor in ((0, 0, 6), (3, 1, 12)):
        tokens, features = batch.tokens_BT[row : row + 1], batch.features_BTF[row : row + 1]
        context = drafter.new_context()
        for start, end in ((0, 3), (3, anchor + 2)):  # in two pieces, and a little too far
            drafter.extend(context, features[:, start:end], tokens[:, start + 1 : end + 1])
        context.crop(anchor)
        context.make_room(anchor + STEPS)
        state = context.features_BTH[:, anchor - 1 : anchor]
        with torch.inference_mode():
            for k in range(STEPS):
                state = drafter._step(context, anchor - 1 + k, tokens[:, anchor + k], state)
                torch.testing.assert_close(state[0, 0], together[block, k], **ROPE_ERROR)
                state = drafter.fed_back(state)


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", [None, 12])
def test_the_proposal_holds_the_very_distribution_that_was_sampled(vocabulary: int | None) -> None:
    drafter, batch = drafter_with(draft_vocab_size=vocabulary).eval(), random_batch()
    if vocabulary:
        drafter.draft_ids_W = torch.arange(1, 40, 3)[:vocabulary]
    context = drafter.new_context()
    drafter.extend(context, batch.features_BTF[:1, :8], batch.tokens_BT[:1, 1:9])
    anchor, uniforms = batch.tokens_BT[:1, 8], torch.full((1, STEPS), 0.5, dtype=torch.float64)
    for _ in range(2):  # drafting leaves the context as it was
        proposal = drafter.propose(context, anchor, Sampling(0.7), uniforms)
        assert context.length == 8
    state, token = context.features_BTH[:, 7:8], anchor
    for k in range(STEPS):
        state = drafter._step(context, 7 + k, token, state)
        logits_W = (drafter.lm_head.weight @ rms(state[0, 0], drafter.norm)) / 0.7
        wanted = torch.zeros(40, dtype=torch.float64)
        wanted[drafter.draft_ids_W if vocabulary else torch.arange(40)] = torch.softmax(logits_W, -1)
        torch.testing.assert_close(proposal.probs_BGV[0, k], wanted)
        token = proposal.tokens_BG[:, k]
        assert float(wanted[token]) > 0
    greedy = drafter.propose(context, anchor, Sampling(0.0), torch.zeros(1, STEPS))
    assert torch.equal(greedy.probs_BGV.argmax(-1), greedy.tokens_BG)
    assert torch.equal(greedy.probs_BGV.sum(-1), torch.ones(1, STEPS, dtype=torch.float64))


def test_documents_of_one_row_do_not_see_each_other() -> None:
    """Packed and apart: the same loss, the same gradients; the second document's first token is no anchor."""
    drafter, batch = drafter_with().train(), random_batch()
    apart = drafter.loss(batch, LossSettings())
    apart.loss_sum.backward()
    wanted = {n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()

    def join(rows: torch.Tensor, fill: int = 0) -> torch.Tensor:
        out = rows.new_full((1, 18 + LENGTH + 3, *rows.shape[2:]), fill)
        out[0, : 18 + LENGTH] = torch.cat([rows[0, :18], rows[1]])
        return out

    mask = join(batch.loss_mask_BT)
    mask[0, 18:20] = True  # would count, were they of the first document
    packed = TrainBatch(
        tokens_BT=join(batch.tokens_BT),
        loss_mask_BT=mask,
        features_BTF=join(batch.features_BTF),
        last_hidden_BTH=join(batch.last_hidden_BTH),
        document_BT=join(torch.arange(2)[:, None].expand(-1, LENGTH), fill=-1),
        positions_BT=join(batch.positions_BT),
        anchors_BA=torch.tensor([[6, 15, 0, 18 + 9, 18 + 12, 18 + 17, 18]]),
        anchor_mask_BA=torch.tensor([[True, True, False, True, True, True, True]]),
        domain_BA=torch.zeros(1, 7, dtype=torch.long),
        domains=batch.domains,
    )
    together = drafter.loss(packed, LossSettings())
    together.loss_sum.backward()
    assert together.rows_N.tolist() == apart.rows_N.tolist()
    torch.testing.assert_close(together.loss_sum, apart.loss_sum)
    torch.testing.assert_close(together.accept_N, apart.accept_N)
    for name, parameter in drafter.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@pytest.mark.parametrize("changes", [{}, {"style": "qwen3", "draft_vocab_size": 100}])
def test_greedy_answers_are_the_targets_own(target: TransformersTarget, changes: dict[str, object]) -> None:
    drafter = eagle_for(target, **changes)
    accepted = 0
    for prompt in ([4, 20, 31, 7], [9, 9, 9], [300]):
        plain = decode(target, None, prompt, Sampling(0.0), 24)
        answer = decode(target, drafter, prompt, Sampling(0.0), 24)
        assert answer.tokens == plain.tokens
        accepted += sum(r.accepted for r in answer.rounds)
    assert accepted > 0  # the rule was at work on both outcomes


def test_a_drafter_without_context_says_so(target: TransformersTarget) -> None:
    drafter = eagle_for(target)
    with pytest.raises(ValueError, match="at least one committed token"):
        drafter.propose(drafter.new_context(), torch.tensor([3]), Sampling(0.0), torch.zeros(1, STEPS))


def test_impossible_shapes_are_refused() -> None:
    for changes, message in (
        ({"num_layers": 2}, "1 layer"),
        ({"draft_vocab_size": 41}, "between 2 and the target's 40"),
        ({"draft_vocab_size": 1}, "between 2"),
        ({"feature_layers": (2, 0)}, "ascending"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_the_recipe_trains_a_drafter_with_a_reduced_vocabulary(target_folder: Path, tmp_path: Path) -> None:
    """From prompts to a drafter on disk: its vocabulary is chosen from the answers, and it drafts
    losslessly."""
    sizes = [
        "drafter.num_features=2",
        "drafter.draft_vocab_size=60",
        "generate.max_new_tokens=24",
        "train.steps=3",
    ]
    recipe = load_recipe("tiny-eagle3", [f"target.path={target_folder}", *sizes, "train.batch_size=4"])
    target, tokenizer = stages.open_target(recipe)
    prompts = [Conversation(f"p{i}", "chat", (Message("user", f"What is a list? {i}"),)) for i in range(8)]
    stages.run_generate(target, tokenizer, recipe, lambda first: prompts[first:], tmp_path / "answers.jsonl")
    feature_stages.run_capture(
        target, tokenizer, recipe, read_conversations([tmp_path / "answers.jsonl"]), tmp_path / "features"
    )
    source = feature_stages.open_features(recipe, target, tokenizer, [tmp_path / "features"])
    report = train_stages.run_train(target, tokenizer, recipe, source, tmp_path / "drafter")
    assert report.steps == 3
    assert report.accepted_len["macro"] > 1
    drafter = open_drafter(tmp_path / "drafter" / "best", target)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.draft_ids_W is not None
    counts = count_answer_tokens(FeatureStore(tmp_path / "features"), target.info.vocab_size)
    assert int(counts[drafter.draft_ids_W].sum()) == int(counts.topk(60).values.sum())
    prompt = [4, 20, 31, 7]
    plain = decode(target, None, prompt, Sampling(0.0), 16)
    assert decode(target, drafter, prompt, Sampling(0.0), 16).tokens == plain.tokens
    # another's EAGLE-3.1 goes on with this recipe, which cannot say its norms: they stay, and learn
    shape = replace(drafter.config, norm_before_residual=True, **dict.fromkeys(NORMS, True))
    other = new_drafter(shape, target.embedding_weight(), target.head_weight(), drafter.draft_ids_W)
    save_drafter(other, tmp_path / "31", {}, torch.float32)
    train_stages.run_train(target, tokenizer, recipe, source, tmp_path / "on", start_from=tmp_path / "31")
    learnt = open_drafter(tmp_path / "on" / "best", target)
    assert learnt.config == shape
    for name in ("input_norm.weight", "fc_norm.1.weight"):
        assert not torch.equal(learnt.state_dict()[name], other.state_dict()[name])
