r"""The same drafter folder in vLLM and here: greedy answers and accepted length on the same held-out
prompts.

    python -m checks.engines_agree vllm DRAFTER --method eagle3 \
        --tokens 5 -o vllm.json      # where vLLM is installed
    python -m checks.engines_agree draftkit DRAFTER \
        --tokens 5 -o ours.json                  # where draftkit is
    python -m checks.engines_agree compare vllm.json ours.json

float32, greedy, one JSON per engine. With "none" for DRAFTER nothing is drafted: the answers alone. For a 1+N
DFlash folder `--tokens` is block_size - 1. Each engine can live in an environment of its own: neither is
imported before it is asked for.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent.parent / "draftkit" / "assets" / "tiny"
NONE = Path("none")
Chat = list[dict[str, str]]
Result = tuple[list[list[int]], int, int]  # answers, rounds, accepted drafted tokens


def read_chats(per_domain: int, path: Path = TINY / "heldout.jsonl") -> list[tuple[str, Chat]]:
    """The first user turns of the first prompts of every domain of a file, with the domain."""
    chats: dict[str, list[Chat]] = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        first = next(m for m in record["messages"] if m["role"] == "user")
        chats.setdefault(record["domain"], []).append([{"role": "user", "content": first["content"]}])
    return [(domain, chat) for domain, found in chats.items() for chat in found[:per_domain]]


def run_vllm(options: argparse.Namespace) -> Result:
    """vLLM's offline engine; rounds and accepted tokens are its own counters."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    speculative = None
    if options.drafter != NONE:
        speculative = {
            "method": options.method,
            "model": str(options.drafter),
            "num_speculative_tokens": options.tokens,
        }
    llm = LLM(
        options.target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=options.new_tokens)
    chats = [chat for _, chat in read_chats(options.prompts)]
    answers = llm.chat(chats, sampling, use_tqdm=False)
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    rounds, accepted = (
        int(counters.get(f"vllm:spec_decode_num_{name}", 0)) for name in ("drafts", "accepted_tokens")
    )
    if speculative and not rounds:
        raise SystemExit("vLLM counted no drafts: it did not use the drafter")
    return [list(a.outputs[0].token_ids) for a in answers], rounds, accepted


def run_draftkit(options: argparse.Namespace) -> Result:
    """The reference loop with the same folder, drafting as many tokens."""
    import torch

    from draftkit.decode import decode
    from draftkit.draft.checkpoint import load_drafter
    from draftkit.ops.sampling import Sampling
    from draftkit.target.loading import load_target
    from draftkit.target.template_format import TemplateFormat
    from draftkit.target.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    target, tokenizer = load_target(options.target), load_tokenizer(options.target)
    drafter = None if options.drafter == NONE else load_drafter(options.drafter, target=target)
    if drafter is not None and drafter.gamma != options.tokens:
        if drafter.config.algorithm != "eagle3":
            raise SystemExit(
                f"this drafter drafts {drafter.gamma} tokens: give --tokens {drafter.gamma} to both engines"
            )
        from dataclasses import replace

        drafter.config = replace(drafter.config, block_size=options.tokens)
    answers, rounds, accepted = [], 0, 0
    for _, chat in read_chats(options.prompts):
        done = decode(
            target, drafter, TemplateFormat(tokenizer).prompt(chat), Sampling(0.0), options.new_tokens
        )
        answers.append(list(done.tokens))
        rounds, accepted = rounds + len(done.rounds), accepted + sum(r.accepted for r in done.rounds)
    return answers, rounds, accepted


def compare(files: list[Path]) -> dict[str, Any]:
    """Same answers, and the accepted length in each."""
    first, second = (json.loads(f.read_text("utf-8")) for f in files)
    same = sum(a == b for a, b in zip(first["answers"], second["answers"], strict=True))
    engines = {r.pop("engine"): r for r in (first, second)}
    prompts = len(first["answers"])
    for result in engines.values():
        del result["answers"]
    return {"prompts": prompts, "same_answers": same} | engines


def architecture(drafter: Path) -> str:
    """What the folder says it is."""
    if drafter == NONE:
        return "none"
    return str(json.loads((drafter / "config.json").read_text("utf-8"))["architectures"][0])


def cpu_name() -> str:
    """The processor's name; Python alone says "x86_64" on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Run one engine, or compare two results; prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = parser.add_subparsers(dest="engine", required=True)
    for name in ("vllm", "draftkit"):
        engine = engines.add_parser(name)
        engine.add_argument("drafter", type=Path)
        engine.add_argument("--target", default=str(TINY))
        engine.add_argument("--method", default="eagle3", help="vLLM's: eagle3, dflash")
        engine.add_argument("--tokens", type=int, default=5, help="drafted per round")
        engine.add_argument("--prompts", type=int, default=8, help="per domain")
        engine.add_argument("--new-tokens", type=int, default=96)
        engine.add_argument("--out", "-o", type=Path, required=True)
    engines.add_parser("compare").add_argument("files", type=Path, nargs=2)
    options = parser.parse_args()
    if options.engine == "compare":
        print(json.dumps(compare(options.files)))
        return
    answers, rounds, accepted = {"vllm": run_vllm, "draftkit": run_draftkit}[options.engine](options)
    about = {
        "engine": options.engine,
        "cpu": cpu_name(),
        "drafter": architecture(options.drafter),
        "tokens": options.tokens,
    }
    numbers = {"rounds": rounds, "accepted": accepted, "accepted_len": 1 + accepted / max(rounds, 1)}
    options.out.write_text(json.dumps(about | numbers | {"answers": answers}) + "\n", encoding="utf-8")
    print(json.dumps(about | numbers))


if __name__ == "__main__":
    main()
