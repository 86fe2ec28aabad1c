"""What can be set of a run: one frozen dataclass for each section of a recipe, and each default written here,
once.

The stage that does the work takes the same object as the recipe holds. Constructing one checks it. No torch
here: the command line and recipes import this module.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic.dataclasses import dataclass

Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Unknown keys are errors and values keep the type that is written.
CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Section:
    """A part of a recipe. In a recipe it is a mapping, which "strict" alone would refuse."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """The dataclass's own schema; takes a mapping, too."""
        schema: Any = handler(source)
        inner = schema
        while inner["type"] != "dataclass":
            inner = inner["schema"]
        inner["strict"] = False
        return schema


@dataclass(frozen=True, config=CHECKS)
class TargetSettings(Section):
    """The frozen large model."""

    path: Annotated[str, Field(description='folder, GGUF file or hub id; or "tiny", "smollm2"')] = "tiny"
    revision: Annotated[str | None, Field(description="hub revision")] = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    spread: Annotated[
        Literal["none", "layers", "tensors"],
        Field(
            description="a target above one GPU; layers: over the GPUs of this process (Transformers' "
            "device_map); tensors: each layer over torchrun's processes (tp_plan), to capture"
        ),
    ] = "none"
    template_switches: Annotated[
        dict[str, str | int | float | bool],
        Field(
            description="variables of the chat template, the same in every stage, as {enable_thinking: false}"
        ),
    ] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=CHECKS)
class GenerateSettings(Section):
    """How the target answers prompts."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0, description="0 is off")] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 48
    seed: Seed = 0


@dataclass(frozen=True, config=CHECKS)
class CaptureSettings(Section):
    """What is kept of the target's thoughts."""

    max_length: Annotated[
        int, Field(ge=8, description="tokens; longer conversations are learnt in windows of this length")
    ] = 1024
    dtype: Annotated[
        Literal["float32", "bfloat16", "fp8"],
        Field(description="fp8: e4m3 with one scale per token and layer, half of bfloat16's bytes"),
    ] = "bfloat16"
    batch_tokens: Annotated[int, Field(ge=1, description="tokens per forward pass")] = 8192
    cut_answers: Annotated[
        Literal["keep", "drop"],
        Field(
            description="answers that a limit ended; either way none learns an end of turn that was never "
            "written"
        ),
    ] = "keep"


@dataclass(frozen=True, config=CHECKS)
class DrafterSettings(Section):
    """The drafter's shape; sizes that are null are the target's."""

    algorithm: Annotated[
        str, Field(description="a name of draft/algorithms.py: dspark, dflash, eagle3, dspark_v4")
    ] = "dspark"
    num_layers: Annotated[int | None, Field(ge=1, description="null: the algorithm's own, 5; eagle3: 1")] = (
        None
    )
    style: Annotated[
        Literal["auto", "qwen3", "llama", "gemma4"],
        Field(description="decoder block; auto: the one that engines load for this target"),
    ] = "auto"
    layout: Annotated[
        Literal["anchor", "one_plus_n"], Field(description="which block positions draft: all, or the masks")
    ] = "anchor"
    block_size: Annotated[
        int, Field(ge=1, description="block positions: tokens drafted per round, one less in one_plus_n")
    ] = 7
    window: Annotated[
        int | None, Field(ge=1, description="context positions before the anchor that are seen; null: all")
    ] = None
    num_features: Annotated[int, Field(ge=1, description="target layers listened to, evenly spread")] = 5
    feature_layers: Annotated[
        tuple[int, ...] | None,
        Field(min_length=1, strict=False, description="layer OUTPUT indices, instead of num_features"),
    ] = None
    mask_token_id: Annotated[
        int | None,
        Field(
            ge=0,
            description="token of the positions to draft; null: the tokenizer's mask, else an unused "
            "embedding row",
        ),
    ] = None
    head: Literal["markov", "gated", "rnn", "none"] = "markov"
    markov_rank: Annotated[int, Field(ge=1)] = 256
    confidence_with_markov: bool = True
    confidence_stop_gradient: bool = False
    intermediate_size: Annotated[int | None, Field(ge=1)] = None
    start: Annotated[
        Literal["random", "target"], Field(description="target: layers begin as copies of the target's")
    ] = "random"
    start_layers: Annotated[
        tuple[int, ...] | None,
        Field(
            min_length=1, strict=False, description="target layers to begin as; null: spread over all of them"
        ),
    ] = None
    draft_vocab_size: Annotated[
        int | None, Field(ge=2, description="draft only so many tokens, the most frequent ones")
    ] = None

    @model_validator(mode="after")
    def _start_is_one(self) -> DrafterSettings:
        if self.start_layers is not None and self.start == "random":
            raise ValueError("start_layers: needs start: target; give null to begin at random")
        return self


@dataclass(frozen=True, config=CHECKS)
class LossSettings(Section):
    """L = ce CE + tv |q - p|_1 + kl KL(p, q) + lk LK + confidence BCE, position k weighted by exp(-(k - 1) /
    decay)."""

    ce: Annotated[float, Field(ge=0)] = 0.1
    tv: Annotated[float, Field(ge=0)] = 0.9
    kl: Annotated[float, Field(ge=0)] = 0.0
    lk: Annotated[
        float, Field(ge=0, description="KL and TV mixed by the acceptance rate (arXiv 2602.23881)")
    ] = 0.0
    confidence: Annotated[float, Field(ge=0)] = 1.0
    decay: Annotated[float, Field(gt=0, description="positions")] = 4.0
    weighting: Annotated[
        Literal["decay", "dpace"], Field(description="dpace: all but confidence, arXiv 2605.18810")
    ] = "decay"
    average: Annotated[
        Literal["tokens", "conversations"],
        Field(description="conversations: each one's sum over its length, prompt and all, then their mean"),
    ] = "tokens"

    @model_validator(mode="after")
    def _learns_something(self) -> LossSettings:
        if not any((self.ce, self.tv, self.kl, self.lk)):
            raise ValueError("must give one of ce, tv, kl, lk more than 0")
        return self


@dataclass(frozen=True, config=CHECKS)
class GroupSettings(Section):
    """Parameters that learn in another way than the rest; what is null is as there."""

    parameters: Annotated[
        str, Field(min_length=1, description="a pattern of names, as markov_head.* or *norm*")
    ]
    lr: Annotated[float | None, Field(gt=0)] = None
    weight_decay: Annotated[float | None, Field(ge=0)] = None


@dataclass(frozen=True, config=CHECKS)
class TrainSettings(Section):
    """How the drafter is trained."""

    epochs: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int | None, Field(ge=1, description="instead of epochs")] = None
    minutes: Annotated[
        float | None, Field(gt=0, description="end after this time; the learning rate follows")
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="conversations per step, all processes together")] = (
        512
    )
    row_tokens: Annotated[
        int | None, Field(ge=1, description="conversations share rows this long; null: the step's longest")
    ] = None
    micro_batch_size: Annotated[
        int | None, Field(ge=1, description="rows per forward pass and process; null: all")
    ] = None
    anchors: Annotated[int, Field(ge=1, description="blocks per conversation and step")] = 512
    lr: Annotated[float, Field(gt=0)] = 6e-4
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the run")] = 0.04
    cooldown: Annotated[
        float,
        Field(gt=0, le=1, description="share of the run over which lr falls; 1: all after the warm-up"),
    ] = 1.0
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False, description="of AdamW's two running means"),
    ] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    groups: Annotated[
        tuple[GroupSettings, ...],
        Field(strict=False, description="parameters with their own lr or weight_decay; the first that fits"),
    ] = ()
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    max_skipped: Annotated[
        int, Field(ge=0, description="steps in a row that may not be finite before the run ends")
    ] = 20
    dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="of the passes; parameters are float32")
    ] = "float32"
    recompute: Annotated[
        bool,
        Field(description="block drafters keep no activations of a layer, but run it again on the way back"),
    ] = False
    shard: Annotated[
        bool, Field(description="several processes: each holds a part (FSDP2) instead of a whole copy")
    ] = False
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.04
    validate_every: Annotated[
        int, Field(ge=1, description="steps; state and checkpoints are saved then too")
    ] = 200
    decode_prompts: Annotated[
        int, Field(ge=0, description="validation prompts that are really answered each time, in one process")
    ] = 6
    patience: Annotated[
        int | None, Field(ge=1, description="validations without a better one that end the run")
    ] = None
    keep_checkpoints: Annotated[int, Field(ge=0, description="newest numbered checkpoints that stay")] = 2
    track: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...],
        Field(strict=False, description="besides log.jsonl; extra `log`"),
    ] = ()
    seed: Seed = 0
    loss: LossSettings = LossSettings()


@dataclass(frozen=True, config=CHECKS)
class EvaluateSettings(Section):
    """How the pair is measured."""

    temperatures: Annotated[tuple[float, ...], Field(min_length=1, strict=False)] = (0.0, 1.0)
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    prompts_per_domain: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[
        int, Field(ge=1, description="answers made at the same time by the engine; 1 = the reference loop")
    ] = 32
    speed_prompts: Annotated[
        int,
        Field(
            ge=0,
            description="prompts of every domain that the engine answers with and without the drafter, "
            "for the speed",
        ),
    ] = 10
    seed: Seed = 980406
