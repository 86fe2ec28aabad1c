"""Targets through their interface: features of the right layers, caches that crop, refused folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from draftkit.errors import TargetError
from draftkit.target import fingerprint as fingerprint_module
from draftkit.target.check import check_target
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget, spread_feature_layers
from support.targets import FAMILIES, make_family, make_target_folder

COMMIT = "0123abcd" * 5
TOKENS = torch.tensor([[5, 30, 7, 61, 12, 9, 44, 3]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_logits_and_features_also_in_pieces(family: str) -> None:
    target = make_family(family)
    target.pads_left = check_target(target)
    assert target.pads_left == (family != "gemma2")  # whose padded rows are no numbers
    whole = target.forward(TOKENS, None, (0, 2))
    with torch.no_grad():
        states = target.model(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(target.logits(whole.last_hidden_BTH), states.logits)
    torch.testing.assert_close(
        whole.features_BTF, torch.cat([states.hidden_states[1], states.hidden_states[3]], -1)
    )
    cache = target.new_cache()
    target.forward(TOKENS[:, :3], cache)
    target.forward(torch.tensor([[61, 12, 99, 98]]), cache)  # two tokens are read in vain
    cache.crop(5)
    assert cache.length == 5
    rest = target.forward(TOKENS[:, 5:], cache, (0, 2))
    assert cache.length == 8
    for got, wanted in (
        (rest.last_hidden_BTH, whole.last_hidden_BTH),
        (rest.features_BTF, whole.features_BTF),
    ):
        torch.testing.assert_close(got, wanted[:, 5:], atol=1e-5, rtol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_features_are_the_outputs_of_the_named_layers(family: str, tmp_path: Path) -> None:
    target = load_target(str(make_target_folder(tmp_path, family)))
    output = target.forward(TOKENS, None, (0, 2))
    states = target.model(TOKENS, output_hidden_states=True)
    wanted = torch.cat([states.hidden_states[1], states.hidden_states[3]], -1)
    torch.testing.assert_close(output.features_BTF, wanted)
    torch.testing.assert_close(target.logits(output.last_hidden_BTH), states.logits)
    torch.testing.assert_close(target.forward(TOKENS, None, (2, 0)).features_BTF, wanted)
    assert target.forward(TOKENS, None).features_BTF is None
    assert target.info.family == family
    torch.testing.assert_close(target.embed(TOKENS), states.hidden_states[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str, target: TransformersTarget) -> None:
    """A row of 8 and a row of 5 tokens: read together, then one more token each, as each would be read
    alone."""
    short, more = TOKENS[:, :5], torch.tensor([[17], [23]])
    padding, real, pad = (
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 5, dtype=torch.int64),
        torch.zeros(1, 3),
    )
    left = side == "left"
    rows = torch.cat([TOKENS, torch.cat([padding, short] if left else [short, padding], 1)])
    mask = torch.cat([torch.ones(1, 8), torch.cat([pad, real] if left else [real, pad], 1)]).long()
    cache = target.new_cache()
    first = target.forward(rows, cache, (1,), mask)
    second = target.forward(more, cache, (1,), torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1))
    for row, alone_tokens in enumerate((TOKENS, short)):
        alone = target.forward(torch.cat([alone_tokens, more[row : row + 1]], 1), None, (1,))
        place = mask[row].bool()
        torch.testing.assert_close(first.last_hidden_BTH[row, place], alone.last_hidden_BTH[0, :-1])
        torch.testing.assert_close(second.last_hidden_BTH[row, 0], alone.last_hidden_BTH[0, -1])
        torch.testing.assert_close(second.features_BTF[row, 0], alone.features_BTF[0, -1])  # type: ignore[index]


def test_rows_of_a_cache_can_be_chosen(target: TransformersTarget) -> None:
    cache = target.new_cache()
    rows = torch.cat([TOKENS, TOKENS.flip(1), TOKENS + 1])
    target.forward(rows, cache)
    cache.select(torch.tensor([2, 0]))
    got = target.forward(torch.tensor([[9], [9]]), cache).last_hidden_BTH[:, 0]
    alone = [
        target.forward(torch.cat([rows[r], torch.tensor([9])])[None], None).last_hidden_BTH[0, -1]
        for r in (2, 0)
    ]
    torch.testing.assert_close(got, torch.stack(alone))


def test_crops_that_cannot_be_are_refused(target: TransformersTarget) -> None:
    cache = target.new_cache()
    target.forward(TOKENS, cache)
    for length in (9, -1):
        with pytest.raises(TargetError, match="the cache holds 8"):
            cache.crop(length)
    recurrent = make_family("qwen3_next")
    again = recurrent.new_cache()
    recurrent.forward(TOKENS[:, :4], again)
    recurrent.forward(TOKENS[:, 4:], again)
    with pytest.raises(TargetError, match=r"can go back to 4\.\.8 only"):
        again.crop(3)


def test_a_family_that_changes_its_logits_in_an_unknown_way_is_refused(target_folder: Path) -> None:
    target = load_target(str(target_folder))
    target._factor = 1.5
    with pytest.raises(TargetError, match="logits differ from the model's own"):
        check_target(target)
    target._factor = None
    check_target(target)
    with pytest.raises(TargetError, match="does not run through"):
        check_target(make_family_without_cache(target))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float, tmp_path: Path) -> None:
    weights = make_target_folder(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    tensors[name].view(-1)[0] = value
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        TargetError, match="its logits are no finite numbers in float32; copy its weights again"
    ):
        load_target(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos', r"generation_config\.json: is damaged \(Unterminated string"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x', must be a token id or a list of them"),
        ('{"eos_token_id": [2, "x"]}', r"eos_token_id is \[2, 'x'\], must be a token id"),
    ],
)
def test_a_damaged_generation_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    (make_target_folder(tmp_path) / "generation_config.json").write_text(text)
    with pytest.raises(TargetError, match=message) as error:
        load_target(str(tmp_path))
    assert "\n" not in str(error.value)


def make_family_without_cache(target: TransformersTarget) -> TransformersTarget:
    """The same model, whose forward refuses a cache."""
    inner = target._base.forward

    def forward(*, past_key_values: Any = None, **rest: Any) -> Any:
        if past_key_values is not None:
            raise TypeError("unexpected keyword past_key_values")
        return inner(**rest)

    target._base.forward = forward
    return target


def test_bad_folders_and_settings_are_named(target_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="dtype 'int4'"):
        load_target(str(target_folder), dtype="int4")
    with pytest.raises(TargetError, match=r"no config\.json"):
        load_target(str(tmp_path))
    with pytest.raises(TargetError, match="no such folder"):
        load_target(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text((target_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(TargetError, match=r"has no \*\.safetensors"):
        load_target(str(tmp_path))
    with pytest.raises(TargetError, match="no such folder, and") as error:
        load_target("nobody/nothing-here")
    assert "\n" not in str(error.value)
    target = load_target(str(target_folder))
    for layers in ((3,), (-1, 0), (1, 1)):
        with pytest.raises(TargetError, match="between 0 and 2"):
            target.forward(TOKENS, None, layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_named(target_folder: Path) -> None:
    with pytest.raises(TargetError, match="cannot use device 'cuda'"):
        load_target(str(target_folder), device="cuda")


def copy_folder(source: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_weights_that_are_cut_off_missing_or_of_other_shapes_are_named(
    target_folder: Path, tmp_path: Path
) -> None:
    cut = copy_folder(target_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(TargetError, match="cannot load a target"):
        load_target(str(cut))
    missing = copy_folder(target_folder, tmp_path / "missing")
    weights = load_file(missing / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, missing / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TargetError, match=r"1 weights are missing, model\.layers\.1\.mlp\.up_proj\.weight first"
    ):
        load_target(str(missing))
    other = copy_folder(target_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(TargetError, match="cannot load a target"):
        load_target(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(TargetError, match="cannot load a target"):
        load_target(str(other))


def test_code_in_a_folder_is_never_run(target_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(target_folder, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(TargetError, match="cannot load a target"):
        load_target(str(folder))
    assert not (tmp_path / "ran").exists()


def test_bad_tokenizers_are_named(target_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(target_folder, tmp_path / "t")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(TargetError, match="chat template is needed"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TargetError, match="cannot load a tokenizer") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TargetError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(folder))


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_local_cache_without_network(target_folder: Path, tmp_path: Path) -> None:
    """The same files as a folder and as a cached snapshot have the same fingerprint."""
    repository = tmp_path / "models--someone--small"
    copy_folder(target_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = (
        "from draftkit.target.loading import load_target\n"
        "from draftkit.target.tokenizer import load_tokenizer\n"
        "load_tokenizer('someone/small')\n"
        "info = load_target('someone/small').info\n"
        "print(info.name, info.revision, info.fingerprint)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone/small", COMMIT, load_target(str(target_folder)).info.fingerprint]


def test_the_fingerprint_follows_the_weights(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_target(str(target_folder)).info.fingerprint
    assert load_target(str(target_folder)).info.fingerprint == first
    assert load_target(str(make_target_folder(tmp_path / "a", seed=1))).info.fingerprint != first
    monkeypatch.setattr(fingerprint_module, "WHOLE_FILE_BYTES", 50_000)  # now the weights are sampled
    sampled = fingerprint_module.fingerprint(target_folder)
    tuned = copy_folder(target_folder, tmp_path / "tuned")
    weights = {
        name: w * 1.01 if "proj" in name else w for name, w in load_file(tuned / "model.safetensors").items()
    }
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_module.fingerprint(tuned) != sampled != first


def test_stop_tokens_come_from_the_generation_settings(target_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(target_folder, tmp_path / "t")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load_target(str(folder)).info.stop_token_ids == (2, 0)
    (folder / "generation_config.json").unlink()
    assert load_target(str(folder)).info.stop_token_ids == (2,)


def test_feature_layers_spread_evenly() -> None:
    assert spread_feature_layers(5, 14) == (1, 4, 6, 9, 12)
    assert spread_feature_layers(1, 14) == (12,)
    with pytest.raises(TargetError, match="choose 1 to 2"):
        spread_feature_layers(5, 4)


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_seam_adds_one_operation_to_a_pass(target: TransformersTarget) -> None:
    """A decoding round with two feature layers does what the bare module does, joins what was tapped, and
    takes the new tokens of it, which are views; `to` finds them in place."""
    cache = target.new_cache()
    target.forward(TOKENS, cache)
    counted = []
    for layers in ((), (0, 2)):
        target._hook(layers)
        with torch.inference_mode(), Operations() as operations:
            if layers:
                target.forward(TOKENS, cache, layers)
            else:
                target._base(input_ids=TOKENS, past_key_values=cache.inner, use_cache=True)
        cache.crop(TOKENS.shape[1])
        counted.append(operations.seen)
    bare, seam = counted
    assert bare["cat"] > 0 and not bare - seam
    assert {name: count for name, count in (seam - bare).items() if name not in ("slice", "to")} == {"cat": 1}
