"""A teacher in vLLM: log-probs of the sampled token and the likeliest ones, by prefill alone.

What would make them wrong is settled here: no prefix caching, whose hits carry no log-probs; no
detokenising; log-probs as the model has them, before any temperature. Requests go in chunks, since
the engine keeps their log-probs until the last one is done.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from ..errors import EngineError
from ..store.scores import Scores, StudentTopK, TopK
from ..vllm_engine import Engine, Logprobs
from .teacher import Ask, Batch, Sequences, by_length

LEAST_TAIL = 2.0**-23
"""Mass that float32 log-probs cannot tell from none: their sum may pass 1."""


class VllmScorer:
    """Scores completions with vLLM's prompt log-probs.

    Args:
        folder: the model, in Hugging Face format.
        dtype: dtype that it computes in.
        k: most entries a token that will be asked for.
        batch_tokens: tokens whose log-probs are held at once, at most (one sequence at least).
        arguments: more engine arguments.

    Raises:
        ConfigError: vLLM does not know an argument, or it is one that this class decides.
        EngineError: the engine does not start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        k: int,
        batch_tokens: int,
        arguments: Mapping[str, JsonValue],
    ) -> None:
        own: dict[str, JsonValue] = {
            "model": str(folder),
            "dtype": dtype,
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": k,
            "enable_prefix_caching": False,
        }
        self._engine = Engine(own, arguments, "teacher.backend.engine")
        self._batch_tokens = batch_tokens
        self._arguments = dict(arguments)

    def score(self, sequences: Sequences, ask: Ask) -> Iterator[Batch]:
        """See ``Teacher``."""
        longest = int(sequences.lengths.max(initial=0))
        if longest >= self._engine.max_model_len:
            raise EngineError(
                "a sequence does not fit the teacher's context",
                expected=f"fewer than {self._engine.max_model_len} tokens",
                got=longest,
                remedy="raise max_model_len in teacher.backend.engine",
            )
        for rows in by_length(sequences.lengths, self._batch_tokens):
            sent = [row for row in rows if len(sequences.completions[row])]
            asked = [self._request(sequences, row, ask) for row in sent]
            outputs = self._engine.generate([sequences.whole(row).tolist() for row in sent], asked)
            parts = [
                Logprobs.of(
                    o.prompt_logprobs, sequences.completions[row], len(sequences.prompts[row])
                )
                for row, o in zip(sent, outputs, strict=True)
            ]
            gathered = [
                _gathered(o.prompt_token_id_logprobs, len(sequences.completions[row]))
                for row, o in zip(sent, outputs, strict=True)
                if "student_topk" in ask.columns
            ]
            yield Batch(rows, as_scores(sequences.num_tokens[rows], parts, ask, gathered))

    def details(self) -> dict[str, JsonValue]:
        """See ``Teacher``."""
        return {"backend": "vllm", "batch_tokens": self._batch_tokens, "engine": self._arguments}

    def close(self) -> None:
        """See ``Teacher``."""
        self._engine.close()

    def _request(self, sequences: Sequences, row: int, ask: Ask) -> dict[str, Any]:
        request: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": ask.k, "detokenize": False}
        if "student_topk" in ask.columns:
            place = slice(int(sequences.offsets[row]), int(sequences.offsets[row + 1]))
            request["prompt_logprob_token_ids"] = sequences.recorded_TS[place]
            request["prompt_logprob_start"] = len(sequences.prompts[row]) - 1
        return request


def _gathered(logprobs_TS: NDArray[np.float32] | None, num_tokens: int) -> NDArray[np.float32]:
    """The recorded ids' log-probs of one completion.

    Raises:
        EngineError: a position is missing.
    """
    if logprobs_TS is None or len(logprobs_TS) != num_tokens:
        got = 0 if logprobs_TS is None else len(logprobs_TS)
        raise EngineError(
            "vLLM did not look up the recorded ids of a position", expected=num_tokens, got=got
        )
    return logprobs_TS


def as_scores(
    num_tokens: NDArray[np.int64],
    parts: Sequence[Logprobs],
    ask: Ask,
    gathered: Sequence[NDArray[np.float32]] = (),
) -> Scores:
    """Columns of what an engine gives: the sampled token and the likeliest, float32, unrounded.

    The tail is what the kept log-probs leave of 1, and at least ``LEAST_TAIL``: unlike where the
    whole distribution is at hand it is known to a millionth of mass, not to a share of itself.

    Args:
        num_tokens: [N], tokens of each completion.
        parts: log-probs of the completions that have tokens.
        gathered: float32 [T, S] of each of those, log-probs of the recorded ids.
    """
    nothing = Logprobs(np.zeros((0, ask.k + 1), np.int32), np.zeros((0, ask.k + 1), np.float32))
    every = [*parts] or [nothing]
    flat = Logprobs(*(np.concatenate([getattr(p, n) for p in every]) for n in Logprobs.__slots__))
    student = None
    if "student_topk" in ask.columns:
        logprobs = np.concatenate([*gathered] or [np.zeros((0, 0), np.float32)])
        student = StudentTopK(logprobs.astype(np.float32), _left(logprobs))
    return Scores(
        token_offsets=np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64),
        sampled_logprobs=flat.sampled if "sampled" in ask.columns else None,
        topk=_kept(*flat.topk(ask.k), ask) if "topk" in ask.columns else None,
        student_topk=student,
    )


def _kept(ids_TK: NDArray[np.int32], logprobs_TK: NDArray[np.float32], ask: Ask) -> TopK:
    """Entries among the shared ids, those before the mass is held; the others are tail."""
    shared_TK = ids_TK < ask.num_ids
    order_TK = np.argsort(~shared_TK, axis=1, kind="stable")
    ids_TK = np.take_along_axis(ids_TK, order_TK, axis=1)
    logprobs_TK = np.take_along_axis(logprobs_TK, order_TK, axis=1)
    num_shared_T = shared_TK.sum(axis=1).astype(np.uint16)
    whole = TopK(ids_TK, logprobs_TK, num_shared_T, np.full(len(ids_TK), -np.inf, np.float32))
    num_kept_T = whole.cut(ask.k, ask.mass).num_kept
    kept_TK = np.arange(ids_TK.shape[1]) < num_kept_T[:, None]
    return TopK(ids_TK, logprobs_TK, num_kept_T, _left(np.where(kept_TK, logprobs_TK, -np.inf)))


def _left(logprobs_TK: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Log of the mass that entries leave of 1, [T]."""
    mass_T = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1)
    left_T: NDArray[np.float32] = np.log(np.clip(1 - mass_T, LEAST_TAIL, None)).astype(np.float32)
    return left_T
