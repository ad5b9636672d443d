"""What is known of a learner's saved state, and the state as another number of ranks reads it."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import EngineError


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run's learner is; saved with its state.

    Attributes:
        round: round in training.
        contents: digest of the shards that the round trains on.
        first_update: updates of the run before the round, those that were left out among them.
        next_update: updates of the round that are done.
        num_updates: updates of the run that are done.
        num_samples, num_tokens: trained on in the round so far.
        num_skipped: updates of the round that were left out.
        elapsed_s: seconds spent on the round so far.
        ended_early: why the round ends here; None while it goes on.
    """

    round: int
    contents: str
    first_update: int = 0
    next_update: int = 0
    num_updates: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    elapsed_s: float = 0.0
    ended_early: str | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What the name of a saved state tells before it is loaded.

    Attributes:
        round: round in training when it was saved.
        num_updates: updates of the run that were done.
        num_ranks: ranks that saved it.
    """

    round: int
    num_updates: int
    num_ranks: int

    @property
    def tag(self) -> str:
        """Name of the state's folder."""
        return f"round-{self.round:03d}-update-{self.num_updates:06d}-ranks-{self.num_ranks}"

    @classmethod
    def newest(cls, checkpoints: Path) -> "Saved | None":
        """The newest saved state; None when there is none."""
        try:
            tag = (checkpoints / "latest").read_text().strip()
        except FileNotFoundError:
            return None
        return cls(*(int(part) for part in tag.split("-")[1::2]))

    def become_newest(self, checkpoints: Path) -> None:
        """Have the file that names the newest saved state name this one.

        DeepSpeed would empty that file before it fills it: a kill between the two loses the run.
        """
        draft = checkpoints / ".latest"
        with draft.open("w") as file:
            file.write(self.tag)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(checkpoints / "latest")


def make_universal(saved: Path, folder: Path) -> None:
    """Convert a saved state, below a folder that is made anew; what was saved stays as it is.

    Raises:
        EngineError: DeepSpeed cannot.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    places = ["--input_folder", str(saved), "--output_folder", str(folder / saved.name)]
    done = subprocess.run(
        [*command, *places, "--inject_missing_state"],
        env={k: v for k, v in os.environ.items() if k != "RANK"} | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineError(
            f"DeepSpeed cannot convert the learner's state: {done.stderr.strip()[-300:]}",
            where=saved,
            remedy="launch as many ranks as the folder's name says",
        )
