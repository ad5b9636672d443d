"""What workers say of themselves, and what ``opdcache status`` makes of it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from opdcache.cli.main import cli
from opdcache.cli.status_text import status_text
from opdcache.errors import EngineError, Interrupted
from opdcache.rounds import status
from opdcache.runfile import load_run
from opdcache.runfolder import RunContext
from opdcache.schemas.rounds import ScoreRound
from opdcache.schemas.status import RunStatus, StageStatus, WorkerState
from opdcache.stage import Silent, Worker, timed
from opdcache.workers import at_work, workers

from .test_runfile import run_file


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run that has begun, as one of three workers sees it."""
    from opdcache.runfolder import RunFolder
    from opdcache.store.cache import Cache

    config = load_run(run_file(tmp_path))
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output)), Cache(config.cache)
    return RunContext(None, folder, cache, Silent(), Worker(1, 3))  # type: ignore[arg-type]


def said(context: RunContext) -> WorkerState:
    (state,) = workers(context.folder, "score", 0)
    return state


def test_a_worker_says_what_it_has_made_and_how_long_that_took(context: RunContext) -> None:
    with at_work(context, "score", 0) as noted:
        assert workers(context.folder, "score", 0) == []
        noted.progress.begin("round 0 score", 9, "shards")
        assert (said(context).state, said(context).num_units) == ("running", 0)
        with timed(noted.progress, "start"):
            pass
        noted.progress.advance(4, 0)  # others made these
        noted.progress.advance(1, 70)
        noted.progress.advance(1, 30)
        noted.progress.spent("work", 2.5)
        noted.progress.spent("work", 1.5)
        noted.progress.end()
    state = said(context)
    assert (state.state, state.index, state.count) == ("done", 1, 3)
    assert (state.num_units, state.num_tokens, state.work_s) == (2, 100, 4.0)
    assert state.elapsed_s >= state.start_s > 0 or state.start_s == 0
    assert state.error is None


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (Interrupted("stopped on request"), "stopped", "stopped on request [OPD403]"),
        (EngineError("no logits"), "failed", "no logits [OPD402]"),
        (RuntimeError("CUDA error\nmore"), "failed", "RuntimeError: CUDA error"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_what_ended_a_worker_is_told_in_one_line(
    context: RunContext, error: BaseException, state: str, line: str
) -> None:
    with pytest.raises(type(error)), at_work(context, "score", 0):
        raise error
    assert (said(context).state, said(context).error) == (state, line)


def test_a_worker_that_found_its_stage_done_leaves_what_was_said(context: RunContext) -> None:
    with at_work(context, "score", 0) as noted:
        noted.progress.begin("x", 1, "shards")
        noted.progress.advance(1, 5)
    before = said(context)
    with at_work(context, "score", 0) as noted:
        noted.progress.say("already done")
    assert said(context) == before


def test_a_worker_says_in_a_long_shard_that_it_is_still_there(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opdcache.workers._BEAT_S", 0.01)
    with at_work(context, "score", 0) as noted:
        noted.progress.begin("x", 1, "shards")
        first = said(context).elapsed_s
        until = time.monotonic() + 10
        while said(context).elapsed_s == first and time.monotonic() < until:
            time.sleep(0.01)
        assert said(context).elapsed_s > first


def test_of_the_ranks_of_a_learner_the_first_speaks(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with at_work(context, "score", 0) as noted:
        noted.progress.begin("x", 1, "updates")
    assert workers(context.folder, "score", 0) == []


def test_a_worker_whose_process_ended_without_a_word_is_gone(context: RunContext) -> None:
    with at_work(context, "score", 0) as noted:
        noted.progress.begin("x", 1, "shards")
        (path,) = (context.folder.round_path(0) / "workers").iterdir()
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(raw | {"pid": ended.pid}))
        assert said(context).state == "gone"
        path.write_text(json.dumps(raw | {"pid": ended.pid, "machine": "another"}))
        assert said(context).state == "running"
        old = "2026-01-01T00:00:00+00:00"
        path.write_text(json.dumps(raw | {"machine": "another", "said_at": old}))
        assert said(context).state == "gone"
        path.write_text("{")  # being written, or of another version
        assert workers(context.folder, "score", 0) == []


def test_rates_and_the_time_left_are_those_of_the_workers_that_run(context: RunContext) -> None:
    every = context.cache.objects
    commits = [f"commits/scores/abc/{key}.json" for key in "abcdefgh"]
    for path in commits[:2]:
        every.put(path, b"")
    context.folder.write_plan(ScoreRound, 0, "abcdefgh", commits, ["content"])
    with at_work(context, "score", 0) as noted:
        noted.progress.begin("x", 8, "shards")
        (path,) = (context.folder.round_path(0) / "workers").iterdir()
        state = json.loads(path.read_text())
        busy = state | {"elapsed_s": 10, "num_units": 1, "num_tokens": 500}
        for index, change in enumerate(({}, {}, {"state": "failed", "error": "no logits"})):
            other = path.with_name(f"score-{index}.json")
            other.write_text(json.dumps(busy | {"index": index} | change))
        now = status(load_run(context.folder.path.with_suffix(".yaml")))
    (scored,) = (s for s in now.stages if s.stage == "score")
    assert (scored.state, scored.done, scored.total) == ("under way", 2, 8)
    assert (scored.tokens_per_s, scored.left_s) == (100, pytest.approx(6 / 0.2))
    text = status_text(now)
    assert "2/8 shards" in text
    assert "30 s" in text
    assert "no logits" in text


def test_status_is_for_machines_too_and_watches_until_the_run_is_done(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = context.folder.path.with_suffix(".yaml")
    context.folder.failures.note("scores", "k" * 64, ValueError("a\nb"))
    done = CliRunner().invoke(cli, ["status", str(path), "--json"])
    read = RunStatus.model_validate_json(done.output)
    assert [s.state for s in read.stages] == ["waiting"] * 3
    assert [failure.error for failure in read.failures] == ["ValueError: a"]
    assert not read.is_done

    rows: list[dict[str, Any]] = [{}, {}, {"state": "done"}]
    shown = iter(rows)

    def now(config: object) -> RunStatus:
        stage = StageStatus(**({"round": 0, "stage": "train", "state": "under way"} | next(shown)))
        return RunStatus(run_id=None, stages=(stage,), failures=())

    monkeypatch.setattr("opdcache.rounds.status", now)
    watched = CliRunner().invoke(cli, ["status", str(path), "--watch", "--interval", "0.1"])
    assert watched.exit_code == 0, watched.output
    assert watched.output.count("under way") == 2
    assert watched.output.count("done") == 1
