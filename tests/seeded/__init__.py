"""Faults that are put into the device on purpose, each of which some test must notice: scripts/seeded-faults."""
