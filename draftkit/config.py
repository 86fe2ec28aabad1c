"""Recipes: typed YAML descriptions of a run. Every default is written here, once.

`load_recipe` reads a file or a packaged recipe by name, applies `section.key=value` overrides, and reports mistakes as
one line that names the dotted field. No torch here: the command line imports this module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from draftkit.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values keep the type that is written, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TargetSection(Section):
    """The frozen large model."""

    path: str = Field("tiny", description='folder or hub id; "tiny" is the embedded target')
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16"] = "float32"
    template_switches: dict[str, str | int | float | bool] = Field(
        {}, description="variables of the chat template in every stage, e.g. {enable_thinking: false}"
    )


class GenerateSection(Section):
    """How the target answers prompts."""

    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(48, ge=1)
    seed: Seed = 0


class CaptureSection(Section):
    """What is kept of the target's thoughts."""

    max_length: int = Field(1024, ge=8, description="tokens; longer conversations are left out and counted")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    cut_answers: Literal["keep", "drop"] = Field("keep", description="answers that a limit ended; none learns an end of turn")


class DrafterSection(Section):
    """The drafter's shape; sizes that are null are the target's."""

    algorithm: Literal["dspark", "dflash", "eagle3"] = "dspark"
    num_layers: int = Field(5, ge=1, description="eagle3: 1, the default there")
    style: Literal["auto", "qwen3", "llama", "gemma4"] = Field(
        "auto", description="decoder block; auto: the one that engines load for this target"
    )
    layout: Literal["anchor", "one_plus_n"] = Field("anchor", description="which block positions draft: all, or the masks")
    block_size: int = Field(7, ge=1, description="block positions: tokens drafted per round, one less in one_plus_n")
    window: int | None = Field(None, ge=1, description="context positions before the anchor that are seen; null: all")
    num_features: int = Field(5, ge=1, description="target layers listened to, evenly spread")
    feature_layers: list[int] | None = Field(None, min_length=1, description="layer OUTPUT indices, instead of num_features")
    mask_token_id: int | None = Field(
        None, ge=0, description="token of the positions to draft; null: the tokenizer's mask, else an unused embedding row"
    )
    head: Literal["markov", "gated", "rnn", "none"] = "markov"
    markov_rank: int = Field(256, ge=1)
    confidence_with_markov: bool = True
    confidence_stop_gradient: bool = False
    intermediate_size: int | None = Field(None, ge=1)
    start: Literal["random", "target"] = Field("random", description="target: layers begin as copies of the target's")
    start_layers: list[int] | None = Field(
        None, min_length=1, description="target layers to begin as; null: spread over all of them"
    )
    draft_vocab_size: int | None = Field(None, ge=2, description="eagle3: only the most frequent tokens are drafted")

    @model_validator(mode="before")
    @classmethod
    def _one_layer(cls, raw: Any) -> Any:
        return {"num_layers": 1} | raw if isinstance(raw, dict) and raw.get("algorithm") == "eagle3" else raw

    @model_validator(mode="after")
    def _start_is_one(self) -> DrafterSection:
        if self.start_layers is not None and self.start == "random":
            raise ValueError("start_layers: needs start: target; give null to begin at random")
        return self


class LossSection(Section):
    """L = ce CE + tv |q - p|_1 + kl KL(p, q) + lk LK + confidence BCE, position k weighted by exp(-(k - 1) / decay)."""

    ce: float = Field(0.1, ge=0)
    tv: float = Field(0.9, ge=0)
    kl: float = Field(0.0, ge=0)
    lk: float = Field(0.0, ge=0, description="KL and TV mixed by the acceptance rate (arXiv 2602.23881)")
    confidence: float = Field(1.0, ge=0)
    decay: float = Field(4.0, gt=0, description="positions")
    weighting: Literal["decay", "dpace"] = Field("decay", description="dpace: all but confidence, arXiv 2605.18810")

    @model_validator(mode="after")
    def _learns_something(self) -> LossSection:
        if not any((self.ce, self.tv, self.kl, self.lk)):
            raise ValueError("must give one of ce, tv, kl, lk more than 0")
        return self


class TrainSection(Section):
    """How the drafter is trained."""

    epochs: int = Field(10, ge=1)
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    minutes: float | None = Field(None, gt=0, description="end after this time; the learning rate follows")
    batch_size: int = Field(512, ge=1, description="conversations per step, all processes together")
    row_tokens: int | None = Field(None, ge=1, description="conversations share rows this long; null: the step's longest")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per forward pass and process; null: all")
    anchors: int = Field(512, ge=1, description="blocks per conversation and step")
    lr: float = Field(6e-4, gt=0)
    warmup: float = Field(0.04, ge=0, lt=1, description="share of the run")
    cooldown: float = Field(1.0, gt=0, le=1, description="share of the run over which lr falls; 1: all behind the warm-up")
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    max_skipped: int = Field(20, ge=0, description="steps in a row that may not be finite before the run ends")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the passes; parameters are float32")
    shard: bool = Field(False, description="several processes: each holds a part (FSDP2) instead of a whole copy")
    validation_share: float = Field(0.04, gt=0, lt=1)
    validate_every: int = Field(200, ge=1, description="steps; state and checkpoints are saved then too")
    decode_prompts: int = Field(6, ge=0, description="validation prompts that are really answered each time")
    patience: int | None = Field(None, ge=1, description="validations without a better one that end the run")
    keep_checkpoints: int = Field(2, ge=0, description="newest numbered checkpoints that stay")
    track: list[Literal["tensorboard", "wandb"]] = Field([], description="besides log.jsonl; extra `log`")
    seed: Seed = 0
    loss: LossSection = LossSection()


class EvaluateSection(Section):
    """How the pair is measured."""

    temperatures: list[float] = Field([0.0, 1.0], min_length=1)
    max_new_tokens: int = Field(256, ge=1)
    prompts_per_domain: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=1, description="answers made at the same time by the engine; 1 = the reference loop")
    speed_prompts: int = Field(30, ge=0, description="prompts decoded with and without drafter for the speed, in all")
    seed: Seed = 980406


class Recipe(Section):
    """The description of a run, from target to evaluation."""

    name: str
    target: TargetSection = TargetSection()
    generate: GenerateSection = GenerateSection()
    capture: CaptureSection = CaptureSection()
    drafter: DrafterSection = DrafterSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (6e-4 is a float) and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    seen: set[str] = set()
    for key in scalars:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or a packaged recipe by name, with overrides such as "train.lr=3e-4".

    Raises ConfigError: what was given, what is allowed, and the dotted field.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        packaged = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{name_or_path}: no such recipe; give a YAML file or one of: {packaged}")
    raw = _parse(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: is a {type(raw).__name__}, must be a mapping with at least `name:`")
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {_first(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{where}:{line}: is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # what looks like a date or a number, and is none
        raise ConfigError(f"{where}: holds a value that cannot be read ({error}); put text in quotes") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: is nested too deeply for a recipe") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *sections, key = field.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    place[key] = _parse(text.encode(), f"override {override!r}")


def _first(error: ValidationError) -> str:
    """The first mistake in words, with its dotted field and, for an unknown key, the nearest allowed one."""
    mistake = error.errors()[0]
    field = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in mistake["loc"][:-1]:
            section = section.model_fields[part].annotation
        allowed = list(section.model_fields)
        near = difflib.get_close_matches(str(mistake["loc"][-1]), allowed, 1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
        return f"{field}: is not a known key; {hint}"
    if mistake["type"] == "missing":
        return f"{field}: is missing and must be given"
    if mistake["type"] == "model_type":
        return f"{field}: must be a section with keys of its own, got {mistake['input']!r}"
    words = mistake["msg"].removeprefix("Input ").removeprefix("Value error, ")
    words = words.replace("should", "must", 1).replace("a valid ", "a ", 1)
    return f"{field}: {words[0].lower()}{words[1:].replace('a integer', 'an integer')}, got {mistake['input']!r}"
