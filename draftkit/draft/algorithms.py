"""The table of algorithms: what each kind of drafter is called, made of, run by, and written as.

A new one is a file with its shape and its module, and a row here; `tests/test_algorithms.py` adds one that
way. What has no paged form runs in the engine through `propose`, one request after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from draftkit.draft import deepseek_v4_shape as deepseek_v4
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.checkpoint_forms import (
    DEEPSEEK_V4,
    DEEPSPEC_EAGLE,
    DFLASH,
    DSPARK,
    EAGLE,
    FORMS,
    NOT_RUN,
    OTHER_NAMES,
    Form,
)
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.dflash2 import Dflash2Drafter
from draftkit.draft.dflash2_form import DFLASH2
from draftkit.draft.drafter import Drafter, DrafterConfig, DrafterShape
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.draft.families import EAGLE_STYLE
from draftkit.draft.speculators_form import from_speculators, is_speculators
from draftkit.draft.warm_start import start_from_target
from draftkit.draft.xpress import XPRESS, XpressDrafter
from draftkit.errors import CheckpointError, ConfigError
from draftkit.settings import DrafterSettings
from draftkit.target.loading import OTHER_FAMILIES
from draftkit.target.transformers import spread_feature_layers

Sizes = Mapping[str, Any]  # the fields of `DrafterShape`, from target and recipe


@dataclass(frozen=True)
class Algorithm:
    """One kind of drafter.

    Attributes:
        module: what learns and drafts, made from a shape.
        shape: the shape from a recipe's section, the sizes that follow from the target, and the mask token.
        forms: how its folders are written; the first that fits is taken.
        paged: "module:class" of its form over the engine's paged memory; None: the engine calls `propose`.
        start: lets it begin as layers of its target; None: it begins at random.
        masks: it drafts from mask tokens, so its shape needs one.
        style: its block where the recipe says auto; None: the one for the target's family.
        layers: how many it has where the recipe does not say.
        target_sizes: what else of the target's configuration its shape needs, by field.
        taps: the target layers that it reads, from their number and the target's depth.
    """

    module: Callable[[Any], Drafter]
    shape: Callable[[DrafterSettings, Sizes, int], DrafterShape]
    forms: tuple[Form, ...]
    paged: str | None = None
    start: Callable[..., None] | None = None
    masks: bool = False
    style: str | None = None
    layers: int = 5
    target_sizes: Callable[[Any], dict[str, Any]] = lambda text: {}
    taps: Callable[[int, int], tuple[int, ...]] = spread_feature_layers


def _block_shape(section: DrafterSettings, sizes: Sizes, mask_token_id: int) -> DrafterConfig:
    heads = section.algorithm == "dspark"
    markov = heads and section.head != "none"
    return DrafterConfig(
        **sizes,
        mask_token_id=mask_token_id,
        draft_vocab_size=section.draft_vocab_size,
        layout=section.layout,
        window=section.window,
        head=section.head if heads else "none",
        markov_rank=section.markov_rank if markov else 0,
        confidence=heads,
        confidence_with_markov=section.confidence_with_markov and markov,
        confidence_stop_gradient=section.confidence_stop_gradient,
    )


def _eagle_shape(section: DrafterSettings, sizes: Sizes, mask_token_id: int) -> EagleConfig:
    return EagleConfig(**sizes, draft_vocab_size=section.draft_vocab_size)


def _not_trained(section: DrafterSettings, sizes: Sizes, mask_token_id: int) -> NoReturn:
    """Of what others made, and no recipe."""
    raise ConfigError(
        f"drafter.algorithm: {section.algorithm} is read and run, not trained; choose dspark, dflash "
        "or eagle3"
    )


_BLOCK = "draftkit.engine.paged_drafter:PagedBlockDrafter"
ALGORITHMS: dict[str, Algorithm] = {
    "dspark": Algorithm(BlockDrafter, _block_shape, (DSPARK,), _BLOCK, start_from_target, masks=True),
    "dflash": Algorithm(BlockDrafter, _block_shape, (DFLASH, DSPARK), _BLOCK, start_from_target, masks=True),
    "eagle3": Algorithm(
        EagleDrafter,
        _eagle_shape,
        (EAGLE, DEEPSPEC_EAGLE),
        "draftkit.engine.paged_eagle:PagedEagle",
        style=EAGLE_STYLE,
        layers=1,
    ),
    "dflash2": Algorithm(Dflash2Drafter, _not_trained, (DFLASH2,), masks=True),
    "xpress": Algorithm(XpressDrafter, _not_trained, (XPRESS,), masks=True),
    "dspark_v4": Algorithm(
        DeepseekV4Drafter,
        deepseek_v4.shape_of,
        (DEEPSEEK_V4,),
        masks=True,
        style="deepseek_v4",
        layers=deepseek_v4.STAGES,
        target_sizes=deepseek_v4.target_sizes,
        taps=deepseek_v4.last_layers,
    ),
}


def algorithm_named(name: str) -> Algorithm:
    """A row of the table. Raises ConfigError for a name that is not there."""
    if name not in ALGORITHMS:
        raise ConfigError(f"drafter.algorithm: {name!r} is not known, choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def build(config: DrafterShape) -> Drafter:
    """A module of this shape with random weights."""
    return algorithm_named(config.algorithm).module(config)


def read_shape(fields: Fields, num_target_layers: int | None) -> tuple[DrafterShape, Form]:
    """A drafter's shape from any known form, and the form; `num_target_layers` helps where the form does not
    say it.

    Raises CheckpointError that names the architecture or the field that is missing, wrong or not implemented.
    """
    forms = {name: form for row in ALGORITHMS.values() for form in row.forms for name in form.styles}
    if is_speculators(fields):
        fields = from_speculators(fields)
    if (kind := fields.raw.get("model_type")) in OTHER_FAMILIES:
        raise CheckpointError(
            f"{fields.where}: is {OTHER_FAMILIES[kind]}, whose drafter draftkit does not run"
        )
    architecture = OTHER_NAMES.get(fields.architecture, fields.architecture)
    if architecture == "LlamaForCausalLM" and fields.raw.get("draft_vocab_size") is not None:
        architecture = "LlamaForCausalLMEagle3"  # the authors' releases say no more
    if architecture not in forms:
        why = f": {NOT_RUN[architecture]}, which draftkit does not run" if architecture in NOT_RUN else ""
        raise CheckpointError(
            f"{fields.where}: architecture {architecture} is not known{why}; known are {', '.join(forms)}"
        )
    form = forms[architecture]
    quantised = fields.raw.get("quantization_config")
    if quantised and form.from_names is None:  # a form of its own names dequantises what it reads
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{fields.where}: its weights are quantised ({method}), which drafters are not read as; give the "
            "weights that it was made of"
        )
    return form.read(fields, form.sizes(fields, form.styles[architecture], num_target_layers)), form


def form_for(config: DrafterShape, name: str) -> Form:
    """The form of this name (see FORMS) for a drafter. Raises CheckpointError when none can hold it."""
    if name not in FORMS:
        raise CheckpointError(f"form {name!r} is not known; choose one of {', '.join(FORMS)}")
    if config.only_run:
        raise CheckpointError(
            f"the drafter has {config.only_run}: draftkit runs it and writes no such; give its own folder on"
        )
    forms = [form for form in algorithm_named(config.algorithm).forms if name in form.names]
    reasons = [form.refuses(config, name) for form in forms]
    if None in reasons:
        return forms[reasons.index(None)]
    raise CheckpointError(
        str(reasons[-1]) if reasons else f"{config.algorithm} has no form {name!r}; write another"
    )


def tensors_to_form(tensors: dict[str, Tensor], form: Form, config: DrafterShape) -> dict[str, Tensor]:
    """Our tensor names to the form's, without those that it leaves to the target."""
    if form.to_names is not None:
        return form.to_names(tensors, config)
    if not form.with_target_weights:
        tensors = {n: t for n, t in tensors.items() if n not in ("embed_tokens.weight", "lm_head.weight")}
    for theirs, ours in form.renamed.items():
        tensors = {name.replace(ours, theirs, 1): value for name, value in tensors.items()}
    return tensors


def held_by(config: DrafterShape) -> Callable[[str], bool]:
    """Which tensors of a drafter's folder are its own, by name."""
    return algorithm_named(config.algorithm).forms[0].holds


def tensors_from_form(tensors: dict[str, Tensor], config: DrafterShape) -> dict[str, Tensor]:
    """Tensor names of any form of the drafter's algorithm to ours."""
    for form in algorithm_named(config.algorithm).forms:
        if form.from_names is not None:
            return form.from_names(tensors, config)
        for theirs, ours in form.renamed.items():
            tensors = {name.replace(theirs, ours, 1): value for name, value in tensors.items()}
    return tensors
