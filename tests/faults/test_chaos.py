"""Runs whose processes are killed at random moments end as undisturbed ones do."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from ..s3_server import BUCKET, S3Server
from .chaos import Summary, carry_out, chaos, disturb, look, run_file

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(1500)]

KILLS = 10
RESTARTS = 3


def test_kills_cost_a_shard_each_at_most_and_change_nothing(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    summary = chaos(tmp_path, tiny_student, tiny_teacher, KILLS, seed=7)
    print(json.dumps(asdict(summary)))
    assert summary.kills == KILLS
    assert summary.is_whole, summary


@pytest.mark.s3
def test_a_server_that_comes_and_goes_beside_them_changes_nothing_either(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, s3: S3Server
) -> None:
    url = f"s3://{BUCKET}/chaos"
    whole = run_file(tmp_path, "whole", tiny_student, tiny_teacher, f"{url}/whole")
    torn = run_file(tmp_path, "torn", tiny_student, tiny_teacher, f"{url}/torn")
    lasts_s, summary = carry_out(whole), Summary()
    left = [lasts_s * number / (RESTARTS + 1) for number in range(1, RESTARTS + 1)]

    def restart(elapsed_s: float) -> None:
        if left and elapsed_s >= left[0]:
            del left[0]
            s3.kill()
            s3.start()

    disturb(torn, lasts_s, KILLS, random.Random(8), summary, restart)
    assert summary.kills == KILLS
    assert left == [], "the run ended before the server was restarted so often"
    look(torn, whole, summary)
    print(json.dumps(asdict(summary)))
    assert summary.is_whole, summary
