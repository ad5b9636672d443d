"""Kills random processes of a run at random moments, and starts again what nobody else would.

``python -m tests.faults.chaos FOLDER KILLS [SEED]`` prints a JSON object; it exits with 1 where the
run does not end as an undisturbed one does.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.store.cache import Cache

ROUNDS, WORKERS = 3, 4
A_RUN = 25
"""Kills of one run at most: more of them are spread over more runs."""


@dataclass
class Summary:
    """What was done to the runs, and what came of it.

    Attributes:
        kills: processes killed; by_kind: how many of which.
        ended_workers: workers that this ended: a launcher takes all of its own with it.
        redone_shards: shards that they held a claim on, and so had to be made again.
        unfinished: attempts at shards that left data and no commit.
        lost, duplicated: shards that an undisturbed run has and these have not; and the reverse.
        claims_left: claims that nobody holds.
        unsound: what a deep verification says.
        student_identical: whether every round's student is that of an undisturbed run, bit for bit.
    """

    kills: int = 0
    runs: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    ended_workers: int = 0
    redone_shards: int = 0
    unfinished: int = 0
    lost: int = 0
    duplicated: int = 0
    claims_left: int = 0
    unsound: int = 0
    student_identical: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        harm = self.lost + self.duplicated + self.claims_left + self.unsound
        left = max(self.redone_shards, self.unfinished)
        return not harm and self.student_identical and left <= self.ended_workers


def run_file(folder: Path, name: str, student: Path, teacher: Path, cache: str) -> Path:
    """A run of three rounds with few, tiny shards, enough for four workers."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        lines = [json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(72)]
        prompts.write_text("".join(lines))
    config: dict[str, Any] = {
        "rounds": ROUNDS,
        "cache": cache,
        "output": name,
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}, "per_round": 24},
        "rollout": {
            "samples_per_prompt": 2,
            "sampling": {"max_tokens": 24},
            "shard_samples": 4,
            "dtype": "float32",
            "engine": {"max_model_len": 128, "kv_cache_memory_bytes": 2**26},
        },
        "score": {"k": 16},
        "train": {
            "loss": {"k": 8},
            "optimizer": {"lr": 1e-3},
            "batch_samples": 4,
            "micro_batch_tokens": 128,
            "dtype": "float32",
            "checkpoint_every": 1,
        },
        "launch": {
            "rollout": {"workers": WORKERS},
            "score": {"workers": WORKERS},
            "max_restarts": 1000,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def carry_out(path: Path) -> float:
    """An undisturbed run; how many seconds it took."""
    began = time.monotonic()
    assert _start(path).wait() == 0
    return time.monotonic() - began


def disturb(
    path: Path,
    lasts_s: float,
    kills: int,
    at_random: random.Random,
    summary: Summary,
    meanwhile: Callable[[float], None] = lambda elapsed_s: None,
) -> None:
    """A run under kills, until it ends or so many were made.

    Args:
        lasts_s: seconds of an undisturbed one, over which kills are spread.
        meanwhile: called now and then, with the seconds since the run began.
    """
    config, began = load_run(path), time.monotonic()
    launcher, made = _start(path), 0
    following, wanted = _next(began, lasts_s / kills, at_random)
    while True:
        meanwhile(time.monotonic() - began)
        if launcher.poll() is not None:
            if launcher.returncode == 0:
                break
            assert launcher.returncode in (-signal.SIGKILL, 75), launcher.returncode
            launcher = _start(path)
        due = made < kills and time.monotonic() >= following
        if due and _kill_one(config, launcher.pid, wanted, at_random, summary):
            made += 1
            following, wanted = _next(time.monotonic(), lasts_s / kills, at_random)
        time.sleep(0.02)
    summary.runs += 1


def look(path: Path, whole: Path, summary: Summary) -> None:
    """Hold a run against an undisturbed one."""
    ours, theirs = (_Found(load_run(one)) for one in (path, whole))
    summary.lost += len(theirs.commits - ours.commits)
    summary.duplicated += len(ours.commits - theirs.commits)
    summary.claims_left += len(ours.claims)
    summary.unfinished += ours.num_attempts - len(ours.commits)
    summary.student_identical &= ours.students == theirs.students
    verify = [sys.executable, "-m", "opdcache.cli.main", "cache", "verify", "--deep"]
    done = subprocess.run([*verify, load_run(path).cache], capture_output=True, check=False)
    summary.unsound += done.returncode != 0


class _Found:
    """What a finished run left."""

    def __init__(self, config: RunConfig) -> None:
        assert config.output is not None
        cache, folder = Cache(config.cache), RunFolder(Path(config.output))
        data = (info.path.split("/") for info in cache.objects.list("data"))
        self.num_attempts = len({(parts[2], parts[3]) for parts in data})
        self.commits = {info.path for info in cache.objects.list("commits")}
        held = {info.path for info in cache.objects.list("claims")}
        self.claims = held | {str(path) for path in folder.path.glob("claims/*/*")}
        weights = [folder.student_path(r) / "model.safetensors" for r in range(1, ROUNDS + 1)]
        self.students = [path.read_bytes() for path in weights]


def _start(path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "opdcache.cli.main", "run", str(path)]
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _next(now: float, mean_s: float, at_random: random.Random) -> tuple[float, str]:
    """When the next kill is due, and whether it waits for a worker, as most do: what starts them
    takes longer to come back than they do."""
    due = now + at_random.uniform(0, 2 * mean_s)
    return due, "worker" if at_random.random() < 0.8 else "any"


def _kill_one(
    config: RunConfig, launcher: int, wanted: str, at_random: random.Random, summary: Summary
) -> bool:
    """Kill a process of the run, if there is one of the wanted kind; it is stopped first, so that
    it cannot finish while it is looked at."""
    tree = {pid: kind for pid in [launcher, *_below(launcher)] if (kind := _kind(pid))}
    victims = sorted(pid for pid, kind in tree.items() if wanted in (kind, "any"))
    if not victims:
        return False
    victim = at_random.choice(victims)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGSTOP)
        ended = {pid for pid in [victim, *_below(victim)] if tree.get(pid) == "worker"}
        at = sum(pid in ended for pid in _holders(config))
        os.kill(victim, signal.SIGKILL)
        summary.kills += 1
        kind = tree[victim]
        summary.by_kind[kind] = summary.by_kind.get(kind, 0) + 1
        summary.ended_workers += len(ended)
        summary.redone_shards += at
        return True
    return False


def _holders(config: RunConfig) -> Iterator[int]:
    """Processes that hold a claim on a shard."""
    cache = Cache(config.cache)
    for info in cache.objects.list("claims"):
        with suppress(Exception):  # it may be gone, or be written at this moment
            yield json.loads(cache.objects.get(info.path))["process"]["pid"]


def _below(pid: int) -> list[int]:
    """A process's children, and theirs."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [each for child in children for each in _below(child)]


def _kind(pid: int) -> str | None:
    """What a process of a run is; None of what is none of ours."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        above = Path(f"/proc/{parent}/cmdline").read_bytes().decode()
    except OSError:
        return None
    if "forkserver" in command:
        return "worker" if "forkserver" in above else "forkserver"
    return "launcher" if "opdcache.cli.main" in command else None


def chaos(folder: Path, student: Path, teacher: Path, kills: int, seed: int = 0) -> Summary:
    """Runs under so many kills in all, each held against an undisturbed one."""
    whole = run_file(folder, "whole", student, teacher, "cache-whole")
    lasts_s, at_random, summary = carry_out(whole), random.Random(seed), Summary()
    while summary.kills < kills:
        name = f"torn-{summary.runs}"
        path = run_file(folder, name, student, teacher, f"cache-{name}")
        disturb(path, lasts_s, min(A_RUN, kills - summary.kills), at_random, summary)
        look(path, whole, summary)
        print(json.dumps(asdict(summary)), file=sys.stderr, flush=True)
    return summary


def main() -> int:
    """Make two tiny models, and a number of kills; exits with 0 when nothing came of them."""
    from ..conftest import byte_tokenizer, make_tiny_model

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    tokenizer = byte_tokenizer(folder / "tokenizer")
    student, teacher = (
        make_tiny_model(folder / name, tokenizer, seed=seed)
        for seed, name in enumerate(("student", "teacher"), 1)
    )
    summary = chaos(folder, student, teacher, kills, int(sys.argv[3]) if sys.argv[3:] else 0)
    print(json.dumps(asdict(summary), indent=1))
    return 0 if summary.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
