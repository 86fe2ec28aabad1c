"""A small target and its drafter grown into large models of the SAME function: real answers at a large one's
cost.

    target = load_target("tiny")
    drafter = open_drafter(Path("runs/mine/drafter/best"), target)
    grown = grow_target(target, Growth(), "cuda", torch.bfloat16)
    Engine(grown, grow_drafter(drafter, grown, Growth()), EngineSettings(plan="fixed"))

Growth is by duplication, in the manner of Net2Net (Chen et al., 2016). The residual stream holds `hidden`
copies of every coordinate: what writes the stream has its rows repeated, what reads it its columns repeated
and divided by their number. Heads and MLP units are repeated, and their outputs divided. All these numbers
are powers of two, so the weights stay exact in bfloat16, and only the order of sums differs (in half
precision that can settle a near tie differently). Further layers lie after the old ones, so that feature
layers keep their ids; they are computed in full and add nothing. Further tokens have random rows in the head
that cancel out over the copies: their logit is 0 but for rounding, so only GREEDY answers are those of the
small model, whose best logits lie well above 0; sampled ones may hold such tokens, and a sum over all
probabilities counts them (a drafter without a confidence head is planned by such a one). The small model's
tokenizer stays.

For timing only, never for quality. Where a GPU's clock depends on the numbers it multiplies, repeated ones
and zeros may draw less power than a trained model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import Drafter
from draftkit.target.transformers import DTYPES, TransformersTarget

Rule = Callable[[Tensor], Tensor]  # a small model's weight, on the device already, to the grown one's
FURTHER_STD = 0.02  # of random weights that no answer depends on
# a layer whose writing matrices are zero adds nothing to the stream
SILENT = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Growth:
    """Factors for `hidden` and `mlp` (powers of two), sizes for the rest; the defaults make nearly Qwen3-8B
    of "tiny"."""

    hidden: int = 16
    mlp: int = 32
    heads: int = 64
    kv_heads: int = 16
    layers: int = 36
    draft_layers: int = 5
    vocab: int = 151_936


def grow_pair(
    target: TransformersTarget, drafter: Drafter, dtype: str = "bfloat16"
) -> tuple[TransformersTarget, BlockDrafter]:
    """Both in the shape of Qwen3-8B on a GPU; where there is none, of the size of SmolLM2-135M. Raises
    SystemExit."""
    if not isinstance(drafter, BlockDrafter):
        raise SystemExit(f"a block drafter can be grown, not {type(drafter).__name__}")
    if torch.cuda.is_available():
        growth, device = Growth(), "cuda"
    else:  # the embedded target becomes one of 146 million parameters
        growth, device = (
            Growth(4, 8, 8, 4, target.info.num_layers, drafter.config.num_layers, target.info.vocab_size),
            "cpu",
        )
    grown = grow_target(target, growth, device, DTYPES[dtype])
    return grown, grow_drafter(drafter, grown, growth)


def grow_target(
    target: TransformersTarget, growth: Growth, device: str | torch.device, dtype: torch.dtype
) -> TransformersTarget:
    """The grown target, made directly on `device` in `dtype`. Raises SystemExit for sizes or a family that do
    not fit."""
    old = target.model.config.get_text_config()
    heads, kv_heads = int(old.num_attention_heads), int(old.num_key_value_heads)
    head_dim = int(getattr(old, "head_dim", None) or old.hidden_size // heads)
    _check(growth, heads, kv_heads, old.num_hidden_layers <= growth.layers, target.info.vocab_size)
    config = copy.deepcopy(old)
    for name, value in {
        "hidden_size": old.hidden_size * growth.hidden,
        "intermediate_size": old.intermediate_size * growth.mlp,
        "num_attention_heads": growth.heads,
        "num_key_value_heads": growth.kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": growth.layers,
        "layer_types": ["full_attention"] * growth.layers,
        "vocab_size": growth.vocab,
        "tie_word_embeddings": False,  # the embedding is repeated, the head repeated and divided
        "dtype": dtype,
    }.items():
        setattr(config, name, value)
    device = torch.device(device)
    with _made_on(device, dtype):
        model = type(target.model)(config)
        _fill(model, target.model, _rules(growth, heads, kv_heads, head_dim))
        further = model.lm_head.weight[target.info.vocab_size :]
        further.copy_(_cancelling(len(further), old.hidden_size, growth.hidden))
    model.generation_config = copy.deepcopy(target.model.generation_config)
    info = replace(
        target.info,
        name=f"{target.info.name} grown",
        fingerprint=f"{target.info.fingerprint} {growth}",
        vocab_size=growth.vocab,
        hidden_size=config.hidden_size,
        num_layers=growth.layers,
    )
    return TransformersTarget(model, info)


def grow_drafter(drafter: BlockDrafter, target: TransformersTarget, growth: Growth) -> BlockDrafter:
    """The drafter of the grown `target`, on its device and in its dtype; embedding and head are the very
    tensors of the target.

    All head kinds of `BlockDrafter`, and the styles "qwen3" and "llama". Raises SystemExit when sizes, style
    or target differ.
    """
    old, like = drafter.config, target.head_weight()
    _check(growth, old.num_heads, old.num_kv_heads, old.num_layers <= growth.draft_layers, old.vocab_size)
    if old.style not in ("qwen3", "llama"):
        raise SystemExit(f"a drafter of style {old.style!r} cannot be grown: choose one of qwen3, llama")
    _check_same_vocabulary(drafter, target, growth)
    config = replace(
        old,
        hidden_size=old.hidden_size * growth.hidden,
        intermediate_size=old.intermediate_size * growth.mlp,
        num_heads=growth.heads,
        num_kv_heads=growth.kv_heads,
        num_layers=growth.draft_layers,
        vocab_size=growth.vocab,
        num_target_layers=growth.layers,
    )
    hidden, rank = old.hidden_size, old.markov_rank
    rules = _rules(growth, old.num_heads, old.num_kv_heads, old.head_dim) | {
        "fc": lambda w: writes(
            torch.cat([reads(layer, growth.hidden) for layer in w.split(hidden, 1)], 1), growth.hidden
        ),
        "hidden_norm": lambda w: writes(w, growth.hidden),
        "markov_head.gate_proj": lambda w: _reads_within(w, 0, hidden, growth.hidden),
        # after state and token
        "markov_head.joint_proj": lambda w: _reads_within(w, 2 * rank, hidden, growth.hidden),
        "confidence_head.proj": lambda w: _reads_within(w, 0, hidden, growth.hidden),
    }
    heads = ("markov_head.gate_proj", "markov_head.joint_proj", "confidence_head.proj")
    rules |= dict.fromkeys(
        ("markov_head.markov_w1", "markov_head.markov_w2", *(f"{name}.bias" for name in heads)), _keep
    )
    with _made_on(like.device, like.dtype):
        grown = BlockDrafter(config)
        grown.embed_tokens.weight = nn.Parameter(target.embedding_weight(), requires_grad=False)
        grown.lm_head.weight = nn.Parameter(like, requires_grad=False)
        # further tokens are neither drafted nor read: their rows say nothing
        if grown.markov_head is not None:
            grown.markov_head.markov_w1.weight.zero_()
            grown.markov_head.markov_w2.weight.zero_()
        _fill(grown, drafter, rules, leave=("embed_tokens", "lm_head"))
    return grown.eval()


def reads(weight: Tensor, copies: int) -> Tensor:
    """A matrix [out, in] whose input holds every coordinate `copies` times: [out, copies * in]."""
    return (weight / copies).repeat(1, copies)


def writes(weight: Tensor, copies: int) -> Tensor:
    """A matrix or a norm's weight [out, ...] whose output holds every coordinate `copies` times: [copies *
    out, ...]."""
    return weight.repeat(copies, *[1] * (weight.ndim - 1))


def head_sources(old: tuple[int, int], new: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Which old query head and which old key/value head every new one copies; `old` and `new` are (query,
    key/value) heads.

    A new query head copies one of those that share the key/value head which its new group has copied.
    """
    (_, old_kv), (new_heads, new_kv) = old, new
    fold, new_fold = old[0] // old_kv, new_heads // new_kv
    queries = []
    for head in range(new_heads):
        group, place = divmod(head, new_fold)
        # counts the copies of this group's heads, so that all come equally often
        turn = group // old_kv * new_fold + place
        queries.append(group % old_kv * fold + turn % fold)
    return queries, [head % old_kv for head in range(new_kv)]


def _rules(growth: Growth, heads: int, kv_heads: int, head_dim: int) -> dict[str, Rule]:
    """What target and drafter have in common, by the ends of the weights' names; `heads` and `kv_heads` are
    the small one's."""
    copies, mlp = growth.hidden, growth.mlp
    queries, keys = head_sources((heads, kv_heads), (growth.heads, growth.kv_heads))

    def pick(weight: Tensor, chosen: list[int]) -> Tensor:
        return weight.unflatten(0, (-1, head_dim))[chosen].flatten(0, 1)

    def mixed(weight: Tensor) -> Tensor:
        return writes(pick(weight.t(), queries).t() / (growth.heads // heads), copies)

    return {
        "embed_tokens": lambda w: w.repeat(1, copies),
        "lm_head": lambda w: reads(w, copies),
        "self_attn.q_proj": lambda w: reads(pick(w, queries), copies),
        "self_attn.k_proj": lambda w: reads(pick(w, keys), copies),
        "self_attn.v_proj": lambda w: reads(pick(w, keys), copies),
        "self_attn.o_proj": mixed,
        "self_attn.q_norm": _keep,
        "self_attn.k_norm": _keep,
        "mlp.gate_proj": lambda w: reads(writes(w, mlp), copies),
        "mlp.up_proj": lambda w: reads(writes(w, mlp), copies),
        "mlp.down_proj": lambda w: writes(reads(w, mlp), copies),
    } | {
        name: lambda w: writes(w, copies) for name in ("norm", "input_layernorm", "post_attention_layernorm")
    }


def _fill(new: nn.Module, old: nn.Module, rules: dict[str, Rule], leave: tuple[str, ...] = ()) -> None:
    """Old weights by their rules into the first rows; what the old model has not stays random, or silent."""
    weights = old.state_dict()  # holds a tied head under its own name too
    for full_name, parameter in new.named_parameters():
        name = full_name.removesuffix(".weight")
        if name in leave:
            continue
        if full_name not in weights:
            if name.endswith(SILENT):
                parameter.zero_()
            continue
        rule = next((rule for end, rule in rules.items() if f".{name}".endswith(f".{end}")), None)
        if rule is None:
            raise SystemExit(
                f"{full_name}: there is no rule to grow this weight; choose a model of another family"
            )
        grown = rule(weights[full_name].to(parameter.device, parameter.dtype))
        parameter[: len(grown)].copy_(grown)


def _keep(weight: Tensor) -> Tensor:
    return weight


def _reads_within(weight: Tensor, start: int, width: int, copies: int) -> Tensor:
    """`reads` for the columns from `start` to `start + width`; the others stay."""
    before, hidden, after = weight.tensor_split((start, start + width), 1)
    return torch.cat([before, reads(hidden, copies), after], 1)


def _cancelling(rows: int, width: int, copies: int) -> Tensor:
    """Random rows [rows, copies * width] that sum to zero over the copies of each coordinate, exactly in
    every dtype."""
    half = torch.randn(rows, copies // 2 * width) * FURTHER_STD
    return torch.cat([half, -half, torch.zeros(rows, copies % 2 * width)], 1)


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are born there, without gradients, from a seed of their own; the generators go on as
    before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device, torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def _check(growth: Growth, heads: int, kv_heads: int, deep_enough: bool, vocab: int) -> None:
    """Raise SystemExit for a growth that cannot be exact."""
    factors = {"hidden": growth.hidden, "mlp": growth.mlp, "heads": growth.heads / heads}
    for name, factor in factors.items():
        if factor not in (2**k for k in range(16)):
            raise SystemExit(f"{name} would grow by a factor of {factor}: choose a power of two")
    if growth.kv_heads % kv_heads or growth.heads % growth.kv_heads:
        raise SystemExit(
            f"kv_heads is {growth.kv_heads}: choose a multiple of {kv_heads} that divides {growth.heads}"
        )
    if not deep_enough or growth.vocab < vocab:
        raise SystemExit("layers, draft_layers and vocab must be at least those of the small models")


def _check_same_vocabulary(drafter: BlockDrafter, target: TransformersTarget, growth: Growth) -> None:
    """Raise SystemExit unless embedding and head of the drafter, grown, are those of the target."""
    for name, own, theirs, factor in (
        ("embedding", drafter.embed_tokens.weight, target.embedding_weight(), 1),
        ("head", drafter.lm_head.weight, target.head_weight(), growth.hidden),
    ):
        part = theirs[: own.shape[0], : own.shape[1]] * factor
        if part.shape != own.shape or not torch.equal(part, own.to(part)):
            raise SystemExit(
                f"the drafter's {name} is not that of {target.info.name}: grow the target that it was "
                f"made for"
            )
