"""Cluster files and price tables of any content are checked or refused in lines, and quickly."""

import json
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import InputError
from workflows.cluster.config_file import read_cluster_file, type_problems
from workflows.cluster.cost import PRICES, read_prices
from workflows.cluster.project_files import _source

VALUES = [None, True, 0, -1, 2.5, float("nan"), "x", "", [], [1], [[]], [None], {}, {"a": 1}, {1: 2}]
FILES = ("ray_cluster.yaml", "cluster/on-prem.yaml")


def paths(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


@pytest.mark.parametrize("file", FILES)
def test_wrong_types_are_found_before_anything_else_looks_at_them(file):
    """After that, what the checks index, iterate and call is what they expect."""
    tree = yaml.safe_load(_source(file).read_text())
    text = json.dumps(tree)
    assert type_problems(tree) == []
    for path in paths(tree):
        for value in VALUES:
            changed = json.loads(text)  # without aliases
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            problems = type_problems(changed)
            assert all("\n" not in problem for problem in problems)
            mappings = ("provider", "auth", "file_mounts", "available_node_types", "metadata")
            if len(path) == 1 and path[0] in mappings and not (value is None or isinstance(value, dict)):
                assert problems


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [*a{i},*a{i}]\n" for i in range(40))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB, "values once its aliases"),
        (MERGE_BOMB, "values once its aliases"),
        ("a: &a [*a]\n", "values once its aliases"),
        ("[" * 50_000, "is not valid YAML"),
        ("a: 2001-99-99\nprovider: {type: aws}\n", "is not valid YAML"),
        ("a: " + "9" * 9999 + "\nprovider: {type: aws}\n", "is not valid YAML"),
        ("!!python/object/apply:os.system [x]", "is not valid YAML"),
        ("a: \0", "is not valid YAML"),
        ("provider: {type: [aws]}", r"provider.type \['aws'\]: give aws"),
        ("x" * 2**19, "more than the"),
        ("", "provider.type None"),
    ],
    ids=range(11),
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_cluster_file(tmp_path / "x.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_a_damaged_cluster_file_is_read_or_refused(tmp_path_factory, seed):
    rng, path = random.Random(seed), tmp_path_factory.mktemp("cluster") / "x.yaml"
    text = bytearray(_source(rng.choice(FILES)).read_bytes())
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(text))
        text[place : place + rng.randrange(3)] = rng.choice(
            [b"", b"&a ", b"*a", b": ", b"[", b"\xff", b"!!x "]
        )
    path.write_bytes(text)
    try:
        tree = read_cluster_file(path)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert all("\n" not in problem for problem in type_problems(tree))


HEADER = b"type,vcpus,gpus,usd_per_hour\n"


@pytest.mark.parametrize(
    "line",
    [
        *(b"a,1,1,nan", b"a,1,1,inf", b"a,1,1,-1", b"a,-1,1,1", b"a,1,1", b"a,1,1,1,1", b"a,1e9,1,1"),
        *(b",1,1,1", b'a,"1', b"x" * 200_000 + b",1,1,1", b"a," + b"9" * 5000 + b",1,1", b"disk,,,nan"),
    ],
    ids=range(12),
)
def test_a_bad_line_of_prices_is_named(tmp_path, line):
    (tmp_path / "p.csv").write_bytes(HEADER + b"m,1,0,2\n" + line + b"\n")
    with pytest.raises(InputError, match="line 3: give a type"):
        read_prices(tmp_path / "p.csv")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.binary(max_size=60))
def test_any_bytes_as_prices_are_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("prices") / "p.csv"
    for start in (b"", HEADER):
        path.write_bytes(start + content)
        try:
            prices = read_prices(path)
        except InputError as error:
            assert str(error).isprintable()
        else:
            assert all(0.0 <= machine.usd < 1e300 for machine in prices.machines.values())
    assert read_prices(PRICES).machines
