"""Turns, rounds, ratios and the time left."""

from functools import partial

import pytest
import torch

from hspsam_monai.errors import ConfigError

CPU = torch.device("cpu")


def test_contenders_take_turns_after_their_warm_up():
    from timing import interleave

    calls = []
    runs = {name: partial(calls.append, name) for name in "ABC"}
    times = interleave(runs, CPU, 0.0, least=2, most=5, warm=1)
    assert "".join(calls) == "ABC" * 3  # one to warm up, two measured
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_the_budget_decides_the_rounds_within_their_limits(monkeypatch):
    import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    def rounds(cost, budget, **limits):
        found = timing.interleave({"a": partial(work, cost), "b": partial(work, 2 * cost)}, CPU, budget, **limits)
        assert found["b"].median == pytest.approx(2 * cost)
        return len(found["a"].seconds)

    assert rounds(1.0, 10.0) == 4  # the fourth round begins after 9 s
    assert rounds(30.0, 10.0) == 3  # slow cases get the least
    assert rounds(0.001, 10.0, most=50) == 50
    with pytest.raises(ConfigError, match="least is 4"):
        timing.interleave({}, CPU, 1.0, least=4, most=3)


def test_a_contender_that_raises_costs_no_other():
    from timing import interleave

    calls = []

    def fails():
        if calls.count("A") == 2:
            raise ValueError("no more")

    runs = {"A": partial(calls.append, "A"), "bad": fails, "B": partial(calls.append, "B")}
    failures = {}
    times = interleave(runs, CPU, 0.0, least=3, most=3, warm=1, failures=failures)
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"A": 3, "B": 3}
    assert failures == {"bad": "failed: ValueError (no more)"}
    with pytest.raises(ValueError, match="no more"):
        calls.clear()
        interleave(runs, CPU, 0.0, least=3, most=3)
    assert interleave({"bad": partial(int, "x")}, CPU, 0.0, failures=failures) == {} and "bad" in failures


def test_the_ratio_is_that_of_the_fastest_peer():
    from timing import Timing, race

    peers = {"slow": Timing((9.0, 9.0, 1.0)), "fast": Timing((6.0, 5.0, 7.0))}
    found = race(Timing((4.0, 3.0, 8.0)), peers)
    assert found.peer == "fast"
    assert found.by_median == pytest.approx(6 / 4)
    assert found.by_minimum == pytest.approx(1 / 3)  # of any peer: the slow one had the shortest round
    assert race(None, peers) is None
    assert race(Timing((1.0,)), {}) is None


def test_a_timing_shows_minimum_median_and_maximum():
    from timing import Timing

    assert Timing((0.2, 0.0123, 0.00456)).cells() == ["4.56", "12.3", "200", "3"]


@pytest.mark.parametrize(
    ("value", "aim", "at_most", "text"),
    [
        (1.4, 1.4, False, "≥ 1.4: reached"),
        (1.39, 1.4, False, "≥ 1.4: missed"),
        (1.39, 1.4, True, "≤ 1.4: reached"),
        (1.41, 1.4, True, "≤ 1.4: missed"),
        (None, 5.0, False, "≥ 5: not measured"),
        (1.0, None, False, "–"),
    ],
)
def test_a_verdict_stands_beside_its_aim(value, aim, at_most, text):
    from timing import verdict

    assert verdict(value, aim, at_most=at_most) == text


def test_progress_corrects_its_guess(monkeypatch):
    import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    progress = timing.Progress([10.0, 30.0, 20.0])
    assert progress.begin("first") == "1 of 3: first; about 1 min 00 s left"
    now[0] = 20.0  # twice as long as guessed
    assert progress.begin("second") == "2 of 3: second; about 1 min 40 s left"
