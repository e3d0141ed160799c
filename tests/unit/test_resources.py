"""The keys of ``resource_dict``: their checks, defaults and error texts."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import fractions
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.resources import Demand, OneRank, ResourceDict, Resources
from unit.properties import repeatable

KEYS = [field.name for field in dataclasses.fields(Resources) if field.name != "template_keys"]


class Index:
    """An integer in the way of numpy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


GOOD: list[tuple[str, Any, Any]] = [
    ("cores", 1, 1),
    ("cores", Index(3), 3),
    ("threads_per_core", 8, 8),
    ("gpus_per_core", 0, 0),
    ("gpus_per_core", 2, 2),
    ("cwd", "/a/b", "/a/b"),
    ("cwd", Path("/a/b"), "/a/b"),
    ("cwd", "/a/./b/../c/", "/a/c"),
    ("cwd", "x", os.path.join(os.getcwd(), "x")),
    ("cache_key", "a/b", "a/b"),
    ("cache_directory", "/c", "/c"),
    ("num_nodes", 4, 4),
    ("exclusive", True, True),
    ("exclusive", False, False),
    ("error_log_file", "/log", "/log"),
    ("run_time_max", 1, 1.0),
    ("run_time_max", 0.25, 0.25),
    ("run_time_max", fractions.Fraction(1, 2), 0.5),
    ("priority", -3, -3),
    ("priority", Index(2), 2),
    ("slurm_cmd_args", ["--mem=4G"], ("--mem=4G",)),
    ("slurm_cmd_args", (), ()),
    ("submission_template", "#!/bin/sh", "#!/bin/sh"),
    ("openmpi_oversubscribe", True, True),
]

BAD: list[tuple[str, Any, type[Exception], str]] = [
    *((key, bad, TypeError, "expected an int") for key in ("cores", "priority") for bad in (True, "2", 2.0, [1])),
    *((key, 0, ValueError, "is 0, expected an int of at least 1") for key in ("cores", "threads_per_core")),
    ("num_nodes", 0, ValueError, "at least 1"),
    ("num_nodes", -1, ValueError, "is -1, expected an int of at least 1"),
    ("gpus_per_core", -1, ValueError, "at least 0"),
    ("gpus_per_core", False, TypeError, "at least 0"),
    *(
        (key, bad, TypeError, "expected a path")
        for key in ("cwd", "cache_directory", "error_log_file")
        for bad in (3, "", b"/bytes", ["/a"])
    ),
    *((key, bad, TypeError, "non-empty str") for key in ("cache_key", "submission_template") for bad in (3, "", b"a")),
    *((key, bad, TypeError, "True or False") for key in ("exclusive", "openmpi_oversubscribe") for bad in (1, "yes")),
    *(("run_time_max", bad, TypeError, "number of seconds") for bad in (True, "60", [1], decimal.Decimal(1))),
    *(("run_time_max", bad, ValueError, "above 0") for bad in (0, -1.5, 1e10, math.inf, math.nan)),
    ("submission_template", "a\0b", ValueError, "null character"),
    ("cwd", "/a\0b", ValueError, "null character"),
    ("slurm_cmd_args", ["--comment=\0"], ValueError, "null character"),
    ("slurm_cmd_args", "--mem=4G", TypeError, "expected a list of str"),
    ("slurm_cmd_args", {"--mem": "4G"}, TypeError, "expected a list of str"),
    ("slurm_cmd_args", ["--mem", 4], TypeError, r"'slurm_cmd_args'\]\[1\] is 4"),
]


@pytest.mark.parametrize(("key", "value", "expected"), GOOD)
def test_good_value(key: str, value: Any, expected: Any) -> None:
    changed = Resources().updated({key: value}, "call of 'f'")
    assert getattr(changed, key) == expected
    assert type(getattr(changed, key)) is type(expected)
    assert dataclasses.replace(changed, **{key: getattr(Resources(), key)}) == Resources()  # and nothing else


@pytest.mark.parametrize(("key", "value", "error", "text"), BAD)
def test_bad_value(key: str, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        Resources().updated({key: value}, "call of 'f'")
    assert str(caught.value).startswith(f"call of 'f': resource_dict['{key}']")


TYPES = typing.get_type_hints(ResourceDict)


def test_every_key_has_a_type() -> None:
    assert TYPES.keys() == set(KEYS)
    assert {**typing.get_type_hints(OneRank), "cores": TYPES["cores"]} == TYPES
    assert not ResourceDict.__required_keys__ | OneRank.__required_keys__


def fits(kind: Any, value: object) -> bool:
    """Return whether a type checker accepts a value, except that it counts bool as int and float."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(each, value) for each in typing.get_args(kind))
    if origin in (list, tuple):
        return isinstance(value, origin) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else origin or kind)


@pytest.mark.parametrize(("key", "value"), [*((key, value) for key, value, _ in GOOD), *((key, None) for key in KEYS)])
def test_type_takes_good_value(key: str, value: Any) -> None:
    if not isinstance(value, fractions.Fraction):  # of real numbers beyond float, type checkers know nothing
        assert fits(TYPES[key], value)


@pytest.mark.parametrize(("key", "value"), [(key, bad) for key, bad, error, _ in BAD if error is TypeError and bad])
def test_type_refuses_value_of_wrong_type(key: str, value: Any) -> None:
    assert not fits(TYPES[key], value)


def test_every_key_is_tested() -> None:
    assert {key for key, *_ in GOOD} == {key for key, *_ in BAD} == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_none_stands_for_as_before(key: str) -> None:
    [value] = [value for good, value, _ in GOOD if good == key][-1:]
    before = Resources().updated({key: value}, "f")
    assert before.updated({key: None}, "f") == before


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("core", "cores"),
        ("Cores", "cores"),
        ("thread_per_core", "threads_per_core"),
        ("gpu_per_core", "gpus_per_core"),
        ("runtime_max", "run_time_max"),
        ("cache_dir", "cache_directory"),
        ("prio", "priority"),
        ("exclusiv", "exclusive"),
        ("nodes", "num_nodes"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"call of 'f': unknown key '{key}' in resource_dict; did you mean '{near}'"):
        Resources().updated({key: 1}, "call of 'f'")


@pytest.mark.parametrize(("key", "text"), [("memory_max", "submit jobs"), ("pmi_mode", "argument of executors")])
def test_key_of_other_executors_says_so(key: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"call of 'f': {key!r} .*{text}"):
        Resources().updated({key: 1}, "call of 'f'")


@pytest.mark.parametrize("key", ["zzzzzz", 7, None])
def test_unknown_key_without_a_similar_one_lists_all(key: object) -> None:
    with pytest.raises(ValueError, match="unknown key") as caught:
        Resources().updated({key: 1}, "f")  # type: ignore[dict-item]
    assert all(known in str(caught.value) for known in KEYS)


def test_unknown_key_is_an_error_even_with_none() -> None:
    with pytest.raises(ValueError, match="did you mean 'cores'"):
        Resources().updated({"core": None}, "f")


@pytest.mark.parametrize("changes", [[("cores", 2)], "cores", 3])
def test_not_a_mapping(changes: Any) -> None:
    with pytest.raises(TypeError, match=f"a {type(changes).__name__}, expected a dict"):
        Resources().updated(changes, "f")


def test_documented_once_and_all() -> None:
    documentation = Resources.__doc__ or ""
    assert [key for key in KEYS if documentation.count(f" {key}: ") != 1] == []


good_changes = st.lists(st.sampled_from(GOOD)).map(lambda chosen: {key: value for key, value, _ in chosen})


@repeatable
@given(good_changes, good_changes)
def test_updated_changes_no_input(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Neither the dictionaries nor the resources change, and the later dictionary wins."""
    before = Resources().updated(first, "f")
    copies = copy.copy(before), copy.deepcopy(second)
    after = before.updated(second, "f")
    assert copies[0] == before
    assert list(copies[1]) == list(second)
    assert all(type(one) is type(other) for one, other in zip(copies[1].values(), second.values(), strict=True))
    assert after == Resources().updated({**first, **second}, "f")


def test_lists_are_copied() -> None:
    arguments = ["--mem=4G"]
    changes = {"slurm_cmd_args": arguments}
    resources = Resources().updated(changes, "f")
    arguments.append("--qos=high")
    assert resources.slurm_cmd_args == ("--mem=4G",)
    resources.as_dict()["slurm_cmd_args"].append("--qos=high")
    assert resources.slurm_cmd_args == ("--mem=4G",)
    assert changes == {"slurm_cmd_args": ["--mem=4G", "--qos=high"]}


def test_nothing_changed_is_the_same_object() -> None:
    resources = Resources()
    assert resources.updated({}, "f") is resources


@repeatable
@given(good_changes)
def test_as_dict_and_back(changes: dict[str, Any]) -> None:
    resources = Resources().updated(changes, "f")
    values = resources.as_dict()
    assert None not in values.values()
    assert Resources().updated(values, "f") == resources


@pytest.mark.parametrize(
    ("changes", "demand"),
    [
        ({}, Demand(1, 0, False)),
        ({"cores": 3}, Demand(3)),
        ({"threads_per_core": 4}, Demand(4)),
        ({"cores": 2, "threads_per_core": 3, "gpus_per_core": 2}, Demand(6, 4)),
        ({"exclusive": True}, Demand(1, 0, True)),
    ],
)
def test_demand(changes: dict[str, Any], demand: Demand) -> None:
    assert Resources().updated(changes, "f").demand == demand


@pytest.mark.parametrize(
    ("changes", "nodes", "demand"),
    [
        ({"cores": 3}, 1, Demand(3)),
        ({"cores": 3, "threads_per_core": 2, "gpus_per_core": 1}, 2, Demand(6, 3, False, 2, 3)),
        ({"cores": 5, "threads_per_core": 2, "exclusive": True}, 4, Demand(10, 0, True, 4, 5)),
    ],
)
def test_demand_over_several_nodes(changes: dict[str, Any], nodes: int, demand: Demand) -> None:
    assert Resources().updated(changes, "f").demand_over(nodes) == demand


def test_resources_that_are_sent() -> None:
    """These go to where the process starts. Files, nodes and scripts were dealt with before."""
    assert Resources().sent == {}
    more = {"cache_key": "x", "num_nodes": 2, "slurm_cmd_args": ["--quiet"], "submission_template": "x", "queue": "y"}
    resources = Resources().updated({"cores": 2, "cwd": "/", "priority": -1, **more}, "f", allow_template_keys=True)
    assert resources.sent == {"cores": 2, "cwd": "/", "priority": -1}
    assert Resources().updated(resources.sent, "f") == Resources(cores=2, cwd="/", priority=-1)


def test_unknown_keys_go_to_the_template() -> None:
    before = Resources().updated({"partition": "short", "memory_max": 2.5}, "f", allow_template_keys=True)
    after = before.updated({"partition": "long", "cores": 2, "account": None}, "f", allow_template_keys=True)
    assert after.template_values == {"partition": "long", "memory_max": 2.5}
    assert after.as_dict()["partition"] == "long"
    assert "template_keys" not in after.as_dict()
    assert hash(after) != hash(before)


def test_unknown_keys_hold_plain_values() -> None:
    with pytest.raises(TypeError, match=r"partition.*str or a number"):
        Resources().updated({"partition": ["short"]}, "f", allow_template_keys=True)
