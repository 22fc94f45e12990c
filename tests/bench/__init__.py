"""Benches that scripts/bench runs: ours against what others use, interleaved on one machine."""
