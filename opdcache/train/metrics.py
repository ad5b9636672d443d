"""A run's metrics: one JSON object an update in ``metrics.jsonl``, and the same in TensorBoard and,
when asked for, trackio."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError
from ..runfolder import RunFolder


class MetricsLog:
    """Appends metrics of updates. A resumed run overwrites what it computes again.

    Args:
        folder: the run's folder.
        first_update: number of the first update that will be logged; later ones are dropped from a
            log that a stopped run left behind.
        trackio: project to log to as well.
    """

    def __init__(self, folder: RunFolder, first_update: int, trackio: str | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._tracked = None if trackio is None else _tracked(trackio, folder.path.name)
        self._path = folder.metrics_path
        kept = [row for row in folder.metrics() if row["update"] < first_update]
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(self._path)
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_update)

    def write(
        self,
        update: int,
        round_index: int,
        values: Mapping[str, float],
        by_position: Sequence[Mapping[str, float]] = (),
        **places: str,
    ) -> None:
        """Log an update's metrics.

        Args:
            by_position: the same by depth, of completions with more than one chunk of it.
            places: what is no number.
        """
        row: dict[str, Any] = {"update": update, "round": round_index, **_finite(values), **places}
        if len(by_position) > 1:
            row["by_position"] = [_finite(chunk) for chunk in by_position]
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        curves = dict(values)
        for chunk in by_position if len(by_position) > 1 else ():
            depth = int(chunk["from"])
            curves |= {f"{name}/{depth}": value for name, value in chunk.items() if name != "from"}
        for name, value in curves.items():
            self._board.add_scalar(name, value, update)
        if self._tracked is not None:
            self._tracked.log({"round": round_index, **curves}, step=update)

    def close(self) -> None:
        """Flush the logs."""
        self._board.close()
        if self._tracked is not None:
            self._tracked.finish()


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no other numbers."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def refuse_missing(trackio: str | None) -> None:
    """Refuse to begin what could not be logged; on every rank, before they wait for each other.

    Raises:
        ConfigError: trackio is asked for and not installed.
    """
    if trackio is not None and find_spec("trackio") is None:
        raise ConfigError(
            "trackio is not installed", where="train.trackio", remedy="pip install trackio"
        )


def _tracked(project: str, name: str) -> Any:
    import trackio

    trackio.init(project=project, name=name, resume="allow")
    return trackio
