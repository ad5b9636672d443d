"""The worst completions and tokens, against a plain sort; disagreement, against whole rows."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from opdcache.audit.blocks import Block, blocks
from opdcache.audit.run import audit
from opdcache.audit.sums import Sums
from opdcache.audit.targets import of_run
from opdcache.audit.worst import Found, Largest, Measure, Place, Worst, disagreement
from opdcache.store.cache import data_prefix

from .audited import Made, add_round, make_run
from .dense import Distributions, block_of, distributions

LENGTHS = (9, 30, 1, 17, 0, 4)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Two rounds of two shards."""
    made = make_run(tmp_path)
    for index in range(2):
        add_round(made, index, [distributions(*LENGTHS, seed=2 * index + i) for i in range(2)])
    return made


@dataclass(frozen=True)
class Listed:
    """A token as a plain loop sees it."""

    part: str
    shard: str
    row: int
    position: int
    values: dict[Measure, float]


def every_token(made: Made) -> list[Listed]:
    found, target = [], of_run(made.path)
    for part in target.parts:
        for shard in part.shards:
            for block in blocks(target.cache, shard):
                apart, advantages = disagreement(block), block.advantages
                assert apart is not None
                assert advantages is not None
                for t, row in enumerate(block.rows.tolist()):
                    values: dict[Measure, float] = {
                        "advantage": float(advantages[t]),
                        "disagreement": float(apart[t]),
                    }
                    position = t - int(block.offsets[row])
                    place = part.name, shard.name, block.first_row + row
                    found.append(Listed(*place, position, values))
    return found


def worst_of(made: Made, num: int = 5, num_random: int = 0) -> Worst:
    worst = Worst(num, num_random)
    audit(of_run(made.path), worst=worst)
    return worst


def place(found: Found, at: Place) -> tuple[str, str, int, int]:
    return found.part, found.shard.name, found.row, at.position


@pytest.mark.parametrize(("measure", "sign"), [("advantage", 1), ("disagreement", -1)])
def test_the_worst_tokens_are_the_first_of_a_plain_sort(
    made: Made, measure: Measure, sign: int
) -> None:
    expected = sorted(every_token(made), key=lambda token: sign * token.values[measure])[:5]
    found = worst_of(made).tokens(measure)
    assert [place(*one) for one in found] == [
        (t.part, t.shard, t.row, t.position) for t in expected
    ]
    assert [at.value for _, at in found] == [t.values[measure] for t in expected]


@pytest.mark.parametrize(("measure", "sign"), [("advantage", 1), ("disagreement", -1)])
def test_the_worst_completions_are_the_first_of_a_plain_sort_of_their_means(
    made: Made, measure: Measure, sign: int
) -> None:
    held: dict[tuple[str, str, int], list[float]] = {}
    for token in every_token(made):
        values = held.setdefault((token.part, token.shard, token.row), [])
        values.append(token.values[measure])
    expected = sorted(held, key=lambda name: sign * float(np.mean(held[name])))[:5]
    found = worst_of(made).completions(measure)
    assert [(one.part, one.shard.name, one.row) for one in found] == expected
    for one, name in zip(found, expected, strict=True):
        assert getattr(one, measure) == pytest.approx(np.mean(held[name]))
        assert one.num_tokens == len(held[name])
        extreme = min(held[name], key=lambda value: sign * value)
        assert one.worst[measure].value == pytest.approx(extreme)
        assert held[name][one.worst[measure].position] == pytest.approx(extreme)


def test_what_is_not_supervised_is_no_worst_case(made: Made) -> None:
    target = of_run(made.path)
    shard = target.parts[0].shards[0]
    (block,) = blocks(target.cache, shard)
    advantages = block.advantages
    assert advantages is not None
    least = int(advantages.argmin())
    supervised = block.supervised.copy()
    supervised[least] = False
    worst = Worst(1)
    worst.add(replace(block, supervised=supervised), shard, "round 0")
    ((found, at),) = worst.tokens("advantage")
    assert place(found, at)[2:] != (int(block.rows[least]), int(block.positions[least]))
    advantages[least] = np.inf
    assert at.value == pytest.approx(advantages.min())


def test_a_shard_that_cannot_be_read_has_no_worst_case(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    ((rollout, _), _) = add_round(made, 0, [distributions(*LENGTHS, seed=i) for i in range(2)])
    path = f"{data_prefix(rollout.key, rollout.attempt)}/{rollout.objects[0].path}"
    made.cache.objects.delete(path)
    shards = {found.shard.name for found, _ in worst_of(made, 50).tokens("advantage")}
    assert len(shards) == 1
    assert rollout.key[:12] not in shards


def test_those_at_random_are_the_same_every_time_and_of_all(made: Made) -> None:
    first, again = (worst_of(made, 1, 8).drawn() for _ in range(2))
    assert first == again
    assert len({(one.shard.name, one.row) for one in first}) == 8
    assert len({one.part for one in first}) == 2
    everything = worst_of(made, 1, 1000).drawn()
    assert len(everything) == 4 * len(LENGTHS)
    assert everything[:8] == first


def test_of_equal_values_the_earlier_stay() -> None:
    held = Largest[str](2)
    for value, name in [(1, "a"), (2, "b"), (1, "c"), (2, "d"), (2, "e")]:
        held.add(value, name)
    other = Largest[str](2)
    other.add(2, "f")
    held.merge(other)
    assert held.items() == ("b", "d")
    assert Largest[str](0).items() == ()


def least_distance(one: Distributions, k: int, recorded: int, given: bool) -> list[float]:
    """By hand, id by id, of what is stored of each token."""
    found = []
    for p, q in zip(np.exp(one.p), np.exp(one.q), strict=True):
        ours, theirs = (np.argsort(-v, kind="stable")[:n] for v, n in ((p, recorded), (q, k)))
        most_p = min(p[ours].min(), 1 - p[ours].sum())
        most_q = min(q[theirs].min(), 1 - q[theirs].sum())
        above = sum(max(0.0, p[v] - (q[v] if given or v in theirs else most_q)) for v in ours)
        below = sum(max(0.0, q[v] - (p[v] if v in ours else most_p)) for v in theirs)
        found.append(max(above, below))
    return found


def without_recorded_scores(block: Block) -> Block:
    return replace(block, scores=replace(block.scores, student_topk=None))


@pytest.mark.parametrize(("k", "recorded"), [(16, 16), (8, 4), (3, 20), (1, 1)])
def test_disagreement_is_the_sum_of_what_is_stored(k: int, recorded: int) -> None:
    one = distributions(40, apart=2)
    block = block_of(one, k=k, recorded=recorded)
    assert disagreement(block) == pytest.approx(least_distance(one, k, recorded, True), abs=1e-6)
    found = disagreement(without_recorded_scores(block))
    assert found == pytest.approx(least_distance(one, k, recorded, False), abs=1e-6)


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0, 20.0])
def test_disagreement_is_at_most_the_total_variation_distance_and_is_it_of_all_ids(
    apart: float,
) -> None:
    one = distributions(50, apart=apart)
    whole = np.abs(np.exp(one.p) - np.exp(one.q)).sum(axis=1) / 2
    for k in (1, 4, 16):
        found = disagreement(without_recorded_scores(block_of(one, k=k, recorded=k)))
        assert found is not None
        assert (found <= whole + 1e-6).all()
    everything = disagreement(block_of(one, k=60, recorded=60))
    assert everything == pytest.approx(whole, abs=1e-5)


def test_two_that_share_no_entry_disagree_though_nothing_is_compared() -> None:
    one = distributions(4)
    apart = np.full((4, 60), -12.0)
    p, q = apart.copy(), apart.copy()
    p[:, :2] = np.log(0.5 - 29 * np.exp(-12))
    q[:, 2:4] = p[:, :2]
    found = disagreement(block_of(replace(one, p=p, q=q), k=2, recorded=2))
    assert found == pytest.approx(np.ones(4), abs=1e-3)


def test_without_either_model_s_entries_there_is_no_disagreement() -> None:
    block = block_of(distributions(4))
    assert disagreement(replace(block, student=None)) is None
    assert disagreement(replace(block, scores=replace(block.scores, topk=None))) is None


def test_chunks_made_one_have_the_sums_of_all_in_them() -> None:
    random, sums, coarse = np.random.default_rng(0), Sums(), Sums()
    values, chunks = random.normal(size=100), random.integers(11, size=100)
    sums.add("x", values, chunks)
    coarse.add("x", values, chunks // 4)
    assert sums.coarser(4).num_chunks == 3
    for chunk in range(3):
        assert sums.coarser(4).mean("x", chunk) == pytest.approx(coarse.mean("x", chunk))
    assert sums.coarser(4).num("x") == 100


def test_an_audit_makes_its_chunks_as_long_as_needed(made: Made) -> None:
    target = of_run(made.path)
    found = audit(target, chunk_tokens=2, max_chunks=4)
    assert found.chunk_tokens == 8
    plain = audit(target, chunk_tokens=8)
    for one, other in zip(found.parts, plain.parts, strict=True):
        assert len(one.by_position) == 4
        for ours, theirs in zip(one.by_position, other.by_position, strict=True):
            assert ours.model_dump() == pytest.approx(theirs.model_dump(), nan_ok=True)
