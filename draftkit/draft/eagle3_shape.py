"""The shape of an EAGLE-3 drafter."""

from __future__ import annotations

from dataclasses import dataclass

from draftkit.draft.drafter import DrafterShape
from draftkit.errors import ConfigError

NORMS = ("norm_before_fc", "fc_norm", "norm_output")  # EAGLE-3.1's


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DrafterShape):
    """The shape of an EAGLE-3 drafter; `block_size` is the horizon of training and the number of drafted
    tokens.

    `draft_vocab_size` null is the target's vocabulary. `norm_before_residual`: the residual is the normed
    state instead of the state. EAGLE-3.1's: `norm_before_fc` norms the features together, `fc_norm` those of
    each layer by themselves, and with `norm_output` the normed state is fed back.
    """

    num_layers: int = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers != 1:
            raise ConfigError(f"drafter.num_layers: {self.num_layers}, but an EAGLE-3 drafter has 1 layer")

    @property
    def algorithm(self) -> str:
        """The field's name for this kind of drafter."""
        return "eagle3"

    @property
    def numbers_per_token(self) -> int:
        """Keys, values, and the projected feature beside them."""
        return super().numbers_per_token + self.hidden_size
