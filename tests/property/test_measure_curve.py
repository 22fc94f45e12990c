"""What is read off a footprint over time.

Properties, over any samples in order of time:
- gib_minutes() of a whole is the sum of its parts, wherever it is divided;
- a footprint that stays has its size times its minutes;
- seconds_to() gives a moment at which the share was back, and there was none before it; more of a share never comes
  earlier; nothing is timed where less than a block came back.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.curve import gib_minutes, peak, seconds_to
from balloonlab.measure.figures import BLOCK_BYTES
from balloonlab.timeline import Sample

GIB = 1 << 30

curves = st.lists(
    st.tuples(st.floats(0.05, 5.0), st.integers(0, 64)), min_size=1, max_size=20
).map(
    lambda steps: [
        Sample(sum(step for step, _ in steps[: place + 1]), "phase", blocks * BLOCK_BYTES)
        for place, (_, blocks) in enumerate(steps)
    ]
)  # fmt: skip


@given(curves, st.floats(0.0, 1.0))
def test_a_whole_is_the_sum_of_its_parts(samples: list[Sample], share: float) -> None:
    end = samples[-1].seconds + 1.0
    middle = share * end
    parts = gib_minutes(samples, 0.0, middle) + gib_minutes(samples, middle, end)
    assert parts == pytest.approx(gib_minutes(samples, 0.0, end))


def test_a_footprint_that_stays_has_its_size_times_its_minutes() -> None:
    samples = [Sample(second, "idle", 2 * GIB) for second in range(61)]
    assert gib_minutes(samples, 0.0, 60.0) == pytest.approx(2.0)
    assert gib_minutes(samples, 30.0, 60.0) == pytest.approx(1.0)


@given(curves, st.sampled_from((0.1, 0.5, 0.9)))
def test_a_share_is_back_when_it_is_said_to_be(samples: list[Sample], share: float) -> None:
    begin, end = samples[0].seconds, samples[-1].seconds
    before, after = samples[0].footprint_bytes, samples[-1].footprint_bytes
    found = seconds_to(samples, begin, end, share, before)
    if before - after < BLOCK_BYTES:
        assert found is None
        return
    assert found is not None
    level = before - share * (before - after)
    earlier = [sample.footprint_bytes for sample in samples if sample.seconds - begin < found]
    assert all(size > level for size in earlier)
    assert any(sample.seconds - begin == found and sample.footprint_bytes <= level for sample in samples)
    less = seconds_to(samples, begin, end, share / 2, before)
    assert less is not None
    assert less <= found


@given(curves)
def test_a_peak_is_the_most_of_its_time(samples: list[Sample]) -> None:
    begin, end = samples[0].seconds, samples[-1].seconds
    assert peak(samples, begin, end) == max(sample.footprint_bytes for sample in samples)
    assert peak(samples, end + 1, end + 2) == 0
