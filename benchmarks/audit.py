"""The audit's numbers against both models' whole distributions, computed anew in float64.

    python benchmarks/audit.py --run demo/run.yaml --round 0

Prints one JSON object: each number as the audit says it, as the models say it, and the difference.
What lies between them is the engine's rounding (vLLM sampled), the store's, and float32.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdcache.audit.run import audit
from opdcache.audit.targets import of_run
from opdcache.resolve import model_folder
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder


def dense_diagnostics(
    models: tuple[Path, Path], rows: Iterable[dict[str, Any]], *, k: int
) -> dict[str, float]:
    """Means over the completion tokens of some rows, by the names of ``Diagnostics``.

    Args:
        models: folders of student and teacher, which read the same tokens.
        rows: of a rollout shard, with ``prompt_token_ids`` and ``completion_token_ids``.
    """
    from transformers import AutoModelForCausalLM

    loaded = [AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in models]
    told = list[dict[str, Tensor]]()
    for row in rows:
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        if completion:
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                p_TV, q_TV = (
                    m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in loaded
                )
            told.append(_tokens(p_TV, q_TV, torch.tensor(completion), k))
    joined = {name: torch.cat([one[name] for one in told]) for name in told[0]}
    means = {name: float(values.nanmean()) for name, values in joined.items()}
    return means | {"num_empty": int(joined["num_empty"].sum())}


def _tokens(p_TV: Tensor, q_TV: Tensor, sampled_T: Tensor, k: int) -> dict[str, Tensor]:
    """Every value of each token, [T]: a mask over the vocabulary says which entries are shared."""
    shared_TV = torch.ones_like(p_TV, dtype=torch.bool)
    for side_TV in (p_TV, q_TV):
        top_TV = torch.zeros_like(shared_TV).scatter(1, side_TV.topk(k).indices, True)
        shared_TV = shared_TV & top_TV
    size_T = shared_TV.sum(1)
    p_in, q_in = (side.masked_fill(~shared_TV, -torch.inf) for side in (p_TV, q_TV))
    kl_T = torch.where(
        shared_TV,
        p_in.softmax(1) * (q_in.log_softmax(1) - p_in.log_softmax(1)),
        0.0,
    ).sum(1)
    entropy_p, entropy_q = (-(side.exp() * side).sum(1) for side in (p_TV, q_TV))
    advantage_T = (q_TV - p_TV).gather(1, sampled_T[:, None])[:, 0]
    return {
        "overlap": size_T / k,
        "overlap_mass_student": p_in.exp().sum(1),
        "overlap_mass_teacher": q_in.exp().sum(1),
        "overlap_advantage": torch.where(size_T > 0, kl_T / size_T, torch.nan),
        "num_empty": (size_T == 0).double(),
        "advantage": advantage_T,
        "reverse_kl_sampled": advantage_T.exp() - 1 - advantage_T,
        "teacher_entropy": entropy_q,
        "student_entropy": entropy_p,
        "entropy_gap": (entropy_q - entropy_p).abs(),
    }


def compare(run: Path, round_index: int, k: int) -> dict[str, Sequence[float | None]]:
    """What the audit says, what the models say, and the difference."""
    config = load_run(run)
    assert config.output is not None
    folder = RunFolder(Path(config.output), writes=False)
    student = folder.student_path(round_index) if round_index else model_folder(config.student)
    looked_at = of_run(run, [round_index])
    rows = [
        row
        for shard in looked_at.parts[0].shards
        for row in looked_at.cache.read_rollouts(
            looked_at.cache.need_rollouts(shard.scored.rollouts)
        ).to_pylist()
    ]
    exact = dense_diagnostics((student, model_folder(config.teacher)), rows, k=k)
    found = audit(looked_at, k=k).parts[0].diagnostics.model_dump()
    return {
        name: (said := found[name], value, None if said is None else said - value)
        for name, value in exact.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("-k", type=int, default=16)
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.run, arguments.round, arguments.k), indent=1))
