"""Properties of the counters on their way from the device to the lab.

1. Every sample that was added to the device's metrics is read back with its value, whatever else was added.
2. Asked for with fewer labels, or with none, the sum over the others is read back.
3. Gauges are read back; what was never added counts 0.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.device import Counters, parse_counters
from hostdev.metrics import FAMILIES, GAUGES, Metrics

# What the device makes labels of: names of queues, methods and errors.
LABEL = st.from_regex(r"\A[A-Za-z][A-Za-z0-9_ -]{0,20}\Z")
AMOUNT = st.integers(0, 1 << 48)


@st.composite
def additions(draw: st.DrawFn) -> tuple[str, int, tuple[str, ...]]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return family, draw(AMOUNT), tuple(draw(LABEL) for _ in FAMILIES[family][0])


def both(added: list[tuple[str, int, tuple[str, ...]]]) -> tuple[Metrics, Counters]:
    metrics = Metrics()
    for family, amount, labels in added:
        metrics.add(family, amount, *labels)
    return metrics, parse_counters(metrics.exposition())


@given(st.lists(additions(), max_size=30))
def test_every_sample_is_read_back(added: list[tuple[str, int, tuple[str, ...]]]) -> None:
    metrics, counters = both(added)
    for family, _, labels in added:
        named = dict(zip(FAMILIES[family][0], labels, strict=True))
        assert counters.total(family, **named) == metrics.value(family, *labels)


@given(st.lists(additions(), max_size=30))
def test_sums_are_those_of_the_device(added: list[tuple[str, int, tuple[str, ...]]]) -> None:
    metrics, counters = both(added)
    for family, (names, _) in FAMILIES.items():
        assert counters.total(family) == metrics.value(family)
        for first in {labels[0] for name, _, labels in added if name == family and labels}:
            assert counters.total(family, **{names[0]: first}) == metrics.value(family, first)


@given(st.dictionaries(st.sampled_from(sorted(GAUGES)), st.integers(0, (1 << 41) - 1)))
def test_gauges_are_read_back(values: dict[str, int]) -> None:
    metrics = Metrics()
    metrics.gauges.update(values)
    counters = parse_counters(metrics.exposition())
    assert {gauge: counters.total(gauge) for gauge in GAUGES} == dict.fromkeys(GAUGES, 0) | values
