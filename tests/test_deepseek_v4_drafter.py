"""DeepSeek-V4's draft module: what its blocks see, its heads, its names in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftkit.draft.checkpoint import load_drafter, open_drafter, save_drafter
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter, WindowContext
from draftkit.draft.deepseek_v4_checkpoint import tensor_specs
from draftkit.draft.drafter import TrainBatch
from draftkit.draft.layout import lay_out
from draftkit.errors import CheckpointError, ConfigError
from draftkit.features.source import empty_sample
from draftkit.ops.sampling import Sampling
from draftkit.settings import LossSettings
from draftkit.target.deepseek_v4_tensors import draft_tensors
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from draftkit.train.batches import empty_batch
from support.deepseek_v4 import tiny_drafter, tiny_shape, tiny_target
from tools.tiny_v4 import tiny_model, write_checkpoint
from tools.v4_configs import TINY

G, WINDOW, READ = 5, 8, 20
FEATURES = torch.randn(1, READ, 3 * 64, generator=torch.Generator().manual_seed(3))
ANCHOR = torch.tensor([17])
UNIFORMS = torch.full((1, G), 0.5, dtype=torch.float64)


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return tiny_target()


@pytest.fixture
def drafter(target: TransformersTarget) -> DeepseekV4Drafter:
    return tiny_drafter(target)


def _context(drafter: DeepseekV4Drafter, features: Tensor = FEATURES, pieces: int = READ) -> WindowContext:
    context = drafter.new_context()
    for start in range(0, features.shape[1], pieces):
        part = features[:, start : start + pieces]
        drafter.extend(context, part, torch.zeros(part.shape[:2], dtype=torch.int64))
    return context


def _hidden(drafter: DeepseekV4Drafter, features: Tensor = FEATURES) -> Tensor:
    with torch.no_grad():
        return drafter._block_hidden(_context(drafter, features), ANCHOR)[0]


def test_a_context_in_pieces_is_the_context_at_once_and_rejected_positions_leave_no_trace(
    drafter: DeepseekV4Drafter,
) -> None:
    whole = _context(drafter)
    for pieces in (1, 3, 7):
        context = _context(drafter, pieces=pieces)
        assert context.length == whole.length == READ
        torch.testing.assert_close(context.keys, whole.keys, atol=1e-5, rtol=1e-4)
    for rejected in range(G + 1):
        more = torch.cat([FEATURES, torch.randn(1, rejected, 192)], 1)
        context = _context(drafter, more, pieces=6)
        context.crop(READ)
        torch.testing.assert_close(context.keys[:, :, -WINDOW:], whole.keys[:, :, -WINDOW:])
    with pytest.raises(ValueError, match="the last 14 are kept"):
        whole.crop(2)


def test_the_last_noise_position_is_seen_by_the_first_row(drafter: DeepseekV4Drafter) -> None:
    before = _hidden(drafter)
    streams = drafter._streams

    def other(tokens_XG: Tensor) -> Tensor:
        found = streams(tokens_XG)
        found[:, -1] += 0.5
        return found

    drafter._streams = other  # type: ignore[method-assign]
    after = _hidden(drafter)
    assert float((after - before).abs().amax(-1).min()) > 1e-4


def test_every_row_sees_the_window_before_the_anchor_and_nothing_older(drafter: DeepseekV4Drafter) -> None:
    before = _hidden(drafter)
    for place, seen in ((READ - WINDOW - 1, False), (READ - WINDOW, True), (READ - 1, True)):
        features = FEATURES.clone()
        features[:, place] += 5.0
        change = (_hidden(drafter, features) - before).abs().amax(-1)
        if seen:
            assert float(change.min()) > 1e-4, place
        else:
            assert float(change.max()) == 0, place


def test_positions_count_from_the_beginning_of_the_text(drafter: DeepseekV4Drafter) -> None:
    """Only distances matter to rotary attention, so the same window further on gives the same block."""
    later = torch.cat([torch.randn(1, 9, 192), FEATURES], 1)
    torch.testing.assert_close(_hidden(drafter, later), _hidden(drafter), atol=1e-4, rtol=1e-3)
    context = _context(drafter)
    context._length += 1  # one further from the anchor
    with torch.no_grad():
        assert float((drafter._block_hidden(context, ANCHOR)[0] - _hidden(drafter)).abs().max()) > 1e-3


def test_the_markov_head_moves_the_most_likely_token(drafter: DeepseekV4Drafter) -> None:
    """A table that says 40 follows 17, 41 follows 40, and so on."""
    assert drafter.config.markov_rank == 16
    with torch.no_grad():
        drafter.markov_head.markov_w1.weight.zero_()
        drafter.markov_head.markov_w2.weight.zero_()
        for channel, (previous, following) in enumerate([(17, 40), (40, 41), (41, 42), (42, 43), (43, 44)]):
            drafter.markov_head.markov_w1.weight[previous, channel] = 100.0
            drafter.markov_head.markov_w2.weight[following, channel] = 100.0
    proposal = drafter.propose(_context(drafter), ANCHOR, Sampling(0.0), UNIFORMS)
    assert proposal.tokens_BG.tolist() == [[40, 41, 42, 43, 44]]


def test_confidence_reads_the_state_before_the_norm_and_the_token_before(drafter: DeepseekV4Drafter) -> None:
    context = _context(drafter)
    found = drafter.propose(context, ANCHOR, Sampling(0.0), UNIFORMS)
    hidden_GH = _hidden(drafter)
    previous = torch.cat([ANCHOR, found.tokens_BG[0, :-1]])
    weight = drafter.confidence_head.proj.weight[0]
    embedded = drafter.markov_head.markov_w1.weight[previous]
    wanted = torch.sigmoid(torch.cat([hidden_GH, embedded], -1) @ weight)
    torch.testing.assert_close(found.confidence_BG[0], wanted)
    assert drafter.confidence_head.proj.bias is None
    with torch.no_grad():
        drafter.markov_head.markov_w1.weight[17] += 1.0
    other = drafter.propose(context, ANCHOR, Sampling(0.0), UNIFORMS)
    assert float(other.confidence_BG[0, 0] - found.confidence_BG[0, 0]) != 0


def test_sinks_take_their_share_of_the_attention(drafter: DeepseekV4Drafter) -> None:
    before = _hidden(drafter)
    with torch.no_grad():
        for stage in drafter._stages():
            stage.self_attn.sinks.fill_(60.0)  # all of it
    alone = _hidden(drafter)
    features = FEATURES + 3.0
    assert float((alone - before).abs().max()) > 1e-3
    torch.testing.assert_close(_hidden(drafter, features), alone)


def test_training_sees_what_drafting_sees(target: TransformersTarget, drafter: DeepseekV4Drafter) -> None:
    """The hidden states of a training block are those of a proposal after the same tokens, also near the
    beginning."""
    tokens = torch.randint(0, 90, (1, READ), generator=torch.Generator().manual_seed(2))
    ones = torch.ones(1, READ, dtype=torch.bool)
    anchors = torch.tensor([[2, 7, 8, 13]])
    batch = TrainBatch(
        tokens,
        ones,
        FEATURES,
        torch.randn(1, READ, 64),
        torch.zeros(1, READ, dtype=torch.int64),
        torch.arange(READ)[None],
        anchors,
        torch.ones(1, 4, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
        ("all",),
    )
    layout = lay_out(batch, drafter.gamma, drafter.config.window)
    with torch.no_grad():
        trained = drafter._train_hidden(batch, layout)
        for row, anchor in enumerate(anchors[0].tolist()):
            context = _context(drafter, FEATURES[:, :anchor])
            drafted = drafter._block_hidden(context, tokens[:, anchor])
            torch.testing.assert_close(trained[row], drafted[0], atol=1e-5, rtol=1e-4)
    report = drafter.loss(batch, LossSettings())
    report.loss_sum.backward()
    still = {n for n, p in drafter.named_parameters() if p.requires_grad and p.grad is None}
    assert not still, still
    with torch.no_grad():
        assert torch.equal(drafter.loss(batch, LossSettings()).loss_sum, report.loss_sum)


def test_a_batch_without_an_anchor_has_no_loss_and_gradients_of_zero(drafter: DeepseekV4Drafter) -> None:
    """What a process runs when the rows of a step run out: experts that lie apart need it in step."""
    width = FEATURES.shape[-1]
    report = drafter.loss(empty_batch(empty_sample(width, 64, torch.float32), ("all",)), LossSettings())
    report.loss_sum.backward()
    assert report.loss_sum.item() == 0
    grads = [p.grad for p in drafter.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


def test_a_module_comes_back_from_its_own_folder(target: TransformersTarget, tmp_path: Path) -> None:
    drafter = tiny_drafter(target)
    save_drafter(drafter, tmp_path, {}, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(tensor_specs(drafter.config)) and "mtp.1.ffn.experts.3.w2.weight" in stored
    again = open_drafter(tmp_path, target)
    assert again.config == drafter.config
    assert again.lm_head.weight.data_ptr() == target.head_weight().data_ptr()  # shared, not copied
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="give the target too"):
        load_drafter(tmp_path)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_released_checkpoint_is_read_as_a_drafter(quantised: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_model(), quantised=quantised)
    target = load_target(str(folder))
    drafter = open_drafter(folder, target)
    assert isinstance(drafter, DeepseekV4Drafter)
    assert (drafter.config.num_layers, drafter.gamma, drafter.config.feature_layers) == (3, 5, (2, 3, 4))
    stored = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    gate_up = drafter.stages[1].mlp.experts.gate_up_proj
    if not quantised:
        assert torch.equal(gate_up[2, 32:], stored["mtp.1.ffn.experts.2.w3.weight"])
        assert torch.equal(drafter.norm.weight, stored["mtp.2.norm.weight"])
    assert set(draft_tensors(TINY)) == {n for n in stored if n.startswith("mtp.")} | (
        set() if quantised else {n for n in draft_tensors(TINY) if n.endswith(".scale")}
    )
    proposal = drafter.propose(_context(drafter), ANCHOR, Sampling(0.0), UNIFORMS)
    assert proposal.tokens_BG.shape == (1, G)


def test_checkpoints_that_cannot_be_a_drafter_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_model(), quantised=True, shards=1)
    raw = json.loads((folder / "config.json").read_text())
    target = load_target(str(folder))

    def told(said: str, config: dict[str, object] = raw) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=said):
            open_drafter(folder, target)

    preview = {k: v for k, v in raw.items() if not k.startswith("dspark_")}
    told(r"has no dspark_\* keys: a preview checkpoint without a DSpark module", preview)
    told(r"DeepSeek-V4\.1", raw | {"model_type": "deepseek_v41"})
    told(r"is 'gated'; draftkit runs 'vanilla'", raw | {"dspark_markov_head_type": "gated"})
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    scale = tensors.pop("mtp.1.attn.wkv.scale")
    save_file(tensors, shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("mtp.1.attn.wkv.scale")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    told(f"{folder}: the draft module's tensors do not fit .*: scales missing: mtp.1.attn.wkv.scale")
    assert scale.dtype == torch.float8_e8m0fnu


def test_settings_that_a_v4_module_does_not_have_are_refused() -> None:
    for changes in ({"layout": "one_plus_n"}, {"head": "rnn"}, {"draft_vocab_size": 40}, {"window": None}):
        with pytest.raises(ConfigError, match="leave these fields out"):
            tiny_shape(**changes)
    with pytest.raises(ConfigError, match="do not go with 3 groups"):
        tiny_shape(o_groups=3)
