"""A process that finds out whether a grammar can be compiled and walked within bounds, so that the server
need not.

llguidance is native code that recurses: a chain of some thousand references overflows the stack, and no
exception tells of it. So each grammar is tried in a fork of this process first, on a stack that is smaller
than the server's threads have, with limits on processor time and memory. A fork that dies is an answer, too.
The server starts this as `python -m draftkit.serve.grammar_check quick` (or `slow`) and
speaks to it in lines of JSON: first the tokenizer, then one line for each source, which is answered by one
line.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from draftkit.serve.grammar_source import GrammarSource, grammar_of
from draftkit.serve.token_table import token_table

# characters of the compiler's own form, which schemas reach with half of it at most
MAX_GRAMMAR = 512 * 2**10
COMPILE_SECONDS = 1.0  # of processor time
QUICK_SECONDS = 0.2  # of processor time, to compile and to walk; nearly every grammar takes less
STEP_SECONDS = 0.03  # of processor time, for one mask or one token
_WALK_TOKENS, _WALK_SECONDS = 48, 0.5
_PATIENCE = 20.0  # seconds by the clock, where the processors have other things to do
_TOO_LONG = f"it takes more than {COMPILE_SECONDS:g} s to compile; make it smaller"
_STACK = 2**20  # bytes; threads have 2 MiB or more
_MEMORY = 2**29  # bytes that a grammar may take
_DEATHS = {
    int(signal.SIGPROF): _TOO_LONG,
    int(signal.SIGKILL): f"it was not compiled within {_PATIENCE:g} s, the server is busy; try again",
    int(signal.SIGSEGV): "its rules or references are chained too deeply; make it flatter",
    int(signal.SIGBUS): "its rules or references are chained too deeply; make it flatter",
    int(signal.SIGABRT): "it takes too much memory, or its rules are chained too deeply; make it smaller",
}


def main() -> None:
    """Answer until the server closes the pipe. `quick` gives up soon, with {"slow": true}; `slow` takes the
    time that answers leave."""
    slow = sys.argv[1:] == ["slow"]
    os.nice(19 if slow else 10)  # streams go before new grammars
    setup = json.loads(sys.stdin.readline())
    table = token_table(setup["tokenizer"], setup["vocab_size"], setup["eos"])
    if slow and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(line, table, slow)), flush=True)


def _in_a_fork(line: str, table: LLTokenizer, slow: bool) -> dict[str, Any]:
    """What `check` says, or why there is no answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _limit(COMPILE_SECONDS + _WALK_SECONDS if slow else QUICK_SECONDS)
        threading.stack_size(_STACK)
        thread = threading.Thread(target=_answer, args=(line, table, writing))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(writing)
    answer, until = b"", time.monotonic() + _PATIENCE
    while select.select([reading], [], [], max(until - time.monotonic(), 0))[0]:
        piece = os.read(reading, 2**16)
        if not piece:
            break
        answer += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if not slow and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL):
            return {"slow": True}
        return {
            "error": _DEATHS.get(os.WTERMSIG(status), f"the compiler ended with signal {os.WTERMSIG(status)}")
        }
    return json.loads(answer) if answer else {"error": "the compiler gave no answer"}


def _limit(seconds: float) -> None:
    """Processor time until SIGPROF ends the process, and memory until allocations fail."""
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, now + _MEMORY))
    except (OSError, ValueError):  # not Linux
        pass


def _answer(line: str, table: LLTokenizer, writing: int) -> None:
    try:
        answer = check(GrammarSource(**json.loads(line)), table)
    except Exception as error:  # json's and llguidance's readers raise what they like
        answer = {"error": str(error) or type(error).__name__}
    raw = json.dumps(answer).encode()
    while raw:
        raw = raw[os.write(writing, raw) :]


def check(source: GrammarSource, table: LLTokenizer) -> dict[str, Any]:
    """{"grammar": ..., "compile_seconds": ..., "step_seconds": ...}, or {"error": why it is refused}."""
    began = time.process_time()
    grammar = grammar_of(source)
    if len(grammar) > MAX_GRAMMAR:
        return {
            "error": f"it has {len(grammar)} characters when compiled, more than {MAX_GRAMMAR}; make it "
            f"smaller"
        }
    matcher = LLMatcher(table, grammar, log_level=0)
    compiled = time.process_time() - began
    if matcher.is_error():
        return {"error": matcher.get_error()}
    if compiled > COMPILE_SECONDS:
        return {"error": _TOO_LONG}
    slowest = walk(matcher, table)
    if matcher.is_error():
        return {"error": f"answers cannot be walked through: {matcher.get_error()}"}
    if slowest > STEP_SECONDS:
        return {
            "error": f"one token takes {slowest:.2f} s of it, more than {STEP_SECONDS:g} s; make it smaller"
        }
    return {"grammar": grammar, "compile_seconds": compiled, "step_seconds": slowest}


def walk(matcher: LLMatcher, table: LLTokenizer) -> float:
    """Take tokens at random, always the same, until the answer ends or it is enough: seconds of the slowest
    step."""
    chance, slowest, began = random.Random(0), 0.0, time.process_time()
    ends = set(table.eos_tokens)
    for _ in range(_WALK_TOKENS):
        before = time.process_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        slowest = max(slowest, time.process_time() - before)
        allowed = [
            int(i) for i in np.flatnonzero(np.unpackbits(mask, bitorder="little")) if int(i) not in ends
        ]
        if not allowed or matcher.is_error() or before - began > _WALK_SECONDS:
            break
        before = time.process_time()
        taken = matcher.try_consume_tokens([chance.choice(allowed)])
        slowest = max(slowest, time.process_time() - before)
        if not taken:
            break
    return slowest


if __name__ == "__main__":
    main()
