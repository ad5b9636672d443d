"""A teacher that a vLLM server serves: the same columns as ``vllm_scorer``, over HTTP.

Whoever serves it may be paid by the token: what the run sends is counted in its folder before it is
sent, and never passes the budget.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
from pydantic import JsonValue

from ..errors import BudgetSpent, ConfigError, EngineError, Unanswered
from ..schemas.teachers import HttpBackend
from ..vllm_engine import Logprobs
from .teacher import Ask, Batch, Sequences, by_length
from .vllm_scorer import as_scores

BATCH_TOKENS = 65536
"""Tokens whose answers are held at once, at most (one sequence at least)."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})


class Budget:
    """Tokens that a run may send to served teachers, over all its processes and restarts.

    Args:
        path: a number of tokens a line, added to by every process.
        limit: their sum at most.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit

    def spend(self, num_tokens: int) -> None:
        """Count tokens that are about to be sent.

        Raises:
            BudgetSpent: they would pass the limit; nothing is counted.
        """
        self._note(num_tokens)
        total = sum(int(line) for line in self._path.read_text().split())
        if total > self._limit:
            self._note(-num_tokens)
            raise BudgetSpent(
                "the budget of teacher tokens does not hold the next request",
                where=self._path,
                expected=f"at most {self._limit} with it",
                got=total,
                remedy="raise budget_tokens of the teacher's backend to go on",
            )

    def _note(self, num_tokens: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            file.write(f"{num_tokens}\n".encode())


class HttpScorer:
    """Scores completions with a server's prompt log-probs.

    Args:
        model: name of the model, as the server lists it.
        backend: how to ask.
        ledger: see ``Budget``.

    Raises:
        ConfigError: the server does not serve the model, or the API key's variable is not set.
        Unanswered: no server answers.
    """

    def __init__(self, model: str, backend: HttpBackend, ledger: Path) -> None:
        self._model, self._backend = model, backend
        self._budget = Budget(ledger, backend.budget_tokens)
        self._left = Event()
        self._key = _api_key(backend)
        self._client = httpx.Client(
            base_url=backend.url.rstrip("/"),
            timeout=backend.timeout_s,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=backend.concurrency),
        )
        with _reading(backend.url):
            served = {entry["id"]: entry for entry in self._send("GET", "/v1/models")["data"]}
        if model not in served:
            raise ConfigError(
                f"the server does not serve {model!r}",
                where=backend.url,
                remedy=f"teacher.model is one of: {', '.join(sorted(served))}",
            )
        self._served: dict[str, JsonValue] = {
            name: served[model][name]
            for name in ("id", "root", "max_model_len")
            if name in served[model]
        }

    def score(self, sequences: Sequences, ask: Ask) -> Iterator[Batch]:
        """See ``Teacher``. A shard is begun only if the budget holds all of it.

        Raises:
            BudgetSpent: see ``Budget``.
            Unanswered: the server did not answer, try after try.
        """
        sent = sequences.num_tokens > 0
        self._budget.spend(int((sequences.lengths[sent] + 1).sum()))
        with self._pool() as pool:
            for rows in by_length(sequences.lengths, BATCH_TOKENS):
                asked = [row for row in rows if sent[row]]
                parts = [pool.submit(self._logprobs, sequences, row, ask.k) for row in asked]
                for part in as_completed(parts):
                    part.result()  # the first fault ends the shard
                logprobs = [part.result() for part in parts]
                yield Batch(rows, as_scores(sequences.num_tokens[rows], logprobs, ask))

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that ask. Once the block is left by an error, such as a request to stop, nothing
        more is asked or tried again; what is under way is waited for."""
        self._left.clear()
        with ThreadPoolExecutor(self._backend.concurrency) as pool:
            try:
                yield pool
            except BaseException:
                self._left.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def details(self) -> dict[str, JsonValue]:
        """See ``Teacher``."""
        return {"backend": "http", "served": self._served}

    def close(self) -> None:
        """See ``Teacher``."""
        self._client.close()

    def _logprobs(self, sequences: Sequences, row: int, k: int) -> Logprobs:
        whole = sequences.whole(row).tolist()
        body = {"model": self._model, "prompt": whole, "max_tokens": 1, "prompt_logprobs": k}
        answer = self._send("POST", "/v1/completions", body, again_tokens=len(whole) + 1)
        with _reading(self._place("/v1/completions")):
            positions = answer["choices"][0].get("prompt_logprobs")
            return _columns(positions, whole, len(sequences.prompts[row]), k)

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        again_tokens: int = 0,
    ) -> Any:
        """An answer's JSON; faults that may pass are tried again, and what that sends is counted.

        Raises:
            EngineError: the server refuses the request.
            Unanswered: every try failed.
        """
        fault = ""
        for turn in range(self._backend.retries + 1):
            if turn:
                if self._left.wait(min(_FIRST_WAIT_S * 2 ** (turn - 1), _LONGEST_WAIT_S)):
                    break
                self._budget.spend(again_tokens)
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.RequestError as error:
                fault = str(error) or type(error).__name__
                continue
            if answer.is_success:
                with _reading(self._place(path)):
                    return answer.json()
            fault = f"{answer.status_code} {self._without_key(answer.text)[:300]}"
            if answer.status_code not in _MAY_PASS:
                raise EngineError(f"the teacher's server refuses: {fault}", where=self._place(path))
        raise Unanswered(
            f"the teacher's server does not answer: {fault}",
            where=self._place(path),
            remedy="see that it runs, then run the same command again",
        )

    def _place(self, path: str) -> str:
        return f"{self._client.base_url}".rstrip("/") + path

    def _without_key(self, text: str) -> str:
        """What a server says, which may be what it was sent."""
        return text.replace(self._key, "(the API key)") if self._key else text


def _api_key(backend: HttpBackend) -> str:
    """The server's key; empty when it wants none.

    Raises:
        ConfigError: its variable is not set, or holds what cannot be sent.
    """
    if backend.api_key_variable is None:
        return ""
    key = os.environ.get(backend.api_key_variable, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        fault = "holds characters that no key has" if key else "is not set"
        raise ConfigError(
            f"teacher.backend.api_key_variable: {backend.api_key_variable} {fault}",
            remedy="set it in the environment of the job",
        )
    return key


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Whatever an answer of another form makes of our reading it, as one error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineError(
            "the server's answer is not one of a vLLM server",
            where=place,
            got=repr(error),
            remedy="see that teacher.backend.url is the root of one",
        ) from error


def _columns(
    positions: list[dict[str, dict[str, Any]] | None] | None, whole: list[int], start: int, k: int
) -> Logprobs:
    """A server's log-probs of the tokens from ``start`` on: the token itself, then the likeliest.

    Raises:
        EngineError: a position is missing, or lacks its token or one of the k likeliest.
    """
    if positions is None or len(positions) != len(whole):
        got = 0 if positions is None else len(positions)
        raise EngineError(
            "the server gave no log-prob for a position", expected=len(whole), got=got
        )
    rows = []
    for token, entries in zip(whole[start:], positions[start:], strict=True):
        if entries is None or str(token) not in entries:
            raise EngineError("the server's log-probs are not aligned with the tokens")
        likeliest = [item for item in entries.items() if item[1]["rank"] <= k]
        ranked = sorted(likeliest, key=lambda item: item[1]["rank"])
        if len(ranked) != k:
            raise EngineError(
                "the server gave other entries for a token than asked", expected=k, got=len(ranked)
            )
        rows.append(
            [(token, entries[str(token)]["logprob"])] + [(int(i), e["logprob"]) for i, e in ranked]
        )
    return Logprobs(
        np.asarray([[i for i, _ in row] for row in rows], np.int32),
        np.asarray([[value for _, value in row] for row in rows], np.float32),
    )
