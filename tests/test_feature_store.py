"""The feature store: what is written is what is read, damage is named, and no kill costs a record."""

from __future__ import annotations

import json
import random
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftkit.artefact import sealed
from draftkit.data.conversations import read_conversations
from draftkit.data.generate import generate_file
from draftkit.data.messages import Conversation, Message
from draftkit.data.records import made_with
from draftkit.engine.answers import EngineAnswers
from draftkit.errors import FeatureStoreError
from draftkit.features import texts as texts_module
from draftkit.features import writer as writer_module
from draftkit.features.manifest import read_manifest
from draftkit.features.record import RecordForm, quantise, windows
from draftkit.features.store import FeatureStore
from draftkit.features.verify import verify
from draftkit.features.writer import StoreWriter
from draftkit.settings import CaptureSettings, GenerateSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from draftkit.target.transformers import TransformersTarget
from support.records import prompts, records
from support.stores import capture_by, made_manifest, made_store, made_text

SETTINGS = GenerateSettings(max_new_tokens=12, batch_size=4, seed=5)
CAPTURE = CaptureSettings(dtype="float32", batch_tokens=64)


@pytest.fixture(scope="module")
def shown(target_folder: Path) -> TemplateFormat:
    return TemplateFormat(load_tokenizer(str(target_folder)))


@pytest.fixture(scope="module")
def answers(
    target: TransformersTarget, shown: TemplateFormat, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    about = made_with(shown, target.info.fingerprint, target.info.stop_token_ids, SETTINGS)
    generate_file(EngineAnswers(target, 4), shown, lambda first: prompts()[first:], out, SETTINGS, about)
    return out


def make_store(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    out: Path,
    layers: tuple[int, ...] = (0, 2),
    settings: CaptureSettings = CAPTURE,
) -> FeatureStore:
    capture_by(target, shown, read_conversations([answers]), out, layers, settings)
    return FeatureStore(out)


def test_a_store_holds_what_the_target_thinks(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    store = make_store(target, shown, answers, tmp_path)
    assert len(store) == len(records(answers))
    for sample in store:  # type: ignore[attr-defined]
        alone = target.forward(sample.tokens_T[None], None, (0, 2))
        features_TF, hidden_TH = alone.features_BTF[0].float(), alone.last_hidden_BTH[0].float()  # type: ignore[index]
        anchors = (sample.loss_mask_T[:-1] & sample.loss_mask_T[1:]).nonzero()
        assert sample.context == int(anchors.max())
        known, counts = slice(0, sample.context), sample.loss_mask_T[1:]
        torch.testing.assert_close(sample.features_TF[known], features_TF[known], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            sample.last_hidden_TH[:-1][counts], hidden_TH[:-1][counts], atol=1e-4, rtol=1e-4
        )
        assert not sample.last_hidden_TH[:-1][~counts].any(), "nothing else takes room"
        [turn] = records(answers)[sample.id]["answers"]
        assert sample.tokens_T.tolist() == turn["prompt_ids"] + turn["answer_ids"], (
            "nothing was tokenised again"
        )
        assert sample.loss_mask_T.tolist() == [False] * len(turn["prompt_ids"]) + [True] * len(
            turn["answer_ids"]
        )


def test_what_a_template_rewrites_is_left_out_and_counted(
    target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content == 'bad' else m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    told = [
        Conversation(a, "chat", (Message("user", "add"), Message("assistant", a))) for a in ("bad", "step")
    ]
    report = capture_by(target, TemplateFormat(tokenizer), told, tmp_path / "features", (0, 2), CAPTURE)
    assert (report.samples, report.counts.rewritten) == (1, 1)
    assert FeatureStore(tmp_path / "features")[0].id == "step"
    with pytest.raises(
        FeatureStoreError, match=r"none of 1 conversations .* 1 rewritten by the chat template"
    ):
        capture_by(target, TemplateFormat(tokenizer), told[:1], tmp_path / "none", (0, 2), CAPTURE)
    asked = [Conversation("a", "chat", (Message("user", "add"),))]
    with pytest.raises(FeatureStoreError, match="answer them with `draftkit generate` first"):
        capture_by(target, TemplateFormat(tokenizer), asked, tmp_path / "asked", (0, 2), CAPTURE)


class Stop(Exception):
    pass


def test_capture_goes_on_in_the_middle_of_a_part(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make_store(target, shown, answers, tmp_path / "whole")
    add, calls = StoreWriter.add, []

    def stop_after_two(writer: StoreWriter, batch: list[object]) -> None:
        if len(calls) == 2:
            add(writer, batch[:1])  # type: ignore[arg-type]
            raise Stop
        calls.append(len(batch))
        add(writer, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "add", stop_after_two)
        with pytest.raises(Stop):
            make_store(target, shown, answers, tmp_path / "parts")
    told = rf"holds {sum(calls) + 1} samples of a capture that was not finished; run the same"
    with pytest.raises(FeatureStoreError, match=told):
        FeatureStore(tmp_path / "parts")
    index = tmp_path / "parts" / "index-000.jsonl"
    before = index.read_bytes()
    index.write_bytes(before + b'{"record":{"key":[0,0')  # what a kill tears off
    parts = make_store(target, shown, answers, tmp_path / "parts")
    assert index.read_bytes().startswith(before), "the index is appended to"
    assert parts.digest() == whole.digest(), "the same records, bit for bit"
    assert len(parts) == len(whole)


def test_other_conversations_are_refused_or_appended(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts_module, "PART", 3)
    read = read_conversations([answers])
    capture_by(target, shown, read[:5], tmp_path, (0, 2), CAPTURE)
    with pytest.raises(FeatureStoreError, match=r"holds a store of other conversations; .* --append"):
        capture_by(target, shown, read[5:], tmp_path, (0, 2), CAPTURE)
    with pytest.raises(FeatureStoreError, match="other conversations"):
        capture_by(target, shown, read, tmp_path, (0, 2), CAPTURE)  # begins alike and has more
    first = FeatureStore(tmp_path).digest()
    for _ in range(2):  # the second time there is nothing to do
        report = capture_by(target, shown, read[5:], tmp_path, (0, 2), CAPTURE, append=True)
        assert report.samples == len(read) - 5
        grown = FeatureStore(tmp_path)
        assert len(grown) == len(read)
    assert grown.digest() != first
    assert {grown[i].id for i in range(len(grown))} == {c.id for c in read}
    assert len(set(grown.conversations().tolist())) == len(read)


def test_long_conversations_are_learnt_in_windows(
    target: TransformersTarget, shown: TemplateFormat, tmp_path: Path
) -> None:
    words = "list value holds step return what add number".split()
    rng = random.Random(0)
    talk = [Message("user", "add"), Message("assistant", " ".join(rng.choices(words, k=70)))]
    said = [Conversation("long", "chat", tuple(talk))]
    capture_by(target, shown, said, tmp_path / "whole", (0, 2), CAPTURE)
    capture_by(target, shown, said, tmp_path / "cut", (0, 2), replace(CAPTURE, max_length=40))
    [whole], cut = FeatureStore(tmp_path / "whole"), FeatureStore(tmp_path / "cut")  # type: ignore[misc]
    assert len(cut) > 2 and max(cut.lengths()) == 40
    learnt = torch.zeros(len(whole.tokens_T), dtype=torch.int64)
    for i in range(len(cut)):
        sample, start = cut[i], cut.record(i).start
        place = slice(start, start + len(sample.tokens_T))
        assert torch.equal(sample.tokens_T, whole.tokens_T[place])
        context = slice(0, sample.context)
        torch.testing.assert_close(
            sample.features_TF[context], whole.features_TF[place][context], atol=1e-4, rtol=1e-4
        )
        pairs = sample.loss_mask_T[:-1] & sample.loss_mask_T[1:]  # an anchor and what follows it
        learnt[place][1:] += pairs.long()
    wanted = whole.loss_mask_T.clone()
    wanted[1:] &= whole.loss_mask_T[:-1]
    assert torch.equal(learnt, wanted.long()), "each token follows an anchor in one window"


def test_windows_begin_at_answers() -> None:
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[700:705] = mask[950:] = True
    assert windows(mask, 100) == [(675, 775, 700), (900, 1000, 950)]
    assert windows(mask[:60], 100) == [(0, 60, 0)]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("fp8", 2**-4)])
def test_half_and_fp8_come_back_within_their_rounding(dtype: str, bound: float) -> None:
    """Also where one channel is 100 times the others, and where a layer is: each has its own scale."""
    form, text = RecordForm(dtype, 3, 16), made_text(length=24)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 3, 16, generator=generator)
    features[:, 1] *= 1000
    features[:, 2, 5] *= 100
    hidden = torch.randn(24, 16, generator=generator)
    record = form.encode(text, features.flatten(1), hidden)
    assert len(record) == form.record_bytes(text)
    sample = form.decode(record, 24, 0, "a", "chat")
    assert torch.equal(sample.tokens_T, text.tokens_E) and torch.equal(sample.loss_mask_T, text.mask)
    found = sample.features_TF.float().unflatten(-1, (3, 16))[: sample.context]
    assert torch.equal(found.flatten(1), form.rounded(features.flatten(1)).float()[: sample.context]), (
        "live features round alike"
    )
    wanted = features[: sample.context]
    spread = wanted.abs().amax(-1, keepdim=True)  # numbers far below the largest keep fewer bits
    assert bool(((found - wanted).abs() <= bound * wanted.abs() + spread * 2**-17).all())
    counts = text.mask[1:]
    error = (sample.last_hidden_TH.float()[:-1] - hidden[:-1])[counts].norm() / hidden[:-1][counts].norm()
    assert error < bound


def test_fp8_holds_zeros_and_the_largest_number() -> None:
    numbers, scales = quantise(torch.tensor([[0.0, 0.0], [3e38, -3e38]]))
    back = numbers.float() * scales[:, None]
    assert back[0].tolist() == [0, 0]
    assert back[1].tolist() == pytest.approx([3e38, -3e38], rel=1e-5)


def test_damage_and_mismatch_are_named(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    store = make_store(target, shown, answers, tmp_path)
    layers, template, tokens = (0, 2), template_hash(shown.tokenizer), tokenizer_hash(shown.tokenizer)
    store.check_matches(target.info.fingerprint, layers, template, tokens, {})
    for changed, word in (
        (("other", layers, template, tokens, {}), "target"),
        ((target.info.fingerprint, (0, 1), template, tokens, {}), "feature layers"),
        ((target.info.fingerprint, layers, "other", tokens, {}), "chat template"),
        ((target.info.fingerprint, layers, template, "other", {}), "tokenizer"),
        (
            (target.info.fingerprint, layers, template, tokens, {"enable_thinking": False}),
            "set of template switches",
        ),
    ):
        with pytest.raises(FeatureStoreError, match=f"another {word}"):
            store.check_matches(*changed)
    with pytest.raises(FeatureStoreError, match="other feature layers"):
        make_store(target, shown, answers, tmp_path, (1, 2))
    with pytest.raises(FeatureStoreError, match=r"another capture\.max_length"):
        make_store(target, shown, answers, tmp_path, settings=replace(CAPTURE, max_length=99))
    shard = tmp_path / "shard-000-00000.bin"
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-5])
    with pytest.raises(FeatureStoreError, match=r"shard-000-00000\.bin: has \d+ of \d+ bytes"):
        FeatureStore(tmp_path)
    shard.unlink()
    with pytest.raises(FeatureStoreError, match=r"shard-000-00000\.bin: has 0 of \d+ bytes"):
        FeatureStore(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(manifest | {"version": 3})))
    with pytest.raises(FeatureStoreError, match="is of version 3, this draftkit reads 4; capture again"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FeatureStoreError, match=r"manifest\.json: is damaged"):
        FeatureStore(tmp_path)
    with pytest.raises(FeatureStoreError, match="holds no feature store"):
        FeatureStore(tmp_path / "nothing")


def test_fifty_flipped_bits_are_all_named_and_repaired(tmp_path: Path) -> None:
    """In shards and index alike: reading names the record or line, `verify` too, and the rest stays."""
    texts = [made_text(i, 8 + i % 5) for i in range(60)]
    folder = made_store(tmp_path / "features", texts, made_manifest())
    wanted = FeatureStore(folder).digest()
    rng = random.Random(1)
    files = [folder / "shard-000-00000.bin", folder / "index-000.jsonl"]
    whole = [path.read_bytes() for path in files]
    for number in range(50):
        path = files[number % 2]
        intact = path.read_bytes()
        changed = bytearray(intact)
        place = rng.randrange(len(changed))
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(FeatureStoreError, match=r"damaged|not finished|lacks") as caught:
            list(FeatureStore(folder))  # type: ignore[call-overload]
        # the last line without its end counts as never written
        torn = place == len(intact) - 1 and path.suffix == ".jsonl"
        assert path.name in str(caught.value) or torn
        found = verify(folder)
        assert len(found.damaged) in ((1, 2) if number % 2 else (1,)), "of two lines joined in one, one line"
        assert all(path.name in line for line in found.damaged)
        if number % 2 == 0:
            assert verify(folder, repair=True).damaged
            assert not verify(folder).damaged
            with pytest.raises(FeatureStoreError, match="lacks 1 of 60 samples"):
                FeatureStore(folder)
        for one, before in zip(files, whole, strict=True):
            one.write_bytes(before)
        assert FeatureStore(folder).digest() == wanted


def test_what_was_repaired_is_captured_again(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    whole = make_store(target, shown, answers, tmp_path)
    wanted = whole.digest()
    index = tmp_path / "index-000.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    shard = tmp_path / "shard-000-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 4
    shard.write_bytes(raw)
    index.write_bytes(b"".join([*lines[:3], lines[3].replace(b"a", b"b", 1), *lines[4:]]))
    assert len(verify(tmp_path, repair=True).damaged) == 2
    assert make_store(target, shown, answers, tmp_path).digest() == wanted
    assert not verify(tmp_path).damaged


def test_shards_end_before_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 1000)
    folder = made_store(tmp_path / "features", [made_text(i) for i in range(20)], made_manifest())
    shards = sorted(folder.glob("shard-*"))
    assert len(shards) > 2 and all(path.stat().st_size <= 1000 for path in shards)
    store = FeatureStore(folder)
    assert sorted(store[i].id for i in range(20)) == sorted(f"c{i}" for i in range(20))


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = made_store(tmp_path / "features", [made_text(0)], made_manifest())
    full = pytest.raises(OSError, match=r"shard-000-00000\.bin: cannot be written \(.*\); make room")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond this fails
    try:
        with full as error, StoreWriter(folder) as writer:
            writer.add([(made_text(1), 0, b"x" * 10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert len(FeatureStore(folder)) == 1, "what was there is there"


def test_a_full_disk_is_noticed_before_the_target_reads(
    target: TransformersTarget,
    shown: TemplateFormat,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type("Usage", (), {"free": 300 * 2**20})
    monkeypatch.setattr(writer_module, "SPARE_BYTES", 300 * 2**20 - 1000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FeatureStoreError, match=r"GiB are needed, 0\.00 GiB are free"):
        make_store(target, shown, answers, tmp_path)
    assert (tmp_path / "shard-000-00000.bin").stat().st_size == 0


def test_a_window_that_no_shard_can_hold_is_refused(
    target: TransformersTarget, shown: TemplateFormat, answers: Path, tmp_path: Path
) -> None:
    with pytest.raises(FeatureStoreError, match=r"capture\.max_length: a window of 100000000 tokens takes"):
        make_store(target, shown, answers, tmp_path, settings=replace(CAPTURE, max_length=10**8))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what Linux says this process has read")
def test_small_records_are_read_without_much_beside_them(tmp_path: Path) -> None:
    """Records of 7 kB: the lines of the index that say where they lie must not weigh as much."""

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    texts = [made_text(i, length=160) for i in range(64)]
    store = FeatureStore(made_store(tmp_path, texts, made_manifest(layers=(1, 2), hidden_size=4)))
    store.read([0])
    before = read_so_far()
    store.read(range(1, 64))
    read = read_so_far() - before
    own = sum(store.record(i).size for i in range(1, 64))
    assert 6000 < own / 63 < 9000
    assert own <= read <= 1.2 * own
