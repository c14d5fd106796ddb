# SPDX-License-Identifier: Apache-2.0
"""Bodies and calls drawn from the service's own description: no 5xx, and answers as described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

# Data that fits the schema may still be refused: what limits and objectives there are is not in it.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
LIMITS = dict(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def described(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def explore(schema, examples):
    """Call every operation with data that fits its description, and with data that does not."""
    calls = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:

            @settings(max_examples=examples if operation.body else 1, **LIMITS)
            @given(operation.as_strategy(generation_mode=mode))
            def call(case):
                nonlocal calls
                calls += 1
                case.call_and_validate(checks=CHECKS, timeout=60)

            call()
    return calls


@pytest.mark.full  # many random requests; fields and refusals are tested one by one
def test_answers_are_as_described(described):
    assert explore(described, 100) >= 200


@pytest.mark.slow
def test_many_answers_are_as_described(described):
    assert explore(described, 500) >= 900
