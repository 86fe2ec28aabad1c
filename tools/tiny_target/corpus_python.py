"""Code and chat text from the Python that runs this: functions of the standard library, docstrings,
`pydoc_data`."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
}
# characters: long enough to be worth drafting, short enough for one training row
MIN_ANSWER, MAX_ANSWER = 60, 1400


@dataclass(frozen=True)
class Example:
    """One question and its answer. `domain` is code, chat or math."""

    domain: str
    prompt: str
    answer: str


def standard_library_modules() -> Iterator[tuple[str, str]]:
    """(dotted module name, source text) of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few files of encodings tests are not UTF-8 by design
            continue
        yield ".".join((*parts[:-1], path.stem)).removesuffix(".__init__"), source


def python_examples() -> list[Example]:
    """All code and chat examples of this Python, in a fixed order, without duplicates of an answer."""
    found: dict[str, Example] = {}
    for module, source in standard_library_modules():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        lines = source.splitlines()
        for example in _module_examples(module, tree, lines):
            if MIN_ANSWER <= len(example.answer) <= MAX_ANSWER:
                found.setdefault(example.answer, example)
    for example in _topic_examples():
        found.setdefault(example.answer, example)
    return list(found.values())


def _module_examples(module: str, tree: ast.Module, lines: list[str]) -> Iterator[Example]:
    doc = ast.get_docstring(tree)
    if doc:
        yield from _doc_examples(f"the module `{module}`", doc)
    for owner, node in _definitions(tree):
        where = f"{owner}.{node.name}" if owner else node.name
        doc = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield from _doc_examples(f"the class `{where}` of `{module}`", doc)
            yield from _class_question(module, where, node)
            continue
        if doc:
            yield from _doc_examples(f"`{where}` of `{module}`", doc)
        yield from _function_examples(module, where, node, doc, lines)
        yield from _argument_question(module, where, node)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield owner, node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{owner}.{node.name}" if owner else node.name)


def _function_examples(
    module: str, where: str, node: ast.FunctionDef | ast.AsyncFunctionDef, doc: str | None, lines: list[str]
) -> Iterator[Example]:
    """The function itself, asked for in one of three ways; the way depends on the text, not on chance."""
    if node.end_lineno is None or node.end_lineno - node.lineno < 2:
        return
    source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    head = (
        textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).strip()
        or source.split("\n")[0]
    )
    answer = f"```python\n{source}\n```"
    summary = doc.strip().split("\n")[0] if doc else ""
    kind = len(source) % 3
    if kind == 0 or (kind == 1 and not summary):
        prompt = f"Complete this function of the module `{module}`.\n```python\n{head}\n```"
    elif kind == 1:
        prompt = f"Write the Python function `{where}` of `{module}`. {summary}\n```python\n{head}\n```"
    else:
        names = ", ".join(argument.arg for argument in node.args.args)
        prompt = f"Write a Python function `{node.name}({names})` as in `{module}`."
        prompt += f" {summary}" if summary else ""
    if len(prompt) < 700:
        yield Example("code", prompt, answer)


def _doc_examples(what: str, doc: str) -> Iterator[Example]:
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", inspect.cleandoc(doc)) if p.strip()]
    text = ""
    for paragraph in paragraphs:  # as many whole paragraphs as fit one answer
        if text and len(text) + len(paragraph) > 900:
            break
        text = f"{text}\n\n{paragraph}".strip()
    question = ("What is {}?", "What does the documentation say about {}?", "Explain {}.")[len(text) % 3]
    yield Example("chat", question.format(what), text)


def _argument_question(
    module: str, where: str, node: ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[Example]:
    """A question whose answer can be read off the signature in it."""
    arguments = [a for a in node.args.args if a.arg not in ("self", "cls")]
    if len(arguments) < 2 or len(where) % 2:
        return
    defaults = dict(
        zip(reversed([a.arg for a in node.args.args]), reversed(node.args.defaults), strict=False)
    )
    signature = ast.unparse(node.args)
    listed = []
    for argument in arguments:
        default = defaults.get(argument.arg)
        text = f"- `{argument.arg}`"
        listed.append(
            text + (f", which defaults to `{ast.unparse(default)}`" if default else ", which must be given")
        )
    answer = f"`{node.name}` takes {len(arguments)} arguments:\n" + "\n".join(listed)
    yield Example("chat", f"Which arguments does `{where}({signature})` of `{module}` take?", answer)


def _class_question(module: str, where: str, node: ast.ClassDef) -> Iterator[Example]:
    methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    if 2 <= len(methods) <= 12:
        answer = (
            f"The class `{where}` has {len(methods)} public methods: "
            + ", ".join(f"`{m}`" for m in methods)
            + "."
        )
        yield Example("chat", f"Which methods does the class `{where}` of `{module}` have?", answer)


def _topic_examples() -> Iterator[Example]:
    """Paragraph groups of the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        lines = text.strip().split("\n")
        title = lines[0].strip()
        paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if len(p.strip()) > 40]
        group, part = "", 0
        for paragraph in [*paragraphs, ""]:
            if group and (not paragraph or len(group) + len(paragraph) > 700):
                part += 1
                question = f"What does the Python reference say about {title} ({name})?"
                if part > 1:
                    start = group.strip().split("\n")[0][:60]
                    question = f"Continue the Python reference on {title} ({name}), from: {start}"
                if len(group) <= MAX_ANSWER:
                    yield Example("chat", question, group.strip())
                group = ""
            group = f"{group}\n\n{paragraph}".strip("\n")
