"""A Flower strategy that hosts one aggregation rule.

`AdapterStrategy` is a `flwr.serverapp.strategy.Strategy`: in anybody's ServerApp it is

    from strategies.strategy import AdapterStrategy
    strategy = AdapterStrategy("lora-fair")
    result = strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model)), num_rounds=10)

It samples by client name from the run's seed, refuses bad updates and goes on with the rest, spools
updates to disk and folds them in the order of names. Its loop is `strategies.round_loop`.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedgraft.adapter import (
    Adapter,
    LoraLayer,
    digest,
    from_arrays,
    payload_bytes,
    to_arrays,
)
from fedgraft.messages import TrainRequest
from fedgraft.seeds import stream
from strategies.aggregation import Aggregated, aggregate
from strategies.client_privacy import ClientPrivacy
from strategies.diagnostics import aggregation_bias
from strategies.fitness import check_client_privacy, check_mixed_ranks
from strategies.private_round import PrivateAggregate, aggregate_privately
from strategies.ranks import RankScaling, assigned, by_rank
from strategies.registry import build_rule
from strategies.replies import Training, evaluation, in_order, mean_metrics
from strategies.requests import Requests
from strategies.roster import Roster
from strategies.round_loop import RoundLoop
from strategies.rounds import ClientReport, RoundHooks, RoundOutcome, StrategyState
from strategies.rule import Rule, SumOnlyRule
from strategies.sampling import Sampling, sampled, secretly_sampled
from strategies.spool import UpdateSpool
from strategies.validation import ABSURD, Intake, norm

log = logging.getLogger(__name__)
UPDATES_IN_MEMORY = 1 << 24
"""Bytes of a round's updates that are not written to disk."""


class AdapterStrategy(Strategy):
    """Host one aggregation rule on Flower.

    Args:
        rule: a rule's name, or a rule.
        options: the rule's options, when it is named.
        scaling: alpha / r of the adapter's layers.
        residual: frozen factors that stand beside the base from the start, by layer.
        fraction: share of the clients that is sampled each round.
        sampling: so many clients, or each by itself with that probability ("poisson").
        clients: how many clients to wait for before the first round.
        min_clients: fewer usable updates than this end the run.
        seed: of the run; client samples are drawn from it.
        secret: draw them from the operating system's entropy instead.
        evaluate_every: ask the clients for their metrics every so many rounds; 0 for never.
        deadline: seconds to wait for replies; None takes `timeout` of `start`.
        derive_A: let A be derived from the seed on both sides where the rule allows it. FedGraft's
            own ClientApp does that; leave it off with another one.
        lineage: the run's id; clients key their personal state by it.
        base_hash: the base that clients must hold; "" accepts any.
        ranks: the clients' own ranks, see `strategies.ranks.assigned`; FedGraft's own ClientApp
            trains at them.
        rank_scaling: gives a smaller rank's scaling; alpha / r unless the adapter is an rsLoRA.
        spool: folder for the round's updates; a temporary one by default.
        hooks: what to do around rounds.
        privacy: clip and noise what the rule sums, see `strategies.client_privacy`; its rate takes
            the place of `fraction`, sampling is Poisson, and no number of updates ends the run.
            Releases are written down by `hooks.on_release` and nowhere else: its default keeps no
            ledger.
        ours: every client is FedGraft's own, see `strategies.roster.Roster`; what travels is a
            parcel then (`fedgraft.parcel`).

    Raises:
        ConfigError: an unknown rule or option, or a rule that cannot be private by client.
    """

    def __init__(
        self,
        rule: str | Rule = "fedavg",
        *,
        options: Mapping[str, Any] | None = None,
        scaling: float | Mapping[str, float] = 1.0,
        residual: Mapping[str, LoraLayer] | None = None,
        fraction: float = 1.0,
        sampling: Sampling = "fixed",
        clients: int = 1,
        min_clients: int = 1,
        seed: int = 0,
        secret: bool = False,
        evaluate_every: int = 1,
        deadline: float | None = None,
        derive_A: bool = False,
        lineage: str = "",
        base_hash: str = "",
        ranks: Sequence[int] | str | None = None,
        rank_scaling: RankScaling = by_rank,
        spool: Path | None = None,
        hooks: RoundHooks | None = None,
        privacy: ClientPrivacy | None = None,
        ours: bool = False,
    ) -> None:
        self.rule = build_rule(rule, options) if isinstance(rule, str) else rule
        if ranks is not None:
            check_mixed_ranks(self.rule, "ranks")
        if privacy is not None:
            check_client_privacy(self.rule, mixed_ranks=ranks is not None)
        self.scaling = scaling
        self.residual = dict(residual or {})
        self.fraction = fraction
        self.sampling: Sampling = sampling
        self.clients = clients
        self.min_clients = min_clients
        self.seed = seed
        self.secret = secret
        self.evaluate_every = evaluate_every
        self.deadline = deadline
        self.derive_A = derive_A
        self.lineage = lineage
        self.base_hash = base_hash
        self.ranks = ranks
        self.rank_scaling = rank_scaling
        self.hooks = hooks or RoundHooks()
        self.privacy = privacy
        self.ours = ours
        self.roster = Roster(ours=ours)
        self._spool_folder = spool
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._spool: UpdateSpool | None = None
        self._state: StrategyState | None = None
        self._arrays: ArrayRecord | None = None
        self._outcome: RoundOutcome | None = None
        self._constants_hash = ""

    def summary(self) -> None:
        """Log what this strategy does."""
        log.info("Strategy: %s (%s), %s", self.rule.title, self.rule.name, self.rule.citation)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        resume: StrategyState | None = None,
    ) -> Result:
        """Run the federation; see `flwr.serverapp.strategy.Strategy.start`.

        Args:
            grid: carries the messages.
            initial_arrays: the adapter to start from, by PEFT's names.
            num_rounds: the last round's number, whatever round a resumed run starts from.
            timeout: seconds to wait for clients and for replies, unless `deadline` is set.
            train_config: passed on to the clients.
            evaluate_config: passed on to the clients.
            evaluate_fn: called with the round's number and the whole adapter, round 0 included.
            resume: continue from this state instead of `initial_arrays`.

        Raises:
            RunError: too few clients connected, or too few usable updates in a round.
        """
        self.summary()
        loop = RoundLoop(
            strategy=self,
            grid=grid,
            last=num_rounds,
            deadline=self.deadline if self.deadline is not None else timeout,
            train_config=train_config or ConfigRecord(),
            evaluate_config=evaluate_config or ConfigRecord(),
            evaluate_fn=evaluate_fn,
        )
        try:
            return loop.run(resume or self._initial_state(initial_arrays), new=resume is None)
        finally:
            self._close()

    # What Flower calls

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and encode what the rule's plan sends them."""
        state = self._state_for(server_round, arrays)
        if self.privacy is not None:
            assert isinstance(self.rule, SumOnlyRule)  # checked at the start
            phases = len(self.rule.phases(server_round))
            self.hooks.on_release(server_round, self.privacy.release(phases))
        self.roster.refresh(grid, self.clients)
        names = self.sample(server_round)
        requests = self._requests(server_round, state, training=True)
        content = {name: requests.for_client(name) for name in names}
        self._outcome = RoundOutcome(
            state, sampled=names, bytes_down=sum(map(_payload, content.values()))
        )
        self._constants_hash = requests.constants_hash
        self.hooks.on_sampled(server_round, names)
        return [
            Message(request.encode(config), self.roster.node_of(name), MessageType.TRAIN)
            for name, request in content.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and spool each reply as it comes, then let the rule combine them.

        Raises:
            RunError: fewer usable updates than `min_clients`, with every client's reason.
        """
        spool = self._open_spool()
        spool.clear()  # of a round that failed
        training = self._collect(server_round, replies, spool)
        trained = time.perf_counter()
        private: PrivateAggregate | None = None
        if self.privacy is not None:
            private = self._aggregate_privately(server_round, spool, self.privacy)
            made = private.made
        else:
            training.require(server_round, self._least)
            made = self._aggregate(server_round, spool)
        for note in made.notes:
            log.info("Round %d: %s", server_round, note)
        bias = None
        # where no factor comes up, there is no DW to miss
        if private is None and spool.clients and self.rule.plan(server_round).train:
            before = self.state.adapter
            bias = aggregation_bias(self.rule, spool, before, made.adapter, server_round)
        spool.clear()
        state = self._next_state(server_round, made, training)
        self.adopt(state if private is None else replace(state, clips=private.clips))
        self._outcome = replace(
            self.outcome,
            state=self.state,
            reports=in_order(training.reports),
            failed=in_order(training.failed),
            refused=in_order(training.refused),
            bytes_up=training.bytes_up,
            bias=bias,
            notes=made.notes,
            signal={} if private is None else private.signal,
            seconds=self.outcome.seconds | {"aggregate": time.perf_counter() - trained},
        )
        if self.privacy is not None and not self.privacy.study:
            return self.current_arrays(), None  # metrics are releases, too
        return self.current_arrays(), mean_metrics(self.outcome.reports)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the whole adapter to every client that is there."""
        return self.ask(server_round, self._state_for(server_round, arrays), config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' metrics, weighted by their examples."""
        return mean_metrics(self.reports(server_round, replies))

    # Steps of a round

    def sample(self, round: int) -> list[str]:
        """Return the clients of a round, a function of seed, round and the names that are there.

        Under privacy by client the source of the run's noise draws them instead, and secret samples
        are a function of nothing.
        """
        names = self.roster.names()
        if self.privacy is not None:
            source = self.privacy.randomness("sample", round)
            return [names[at] for at in source.poisson_sample(len(names), self.privacy.rate)]
        if self.secret:
            return secretly_sampled(names, self.fraction, self.sampling)
        return sampled(
            names, self.fraction, self.sampling, stream(self.seed, "sample", round=round)
        )

    @property
    def _least(self) -> int:
        """How many usable updates a round needs: no more than a Poisson sample holds."""
        asked = len(self.outcome.sampled)
        return min(self.min_clients, asked) if self.sampling == "poisson" else self.min_clients

    def _aggregate(self, round: int, spool: UpdateSpool) -> Aggregated:
        """Let the rule combine the updates; of an empty sample nothing changes."""
        state = self.state
        if not spool.clients:
            return Aggregated(state.adapter, state.rule, ("no client was sampled",))
        return aggregate(
            self.rule,
            spool,
            state.adapter,
            state.rule,
            round,
            seed=self.seed,
            participation=len(spool.clients) / max(1, len(self.roster.names())),
        )

    def _aggregate_privately(
        self, round: int, spool: UpdateSpool, privacy: ClientPrivacy
    ) -> PrivateAggregate:
        """Let the host clip and noise the rule's sums."""
        if self.outcome.sampled and not spool.clients:
            log.warning("Round %d has no usable update: its result is noise alone", round)
        state = self.state
        return aggregate_privately(
            self.rule,
            spool,
            state.adapter,
            state.rule,
            round,
            privacy,
            state.clips,
            seed=self.seed,
        )

    def _requests(
        self, round: int, state: StrategyState, *, training: bool, split: str = "validation"
    ) -> Requests:
        start = round if training else round + 1  # an evaluation shows what would be trained on
        plan = self.rule.plan(start)
        derives = self.derive_A and plan.derive_A
        send = plan.send if derives or not plan.derive_A else plan.send | {"A"}
        common = TrainRequest(
            round=round,
            arrays=self.current_arrays(),
            train="".join(sorted(plan.train)) if training else "",
            lineage=self.lineage,
            a_hash=digest(state.adapter.tensors({"A"}, extras=False)) if derives else "",
            base_hash=self.base_hash,
            durable_round=self.hooks.durable_round(),
            split=split,
        )
        how = self.rank_scaling, send, start, training, self.ours
        return Requests(self.rule, state, common, *how)

    def ask(
        self,
        round: int,
        state: StrategyState,
        config: ConfigRecord,
        grid: Grid,
        split: str = "validation",
    ) -> list[Message]:
        """Ask every client that is there to evaluate what it holds after a round."""
        self.roster.refresh(grid, self.clients)
        requests = self._requests(round, state, training=False, split=split)
        return [
            Message(
                requests.for_client(name).encode(config),
                self.roster.node_of(name),
                MessageType.EVALUATE,
            )
            for name in self.roster.names()
        ]

    def smaller_ranks(self, adapter: Adapter) -> dict[str, int]:
        """Return the clients whose rank is smaller than the adapter's."""
        largest = max((layer.rank for layer in adapter.layers.values()), default=0)
        memory = {name: self.roster.memory.get(name, 0) for name in self.roster.names()}
        found = assigned(self.ranks, largest, memory)
        return {name: rank for name, rank in found.items() if rank < largest}

    def _next_state(self, round: int, made: Aggregated, training: Training) -> StrategyState:
        old, answered = self.state, training.reports.keys()
        holders: frozenset[str] = frozenset()
        if self._constants_hash:
            same = old.constants_hash == self._constants_hash
            # whoever failed may have lost it
            kept = old.holders - training.failed.keys() if same else frozenset[str]()
            holders = kept | answered
        return StrategyState(
            round,
            made.adapter,
            made.state,
            ranks={**old.ranks, **training.ranks},
            holders=holders,
            constants_hash=self._constants_hash,
            clips=old.clips,
            counted={**old.counted, **dict.fromkeys(in_order(training.reports), round)},
        )

    def note_seconds(self, phase: str, seconds: float) -> None:
        """Keep with the round how long one of its phases took."""
        spent = self.outcome.seconds | {phase: seconds}
        self._outcome = replace(self.outcome, seconds=spent)

    def _called(self, client: str) -> str:
        """Return what the log calls a client: by no name where nobody may know who took part."""
        if self.privacy is not None and not self.privacy.study:
            return "a client"
        return f"client {client}"

    def _collect(self, round: int, replies: Iterable[Message], spool: UpdateSpool) -> Training:
        adapter, plan = self.state.adapter, self.rule.plan(round)
        intake = Intake(
            adapter,
            frozenset(adapter.tensors(plan.train, extras=plan.extras)),
            max_norm=ABSURD * max(1.0, norm(adapter.tensors())),
            companions=self.rule.companion_shapes(adapter, round),
            ranks=self.state.ranks,
            scaling=self.rank_scaling,
            prunes=self.rule.prunes,
            differences=plan.sparse,
        )
        training = Training(intake, spool)
        for message in replies:
            client = self.roster.name_of(message.metadata.src_node_id)
            trouble = training.take(client, message)
            if trouble:
                log.warning("Round %d, %s: %s", round, self._called(client), trouble)
            self.hooks.on_reply(round, client, trouble)
        # one client must not decide about another's update, where its presence is a secret
        refused = {} if self.privacy else training.refuse_outliers()
        for client, trouble in refused.items():
            log.warning("Round %d, client %s: %s", round, client, trouble)
        for client in training.missing(self.outcome.sampled):
            self.hooks.on_reply(round, client, training.failed[client])
        return training

    def reports(self, round: int, replies: Iterable[Message]) -> dict[str, ClientReport]:
        """Return what clients report of an evaluation, in natural order; the log has the rest."""
        reports: dict[str, ClientReport] = {}
        for message in replies:
            client = self.roster.name_of(message.metadata.src_node_id)
            report, trouble = evaluation(message)
            if report is None:
                log.warning("Round %d, evaluation on client %s: %s", round, client, trouble)
            else:
                reports[client] = report
        return in_order(reports)

    # State

    @property
    def state(self) -> StrategyState:
        """What the next round starts from; there is one once the strategy has started."""
        assert self._state is not None
        return self._state

    @property
    def outcome(self) -> RoundOutcome:
        """The last round; there is one once a round has been configured."""
        assert self._outcome is not None
        return self._outcome

    def _initial_state(self, arrays: ArrayRecord) -> StrategyState:
        adapter = Adapter.from_tensors(from_arrays(arrays), self.scaling)
        return StrategyState(0, replace(adapter, residual=self.residual))

    def adopt(self, state: StrategyState) -> None:
        """Go on from a state."""
        self._state = state
        self._arrays = None

    def current_arrays(self) -> ArrayRecord:
        """Return the whole adapter encoded, once a round."""
        if self._arrays is None:
            self._arrays = to_arrays(self.state.adapter.tensors())
        return self._arrays

    def _state_for(self, round: int, arrays: ArrayRecord) -> StrategyState:
        """Return the state that these arrays are of; Flower's own loop brings its own arrays."""
        if self._state is None or arrays is not self._arrays:
            brought = self._initial_state(arrays)
            before = self._state or brought
            adapter = replace(brought.adapter, residual=before.adapter.residual)
            self.adopt(replace(before, round=round - 1, adapter=adapter))
            self._arrays = arrays
        return self.state

    def _open_spool(self) -> UpdateSpool:
        if self._spool is None:
            folder = self._spool_folder
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="fedgraft-")
                folder = Path(self._temporary.name)
            self._spool = UpdateSpool(folder, UPDATES_IN_MEMORY)
        return self._spool

    def _close(self) -> None:
        self._spool = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


def _payload(request: TrainRequest) -> int:
    beside = payload_bytes(request.companions) if request.companions is not None else 0
    return payload_bytes(request.arrays) + beside
