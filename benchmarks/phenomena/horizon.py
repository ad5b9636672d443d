"""How much is learnt of the beginnings of completions alone.

    python -m benchmarks.phenomena.horizon --model demo/models/teacher --out horizon

SmolLM2 without four of its layers is healed by the whole model on the first 10, 25, 50 and 100 % of
96 tokens: no more is sampled, scored and stored, since nothing looks at it. Every arm has the same
prompts and as many updates. Told after each round: the exact reverse KL to the teacher on whole
completions of held-out prompts, and what it cost until then: bytes of the score shards (all columns
at k = 16), tokens that the teacher read, a completion's prompt included, seconds of the learner's
updates.
"""

from typing import Any

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.store.cache import Cache

from .common import Bench, arguments, by_round, divergence, stored
from .damaged import damaged, healing
from .plots import Panel, drawn, save
from .results import Rows

LENGTH = 96
SHARES = (0.1, 0.25, 0.5, 1.0)
K = 16
COSTS = {"bytes": "bytes stored", "teacher_tokens": "teacher tokens", "learner_s": "learner, s"}


def arm(bench: Bench, share: float, seed: int) -> str:
    """Heal on the beginnings; the run's name."""
    run = f"first-{share:.0%}-{seed}".replace("%", "")
    short = {"temperature": 1.0, "max_tokens": round(share * LENGTH)}
    config = healing(
        bench,
        damaged(bench, "whole", bench.model),
        seed,
        max_tokens=LENGTH,
        rollout={"sampling": short},
        score={"k": K},
    )
    bench.run(run, config)
    return run


def costs(folder: RunFolder, cache: Cache, num_rounds: int) -> list[dict[str, float]]:
    """What was spent before each round, and in all."""
    spent, updates = [dict.fromkeys(COSTS, 0.0)], folder.metrics()
    for index in range(num_rounds):
        rollouts = folder.need(RolloutRound, index)
        manifests = [cache.need_rollouts(shard) for shard in rollouts.shards]
        more = {
            "bytes": stored(folder.need(ScoreRound, index), cache),
            "teacher_tokens": sum(one.num_prompt_tokens + one.num_tokens for one in manifests),
            "learner_s": sum(
                row["num_tokens"] / row["tokens_per_s"] for row in updates if row["round"] == index
            ),
        }
        spent.append({key: spent[-1][key] + more[key] for key in COSTS})
    return spent


def main() -> None:
    """Heal by every share, and write ``horizon.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3, prompts=64, evaluated=48, lr=5e-5)
    asked = parser.parse_args()
    bench, cache = Bench(asked), Cache(str(asked.out / "cache"))
    rows = Rows(bench, "horizon", "seed", "share")
    for seed in asked.seeds:
        for share in SHARES:
            run = arm(bench, share, seed)
            rows.add(
                {
                    "seed": seed,
                    "share": share,
                    "reverse_kl": divergence(bench.out, run),
                    "spent": costs(bench.folder(run), cache, asked.rounds),
                    **by_round(bench.out, run),
                }
            )
    for one in rows.runs:
        kls, spent = one["reverse_kl"], one["spent"][-1]
        print(
            f"seed {one['seed']} first {one['share']:.0%}: reverse KL {kls[0]:.4f} -> "
            f"{kls[-1]:.4f} for {spent['bytes'] / 1e6:.2f} MB, {spent['teacher_tokens']:,.0f} "
            f"teacher tokens, {spent['learner_s']:.0f} s of the learner"
        )
    save(drawn([_panel(rows.runs, key) for key in COSTS]), bench.out / "horizon.png")


def _panel(runs: list[dict[str, Any]], key: str) -> Panel:
    """Reverse KL by one of the costs."""
    curves = [
        (f"first {run['share']:.0%}", [spent[key] for spent in run["spent"]], run["reverse_kl"])
        for run in runs
    ]
    return Panel("reverse KL (nats)", COSTS[key], curves)


if __name__ == "__main__":
    main()
