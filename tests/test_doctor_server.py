"""A server is asked whether it accepts what it should, and still does after a prefix cache hit."""

from __future__ import annotations

import pytest

from draftkit.doctor.server import check_server
from draftkit.errors import ServeError
from support.drafting_stub import stub
from support.server import ASSET, SERVE, serving

PROMPTS = ["What is a list?", "Step 1: 3 + 4 = ?"]


def test_a_hole_after_a_prefix_cache_hit_is_named() -> None:
    with stub(24, 2) as url:
        findings, facts = check_server(url, None, PROMPTS, expected=3.4)
    [finding] = findings
    assert finding.check == "prefix cache" and "1.20, the first time 3.40" in finding.what
    assert "accepted length 3.40 on 2 prompts" in facts[0]


def test_a_server_that_accepts_less_than_draftkit_is_named() -> None:
    with stub(1, 1) as url:
        findings, _ = check_server(url, None, PROMPTS, expected=2.0)
    [finding] = findings
    assert finding.check == "server acceptance" and "45 %" in finding.cost


def test_a_server_that_drafts_beyond_the_block_is_named() -> None:
    """The server drafts four tokens a round."""
    with stub(24, 24) as url:
        [finding] = check_server(url, None, PROMPTS, expected=None, block=3)[0]
    assert finding.check == "drafted tokens" and "4.0 tokens are drafted in a round" in finding.what
    assert "with 3 drafted tokens" in finding.line()


def test_a_sound_server_has_no_finding() -> None:
    with stub(24, 24) as url:
        assert check_server(url, None, PROMPTS, expected=3.4, block=4)[0] == []


def test_a_server_that_tells_nothing_or_does_not_answer_is_an_error() -> None:
    with stub(24, 24, False) as url, pytest.raises(ServeError, match="says nothing of drafting"):
        check_server(url, None, PROMPTS, expected=None)
    with pytest.raises(ServeError, match="does not answer"):
        check_server("http://127.0.0.1:9", None, PROMPTS, expected=None)


@pytest.mark.slow
def test_our_own_server_has_no_hole() -> None:
    """The very pair, with a prefix cache that the drafter reads, too."""
    with serving("--drafter", str(ASSET / "drafter"), "--plan", "fixed", command=SERVE) as server:
        findings, facts = check_server(server.url, None, PROMPTS, expected=None)
    assert findings == []
    assert "accepted length" in facts[0]
