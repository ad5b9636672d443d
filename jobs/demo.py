"""The demo: a real teacher, a damaged copy of it as student, and an ordinary run that heals it."""

import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..runfile import load_run
from ..runfolder import RunFolder
from ..schemas.rounds import EvaluationRound
from .local import run as run_all
from .local import run_command
from .models import make_models

_MODELS = ("teacher", "student")


def run(folder: Path) -> int:
    """Prepare, run, evaluate, plot; what is there already is used. Returns an exit code.

    Raises:
        ModelError: the teacher's package is not installed.
    """
    models = folder / "models"
    if not all((models / name).exists() for name in _MODELS):
        print("preparing the teacher and the student", file=sys.stderr)
        make_models(models, _MODELS)
    run_file = folder / "run.yaml"
    if not run_file.exists():
        run_file.write_text(files("opdcache.jobs").joinpath("recipes", "demo.yaml").read_text())
    code = run_all(run_file) or run_command("evaluate", str(run_file))
    if code:
        return code
    rows = _evaluations(run_file)
    public = json.dumps([_public(row) for row in rows], indent=1)
    (folder / "evaluation.json").write_text(public + "\n")
    _plot(rows, folder / "evaluation.png")
    print(f"written: {folder / 'evaluation.json'}, {folder / 'evaluation.png'}")
    return 0


def _evaluations(run_file: Path) -> list[EvaluationRound]:
    config = load_run(run_file)
    assert config.output is not None
    folder = RunFolder(Path(config.output))
    return [folder.need(EvaluationRound, index) for index in range(config.rounds + 1)]


def _public(row: EvaluationRound) -> dict[str, float]:
    return row.model_dump(include={"round", "reverse_kl", "overlap", "entropy_gap", "tokens"})


def _plot(rows: Sequence[EvaluationRound], path: Path) -> None:
    """The table as three small plots over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    rounds = [row.round for row in rows]
    shown = (
        ("reverse_kl", "reverse KL to the teacher (nats)"),
        ("overlap", "overlap of the top 16"),
        ("entropy_gap", "entropy gap (nats)"),
    )
    for axis, (name, title) in zip(axes, shown, strict=True):
        values = [getattr(row, name) for row in rows]
        axis.plot(rounds, values, marker="o")
        axis.set(title=title, xlabel="policy rounds trained", xticks=rounds)
        axis.set_ylim(0, max(1.0 if name == "overlap" else 0.0, 1.15 * max(values)))
        axis.grid(alpha=0.3)
    figure.suptitle("Held-out prompts, fresh student completions, exact full vocabulary")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
