"""Trains a round's student on its scored rollouts, and exports the next policy."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from ..errors import ConfigError, EngineError, Held, InputsMissing, Interrupted, RunChanged
from ..identity import digest, model_fingerprint
from ..resolve import special_ids
from ..runfolder import RunContext
from ..schemas.rounds import RolloutRound, ScoreRound, TrainRound
from ..served import refuse_unserved
from ..stage import interrupts
from ..store.upkeep import quarantining
from .learner import Learner, Position, Saved
from .live import means
from .metrics import MetricsLog
from .objective import Objective
from .samples import RoundSamples
from .weights import TokenRule


def run(context: RunContext, round_index: int) -> TrainRound:
    """Train on a round, from where an interrupted call left off, and write its round file.

    Raises:
        InputsMissing: the round is not scored, or the learner's state is gone.
        RunChanged: the saved state is of other shards, or of another number of ranks.
        Held: another process trains this run.
        Interrupted: stopped on request, after a checkpoint.
        EngineError: the loss is not finite.
    """
    done = context.folder.find(TrainRound, round_index)
    if done is not None:
        context.progress.say(f"round {round_index} train: already done, nothing to do")
        return done
    is_first = os.environ.get("RANK", "0") == "0"
    with context.folder.alone("training") if is_first else nullcontext():
        if is_first and context.folder.find(TrainRound, round_index) is not None:
            raise Held(
                f"another process finished round {round_index} meanwhile",
                where=context.folder.path,
                remedy="run the same command again, to see that it is done",
            )
        with quarantining(context.cache):
            _train(context, round_index)
    return context.folder.need(TrainRound, round_index)


def _train(context: RunContext, round_index: int) -> None:
    training = _Training(context, round_index)
    position = training.updates()
    learner, folder = training.learner, context.folder
    learner.export(folder.student_path(round_index + 1))
    if learner.rank == 0:
        folder.write(
            TrainRound(
                round=round_index,
                student=model_fingerprint(folder.student_path(round_index + 1), folder.hashes),
                num_updates=position.num_updates,
                num_samples=position.num_samples,
                num_tokens=position.num_tokens,
                dropped=training.dropped,
                elapsed_s=round(position.elapsed_s, 3),
            )
        )
    learner.barrier()


class _Training:
    """One round's updates."""

    def __init__(self, context: RunContext, round_index: int) -> None:
        config = context.config
        folder = context.folder
        self._context, self._round, self._started = context, round_index, time.monotonic()
        self._loss, self._train = config.train.loss, config.train
        rollouts = folder.need(RolloutRound, round_index)
        scores = folder.need(ScoreRound, round_index)
        refuse_unserved(context, rollouts)
        self._contents = digest([shard.content for shard in rollouts.shards])
        self._samples = RoundSamples(
            context.cache, rollouts, scores, self._loss.k, config.score.mass, self._rule()
        )
        self._order, self._unfit = self._ordered()
        self._num_updates = -(-len(self._order) // self._train.batch_samples)
        context.progress.say(f"starting DeepSpeed for {context.student(round_index).name}")
        self.learner = Learner(
            context.student(round_index),
            self._train,
            total_updates=self._num_updates * config.rounds,
        )
        self._position = self._resume()
        self._stop = self._stop_agreed = False

    def _rule(self) -> TokenRule:
        tokens, special = self._train.tokens, tuple[int, ...]()
        if tokens.skip_special:
            special = special_ids(self._context.student(self._round))
        return TokenRule.of(tokens, self._round, special)

    @property
    def dropped(self) -> dict[str, int]:
        """Samples that were not trained on, by reason."""
        nothing = Counter(why for i in self._order if (why := self._samples.why_dropped(i)))
        return {**self._unfit, **nothing}

    def _ordered(self) -> tuple[list[int], Counter[str]]:
        """Samples in training order, and counts of those that ``train.drop`` leaves out.

        Raises:
            ConfigError: it leaves none.
        """
        whole = self._samples.order(self._context.config.seed, self._round, self._train.epochs)
        unfit = self._samples.unfit(self._train.drop)
        order = [i for i in whole if i not in unfit]
        if whole and not order:
            raise ConfigError(
                "train.drop leaves no sample of the round",
                where=self._context.folder.path,
                remedy="drop less, or raise rollout.sampling.max_tokens",
            )
        return order, Counter(unfit[i] for i in whole if i in unfit)

    def updates(self) -> Position:
        """Do the updates that are left; ends with a checkpoint at the round's end."""
        progress, left = self._context.progress, self._num_updates - self._position.next_update
        log = self._log()
        progress.begin(f"round {self._round} train", left, "updates")
        try:
            with interrupts(self._ask_to_stop):
                while self._position.next_update < self._num_updates:
                    self._update(log)
                    if self._stop_agreed:
                        self._save()
                        raise Interrupted(
                            f"stopped after update {self._position.next_update} of round "
                            f"{self._round}, which is saved",
                            remedy="run the same command to go on",
                        )
                    if self._position.next_update % self._train.checkpoint_every == 0:
                        self._save()
        finally:
            progress.end()
            if log is not None:
                log.close()
        self._save()
        return self._position

    def _resume(self) -> Position:
        """The state to go on from: this round's, or the one that the round before ended with."""
        checkpoints = self._context.folder.checkpoints
        found = Saved.newest(checkpoints)
        if found is None or found.round not in (self._round, self._round - 1):
            if self._round == 0:
                return Position(self._round, self._contents)
            raise InputsMissing(
                f"the learner's state at the end of round {self._round - 1} is gone",
                where=checkpoints,
                remedy="restore it, or train that round again",
            )
        if found.round < self._round and self._train.fresh_optimizer:
            return Position(self._round, self._contents, num_updates=found.num_updates)
        if found.num_ranks != self.learner.world_size:
            raise RunChanged(
                "the learner's state was saved on another number of ranks",
                where=checkpoints / found.tag,
                expected=found.num_ranks,
                got=self.learner.world_size,
                remedy="launch as many, or set train.fresh_optimizer for the next round",
            )
        position = self.learner.load(checkpoints)
        if found.round < self._round:
            return Position(self._round, self._contents, num_updates=position.num_updates)
        if position.contents != self._contents:
            raise RunChanged(
                "the learner's state was saved while training on other shards of this round",
                where=checkpoints / found.tag,
                remedy="restore the round's files, or give the run another output folder",
            )
        self._context.progress.say(f"resuming after update {position.next_update}")
        return position

    def _log(self) -> MetricsLog | None:
        if self.learner.rank != 0:
            return None
        return MetricsLog(self._context.folder, self._position.num_updates)

    def _ask_to_stop(self) -> None:
        self._stop = True

    def _save(self) -> None:
        elapsed = self._position.elapsed_s + time.monotonic() - self._started
        self._started = time.monotonic()
        self._position = replace(self._position, elapsed_s=elapsed)
        self.learner.save(self._context.folder.checkpoints, self._position)

    def _update(self, log: MetricsLog | None) -> None:
        """One optimizer update: the mean of the loss over all ranks and micro-batches."""
        began = time.monotonic()
        size, position = self._train.batch_samples, self._position
        batch = self._order[position.next_update * size : (position.next_update + 1) * size]
        num_tokens = self._samples.num_tokens(batch)
        if num_tokens == 0:
            self._stop_agreed = self._any_rank_stops()
        else:
            sums = self._accumulate(batch)
            objective = sums.pop("objective")
            lr = self.learner.lr
            norm = self.learner.step()
            values = {**means(sums), "objective": objective, "grad_norm": norm, "lr": lr}
            values["num_tokens"] = num_tokens
            values["tokens_per_s"] = num_tokens / (time.monotonic() - began)
            if log is not None:
                log.write(position.num_updates, self._round, values)
        self._position = replace(
            position,
            next_update=position.next_update + 1,
            num_updates=position.num_updates + bool(num_tokens),
            num_samples=position.num_samples + len(batch),
            num_tokens=position.num_tokens + num_tokens,
        )
        self._context.progress.advance(1, num_tokens)

    def _accumulate(self, batch: Sequence[int]) -> dict[str, float]:
        """Gradients of an update's batch; metric sums over all ranks.

        The loss is divided by the weight of all its tokens: known before any forward, and the same
        on every rank.
        """
        tokens, whole = self._train.tokens, self._samples.weight(batch)
        if whole == 0:
            raise ConfigError(
                "train.tokens.half_life leaves no weight on any token of an update",
                where=f"round {self._round} update {self._position.next_update}",
                remedy="raise it",
            )
        totals: dict[str, torch.Tensor] = {}
        for samples, weight in self._shares(batch):
            micro = self._samples.collate(samples, self.learner.device)
            every = self._train.measure_every
            objective = Objective(self._loss, tokens, micro, whole, every)
            self.learner.backward(self.learner.loss(objective) * weight)
            for name, value in objective.sums.items():
                totals[name] = totals.get(name, 0) + weight * value
        self._stop_agreed = self._any_rank_stops()
        summed = self.learner.sum(torch.stack([v.double() for v in totals.values()]))
        if not torch.isfinite(summed).all():
            raise EngineError(
                "the loss or a statistic is not finite",
                where=f"round {self._round} update {self._position.next_update}, "
                f"{self._samples.where(batch[0])} and the {len(batch) - 1} samples after it",
                remedy="lower the learning rate, or look at that shard",
            )
        return dict(zip(totals, summed.tolist(), strict=True))

    def _any_rank_stops(self) -> bool:
        """Ranks stop after the same update, whichever of them was asked to."""
        asked = torch.tensor(float(self._stop), device=self.learner.device)
        return bool(self.learner.sum(asked) > 0)

    def _shares(self, batch: Sequence[int]) -> list[tuple[list[int], int]]:
        """This rank's micro-batches, with weight 1.

        Ranks take the same number of backward passes: the collectives of ZeRO need that. A rank
        with fewer micro-batches repeats a sample of the batch with weight 0.
        """
        world, budget = self.learner.world_size, self._train.micro_batch_tokens
        ranks = [list(self._samples.micro_batches(batch[r::world], budget)) for r in range(world)]
        most = max(len(micro) for micro in ranks)
        filler = next(micro[0][:1] for micro in ranks if micro)
        mine = ranks[self.learner.rank]
        return [(samples, 1) for samples in mine] + [(filler, 0)] * (most - len(mine))
