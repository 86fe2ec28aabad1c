"""Where a training takes its features from, from files: capture into a store, stores that are there, and the
target while the drafter trains."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Iterable, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, cast

from torch import nn

from draftkit.config import Recipe
from draftkit.data.messages import Conversation
from draftkit.data.samples import SampleCounts, unshown_line
from draftkit.draft.loss_terms import needs_target
from draftkit.errors import ConfigError
from draftkit.features.capture import CaptureReport, capture
from draftkit.features.compute import Reader, TargetReader
from draftkit.features.deepspec import TargetCache, is_target_cache
from draftkit.features.join import JoinedFeatures
from draftkit.features.live import FillingFeatures, LiveFeatures
from draftkit.features.manifest import MANIFEST, read_manifest
from draftkit.features.source import FeatureSource
from draftkit.features.speculators import StoredStates, is_data_set
from draftkit.features.split import led
from draftkit.features.store import FeatureStore
from draftkit.features.verify import Verified, verify
from draftkit.features.vllm import VllmReader, Wanted
from draftkit.progress import progress_bar
from draftkit.stages import feature_layers, open_target, prompt_format
from draftkit.target.interface import Target, TargetWeights
from draftkit.target.tokenizer import template_hash, tokenizer_hash
from draftkit.target.transformers import STREAM_MEANS, TransformersTarget, check_taps
from draftkit.target.weights import StoredModule, TargetFiles

TEXTS = "texts"  # beside a drafter whose features are live


def _target_reader(recipe: Recipe, target: Target) -> TargetReader:
    """The target itself as a reader. Raises TargetError when its layers give no hidden states to keep."""
    layers = feature_layers_of(recipe, target)
    if isinstance(target, TransformersTarget):
        check_taps(target, layers)
    return TargetReader(target, layers, recipe.capture.batch_tokens)


def run_capture(
    target: Target,
    tokenizer: Any,
    recipe: Recipe,
    conversations: Iterable[Conversation],
    out: Path,
    append: bool = False,
) -> CaptureReport:
    """Stage 2: the target reads the conversations into a feature store. Several processes may share the work;
    then `conversations` is walked more than once. Where they share the target, the first one writes, and the
    others report nothing."""
    reader = _target_reader(recipe, target)
    if recipe.target.spread != "tensors":
        return capture_by(target, reader, tokenizer, recipe, conversations, out, append)
    with led(reader) as leading:
        if leading is None:
            return CaptureReport(0, 0, 0, SampleCounts())
        return capture_by(target, leading, tokenizer, recipe, conversations, out, append)


def open_features(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, folders: Sequence[str | Path], probe: bool = True
) -> FeatureSource:
    """A feature store, a target cache that DeepSpec wrote, hidden states stored for speculators, or several
    joined: "FOLDER=WEIGHT" takes a part of one, or takes it more often. Stored hidden states do not say of
    which layers they are: with `probe` the target reads some of the same tokens.

    Raises FeatureStoreError when one does not match the recipe, ConfigError for a weight that is none.
    """
    named = [_weighed(str(folder)) for folder in folders]
    sources = [_opened(recipe, target, tokenizer, folder) for folder, _ in named]
    states = [source for source in sources if isinstance(source, StoredStates)]
    if probe and states and os.environ.get("RANK", "0") == "0":  # one of torchrun's processes is enough
        model = target if isinstance(target, TransformersTarget) else open_target(recipe)[0]
        for one in states:
            one.probe(model)
    if len(sources) == 1 and named[0][1] == 1:
        return sources[0]
    return JoinedFeatures(sources, [weight for _, weight in named])


def _opened(recipe: Recipe, target: TargetWeights, tokenizer: Any, folder: Path) -> FeatureSource:
    layers = feature_layers(recipe, target)
    if is_target_cache(folder):
        return TargetCache(folder, target.info, layers)
    if is_data_set(folder):
        return _stored_states(recipe, target, folder)
    store = FeatureStore(folder)
    switches = recipe.target.template_switches
    made = (target.info.fingerprint, layers, template_hash(tokenizer), tokenizer_hash(tokenizer), switches)
    store.check_matches(*made)
    return store


def _stored_states(recipe: Recipe, target: TargetWeights, folder: Path) -> StoredStates:
    if target.info.family in STREAM_MEANS:
        told = f"no last hidden state of {target.info.family} can be made of what vLLM stores"
        raise ConfigError(f"--features {folder}: {told}; capture a store")
    norm = target.final_norm()
    module = (
        norm.loaded()
        if isinstance(norm, StoredModule)
        else copy.deepcopy(cast(nn.Module, norm)).cpu().float()
    )
    return StoredStates(folder, Wanted(target.info, feature_layers_of(recipe, target), module))


def live_features(
    target: Target,
    tokenizer: Any,
    recipe: Recipe,
    conversations: Iterable[Conversation],
    out: Path,
    keep: Path | None = None,
) -> FeatureSource:
    """The target's features while a drafter trains into `out`, where the texts are kept; with `keep` the
    features, too, in a store that fills in the first epoch."""
    reader = _target_reader(recipe, target)
    return live_features_by(target, reader, False, tokenizer, recipe, conversations, out, keep)


def live_features_by(
    target: Target | TargetWeights,
    reader: Reader,
    ahead: bool,
    tokenizer: Any,
    recipe: Recipe,
    conversations: Iterable[Conversation],
    out: Path,
    keep: Path | None = None,
) -> FeatureSource:
    """`live_features` by any reader; `ahead`: it may read while the device trains."""
    capture_by(target, None, tokenizer, recipe, conversations, out / TEXTS)
    texts = FeatureStore(out / TEXTS)
    if keep is not None:
        return FillingFeatures(texts, reader, recipe.capture.dtype, keep)
    return LiveFeatures(texts, reader, recipe.capture.dtype, ahead)


def server_reader(
    recipe: Recipe, files: TargetFiles, url: str, probe: bool, last_hidden: bool = True
) -> VllmReader:
    """A vLLM server that reads for the recipe's target, whose files are here; with `probe` the target is
    loaded once and compared with it. `last_hidden`: last hidden states are needed whatever the losses are.
    Raises ConfigError where they are, and the family has several residual streams."""
    streams, loss = files.info.family in STREAM_MEANS, recipe.train.loss
    if streams and (last_hidden or needs_target(loss) or loss.confidence):
        raise ConfigError(
            f"--from vllm: of {files.info.family} vLLM gives a drafter's features and no last hidden states: "
            "train on the answers' tokens alone (--set train.loss.tv=0 --set train.loss.confidence=0), with "
            "--validation STORE and without --features; or leave --from out, so that draftkit reads"
        )
    norm = None if streams else files.final_norm().loaded()
    wanted = Wanted(files.info, feature_layers_of(recipe, files), norm)
    reader = VllmReader(url, wanted)
    if probe:
        reader.probe(open_target(recipe)[0])
    return reader


def run_verify(folder: Path, repair: bool) -> Verified:
    """Read a whole store, and with `repair` leave out what is damaged."""
    with progress_bar("verify", None) as bar:
        return verify(folder, repair, lambda done, total: bar.update(completed=done, total=total))


def feature_layers_of(recipe: Recipe, target: Any) -> tuple[int, ...]:
    """The target layers that the drafter listens to, ascending."""
    return tuple(sorted(feature_layers(recipe, target)))


def capture_by(
    target: Target | TargetWeights,
    reader: Reader | None,
    tokenizer: Any,
    recipe: Recipe,
    conversations: Iterable[Conversation],
    out: Path,
    append: bool = False,
) -> CaptureReport:
    """`run_capture` by any reader; without one the texts alone. How many conversations there are is shown
    where their length or `__length_hint__` says it."""
    begun = read_manifest(out).today if (out / MANIFEST).exists() else None
    shown = prompt_format(recipe, tokenizer, begun)
    layers = feature_layers_of(recipe, target)
    read, started = 0, time.perf_counter()
    total = length_hint(conversations) or None
    with progress_bar("capture" if reader else "render", total) as bar:

        def tick(conversations: int, tokens: int) -> None:
            nonlocal read
            read += tokens
            rate = read / (time.perf_counter() - started)
            note = f"{read:,} tokens, {rate:,.0f} tokens/s" if read else None
            bar.update(advance=conversations, note=note)

        settings = recipe.capture
        report = capture(target.info, reader, shown, conversations, out, layers, settings, tick, append)
    first = os.environ.get("RANK", "0") == "0"  # under torchrun one process speaks
    if first and (line := unshown_line(report.counts.unshown)):
        print(line, file=sys.stderr)
    return report


def _weighed(text: str) -> tuple[Path, float]:
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 < weight < 1e6:
        raise ConfigError(f"--features {text}: {number!r} is no weight; give FOLDER or FOLDER=0.5")
    return Path(folder), weight
