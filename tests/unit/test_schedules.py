"""Schedules: values worked out by hand, properties by hypothesis, every refusal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.errors import RecipeError
from sparsetrain.schedules import (
    NAMES,
    Clock,
    Cosine,
    Cubic,
    Curve,
    Exponential,
    Gradual,
    Linear,
    OneShot,
    Piecewise,
    Rounds,
    Schedule,
)

RUN = Clock(total_steps=1000, steps_per_epoch=100)
UNKNOWN = Clock(total_steps=None, steps_per_epoch=None)
quick = settings(max_examples=150, deadline=None)


def ramp(kind: type[Gradual], **more: float) -> Gradual:
    return kind(start="0st", end="400st", every="100st", **more)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("3ep", 300),
        ("2.5ep", 250),
        ("0.126ep", 13),
        ("500st", 500),
        ("500", 500),
        (500, 500),
        ("30%", 300),
        ("33.3 %", 333),
        ("100%", 1000),
        ("0%", 0),
        (" 7 st ", 7),
    ],
)
def test_durations(duration: str | int, steps: int) -> None:
    assert RUN.steps(duration) == steps


def test_steps_need_no_clock() -> None:
    assert UNKNOWN.steps("12st") == 12
    assert Clock(None, 100).steps("2ep") == 200
    assert Clock(1000, None).steps("2%") == 20


# x = 1/4, 1/2, 3/4, 1 of the way to 0.8 (0.75 for the exponential), worked out on paper
BY_HAND = [
    (ramp(Linear), 0.8, [0.2, 0.4, 0.6, 0.8]),
    (ramp(Cubic), 0.8, [37 / 80, 7 / 10, 63 / 80, 0.8]),  # 1 - (27, 8, 1)/64 = (37, 56, 63)/64
    (ramp(Cosine), 0.8, [0.11715728752538099, 0.4, 0.682842712474619, 0.8]),  # 0.4 (1 - sqrt(1/2), 1, 1 + sqrt(1/2))
    (ramp(Exponential, rate=math.log(16)), 0.75, [0.4, 0.6, 0.7, 0.75]),  # (8, 12, 14, 15)/15
]


@pytest.mark.parametrize(("schedule", "final", "values"), BY_HAND)
def test_ramps_by_hand(schedule: Gradual, final: float, values: list[float]) -> None:
    curve = schedule.resolve(final, RUN)
    assert [step for step, _ in curve.points] == [100, 200, 300, 400]
    assert [value for _, value in curve.points] == pytest.approx(values, abs=1e-12)
    assert curve.points[-1] == (400, final)
    assert curve.last_step == 400


def test_zhu_and_gupta_from_an_initial_sparsity() -> None:
    curve = ramp(Cubic, initial=0.2).resolve(0.8, RUN)
    # s_f + (s_i - s_f)(1 - x)^3 at x = 0 and 1/2
    assert curve.at(0) == pytest.approx(0.2)
    assert curve.at(200) == pytest.approx(0.8 - 0.6 / 8)


def test_a_ramp_ends_exactly_where_it_should_off_the_grid() -> None:
    curve = Linear(start="10st", end="95st", every="40st").resolve(0.85, RUN)
    assert [step for step, _ in curve.points] == [50, 90, 95]
    assert [value for _, value in curve.points] == pytest.approx([0.4, 0.8, 0.85])
    assert Linear(start="7st", end="7st").resolve(0.3, RUN).points == ((7, 0.3),)
    assert Linear(start="0st", end="2st", every="0st").resolve(0.5, RUN).points == ((1, 0.25), (2, 0.5))


def test_defaults_leave_room_for_fine_tuning() -> None:
    curve = Cubic().resolve(0.9, RUN)
    assert curve.points[0][0] == 150
    assert curve.last_step == 700


def test_a_curve_is_constant_between_its_points() -> None:
    curve = Curve(((10, 0.3), (20, 0.6)))
    assert [curve.at(step) for step in (0, 9, 10, 19, 20, 10**9)] == [0.0, 0.0, 0.3, 0.3, 0.6, 0.6]


def test_one_shot_and_piecewise() -> None:
    assert OneShot("2ep").resolve(0.7, RUN).points == ((200, 0.7),)
    assert OneShot().resolve(0.7, UNKNOWN).points == ((0, 0.7),)
    curve = Piecewise({"50%": 0.9, "1ep": 0.5, "300st": 0.8}).resolve(0.9, RUN)
    assert curve.points == ((100, 0.5), (300, 0.8), (500, 0.9))


def test_rounds_remove_a_share_of_the_survivors() -> None:
    lottery = Rounds(prune_rate=0.2, start="1ep", every="1ep")
    curve = lottery.resolve(0.67232, RUN)
    assert [step for step, _ in curve.points] == [100, 200, 300, 400, 500]
    assert [value for _, value in curve.points] == pytest.approx([0.2, 0.36, 0.488, 0.5904, 0.67232], abs=1e-12)
    # the last round is cut short, so that the run ends at what was asked
    assert lottery.sparsities(0.5) == pytest.approx([0.2, 0.36, 0.488, 0.5], abs=1e-12)
    assert lottery.sparsities(0.1) == [0.1]
    assert lottery.sparsities(0.488)[-1] == 0.488


def test_a_number_of_rounds_gives_the_rate() -> None:
    assert Rounds(rounds=3).sparsities(0.875) == pytest.approx([0.5, 0.75, 0.875])
    assert Rounds(rounds=2).sparsities(0.96) == pytest.approx([0.8, 0.96])
    assert Rounds(rounds=1).sparsities(0.9) == [0.9]
    assert Rounds(prune_rate=0.5).sparsities(0.875) == pytest.approx(Rounds(rounds=3).sparsities(0.875))
    # twin: removing the share of all weights, not of the survivors, would give 1/3 and 2/3 of 0.875
    assert Rounds(rounds=3).sparsities(0.875)[0] != pytest.approx(0.875 / 3)


finals = st.floats(0.01, 0.999)
ramps = st.builds(
    lambda kind, start, length, every, initial: kind(
        start=f"{start}st", end=f"{start + length}st", every=f"{every}st", initial=initial
    ),
    st.sampled_from([Linear, Cubic, Cosine, Exponential]),
    st.integers(0, 300),
    st.integers(0, 600),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.005]),
)
rounds = st.one_of(
    st.builds(Rounds, rounds=st.integers(1, 9), start=st.just("0st"), every=st.integers(1, 90).map("{}st".format)),
    st.builds(Rounds, prune_rate=st.floats(0.05, 0.95), start=st.just("0st"), every=st.just("1st")),
)


@quick
@given(st.one_of(ramps, rounds, st.just(OneShot("50%"))), finals)
def test_every_curve_rises_and_ends_exactly_at_the_final_sparsity(schedule: Schedule, final: float) -> None:
    curve = schedule.resolve(final, RUN)
    steps, values = zip(*curve.points, strict=True)
    assert all(early < late for early, late in itertools.pairwise(steps))
    assert all(low <= high for low, high in itertools.pairwise(values))
    assert values[0] >= 0
    assert values[-1] == final
    assert curve.at(curve.last_step) == curve.at(10**9) == final
    assert steps[0] == 0 or curve.at(steps[0] - 1) == 0.0
    # pure: the same question has the same answer, whatever was asked in between
    assert schedule.resolve(final, RUN) == curve
    assert [curve.at(step) for step in reversed(steps)] == list(reversed(values))


@quick
@given(ramps, finals)
def test_a_ramp_changes_only_on_its_grid_and_at_its_end(schedule: Gradual, final: float) -> None:
    start, end, every = (RUN.steps(text) for text in (schedule.start, schedule.end, schedule.every))
    assert all(step == end or (start <= step < end and (step - start) % every == 0) for step, _ in schedule.points(final, RUN))


def test_what_a_schedule_gives_is_clamped() -> None:
    class Wild(Schedule):
        def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
            return [(30, final), (10, -1.0), (20, 5.0)]

    assert Wild().resolve(0.6, RUN).points == ((10, 0.0), (20, 0.6), (30, 0.6))


def test_every_schedule_has_a_name() -> None:
    def concrete(kind: type) -> set[type]:
        below = set().union(*(concrete(child) for child in kind.__subclasses__()), set())
        return below | ({kind} if not getattr(kind, "__abstractmethods__", None) else set())

    ours = {kind for kind in concrete(Schedule) if kind.__module__ == "sparsetrain.schedules"}
    assert set(NAMES.values()) == ours


class Never(Schedule):
    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        return []


class Short(Schedule):
    def points(self, final: float, clock: Clock) -> list[tuple[int, float]]:
        return [(5, final / 2)]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda: RUN.steps("3 epochs"), ["'3 epochs'", "3ep", "500st", "30%"]),
        (lambda: RUN.steps("-3ep"), ["'-3ep'", "3ep"]),
        (lambda: RUN.steps(""), ["''", "3ep"]),
        (lambda: RUN.steps(-5), ["-5", "500st"]),
        (lambda: RUN.steps("150%"), ["'150%'", "more than the whole run"]),
        (lambda: UNKNOWN.steps("3ep"), ["'3ep'", "training data has no known length", "500st"]),
        (lambda: UNKNOWN.steps("3%"), ["'3%'", "no known end", "500st"]),
        (lambda: Linear(end="100%").resolve(0.9, RUN), ["Linear", "step 1000", "ends at 1000", "earlier"]),
        (lambda: OneShot("1200st").resolve(0.9, RUN), ["OneShot", "step 1200", "ends at 1000", "train longer"]),
        (lambda: Rounds(rounds=20).resolve(0.9, RUN), ["Rounds", "step 2000", "ends at 1000"]),
        (lambda: Linear(start="60%", end="50%").resolve(0.9, RUN), ["end (step 500)", "start (step 600)"]),
        (lambda: Linear(initial=0.95).resolve(0.9, RUN), ["initial", "0.95", "0.9"]),
        (lambda: Linear(initial=1.0).resolve(0.9, RUN), ["initial", "1.0", "[0, 1)"]),
        (lambda: Linear(initial=math.nan).resolve(0.9, RUN), ["initial", "nan", "[0, 1)"]),
        (lambda: Exponential(rate=0.0).resolve(0.9, RUN), ["rate=0.0", "positive"]),
        (lambda: Exponential(rate=math.inf).resolve(0.9, RUN), ["rate=inf", "finite"]),
        (lambda: Piecewise({"1ep": 0.95, "2ep": 0.9}).resolve(0.9, RUN), ["0.95", "[0, 0.9]"]),
        (lambda: Piecewise({"1ep": -0.1, "2ep": 0.9}).resolve(0.9, RUN), ["-0.1", "[0, 0.9]"]),
        (lambda: Piecewise({"1ep": math.nan}).resolve(0.9, RUN), ["nan", "[0, 0.9]"]),
        (lambda: Piecewise({"1ep": 0.5, "100st": 0.9}).resolve(0.9, RUN), ["same step", "(100, 0.5)"]),
        (lambda: Piecewise({"1ep": 0.5}).resolve(0.9, RUN), ["ends at sparsity 0.5", "0.9 was asked"]),
        (lambda: Piecewise({}).resolve(0.9, RUN), ["never prunes"]),
        (lambda: Never().resolve(0.9, RUN), ["never prunes"]),
        (lambda: Short().resolve(0.9, RUN), ["0.45", "0.9 was asked"]),
        (lambda: Rounds().resolve(0.9, RUN), ["rounds or prune_rate", "one of the two"]),
        (lambda: Rounds(rounds=3, prune_rate=0.2).resolve(0.9, RUN), ["rounds or prune_rate"]),
        (lambda: Rounds(rounds=0).resolve(0.9, RUN), ["rounds must be at least 1"]),
        (lambda: Rounds(prune_rate=1.0).resolve(0.9, RUN), ["prune_rate 1.0", "(0, 1)", "survivors"]),
        (lambda: Rounds(prune_rate=-0.2).resolve(0.9, RUN), ["prune_rate -0.2", "(0, 1)"]),
    ],
)
def test_errors_name_the_value_and_the_way_out(broken: Callable[[], Any], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        broken()
    assert [text for text in says if text not in str(caught.value)] == []


def test_a_run_without_a_known_end_takes_a_schedule_in_steps() -> None:
    assert Linear(start="0st", end="5000st", every="5000st").resolve(0.5, UNKNOWN).points == ((5000, 0.5),)
