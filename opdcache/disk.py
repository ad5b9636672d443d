"""What training keeps in a run's folder: a student a round, and the learner's state."""

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from . import costs
from .runfolder import RunFolder
from .schemas.plan import Disk, Measured
from .schemas.rounds import TrainRound
from .schemas.training import TrainConfig
from .train.drafts import nearest
from .train.saved import Saved

_WEIGHT_BYTES = {"bfloat16": 2, "float32": 4}


def disk(train: TrainConfig, folder: RunFolder, student: Path, rounds: Sequence[int]) -> Disk:
    """What rounds that train keep: measured on this run's, else estimated.

    Args:
        student: folder of the first student, whose weights need not be there.
    """
    num_done = sum(folder.find(TrainRound, index) is not None for index in rounds)
    num_left = len(rounds) - num_done
    of_weights = _WEIGHT_BYTES[train.dtype]
    num_parameters = _num_parameters(student)
    exported = _sizes((folder.path / "students").glob("[!.]*/"))  # a draft begins with a dot
    kept = _measured(exported, "students", num_parameters, of_weights)
    newest = Saved.newest(folder.checkpoints)
    saved = _sizes([] if newest is None else [folder.checkpoints / newest.tag])
    a_parameter = costs.checkpoint_bytes_per_parameter(of_weights, train.zero_stage)
    state = _measured(saved, "checkpoint", num_parameters, a_parameter)
    if train.lora is not None and not saved:
        state = Measured(value=None, source="adapters alone: not estimated")
    most = most_left = None
    if kept.value is not None:
        of_state = state.value or 0.0
        most = round(len(rounds) * kept.value + 2 * of_state)
        states_left = (1 if saved else 2) if num_left else 0
        most_left = round(num_left * kept.value + states_left * of_state)
    place = nearest(folder.path)
    return Disk(
        student_bytes=kept,
        checkpoint_bytes=state,
        num_students=len(rounds),
        num_done=num_done,
        most_bytes=most,
        most_left_bytes=most_left,
        free_at=str(place),
        free_bytes=shutil.disk_usage(place).free,
    )


def _measured(sizes: Sequence[int], noun: str, num_parameters: int | None, each: int) -> Measured:
    """The mean of sizes, else so many bytes a parameter."""
    if sizes:
        return Measured(value=sum(sizes) / len(sizes), source=f"this run's {noun}")
    if num_parameters is None:
        return Measured(value=None, source="the student's safetensors are not here")
    source = f"estimated: {num_parameters:,} parameters of {each} bytes"
    return Measured(value=float(num_parameters * each), source=source)


def _num_parameters(model: Path) -> int | None:
    """Of a model's safetensors, tied weights once; None where they are not all there."""
    from huggingface_hub import get_local_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        return sum(get_local_safetensors_metadata(model).parameter_count.values())
    except (NotASafetensorsRepoError, SafetensorsParsingError, OSError):
        return None


def _sizes(folders: Iterable[Path]) -> list[int]:
    """Bytes of folders; those that go away meanwhile are left out."""
    sizes = []
    for folder in folders:
        with suppress(FileNotFoundError):
            sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return sizes
