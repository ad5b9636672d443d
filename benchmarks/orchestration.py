"""Where the wall time of ``opdcache run`` goes: engines' work, their start, and what lies between.

``python -m benchmarks.orchestration --demo DIR``: DIR is what ``opdcache demo`` made, for its
models. Two rounds of the demo's kind are run in a folder of their own, one worker a stage; what it
prints last is a JSON object. An overhead counts whatever is neither work nor a start: launching,
resolving, fingerprints, planning, claims, commits, round files.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from opdcache.rounds import status
from opdcache.runfile import load_run

ROUNDS = 2


def main() -> None:
    """Run it, and print the shares."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--demo", type=Path, required=True)
    demo: Path = arguments.parse_args().demo
    with TemporaryDirectory() as folder:
        path = _run_file(Path(folder), demo.resolve())
        began = time.time()
        command = [sys.executable, "-m", "opdcache.cli.main", "run", str(path)]
        subprocess.run(command, check=True)
        print(json.dumps(_shares(path, began, time.time()), indent=1))


def _run_file(folder: Path, demo: Path) -> Path:
    config: dict[str, Any] = yaml.safe_load(
        files("opdcache.jobs").joinpath("recipes", "demo.yaml").read_text()
    )
    del config["evaluation"]
    config |= {
        "rounds": ROUNDS,
        "student": {"model": str(demo / "models" / "student")},
        "teacher": {"model": str(demo / "models" / "teacher"), "dtype": "float32"},
    }
    config["prompts"]["per_round"] = 16
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _shares(path: Path, began: float, ended: float) -> dict[str, Any]:
    workers = [stage.workers[0] for stage in status(load_run(path)).stages]
    starts = [datetime.fromisoformat(worker.began_at).timestamp() for worker in workers]
    work_s = sum(worker.work_s for worker in workers)
    # Until the first worker begins, the libraries are imported, once for all.
    imports_s, start_s = starts[0] - began, sum(worker.start_s for worker in workers)
    wall_s = ended - began
    between_s = wall_s - work_s - start_s - imports_s
    return {
        "rounds": ROUNDS,
        "wall_s": round(wall_s, 1),
        "round_s": round((wall_s - imports_s) / ROUNDS, 1),
        "work_s": round(work_s, 1),
        "start_s": {
            "imports": round(imports_s, 1),
            **{
                f"round {worker.round} {worker.stage}": round(worker.start_s, 1)
                for worker in workers
            },
        },
        "overhead_s": round(between_s, 1),
        "overhead_share": round(between_s / (wall_s - imports_s), 4),
    }


if __name__ == "__main__":
    main()
