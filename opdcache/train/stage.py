"""Trains a round's student on its scored rollouts, and exports the next policy."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import groupby

import torch

from ..errors import ConfigError, EngineError, Held, InputsMissing, Interrupted, RunChanged
from ..identity import digest, model_fingerprint
from ..outcomes import outcome_function
from ..resolve import load_tokenizer, special_ids
from ..runfolder import RunContext
from ..schemas.losses import TokensConfig
from ..schemas.rounds import RolloutRound, ScoreRound, TrainRound
from ..served import refuse_unserved
from ..stage import interrupts, timed
from ..store.upkeep import quarantining
from .answers import IMITATION, Answers
from .learner import Learner
from .loading import Loading, Share, Update
from .metrics import MetricsLog, refuse_missing
from .microbatch import MicroBatch
from .objective import Objective
from .reports import Report, below, is_spike
from .samples import RoundSamples
from .saved import Position, Saved
from .weights import TokenRule


def run(context: RunContext, round_index: int) -> TrainRound:
    """Train on a round, from where an interrupted call left off, and write its round file.

    Raises:
        InputsMissing: the round is not scored, or the learner's state is gone.
        RunChanged: the saved state is of other shards.
        Held: another process trains this run.
        Interrupted: stopped on request, after a checkpoint.
        EngineError: more gradients than ``train.max_skipped`` are not finite.
    """
    done = context.folder.find(TrainRound, round_index)
    if done is not None:
        context.folder.finished("training")
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
    learner, folder = training.learner, context.folder
    with timed(context.progress, "work"):
        position = training.updates()
        learner.export(folder.student_path(round_index + 1))
    if learner.rank == 0:
        folder.write(
            TrainRound(
                round=round_index,
                student=model_fingerprint(folder.student_path(round_index + 1), folder.hashes),
                num_updates=position.num_updates,
                num_samples=position.num_samples,
                num_tokens=position.num_tokens,
                num_skipped=position.num_skipped,
                ended_early=position.ended_early,
                dropped=training.dropped,
                elapsed_s=round(position.elapsed_s, 3),
            )
        )
    learner.barrier()


class _Training:
    """One round's updates."""

    def __init__(self, context: RunContext, round_index: int) -> None:
        config = context.config
        self._context, self._round, self._started = context, round_index, time.monotonic()
        self._loss, self._train = config.train.loss, config.train
        refuse_missing(self._train.trackio)
        skips, student = self._train.tokens.skip_special, context.student(round_index)
        self._special = special_ids(student) if skips else ()
        rollouts, scores = _pinned(context, self._train.trained_rounds(round_index))
        self._contents = digest([shard.content for shard in rollouts.shards])
        self._samples = RoundSamples(
            context.cache,
            rollouts,
            scores,
            self._loss.k,
            config.score.mass,
            TokenRule.of(self._train.tokens, round_index, 0, self._special),
            self._train.layout,
            self._loss.reference,
            outcome_function(self._loss.outcome) if self._loss.outcome else None,
        )
        self._order, self._unfit = self._ordered()
        reward = self._samples.reward(self._order)
        if reward is not None:
            context.progress.say(f"mean reward of the round's completions: {reward:.4g}")
        context.progress.say(f"starting DeepSpeed for {context.student(round_index).name}")
        goes_on = self._train.lora is not None and not self._train.fresh_optimizer
        with timed(context.progress, "start"):
            self.learner = Learner(
                context.student(0 if goes_on else round_index),
                self._train,
                total_updates=self._total_updates(),
            )
            self._position = self._resume()
        self._loading = Loading(
            self._samples_of,
            self._order,
            batch_samples=self._train.batch_samples,
            max_tokens=self._train.micro_batch_tokens,
            rank=self.learner.rank,
            num_ranks=self.learner.world_size,
            pin=self.learner.device.type != "cpu",
            answers=self._answers() if self._loss.sft_weight else None,
        )
        self._lap = time.monotonic()
        self._losses: list[float] = []
        self._stop = self._stop_agreed = False

    def _total_updates(self) -> int:
        """Updates of the whole run, if every round samples as much as this one."""
        mine = len(self._order) / len(self._train.trained_rounds(self._round))
        counts = (len(self._train.trained_rounds(r)) for r in range(self._context.config.rounds))
        return sum(math.ceil(mine * count / self._train.batch_samples) for count in counts)

    def _answers(self) -> Answers:
        """What the student is to imitate, beside its own completions."""
        tokenizer = load_tokenizer(self._context.student(self._round))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def ids_of(answer: str) -> list[int]:
            return [*tokenizer.encode(answer, add_special_tokens=False), *end]

        return Answers(self._samples, ids_of, self._train.layout)

    def _samples_of(self, index: int) -> RoundSamples:
        """The samples as an update of the round takes them."""
        update = self._position.first_update + index
        return self._samples.under(
            TokenRule.of(self._train.tokens, self._round, update, self._special)
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Samples that were not trained on, by reason."""
        position, size = self._position, self._train.batch_samples
        reached = self._order[: position.next_update * size]
        said = (self._samples_of(n // size).why_dropped(i) for n, i in enumerate(reached))
        nothing = Counter(why for why in said if why)
        more = Counter(
            {
                "gradient not finite": len(reached) - position.num_samples,
                "round ended early": len(self._order) - len(reached),
            }
        )
        return {**self._unfit, **nothing, **+more}

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
        progress, first = self._context.progress, self._position.next_update
        num_updates = self._loading.num_updates
        log = self._log()
        progress.begin(f"round {self._round} train", num_updates - first, "updates")
        try:
            with (
                interrupts(self._ask_to_stop),
                closing(self._loading.shares(first)) as shares,  # type: ignore[type-var]
            ):
                for update, mine in groupby(shares, key=lambda share: share[0].update):
                    if self._position.ended_early:
                        break
                    self._update(update, mine, log)
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
            done = found.num_updates
            return Position(self._round, self._contents, done, num_updates=done)
        position = self.learner.load(checkpoints)
        if found.round < self._round:
            first, done = position.first_update + position.next_update, position.num_updates
            return Position(self._round, self._contents, first, num_updates=done)
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
        return MetricsLog(self._context.folder, self._position.num_updates, self._train.trackio)

    def _ask_to_stop(self) -> None:
        self._stop = True

    def _save(self) -> None:
        elapsed = self._position.elapsed_s + time.monotonic() - self._started
        self._started = time.monotonic()
        self._position = replace(self._position, elapsed_s=elapsed)
        self.learner.save(self._context.folder.checkpoints, self._position)
        self._lap = time.monotonic()  # no update's time

    def _update(
        self, update: Update, mine: Iterable[tuple[Share, float]], log: MetricsLog | None
    ) -> None:
        """One optimizer update: the mean of the loss over all ranks and micro-batches."""
        position, report = self._position, Report()
        lr = self.learner.lr
        if update.num_tokens and not update.weight:
            raise ConfigError(
                "train.tokens.half_life leaves no weight on any token of an update",
                where=f"round {self._round} update {update.index}",
                remedy="raise it",
            )
        for share, waited_s in mine:
            self._accumulate(share, report)
            report.waited_s += waited_s
        self._stop_agreed = self._any_rank_stops()
        norm = self._finish(update, report) if update.num_tokens else None
        skipped = update.num_tokens > 0 and norm is None
        self._position = replace(
            position,
            next_update=update.index + 1,
            num_updates=position.num_updates + (norm is not None),
            num_samples=position.num_samples + (0 if skipped else len(update.samples)),
            num_tokens=position.num_tokens + (0 if skipped else update.num_tokens),
            num_skipped=position.num_skipped + skipped,
        )
        elapsed, self._lap = time.monotonic() - self._lap, time.monotonic()
        if norm is not None:
            values = report.values(norm, lr, update.num_tokens, elapsed)
            reward = self._samples.reward(update.samples)
            if reward is not None:
                values["reward"] = reward
            self._look_at(values, report)
            if log is not None:
                log.write(
                    position.num_updates,
                    self._round,
                    values | {"worst_loss": report.worst_loss},
                    report.by_position,
                    worst_sample=report.worst_sample,
                )
        elif skipped:
            self._skip(update, report)
        self._context.progress.advance(1, update.num_tokens)

    def _accumulate(self, share: Share, report: Report) -> None:
        """A micro-batch's gradient, divided by the weight of the whole update's tokens, which is
        known before any forward."""
        if share.batch is None:
            return
        if share.is_answers:
            objective = self._imitation(share, share.batch)
        else:
            objective = self._objective(share, share.batch)
        self.learner.backward(self.learner.loss(objective) * share.weight)
        report.add(objective, share)

    def _imitation(self, share: Share, batch: MicroBatch) -> Objective:
        return Objective(
            IMITATION,
            TokensConfig(),
            batch.to(self.learner.device),
            share.update.num_answer_tokens / self._loss.sft_weight,
            int(batch.places_T.max()) + 1,
        )

    def _objective(self, share: Share, batch: MicroBatch) -> Objective:
        return Objective(
            self._loss,
            self._train.tokens,
            batch.to(self.learner.device),
            share.update.weight,
            share.update.longest,
            self._train.measure_every,
        )

    def _finish(self, update: Update, report: Report) -> float | None:
        """Update the weights; the gradient's norm, None where it is not finite."""
        report.sum_over_ranks(self.learner.sum)
        worst = report.worst(self._samples_of(update.index).num_tokens).to(self.learner.device)
        worst = self.learner.gathered(worst)
        sample, report.worst_loss = worst[worst[:, 1].argmax()].tolist()
        report.worst_sample = self._samples.where(int(sample))
        if not report.imitates_finitely:
            report.worst_sample = "a reference answer of its prompts"
        return self.learner.step()

    def _look_at(self, values: dict[str, float], report: Report) -> None:
        """Say a spike of the loss; end the round where the rollouts have become too old."""
        loss, where = values["loss"], f"update {self._position.next_update} of round {self._round}"
        if is_spike(loss, self._losses, self._train.spike_factor):
            self._context.progress.say(
                f"{where}: the loss jumps to {loss:.3g}; largest on {report.worst_sample}"
            )
        self._losses = [*self._losses[-20:], loss]
        why = below(self._train.end_round, values)
        if why is not None and self._position.next_update < self._loading.num_updates:
            self._context.progress.say(f"{where} ends it: {why}")
            self._position = replace(self._position, ended_early=why)

    def _skip(self, update: Update, report: Report) -> None:
        """Count an update whose gradient was thrown away.

        Raises:
            EngineError: it is one too many.
        """
        where = f"round {self._round} update {update.index}, likely {report.worst_sample}"
        if self._position.num_skipped > self._train.max_skipped:
            raise EngineError(
                "the gradient is not finite",
                where=where,
                expected=f"{self._train.max_skipped} such updates a round at most",
                got=self._position.num_skipped,
                remedy="lower the learning rate, or look at that sample",
            )
        self._context.progress.say(f"{where}: skipped, the gradient is not finite")

    def _any_rank_stops(self) -> bool:
        """Ranks stop after the same update, whichever of them was asked to."""
        asked = torch.tensor(float(self._stop), device=self.learner.device)
        return bool(self.learner.sum(asked) > 0)


def _pinned(context: RunContext, rounds: Iterable[int]) -> tuple[RolloutRound, ScoreRound]:
    """What the last of these rounds has, with the shards of the others before its own.

    Raises:
        InputsMissing: one of them is not scored.
        LossError: its rollouts cannot serve the loss.
    """
    scored = [context.folder.scored(index) for index in rounds]
    rollouts, scores = [pair[0] for pair in scored], [pair[1] for pair in scored]
    for file in rollouts:
        refuse_unserved(context, file)
    return (
        rollouts[-1].model_copy(update={"shards": tuple(s for f in rollouts for s in f.shards)}),
        scores[-1].model_copy(
            update={
                "shards": tuple(s for f in scores for s in f.shards),
                "references": {
                    name: tuple(s for f in scores for s in f.references[name])
                    for name in scores[-1].references
                },
            }
        ),
    )
