"""Properties of comparing reports.

1. A report is no worse than itself, and no figure of it better; with runs that do not differ it is the same.
2. Without a threshold worse and better change places with the reports, and nothing else changes.
3. What is added to each run and is within a figure's noise is nothing: neither worse nor better.
4. A figure of which neither way is better is never worse.
5. The larger the threshold, the fewer figures are worse; a higher confidence never makes one worse.
6. With one run on a side a figure of which it is not known how far runs are apart is neither worse nor better.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.differences import Bar, Verdict, compare
from balloonlab.measure.figures import FIGURES, find_figure
from tests.recorded_series import repeated

VALUES = st.lists(st.integers(1, 4000).map(lambda value: value / 8), min_size=1, max_size=6)
NAMES = st.sampled_from([figure.name for figure in FIGURES])
CONFIDENCES = st.sampled_from([0.8, 0.9, 0.95, 0.99])
OTHER_WAY: dict[Verdict, Verdict] = {"worse": "better", "better": "worse"}


def judged(name: str, old: list[float], new: list[float], bar: Bar) -> Verdict:
    """Compare so many runs; values are in units of the figure's noise."""
    unit = find_figure(name).noise or 1.0
    before, after = (repeated(name, [value * unit for value in values]) for values in (old, new))
    comparison = compare(before, after, "ours", [name], bar)
    (found,) = comparison.figures
    assert comparison.regressed is (found.verdict == "worse")
    return found.verdict


@given(NAMES, VALUES, CONFIDENCES)
def test_a_report_and_itself(name: str, values: list[float], confidence: float) -> None:
    assert judged(name, values, values, Bar(0.0, confidence)) in ("same", "no-confidence")
    alike = [values[0]] * len(values)
    assert judged(name, alike, alike, Bar(0.0, confidence)) == "same"


@given(NAMES, VALUES, VALUES, CONFIDENCES)
def test_the_other_way_round(name: str, old: list[float], new: list[float], confidence: float) -> None:
    bar = Bar(0.0, confidence)
    there, back = judged(name, old, new, bar), judged(name, new, old, bar)
    assert back == OTHER_WAY.get(there, there)
    if find_figure(name).better == "neither":
        assert there in ("same", "changed", "no-confidence")


@given(NAMES, VALUES, st.floats(0, 0.999))
def test_noise_is_nothing(name: str, values: list[float], added: float) -> None:
    if find_figure(name).noise:
        found = judged(name, values, [value + added for value in values], Bar(0.0))
        assert found in ("same", "no-confidence")
        assert judged(name, values[:1], [values[0] + added], Bar(0.0)) == "same"


@given(NAMES, VALUES, VALUES, CONFIDENCES, st.floats(0, 2))
def test_a_higher_bar(
    name: str, old: list[float], new: list[float], confidence: float, threshold: float
) -> None:
    if judged(name, old, new, Bar(threshold, 0.99)) == "worse":
        assert judged(name, old, new, Bar(threshold / 2, confidence)) == "worse"


@given(NAMES, VALUES, VALUES)
def test_one_run_on_a_side(name: str, old: list[float], new: list[float]) -> None:
    if find_figure(name).apart is None:
        assert judged(name, old[:1], new, Bar(0.0)) not in ("worse", "better")
