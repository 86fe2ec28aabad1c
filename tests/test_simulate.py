"""Traces and the simulator: rows agree with real decoding, arms with arithmetic done by hand, and files with
their origin."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from draftkit.cli import app
from draftkit.data.padded_answers import answer_batch
from draftkit.decode import decode
from draftkit.errors import ScheduleError
from draftkit.evaluate.run import EvalPrompt
from draftkit.evaluate.schedule_report import calibration_notes
from draftkit.ops.sampling import Sampling
from draftkit.schedule import record
from draftkit.schedule.calibration import Calibration, load_calibration, save_calibration
from draftkit.schedule.record import TraceItem, TraceSettings, record_traces
from draftkit.schedule.simulate import Load, arms_for, parametric_table, simulate
from draftkit.schedule.step_rate_table import StepRateTable, save_step_rate
from draftkit.schedule.traces import Origin, Traces, load_traces, save_traces
from draftkit.schedule_stages import open_simulation, run_calibrate, run_record, run_simulate
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.traces import made_traces

# a pass is free of charge for any tokens
FLAT = StepRateTable((0,), (1, 10_000), ((1.0, 1.0),), (1, 10_000), (0.25, 0.25))
DEAR = StepRateTable((0,), (1, 10_000), ((0.001, 10.0),), (1,), (0.0,))  # pure arithmetic: every token costs


# --- traces


def test_greedy_traces_tell_what_decoding_does(target: TransformersTarget) -> None:
    """At temperature 0 the rounds of the reference loop are rows of the trace, for any plan."""
    drafter, prompts = make_drafter(target), [(4, 20, 31, 7), (9, 9, 9), (40, 41, 42, 43)]
    answers = [decode(target, None, p, Sampling(0.0), 24).tokens for p in prompts]
    items = [TraceItem(str(i), "code", p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    traces = record_traces(target, drafter, items, TraceSettings(Sampling(0.0)), "d")
    assert [p.rows for p in traces.prompts] == [len(a) - 1 for a in answers]
    # the rules agree at temperature 0
    np.testing.assert_array_equal(traces.accepted_N, traces.block_accepted_N)
    for traced, prompt in zip(traces.prompts, prompts, strict=True):
        lengths = itertools.cycle([4, 1, 0, 3])
        rounds = decode(
            target, drafter, prompt, Sampling(0.0), 24, plan=lambda c, lengths=lengths: next(lengths)
        ).rounds
        row, end = traced.first, traced.first + traced.rows
        for r in rounds:
            np.testing.assert_allclose(traces.confidence_NG[row], r.confidence, atol=1e-5)
            assert min(int(traces.accepted_N[row]), r.verified) + 1 == r.emitted or row + r.emitted == end
            row += r.emitted
        assert row == end


@pytest.mark.slow
def test_sampled_traces_accept_as_often_as_decoding_does(target: TransformersTarget) -> None:
    drafter, prompt, sampling = make_drafter(target, block=3), (4, 20, 31, 7), Sampling(0.25)
    start = decode(target, None, prompt, Sampling(0.0), 2).tokens
    items = [TraceItem(str(i), "code", prompt, start) for i in range(400)]
    rows = record_traces(target, drafter, items, TraceSettings(sampling, seed=1), "d").accepted_N
    same = [decode(target, drafter, prompt, sampling, 8, seed) for seed in range(120)]
    decoded = np.array([d.rounds[0].accepted for d in same if d.tokens[0] == start[0]])
    assert len(decoded) > 20
    error = (rows.var() / len(rows) + rows.var() / len(decoded)) ** 0.5
    assert error > 0
    assert abs(rows.mean() - decoded.mean()) < 4 * error


def test_recording_goes_on_where_it_was_interrupted(
    target: TransformersTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [EvalPrompt(str(i), "code", (4 + i % 20, 20, 31)) for i in range(50)]
    (tmp_path / "config.json").write_text("{}")
    calls = []

    def answer(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer_batch(target, *arguments)  # type: ignore[arg-type]

    def record(out: Path) -> Traces:
        return run_record(target, make_drafter(target), tmp_path, prompts, Sampling(1.0), 4, 0, out)

    monkeypatch.setattr("draftkit.schedule_stages.answerer", lambda *_: answer)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "t")
    resumed = record(tmp_path / "t")
    assert len(calls) == 3  # the first 48 prompts were not answered again
    whole = record(tmp_path / "other")
    assert resumed.prompts == whole.prompts
    np.testing.assert_array_equal(resumed.accepted_N, whole.accepted_N)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["config.json", "other", "t"]
    (tmp_path / "config.json").write_text('{"another": 1}')
    with pytest.raises(ScheduleError, match="another drafter"):
        record(tmp_path / "t")


def test_traces_of_another_recording_are_refused_by_their_name(
    target: TransformersTarget, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    prompts, out = [EvalPrompt(str(i), "code", (4 + i, 20, 31)) for i in range(3)], tmp_path / "t"
    drafter, sampling = make_drafter(target), Sampling(1.0)
    recorded = run_record(target, drafter, tmp_path, prompts, sampling, 4, 0, out)
    kept = out.stat().st_mtime_ns
    assert run_record(target, drafter, tmp_path, prompts, sampling, 4, 0, out).prompts == recorded.prompts
    other = [replace(prompts[0], tokens=(9, 20, 31)), *prompts[1:]]
    for changed, what in (
        ((other, sampling, 4, 0), "other prompts"),
        ((prompts[:2], sampling, 4, 0), "other prompts"),
        ((prompts, Sampling(0.5), 4, 0), "another temperature"),
        ((prompts, sampling, 5, 0), "another limit of new tokens"),
        ((prompts, sampling, 4, 1), "another seed"),
    ):
        with pytest.raises(
            ScheduleError, match=f"^{out}: recorded with {what}; remove it or choose another -o$"
        ):
            run_record(target, drafter, tmp_path, *changed, out)
    assert out.stat().st_mtime_ns == kept
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(ScheduleError, match=f"^{out}: cannot be read as traces .* remove it"):
        run_record(target, drafter, tmp_path, prompts, sampling, 4, 0, out)


def test_a_trace_file_is_read_back_and_knows_its_pair(tmp_path: Path) -> None:
    path, traces = tmp_path / "traces.safetensors", made_traces()
    save_traces(traces, path)
    back = load_traces(path)
    assert back.origin == traces.origin
    assert back.prompts == traces.prompts
    np.testing.assert_array_equal(back.accepted_N, traces.accepted_N)
    np.testing.assert_array_equal(back.confidence_NG, traces.confidence_NG)
    back.check_origin(Origin("a new name", "target-1", "drafter-1", 1.0), path)
    with pytest.raises(ScheduleError, match="another drafter"):
        back.check_origin(replace(traces.origin, drafter_fingerprint="drafter-2"), path)
    with pytest.raises(ScheduleError, match="another target"):
        back.check_origin(replace(traces.origin, target_fingerprint="target-2"), path)


def test_traces_with_a_flipped_bit_are_refused_by_their_sha256(tmp_path: Path) -> None:
    path = tmp_path / "traces.safetensors"
    save_traces(made_traces(), path)
    good = path.read_bytes()
    for place in (good.index(b"target-1"), good.index(b"prompt_id") + 15, len(good) // 2, len(good) - 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ScheduleError, match=f"^{path}: is damaged"):
            load_traces(path)


def test_a_file_that_holds_no_traces_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(ScheduleError, match=f"^{path}: cannot be read as traces"):
            load_traces(path)
    traces = made_traces()
    save_traces(replace(traces, prompts=traces.prompts[:-1]), tmp_path / "short")
    with pytest.raises(ScheduleError, match="damaged"):
        load_traces(tmp_path / "short")


def test_a_part_without_an_answer_of_two_tokens_is_passed_over(
    target: TransformersTarget, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    full = [EvalPrompt(f"full{i}", "code", (7,) * 255) for i in range(48)]  # room for one token
    drafter, sampling = make_drafter(target), Sampling(1.0)
    prompts = [*full, EvalPrompt("a", "code", (4, 20, 31))]
    recorded = run_record(target, drafter, tmp_path, prompts, sampling, 4, 0, tmp_path / "t")
    assert [p.prompt_id for p in recorded.prompts] == ["a"]
    with pytest.raises(ScheduleError, match=r"^48 prompts, none with an answer of two tokens"):
        run_record(target, drafter, tmp_path, full, sampling, 4, 0, tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["config.json", "t"]


def test_answers_that_fill_the_context_are_traced_as_far_as_a_proposal_fits(
    target: TransformersTarget,
) -> None:
    drafter, settings = make_drafter(target), TraceSettings(Sampling(1.0))
    item = TraceItem("a", "code", (7,) * 240, tuple(range(20, 36)))
    traces = record_traces(target, drafter, [item], settings, "d")
    assert traces.prompts[0].rows == 256 - drafter.gamma - 240 - 1
    shorter = replace(item, answer=item.answer[: -drafter.gamma])
    np.testing.assert_allclose(
        traces.confidence_NG,
        record_traces(target, drafter, [shorter], settings, "d").confidence_NG,
        atol=1e-5,
    )


# --- simulator


def test_speeds_agree_with_arithmetic_by_hand() -> None:
    """With passes that cost one second whatever they hold, tokens per second are the accepted length over the
    step."""
    traces = made_traces()
    plain = simulate(traces, FLAT, Load(50, 5), "none", arms_for(4)["no speculation"])
    assert plain.user_speed == pytest.approx(1.0)
    assert plain.throughput == pytest.approx(5.0)
    assert plain.tokens == 50 * 30
    assert (plain.verified_mean, plain.drafting_share) == (0.0, 0.0)
    full = simulate(traces, FLAT, Load(50, 5), "fixed 4", arms_for(4)["fixed 4"])
    assert full.tokens == plain.tokens
    assert full.user_speed == pytest.approx(full.accepted_len / 1.25, rel=0.1)
    assert (full.verified_mean, full.drafting_share) == (4.0, 1.0)


@pytest.mark.parametrize("concurrency", [1, 16, 200])
@pytest.mark.parametrize("machine", [(2048, 64), (64, 16), (4, 4)])
def test_scheduling_is_near_the_best_fixed_length_and_never_below_none(
    machine: tuple[int, int], concurrency: int
) -> None:
    traces, table = made_traces(), parametric_table(*machine)
    requests = 60 if concurrency == 1 else 15 * concurrency + 60
    found = {
        name: simulate(traces, table, Load(requests, concurrency), name, arm)
        for name, arm in arms_for(4).items()
    }
    fixed = max(found[name].throughput for name in ("one token", "fixed 2", "fixed 3", "fixed 4"))
    for name in ("algorithm 1", "budget"):
        assert found[name].throughput >= 0.97 * fixed
        assert found[name].throughput >= 0.99 * found["no speculation"].throughput


def test_a_drafter_that_cannot_pay_is_only_probed() -> None:
    slow = StepRateTable(DEAR.contexts, DEAR.tokens, DEAR.pass_seconds, (1, 100), (0.1, 0.1))
    plain = simulate(made_traces(), slow, Load(1000, 20), "none", arms_for(4)["no speculation"])
    for name in ("algorithm 1", "budget"):
        found = simulate(made_traces(), slow, Load(1000, 20), name, arms_for(4)[name])
        assert 0 < found.drafting_share < 0.02 and found.throughput > 0.98 * plain.throughput


def test_arrivals_come_at_their_rate_and_wait_when_there_is_no_room() -> None:
    traces, arm = made_traces(), arms_for(4)["no speculation"]
    idle = simulate(traces, FLAT, Load(200, 500, rate=0.1), "none", arm)
    assert idle.seconds == pytest.approx(200 / 0.1, rel=0.25)
    assert idle.running_mean == pytest.approx(0.1 * 30, rel=0.3)  # Little: rate x 30 s
    assert idle.queue_median_s < 1.0
    assert simulate(traces, FLAT, Load(200, 2, rate=1.0), "none", arm).queue_median_s > 100


def test_the_estimator_stands_in_for_a_confidence_head() -> None:
    table = parametric_table(64, 16)
    arm = arms_for(4)["budget"]
    blind, seeing = (
        simulate(made_traces(head=head), table, Load(400, 30), "budget", arm).throughput
        for head in (False, True)
    )
    plain = simulate(made_traces(), table, Load(400, 30), "none", arms_for(4)["no speculation"]).throughput
    assert plain < 0.97 * seeing
    assert blind > 0.97 * seeing


def test_the_same_seed_gives_the_same_outcome() -> None:
    first, again, other = (
        simulate(made_traces(), FLAT, Load(60, 7, 0.5, seed), "budget", arms_for(4)["budget"])
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_users_beyond_the_requests_change_nothing_and_cost_nothing() -> None:
    arm = arms_for(4)["budget"]
    enough, many = (simulate(made_traces(), FLAT, Load(20, users), "budget", arm) for users in (20, 10**12))
    assert replace(many, concurrency=20) == enough


@pytest.mark.parametrize("seed", [-5, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ScheduleError, match=f"seed {seed}: must be 0 or more and below"):
        Load(20, 4, seed=seed)


# --- what belongs together


def test_parts_of_different_pairs_are_refused(tmp_path: Path) -> None:
    save_traces(made_traces(), tmp_path / "t")
    save_calibration(Calibration((1.0,) * 4, drafter_fingerprint="drafter-2"), tmp_path / "c")
    with pytest.raises(ScheduleError, match="calibration of another drafter"):
        open_simulation(tmp_path / "t", "balanced", tmp_path / "c")
    save_calibration(Calibration((1.0,) * 5), tmp_path / "c5")
    with pytest.raises(ScheduleError, match="calibration of 5 positions, the drafter has 4"):
        open_simulation(tmp_path / "t", "balanced", tmp_path / "c5")
    measured = replace(FLAT.measured, target="big", target_fingerprint="target-2")
    save_step_rate(replace(FLAT, measured=measured), tmp_path / "s")
    with pytest.raises(ScheduleError, match="another target"):
        open_simulation(tmp_path / "t", str(tmp_path / "s"), None)
    with pytest.raises(ScheduleError, match="--step-rate"):
        open_simulation(tmp_path / "t", None, None)
    for load in ((0, 1), (1, 0), (1, 1, -1.0)):
        with pytest.raises(ScheduleError, match=r"^a load of \d requests, \d at once.*above 0"):
            Load(*load)


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    traces = made_traces()
    traces.confidence_NG[3, 1] = np.nan
    save_traces(traces, tmp_path / "t")
    save_step_rate(replace(FLAT, tokens=(1, 8)), tmp_path / "s")
    source = open_simulation(tmp_path / "t", str(tmp_path / "s"), None)
    outcomes, assumptions = run_simulate(source, [Load(20, 4)], tmp_path / "out")
    said = " | ".join(assumptions)
    for part in (
        "1 confidences are no numbers",
        "uncalibrated",
        "measured up to 8 tokens per pass",
        "names no target",
    ):
        assert part in said
    assert [o.arm for o in outcomes] == list(arms_for(4))
    assert (tmp_path / "out" / "simulation.png").stat().st_size > 10_000


def test_calibration_is_fitted_and_measured_on_different_prompts(tmp_path: Path) -> None:
    traces = made_traces(prompts=200)
    odds = traces.confidence_NG / (1 - traces.confidence_NG)
    report = run_calibrate(
        replace(traces, confidence_NG=(odds**2.5 / (1 + odds**2.5)).astype(np.float32)), tmp_path
    )
    assert report.fitted_rows == report.held_out_rows == 3000
    assert np.mean(report.after.ece) < 0.5 * np.mean(report.before.ece)
    np.testing.assert_allclose(report.calibration.temperatures[:2], 2.5, rtol=0.25)
    assert report.calibration.drafter_fingerprint == "drafter-1"
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    with pytest.raises(ScheduleError, match="no confidence head"):
        run_calibrate(made_traces(head=False), tmp_path)
    with pytest.raises(ScheduleError, match=r"traces\.safetensors: holds answers to 1 prompt; .* remove it"):
        run_calibrate(made_traces(prompts=1), tmp_path)


def test_a_calibration_that_makes_held_out_prompts_worse_is_not_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right confidences, and temperatures of 5 fitted to them: the file leaves them as they are."""
    monkeypatch.setattr(
        "draftkit.schedule_stages.fit_calibration", lambda c, *_: Calibration((5.0,) * c.shape[1])
    )
    traces = made_traces(prompts=8)
    report = run_calibrate(traces, tmp_path)
    assert report.refused and np.mean(report.after.ece) > np.mean(report.before.ece)
    kept = load_calibration(tmp_path / "calibration.json", traces.gamma, "drafter-1")
    assert set(kept.temperatures) == {1.0}
    refused, few = calibration_notes(report.before, report.after, report.prompts, report.refused)
    assert refused.startswith("not taken") and few.startswith("too little data: on 8 prompts")
    assert calibration_notes(report.after, report.before, 8, False) == []


def test_rows_of_an_answer_do_not_depend_on_the_others(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, answer = make_drafter(target), (20, 21, 22, 23, 24, 25)
    items = [TraceItem(str(i), "code", (4 + i, 5, 6), answer) for i in range(3)]
    settings = TraceSettings(Sampling(1.0))
    whole = record_traces(target, drafter, items, settings, "d")
    alone = record_traces(target, drafter, items[:1], settings, "d")
    np.testing.assert_allclose(whole.confidence_NG[:5], alone.confidence_NG, atol=1e-5)
    assert torch.equal(torch.from_numpy(whole.accepted_N[:5]), torch.from_numpy(alone.accepted_N))
    finished = list[int]()
    monkeypatch.setattr(record, "BATCH_TOKENS", 20)  # two answers of nine tokens
    divided = record_traces(target, drafter, items, settings, "d", finished.append)
    assert finished == [2, 1]
    np.testing.assert_array_equal(divided.accepted_N, whole.accepted_N)


def test_the_command_answers_for_the_packaged_pair_and_for_kinds_of_machines(tmp_path: Path) -> None:
    arguments = ["simulate", "--concurrency", "8", "--requests", "40", "--json"]
    for extra in ([], ["--step-rate", "compute-bound", "--rate", "30", "-o", str(tmp_path)]):
        done = CliRunner().invoke(app, [*arguments, *extra])
        assert done.exit_code == 0, done.output
        found = {o["arm"]: o for o in json.loads(done.stdout)["outcomes"]}
        assert len(found) == 9
        assert found["oracle"]["throughput"] > found["fixed 5"]["throughput"]
    assert (tmp_path / "simulation.png").exists()
    table = CliRunner().invoke(app, ["simulate", "--concurrency", "2", "--requests", "5"]).output
    assert "tokens/s" in table
