"""Samples of a round, in a seeded global order, as tensors.

The order depends on the seed, the round and the shards alone, never on the number of ranks or the
size of a micro-batch; so a run resumes at the exact sample.

Legend: B sequences, L padded length, T completion tokens of the micro-batch, K teacher entries,
S recorded student entries, N drawn ids.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..outcomes import Outcome, advantages, rewards
from ..quality import faults
from ..schemas.columns import ScoreColumn
from ..schemas.manifests import Quality
from ..schemas.rounds import RolloutRound, ScoredShard, ScoreRound
from ..schemas.training import Layout
from ..store import rollouts as shards
from ..store.cache import Cache
from ..store.scores import Draws, Scores, TopK
from .dealing import cut, deal
from .microbatch import LAYOUTS, Fed, MicroBatch, alike
from .weights import TokenRule

_SHARDS_IN_MEMORY = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One decoded shard: rollouts and the teacher's scores of them, on one token axis."""

    prompts: Sequence[NDArray[np.int32]]
    completions: Sequence[NDArray[np.int32]]
    sampling_logprobs: NDArray[np.float32] | None
    recorded_ids: NDArray[np.int64] | None
    supervised: NDArray[np.bool_]
    scores: Scores
    reference: Scores | None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[N + 1]: where each completion's tokens are on the token axis."""
        return self.scores.token_offsets


class _Size(NamedTuple):
    """What is known of a sample without its scores.

    Attributes:
        prompt: number of the prompt; samples of the same token ids have the same.
        num_prompt: its tokens.
        num_fed: tokens that the model reads: all before the last supervised one.
        num_tokens: supervised tokens.
        longest: places of the completion up to the last of them.
        weight: see ``TokenRule.total``.
        is_empty: whether the completion has no token.
    """

    prompt: int
    num_prompt: int
    num_fed: int
    num_tokens: int
    longest: int
    weight: float
    is_empty: bool


class RoundSamples:
    """All samples of a round.

    What the samples' sizes are is read once, shard by shard; scores are read when a micro-batch is
    put together. Columns that not all of the round's shards have are left out.

    Args:
        k: teacher and recorded entries a token that the loss looks at.
        mass: teacher entries are used until they hold this; a set that serves may hold more.
        rule: which tokens are supervised, beside the loss mask, and their weights.
        layout: of a micro-batch's sequences.
        reference: name of the round's reference whose scores are read too.
        outcome: rewards the completions.
    """

    def __init__(
        self,
        cache: Cache,
        rollouts: RolloutRound,
        scores: ScoreRound,
        k: int,
        mass: float = 1.0,
        rule: TokenRule = TokenRule(),  # noqa: B008  # it is frozen
        layout: Layout = "padded",
        reference: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        self._cache, self._rollouts, self._scores = cache, rollouts.shards, scores
        self._by_reference = scores.references[reference] if reference else ()
        self._columns, self._reference_columns = _common(scores.shards), _common(self._by_reference)
        self._k, self._mass, self._rule, self._layout = k, mass, rule, layout
        self._outcome = outcome
        rows = [shard.num_rows for shard in self._rollouts]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._shard = lru_cache(maxsize=_SHARDS_IN_MEMORY)(self._read)
        self._by_rule = {rule: self}

    def under(self, rule: TokenRule) -> "RoundSamples":
        """The same samples under another rule; what is decoded of them is held once."""
        if rule not in self._by_rule:
            other = self._by_rule[rule] = copy(self)
            other._rule = rule
            vars(other).pop("_sizes", None)
        return self._by_rule[rule]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, seed: int, round_index: int, epochs: int) -> list[int]:
        """Sample indexes in training order: a new permutation an epoch, of the samples or, where
        they are to share them, of the prompts."""
        rng = np.random.default_rng([seed, round_index])
        together = self._alike(range(len(self)))
        drawn = (rng.permutation(len(together)) for _ in range(epochs))
        return [sample for epoch in drawn for i in epoch for sample in together[i]]

    def micro_batches(self, samples: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Samples with tokens to supervise, grouped by length under a budget of tokens fed, padding
        included."""
        return cut(self._rows(samples, max_tokens), self._length, max_tokens, self._layout)

    def dealt(self, samples: Sequence[int], num_ranks: int) -> list[list[int]]:
        """Samples with tokens to supervise, to each rank about as many tokens to feed; those that
        share a prompt's row to the same one, unless they are more than a rank's part."""
        whole = sum(self._length(row) for row in self._rows(samples))
        return deal(self._rows(samples, -(-whole // num_ranks)), self._length, num_ranks)

    def num_tokens(self, samples: Sequence[int]) -> int:
        """Supervised tokens of the samples."""
        return sum(self._num_tokens(i) for i in samples)

    def longest(self, samples: Sequence[int]) -> int:
        """Places of a completion, up to the last supervised one, at most."""
        return max((self._sizes[i].longest for i in samples), default=0)

    def weight(self, samples: Sequence[int]) -> float:
        """What the loss of the samples is to be divided by; see ``TokenRule.total``."""
        return sum(self._sizes[i].weight for i in samples)

    def prompt(self, sample: int) -> int:
        """Number of a sample's prompt; samples of the same prompt have the same."""
        return self._sizes[sample].prompt

    def asked(self) -> list[tuple[NDArray[np.int32], str | None]]:
        """Token ids and reference answer, the first there is, of every prompt, by its number."""
        found = dict[bytes, tuple[NDArray[np.int32], str | None]]()
        for ids, answer in self._texts("prompt_token_ids", "answer"):
            prompt = np.array(ids, np.int32)
            known = found.setdefault(prompt.tobytes(), (prompt, answer))
            if known[1] is None and answer is not None:
                found[prompt.tobytes()] = prompt, answer
        return list(found.values())

    def reward(self, samples: Sequence[int]) -> float | None:
        """Mean reward of the samples; None without an outcome."""
        found = self._rewards
        return None if found is None else float(found[list(samples)].mean())

    def why_dropped(self, sample: int) -> str | None:
        """Why a sample cannot be trained on; None when it can."""
        if self._num_tokens(sample):
            return None
        return "empty completion" if self._sizes[sample].is_empty else "no supervised token"

    def unfit(self, drop: Collection[Quality]) -> dict[int, Quality]:
        """Samples that have one of these faults, each with the first that it has."""
        if not drop:
            return {}
        found = {}
        for sample, (finish_reason, text) in enumerate(self._texts("finish_reason", "text")):
            mine = [fault for fault in faults(finish_reason, text) if fault in drop]
            if mine:
                found[sample] = mine[0]
        return found

    def _texts(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Columns of every completion; None of one that its shard lacks."""
        for listed in self._rollouts:
            table = self._cache.read_rollouts(self._cache.need_rollouts(listed))
            nothing = [None] * table.num_rows
            held = table.column_names
            columns = (table.column(n).to_pylist() if n in held else nothing for n in names)
            yield from zip(*columns, strict=True)

    def where(self, sample: int) -> str:
        """A sample's place in the cache, for people."""
        shard, row = self._place(sample)
        return f"rollout shard {self._rollouts[shard].key[:12]} row {row}"

    def collate(self, samples: Sequence[int]) -> MicroBatch:
        """Tensors of the samples; every sample has tokens to supervise."""
        pieces = [self._piece(i) for i in samples]
        laid = LAYOUTS[self._layout]([p.fed for p in pieces])
        sequences = [np.full(len(p.within), i) for i, p in enumerate(pieces)]
        placed = list(zip(pieces, laid.starts, strict=True))

        def needed(values: Sequence[NDArray[Any]]) -> Tensor:
            return torch.from_numpy(np.concatenate(values))

        def joined(values: Sequence[NDArray[Any] | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            assert len(present) in (0, len(pieces)), "a round's shards have the same columns"
            return needed(present) if present else None

        width = min(self._k, self._recorded[1])
        topk = [found for p in pieces if (found := p.topk(self._k, self._mass)) is not None]
        recorded = [own for p in pieces if (own := p.recorded(width)) is not None]
        draws = [drawn for p in pieces if (drawn := p.draws()) is not None]
        return MicroBatch(
            num_sequences=len(pieces),
            input_ids_BL=torch.from_numpy(laid.ids),
            position_ids_BL=None if laid.positions is None else torch.from_numpy(laid.positions),
            branches_BL=None if laid.branches is None else torch.from_numpy(laid.branches),
            rows_T=needed([np.full_like(p.within, start.row) for p, start in placed]),
            columns_T=needed([start.before(p.within) for p, start in placed]),
            sequences_T=needed(sequences),
            places_T=needed([p.within for p in pieces]),
            weights_T=needed([p.weights for p in pieces]),
            sampled_T=needed([p.completion[p.within].astype(np.int64) for p in pieces]),
            sampling_T=joined([p.sampling() for p in pieces]),
            teacher_sampled_T=joined([p.score("sampled_logprobs") for p in pieces]),
            teacher_entropy_T=joined([p.score("entropy") for p in pieces]),
            topk_ids_TK=joined(alike([t.ids.astype(np.int64) for t in topk])),
            topk_TK=joined(alike([t.logprobs for t in topk])),
            kept_TK=joined(alike([t.kept for t in topk])),
            tail_T=joined([t.tail_logprobs for t in topk]),
            recorded_ids_TS=joined([r[0] for r in recorded]),
            recorded_TS=joined([r[1] for r in recorded]),
            recorded_tail_T=joined([r[2] for r in recorded]),
            draw_ids_TN=joined(alike([d.ids.astype(np.int64) for d in draws])),
            draw_counts_TN=joined(alike([d.counts.astype(np.int64) for d in draws])),
            reference_sampled_T=joined([p.reference_sampled() for p in pieces]),
            reference_recorded_TS=joined([p.reference_recorded(width) for p in pieces]),
            advantage_T=self._advantage(samples, [len(p.within) for p in pieces]),
        )

    def _place(self, sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def _piece(self, sample: int) -> "_Piece":
        shard, row = self._place(sample)
        return _Piece(self._shard(shard), row, self._rule)

    def _num_tokens(self, sample: int) -> int:
        return self._sizes[sample].num_tokens

    def _alike(self, samples: Iterable[int]) -> list[list[int]]:
        """Samples as they stand in rows: each alone, or with those of the same prompt."""
        if self._layout != "shared":
            return [[sample] for sample in samples]
        rows: dict[int, list[int]] = {}
        for sample in samples:
            rows.setdefault(self._sizes[sample].prompt, []).append(sample)
        return list(rows.values())

    def _rows(self, samples: Iterable[int], max_tokens: int | None = None) -> list[list[int]]:
        """Samples with tokens to supervise as rows; a row of several that would be longer than
        ``max_tokens`` is cut into more."""
        rows = []
        for together in self._alike(i for i in samples if self._num_tokens(i)):
            row = list[int]()
            for sample in together:
                if row and max_tokens is not None and self._length([*row, sample]) > max_tokens:
                    rows.append(row)
                    row = []
                row.append(sample)
            rows.append(row)
        return rows

    def _length(self, row: Sequence[int]) -> int:
        """Tokens fed of a row: its prompt's, and its completions'."""
        sizes = [self._sizes[sample] for sample in row]
        return sizes[0].num_prompt + sum(size.num_fed - size.num_prompt for size in sizes)

    @cached_property
    def _sizes(self) -> list[_Size]:
        """Of every sample."""
        prompts = dict[bytes, int]()
        parts = (self._measured(index, prompts) for index in range(len(self._rollouts)))
        return [size for part in parts for size in part]

    def _measured(self, index: int, prompts: dict[bytes, int]) -> Iterator[_Size]:
        table = self._cache.read_rollouts(self._cache.need_rollouts(self._rollouts[index]))
        names = ("prompt_token_ids", "completion_token_ids")
        supervised, start = shards.supervised_tokens(table), 0
        for prompt, completion in zip(*(shards.token_lists(table, n) for n in names), strict=True):
            stop = start + len(completion)
            within = self._rule.places(completion, supervised[start:stop])
            longest = int(within[-1]) + 1 if len(within) else 0
            yield _Size(
                prompt=prompts.setdefault(prompt.tobytes(), len(prompts)),
                num_prompt=len(prompt),
                num_fed=len(prompt) + max(0, longest - 1),
                num_tokens=len(within),
                longest=longest,
                weight=self._rule.total(within),
                is_empty=not len(completion),
            )
            start = stop

    @cached_property
    def _rewards(self) -> NDArray[np.float64] | None:
        """Of every sample."""
        if self._outcome is None:
            return None
        return rewards(self._outcome, self._texts("text", "answer"), self.where)

    @cached_property
    def _advantages(self) -> NDArray[np.float64] | None:
        """Of every sample."""
        found = self._rewards
        return None if found is None else advantages(found, [size.prompt for size in self._sizes])

    def _advantage(self, samples: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        """Of the tokens of some samples, [T]."""
        found = self._advantages
        if found is None:
            return None
        return torch.from_numpy(np.repeat(found[list(samples)], counts).astype(np.float32))

    @cached_property
    def _recorded(self) -> tuple[bool, int]:
        """Whether all shards have the log-probs of sampling, and how many entries of the student's
        top-k all have."""
        found = self._cache.objects.each(self._cache.need_rollouts, self._rollouts)
        identities = [manifest.identity for manifest in found]
        return (
            all("sampling_logprobs" not in identity.absent for identity in identities),
            min((identity.student_topk for identity in identities), default=0),
        )

    def _read_scores(
        self,
        scored: ScoredShard,
        columns: frozenset[ScoreColumn],
        completions: Sequence[NDArray[np.int32]],
    ) -> Scores:
        if not columns:
            return Scores(np.cumsum([0, *map(len, completions)]))
        wanted = [(sets, [c for c in sets.columns if c in columns]) for sets in scored.served]
        served = [sets.model_copy(update={"columns": tuple(c)}) for sets, c in wanted if c]
        return self._cache.open_score_set(scored.content, scored.teacher, served).read()

    def _read(self, index: int) -> Shard:
        listed, scored = self._rollouts[index], self._scores.shards[index]
        table = self._cache.read_rollouts(self._cache.need_rollouts(listed))
        has_sampling, num_recorded = self._recorded
        completions = shards.token_lists(table, "completion_token_ids")
        return Shard(
            prompts=shards.token_lists(table, "prompt_token_ids"),
            completions=completions,
            sampling_logprobs=(
                shards.flat_tokens(table, "sampling_logprobs", np.float32) if has_sampling else None
            ),
            recorded_ids=(
                shards.flat_tokens(table, "student_topk_ids", np.int64) if num_recorded else None
            ),
            supervised=shards.supervised_tokens(table),
            scores=self._read_scores(scored, self._columns, completions),
            reference=(
                self._read_scores(self._by_reference[index], self._reference_columns, completions)
                if self._by_reference
                else None
            ),
        )


def _common(shards: Sequence[ScoredShard]) -> frozenset[ScoreColumn]:
    """Score columns that all shards have."""
    each = [{c for sets in scored.served for c in sets.columns} for scored in shards]
    return frozenset[ScoreColumn](each[0]).intersection(*each) if each else frozenset()


@dataclass(frozen=True, slots=True)
class _Piece:
    """One sample within its decoded shard."""

    shard: Shard
    row: int
    rule: TokenRule

    @property
    def prompt(self) -> NDArray[np.int32]:
        return self.shard.prompts[self.row]

    @property
    def completion(self) -> NDArray[np.int32]:
        return self.shard.completions[self.row]

    @property
    def fed(self) -> Fed:
        """Tokens that the model reads."""
        within = self.within
        last = int(within[-1]) if len(within) else 0
        return Fed(self.prompt, self.completion[:last])

    @property
    def within(self) -> NDArray[np.int64]:
        """Places of the supervised tokens in the completion."""
        start, stop = self.shard.offsets[self.row : self.row + 2]
        return self.rule.places(self.completion, self.shard.supervised[start:stop])

    @property
    def weights(self) -> NDArray[np.float32]:
        """How much each of them counts."""
        return self.rule.weights(self.within)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Places of the supervised tokens on the shard's token axis."""
        return self.within + int(self.shard.offsets[self.row])

    def sampling(self) -> NDArray[np.float32] | None:
        values = self.shard.sampling_logprobs
        return None if values is None else values[self.tokens]

    def score(self, name: str) -> NDArray[np.float32] | None:
        values: NDArray[np.float32] | None = getattr(self.shard.scores, name)
        return None if values is None else values[self.tokens]

    def reference_sampled(self) -> NDArray[np.float32] | None:
        scores = self.shard.reference
        sampled = None if scores is None else scores.sampled_logprobs
        return None if sampled is None else sampled[self.tokens]

    def reference_recorded(self, k: int) -> NDArray[Any] | None:
        scores = self.shard.reference
        if scores is None or scores.student_topk is None:
            return None
        return scores.student_topk.at(self.tokens).cut(k).logprobs

    def topk(self, k: int, mass: float) -> TopK | None:
        whole = self.shard.scores.topk
        return None if whole is None else whole.at(self.tokens).cut(k, mass)

    def draws(self) -> Draws | None:
        whole = self.shard.scores.draws
        return None if whole is None else whole.at(self.tokens)

    def recorded(self, k: int) -> tuple[NDArray[Any], ...] | None:
        scores = self.shard.scores.student_topk
        if scores is None or self.shard.recorded_ids is None:
            return None
        here = scores.at(self.tokens).cut(k)
        return self.shard.recorded_ids[self.tokens, :k], here.logprobs, here.tail_logprobs
