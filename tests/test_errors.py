"""The error tree is the one that its docstring draws; messages are one line and travel whole."""

import inspect
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest

from opdcache import errors
from opdcache.errors import OpdcacheError

PACKAGE = Path(errors.__file__).parent


def drawn() -> dict[str, tuple[str, int, str | None]]:
    """Class name to code, exit code and parent, read off the drawing; exit codes inherit."""
    tree: dict[str, tuple[str, int, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+) +(OPD\d{3})(?:  exit (\d+))?", line)
        if not found:
            continue
        branch, name, code, exit_code = found.groups()
        path = path[: len(branch) // 4]
        parent = path[-1] if path else None
        inherited = tree[parent][1] if parent else 1
        tree[name] = (code, int(exit_code or inherited), parent)
        path.append(name)
    return tree


def classes() -> list[type[OpdcacheError]]:
    """The root and everything below it, wherever it is defined."""
    found, queue = [], [OpdcacheError]
    while queue:
        found.append(queue.pop())
        queue += found[-1].__subclasses__()
    return found


def test_the_drawn_tree_is_the_tree() -> None:
    real = {
        kind.__name__: (
            kind.code,
            kind.exit_code,
            None if kind is OpdcacheError else kind.__base__.__name__,  # type: ignore[union-attr]
        )
        for kind in classes()
    }

    assert len(real) >= 17
    assert drawn() == real


def test_every_class_of_the_tree_is_defined_in_one_module_with_a_docstring() -> None:
    assert {kind.__module__ for kind in classes()} == {"opdcache.errors"}
    assert all(inspect.getdoc(kind) for kind in classes())


def test_codes_are_unique() -> None:
    counts = Counter(kind.code for kind in classes())

    assert set(counts.values()) == {1}


def test_a_class_s_code_is_in_its_parent_s_hundred() -> None:
    for kind in classes():
        parent = kind.__base__
        if parent not in (OpdcacheError, Exception):
            assert kind.code[:4] == parent.code[:4], kind  # type: ignore[union-attr]


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind.exit_code for kind in classes()} == {1, 2, 3, 75}


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_a_message_says_where_what_expected_got_and_remedy(kind: type[OpdcacheError]) -> None:
    error = kind("it broke", where=Path("a/b"), expected=3, got="four", remedy="mend it")

    assert str(error) == "a/b: it broke (expected 3, got four); mend it"


def test_a_message_without_parts_is_what_is_wrong() -> None:
    assert str(OpdcacheError("it broke")) == "it broke"


def test_a_message_can_have_only_what_was_there() -> None:
    assert str(OpdcacheError("it broke", got=0)) == "it broke (got 0)"


def test_a_message_is_one_line_whatever_is_put_in() -> None:
    error = OpdcacheError(
        "first\nsecond", where="a\r\nb", expected="x\ty", got="z\u2028z", remedy="\n\nmend\n"
    )

    assert len(str(error).splitlines()) == 1
    assert str(error) == "a b: first second (expected x y, got z z); mend"


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_whole(kind: type[OpdcacheError]) -> None:
    error = kind("it broke", where=Path("a/b"), expected=3, got="four", remedy="mend it")

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.what, again.where, again.remedy) == ("it broke", Path("a/b"), "mend it")
    assert (again.expected, again.got) == (3, "four")


def test_every_command_that_a_message_recommends_exists() -> None:
    from opdcache.cli.main import cli

    root = PACKAGE.parent
    sources = [
        file
        for folder in ("opdcache", "cli", "jobs", "schemas")
        for file in (root / folder).rglob("*.py")
    ]
    named = {
        (file.name, command)
        for file in sources
        for command in re.findall(r"'opdcache (\w+)", file.read_text())
    }

    assert named
    assert {(file, command) for file, command in named if command not in cli.commands} == set()
