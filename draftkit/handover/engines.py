"""The table of engines: the version that each row was checked against, what an engine refuses of a drafter,
and what it takes and runs otherwise than draftkit.

Read in the sources of the versions named here; `docs/handover.md` says what was run. A rule is a function of
the drafter's shape and target that says what is wrong, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from draftkit.draft.drafter import DrafterConfig, DrafterShape
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.errors import ConfigError

Rule = Callable[[DrafterShape], str | None]


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        checked: the version whose sources the rules were read in. package: its distribution on PyPI, whose
        installed version can be asked; empty where it has none. refuses: reasons not to load the drafter.
        differs: what costs acceptance or speed there. notes: what holds for every drafter, by algorithm (the
        empty name: for all).
    """

    name: str
    checked: str
    package: str
    refuses: tuple[Rule, ...]
    differs: tuple[Rule, ...] = ()
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def refusals(self, config: DrafterShape) -> list[str]:
        """Why it does not load this drafter; empty when it does."""
        return [reason for rule in self.refuses if (reason := rule(config))]

    def differences(self, config: DrafterShape) -> list[str]:
        """What it runs otherwise."""
        return [reason for rule in self.differs if (reason := rule(config))]

    def all_notes(self, config: DrafterShape) -> list[str]:
        """What else its owner must know."""
        return [*self.notes.get("", ()), *self.notes.get(config.algorithm, ())]


def _block(config: DrafterShape) -> DrafterConfig | None:
    return config if isinstance(config, DrafterConfig) else None


def _markov_alone(config: DrafterShape) -> str | None:
    block = _block(config)
    return (
        f"it has no {block.head} head, only the Markov head"
        if block and block.head in ("gated", "rnn")
        else None
    )


def _llama_block(config: DrafterShape) -> str | None:
    return (
        "no engine knows a block drafter with Llama's block"
        if _block(config) and config.style == "llama"
        else None
    )


def _anchor_dflash(config: DrafterShape) -> str | None:
    block = _block(config)
    if block and block.algorithm == "dflash" and block.layout == "anchor":
        return "it takes DFlash in the 1 + N layout alone, and this one drafts from the anchor on"
    return None


def _one_plus_n_dspark(config: DrafterShape) -> str | None:
    block = _block(config)
    if block and block.algorithm == "dspark" and block.layout == "one_plus_n":
        return "it drafts from the anchor on, and this DSpark has the 1 + N layout"
    return None


def _gemma_block(config: DrafterShape) -> str | None:
    return "it has no drafter with Gemma 4's block" if config.style == "gemma4" else None


def _gemma_cap(config: DrafterShape) -> str | None:
    capped = config.style == "gemma4" and config.soft_cap is not None
    return "it takes no Gemma 4 drafter with a soft cap" if capped else None


def _own_head(config: DrafterShape) -> str | None:
    reduced = _block(config) and config.draft_vocab_size
    return (
        "it takes the target's head, and this drafter has a draft vocabulary of its own" if reduced else None
    )


def _llama_eagle(config: DrafterShape) -> str | None:
    wrong = isinstance(config, EagleConfig) and config.style != "llama"
    return "its EAGLE-3 has no q/k norms; it leaves them out without a word" if wrong else None


def _gemma_eagle(config: DrafterShape) -> str | None:
    wrong = isinstance(config, EagleConfig) and config.style == "gemma4"
    return "it has no EAGLE-3 with Gemma 4's block" if wrong else None


def _three_layers(config: DrafterShape) -> str | None:
    wrong = isinstance(config, EagleConfig) and len(config.feature_layers) != 3
    return f"its EAGLE-3 reads 3 layers, this one {len(config.feature_layers)}" if wrong else None


def _eagle(config: DrafterShape) -> str | None:
    return "it runs no EAGLE-3 drafters" if isinstance(config, EagleConfig) else None


def _before_residual(config: DrafterShape) -> str | None:
    wrong = isinstance(config, EagleConfig) and config.norm_before_residual
    return "its EAGLE-3 takes the residual before the norm alone" if wrong else None


def _eagle_norms(config: DrafterShape) -> str | None:
    normed = isinstance(config, EagleConfig) and (
        config.norm_before_fc or config.fc_norm or config.norm_output
    )
    return "its EAGLE-3 has none of EAGLE-3.1's norms; it leaves them out without a word" if normed else None


def _eagle_output_norms(config: DrafterShape) -> str | None:
    normed = isinstance(config, EagleConfig) and (config.fc_norm or config.norm_output)
    return "of EAGLE-3.1's norms it has norm_before_fc alone" if normed else None


def _confidence_with_markov(config: DrafterShape) -> str | None:
    block = _block(config)
    wrong = block and block.confidence and not block.confidence_with_markov
    return "it reads a confidence head with the Markov embedding alone" if wrong else None


def _scaled_rope(config: DrafterShape) -> str | None:
    return (
        "it turns drafters by plain rotary embeddings alone"
        if getattr(config, "rope_scaling", None)
        else None
    )


def _xpress(config: DrafterShape) -> str | None:
    return "it has no XPress" if config.algorithm == "xpress" else None


def _window(config: DrafterShape) -> str | None:
    block = _block(config)
    if not block or not block.window or block.algorithm == "dspark_v4":  # whose window engines know
        return None
    return f"it shows the drafter its whole context, not the last {block.window} tokens"


def _logit_scale(config: DrafterShape) -> str | None:
    return "it does not scale the drafter's logits" if config.logit_scale != 1.0 else None


_LOAD = (
    "without a planner: the number of drafted tokens is fixed, choose it for the load (draftkit doctor says "
    "which)"
)
ENGINES = {
    "vllm": Engine(
        "vllm",
        "0.33.0",
        "vllm",
        (_markov_alone, _llama_block, _anchor_dflash, _one_plus_n_dspark, _gemma_eagle),
        (_window, _gemma_cap),
        {
            "": (
                "always give the method: vLLM guesses it from the folder's name otherwise",
                "requests with min_p or logit_bias are refused with 400 while drafting",
            ),
            "dspark": (
                "needs a GPU and Model Runner V2 (with Triton); the vLLM of CPUs has no dspark",
                'add "enable_adaptive_verification": true for a planner; without one the number is fixed',
            ),
            "dspark_v4": (
                "FlashMLA needs the fp8 KV cache; Model Runner V2; no CPU",
                "takes any number of drafted tokens; more than the block size lost acceptance in reports",
            ),
            "dflash": (_LOAD,),
            "eagle3": (_LOAD,),
            "xpress": (
                "needs a GPU and Model Runner V2 (with Triton), and the flat form of the authors: that of "
                "speculators is not translated",
            ),
        },
    ),
    "sglang": Engine(
        "sglang",
        "0.5.23",
        "sglang",
        (
            _llama_block,
            _anchor_dflash,
            _one_plus_n_dspark,
            _gemma_block,
            _own_head,
            _llama_eagle,
            _before_residual,
            _eagle_norms,
            _xpress,
        ),
        (_window, _logit_scale),
        {
            "": ("max_running_requests becomes 48 with speculation unless it is given",),
            "dspark": (
                "a GPU; SGLANG_RAGGED_VERIFY_MODE=compact with the files of draftkit profile and "
                "calibrate plans "
                "verification, otherwise all is verified",
            ),
            "dspark_v4": (
                "give no --speculative-draft-model-path, it finds the module; draft tokens: block size + 1",
            ),
            "dflash": (_LOAD,),
            "eagle3": (_LOAD,),
        },
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "0c1e570 (llama-cpp-python 0.3.36)",
        "",
        (
            _markov_alone,
            _llama_block,
            _gemma_cap,
            _confidence_with_markov,
            _scaled_rope,
            _llama_eagle,
            _gemma_eagle,
            _eagle_output_norms,
            _three_layers,
            _xpress,
        ),
        (_window, _logit_scale),
        {
            "": (
                _LOAD,
                "the target must be of the weights that the drafter was trained for, as GGUF in any type",
            ),
        },
    ),
    "mlx": Engine(
        "mlx",
        "mlx-dspark 0.20.3",
        "mlx-dspark",
        (_markov_alone, _llama_block, _anchor_dflash, _eagle, _xpress),
        (_window,),
        {"": ("Apple silicon; the drafted tokens follow a cost curve that it measures",)},
    ),
}


def engine_named(name: str) -> Engine:
    """A row of the table. Raises ConfigError for a name that is not there."""
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is not known, choose one of {', '.join(ENGINES)}")
    return ENGINES[name]
