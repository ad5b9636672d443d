"""Renders the contract as JSON schemas: ``python -m opdcache.schemas.render FOLDER``."""

import json
import sys
from pathlib import Path

from .audit import Audit
from .base import Model
from .comparison import Comparison
from .config import RunConfig
from .evaluation import Evaluation
from .inspection import Listing, Row
from .manifests import RolloutManifest, ScoreManifest
from .plan import Plan, Rates
from .rounds import (
    AccuracyRound,
    EvaluationRound,
    HeldOutRound,
    Resolved,
    RolloutRound,
    ScoreRound,
    TeacherAccuracy,
    TeacherHeldOut,
    TrainRound,
)
from .selection import Selection
from .status import RunStatus

DOCUMENTS: dict[str, type[Model]] = {
    "run": RunConfig,
    "resolved": Resolved,
    "rollout-manifest": RolloutManifest,
    "score-manifest": ScoreManifest,
    "rollout-round": RolloutRound,
    "held-out-round": HeldOutRound,
    "score-round": ScoreRound,
    "train-round": TrainRound,
    "evaluation-round": EvaluationRound,
    "accuracy-round": AccuracyRound,
    "teacher-held-out": TeacherHeldOut,
    "teacher-accuracy": TeacherAccuracy,
    "evaluation": Evaluation,
    "plan": Plan,
    "rates": Rates,
    "status": RunStatus,
    "audit": Audit,
    "inspect": Row,
    "inspect-list": Listing,
    "comparison": Comparison,
    "selection": Selection,
}


def render() -> dict[str, str]:
    """File name to JSON schema text, for every document that is written or read."""
    return {
        f"{name}.json": json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n"
        for name, model in DOCUMENTS.items()
    }


if __name__ == "__main__":
    for file, text in render().items():
        Path(sys.argv[1], file).write_text(text)
