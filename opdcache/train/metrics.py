"""A run's metrics: one JSON object an update in ``metrics.jsonl``, and the same in TensorBoard."""

import json
from collections.abc import Mapping

from ..runfolder import RunFolder


class MetricsLog:
    """Appends metrics of updates. A resumed run overwrites what it computes again.

    Args:
        folder: the run's folder.
        first_update: number of the first update that will be logged; later ones are dropped from a
            log that a stopped run left behind.
    """

    def __init__(self, folder: RunFolder, first_update: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path = folder.metrics_path
        kept = [row for row in folder.metrics() if row["update"] < first_update]
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(self._path)
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_update)

    def write(self, update: int, round_index: int, values: Mapping[str, float]) -> None:
        """Log an update's metrics."""
        row = {"update": update, "round": round_index, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, update)

    def close(self) -> None:
        """Flush both logs."""
        self._board.close()
