"""Mixtures: weights, caps, repetitions, hub sets as `datasets` gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from draftkit.data.conversations import SkippedRows, read_conversations
from draftkit.data.sources import PRESETS, mix, read_mixture
from draftkit.errors import ConfigError, DataError


def rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": t, "response": "x" * 4000}) + "\n" for t in texts))
    return str(path)


def write(path: Path, **mixture: object) -> Path:
    path.write_text(yaml.safe_dump(mixture))
    return path


def test_sources_come_by_weight_and_no_question_twice(tmp_path: Path) -> None:
    a = rows(tmp_path / "a.jsonl", [f"a{i}" for i in range(90)] + ["shared", "held"])
    b = rows(tmp_path / "b.jsonl", [f"b{i}" for i in range(60)] + ["shared"])
    held = rows(tmp_path / "held.jsonl", ["held"])
    sources = [{"path": a, "weight": 3}, {"path": b, "domain": "mine"}]
    mixture = read_mixture(write(tmp_path / "m.yaml", sources=sources, validation=held))
    report = mix(mixture, tmp_path / "first.jsonl", limit=40)
    assert report.conversations == {"a": 30, "b": 10}
    report = mix(mixture, tmp_path / "all.jsonl")
    assert report.conversations == {"a": 91, "b": 60} and report.repeated == 2
    found = read_conversations([tmp_path / "all.jsonl"])
    assert len({c.messages[0].content for c in found}) == len(found) == 151
    assert {c.domain for c in found} == {"a", "mine"}


def test_caps_are_in_tokens(tmp_path: Path) -> None:
    a = rows(tmp_path / "a.jsonl", [f"a{i}" for i in range(90)])
    mixture = read_mixture(write(tmp_path / "m.yaml", sources=[{"path": a, "max_tokens": 10_000}]))
    report = mix(mixture, tmp_path / "out.jsonl")
    assert report.conversations == {"a": 10} and report.tokens == {"a": 10_000}


def test_parquet_and_data_sets_come_through_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="extra `data`")
    said = [[{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}] for i in range(5)]
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"conversations": said, "extra": [None] * 5}).to_parquet(
        folder / "train.parquet"
    )
    assert [c.messages[0].content for c in read_conversations([folder / "train.parquet"])] == [
        f"q{i}" for i in range(5)
    ]
    mixture = read_mixture(write(tmp_path / "m.yaml", sources=[{"hub": str(folder)}]))
    assert mix(mixture, tmp_path / "out.jsonl").conversations == {str(folder): 5}
    missing = read_mixture(write(tmp_path / "m.yaml", sources=[{"hub": str(tmp_path / "none")}]))
    with pytest.raises(DataError, match="none: cannot be loaded"):
        mix(missing, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"sources": []}, "sources: List should have at least 1 item"),
        (
            {"sources": [{"preset": "x"}]},
            f"sources.0: preset 'x' is not known, choose one of {', '.join(PRESETS)}",
        ),
        ({"sources": [{"path": "a", "hub": "b"}]}, "sources.0: give one of preset, hub and path"),
        ({"sources": [{"path": "a", "weight": 0}]}, "sources.0.weight: Input should be greater than 0"),
        ({"sources": [{"path": "a", "weigth": 1}]}, "sources.0.weigth: Extra inputs"),
    ],
)
def test_a_wrong_mixture_names_the_field(mixture: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_mixture(write(tmp_path / "m.yaml", **mixture))
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read as a mixture"):
        read_mixture(tmp_path / "none.yaml")


def test_invalid_rows_end_a_mixture_unless_they_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"x": 1}\n')
    mixture = read_mixture(write(tmp_path / "m.yaml", sources=[{"path": str(path)}]))
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        mix(mixture, tmp_path / "out.jsonl")
    skipped = SkippedRows()
    assert mix(mixture, tmp_path / "out.jsonl", skipped=skipped).conversations == {"a": 1}
    assert skipped.count == 1
