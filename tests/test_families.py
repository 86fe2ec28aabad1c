"""Drafter blocks are the families' own: the same numbers as Transformers' decoder layers, and shapes from any
target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from draftkit.config import RECIPES, Recipe, load_recipe
from draftkit.decode import decode
from draftkit.draft.algorithms import ALGORITHMS
from draftkit.draft.backbone import DraftLayer, Rotation, rope_table
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import DrafterConfig
from draftkit.draft.families import block_shape, style_of
from draftkit.errors import ConfigError
from draftkit.ops.attention import plan_blocks
from draftkit.ops.sampling import Sampling
from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget
from draftkit.train_stages import drafter_config

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 300,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 16,
    "final_logit_softcapping": 5.0,
    "sliding_window": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {"qwen3": {}, "llama": {}, "gemma4_text": GEMMA4}
BLOCK, START = 5, 11  # positions of the block that is compared


def text_config(family: str, **changes: Any) -> PretrainedConfig:
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))
    config._attn_implementation = "eager"
    return config


def make_config(text: PretrainedConfig, style: str) -> DrafterConfig:
    shape = vars(block_shape(text, style))
    return DrafterConfig(
        **shape,
        hidden_size=32,
        num_layers=2,
        vocab_size=300,
        feature_layers=(0, 2),
        num_target_layers=6,
        mask_token_id=3,
        markov_rank=4,
        max_length=256,
    )


def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(mean=0.5, std=0.3)


def rotation(config: DrafterConfig) -> Rotation:
    table = rope_table(config, START + BLOCK)[START:]
    return table[:, None, 0], table[:, None, 1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_without_context_is_the_familys_own_layer(family: str) -> None:
    """Weights go from one to the other by name; attention within a block has no mask."""
    text = text_config(family)
    model = AutoModelForCausalLM.from_config(text).eval()
    index = 5  # a Gemma 4 layer with global attention
    theirs = model.model.layers[index]
    randomise(theirs)
    config = make_config(text, family.removesuffix("_text"))
    ours = DraftLayer(config)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes, buffers included

    x = torch.randn(BLOCK, 32)
    positions = torch.arange(START, START + BLOCK)[None]
    kinds = ("full_attention",) if family == "gemma4_text" else ()
    rope = model.model.rotary_emb(x[None], positions, *kinds)
    more = {"shared_kv_states": {}} if family == "gemma4_text" else {}
    wanted = theirs(x[None], position_embeddings=rope, attention_mask=None, **more)
    none = torch.zeros(1, dtype=torch.long)
    plan = plan_blocks(none, none, none, BLOCK, 0, config.head_dim)
    empty = rope_table(config, 0)
    found = ours(x, torch.zeros(0, 32), rotation(config), (empty[:, None, 0], empty[:, None, 1]), plan)
    torch.testing.assert_close(found, wanted[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embeddings_and_logits_are_scaled_and_capped_as_gemma_does_it() -> None:
    text = text_config("gemma4_text")
    model = AutoModelForCausalLM.from_config(text).eval()
    drafter = BlockDrafter(make_config(text, "gemma4"))
    model.lm_head.weight.mul_(30)  # tied: the embedding too
    drafter.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    drafter.lm_head.weight.copy_(model.lm_head.weight)
    tokens = torch.tensor([[5, 9, 41]])
    torch.testing.assert_close(drafter.embed(tokens), model.model.embed_tokens(tokens))
    states = model(inputs_embeds=model.model.embed_tokens(tokens), output_hidden_states=True)
    assert float(states.logits.abs().max()) > 2  # far enough for the cap of 5 to bend
    torch.testing.assert_close(drafter.head().logits(states.hidden_states[-1]), states.logits)


def test_gemma_4_blocks_take_the_geometry_of_global_attention() -> None:
    shape = block_shape(text_config("gemma4_text"), style_of("gemma4_text"))
    assert (shape.style, shape.head_dim, shape.num_kv_heads, shape.shared_key_value) == (
        "gemma4",
        16,
        1,
        True,
    )
    assert (shape.rope_theta, shape.rotary_share, shape.soft_cap) == (1e6, 0.25, 5.0)
    separate = block_shape(text_config("gemma4_text", attention_k_eq_v=False), "gemma4")
    assert (separate.num_kv_heads, separate.shared_key_value) == (2, False)


def test_every_family_has_a_block_that_engines_load() -> None:
    """Gemma 4 its own; all others the Qwen3 block. Llama's is there to be chosen."""
    assert {family: style_of(family) for family in ("qwen3", "llama", "gpt2", "gemma4_text", "gemma4")} == {
        "qwen3": "qwen3",
        "llama": "qwen3",
        "gpt2": "qwen3",
        "gemma4_text": "gemma4",
        "gemma4": "gemma4",
    }
    llama = DraftLayer(make_config(text_config("llama"), "llama"))
    assert not [name for name, _ in llama.named_parameters() if "q_norm" in name or "k_norm" in name]
    with pytest.raises(ConfigError, match="'mamba' is not known, choose auto or one of qwen3, llama, gemma4"):
        block_shape(text_config("llama"), "mamba")


PLAIN = (
    "gpt2",
    "gemma3_text",
    "granite",
    "cohere",
    "phi",
    "opt",
    "gpt_neox",
    "mistral",
    "qwen3_moe",
    "falcon",
    "bloom",
)


@pytest.mark.parametrize("family", PLAIN)
def test_any_causal_language_model_gives_a_shape(family: str) -> None:
    """From the configuration classes' own defaults: whatever they call their sizes, heads come out whole."""
    text = AutoConfig.for_model(family).get_text_config()
    shape = block_shape(text, style_of(family))
    assert shape.style == "qwen3" and shape.num_heads % shape.num_kv_heads == 0
    assert min(shape.head_dim, shape.intermediate_size, shape.rope_theta) > 1 and 0 < shape.rms_eps < 1e-4


def test_scaled_logits_are_read_as_a_factor_or_a_divisor() -> None:
    assert block_shape(text_config("cohere", logit_scale=0.25), "qwen3").logit_scale == 0.25
    assert block_shape(text_config("granite", logits_scaling=8.0), "qwen3").logit_scale == 0.125


def make_target(family: str) -> TransformersTarget:
    torch.manual_seed(0)
    changes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256} if family == "gpt2" else {}
    text = text_config(family, **changes)
    model = AutoModelForCausalLM.from_config(text).double()
    return TransformersTarget(model, TargetInfo("random", None, "f", 300, 32, 6, (2,), 256, family))


@pytest.mark.parametrize(
    ("family", "style"),
    [
        ("gemma4_text", "auto"),
        ("gemma4_text", "qwen3"),
        ("gpt2", "auto"),
        ("llama", "auto"),
        ("llama", "llama"),
    ],
)
def test_greedy_answers_stay_the_targets_own_with_any_block(family: str, style: str) -> None:
    """From a recipe's style and a target of any family to decoding."""
    target = make_target(family)
    recipe = load_recipe(
        "tiny-dspark", [f"drafter.style={style}", "drafter.num_features=2", "drafter.markov_rank=4"]
    )
    config = drafter_config(recipe, target, SimpleNamespace(mask_token_id=3))
    assert isinstance(config, DrafterConfig)
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight()).double().eval()
    prompt = [7, 30, 41]
    decoded = decode(target, drafter, prompt, Sampling(0.0), 12, seed=0)
    tokens = list(prompt)
    for _ in decoded.tokens:
        logits = target.logits(target.forward(torch.tensor([tokens]), None).last_hidden_BTH[0, -1])
        tokens.append(int(logits.argmax()))
    assert list(decoded.tokens) == tokens[len(prompt) :]


# --- recipes

TARGETS = ("qwen3-4b", "qwen3-8b", "qwen3-14b", "gemma4-12b")
PAPER = [f"{target}-{kind}" for target in TARGETS for kind in ("dspark", "dflash", "eagle3")]
RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_packaged_recipe_loads_and_says_only_what_differs_from_the_defaults(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    written = leaves(yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8")))
    written.pop("name")
    defaults = leaves(Recipe(name=name).model_dump())
    assert [field for field, value in written.items() if str(defaults.get(field)) == str(value)] == []


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_have_its_values(name: str) -> None:
    recipe = load_recipe(name)
    drafter, train, kind = recipe.drafter, recipe.train, name.rsplit("-", 1)[1]
    layers = drafter.num_layers or ALGORITHMS[drafter.algorithm].layers
    assert (drafter.algorithm, drafter.block_size, layers) == (kind, 7, 1 if kind == "eagle3" else 5)
    assert (drafter.head, drafter.markov_rank, len(drafter.feature_layers or ())) == ("markov", 256, 5)
    assert (train.anchors, train.lr, train.warmup, train.batch_size, train.epochs) == (
        4096 if kind == "eagle3" else 512,
        6e-4,
        0.04,
        512,
        10,
    )
    assert (train.dtype, recipe.target.dtype, recipe.capture.max_length) == ("bfloat16", "bfloat16", 4096)
    assert recipe.target.template_switches == ({"enable_thinking": False} if name.startswith("qwen3") else {})
    loss = train.loss
    mixes = {
        "dspark": (0.1, 0.9, 0.0, 1.0, 4.0),
        "dflash": (1.0, 0.0, 0.0, 1.0, 4.0),
        "eagle3": (0.0, 0.0, 1.0, 1.0, 4.4814),
    }
    assert (loss.ce, loss.tv, loss.kl, loss.confidence, loss.decay) == mixes[kind]


QWEN3_4B = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def test_the_qwen3_4b_recipe_gives_the_published_drafters_tensors() -> None:
    """Shapes of dspark_qwen3_4b_block7, without memory for any of them."""
    text = AutoConfig.for_model("qwen3", **QWEN3_4B)
    info = TargetInfo("Qwen/Qwen3-4B", None, "f", 151_936, 2560, 36, (151_645,), 40_960, "qwen3")
    target = SimpleNamespace(text_config=text, info=info)
    tokenizer = AddedTokens(151_669)
    config = drafter_config(load_recipe("qwen3-4b-dspark"), target, tokenizer)  # type: ignore[arg-type]
    assert isinstance(config, DrafterConfig)
    assert (config.mask_token_id, config.feature_layers, config.rope_theta) == (
        151_669,
        (1, 9, 17, 25, 33),
        1e6,
    )
    with torch.device("meta"):
        drafter = BlockDrafter(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    assert shapes["fc.weight"] == (2560, 5 * 2560)
    assert shapes["layers.4.self_attn.q_proj.weight"] == (4096, 2560)
    assert shapes["layers.4.self_attn.v_proj.weight"] == (1024, 2560)
    assert shapes["layers.0.mlp.down_proj.weight"] == (2560, 9728)
    assert shapes["markov_head.markov_w1.weight"] == shapes["markov_head.markov_w2.weight"] == (151_936, 256)
    assert shapes["confidence_head.proj.weight"] == (1, 2560 + 256)
    assert len(shapes) == 5 * 11 + 9


class AddedTokens:
    """A tokenizer of so many tokens, none of them a mask."""

    mask_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size
