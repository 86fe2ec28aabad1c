"""Going on after a kill: what is looked at first, and that nothing is left out or there twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from draftkit.data import parts as parts_module
from draftkit.data.answers import Answer, Answers, Question
from draftkit.data.conversations import SkippedRows, iterate_rows
from draftkit.data.generate import GenerateReport, generate_file
from draftkit.data.messages import Conversation
from draftkit.data.parts import PART, SharedWork
from draftkit.data.records import made_with, manifest_path
from draftkit.errors import DataError
from draftkit.settings import GenerateSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.records import records

SETTINGS = GenerateSettings(max_new_tokens=4)


@dataclass
class Parrot(Answers):
    """Answers at once, always the same."""

    asked: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    @property
    def room(self) -> int:
        return 8 - len(self._open)

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        self.asked.append(question.key)
        self._open.append(question.key)

    def finished(self) -> list[tuple[str, Answer]]:
        done, self._open = self._open, []
        return [(key, Answer((20, 21), "stop")) for key in done]


@dataclass
class Run:
    """A file of prompts and what is made of it; `walks` are the first rows that were asked for."""

    folder: Path
    shown: TemplateFormat
    rows: list[str]
    skipped: SkippedRows | None = None
    walks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source, self.out = self.folder / "prompts.jsonl", self.folder / "a.jsonl"
        self.parts = self.folder / "a.jsonl.parts"
        self.source.write_text("".join(row + "\n" for row in self.rows))

    def read(self, first: int) -> Iterator[Conversation | None]:
        self.walks.append(first)
        return iterate_rows([self.source], self.skipped and self.skipped.anew(), first)

    def go(self, answers: Answers) -> GenerateReport:
        about = made_with(self.shown, "a parrot", (), SETTINGS)
        return generate_file(answers, self.shown, self.read, self.out, SETTINGS, about, skipped=self.skipped)

    def put(self, number: int, lines: list[bytes], finished: bool) -> None:
        """A part as a killed run leaves it: its lock file is there unless it was finished."""
        self.parts.mkdir(exist_ok=True)
        (self.parts / f"{number:06d}.jsonl").write_bytes(b"".join(lines))
        if not finished:
            (self.parts / f"{number:06d}.lock").touch()


@pytest.fixture(scope="module")
def shown(target_folder: Path) -> TemplateFormat:
    return TemplateFormat(load_tokenizer(str(target_folder)))


def row(name: str, text: str | None = None) -> str:
    return json.dumps({"id": name, "prompt": text or f"what is {name}?"})


@pytest.fixture
def make(shown: TemplateFormat, tmp_path: Path) -> Callable[..., Run]:
    def made(name: str, rows: list[str], skip: bool = False) -> Run:
        (tmp_path / name).mkdir()
        return Run(tmp_path / name, shown, rows, SkippedRows() if skip else None)

    return made


def begun_like(run: Run, whole: Run) -> list[bytes]:
    """The lines of a whole run, by prompt, for one that is to go on from some of them."""
    manifest_path(run.out).write_bytes(manifest_path(whole.out).read_bytes())
    lines = {json.loads(line)["id"]: line for line in whole.out.read_bytes().splitlines(keepends=True)}
    return [lines[json.loads(r)["id"]] for r in whole.rows]


def test_the_first_question_is_found_by_the_names_of_files_and_all_is_looked_at_once(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"p{i}") for i in range(4 * PART + 10)]
    whole = make("whole", rows)
    assert whole.go(Parrot()).records == len(rows) and whole.walks == [0, 0]
    run = make("killed", rows)
    lines = begun_like(run, whole)
    run.put(0, lines[:PART], finished=True)
    run.put(1, [*lines[PART : PART + 5], b'{"id": "torn'], finished=False)
    run.put(2, lines[2 * PART : 3 * PART], finished=True)
    read, recover = list[str](), parts_module.recover
    monkeypatch.setattr(
        parts_module, "recover", lambda path, cut=True: read.append(path.stem) or recover(path, cut)
    )
    assert SharedWork(run.out).count() == 2 * PART + 5, "rows of finished parts and lines of others"

    class Noting(Parrot):
        def ask(self, question: Question, settings: GenerateSettings) -> None:
            if not self.asked:
                assert [stem for stem in read if stem.isdigit()] == ["000001"] and run.walks == [PART]
            super().ask(question, settings)

    answers = Noting()
    assert run.go(answers).records == len(rows) and run.walks == [PART, 0]
    assert answers.asked == [json.loads(r)["id"] for r in rows[PART + 5 : 2 * PART] + rows[3 * PART :]]
    assert run.out.read_bytes() == whole.out.read_bytes() and not run.parts.exists()


def test_a_part_that_only_looks_finished_is_found_before_the_end(make: Callable[..., Run]) -> None:
    rows = [row(f"p{i}") for i in range(2 * PART)]
    whole, run = make("whole", rows), make("hurt", rows)
    whole.go(Parrot())
    lines = begun_like(run, whole)
    run.put(0, lines[: PART - 3], finished=True)
    run.put(1, lines[PART:], finished=True)
    answers = Parrot()
    assert run.go(answers).records == 2 * PART and answers.asked == [f"p{i}" for i in range(PART - 3, PART)]
    assert run.out.read_bytes() == whole.out.read_bytes()


def test_a_finished_part_of_other_prompts_is_refused(make: Callable[..., Run]) -> None:
    whole = make("whole", [row(f"p{i}") for i in range(PART + 1)])
    whole.go(Parrot())
    run = make("other", [row("p0", "another question"), *whole.rows[1:]])
    run.put(0, begun_like(run, whole)[:PART], finished=True)
    with pytest.raises(DataError, match=r"a\.jsonl: holds an answer to another prompt of id 'p0'"):
        run.go(Parrot())


def test_rows_that_are_left_out_are_passed_over_too_and_counted_in_the_end(make: Callable[..., Run]) -> None:
    """A wrong row, one that the template refuses, and an id that an earlier part had."""
    rows = [row(f"p{i}") for i in range(3 * PART)]
    rows[3], rows[2 * PART + 1] = "{broken", row("p0", "the same id again")
    rows[4] = json.dumps({"id": "p4", "messages": [{"role": "user", "content": "x"}] * 2})
    whole = make("whole", rows, skip=True)

    class Refusing(TemplateFormat):
        def prompt(self, messages: object, tools: object = None) -> tuple[int, ...]:
            if "x" in [m["content"] for m in messages]:  # type: ignore[attr-defined]
                from draftkit.target.prompt_format import TemplateError

                raise TemplateError("no x")
            return super().prompt(messages, tools)  # type: ignore[arg-type]

    whole.shown = Refusing(whole.shown.tokenizer)
    assert whole.go(Parrot()).records == 3 * PART - 3
    assert whole.skipped is not None and whole.skipped.count == 3
    run = make("killed", rows, skip=True)
    run.shown = whole.shown
    manifest_path(run.out).write_bytes(manifest_path(whole.out).read_bytes())
    lines = {json.loads(line)["id"]: line for line in whole.out.read_bytes().splitlines(keepends=True)}
    run.put(0, [lines[f"p{i}"] for i in range(PART) if f"p{i}" in lines], finished=True)
    run.put(1, [lines[f"p{i}"] for i in range(PART, 2 * PART)], finished=True)
    assert run.go(Parrot()).records == 3 * PART - 3 and run.walks[0] == 2 * PART
    assert run.skipped is not None and run.skipped.count == 3
    assert [reason.split(": ")[0].rsplit("/", 1)[-1] for reason in run.skipped.first] == [
        "prompts.jsonl:4",
        "conversation p4",
        f"prompts.jsonl:{2 * PART + 2}",
    ]
    assert records(run.out) == records(whole.out)


def test_a_process_that_looks_on_cuts_off_nothing_of_what_another_one_joins(tmp_path: Path) -> None:
    """The line that is being written is not whole yet; its writer goes on after it."""
    out = tmp_path / "a.jsonl"
    out.write_bytes(b'{"torn')
    assert list(SharedWork(out).claims(lambda first: iter(()), True)) == []
    assert out.read_bytes() == b'{"torn'
