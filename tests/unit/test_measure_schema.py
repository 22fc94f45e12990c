"""The published schema of result.json: that of the code, taken by a validator that is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from balloonlab.measure.report import SCHEMA, Report, json_schema
from tests.measured import report

PUBLISHED = Path(__file__).parents[2] / "docs" / "schema" / f"measure-{SCHEMA}.json"


def document(one: Report) -> Any:  # noqa: ANN401  (JSON)
    return json.loads(msgspec.json.encode(one))


def test_what_is_published_is_what_the_code_has() -> None:
    """Otherwise: python -m balloonlab.measure.report, after counting SCHEMA up where a field changed or went."""
    assert PUBLISHED.read_text() == json_schema()


def test_it_is_a_schema_and_takes_a_report() -> None:
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document(report()))


@pytest.mark.parametrize(
    ("path", "value"),
    [(("passed",), "yes"), (("runs", 0, "ending"), "well"), (("arms", 0, "figures", "floor_bytes"), 3)],
)
def test_it_refuses_what_is_no_report(path: tuple[str | int, ...], value: object) -> None:
    damaged = document(report())
    inner = damaged
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json.loads(PUBLISHED.read_text())).validate(damaged)
