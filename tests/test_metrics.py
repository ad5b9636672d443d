"""The log of a run's metrics."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opdcache.errors import ConfigError
from opdcache.runfolder import RunFolder
from opdcache.train.metrics import MetricsLog, refuse_missing


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


CHUNKS = [{"from": 0, "loss": 1.0}, {"from": 1024, "loss": 3.0}]


def test_a_row_has_numbers_places_and_depth_and_is_json_whatever_the_numbers(
    folder: RunFolder,
) -> None:
    log = MetricsLog(folder, 0)
    log.write(0, 0, {"loss": 2.0, "ess": math.nan}, CHUNKS, worst_sample="shard 1 row 2")
    log.write(1, 0, {"loss": 1.0}, CHUNKS[:1])
    log.close()
    first, second = (json.loads(line) for line in folder.metrics_path.read_text().splitlines())
    assert first["ess"] is None
    assert first["by_position"] == CHUNKS
    assert first["worst_sample"] == "shard 1 row 2"
    assert second == {"update": 1, "round": 0, "loss": 1.0}


def test_a_resumed_run_writes_over_what_it_computes_again(folder: RunFolder) -> None:
    for first, losses in ((0, [5.0, 6.0, 7.0]), (1, [1.0])):
        log = MetricsLog(folder, first)
        for number, loss in enumerate(losses):
            log.write(first + number, 0, {"loss": loss})
        log.close()
    assert [row["loss"] for row in folder.metrics()] == [5.0, 1.0]


def test_trackio_gets_the_same_curves_where_it_is_asked_for(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, Any]] = []
    fake = SimpleNamespace(
        init=lambda **options: said.append(("init", options["project"])),
        log=lambda values, step: said.append(("log", (step, values))),
        finish=lambda: said.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log = MetricsLog(folder, 0, "opd")
    log.write(3, 1, {"loss": 2.0}, CHUNKS)
    log.close()
    curves = {"round": 1, "loss": 2.0, "loss/0": 1.0, "loss/1024": 3.0}
    assert said == [("init", "opd"), ("log", (3, curves)), ("finish", None)]


def test_trackio_that_is_not_there_is_told_when_it_is_asked_for() -> None:
    refuse_missing(None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        refuse_missing("opd")
