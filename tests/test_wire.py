"""Bodies of requests: whatever one holds, it is a call or a refusal in one line that names the field."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from selfspec.serve.wire import ChatRequest, CompletionRequest, invalid

FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})
SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "none", "auto", "\ud800"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "refusal", "x\ny"]), inner, max_size=3)
    ),
    max_leaves=8,
)
OK: dict[type[Any], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "x"},
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("kind", OK)
@settings(max_examples=100, derandomize=True, database=None)
@given(change=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=4))
def test_any_body_is_a_call_or_refused_in_one_line(kind: type[Any], change: dict[str, Any]) -> None:
    try:
        asked = kind.model_validate({**OK[kind], **change})
    except ValidationError as error:
        said = str(invalid(list(error.errors())))
        assert said and len(said.splitlines()) == 1
        said.encode()
    else:
        assert asked.call(None, cache=True).model == asked.model
