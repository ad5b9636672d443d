"""Models that lost layers, and what runs in which the whole model heals one have in common.

Their task is gsm_symbolic of reasoning-gym, as a chat: prompts of some hundred tokens, and
completions that are text, of distributions wide enough for a truncation to cut something off.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdcache.jobs.models import REMOVED_LAYERS

from .common import EVALUATION_SEED, Bench, opdcache


def damaged(bench: Bench, name: str, model: Path, layers: Sequence[int] = REMOVED_LAYERS) -> Path:
    """A model without some of its layers, by default those of the demo's student; made once."""
    lost = ",".join(map(str, layers))
    folder = bench.out / "models" / f"{name}-without-{lost}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        opdcache("recipes", "damage", model, folder, "--drop-layers", lost)
    return folder


def problems(size: int, seed: int) -> dict[str, Any]:
    """Prompts of the task."""
    return {"type": "reasoning_gym", "dataset": "gsm_symbolic", "size": size, "seed": seed}


def healing(
    bench: Bench, student: Path, seed: int, *, max_tokens: int, **parts: Any
) -> dict[str, Any]:
    """A run file's content; ``parts`` are put over its parts, a level deep.

    Args:
        max_tokens: of held-out completions, and of sampled ones unless ``parts`` say otherwise.
    """
    asked = bench.asked
    sampling = {"temperature": 1.0, "max_tokens": max_tokens}
    mine: dict[str, dict[str, Any]] = {
        "prompts": {
            "source": problems(2 * asked.prompts * asked.rounds, 1 + 10_000 * seed),
            "template": "chat",
            "system": "Solve the problem.",
        },
        "rollout": {
            "sampling": sampling,
            "shard_samples": 64,
            "engine": {"max_model_len": 512, "kv_cache_memory_bytes": 2**28},
        },
        "train": {"batch_samples": 8, "share_prompts": False},
    }
    evaluation = {
        "source": problems(asked.evaluated, 1_000_000 + EVALUATION_SEED),
        "num_prompts": asked.evaluated,
        "sampling": sampling,
    }
    for name, part in parts.items():
        mine[name] = mine.get(name, {}) | part if isinstance(part, dict) else part
    return bench.config(student, bench.model, seed, **mine) | {"evaluation": evaluation}
