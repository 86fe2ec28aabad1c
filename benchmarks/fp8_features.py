"""What storing features in fp8 costs a drafter: error by layer, acceptance by position, and drafters trained
on both.

    draftkit capture -c learnt.jsonl -o learnt -r smollm2-dspark       # and the same of held-out answers
    python -m benchmarks.fp8_features --features learnt --validation aside -r smollm2-dspark \\
        --drafter draftkit/assets/smollm2 --steps 80 --seeds 3

Both stores hold bfloat16; fp8 is what `capture.dtype=fp8` would have kept of them (e4m3, one scale per token
and layer). Beside it: one scale per token for all layers, as hs-connectors has it, and both with one channel
of the first layer 100 times as large while it is stored, as some targets have channels.

Errors are |x' - x| / |x| over all tokens, without that channel. Acceptance is analytic, 1 - |q - p| / 2,
against the target's own p; a drafter trained on any form is validated on bfloat16. Without `--drafter` the
first one that is trained on bfloat16 reads all forms.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.result_file import print_result
from draftkit import stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.features.record import RecordForm
from draftkit.features.source import FeatureSample, FeatureSource
from draftkit.features.store import FeatureStore
from draftkit.settings import LossSettings
from draftkit.train import trainer
from draftkit.train.batches import BatchMaker, Cut
from draftkit.train.parallel import ALONE, ParallelDrafter

CHANNEL, FACTOR = 7, 100.0
Rounding = Callable[[Tensor], Tensor]


def rounding(hidden: int, layers: int, scales: str, outlier: bool) -> Rounding:
    """Features [T, F] as fp8 gives them back; `scales`: one by "layer", or one by "token"."""
    form = RecordForm("fp8", *((layers, hidden) if scales == "layer" else (1, layers * hidden)))

    def rounded(features_TF: Tensor) -> Tensor:
        values = features_TF.float()
        if outlier:
            values[:, CHANNEL] *= FACTOR
        values = form.rounded(values).float()
        if outlier:
            values[:, CHANNEL] /= FACTOR
        return values.to(features_TF.dtype)

    return rounded


class Rounded:
    """A source whose features are rounded; and its last hidden states, too, where `all_of_it`."""

    def __init__(self, source: FeatureSource, features: Rounding, all_of_it: bool) -> None:
        self._source, self._features, self._all = source, features, all_of_it
        self.name, self.ahead = source.name, False

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource`."""
        return self._source.made_from() | {"rounded": True}

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`."""
        found = []
        for sample in self._source.read(indices, last_hidden):
            hidden_TH = sample.last_hidden_TH
            if self._all:
                hidden_TH = RecordForm("fp8", 1, hidden_TH.shape[1]).rounded(hidden_TH).to(hidden_TH.dtype)
            features_TF = self._features(sample.features_TF)
            found.append(replace(sample, features_TF=features_TF, last_hidden_TH=hidden_TH))
        return found


def errors(store: FeatureStore, forms: dict[str, Rounding], samples: int) -> dict[str, dict[str, float]]:
    """Relative error of each layer, by form."""
    hidden, layers = store.manifest.hidden_size, store.manifest.feature_layers
    kept = torch.arange(hidden) != CHANNEL
    chosen = range(0, len(store), max(1, len(store) // samples))
    whole = torch.cat([store[i].features_TF[: store[i].context] for i in chosen])
    found = {}
    for name, form in forms.items():
        pairs = zip(form(whole).float().split(hidden, 1), whole.float().split(hidden, 1), strict=True)
        apart = [float((a - b)[:, kept].norm() / b[:, kept].norm()) for a, b in pairs]
        found[name] = dict(zip(map(str, layers), apart, strict=True))
    return found


@torch.no_grad()
def acceptance(drafter: Drafter, source: FeatureSource, settings: LossSettings) -> list[float]:
    """Mean acceptance rate by position, given that all before it are the target's."""
    parallel = ParallelDrafter(drafter.eval(), ALONE, False, torch.float32)
    sums, counts = torch.zeros(drafter.gamma), torch.zeros(drafter.gamma)
    for _, batch in BatchMaker(source, range(len(source)), 8, 16, 0, Cut()).validation():
        report = parallel.loss(batch, settings)
        place = report.rows_N % drafter.gamma
        sums.index_add_(0, place, report.accept_N.float())
        counts.index_add_(0, place, torch.ones(len(place)))
    return (sums / counts).tolist()


def trained_on(
    recipe: Recipe, source: Any, aside: FeatureSource, steps: int, seeds: int
) -> tuple[list[float], list[Drafter]]:
    """Drafters trained with several seeds, and their simulated accepted length, macro over domains."""
    files, tokenizer = stages.read_target(recipe)
    found, drafters = [], []
    for seed in range(seeds):
        train = replace(recipe.train, seed=seed, steps=steps, validate_every=steps, decode_prompts=0)
        chosen = recipe.model_copy(update={"train": train})
        drafter = train_stages.new_drafter_for(chosen, files, tokenizer, source)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            done = trainer.train(source, drafter, _no_target, out, train, {}, ALONE, validation=aside)
        found.append(done.accepted_len["macro"])
        drafters.append(drafter)
    return found, drafters


def _no_target() -> Any:
    raise RuntimeError("answers for the log were not asked for")


def main() -> None:
    """Measure all, print one JSON object."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--features", type=Path, required=True, help="a bfloat16 store to learn from")
    parser.add_argument("--validation", type=Path, required=True, help="another one")
    parser.add_argument("-r", "--recipe", default="smollm2-dspark")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--drafter", type=Path, help="the one that reads all forms")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3, help="0: nothing is trained")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.set)
    learnt, aside = FeatureStore(options.features), FeatureStore(options.validation)
    sizes = learnt.manifest.hidden_size, len(learnt.manifest.feature_layers)
    forms = {
        f"fp8, a scale per {'token and layer' if scales == 'layer' else 'token'}{what}": rounding(
            *sizes, scales, outlier
        )
        for scales in ("layer", "token")
        for outlier, what in ((False, ""), (True, ", outlier"))
    }
    values, drafters = trained_on(recipe, learnt, aside, options.steps, options.seeds)
    trained = {"bfloat16": values}
    if options.drafter:
        drafters = [open_drafter(options.drafter, stages.read_target(recipe)[0], torch.float32)]
    if not drafters:
        parser.error("give --drafter, or --seeds of 1 or more")
    drafter = drafters[0]
    loss = recipe.train.loss
    accepted = {"bfloat16": acceptance(drafter, aside, loss)}
    for name, rounded in forms.items():
        accepted[name] = acceptance(drafter, Rounded(aside, rounded, False), loss)
    for name in list(forms)[:2]:  # the store's own form
        source = Rounded(learnt, forms[name], True)
        trained[name], _ = trained_on(recipe, source, aside, options.steps, options.seeds)
    result = {
        "samples": [len(learnt), len(aside)],
        "relative_error_by_layer": errors(learnt, forms, 100),
        "acceptance_by_position_of_one_drafter": accepted,
        "accepted_length_of_trained": {
            name: {"seeds": values, "mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}
            for name, values in trained.items()
            if values
        },
        "train": asdict(recipe.train) | {"steps": options.steps},
    }
    print_result(result, options.out)


if __name__ == "__main__":
    main()
