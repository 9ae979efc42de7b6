"""The round loop's other half: evaluate, watch validation, checkpoint, track, and test at the end.

The strategy trains round by round; `FederatedRun` sees every round through the strategy's hooks.
Rounds are watched, stopped early and chosen on the validation split; the test split is touched
twice, for the untouched start and for the chosen adapter.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedgraft import interrupts
from fedgraft.adapter import Adapter, LoraLayer, natural_order, to_arrays
from fedgraft.config import Config
from fedgraft.deployed import is_deployed
from fedgraft.devices import peak_memory
from fedgraft.errors import ModelError, RunError
from fedgraft.generation import evaluate
from fedgraft.memory_estimate import estimate
from fedgraft.privacy.events import Release
from fedgraft.resident_model import SMALL_MODEL, resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from fedgraft.schedule import learning_rate
from server.card import adapter_card
from server.checkpoint import Checkpoint, Checkpoints
from server.client_privacy import PrivateFederation, ledger_folder
from server.export import read_adapter, write_adapter
from server.guarantee import guarantee
from server.handout import hand_out
from server.progress import FINISHED, HANDED_OUT, REPLY, ROUND, SAMPLED, START, ProgressWriter
from server.samples import Samples
from server.spending import Spending
from server.summary import Bookkeeping, summarise
from server.tracking import TensorBoard, round_record
from strategies.fitness import check_rule
from strategies.ranks import by_rank, by_root
from strategies.registry import build_rule
from strategies.replies import mean_metrics
from strategies.roster import Roster
from strategies.rounds import ClientReport, RoundHooks, RoundOutcome
from strategies.strategy import AdapterStrategy

log = logging.getLogger(__name__)


def run_federation(grid: Grid, config: Config, directory: RunDirectory) -> dict[str, Any]:
    """Run a federation in a run directory, from its last checkpoint if it has one.

    Args:
        grid: carries the messages.
        config: the run's config.
        directory: an existing run directory; a run killed at any moment is continued by calling
            this again, and ends with the same adapter, bit for bit.

    Returns:
        The run's summary.

    Raises:
        FedGraftError: what went wrong and what to do.
    """
    run = FederatedRun(config, directory)
    try:
        return run.run(grid)
    finally:
        run.close()


class FederatedRun(RoundHooks):
    """One run, as the server sees it."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.directory = directory
        self.task = resident_task(config)
        self.rule = build_rule(config.strategy.name, config.strategy.options)
        check_rule(self.rule, config)
        self.model = resident_model(self.task, config)
        # The thread count decides the last bits of every sum, so the record holds it.
        self.config = config.with_overrides({"threads": self.model.threads})
        self.lineage = directory.lineage()
        directory.write_config(self.config, self.lineage)
        self.checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
        self.progress = ProgressWriter(directory.progress)
        self.board = (
            TensorBoard(directory.path / "tensorboard") if config.track.tensorboard else None
        )
        self.deployed = is_deployed()
        self.private: PrivateFederation | None = None
        if config.privacy.mode == "client":
            folder = ledger_folder(directory.ledgers, deployed=self.deployed)
            self.private = PrivateFederation.open(
                self.config, self.rule, self.lineage, folder, deployed=self.deployed
            )
        self.task.validation()  # what is wrong with it is said before any client is asked
        personal = self.rule.capabilities.personal
        self.samples = Samples(self.task, self.model, directory, personal=personal)
        self.roster = Roster(ours=True)
        self.best: Adapter | None = None
        self.books: Bookkeeping | None = None
        self.spending = Spending(self.config, directory, self.private)
        self._clients_final: dict[str, float] | None = None
        self._resumed_wall = 0.0
        self._began = time.perf_counter()

    def close(self) -> None:
        """Close what the run holds open, and remove its scratch folder."""
        self.progress.close()
        shutil.rmtree(self.directory.spool, ignore_errors=True)
        if self.board is not None:
            self.board.close()

    def run(self, grid: Grid) -> dict[str, Any]:
        """Train to the last round, test, and write what the run leaves behind."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            self.directory.keep_rounds(last=-1)
            start = self._initial_adapter()
        else:
            self._continue(checkpoint)
            start = checkpoint.state.adapter
        rounds = self.config.federation.rounds
        done = checkpoint is not None and self._finished(checkpoint.state.round)
        if checkpoint is not None and done:
            rounds = checkpoint.state.round
        if not done or self.rule.capabilities.personal:  # whose clients are asked for their tests
            strategy = self._strategy(start.residual)
            self.roster = strategy.roster
            strategy.start(
                grid,
                to_arrays(start.tensors()),
                num_rounds=rounds,
                timeout=self.config.federation.deadline,
                resume=checkpoint.state if checkpoint is not None else None,
            )
        return self._finish(grid)

    def _strategy(self, residual: Mapping[str, LoraLayer]) -> AdapterStrategy:
        config = self.config
        return AdapterStrategy(
            self.rule,
            scaling=self.model.scaling,
            residual=residual,
            fraction=config.federation.fraction,
            sampling=config.federation.sampling,
            # Deployed clients come and go: it goes on with as many as it needs.
            clients=config.federation.min_clients if self.deployed else config.federation.clients,
            min_clients=config.federation.min_clients,
            seed=config.seed,
            secret=self._keeps_back,  # the seed stands in the record
            evaluate_every=config.evaluate.every if self._clients_evaluate else 0,
            derive_A=config.adapter.starts_at_zero,  # any other A is in no seed
            lineage=self.lineage,
            base_hash=self.model.base_hash,
            ranks=config.federation.ranks,
            rank_scaling=by_root if config.adapter.type == "rslora" else by_rank,
            spool=self.directory.spool,
            hooks=self,
            privacy=None if self.private is None else self.private.mechanism,
            ours=True,
        )

    @property
    def _clients_evaluate(self) -> bool:
        """Whether clients are asked; nobody else has the whole of what a personal rule trains.

        Under privacy they are not: what they would say of their own data has no noise.
        """
        if self.config.privacy.against_server or self._keeps_back:
            return False
        return self.config.evaluate.clients or self.rule.capabilities.personal

    @property
    def _keeps_back(self) -> bool:
        """Whether who was sampled, and what clients say of themselves, is shown to nobody.

        A deployed private run shows what noise covers; a simulation is a study, and shows it all.
        """
        return self.deployed and self.config.privacy.mode != "none"

    def _initial_adapter(self) -> Adapter:
        if self.config.adapter.from_ is not None:
            return read_adapter(Path(self.config.adapter.from_), self.model)
        return self.model.initial_adapter(self.config.seed)

    def _continue(self, checkpoint: Checkpoint) -> None:
        log.info("Continuing after round %d", checkpoint.state.round)
        self.best = checkpoint.best
        self.books = Bookkeeping(**checkpoint.notes)
        # What clients told in rounds that are now done anew is spent all the same.
        told = [self.books.epsilon, *(record.get("epsilon") for record in self.directory.rounds())]
        spent = max((value for value in told if value is not None), default=None)
        self.books = replace(self.books, epsilon=spent)
        self.directory.keep_rounds(last=checkpoint.state.round)
        self._resumed_wall = self.books.wall_seconds

    def _finished(self, round: int) -> bool:
        return round >= self.config.federation.rounds or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluate.patience
        return patience is not None and self.books is not None and self.books.stale >= patience

    # What the strategy tells

    def durable_round(self) -> int:
        """Return the oldest round that a checkpoint could resume."""
        return self.checkpoints.oldest_round()

    def on_start(self, outcome: RoundOutcome, descriptions: Mapping[str, str]) -> None:
        """Evaluate the untouched start; a resumed run has done so before."""
        self.progress.write(
            START,
            round=outcome.state.round,
            rounds=self.config.federation.rounds,
            metric=self.task.metric,
            strategy=self.config.strategy.name,
            seed=self.config.seed,
        )
        if self.config.privacy.against_server and self.config.evaluate.clients:
            log.info(
                "privacy.mode is %s: evaluate.clients is passed over, since metrics of the "
                "clients' own data would tell of them without noise",
                self.config.privacy.mode,
            )
        if self.books is not None:
            return
        metrics = self._test(outcome.state.adapter, outcome.test)
        initial = metrics[self.task.metric]
        if not math.isfinite(initial):
            given = self.config.adapter.from_
            start = f"the adapter in {given}" if given else "the untouched base"
            raise ModelError(
                f"{start} has a test {self.task.metric} of {initial}",
                f"Set model.dtype to float32, or choose another {'one' if given else 'base'}.",
            )
        told = {} if self._keeps_back else _ordered(descriptions)
        self.books = Bookkeeping(initial=initial, initial_metrics=metrics, descriptions=told)
        self._record(outcome)
        self._save(outcome)

    def on_sampled(self, round: int, clients: list[str]) -> None:
        """Tell the screen whom the round asks."""
        interrupts.check()
        self.progress.write(SAMPLED, round=round, clients=[] if self._keeps_back else clients)

    def on_reply(self, round: int, client: str, trouble: str) -> None:
        """Tell the screen that a client has answered."""
        interrupts.check()
        if not self._keeps_back:
            self.progress.write(REPLY, round=round, client=client, trouble=trouble)

    def on_release(self, round: int, release: Release) -> None:
        """Write down what a round under privacy by client is about to release."""
        assert self.private is not None
        self.private.record(round, release)

    def on_round(self, outcome: RoundOutcome) -> bool:
        """Evaluate, record, checkpoint; return True when patience has run out."""
        interrupts.check()
        self._record(outcome)
        assert self.books is not None
        stop = self._out_of_patience()
        self.books = replace(self.books, stopped_early=stop)
        last = stop or outcome.state.round == self.config.federation.rounds
        paid = self.config.privacy.mode != "none"  # what a budget has bought is never lost
        if last or paid or outcome.state.round % self.config.checkpoint.every == 0:
            self._save(outcome)
        return stop

    def _record(self, outcome: RoundOutcome) -> None:
        assert self.books is not None
        round, rounds = outcome.state.round, self.config.federation.rounds
        validation = None
        if round % self.config.evaluate.every == 0 or round == rounds:
            began = time.perf_counter()
            validation = self._validate(outcome)
            self.samples.write(round, outcome.state.adapter)
            spent = outcome.seconds | {"evaluate": time.perf_counter() - began}
            outcome = replace(outcome, seconds=spent)
            before = self.books.best_round if self.books.best is not None else None
            self.books = self.books.after_evaluation(self.task, round, validation[self.task.metric])
            if self.rule.capabilities.personal:
                # parts of the adapter are the clients' own, and only the last ones are still there
                self.books = replace(self.books, best_round=round)
            if self.books.best_round != before:
                self.best = outcome.state.adapter
        rate = learning_rate(self.config.train, round - 1, rounds) if round else None
        self.books = self.spending.after_round(self.books, outcome)
        record = round_record(
            outcome,
            validation,
            rate,
            keep_back=self._keeps_back,
            privacy=self._guarantee(),
        )
        self.directory.append_round(record)
        if self.board is not None:
            self.board.add(record)
        self.progress.write(
            ROUND,
            round=round,
            value=validation[self.task.metric] if validation else None,
            loss=record["train_loss"],
        )

    def _guarantee(self) -> dict[str, Any] | None:
        assert self.books is not None
        books = self.books
        return guarantee(self.config, books.epsilon, deployed=self.deployed, untold=books.untold)

    def _save(self, outcome: RoundOutcome) -> None:
        assert self.books is not None
        wall = self._resumed_wall + time.perf_counter() - self._began
        self.books = replace(self.books, wall_seconds=wall)
        self.checkpoints.save(Checkpoint(outcome.state, self.best, self.books.to_json()))

    def _validate(self, outcome: RoundOutcome) -> dict[str, float]:
        if self.rule.capabilities.personal:
            return self._mean(outcome.validation)
        return self._evaluate(outcome.state.adapter)

    def _test(self, adapter: Adapter, reports: Mapping[str, ClientReport]) -> dict[str, float]:
        """Return the test metrics: the means of the clients' own, or the global adapter's."""
        return self._mean(reports) if reports else self._evaluate(adapter, test=True)

    def _evaluate(self, adapter: Adapter, *, test: bool = False) -> dict[str, float]:
        return evaluate(self.model, self.task, adapter, "test" if test else "validation")

    def _mean(self, reports: Mapping[str, ClientReport]) -> dict[str, float]:
        """Average what the clients report of what they hold, weighted by examples.

        Raises:
            RunError: no client reported the task's metric.
        """
        means: Mapping[str, Any] = mean_metrics(reports) or {}
        if self.task.metric not in means:
            raise RunError(
                f"no client could evaluate what it holds after the round: {self.rule.name} leaves "
                "a part of the adapter on them",
                "See the log for the clients' reasons.",
            )
        found = {name: float(value) for name, value in means.items()}
        if "examples" in found:
            found["examples"] = sum(report.examples for report in reports.values())
        return found

    def on_budget_spent(self, outcome: RoundOutcome) -> None:
        """End the run early: look at the last round if nobody has, and save it."""
        assert self.books is not None
        round = outcome.state.round
        if round % self.config.evaluate.every:
            metric = self._validate(outcome)[self.task.metric]
            self.books = self.books.after_evaluation(self.task, round, metric)
            if self.books.best_round == round:
                self.best = outcome.state.adapter
        self.books = replace(self.books, budget_spent=True)
        self._save(outcome)

    def on_end(self, test: Mapping[str, ClientReport]) -> None:
        """Remember what the clients' own parts reached on the test split, where there are some."""
        if test:
            self._clients_final = self._mean(test)

    # The end

    def _finish(self, grid: Grid) -> dict[str, Any]:
        if self.best is None or self.books is None:
            raise RunError(
                "the run has no adapter to keep: no round was evaluated",
                "Set evaluate.every to at most federation.rounds.",
            )
        final = self._clients_final
        if final is None:
            final = self._test(self.best, {})
        wall = self._resumed_wall + time.perf_counter() - self._began
        self.books = replace(self.books, wall_seconds=wall)
        self.books = self.spending.at_the_end(self.books, grid, self.roster)
        records = self.directory.rounds()
        summary = summarise(
            self.config,
            self.task,
            self.books,
            records,
            final,
            peak_memory(self.model.device),
            self._estimated_memory(),
            self._guarantee(),
            self.spending.told,
        )
        card = adapter_card(self.config, self.model, self.lineage, summary)
        write_adapter(self.directory.adapter, self.best, self.model, card)
        if self.deployed:
            summary |= self._hand_out(grid)
        self.directory.write_summary(summary)
        self.progress.write(FINISHED, final=summary["final"], best_round=self.books.best_round)
        return summary

    def _hand_out(self, grid: Grid) -> dict[str, Any]:
        """Let every client keep the adapter; return what the summary says of it.

        In a simulation the run directory is the clients', too.
        """
        enough = self.config.federation.min_clients
        adapter = self.directory.adapter
        found = hand_out(grid, self.roster, adapter, self.lineage, enough=enough)
        self.progress.write(HANDED_OUT, kept=len(found.kept), missed=found.missed)
        return {
            "adapter_kept_by": len(found.kept) if self._keeps_back else found.kept,
            "adapter_missed_by": found.missed,
            "bytes_handed_out": found.bytes_down,
        }

    def _estimated_memory(self) -> int | None:
        """Return what was told before a large base was loaded."""
        found = estimate(self.task, self.config)
        return None if found is None or found.parameters < SMALL_MODEL else found.total


def _ordered(descriptions: Mapping[str, str]) -> dict[str, str]:
    return {name: descriptions[name] for name in sorted(descriptions, key=natural_order)}
