"""What QEMU says to wrong input: sent to a client's session by tests/unit, and to a real QEMU by tests/qtest.

One table, so that what we answer is what QEMU answers, and goes on being that with the next QEMU. Each entry is what is
sent and all that comes back. Errors in the JSON itself are compared by their kind: each side says where in its own way.
Not a test.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

Reply: TypeAlias = dict[str, Any]

PARSE_ERROR = "JSON parse error"


def generic(text: str, **extra: object) -> Reply:
    return {"error": {"class": "GenericError", "desc": text}, **extra}


def not_found(text: str, **extra: object) -> Reply:
    return {"error": {"class": "CommandNotFound", "desc": text}, **extra}


def replies(lines: bytes) -> list[Reply]:
    """Read whole lines; of an error in the JSON only the kind is kept."""
    found: list[Reply] = [json.loads(line) for line in lines.splitlines() if line]
    for reply in found:
        if PARSE_ERROR in reply.get("error", {}).get("desc", ""):
            reply["error"]["desc"] = PARSE_ERROR
    return found


EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"
ALREADY = "Capabilities negotiation is already complete, command ignored"
FOO = "The command foo has not been found"
NO_OBJECT = "QMP input must be a JSON object"
NO_STRING = "QMP input member 'execute' must be a string"
NO_ARGUMENTS = "QMP input member 'arguments' must be an object"
NO_INTEGER = "Invalid parameter type for 'value', expected: integer"

BEFORE_NEGOTIATION: dict[bytes, list[Reply]] = {
    b'{"execute":"query-version"}': [not_found(EXPECTING)],
    b'{"execute":"foo","id":null}': [not_found(EXPECTING, id=None)],
    b'{"execute":"foo","arguments":{"x":1}}': [not_found(EXPECTING)],
    b"{}": [generic("QMP input lacks member 'execute'")],
    b"[]": [generic(NO_OBJECT)],
    b"garbage\n": [generic(PARSE_ERROR)],
    b'{"exec-oob":"query-version"}': [generic("QMP input member 'exec-oob' is unexpected")],
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}': [generic("Parameter 'x' is unexpected")],
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}': [
        generic("Invalid parameter type for 'enable', expected: array")
    ],
    b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}': [
        generic("Invalid parameter type for 'enable[0]', expected: string")
    ],
}

AFTER_NEGOTIATION: dict[bytes, list[Reply]] = {
    b'{"execute":"qmp_capabilities"}': [not_found(ALREADY)],
    b'{"execute":"qmp_capabilities","id":[1,2.5,null]}': [not_found(ALREADY, id=[1, 2.5, None])],
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}': [generic("Parameter 'x' is unexpected")],
    b'{"execute":"foo"}': [not_found(FOO)],
    b'{"execute":"","id":1}': [not_found("The command  has not been found", id=1)],
    '{"execute":"é\\n"}'.encode(): [not_found("The command é\n has not been found")],
    b'{"execute":1,"id":5}': [generic(NO_STRING, id=5)],
    b'{"execute":null}': [generic(NO_STRING)],
    b'{"id":{"a":"b"}}': [generic("QMP input lacks member 'execute'", id={"a": "b"})],
    b"[1,2]": [generic(NO_OBJECT)],
    b"1 ": [generic(NO_OBJECT)],
    b'"x"': [generic(NO_OBJECT)],
    b"null ": [generic(NO_OBJECT)],
    b'{"execute":"query-version","arguments":[]}': [generic(NO_ARGUMENTS)],
    b'{"execute":"query-version","arguments":null}': [generic(NO_ARGUMENTS)],
    b'{"execute":"query-version","foo":1}': [generic("QMP input member 'foo' is unexpected")],
    b'{"exec-oob":"foo"}': [generic("QMP input member 'exec-oob' is unexpected")],
    b'{"execute":"query-version","arguments":{"x":1},"id":3}': [generic("Parameter 'x' is unexpected", id=3)],
    b'{"execute":"query-status","arguments":{"x":null}}': [generic("Parameter 'x' is unexpected")],
    # Arguments
    b'{"execute":"balloon"}': [generic("Parameter 'value' is missing")],
    b'{"execute":"balloon","arguments":{"x":2}}': [generic("Parameter 'value' is missing")],
    **{
        b'{"execute":"balloon","arguments":{"value":%s}}' % value: [generic(NO_INTEGER)]
        for value in (b'"x"', b"1.5", b"1e9", b"true", b"null", b"[]", b"{}", b"9223372036854775808")
    },
    b'{"execute":"balloon","arguments":{"value":1,"x":2}}': [generic("Parameter 'x' is unexpected")],
    b'{"execute":"qom-get","arguments":{"path":"/foo"}}': [generic("Parameter 'property' is missing")],
    b'{"execute":"qom-get","arguments":{"path":1,"property":"x"}}': [
        generic("Invalid parameter type for 'path', expected: string")
    ],
    b'{"execute":"qom-set","arguments":{"path":"/foo","property":"x"}}': [
        generic("Parameter 'value' is missing")
    ],
    # Objects
    b'{"execute":"qom-list","arguments":{"path":"/foo"}}': [
        {"error": {"class": "DeviceNotFound", "desc": "Device '/foo' not found"}}
    ],
    b'{"execute":"qom-list","arguments":{"path":""}}': [generic("Path '' is ambiguous")],
    # Not JSON
    **{
        sent: [generic(PARSE_ERROR)]
        for sent in (
            b"foo ",
            b"}",
            b"]",
            b'{"execute" "query-version"}',
            b'{"execute":}',
            b'{"execute":"query-version",}',
            b"{,}",
            b'{"a":1 "b":2}',
            b"[1 2]",
            b"[1,]",
            b"{1:2}",
            b'{"execute":"query-version","id":"\\ud800"}',
            b'{"execute":"query-version","id":"\\x"}',
            b'{"execute":"query-version","execute":"foo"}',
            b'{"execute":"query-version","id":tru}',
            b"\x00",
            b"\x01",
            b"\xff",
            b'{"execute":\xff',
            b'"abc\xff',
            b'{"a":"b\n',
        )
    },
    b"[" * 1100 + b"]" * 1100: [generic("JSON nesting depth limit exceeded")],
    # What is behind an error is understood
    b'{"execute":"foo"}}': [not_found(FOO), generic(PARSE_ERROR)],
    b'\xff{"execute":"foo"}\r\n{"execute":"foo","id":0}\r\n': [
        generic(PARSE_ERROR),
        not_found(FOO),
        not_found(FOO, id=0),
    ],
}
