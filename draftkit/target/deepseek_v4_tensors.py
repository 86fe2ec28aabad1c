"""Which tensors a DeepSeek-V4 checkpoint holds: their names, shapes and types, from `config.json` alone.

Names are DeepSeek's own (`layers.0.attn.wq_a.weight`, `mtp.0.main_proj.scale`). No torch here: `plan` and
`doctor` count tensors and bytes of checkpoints that nobody has to download."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from draftkit.errors import TargetError

BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}
FAMILY = "deepseek_v4"
SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
_KINDS = {0: SLIDING, 4: SPARSE, 128: HEAVY}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type (the names of safetensors) of a tensor in the checkpoint."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        """Stored elements; of packed FP4 half as many as weights."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.numbers * BYTES[self.dtype]


@dataclass(frozen=True)
class Sizes:
    """What of a raw `config.json` decides the tensors; DeepSeek's key names."""

    raw: Mapping[str, Any]

    def __getitem__(self, name: str) -> int:
        value, least = self.raw.get(name), 0 if name == "num_hash_layers" else 1
        if type(value) is not int or value < least:
            raise TargetError(
                f"config.json: {name} is {value!r}, must be a whole number of at least {least}; "
                "give DeepSeek's own file"
            )
        return value

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Kind of attention and compression ratio of each layer, from DeepSeek's `compress_ratios` or from
        what Transformers makes of them."""
        kinds, count = self.raw.get("layer_types"), self["num_hidden_layers"]
        if isinstance(kinds, list) and len(kinds) == count and all(k in _KINDS.values() for k in kinds):
            given = self.raw.get("compress_rates")
            rates = {SLIDING: 0, SPARSE: 4, HEAVY: 128} | (given if isinstance(given, dict) else {})
            if not all(type(rate) is int and rate >= 0 for rate in rates.values()):
                raise TargetError("config.json: compress_rates are whole numbers; give DeepSeek's own file")
            return [(kind, rates[kind]) for kind in kinds]
        ratios = self.raw.get("compress_ratios")
        if (
            not isinstance(ratios, list)
            or len(ratios) < count
            or not all(type(ratio) is int and ratio in _KINDS for ratio in ratios)
        ):
            raise TargetError(
                f"config.json: compress_ratios must have 0, 4 or 128 for each of {count} layers; "
                "give DeepSeek's own file"
            )
        return [(_KINDS[ratio], ratio) for ratio in ratios[:count]]

    @property
    def hash_layers(self) -> int:
        """Layers whose experts a table chooses."""
        kinds = self.raw.get("mlp_layer_types")
        return kinds.count("hash_moe") if isinstance(kinds, list) else self["num_hash_layers"]

    @property
    def taps(self) -> list[int]:
        """Target layers that the draft module reads."""
        found = self.raw.get("dspark_target_layer_ids")
        if not isinstance(found, list) or not found or not all(type(i) is int for i in found):
            raise TargetError(
                f"config.json: dspark_target_layer_ids is {found!r}, must be a list of layers; "
                "give DeepSeek's own file"
            )
        return found

    @property
    def stages(self) -> int:
        """Stages of a DSpark draft module, 0 without one. `num_nextn_predict_layers` says 1 for all of
        them."""
        if not has_draft_module(self.raw):
            return 0
        if self.raw.get("n_mtp_layers"):
            return self["n_mtp_layers"]
        ratios = self.raw.get("compress_ratios")
        more = len(ratios) - self["num_hidden_layers"] if isinstance(ratios, list) else 0
        return more if more > 0 else len(self.taps)


def checkpoint_tensors(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Every tensor of a released checkpoint with this raw `config.json`, the DSpark module under `mtp.*`
    included.

    Raises TargetError when a key is missing.
    """
    sizes = Sizes(config)
    hidden, streams, vocab = sizes["hidden_size"], sizes["hc_mult"], sizes["vocab_size"]
    found = {
        "embed.weight": TensorSpec((vocab, hidden), "BF16"),
        "head.weight": TensorSpec((vocab, hidden), "BF16"),
        "norm.weight": TensorSpec((hidden,), "BF16"),
        **_collapse("hc_head", streams, hidden),
    }
    for layer in range(sizes["num_hidden_layers"]):
        for name, spec in _block(sizes, *sizes.layers[layer], layer < sizes.hash_layers):
            found[f"layers.{layer}.{name}"] = spec
    return found | draft_tensors(config)


def draft_tensors(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The tensors of the DSpark module alone; none for a checkpoint without `dspark_*` keys."""
    sizes, found = Sizes(config), {}
    for stage in range(sizes.stages):
        for name, spec in (*_block(sizes, SLIDING, 0, False), *_draft_extras(sizes, stage)):
            found[f"mtp.{stage}.{name}"] = spec
    return found


def has_draft_module(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint says that it has a DSpark module: some `dspark_*` key (SGLang's rule). A preview
    checkpoint has a classic MTP layer under the same names and no such key."""
    return any(key.startswith("dspark_") for key in config)


def total_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of all of them."""
    return sum(spec.bytes for spec in tensors.values())


def total_weights(tensors: Mapping[str, TensorSpec]) -> int:
    """Weights of all of them: packed FP4 counts twice, scales and tables do not count."""
    counted = (s for s in tensors.values() if s.dtype not in ("F8_E8M0", "I64"))
    return sum(s.numbers * (2 if s.dtype == "I8" else 1) for s in counted)


def _draft_extras(sizes: Sizes, stage: int) -> Iterator[tuple[str, TensorSpec]]:
    hidden, streams, vocab = sizes["hidden_size"], sizes["hc_mult"], sizes["vocab_size"]
    if stage == 0:
        yield from _fp8("main_proj", hidden, len(sizes.taps) * hidden)
        yield "main_norm.weight", TensorSpec((hidden,), "BF16")
    if stage == sizes.stages - 1:
        rank = sizes["dspark_markov_rank"]
        yield "norm.weight", TensorSpec((hidden,), "BF16")
        yield from _collapse("hc_head", streams, hidden).items()
        for name in ("markov_w1", "markov_w2"):
            yield f"markov_head.{name}.weight", TensorSpec((vocab, rank), "BF16")
        read = hidden + (rank if sizes.raw.get("confidence_head_with_markov", True) else 0)
        yield "confidence_head.proj.weight", TensorSpec((1, read), "BF16")


def _block(sizes: Sizes, kind: str, ratio: int, hashed: bool) -> Iterator[tuple[str, TensorSpec]]:
    hidden, streams, experts = sizes["hidden_size"], sizes["hc_mult"], sizes["n_routed_experts"]
    yield from _attention(sizes, kind, ratio)
    for norm in ("attn_norm", "ffn_norm"):
        yield f"{norm}.weight", TensorSpec((hidden,), "BF16")
    mixes = (2 + streams) * streams
    for part in ("hc_attn", "hc_ffn"):
        yield f"{part}_fn", TensorSpec((mixes, streams * hidden), "F32")
        yield f"{part}_base", TensorSpec((mixes,), "F32")
        yield f"{part}_scale", TensorSpec((3,), "F32")
    yield "ffn.gate.weight", TensorSpec((experts, hidden), "BF16")
    if hashed:
        yield "ffn.gate.tid2eid", TensorSpec((sizes["vocab_size"], sizes["num_experts_per_tok"]), "I64")
    else:
        yield "ffn.gate.bias", TensorSpec((experts,), "F32")
    inner = sizes["moe_intermediate_size"]
    for name, out, into in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
        yield from _fp8(f"ffn.shared_experts.{name}", out, into)
        for expert in range(experts):
            yield from _fp4(f"ffn.experts.{expert}.{name}", out, into)


def _attention(sizes: Sizes, kind: str, ratio: int) -> Iterator[tuple[str, TensorSpec]]:
    hidden, heads, size = sizes["hidden_size"], sizes["num_attention_heads"], sizes["head_dim"]
    query, groups, rank = sizes["q_lora_rank"], sizes["o_groups"], sizes["o_lora_rank"]
    yield "attn.attn_sink", TensorSpec((heads,), "F32")
    yield "attn.q_norm.weight", TensorSpec((query,), "BF16")
    yield "attn.kv_norm.weight", TensorSpec((size,), "BF16")
    yield from _fp8("attn.wq_a", query, hidden)
    yield from _fp8("attn.wq_b", heads * size, query)
    yield from _fp8("attn.wkv", size, hidden)
    yield from _fp8("attn.wo_a", groups * rank, heads * size // groups)
    yield from _fp8("attn.wo_b", hidden, groups * rank)
    if kind != SLIDING:
        yield from _compressor("attn.compressor", kind, ratio, size, hidden)
    if kind == SPARSE:
        index, many = sizes["index_head_dim"], sizes["index_n_heads"]
        yield from _compressor("attn.indexer.compressor", kind, ratio, index, hidden)
        yield "attn.indexer.weights_proj.weight", TensorSpec((many, hidden), "BF16")
        yield from _fp8("attn.indexer.wq_b", many * index, query)


def _compressor(name: str, kind: str, ratio: int, size: int, hidden: int) -> Iterator[tuple[str, TensorSpec]]:
    width = size * (2 if kind == SPARSE else 1)  # its windows overlap
    yield f"{name}.ape", TensorSpec((ratio, width), "F32")
    yield f"{name}.norm.weight", TensorSpec((size,), "BF16")
    for part in ("wkv", "wgate"):
        yield f"{name}.{part}.weight", TensorSpec((width, hidden), "BF16")


def _collapse(name: str, streams: int, hidden: int) -> dict[str, TensorSpec]:
    return {
        f"{name}_fn": TensorSpec((streams, streams * hidden), "F32"),
        f"{name}_base": TensorSpec((streams,), "F32"),
        f"{name}_scale": TensorSpec((1,), "F32"),
    }


def _fp8(name: str, out: int, into: int) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{name}.weight", TensorSpec((out, into), "F8_E4M3")
    yield f"{name}.scale", TensorSpec((-(-out // 128), -(-into // 128)), "F8_E8M0")


def _fp4(name: str, out: int, into: int) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{name}.weight", TensorSpec((out, into // 2), "I8")
    yield f"{name}.scale", TensorSpec((out, into // 32), "F8_E8M0")
