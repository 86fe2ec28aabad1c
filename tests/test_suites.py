"""The paper's suite: rows are those that its code draws, answers do not depend on how many processes give
them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from checks.forked import Ranks
from draftkit import cli
from draftkit.errors import ConfigError, DataError
from draftkit.evaluate.fetch import ORIGINS, fetch_suite
from draftkit.evaluate.metrics import Interval, PromptRecord, lengths_by_place
from draftkit.evaluate.paper import SETS, paper_lengths, print_beside_paper
from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.suite_run import answer_suite, in_order, skipped_by_set
from draftkit.evaluate.suites import PAPER, copy_suite, draw, read_set, read_suite, write_set
from draftkit.ops.sampling import Sampling
from draftkit.settings import EvaluateSettings
from draftkit.suite_stages import check_thinking
from draftkit.target.place import EMBEDDED
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter


def as_deepspec_draws(rows: list[str], count: int) -> list[str]:
    """DeepSpec's `run_dataset`, in its own order of steps: shuffle the rows themselves, then cut."""
    if len(rows) > count:
        rows = list(rows)
        random.Random(980406).shuffle(rows)
        rows = rows[:count]
    return rows


@pytest.mark.parametrize("one", PAPER, ids=lambda one: one.name)
def test_rows_are_drawn_as_the_reference_draws_them(one: object) -> None:
    assert isinstance(one, type(PAPER[0]))
    rows = [(f"question {i}",) for i in range(one.rows)]
    asked = draw(rows, one.drawn)
    assert [row.turns[0] for row in asked] == as_deepspec_draws([r[0] for r in rows], one.drawn)
    assert [row.place for row in asked] == list(range(min(one.rows, one.drawn)))
    assert all(rows[row.line] == row.turns for row in asked)


def test_the_counts_are_the_papers() -> None:
    counts = {one.name: one.drawn for one in PAPER}
    assert list(counts.values()) == [500, 500, 30, 256, 164, 500, 80, 500, 500]
    assert (counts["humaneval"], counts["mbpp"]) == (164, 256)


def small_suite(folder: Path) -> Path:
    folder.mkdir()
    write_set(folder, "mt-bench", [(f"What is {i}?", "And the next number?") for i in range(80)])
    write_set(folder, "aime25", [(f"Step 1: {i} + 4 = ?",) for i in range(30)])
    return folder


def test_a_folder_is_checked_and_copied_with_a_manifest(tmp_path: Path) -> None:
    source = small_suite(tmp_path / "source")
    assert copy_suite(source, tmp_path / "suite") == {"aime25": 30, "mt-bench": 80}
    manifest = json.loads((tmp_path / "suite" / "suite.json").read_text("utf-8"))["sets"]
    assert manifest["mt-bench"]["licence"] == "apache-2.0" and manifest["aime25"]["rows"] == 30
    assert list(read_suite(tmp_path / "suite")) == ["aime25", "mt-bench"]  # the table's order
    assert len(read_suite(tmp_path / "suite", limit=3)["mt-bench"]) == 3


def test_files_with_other_rows_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "aime25", [("one",)] * 29)
    with pytest.raises(DataError, match=r"aime25\.jsonl: has 29 rows, the set has 30"):
        read_suite(tmp_path)
    (tmp_path / "aime25.jsonl").write_text('{"turns": []}\n')
    with pytest.raises(DataError, match="row 1: turns must be a list of texts"):
        read_set(tmp_path / "aime25.jsonl")
    with pytest.raises(DataError, match=r"has none of gsm8k, .*draftkit suite fetch --from"):
        read_suite(tmp_path / "nowhere")


def test_fetching_takes_a_commit_once_and_counts_rows(tmp_path: Path) -> None:
    """The hub is replaced by rows as its cards show them; the network is what is not tested here."""
    rows = {
        "question": "How many?",
        "problem": "Find x.",
        "prompt": "Say it.",
        "question_content": "Sort.",
        "starter_code": "class Solution:",
        "instruction": "List them.",
        "input": "a, b",
    }
    asked: list[tuple[str, str | None]] = []

    def load(one: object, origin: object, revision: str | None) -> tuple[list[dict[str, object]], str]:
        name = next(s.name for s in PAPER if s == one)
        asked.append((name, revision))
        said = rows | ({"prompt": ["first", "second"]} if name == "mt-bench" else {})
        return [said] * next(s.rows for s in PAPER if s == one), "abc123"

    counts = fetch_suite(tmp_path, load)
    assert counts == {one.name: one.rows for one in PAPER}
    assert read_set(tmp_path / "mt-bench.jsonl")[0] == ("first", "second")
    assert read_set(tmp_path / "gsm8k.jsonl")[0][0].endswith("\\boxed{}.")
    assert "Input:\na, b" in read_set(tmp_path / "alpaca.jsonl")[0][0]
    (tmp_path / "gsm8k.jsonl").unlink()
    asked.clear()
    fetch_suite(tmp_path, load)
    assert asked == [("gsm8k", "abc123")]  # the same commit, and nothing else
    assert set(ORIGINS) == set(SETS)
    (tmp_path / "alpaca.jsonl").unlink()
    with pytest.raises(DataError, match=r"has 1 rows, the paper's set 52002.*--from FOLDER"):
        fetch_suite(tmp_path, lambda *_: ([rows], "abc123"))


SETTINGS = EvaluateSettings(max_new_tokens=12, batch_size=3, speed_prompts=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_how_many_share_the_prompts(
    target: TransformersTarget, target_folder: Path, tmp_path: Path, temperature: float
) -> None:
    shown = TemplateFormat(load_tokenizer(str(target_folder)))
    sets = read_suite(small_suite(tmp_path / "suite"), limit=5)
    drafter, sampling = make_drafter(target), Sampling(temperature)
    alone = answer_suite(target, drafter, shown, sets, SETTINGS, sampling)
    shared = [
        record
        for rank in range(2)
        for record in answer_suite(target, drafter, shown, sets, SETTINGS, sampling, rank, 2)
    ]
    assert in_order(shared, list(sets)) == in_order(alone, list(sets))
    names = [one.record.prompt_id for one in in_order(alone, list(sets)) if one.record]
    assert len(names) == 5 + 2 * 5 and names[5].endswith("#1") and names[6].endswith("#2")
    assert all(one.record and one.record.answer_ids and one.record.text for one in alone)


def test_prompts_without_room_are_skipped_and_counted(
    target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    shown = TemplateFormat(load_tokenizer(str(target_folder)))
    sets = read_suite(small_suite(tmp_path / "suite"), limit=3)
    long = replace(sets["aime25"][1], turns=("add " * 400,))
    sets["aime25"][1] = long
    found = answer_suite(target, make_drafter(target), shown, sets, SETTINGS, Sampling(0.0))
    assert skipped_by_set(found) == {"aime25": 1}


def test_lengths_by_place_follow_the_rounds() -> None:
    """Rounds of 3, 1 and 2 tokens after the first one begin at places 1, 4 and 5 of the answer."""
    record = PromptRecord("p", "d", 7, "length", 3, 6, (3, 2), (2, 1), (2, 0, 1), prompt_tokens=100)
    assert lengths_by_place([record], (4, 5)) == {"0-3": 3.0, "4-4": 1.0, "5-": 2.0}
    assert lengths_by_place([record], (104,), context=True) == {"0-103": 3.0, "104-": 1.5}


def test_the_table_shows_the_papers_numbers_and_differences_where_they_compare() -> None:
    lengths = {
        "gsm8k": Interval(5.0, 4.9, 5.1),
        "alpaca": Interval(3.0, 2.9, 3.1),
        "macro": Interval(4.0, 3.9, 4.1),
    }
    settings = {"sampling": {"temperature": 1.0}, "target": "Qwen/Qwen3-8B"}
    result = EvalResult({}, settings, lengths, {"all": []}, {}, ())
    assert paper_lengths("Qwen/Qwen3-8B", "dspark")[1]["gsm8k"] == 6.17

    def shown(of: EvalResult) -> str:
        written = io.StringIO()
        print_beside_paper(of, "dspark", Console(file=written, width=100))
        return " ".join(written.getvalue().split())

    assert "gsm8k 0 5.00 4.90–5.10 6.17 -1.17" in shown(result)
    other = replace(result, settings=settings | {"target": "smollm2"})
    assert "gsm8k 0 5.00 4.90–5.10 6.11 -" in shown(other) and "none of the paper's targets" in shown(other)


def test_a_template_that_can_think_must_be_told(target_folder: Path) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = "{% if enable_thinking %}<think>{% endif %}" + str(tokenizer.chat_template)
    with pytest.raises(ConfigError, match="enable_thinking: false"):
        check_thinking(TemplateFormat(tokenizer))
    check_thinking(TemplateFormat(tokenizer, {"enable_thinking": False}))


def test_the_command_takes_a_folder_and_names_what_is_not_there(tmp_path: Path) -> None:
    source = small_suite(tmp_path / "source")
    done = CliRunner().invoke(cli.app, ["suite", "fetch", "--from", str(source), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "mt-bench: 80 rows, 80 are asked" in done.output and "not there: gsm8k" in done.output


@pytest.mark.slow
def test_the_command_writes_the_same_json_with_one_process_and_with_two(tmp_path: Path) -> None:
    """From a local folder, at both temperatures, both turns of mt-bench; but for where and when it ran."""
    suite = small_suite(tmp_path / "suite")
    few = ["evaluate.max_new_tokens=10", "evaluate.speed_prompts=0", "evaluate.temperatures=[0.0,1.0]"]
    written: list[dict[str, object]] = []
    for processes in (1, 2):
        out = tmp_path / f"by {processes}"
        command = ["evaluate", "--suite", "paper", "--suite-folder", str(suite), "--limit", "3"]
        command += ["-d", str(EMBEDDED / "drafter"), "-o", str(out)]
        command += [word for one in few for word in ("--set", one)]
        ended = Ranks(command, processes, tmp_path / "log").finish()
        assert [code for code, _ in ended] == [0] * processes, ended
        told = ended[0][1]
        assert "aime25" in told and "not in" in told, "the sets that were not asked are named"
        for temperature in ("0", "1"):
            found = json.loads((out / f"evaluate-T{temperature}.json").read_text("utf-8"))
            written.append({name: value for name, value in found.items() if name != "environment"})
    assert written[:2] == written[2:]
    assert [len(one["records"]) for one in written] == [3 + 2 * 3] * 4  # type: ignore[arg-type]
