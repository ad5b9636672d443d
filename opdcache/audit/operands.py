"""What ``opdcache compare`` is told to look at: runs, single rounds, references, keys."""

import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import UsageError
from .targets import Shard, Target, target

FORMS = "RUN.yaml, RUN.yaml@ROUND, RUN.yaml#REFERENCE, RUN.yaml@ROUND#REFERENCE, or a KEY"
_RUN = re.compile(r"(?P<file>.+?\.ya?ml)(?:@(?P<round>[^#/]*))?(?:#(?P<reference>[^/]*))?")


def operand(text: str, cache: str | None) -> Target:
    """A run's scored rounds, one of them, a reference's scores of either, or a key's shard.

    Args:
        cache: where a key is looked up.

    Raises:
        UsageError: it is none of these, or names no shard or several.
        InputsMissing: the run has no such scored round.
    """
    named = _RUN.fullmatch(text)
    if named is None:
        if not re.fullmatch("[0-9a-f]+", text):
            raise UsageError(f"{text!r} names nothing to compare", expected=FORMS)
        return replace(target([text], cache=cache, rounds=[]), name=text)
    rounds, reference = named["round"], named["reference"]
    if rounds is not None and not (rounds.isascii() and rounds.isdigit()):
        raise UsageError(f"{rounds!r} is no round", where=text, expected=FORMS)
    if reference == "":
        raise UsageError("the reference has no name", where=text, expected=FORMS)
    chosen = [] if rounds is None else [int(rounds)]
    found = target([named["file"]], cache=cache, rounds=chosen, reference=reference)
    return replace(found, name=text)


def by_content(of: Target) -> Mapping[str, Shard]:
    """A target's shards by their rollouts; of rollouts that come again the first.

    Raises:
        UsageError: two models' scores of the same rollouts are in it.
    """
    held = dict[str, Shard]()
    for part in of.parts:
        for shard in part.shards:
            first = held.setdefault(shard.scored.rollouts.content, shard)
            if first.scored.teacher != shard.scored.teacher:
                raise UsageError(
                    f"several models scored the rollouts {shard.name}",
                    where=of.name,
                    remedy="name one score set: 'opdcache cache ls' shows their keys",
                )
    return held
