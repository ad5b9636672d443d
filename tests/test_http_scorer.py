"""Asking a served teacher: the budget, faults, the key. ``test_backends`` asks a real server.

The server here is a stand-in for faults alone: it answers well unless told otherwise.
"""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from opdcache.errors import BudgetSpent, ConfigError, EngineError, Unanswered
from opdcache.schemas.teachers import HttpBackend, TeacherConfig
from opdcache.score import http_scorer
from opdcache.score.http_scorer import HttpScorer
from opdcache.score.teacher import Ask, Sequences, in_order
from opdcache.store.scores import Scores

KEY = "sk-a-secret-of-the-tests"
ASK = Ask(frozenset({"sampled", "topk"}), k=2, mass=1.0, num_ids=100)
Answer = tuple[int, Any]


def completion(positions: Any) -> Answer:
    return 200, {"choices": [{"prompt_logprobs": positions}]}


def positions_of(prompt: list[int]) -> list[Any]:
    """The token itself at -token, as the third likeliest; ids 1 and 2 before it."""
    ahead = {"1": {"logprob": -0.5, "rank": 1}, "2": {"logprob": -1.5, "rank": 2}}
    return [None, *({str(t): {"logprob": -float(t), "rank": 3}, **ahead} for t in prompt[1:])]


class Server(ThreadingHTTPServer):
    """Answers every completion request with the next scripted answer, or well.

    Attributes:
        script: answers to come; None closes the connection without one.
        asked: paths, headers and bodies of the requests.
        busiest: most completion requests that were under way at once.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer | None] = []
        self.models: Answer = (200, {"data": [{"id": "tiny", "root": "a", "max_model_len": 64}]})
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.wait_s = 0.0
        self.under_way = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for path, _, body in self.asked if path == "/v1/completions"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers), None))
        self._answer(self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            self.server.under_way += 1
            self.server.busiest = max(self.server.busiest, self.server.under_way)
            good = completion(positions_of(body["prompt"]))
            answer = self.server.script.pop(0) if self.server.script else good
        time.sleep(self.server.wait_s)
        with self.server.lock:
            self.server.under_way -= 1
        if answer is None:
            self.close_connection = True
            return
        self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        status, value = answer
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_scorer, "_FIRST_WAIT_S", 0.0)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "run" / "sent"


Opens = Callable[..., HttpScorer]


@pytest.fixture
def scorer(server: Server, ledger: Path) -> Iterator[Opens]:
    """Opens scorers that ask the server, and closes them."""
    opened: list[HttpScorer] = []

    def open_(model: str = "tiny", **changes: Any) -> HttpScorer:
        usual = {"type": "http", "url": server.url, "tokenizer": "t", "budget_tokens": 1000}
        backend = HttpBackend.model_validate({**usual, "retries": 2, **changes})
        opened.append(HttpScorer(model, backend, ledger))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def sequences(*completions: list[int]) -> Sequences:
    """Each behind the prompt 7, 8."""
    return Sequences(
        [np.array([7, 8], np.int32) for _ in completions],
        [np.array(ids, np.int32) for ids in completions],
        np.zeros((sum(map(len, completions)), 0), np.int32),
    )


def scored(teacher: HttpScorer, *completions: list[int]) -> Scores:
    return in_order(teacher.score(sequences(*completions), ASK))


def sent(ledger: Path) -> int:
    return sum(map(int, ledger.read_text().split())) if ledger.exists() else 0


def test_every_completion_is_asked_for_once_as_token_ids_and_counted(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    scores = scored(scorer(), [11, 12], [], [13])
    assert sorted(server.prompts) == [[7, 8, 11, 12], [7, 8, 13]]
    assert sent(ledger) == (4 + 1) + (3 + 1)
    assert scores.sampled_logprobs is not None
    assert scores.sampled_logprobs.tolist() == [-11, -12, -13]
    assert scores.token_offsets.tolist() == [0, 2, 2, 3]
    assert scores.topk is not None
    assert scores.topk.ids.tolist() == [[1, 2]] * 3


def test_completions_without_tokens_are_neither_sent_nor_counted(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    assert scored(scorer(), [], []).token_offsets.tolist() == [0, 0, 0]
    assert server.prompts == []
    assert sent(ledger) == 0


# The budget.


def test_nothing_is_sent_of_a_shard_that_the_budget_does_not_hold(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    teacher = scorer(budget_tokens=8)
    with pytest.raises(BudgetSpent, match="raise budget_tokens") as refused:
        scored(teacher, [11, 12], [13])
    assert "at most 8" in str(refused.value)
    assert server.prompts == []
    assert sent(ledger) == 0
    scored(teacher, [11, 12])  # what it does hold is still asked for
    assert sent(ledger) == 5


def test_a_budget_is_the_runs_over_all_its_restarts(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    scored(scorer(budget_tokens=9), [11, 12])
    with pytest.raises(BudgetSpent):
        scored(scorer(budget_tokens=9), [11, 12])
    assert len(server.prompts) == 1
    scored(scorer(budget_tokens=10), [11, 12])
    assert sent(ledger) == 10


def test_a_budget_holds_over_processes_that_spend_at_once(ledger: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from opdcache.errors import BudgetSpent\n"
        "from opdcache.score.http_scorer import Budget\n"
        "budget, spent = Budget(pathlib.Path(sys.argv[1]), 200), 0\n"
        "for _ in range(100):\n"
        "    try:\n"
        "        budget.spend(3)\n"
        "        spent += 3\n"
        "    except BudgetSpent:\n"
        "        pass\n"
        "print(spent)\n"
    )
    command = [sys.executable, "-c", code, str(ledger)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    spent = sum(int(process.communicate()[0]) for process in running)
    assert all(process.returncode == 0 for process in running)
    assert spent == sent(ledger) <= 200
    assert spent > 200 - 3 * 3  # one that is refused leaves no less than the others may hold


def test_a_retry_that_the_budget_does_not_hold_is_not_sent(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    server.script = [(503, "busy")]
    with pytest.raises(BudgetSpent):
        scored(scorer(budget_tokens=9), [11, 12])
    assert len(server.prompts) == 1
    assert sent(ledger) == 5


# Faults.


@pytest.mark.parametrize("fault", [(503, "busy"), (429, "slow down"), None])
def test_a_fault_that_may_pass_is_tried_again_and_counted(
    server: Server, scorer: Opens, ledger: Path, fault: Answer | None
) -> None:
    server.script = [fault, fault]
    scores = scored(scorer(), [11, 12])
    assert scores.sampled_logprobs is not None
    assert scores.sampled_logprobs.tolist() == [-11, -12]
    assert len(server.prompts) == 3
    assert sent(ledger) == 3 * 5


def test_a_fault_that_does_not_pass_asks_to_try_again_later(server: Server, scorer: Opens) -> None:
    server.script = [(503, "busy\nstill")] * 3
    with pytest.raises(Unanswered, match="503 busy still") as failed:
        scored(scorer(), [11, 12])
    assert failed.value.exit_code == 75
    assert server.url in str(failed.value)
    assert len(server.prompts) == 3


def test_a_server_that_is_not_there_asks_to_try_again_later(server: Server, scorer: Opens) -> None:
    with pytest.raises(Unanswered, match="run the same command again") as failed:
        scorer(url="http://127.0.0.1:1")  # nothing listens there
    assert failed.value.exit_code == 75


def test_a_wait_for_an_answer_has_an_end(server: Server, scorer: Opens) -> None:
    server.wait_s = 0.5
    with pytest.raises(Unanswered, match="timed out"):
        scored(scorer(timeout_s=0.05, retries=0), [11, 12])


def test_a_refused_request_is_one_line_and_is_not_tried_again(
    server: Server, scorer: Opens, ledger: Path
) -> None:
    server.script = [(400, "max_logprobs is 20\nnot 64")]
    with pytest.raises(EngineError, match="refuses: 400 max_logprobs is 20 not 64") as refused:
        scored(scorer(), [11, 12])
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 1
    assert len(server.prompts) == 1
    assert sent(ledger) == 5


def test_when_one_request_ends_the_stage_the_others_are_not_tried_again(
    server: Server, scorer: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = scorer(retries=3)
    monkeypatch.setattr(http_scorer, "_FIRST_WAIT_S", 30.0)
    server.wait_s = 0.2  # so that both are under way
    server.script = [(503, "busy"), (400, "no")]
    began = time.monotonic()
    with pytest.raises(EngineError, match="refuses: 400 no"):
        scored(teacher, [11, 12], [13])
    assert time.monotonic() - began < 15
    assert len(server.prompts) == 2


def test_a_model_that_is_not_served_is_refused_with_those_that_are(scorer: Opens) -> None:
    with pytest.raises(ConfigError, match=r"does not serve 'tinier'.*one of: tiny"):
        scorer("tinier")


@pytest.mark.parametrize("models", ["<html>", {"error": "no"}, {"data": [{"name": "tiny"}]}, []])
def test_what_is_no_vllm_server_is_refused(server: Server, scorer: Opens, models: Any) -> None:
    server.models = (200, models)
    with pytest.raises(EngineError, match="not one of a vLLM server"):
        scorer()


def test_a_url_without_a_scheme_is_refused() -> None:
    backend = {"type": "http", "url": "teacher:8000", "tokenizer": "t", "budget_tokens": 1}
    with pytest.raises(ValidationError, match="begins with http"):
        TeacherConfig.model_validate({"model": "m", "revision": "1", "backend": backend})


def test_no_more_requests_are_under_way_than_the_run_file_says(
    server: Server, scorer: Opens
) -> None:
    server.wait_s = 0.05
    scored(scorer(concurrency=3), *[[10 + i] for i in range(12)])
    assert server.busiest == 3


# What is served, for the manifest.


def test_what_the_server_says_of_the_model_is_remembered(scorer: Opens) -> None:
    served = {"id": "tiny", "root": "a", "max_model_len": 64}
    assert scorer().details() == {"backend": "http", "served": served}


# The key.


def test_the_key_is_in_the_header_and_nowhere_else(
    server: Server,
    scorer: Opens,
    ledger: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("THE_KEY", KEY + "\n")  # as a file gives it
    teacher = scorer(api_key_variable="THE_KEY")
    scored(teacher, [11, 12])
    assert [headers["Authorization"] for _, headers, _ in server.asked] == [f"Bearer {KEY}"] * 2
    server.script = [(401, f"Incorrect API key provided: {KEY}")]
    with pytest.raises(EngineError, match="401 Incorrect API key provided") as refused:
        scored(teacher, [11, 12])
    bodies = json.dumps([body for _, _, body in server.asked])
    said = (str(refused.value), caplog.text, json.dumps(teacher.details()), ledger.read_text())
    assert not [text for text in (*said, bodies) if KEY in text]


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_key_that_is_not_set_is_refused_before_anything_is_sent(
    server: Server, scorer: Opens, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ConfigError, match="api_key_variable: THE_KEY is not set"):
        scorer(api_key_variable="THE_KEY")
    assert server.asked == []


@pytest.mark.parametrize("value", ["a\nb", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    scorer: Opens, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ConfigError, match="THE_KEY holds characters") as refused:
        scorer(api_key_variable="THE_KEY")
    assert value not in str(refused.value)


def test_a_server_that_wants_no_key_is_sent_none(server: Server, scorer: Opens) -> None:
    scored(scorer(), [11])
    assert not [headers for _, headers, _ in server.asked if "Authorization" in headers]


# Answers that cannot be used.


def broken(change: Callable[[list[Any]], Any]) -> Answer:
    """An answer to the prompt 7, 8, 11, 12 with a fault."""
    positions = positions_of([7, 8, 11, 12])
    changed = change(positions)
    return completion(positions if changed is None else changed)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (broken(lambda p: p[:-1]), "no log-prob for a position (expected 4, got 3)"),
        (broken(lambda p: [*p, p[-1]]), "no log-prob for a position (expected 4, got 5)"),
        ((200, {"choices": [{"text": "x"}]}), "no log-prob for a position (expected 4, got 0)"),
        (broken(lambda p: p.__setitem__(2, None)), "not aligned"),
        (broken(lambda p: p[2].pop("11") and None), "not aligned"),
        (broken(lambda p: [None, None, *p[1:-1]]), "not aligned"),  # shifted by one
        (broken(lambda p: p[3].pop("2") and None), "other entries for a token than asked"),
        (broken(lambda p: p[3]["12"].pop("rank") and None), "not one of a vLLM server"),
        (broken(lambda p: p[3].update({"12": None})), "not one of a vLLM server"),
        ((200, {"choices": []}), "not one of a vLLM server"),
        ((200, "<html>"), "not one of a vLLM server"),
    ],
)
def test_an_answer_that_lacks_a_position_or_a_token_is_refused(
    server: Server, scorer: Opens, answer: Answer, said: str
) -> None:
    server.script = [answer]
    with pytest.raises(EngineError) as refused:
        scored(scorer(), [11, 12])
    assert said in str(refused.value)
    assert len(server.prompts) == 1


def test_all_positions_with_too_few_entries_are_refused_too(server: Server, scorer: Opens) -> None:
    def capped(positions: list[Any]) -> list[Any]:
        return [p and {n: e for n, e in p.items() if n != "2"} for p in positions]

    server.script = [broken(capped)]
    with pytest.raises(EngineError, match="other entries"):
        scored(scorer(), [11, 12])
