"""The check of published templates: full numbers for templates that are shown as they are, and short ones
where something is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checks.published_templates import FULL, checked
from draftkit.target.prompt_format import Turn
from draftkit.target.template_format import TemplateFormat
from support.templates import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_the_families_get_full_numbers(family: str, tmp_path: Path) -> None:
    known = FAMILIES[family]
    mode = {"enable_thinking": known.has_reasoning} if "enable_thinking" in known.template else {}
    counts = checked(known.template, known.switches or mode, 6, tmp_path)
    assert counts["conversations"] == 6 and counts["generated"] > 6 and not counts["rewritten"]
    assert [counts[one] for one, _ in FULL] == [counts[all_of] for _, all_of in FULL]


@pytest.mark.parametrize(
    ("name", "wrong", "short"),
    [
        ("text", lambda right: lambda self, *a, **k: right(self, *a, **k) + "!", {"rendered"}),
        (
            "turns",
            lambda right: (
                lambda self, *a, **k: [Turn(t.prompt_ids, t.answer_ids[:-1]) for t in right(self, *a, **k)]
            ),
            {"found"},
        ),
        ("reader", lambda right: lambda self, *a: right(self, *a, with_calls=False), {"taken apart"}),
    ],
)
def test_what_is_shown_or_learnt_in_another_way_is_counted(
    name: str, wrong: Any, short: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TemplateFormat, name, wrong(getattr(TemplateFormat, name)))
    counts = checked(FAMILIES["qwen3"].template, {}, 4, tmp_path)
    assert short <= {one for one, all_of in FULL if counts[one] != counts[all_of]}


def test_stop_tokens_that_nobody_wrote_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut answer with an end of turn in its record."""
    from checks import published_templates

    right = published_templates.samples_of

    def with_more(*given: Any) -> Any:
        for sample in right(*given):
            yield type(sample)(
                **{**vars(sample), "tokens": (*sample.tokens, 0), "loss_mask": (*sample.loss_mask, True)}
            )

    monkeypatch.setattr(published_templates, "samples_of", with_more)
    counts = checked(FAMILIES["qwen3"].template, {}, 4, tmp_path)
    assert counts["exact"] < counts["generated"]
