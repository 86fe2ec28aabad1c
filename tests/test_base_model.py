"""A target without a chat template: it completes texts, in Python and as a server loads it; stages that need
messages name it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftkit import LLM, SamplingParams
from draftkit.errors import DataError, TargetError
from draftkit.serve.server import load_served
from draftkit.target.tokenizer import load_tokenizer
from support.engine import small


@pytest.fixture(scope="module")
def base(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "target"
    shutil.copytree(target_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    written.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(written), "utf-8")
    return str(folder)


def test_it_completes_texts_and_has_no_chats(base: str) -> None:
    llm = LLM(base, "none", small())
    [answer] = llm.generate(["def add(a, b):"], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4
    with pytest.raises(DataError, match="chat template"):
        llm.chat([{"role": "user", "content": "What is a list?"}])


def test_a_server_loads_it_and_stages_that_need_messages_do_not(base: str) -> None:
    assert load_served(base, "none", None, small()).tokenizer.chat_template is None
    with pytest.raises(TargetError, match="a tokenizer with a chat template is needed"):
        load_tokenizer(base)
