"""Finding completions: by name, by prompt, and those to look at first."""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..schemas.inspection import Listed, Listing, TokenValue
from ..store import rollouts as tables
from ..store.cache import Cache
from .blocks import blocks
from .rows import Texts
from .targets import Part, Shard, Target
from .worst import Found, Measure, Seen, Worst


class Place(NamedTuple):
    """A stored completion.

    Attributes:
        part: name of the round or key.
        row: of the shard.
    """

    part: str
    shard: Shard
    row: int


def named(target: Target, name: str) -> Place:
    """The completion that ``SHARD:ROW`` names, or the N-th of the only round or key.

    Raises:
        UsageError: it names none, or there are several rounds to count in.
    """
    said = re.fullmatch(r"(?:([0-9a-f]+):)?([0-9]+)", name)
    if said is None:
        raise UsageError(f"{name!r} names no row", expected="SHARD:ROW as lists show it, or N")
    start, number = said[1], int(said[2])
    places = _places(target)
    if start is not None:
        places = [(part, s) for part, s in places if s.scored.rollouts.key.startswith(start)]
        if len(places) != 1:
            raise UsageError(f"{len(places)} shards start with {start}", where=target.name)
    elif len(target.parts) != 1:
        raise UsageError(
            f"row {name} of which round?",
            where=target.name,
            expected=", ".join(part.name for part in target.parts),
            remedy="give --round, or SHARD:ROW as lists show it",
        )
    left = number
    for part, shard in places:
        if left < shard.scored.rollouts.num_rows:
            return Place(part.name, shard, left)
        left -= shard.scored.rollouts.num_rows
    num = number - left
    raise UsageError(
        f"there is no row {name}",
        where=target.name,
        expected=f"0 to {num - 1}" if num else "none: there are no completions",
    )


def first(target: Target, num: int) -> list[Found]:
    """The first few completions."""
    return list(islice(_every(target), num))


def worst(target: Target, by: Measure, num: int) -> list[Found]:
    """The few completions that are worst by a measure, worst first; all of them are read.

    Raises:
        UsageError: what is stored gives the measure of none.
    """
    kept = Worst(num)
    for part, shard in _places(target):
        for block in blocks(target.cache, shard):
            kept.add(block, shard, part.name)
    found = list(kept.completions(by))
    if not found:
        raise UsageError(
            f"nothing that is stored tells the {by}",
            where=target.name,
            remedy="it takes the teacher's log-probs of the sampled tokens, and the student's"
            if by == "advantage"
            else "it takes likeliest entries of the student and of the teacher",
        )
    return found


def of_prompt(target: Target, prompt_id: str) -> list[Found]:
    """A prompt's completions, in order; only prompt ids are looked at of the others.

    Raises:
        UsageError: no completion is of such a prompt.
    """
    found, known = list[Found](), set[str]()
    for part, shard in _places(target):
        for row, held in enumerate(_prompt_ids(target.cache, shard)):
            known.add(held)
            if held == prompt_id:
                found.append(_found(target.cache, part, shard, row))
    if not found:
        near = difflib.get_close_matches(prompt_id, known, n=3, cutoff=0.5) or sorted(known)[:3]
        raise UsageError(
            f"no completion is of a prompt {prompt_id!r}",
            where=target.name,
            remedy=f"near ones: {', '.join(map(repr, near))}" if near else "there are none at all",
        )
    return found


def listing(target: Target, found: Sequence[Found], texts: Texts) -> Listing:
    """Completions as a list, with the texts of the tokens that they are judged by."""
    wanted, shards = defaultdict[str, set[int]](set), dict[str, Shard]()
    for one in found:
        wanted[one.shard.name].add(one.row)
        shards[one.shard.name] = one.shard
    ids = {
        (name, row): held
        for name, rows in wanted.items()
        for row, held in _token_ids(target.cache, shards[name], rows)
    }

    def worst_token(one: Found, measure: Measure) -> TokenValue | None:
        at = one.worst.get(measure)
        if at is None:
            return None
        id = ids[one.shard.name, one.row][at.position]
        return TokenValue(position=at.position, id=id, text=texts.token(id), value=at.value)

    return Listing(
        of=target.name,
        rows=tuple(
            Listed(
                row=f"{one.shard.name}:{one.row}",
                part=one.part,
                rollout_id=one.rollout_id,
                num_tokens=one.num_tokens,
                advantage=one.advantage,
                worst=worst_token(one, "advantage"),
                disagreement=one.disagreement,
                farthest=worst_token(one, "disagreement"),
            )
            for one in found
        ),
    )


def _places(target: Target) -> list[tuple[Part, Shard]]:
    """All shards.

    Raises:
        UsageError: several teachers scored the shard of a key.
    """
    if target.config is None and len(target.parts) > 1:
        sets = ", ".join(part.shards[0].scored.served[0].key[:12] for part in target.parts)
        raise UsageError(
            f"{len(target.parts)} teachers scored these rollouts",
            where=target.name,
            remedy=f"give the key of one's score set: {sets}",
        )
    return [(part, shard) for part in target.parts for shard in part.shards]


def _every(target: Target) -> Iterator[Found]:
    for part, shard in _places(target):
        for block in blocks(target.cache, shard):
            yield from Seen.of(block).every(shard, part.name)


def _found(cache: Cache, part: Part, shard: Shard, row: int) -> Found:
    (block,) = blocks(cache, shard, row)
    return Seen.of(block).found(row - block.first_row, shard, part.name)


def _prompt_ids(cache: Cache, shard: Shard) -> Iterator[str]:
    opened = cache.open_rollouts(cache.need_rollouts(shard.scored.rollouts), whole=False)
    for number in range(len(opened.starts) - 1):
        yield from opened.group(number).column("prompt_id").to_pylist()


def _token_ids(cache: Cache, shard: Shard, rows: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    """Of some rows; what holds them alone is read."""
    opened = cache.open_rollouts(cache.need_rollouts(shard.scored.rollouts), whole=False)
    by_group = defaultdict[int, list[int]](list)
    for row in sorted(rows):
        by_group[int(np.searchsorted(opened.starts, row, side="right")) - 1].append(row)
    for number, held in by_group.items():
        lists = tables.token_lists(opened.group(number), "completion_token_ids")
        for row in held:
            yield row, lists[row - int(opened.starts[number])].tolist()
