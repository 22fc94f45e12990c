"""Guests and devices for test suites, as plain functions: what the fixtures of pytest_plugin.py hand out."""
