"""The scripted agent against a real server: its log becomes conversations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from draftkit.data.conversations import read_conversations
from draftkit.data.traces import make_traces
from support.server import SERVE, serving


def test_its_log_becomes_conversations_of_words_and_calls(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with serving("--drafter", "none", command=SERVE) as server:
        given = ["--conversations", "6", "--users", "3", "--max-tokens", "24"]
        command = [
            sys.executable,
            "-m",
            "tools.agent_traces",
            "--server",
            server.url,
            "--out",
            str(log),
            *given,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, _ = make_traces([log], tmp_path / "traces", validation_share=0.2, held_out_share=0.2)
    files = [p for p in (tmp_path / "traces").glob("*.jsonl") if p.stat().st_size]
    made = read_conversations(files)
    assert len(made) == 6 == sum(report.kept.values()), (
        "each lies in the log several times, and is taken once"
    )
    for conversation in made:
        roles = [m.role for m in conversation.messages]
        assert roles[0] == "system" and roles[1:] == ["user", "assistant"] * (len(roles[1:]) // 2)
