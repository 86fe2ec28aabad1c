"""A running server, asked the same prompts: does it accept what draftkit measures, and does it still after a
prefix cache hit?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from draftkit.doctor.findings import Finding
from draftkit.errors import ServeError
from draftkit.serve.load import Endpoint, Record
from draftkit.serve.settings import LoadSettings

LEAST_SHARE = 0.85  # of the accepted length that is wanted: less is a fault
REPEATS = 40  # of a sentence, before the question: several blocks of a prefix cache
FILLER = "The train to the coast leaves at nine and comes back in the evening. "


@dataclass(frozen=True)
class Asked:
    """What a server accepted: rounds, accepted drafts and all drafts of one or several answers."""

    rounds: float
    accepted: float
    drafted: float

    @property
    def accepted_len(self) -> float:
        """Tokens per round, the target's own counted; 1 without rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0


def check_server(
    url: str, api_key: str | None, prompts: Sequence[str], expected: float | None, block: int | None = None
) -> tuple[list[Finding], list[str]]:
    """Findings and facts. `expected` is the accepted length of draftkit's own run on these prompts at
    temperature 0, None where there was none; `block` is how many tokens a block drafter was trained to draft.
    Raises ServeError when the server does not answer, or says
    nothing of its acceptance."""
    settings = LoadSettings(tuple(prompts), requests=1, warmup=0, max_tokens=48, ignore_eos=False)
    return asyncio.run(_check(url, api_key, settings, expected, block))


async def _check(
    url: str, api_key: str | None, settings: LoadSettings, expected: float | None, block: int | None
) -> tuple[list[Finding], list[str]]:
    endpoint = Endpoint(url, api_key, settings)
    try:
        await endpoint.prepare()
        asked = [await _ask(endpoint, prompt) for prompt in settings.prompts]
        whole = Asked(
            sum(a.rounds for a in asked), sum(a.accepted for a in asked), sum(a.drafted for a in asked)
        )
        if not whole.rounds:
            raise ServeError(
                f"{url}: says nothing of drafting, in answers or in /metrics; start it with a drafter, and "
                "llama-server with --metrics"
            )
        long = FILLER * REPEATS + settings.prompts[0]
        first, again = await _ask(endpoint, long), await _ask(endpoint, long)
    finally:
        await endpoint.close()
    return [*_too_many(whole, block), *_findings(whole, first, again, expected)], [
        f"server: {endpoint.model} at {url} has accepted length {whole.accepted_len:.2f} on {len(asked)} "
        "prompts "
        f"at temperature 0, {first.accepted_len:.2f} on a long one, {again.accepted_len:.2f} on the same "
        "again"
    ]


def _too_many(whole: Asked, block: int | None) -> list[Finding]:
    """More drafted tokens than a block drafter's block has."""
    if block is None or whole.drafted <= block * whole.rounds:
        return []
    drafted = f"{whole.drafted / whole.rounds:.1f} tokens are drafted in a round"
    return [
        Finding(
            "drafted tokens",
            f"{drafted}, the drafter has a block of {block} and was never trained for more",
            "acceptance at every position, in reports on vLLM",
            f"start the server with {block} drafted tokens",
        )
    ]


def _findings(whole: Asked, first: Asked, again: Asked, expected: float | None) -> list[Finding]:
    found = []
    if expected is not None and whole.accepted_len < LEAST_SHARE * expected:
        found.append(
            Finding(
                "server acceptance",
                f"the server's accepted length is {whole.accepted_len:.2f}, draftkit's {expected:.2f} on "
                "the same "
                "prompts",
                f"{100 * (1 - whole.accepted_len / expected):.0f} % of the accepted length",
                "compare its target, template and switches with those here; check its engine: --engine",
            )
        )
    if again.accepted_len < LEAST_SHARE * first.accepted_len:
        found.append(
            Finding(
                "prefix cache",
                f"the same prompt again has accepted length {again.accepted_len:.2f}, the first time "
                f"{first.accepted_len:.2f}",
                "acceptance of every request that shares a beginning (vllm#47930)",
                "update the engine, or switch its prefix cache off",
            )
        )
    return found


async def _ask(endpoint: Endpoint, prompt: str) -> Asked:
    """One answer; counts come with it, or from the growth of the server's counters."""
    before = await endpoint.counters()
    record: Record = await endpoint.ask(prompt)
    if record.error:
        raise ServeError(f"{endpoint.url}: a request failed: {record.error}; is the server well?")
    told = record.speculation
    if told:
        kinds = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens")
        return Asked(*(told.get(kind) or 0 for kind in kinds))
    after = await endpoint.counters()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    counters = ("num_drafts", "num_accepted_tokens", "num_draft_tokens")
    return Asked(*(grown.get(f"spec_decode_{name}_total", 0.0) for name in counters))
