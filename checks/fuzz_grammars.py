"""Thousands of generated schemas and grammars against the compiler: none may crash the server's process,
and none may be slow.

    python -m checks.fuzz_grammars --shapes 0 4000 --count 5000 --seed 0

Schemas are of every keyword of JSON Schema's drafts 4 to 2020-12, nested and combined at random; grammars
in Lark and GBNF, expressions and lists of choices are random, too; one in ten is blown up (chained,
nested, repeated, wide). `--shapes` puts before them every keyword in the shapes of the public JSON Schema
test suite (checks/schema_shapes.py). What is accepted is compiled and walked with random tokens in a process
that stands for the server's. Prints one line of JSON; exit code 1 when that process ended, or a step takes
longer than the server allows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any

from transformers import AutoTokenizer

from checks.schema_shapes import shapes
from draftkit.serve.grammar_check import COMPILE_SECONDS
from draftkit.serve.grammar_source import GrammarSource
from draftkit.serve.structured import STEP_SECONDS, GrammarConstraint, GrammarError, Grammars
from draftkit.target.place import EMBEDDED

NAMES = ("a", "b", "name", "ü", "$x", "a b", "", "0", "foo-bar", "日本", '"', "\\")
FORMATS = (
    "date",
    "date-time",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uuid",
    "path",
    "binary",
    "x",
)
PATTERNS = (
    "^a*$",
    "[0-9]{2,5}",
    "(a|b)+c?",
    "^\\S+@\\S+$",
    "a(?=b)",
    "[",
    "(.*a){12}",
    "\\p{L}+",
    "^(x{1,9}){1,9}$",
)


class Schemas:
    """Random JSON schemas."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def whole(self) -> Any:
        """A schema with definitions that it may refer to, itself included."""
        made = self.part(0)
        if isinstance(made, dict) and self.chance.random() < 0.4:
            where = self.chance.choice(("$defs", "definitions"))
            made[where] = {f"d{i}": self.part(1) for i in range(3)}
        return made

    def part(self, depth: int) -> Any:
        """A schema, smaller the deeper."""
        chance = self.chance
        if depth > 4 or chance.random() < 0.08:
            return chance.choice((True, False, {}, {"type": "integer"}, {"type": "null"}, {"$ref": "#"}))
        several = (self.of_choice, self.of_several, self.of_reference)
        return chance.choice((self.of_object, self.of_array, self.of_string, self.of_number, *several))(
            depth + 1
        )

    def of_object(self, depth: int) -> Any:
        """Properties, required, patterns, names, numbers of them, dependencies."""
        names = self.chance.sample(NAMES, self.chance.randint(0, 4))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.part(depth) for name in names}}
        self.maybe(made, "required", lambda: [n for n in names if self.chance.random() < 0.6])
        self.maybe(made, "additionalProperties", lambda: self.part(depth))
        self.maybe(made, "patternProperties", lambda: {self.chance.choice(PATTERNS): self.part(depth)}, 0.1)
        self.maybe(made, "minProperties", lambda: self.chance.randint(0, 3), 0.1)
        self.maybe(made, "maxProperties", lambda: self.chance.randint(0, 9), 0.1)
        self.maybe(made, "propertyNames", lambda: self.part(depth), 0.05)
        self.maybe(made, "dependentRequired", lambda: {"a": ["b"]}, 0.05)
        self.maybe(made, "unevaluatedProperties", lambda: False, 0.05)
        return made

    def of_array(self, depth: int) -> Any:
        """Items, prefixes, sizes, contains."""
        made: dict[str, Any] = {"type": "array"}
        self.maybe(made, "items", lambda: self.part(depth), 0.8)
        self.maybe(made, "prefixItems", lambda: [self.part(depth) for _ in range(self.chance.randint(1, 3))])
        self.maybe(made, "minItems", lambda: self.chance.choice((0, 1, 3, 10**6)))
        self.maybe(made, "maxItems", lambda: self.chance.choice((0, 1, 3, 50, 10**9)))
        self.maybe(made, "uniqueItems", lambda: True, 0.1)
        self.maybe(made, "contains", lambda: self.part(depth), 0.05)
        return made

    def of_string(self, depth: int) -> Any:
        """Lengths, patterns, formats."""
        made: dict[str, Any] = {"type": "string"}
        self.maybe(made, "minLength", lambda: self.chance.choice((0, 1, 7, 10**5)))
        self.maybe(made, "maxLength", lambda: self.chance.choice((0, 1, 9, 200, 10**7)))
        self.maybe(made, "pattern", lambda: self.chance.choice(PATTERNS))
        self.maybe(made, "format", lambda: self.chance.choice(FORMATS))
        return made

    def of_number(self, depth: int) -> Any:
        """Bounds and multiples."""
        made: dict[str, Any] = {"type": self.chance.choice(("integer", "number"))}
        numbers = (0, 1, -1, 0.5, 1e-7, 12345.678, 1e30, -(10**18), 10**40, 99991)
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            self.maybe(made, name, lambda: self.chance.choice(numbers))
        return made

    def of_choice(self, depth: int) -> Any:
        """enum and const."""
        values = (1, "a", None, True, [1, {"a": 2}], {"b": []}, "é\n", 1.5e300, "<think>", "")
        if self.chance.random() < 0.5:
            return {"const": self.chance.choice(values)}
        return {"enum": self.chance.sample(values, self.chance.randint(0, 5))}

    def of_several(self, depth: int) -> Any:
        """anyOf, oneOf, allOf, not, if, types in a list."""
        name = self.chance.choice(("anyOf", "oneOf", "allOf", "not", "if", "type"))
        if name == "type":
            return {
                "type": self.chance.sample(("string", "null", "integer", "object", "array", "boolean"), 2)
            }
        if name in ("not", "if"):
            return {name: self.part(depth), "then": self.part(depth), "else": self.part(depth)}
        return {name: [self.part(depth) for _ in range(self.chance.randint(0, 3))]}

    def of_reference(self, depth: int) -> Any:
        """$ref to what is there, what is not, and elsewhere; anchors and dynamic ones."""
        places = (
            "#",
            "#/$defs/d0",
            "#/$defs/d1",
            "#/definitions/d2",
            "#/nowhere",
            "http://example.com/s",
            "#anchor",
            "",
        )
        made = {self.chance.choice(("$ref", "$ref", "$dynamicRef")): self.chance.choice(places)}
        self.maybe(made, "$anchor", lambda: "anchor", 0.2)
        self.maybe(made, "description", lambda: "d", 0.2)
        return made

    def maybe(self, made: dict[str, Any], name: str, value: Any, share: float = 0.3) -> None:
        """Set a keyword sometimes."""
        if self.chance.random() < share:
            made[name] = value()


def lark(chance: random.Random) -> str:
    """A random grammar in Lark, which may refer to rules that are not there."""
    count = chance.randint(1, 8)
    atoms = [
        '"a"',
        '"<think>"',
        "/[a-z]+/",
        "/(/",
        "WORD",
        "r0",
        '"b"?',
        "r2*",
        '("x" r0)+',
        '"y"{2,5}',
        "%json {}",
        "//",
    ]
    atoms += [f"r{i}" for i in range(count)] * 2
    line = lambda: " ".join(chance.choices(atoms, k=chance.randint(0, 4))) or '""'  # noqa: E731
    rules = [
        f"r{i}: {line()}" + "".join(f" | {line()}" for _ in range(chance.randint(0, 2))) for i in range(count)
    ]
    return "\n".join(["start: r0", *rules, "WORD: /[0-9]{1,3}/"])


def gbnf(chance: random.Random) -> str:
    """A random grammar in llama.cpp's form."""
    atoms = ['"a"', "[a-z0-9]", "[^\\n]*", "one", "two", "(one | two)", "one?", '"\\""', "[", "three+"]
    line = lambda: " ".join(chance.choices(atoms, k=chance.randint(1, 4)))  # noqa: E731
    return "\n".join(f"{name} ::= {line()} | {line()}" for name in ("root", "one", "two", "three"))


def blown_up(chance: random.Random) -> GrammarSource:
    """Something chained, nested, repeated or wide, of a random size up to beyond the limits."""
    size = int(10 ** chance.uniform(1, 4.3))
    chain = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(size)} | {
        f"a{size}": {}
    }
    nested: Any = {}
    for _ in range(min(size, 900)):
        nested = (
            {chance.choice(("allOf", "anyOf")): [nested]}
            if chance.random() < 0.5
            else {"items": nested, "type": "array"}
        )
    made: list[tuple[Any, Any]] = [
        ("schema", {"$defs": chain, "$ref": "#/$defs/a0"}),
        ("schema", nested),
        ("schema", {"properties": {f"p{i}": {"type": "integer"} for i in range(size)}}),
        ("schema", {"enum": [f"value {i}" for i in range(size)]}),
        ("schema", {"anyOf": [{"const": i} for i in range(size)]}),
        ("schema", {"type": "integer", "multipleOf": size * 7 + 3}),
        ("schema", {"type": "string", "pattern": f"(a{{1,{size}}}b){{1,{size}}}"}),
        ("choice", [f"text {i}" for i in range(size)]),
        ("regex", "(" * size + "a" + ")*" * size),
        ("regex", f"(.*a.{{{size % 40}}}){{{size % 7}}}"),
        ("regex", "|".join(f"(.*{i})" for i in range(size))),
        ("grammar", "start: a0\n" + "".join(f'a{i}: "x" a{i + 1}\n' for i in range(size)) + f'a{size}: "y"'),
        (
            "grammar",
            "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(size)) + f'a{size}: "y" | ""',
        ),
        ("grammar", "start: " + "(" * size + '"a"' + ")" * size),
        (
            "grammar",
            "start: "
            + " ".join(f"r{i}?" for i in range(size))
            + "".join(f'\nr{i}: "a{i}"' for i in range(size)),
        ),
        (
            "calls",
            [
                chance.choice(("json", "dsml")),
                [{"name": f"f{i}", "parameters": {"properties": {"x": {}}}} for i in range(size)],
                True,
            ],
        ),
    ]
    return GrammarSource(*chance.choice(made))


def source(chance: random.Random) -> GrammarSource:
    """One of all that a client can send."""
    kind = chance.random()
    if kind < 0.1:
        return blown_up(chance)
    if kind < 0.7:
        return GrammarSource("schema", Schemas(chance).whole())
    if kind < 0.8:
        return GrammarSource("grammar", lark(chance))
    if kind < 0.87:
        return GrammarSource("grammar", gbnf(chance))
    if kind < 0.93:
        return GrammarSource(
            "regex", "".join(chance.choices("ab(|)*+?[].{2,3}^$\\d\\xé", k=chance.randint(1, 20)))
        )
    if kind < 0.96:
        return GrammarSource(
            "choice", ["".join(chance.choices("abé\n<>|", k=chance.randint(1, 8))) for _ in range(5)]
        )
    return GrammarSource(
        "calls",
        [
            chance.choice(("json", "dsml")),
            [{"name": "f", "parameters": Schemas(chance).part(1)}],
            chance.random() < 0.5,
        ],
    )


def sources(given: argparse.Namespace, first: int) -> Iterator[GrammarSource]:
    """All grammars of a run from the `first` on."""
    chance = random.Random(given.seed)
    of_suite = (GrammarSource("schema", schema) for _, schema in islice(shapes(), *given.shapes))
    return islice(chain(of_suite, (source(chance) for _ in range(given.count))), first, None)


def examine(given: argparse.Namespace, first: int, told: Connection) -> None:
    """Tell of each grammar from the `first` on what became of it, and the seconds of the answer, of
    compiling and of the slowest step."""
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    grammars, chance = Grammars(tokenizer, len(tokenizer)), random.Random(given.seed)
    for asked in sources(given, first):
        began = time.perf_counter()
        try:
            matcher = grammars.matcher(asked)
        except (ValueError, RecursionError) as error:
            died = ("chained", "more than", "memory", "signal", "no answer")
            reason = next((word for word in died if word in str(error)), "no grammar")
            told.send((f"refused: {reason}", time.perf_counter() - began, 0.0, 0.0))
            continue
        answered = time.perf_counter() - began
        constraint = GrammarConstraint(matcher, grammars.table.eos_tokens, len(tokenizer))
        outcome, slowest = walked(constraint, chance)
        told.send((outcome, answered, grammars.compile_seconds, slowest))


def walked(constraint: GrammarConstraint, chance: random.Random) -> tuple[str, float]:
    """Take up to 40 tokens at random: how that ended, and the seconds of the slowest mask."""
    slowest = 0.0
    try:
        for _ in range(40):
            before = time.thread_time()
            allowed = constraint.allowed().nonzero().flatten().tolist()
            slowest = max(slowest, time.thread_time() - before)
            if not allowed or not constraint.accept(chance.choice(allowed)) or constraint.finished:
                break
    except GrammarError:
        return "accepted, and ended with an error later", slowest
    return "accepted", slowest


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shapes", type=int, nargs=2, default=(0, 0), metavar=("FROM", "TO"), help="which first"
    )
    parser.add_argument("--tokenizer", default=str(EMBEDDED))
    given = parser.parse_args()
    outcomes: Counter[str] = Counter()
    seconds: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)]
    crashes: list[str] = []
    total = given.count + sum(1 for _ in islice(shapes(), *given.shapes))
    while len(seconds) - 1 + len(crashes) < total:
        reading, writing = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=examine, args=(given, len(seconds) - 1 + len(crashes), writing)
        )
        process.start()
        writing.close()
        try:
            while True:
                outcome, *took = reading.recv()
                outcomes[outcome] += 1
                seconds.append((took[0], took[1], took[2]))
        except EOFError:
            process.join()
        except KeyboardInterrupt:
            print(f"stopped: these are the first {len(seconds) - 1} of {total}", file=sys.stderr)
            process.kill()
            total = len(seconds) - 1 + len(crashes)
        if len(seconds) - 1 + len(crashes) < total:  # this process stands for a server's: it ended too early
            crashes.append(next(sources(given, len(seconds) - 1 + len(crashes))).dump()[:200])
    answer, compile_, step = (max(column) for column in zip(*seconds, strict=True))
    told = {
        "grammars": total,
        "outcomes": dict(outcomes),
        "crashes": crashes,
        "slowest_answer_seconds": round(answer, 3),
        "slowest_compile_seconds": round(compile_, 3),
        "slowest_mask_seconds": round(step, 4),
    }
    print(json.dumps(told))
    sys.exit(bool(crashes) or step > STEP_SECONDS or compile_ > COMPILE_SECONDS)


if __name__ == "__main__":
    main()
