"""A learner that is killed at random moments ends in the bits of one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import TrainRound

from .test_learner import carry_out, exact_bytes, job, run_config, write_rounds

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

KILLS, UPDATES = 20, 100


def test_a_round_killed_at_twenty_random_moments_ends_in_the_bits_of_a_whole_one(
    tmp_path: Path, tiny_student: Path
) -> None:
    how = {"zero_stage": 1, "epochs": UPDATES, "checkpoint_every": 1, "batch_samples": 9}
    configs = {name: run_config(name, tmp_path, tiny_student, **how) for name in ("whole", "torn")}
    write_rounds(str(tmp_path / "cache"), [tmp_path / name for name in configs])
    whole, torn = (RunFolder(tmp_path / name) for name in configs)
    (tmp_path / "job.json").write_text(json.dumps([job(configs["torn"])]))
    script = Path(__file__).with_name("killed_process.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "job.json", torn.metrics_path, str(KILLS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert torn.find(TrainRound, 0) is None
    carry_out(tmp_path, "rest", [job(configs[name]) for name in ("torn", "whole")])
    exported = [exact_bytes(folder.student_path(1)) for folder in (torn, whole)]
    assert exported[0].keys() == exported[1].keys()
    for name, tensor in exported[1].items():
        assert torch.equal(exported[0][name], tensor), name
    rows = torn.metrics()
    assert [row["update"] for row in rows] == list(range(UPDATES))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole.metrics()]
