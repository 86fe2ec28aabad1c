"""What training a drafter takes: its parameters, operations and memory, from its shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from draftkit.config import Recipe
from draftkit.draft.algorithms import Algorithm, algorithm_named
from draftkit.draft.deepseek_v4_checkpoint import place_of, tensor_specs
from draftkit.draft.deepseek_v4_shape import shape_of
from draftkit.draft.families import BlockShape, block_shape, style_of
from draftkit.draft.losses import CHUNK_LOGITS
from draftkit.errors import TargetError
from draftkit.features.estimate import TokenCounts
from draftkit.plan.target import TargetSizes
from draftkit.target.deepseek_v4_tensors import total_weights


@dataclass(frozen=True)
class DrafterSizes:
    """Numbers of parameters of a drafter, and of what its passes hold.

    Attributes:
        layer: parameters of a decoder layer, without a mixture's experts.
        experts: of a layer.
        active: parameters of a layer that take part in a drafted token's pass.
        trained: all that learn.
        frozen: embedding and head.
        stored: of those, what a saved drafter holds.
        layers, hidden, vocab: its depth and widths.
        context: numbers that a layer makes of a context token, by as many products with the hidden size.
        kept: numbers that a layer keeps of a drafted token for the way back.
    """

    layer: int
    experts: int
    active: int
    trained: int
    frozen: int
    stored: int
    layers: int
    hidden: int
    vocab: int
    context: int
    kept: int

    @classmethod
    def of(cls, recipe: Recipe, sizes: TargetSizes, features: int) -> DrafterSizes:
        """Of the recipe's drafter for a target. Raises TargetError when its numbers do not say it."""
        section, algorithm = recipe.drafter, algorithm_named(recipe.drafter.algorithm)
        try:
            automatic = algorithm.style or style_of(sizes.info.family)
            block = block_shape(sizes.text_config, automatic if section.style == "auto" else section.style)
            if section.algorithm == "dspark_v4":
                return _of_v4(recipe, sizes, features, block, algorithm)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise TargetError(f"{sizes.info.name}: its drafter's shape is not known ({error})") from error
        hidden, vocab = sizes.info.hidden_size, sizes.info.vocab_size
        key_values = 2 * block.num_kv_heads * block.head_dim
        inner = section.intermediate_size or block.intermediate_size
        layer = 2 * hidden * block.num_heads * block.head_dim + hidden * key_values + 3 * hidden * inner
        layers = section.num_layers or algorithm.layers
        rank = 2 * vocab * section.markov_rank if section.head != "none" and algorithm.masks else 0
        trained, frozen = layers * layer + features * hidden * hidden + rank, 2 * vocab * hidden
        return cls(layer, 0, layer, trained, frozen, frozen, layers, hidden, vocab, key_values, 16 * hidden)

    def operations(self, recipe: Recipe, counts: TokenCounts, features: int) -> float:
        """Floating-point operations of one epoch, forward and backward."""
        blocks = min(recipe.train.anchors * counts.samples, counts.targets)
        drafted = blocks * recipe.drafter.block_size
        context = counts.context * (features * self.hidden**2 + self.layers * self.hidden * self.context)
        heads = 4 * self.vocab * self.hidden  # draft logits forward, two gradients; the target's forward
        return 6 * (drafted * self.layers * self.active + context) + 2 * drafted * heads

    def train_bytes(self, recipe: Recipe, counts: TokenCounts, features: int, processes: int = 1) -> int:
        """Device memory of a training step, of each of so many processes."""
        train = recipe.train
        number = 2 if train.dtype == "bfloat16" else 4
        mean = counts.context / max(1, counts.samples)
        tokens = max(train.row_tokens or 0, mean) * (
            train.micro_batch_size or max(1, train.batch_size // processes)
        )
        batch = tokens * (features + 1) * self.hidden * (4 if recipe.capture.dtype == "float32" else 2)
        per_row = min(train.anchors, counts.targets / max(1, counts.samples)) * recipe.drafter.block_size
        drafted = per_row * max(1, tokens / max(1, mean))
        kept = (drafted * self.layers * self.kept + tokens * 4 * self.hidden) * number
        weights = self.weight_bytes(number, processes, train.shard)
        return round(weights + batch + kept + 4 * CHUNK_LOGITS * 4)

    def weight_bytes(self, number: int, processes: int, shard: bool) -> int:
        """Parameters, gradients and two moments in float32, and what the passes see of them in `number`
        bytes: the parts outside the stack, two layers at a time, and a layer's gradient on its way. Experts
        that several processes share out stay where they lie (`draft/split_experts.py`)."""
        parts = processes if shard else 1
        state = (16 * self.trained + 4 * self.frozen) // parts
        if processes == 1 and number == 4:  # no FSDP2
            return state
        apart = self.experts if parts > 1 else 0
        layer = self.layer + self.experts - apart
        outside = self.trained + self.frozen - self.layers * (self.layer + self.experts)
        passes = number * (outside + 2 * layer) + (number + 4) * layer
        copies = number * self.layers * apart if number == 2 else 0
        return state + passes + (copies + (number + 4) * apart) // parts

    def disk_bytes(self, recipe: Recipe) -> int:
        """The state, and bfloat16 drafters: the best, the last and the numbered ones."""
        saved = 2 * (self.trained + self.stored)
        return 12 * self.trained + (2 + recipe.train.keep_checkpoints) * saved


def _of_v4(
    recipe: Recipe, sizes: TargetSizes, features: int, block: BlockShape, algorithm: Algorithm
) -> DrafterSizes:
    """A DSpark module of DeepSeek-V4, counted tensor by tensor."""
    section, info = recipe.drafter, sizes.info
    numbers = asdict(block) | {
        "hidden_size": info.hidden_size,
        "num_layers": section.num_layers or algorithm.layers,
        "vocab_size": info.vocab_size,
        "feature_layers": section.feature_layers or algorithm.taps(features, info.num_layers),
        "num_target_layers": info.num_layers,
        "block_size": section.block_size,
        "max_length": info.max_length,
        **algorithm.target_sizes(sizes.text_config),
    }
    shape = shape_of(section, numbers, section.mask_token_id or 0)
    specs = tensor_specs(shape)
    stage = {n: s for n, s in specs.items() if place_of(n).name.startswith("stages.0.")}
    experts = total_weights({n: s for n, s in stage.items() if ".experts." in n})
    layer = total_weights(stage) - experts
    inner, width, hidden = shape.intermediate_size, shape.num_heads * shape.head_dim, shape.hidden_size
    chosen = shape.experts_per_token
    # streams before and after both halves, queries as they are, rotated and mixed, experts' inner states
    kept = 8 * shape.streams * hidden + 3 * width + chosen * (3 * inner + 2 * hidden)
    return DrafterSizes(
        layer,
        experts,
        layer + experts * chosen // shape.num_experts,
        total_weights(specs),
        2 * shape.vocab_size * hidden,
        0,
        shape.num_layers,
        hidden,
        shape.vocab_size,
        shape.head_dim,
        kept,
    )
