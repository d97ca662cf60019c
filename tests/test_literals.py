# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Values that go through MONAI's parser as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from common.literals import as_data, literal

TEXTS = [
    *("", "lesion", "$5", "$", "@home", "@", "@@x", "%id", "%", "a#b", "#", "a::b", "x@::y", "%::z", "a@b.c", "50 %"),
    *("import duty", "$import os", "'", '"', "\\", "\\@\\'\n\t", "é脳", "\ud83d", "@other", "common.x", "_target_"),
]
VALUES: list[Any] = [
    *TEXTS,
    *(None, True, 0, -1.5, 1e300, [], {}, [None, "$x"], {"_target_": "os.system"}, {"a#b": ["@x"], "$y": 1}),
    [["a", {"b": "%c"}], 2],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_the_parser_gives_back_what_was_put_in(value: Any) -> None:
    """As the value of a name, inside of an expression with a reference, from a file, and when it is resolved again."""
    config = {"it": as_data(value), "other": 1, "joined": f"$[{literal(value)}, @other, @it]", "far": "@it"}
    for _ in range(2):
        parser = ConfigParser(json.loads(json.dumps(config)))
        for _ in range(2):
            assert parser.get_parsed_content("it") == value
            assert parser.get_parsed_content("far") == value
            assert parser.get_parsed_content("joined") == [value, 1, value]
            parser.parse(reset=True)
        parser.resolve_macro_and_relative_ids()
        config = parser.get()


def test_nothing_of_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    touch = f"$__import__('pathlib').Path({str(mark)!r}).touch()"
    ConfigParser({"it": touch}).get_parsed_content("it")
    assert mark.exists(), "which MONAI would do"
    mark.unlink()
    for value in (touch, [touch], {"a": touch}, {touch: 1}):
        assert ConfigParser({"it": as_data(value)}).get_parsed_content("it") == value
    assert not mark.exists()


def test_what_is_harmless_stays_readable() -> None:
    for value in ("lesion", ["background", "gray matter"], {"whole": [1, 2]}, 3, ("a", "b")):
        assert as_data(value) is value
    assert math.isnan(ConfigParser({"it": f"${literal(math.nan)}"}).get_parsed_content("it"))
    with pytest.raises(TypeError, match="cannot hold"):
        as_data([object()])
