"""The JSON schema knows every method and parameter."""

from __future__ import annotations

import json

from mergetool.methods import METHODS
from mergetool.recipe import schema


def test_it_is_json_and_closed():
    found = schema()
    assert json.loads(json.dumps(found)) == found
    assert found["additionalProperties"] is False
    assert found["required"] == ["merge_method", "models"]
    assert "‹" not in json.dumps(found, ensure_ascii=False)


def test_every_method_and_parameter_is_in_it():
    found = schema()
    assert found["properties"]["merge_method"]["enum"] == list(METHODS)
    shared = found["properties"]["parameters"]["anyOf"][0]["properties"]
    own = found["$defs"]["SourceEntry"]["properties"]["parameters"]["anyOf"][0]["properties"]
    for method in METHODS.values():
        for parameter in method.parameters.values():
            assert parameter.description in shared[parameter.name]["description"]
            assert method.name in shared[parameter.name]["description"]
            assert (parameter.name in own) or not parameter.per_source


def test_bounds_and_choices():
    shared = schema()["properties"]["parameters"]["anyOf"][0]["properties"]
    assert {"type": "number", "minimum": 0.0, "maximum": 1.0} in shared["density"]["oneOf"][0]["anyOf"]
    assert {"enum": ["tensor", "model"]} in shared["scope"]["oneOf"][0]["anyOf"]
    assert shared["lambda"]["default"] == 1.0
