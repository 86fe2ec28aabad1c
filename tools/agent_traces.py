"""A scripted agent with tools, against any OpenAI-compatible server: logs of requests and responses to try
`draftkit traces` and `draftkit specialise` on.

    draftkit serve --target smollm2 --max-running 16 &
    python -m tools.agent_traces --conversations 300 --out requests.jsonl
    draftkit specialise --target smollm2 --traces requests.jsonl --start-from draftkit/assets/smollm2 -o mine

Each conversation is a small task on a made-up office: files, a calendar, prices and sums. The target is
asked which tool to use, as JSON of a schema (so that a small one calls tools, too); the agent runs it,
really, and shows the result; the target answers in words, is asked to go on, and at the end for a report.
What is said is the target's own; the script is in what it is asked. The same seed asks the same. One line
of the log is one request with its response, so that a conversation lies in it several times, each time
longer, as in logs of real agents.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx

PEOPLE = ("Ada", "Ben", "Chidi", "Dora", "Emre", "Fatima", "Goran", "Hana")
GOODS = ("paper", "toner", "chairs", "lamps", "coffee", "cables", "screens", "desks")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TOOLS = {
    "read_file": "the text of a file of the office",
    "list_files": "the names of all files",
    "calendar": "the meetings of a person",
    "price": "the price of a good, in euros",
    "add": "the sum of numbers, as in 3+4.5",
}
SYSTEM = (
    "You are the assistant of an office. You can use these tools:\n"
    + "\n".join(f"- {name}: {what}" for name, what in TOOLS.items())
    + '\nTo use one, answer with JSON only: {"tool": "...", "argument": "..."}. Results come from the user. '
    "Then answer in one or two plain sentences."
)
SAY = "Say it in a sentence."
CALL = {
    "type": "object",
    "properties": {
        "tool": {"type": "string", "enum": list(TOOLS)},
        "argument": {"type": "string", "minLength": 1, "maxLength": 40},
    },
    "required": ["tool", "argument"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "call", "schema": CALL}}


class Office:
    """What the tools look into: another one for each conversation."""

    def __init__(self, chance: random.Random) -> None:
        self.prices = {good: round(chance.uniform(1, 300), 2) for good in GOODS}
        self.meetings = {
            person: [
                f"{day} {chance.randint(8, 17)}:00 with {chance.choice(PEOPLE)}"
                for day in chance.sample(DAYS, 2)
            ]
            for person in PEOPLE
        }
        who, bought = chance.sample(PEOPLE, 2), chance.sample(GOODS, 3)
        self.files = {
            "order.txt": "\n".join(f"{chance.randint(1, 9)} x {good}" for good in bought),
            "notes.md": f"# Notes\n{who[0]} asks {who[1]} for the numbers of {chance.choice(DAYS)}.",
            "budget.csv": "month,euros\n" + "\n".join(f"{m},{chance.randint(100, 999)}" for m in (9, 10, 11)),
        }

    def use(self, tool: str, argument: str) -> str:
        """What a tool says."""
        named = next(
            (name for name in (*self.files, *PEOPLE, *GOODS) if name.lower() in argument.lower()), ""
        )
        if tool == "read_file":
            return self.files.get(named, f"no such file; there are {', '.join(self.files)}")
        if tool == "list_files":
            return "\n".join(self.files)
        if tool == "calendar":
            return "\n".join(self.meetings.get(named, ["nobody of that name works here"]))
        if tool == "price":
            return f"{named}: {self.prices[named]} euros" if named in self.prices else "not on the list"
        numbers = [
            part for part in argument.replace(" ", "").split("+") if part.replace(".", "", 1).isdigit()
        ]
        return f"{sum(map(float, numbers)):g}" if numbers else "give numbers, as in 3+4.5"


def tasks(chance: random.Random) -> list[str]:
    """What a conversation is about: one or two questions, and the report."""
    person, good, other = chance.choice(PEOPLE), *chance.sample(GOODS, 2)
    questions = [
        f"When does {person} have meetings this week?",
        f"What do {good} cost?",
        f"I need {good} and {other}. What is that together?",
        "What is in our last order?",
        "Which files are there, and which one is about money?",
        "How much have we spent in the last three months?",
    ]
    return [*chance.sample(questions, chance.randint(1, 2)), "Write a short report of all this for my boss."]


async def converse(http: httpx.AsyncClient, model: str, seed: int, most: int) -> list[dict[str, Any]]:
    """One conversation: its requests with their responses, in order."""
    chance = random.Random(seed)
    office, log = Office(chance), []
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]

    async def ask(**more: Any) -> str:
        body = {"model": model, "messages": list(messages), "max_tokens": most, "seed": seed, **more}
        response = await http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        log.append({"request": body, "response": response.json()})
        said = str(log[-1]["response"]["choices"][0]["message"]["content"] or "")
        messages.append({"role": "assistant", "content": said})
        return said

    *questions, report = tasks(chance)
    try:
        for question in questions:
            messages.append({"role": "user", "content": question})
            try:
                call = json.loads(await ask(response_format=FORM))
                result = office.use(call["tool"], call["argument"])
            except ValueError:  # it was cut
                result = "that was no tool; answer without one"
            messages.append({"role": "user", "content": f"Result:\n{result}\n{SAY}"})
            await ask()
        messages.append({"role": "user", "content": report})
        await ask()
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 400:  # else the context is full, and the conversation over
            raise
    return log


async def run(given: argparse.Namespace) -> None:
    """All conversations, some at the same time; each is written when it is complete."""
    began, done = time.monotonic(), 0
    limits = httpx.Limits(max_connections=given.users)
    async with httpx.AsyncClient(base_url=given.server, timeout=600, limits=limits) as http:
        while (models := await http.get("/v1/models")).status_code == 503:  # it loads its model
            await asyncio.sleep(1)
        model = models.raise_for_status().json()["data"][0]["id"]
        todo = iter(range(given.seed * 100_000, given.seed * 100_000 + given.conversations))
        with given.out.open("w", encoding="utf-8") as out:

            async def user() -> None:
                nonlocal done
                for seed in todo:
                    for line in await converse(http, model, seed, given.max_tokens):
                        out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    out.flush()
                    done += 1
                    rate = (time.monotonic() - began) / done
                    left = rate * (given.conversations - done)
                    print(f"{done}/{given.conversations} conversations, {left:.0f} s left", file=sys.stderr)

            await asyncio.gather(*(user() for _ in range(given.users)))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--users", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--max-tokens", type=int, default=96, help="of one answer")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
