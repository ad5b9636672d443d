"""The learner beside dense losses: tokens a second, memory, gradients, from one run.

    python benchmarks/learner.py --student DIR --teacher DIR --rollouts FILE
    python benchmarks/learner.py --demo demo

FILE is a rollout shard. With ``--demo`` the models are those of a finished demo, and the rollouts
are those of its first round. Prompts are cut, from their beginnings, so that ``--supervised`` of
the tokens that are read are supervised.

Rates count supervised tokens, of forward, backward and one optimizer update over all of them, on
the same micro-batches but for ``usual``'s: ``bare_body``: the model's body alone, forward and
backward, without an update; ``dense``: full logits at completion positions, reverse KL to stored
dense teacher log-probs; ``usual``: the same with the head on every position and padding to the
longest; ``ours``: this project's, with teacher top-k from a cache, reading and collating included.
They take turns in one process; medians are told.

Memory is the peak above what was there before, of an accelerator's memory, or of resident memory
without one, in a process of its own that
computes the loss and its gradient alone, of hidden states [T, D] with random weights [V, D].
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

sys.path.append(str(Path(__file__).resolve().parents[1]))  # it may be run as a script

from benchmarks.score import Case, of_demo, prepared
from opdcache.models import default_device
from opdcache.runfolder import RunFolder
from opdcache.schemas.losses import LossConfig, TokensConfig
from opdcache.schemas.rounds import RolloutRound
from opdcache.schemas.training import OptimizerConfig, TrainConfig
from opdcache.score import stage
from opdcache.store import rollouts as shards
from opdcache.train.learner import head_chunk_tokens

KS = (16, 64)
LOSSES = {
    f"{k}{suffix}": LossConfig(k=k, normalisation=normalisation)
    for normalisation, suffix in (("tail", ""), ("renormalised", "_renormalised"))
    for k in KS
}
"""The learner's losses: reverse KL on the teacher's top-k, the rest in a bucket or left out."""
WIDTH = 64
"""D of the memory's measure: what it is small beside, [T, V], does not hang on it."""


def cut(table: pa.Table, supervised: float) -> pa.Table:
    """The rollouts with as many prompt tokens, the last ones, as leave that share supervised."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for row, completion in enumerate(columns["completion_token_ids"]):
        keep = max(1, round(len(completion) * (1 - supervised) / supervised))
        columns["prompt_token_ids"][row] = columns["prompt_token_ids"][row][-keep:]
    return pa.Table.from_pydict(columns, schema=table.schema)


@dataclass(frozen=True)
class Data:
    """Micro-batches of a scored round, as samples and as token ids.

    Attributes:
        batches: samples of each micro-batch.
        whole: token ids of each sample; ``starts``: where its completion begins.
        budget: tokens of a micro-batch at most, padding included.
    """

    samples: Any
    batches: list[list[int]]
    whole: list[list[int]]
    starts: list[int]
    budget: int

    @property
    def num_tokens(self) -> int:
        """Supervised tokens."""
        return sum(len(w) - s for w, s in zip(self.whole, self.starts, strict=True))


def scored(home: Path, case: Case, sequences: int, supervised: float, budget: int) -> Data:
    """The first rollouts as a round that the teacher has scored, in a cache."""
    from opdcache.train.samples import RoundSamples

    with tempfile.NamedTemporaryFile(suffix=".parquet", dir=home, delete=False) as file:
        file.write(shards.encode_rollouts(cut(case.table.slice(0, sequences), supervised)))
    cut_case = Case(case.model, [Path(file.name)], case.dtype, max(KS), case.batch_tokens)
    context = prepared(home, cut_case)
    scores = stage.run(context, 0)
    samples = RoundSamples(context.cache, context.folder.need(RolloutRound, 0), scores, max(KS))
    table = cut_case.table
    prompts = table.column("prompt_token_ids").to_pylist()
    completions = table.column("completion_token_ids").to_pylist()
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    batches = list(samples.micro_batches(range(len(samples)), budget))
    return Data(samples, batches, whole, [len(p) for p in prompts], budget)


class Dense:
    """What a script would do in torch: dense logits against stored dense log-probs.

    ``every``: with the head on every position, and every micro-batch padded to the longest of all.
    """

    def __init__(self, student: Path, teacher: Path, data: Data, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._data, self._device = torch, data, default_device()
        self.model = AutoModelForCausalLM.from_pretrained(student, dtype=getattr(torch, dtype))
        self.model.to(self._device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self._longest = max(map(len, data.whole))
        scoring = AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, dtype))
        scoring.to(self._device)
        self.teacher_TV: list[Any] = []
        with torch.no_grad():
            for rows in data.batches:
                ids, places = self._batch(rows)
                states = scoring.model(input_ids=ids, use_cache=False).last_hidden_state[places]
                self.teacher_TV.append(torch.log_softmax(scoring.lm_head(states).float(), dim=-1))

    def _batch(self, rows: list[int], longest: int = 0) -> tuple[Any, Any]:
        """Padded ids, and the places whose states predict the completions' tokens."""
        torch, data = self._torch, self._data
        width = longest or max(len(data.whole[r]) for r in rows) - 1
        ids, places = torch.zeros((len(rows), width), dtype=torch.long), []
        for i, row in enumerate(rows):
            fed = data.whole[row][:-1]
            ids[i, : len(fed)] = torch.tensor(fed)
            places += [(i, t) for t in range(data.starts[row] - 1, len(fed))]
        rows_T, columns_T = torch.tensor(places, device=self._device).T
        return ids.to(self._device), (rows_T, columns_T)

    def bare_body(self) -> None:
        """Forward and backward of the body."""
        for rows in self._data.batches:
            ids, places = self._batch(rows)
            states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            states[places].sum().backward()
        self._optimizer.zero_grad()

    def gradients(self, *, every: bool = False) -> None:
        """Forward and backward of the reverse KL, a token-mean over all micro-batches."""
        torch = self._torch
        for rows, teacher_TV in zip(self._data.batches, self.teacher_TV, strict=True):
            ids, places = self._batch(rows, self._longest if every else 0)
            if every:
                logits_TV = self.model(input_ids=ids, use_cache=False).logits[places]
            else:
                body = self.model.model(input_ids=ids, use_cache=False)
                logits_TV = self.model.lm_head(body.last_hidden_state[places])
            log_p = torch.log_softmax(logits_TV.float(), dim=-1)
            loss = (log_p.exp() * (log_p - teacher_TV)).sum() / self._data.num_tokens
            loss.backward()

    def step(self, *, every: bool = False) -> None:
        """One update."""
        self.gradients(every=every)
        self._torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


class Ours:
    """This project's learner, as its stage drives it."""

    def __init__(self, student: Path, data: Data, dtype: str, chunk: int) -> None:
        from opdcache.train.learner import Learner

        zero_stage = 0 if dtype == "float32" else 1
        config = TrainConfig(
            dtype=dtype,
            zero_stage=zero_stage,
            optimizer=OptimizerConfig(lr=1e-6),
            head_chunk_tokens=chunk,
        )
        self._learner, self._data = Learner(student, config, total_updates=1000), data
        self.waited_s = 0.0

    def gradients(self, loss: LossConfig) -> None:
        """Forward and backward of an update, read as the stage reads it."""
        from opdcache.train.loading import Loading
        from opdcache.train.objective import Objective

        learner, samples, num = self._learner, self._data.samples, len(self._data.whole)
        samples._k = loss.k
        loading = Loading(
            lambda index: samples, range(num), batch_samples=num, max_tokens=self._data.budget
        )
        for share, waited_s in loading.shares(0):
            self.waited_s += waited_s
            assert share.batch is not None
            batch, update = share.batch.to(learner.device), share.update
            every = TrainConfig().measure_every
            objective = Objective(loss, TokensConfig(), batch, update.weight, update.longest, every)
            learner.backward(learner.loss(objective))

    def step(self, loss: LossConfig) -> None:
        """One update."""
        self.gradients(loss)
        self._learner.step()

    def flat_gradient(self) -> Any:
        """All gradients in one vector, in the model's order; then none is left."""
        import torch
        from deepspeed.utils import safe_get_full_grad

        weights, zero = list(self._learner._model.parameters()), self._learner._config.zero_stage
        # ZeRO adds micro-batches up in float32 elsewhere, and leaves the last one's in ``grad``.
        grads = [safe_get_full_grad(p) if zero else p.grad for p in weights]
        flat = torch.cat([grad.flatten().float() for grad in grads if grad is not None])
        if zero:
            self._learner._engine.optimizer.clear_hp_grads()
        for parameter in weights:
            parameter.grad = None
        return flat


def rates(case: Case, student: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each, and how near the gradients are."""
    import torch

    with tempfile.TemporaryDirectory() as home:
        budget = asked.micro_batch_tokens
        data = scored(Path(home), case, asked.sequences, asked.supervised, budget)
        dense = Dense(student, case.model, data, case.dtype)
        ours = Ours(student, data, case.dtype, asked.chunk)
        dense.gradients()
        exact = torch.cat([p.grad.flatten().float() for p in dense.model.parameters()])
        dense._optimizer.zero_grad()
        cosine = {}
        for name, loss in LOSSES.items():
            ours.gradients(loss)
            gradient = ours.flat_gradient()
            cosine[name] = float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0))
        turns: dict[str, list[float]] = {}
        waited = dict.fromkeys(LOSSES, 0.0)
        measures: list[tuple[str, Callable[[], None]]] = [
            ("bare_body", dense.bare_body),
            ("dense", dense.step),
            ("usual", lambda: dense.step(every=True)),
            *((f"ours_{name}", lambda loss=loss: ours.step(loss)) for name, loss in LOSSES.items()),
        ]
        for _ in range(asked.repeats):
            for name, measure in measures:
                ours.waited_s, began = 0.0, time.perf_counter()
                measure()
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                turns.setdefault(name, []).append(time.perf_counter() - began)
                if name.startswith("ours_"):
                    waited[name.removeprefix("ours_")] += ours.waited_s
    found = {name: data.num_tokens / median(of) for name, of in turns.items()}
    return {
        "num_tokens": data.num_tokens,
        "num_read_tokens": sum(map(len, data.whole)) - len(data.whole),
        **{f"{name}_tokens_per_s": value for name, value in found.items()},
        "speedup_over_dense": {k: found[f"ours_{k}"] / found["dense"] for k in LOSSES},
        "speedup_over_usual": {k: found[f"ours_{k}"] / found["usual"] for k in LOSSES},
        "over_bare_body": {k: found[f"ours_{k}"] / found["bare_body"] for k in LOSSES},
        "gradient_cosine": cosine,
        "data_wait_fraction": {k: waited[k] / sum(turns[f"ours_{k}"]) for k in LOSSES},
    }


def memory(what: str, num_tokens: int, vocab_size: int, k: int, chunk: int) -> dict[str, int]:
    """Peak bytes of one loss and its gradient, above those of its inputs and results."""
    import torch

    from opdcache.heads import StudentView, support_loss

    made = torch.Generator().manual_seed(0)
    device = default_device()
    hidden_TD = torch.randn(num_tokens, WIDTH, generator=made).to(device).requires_grad_()
    weight_VD = torch.randn(vocab_size, WIDTH, generator=made).to(device).requires_grad_()
    ids_TK = torch.randint(vocab_size, (num_tokens, k), generator=made).to(device)
    within_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    teacher_TV = None
    if what == "dense":
        teacher_TV = torch.zeros(num_tokens, vocab_size, device=device)
    # What a backward pass leaves behind, and the results, are there before.
    hidden_TD.grad, weight_VD.grad = torch.ones_like(hidden_TD), torch.ones_like(weight_VD)
    held = [torch.ones(num_tokens, k, device=device) for _ in range(4)]
    on_cpu = device.type == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.accelerator.reset_peak_memory_stats()
    before = resident("VmRSS") if on_cpu else torch.accelerator.memory_allocated()
    if teacher_TV is not None:
        log_p = torch.log_softmax(hidden_TD @ weight_VD.T, dim=1)
        loss = (log_p.exp() * (log_p - teacher_TV)).sum()
    else:

        def some_loss(view: StudentView, part: slice) -> Any:
            return view.logprobs_TK.exp().sum() + view.tail_T.sum()

        sides = hidden_TD, weight_VD, ids_TK
        loss = support_loss(*sides, some_loss, within_TK=within_TK, chunk_tokens=chunk)
    loss.backward()  # type: ignore[no-untyped-call]
    del held
    peak = resident("VmHWM") if on_cpu else torch.accelerator.max_memory_allocated()
    return {"peak_bytes": peak - before}


def resident(name: str) -> int:
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM), in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def part(*options: object) -> dict[str, Any]:
    """A part of the benchmark in a process of its own."""
    command = [sys.executable, __file__, *map(str, options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def memories(chunk: int) -> dict[str, Any]:
    """Memory of the losses at some sizes."""

    def peak(what: str, num_tokens: int, vocab_size: int, k: int) -> int:
        at = ("--num-tokens", num_tokens, "--vocab-size", vocab_size, "--k", k, "--chunk", chunk)
        return int(part("--part", what, *at)["peak_bytes"])

    dense = peak("dense", 4096, 49152, 1)
    ours = {k: peak("ours", 4096, 49152, k) for k in KS}
    workspace = {
        f"T={tokens},V={vocab},k=64": peak("ours", tokens, vocab, 64)
        for vocab in (49152, 262144)
        for tokens in (4096, 32768)
    }
    return {
        "dense_loss_bytes": dense,
        "loss_bytes": ours,
        "loss_memory_over_dense": {k: ours[k] / dense for k in KS},
        "workspace_bytes": workspace,
    }


def main() -> None:
    """Measure, print a line a figure and one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--rollouts", type=Path, nargs="+")
    parser.add_argument(
        "--sequences", type=int, default=TrainConfig().batch_samples, help="of the first rollouts"
    )
    parser.add_argument("--supervised", type=float, default=0.6)
    parser.add_argument("--dtype", help="the demo's, or bfloat16")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument(
        "--chunk", type=int, default=head_chunk_tokens(TrainConfig(), default_device())
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["dense", "ours", "rates"], help=argparse.SUPPRESS)
    for name in ("--num-tokens", "--vocab-size", "--k", "--batch-tokens"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part in ("dense", "ours"):
        size = (asked.num_tokens, asked.vocab_size, asked.k, asked.chunk)
        print(json.dumps(memory(asked.part, *size)))
        return
    if asked.demo is not None:
        case = of_demo(asked.demo, asked)
        resolved = RunFolder(asked.demo / "run").resolved()
        assert resolved is not None
        student = Path(resolved.config.student.model)
    elif asked.student is not None and asked.teacher is not None and asked.rollouts:
        files = [path.resolve() for path in asked.rollouts]
        case = Case(asked.teacher.resolve(), files, asked.dtype or "bfloat16", max(KS), 2048)
        student = asked.student.resolve()
    else:
        parser.error("give --demo, or --student, --teacher and --rollouts")
    found = rates(case, student, asked)
    if asked.part is None:
        found |= memories(asked.chunk)
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
