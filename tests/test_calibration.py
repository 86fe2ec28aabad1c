"""Sequential Temperature Scaling finds the temperatures that data were made with; its measures agree with
hand counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from draftkit.errors import ScheduleError
from draftkit.schedule.calibration import Calibration, load_calibration, save_calibration
from draftkit.schedule.temperature_scaling import auc, brier, expected_error, fit_calibration, quality_of


def overconfident(count: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Proposals whose true chances are sigmoid(logit / T) with T = 2.5, 1.6, 0.6: confidences, outcomes, what
    counts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.0, 2.0, (count, 3))
    truth = 1 / (1 + np.exp(-logits / np.array([2.5, 1.6, 0.6])))
    kept = (rng.uniform(size=truth.shape) < truth).cumprod(-1).astype(float)
    return 1 / (1 + np.exp(-logits)), kept, np.ones_like(kept, bool)


def test_the_temperatures_of_the_data_are_found() -> None:
    confidence, kept, usable = overconfident()
    calibration = fit_calibration(confidence, kept, usable)
    np.testing.assert_allclose(calibration.temperatures, [2.5, 1.6, 0.6], rtol=0.15)
    fresh, fate, usable = overconfident(seed=1)
    before, after = quality_of(fresh, fate, usable), quality_of(calibration.apply(fresh), fate, usable)
    assert max(after.ece) < 0.015 < 0.05 < max(before.ece)
    assert after.auc[0] == pytest.approx(before.auc[0])  # one temperature keeps the order
    assert all(a < b for a, b in zip(after.brier, before.brier, strict=True))


def test_positions_that_do_not_count_have_no_say() -> None:
    confidence, kept, usable = overconfident(4000)
    spoiled = kept.copy()
    usable[::2, 1:] = False
    spoiled[~usable] = 1 - spoiled[~usable]
    assert (
        fit_calibration(confidence, kept, usable).temperatures
        == fit_calibration(confidence, spoiled, usable).temperatures
    )
    assert quality_of(confidence, kept, usable) == quality_of(confidence, spoiled, usable)


def test_measures_agree_with_counts_by_hand() -> None:
    predicted, kept = np.array([0.9, 0.9, 0.1, 0.5]), np.array([1.0, 0.0, 0.0, 1.0])
    assert expected_error(predicted, kept) == pytest.approx((2 * 0.4 + 0.1 + 0.5) / 4)
    assert brier(predicted, kept) == pytest.approx((0.01 + 0.81 + 0.01 + 0.25) / 4)
    assert auc(predicted, kept) == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # pairs: tie, right, wrong, right
    assert np.isnan(auc(predicted, np.ones(4)))


def test_confidences_of_zero_and_one_stay_finite_and_nan_stays_nan() -> None:
    found = Calibration((2.0, 2.0, 2.0)).apply(np.array([[0.0, 1.0, np.nan]]))
    assert 0 < found[0, 0] < found[0, 1] < 1
    assert np.isnan(found[0, 2])


def test_a_file_is_read_back_and_holds_what_sglang_requires(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration = Calibration((1.5, 0.7), "abc", "held-out", 10, (0.1, 0.2), (0.01, 0.02))
    save_calibration(calibration, path)
    assert load_calibration(path, 2, "abc") == calibration
    with pytest.raises(ScheduleError, match="calibration of another drafter"):
        load_calibration(path, 2, "d")
    content = json.loads(path.read_text())
    assert content["temperatures"] == [1.5, 0.7]  # list[float], all above 0: the only field that SGLang needs
    assert isinstance(content["dataset"], str)
    assert isinstance(content["num_samples"], int)
    (tmp_path / "theirs.json").write_text('{"temperatures": [1.0, 2.0], "note": "made elsewhere"}')
    assert load_calibration(tmp_path / "theirs.json", 2, "d").temperatures == (1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no calibration"),
        ("[]", "no calibration"),
        ('{"temperatures": []}', "one above 0 per position"),
        ('{"temperatures": [1.0, -1.0]}', "one above 0 per position"),
        ('{"temperatures": [1.0]}', "calibration of 1 positions, the drafter has 2"),
        ('{"temperatures": [1.0, 1.0], "drafter_fingerprint": 7}', "drafter_fingerprint is 7, must be text"),
        ("[" * 10**5, "no calibration"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=message):
        load_calibration(path, 2, "d")


def test_a_binary_file_is_told_in_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(ScheduleError, match="no calibration") as error:
        load_calibration(tmp_path / "c", 2, "d")
    assert len(str(error.value)) < 400


def test_a_position_without_outcomes_is_refused() -> None:
    confidence, kept, usable = overconfident(50)
    usable[:, 2] = False
    with pytest.raises(ScheduleError, match=r"\[50, 50, 0\]"):
        fit_calibration(confidence, kept, usable)
