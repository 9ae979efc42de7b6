"""Who is who: clients by name, whatever ids Flower draws and whenever nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from fake_grid import ARRAYS, Answer, Client, FakeGrid, Node, Seen, nodes
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedgraft.errors import RunError
from fedgraft.messages import HELLO, Hello, TrainRequest
from strategies import roster as roster_module
from strategies.roster import Roster, exchange
from strategies.strategy import AdapterStrategy


def asked(grid: FakeGrid) -> list[int]:
    return [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == HELLO]


def refreshed(grid: FakeGrid) -> Roster:
    roster = Roster()
    roster.refresh(grid)
    return roster


def test_names_come_in_natural_order_whatever_order_the_answers_came_in():
    for shuffle in range(5):
        roster = refreshed(FakeGrid(nodes(("10", "9", "2", "1", "01")), shuffle))
        assert roster.names() == ["01", "1", "2", "9", "10"]
    assert roster.node_of("9") == 101 and roster.name_of(101) == "9"
    assert roster.name_of(555) == "555"  # a node that was never asked
    assert roster.descriptions["9"] == "data of 9"


def test_only_new_nodes_are_asked_and_those_gone_are_forgotten():
    grid = FakeGrid(nodes(("a", "b")))
    roster = refreshed(grid)
    roster.refresh(grid)
    assert asked(grid) == [100, 101]
    del grid.nodes[100]
    grid.nodes[200] = Client("c")
    roster.refresh(grid)
    assert asked(grid) == [100, 101, 200] and roster.names() == ["b", "c"]


@pytest.mark.parametrize(
    "answer",
    [Error(1, "no such message type"), RecordDict(), Hello("").encode(), Hello("x" * 999).encode()],
)
def test_a_node_that_does_not_know_the_question_is_called_by_its_id(answer: Answer):
    grid = FakeGrid({7: lambda message: answer, 8: Client("b")})
    assert refreshed(grid).names() == ["7", "b"]


def test_a_node_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roster_module, "HELLO_SECONDS", 0.1)
    grid = FakeGrid({7: lambda message: None, 8: Client("b")})
    roster = refreshed(grid)
    assert roster.names() == ["b"]
    grid.nodes[7] = Client("a")
    roster.refresh(grid)
    assert roster.names() == ["a", "b"] and asked(grid) == [7, 8, 7]


# Two of one name


def test_two_nodes_of_one_name_do_not_start():
    grid = FakeGrid({1: Client("a"), 2: Client("b"), 3: Client("a")})
    with pytest.raises(RunError, match="two nodes call themselves 'a'") as caught:
        Roster().wait(grid, 2, 1.0)
    assert "its own name" in caught.value.remedy


def test_a_newcomer_cannot_take_anothers_name_and_the_run_goes_on():
    grid = FakeGrid(nodes(("a", "b")))
    thief = Client("b", weight=999.0)
    seen = Seen()

    def join(round: int, sampled: list[str]) -> None:
        grid.nodes[300 - round] = thief

    seen.on_sampled = join  # type: ignore[method-assign]
    AdapterStrategy(hooks=seen, deadline=0.3).start(grid, ARRAYS, num_rounds=3)
    honest = Seen()
    AdapterStrategy(hooks=honest).start(FakeGrid(nodes(("a", "b"))), ARRAYS, num_rounds=3)
    assert thief.heard == []
    assert seen.last.reports == honest.last.reports
    assert seen.last.state.adapter.digest() == honest.last.state.adapter.digest()


def test_of_two_newcomers_of_one_name_the_lower_id_bears_it_whoever_answers_first():
    for shuffle in range(5):
        roster = refreshed(FakeGrid({9: Client("a"), 4: Client("a"), 6: Client("b")}, shuffle))
        assert roster.node_of("a") == 4 and roster.names() == ["a", "b"]


def test_a_client_that_came_back_under_a_new_id_takes_its_name_over():
    grid = FakeGrid(nodes(("a", "b")))
    roster = refreshed(grid)
    grid.nodes[50] = Client("b")  # restarted, and the old node is not missed yet
    roster.refresh(grid)
    assert roster.node_of("b") == 101 and roster.claimed == {"b"}
    del grid.nodes[101]
    roster.refresh(grid)
    assert roster.node_of("b") == 50 and roster.claimed == set()


# Waiting


def test_waiting_until_the_clients_are_there():
    grid = FakeGrid(nodes(("a",)))
    asked_for_nodes = grid.get_node_ids

    def later() -> Any:
        if len(grid.sent) == 1:
            grid.nodes[200] = Client("b")
        return asked_for_nodes()

    grid.get_node_ids = later  # type: ignore[method-assign]
    roster = Roster()
    roster.wait(grid, 2, 10.0)
    assert roster.names() == ["a", "b"]


def test_waiting_in_vain_names_who_is_there():
    with pytest.raises(RunError) as caught:
        Roster().wait(FakeGrid(nodes(("a", "b"))), 3, 0.1)
    assert caught.value.message == "2 of 3 clients connected within 0 s (a, b)"
    assert "Start the missing clients" in caught.value.remedy
    with pytest.raises(RunError, match=r"0 of 1 clients .*\(none\)"):
        Roster().wait(FakeGrid({}), 1, 0.0)


# The exchange of messages


def messages(*destinations: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in destinations]


def test_replies_are_handed_on_as_they_come():
    order: list[str] = []

    def node(name: str) -> Node:
        return Client(name)

    grid = FakeGrid({1: node("a"), 2: node("b")})
    pull = grid.pull_messages

    def pulled(ids: Any) -> Any:
        order.append("pull")
        return pull(ids)

    grid.pull_messages = pulled  # type: ignore[method-assign]
    hellos = [Message(RecordDict(), n, HELLO) for n in (1, 2)]
    replies = exchange(grid, iter(hellos), 1.0)  # an iterator is enough
    order.extend(Hello.decode(reply.content).name for reply in replies)
    assert order[0::2] == ["pull", "pull"] and sorted(order[1::2]) == ["a", "b"]


def test_the_deadline_is_of_silence_and_a_slow_client_in_time_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(roster_module, "POLL_SECONDS", 0.01)
    grid = FakeGrid({n: Client(str(n)) for n in range(4)})
    pull, began = grid.pull_messages, time.monotonic()
    given = 0

    def slow(ids: Any) -> Any:
        nonlocal given
        if time.monotonic() - began < 0.15 * (given + 1):
            return []
        given += 1
        return pull(ids)

    grid.pull_messages = slow  # type: ignore[method-assign]
    hellos = [Message(RecordDict(), n, HELLO) for n in range(4)]
    assert len(list(exchange(grid, hellos, 0.4))) == 4  # 0.6 s in all, 0.15 s from one to the next


def test_a_message_that_flower_cannot_take_is_not_waited_for():
    began = time.monotonic()
    assert list(exchange(FakeGrid({}), messages(404), 30.0)) == []
    assert list(exchange(FakeGrid({}), [], 30.0)) == []
    assert time.monotonic() - began < 1.0


# Newcomers


def test_a_newcomer_that_is_slow_to_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roster_module, "GRACE_SECONDS", 0.1)
    grid = FakeGrid(nodes(("a", "b")))
    roster = refreshed(grid)
    grid.nodes[7] = lambda message: None
    began = time.monotonic()
    roster.refresh(grid, 2)
    assert 0.1 < time.monotonic() - began < 5.0 and roster.names() == ["a", "b"]
    roster.refresh(grid, 2)  # its answer is still waited for, and nothing is asked twice
    assert asked(grid) == [100, 101, 7]


def test_with_too_few_known_it_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roster_module, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(roster_module, "HELLO_SECONDS", 0.3)
    grid = FakeGrid(nodes(("a",), c0=lambda message: None) | {7: lambda message: None})
    began = time.monotonic()
    Roster().refresh(grid, 2)
    assert time.monotonic() - began > 0.3


def test_a_client_of_ours_that_cannot_say_its_name_is_asked_again():
    grid = FakeGrid({7: lambda message: Error(1, "its trainer is away"), 8: Client("b")})
    roster = Roster(ours=True)
    roster.refresh(grid)
    assert roster.names() == ["b"]
    grid.nodes[7] = Client("a")
    roster.refresh(grid)
    assert roster.names() == ["a", "b"] and asked(grid) == [7, 8, 7]


def test_a_client_that_joins_takes_part_from_the_next_round_on():
    grid = FakeGrid(nodes(("a", "b")))
    seen = Seen()

    def join(round: int, sampled: list[str]) -> None:
        if round == 2:
            grid.nodes[50] = Client("c")

    seen.on_sampled = join  # type: ignore[method-assign]
    AdapterStrategy(hooks=seen, clients=2, deadline=0.3, ours=True).start(
        grid, ARRAYS, num_rounds=4
    )
    took_part = [sorted(outcome.reports) for outcome in seen.outcomes[1:]]
    assert took_part == [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]


# Stragglers


class LateGrid(FakeGrid):
    """Node 101 answers the first round only when the second has been asked for."""

    def pull_messages(self, message_ids: Any) -> Any:
        trained = [m for m in self.sent if m.metadata.message_type == "train"]
        asked_twice = len({TrainRequest.decode(m.content).round for m in trained}) > 1
        found = []
        for reply in super().pull_messages(message_ids):
            late = reply.metadata.src_node_id == 101 and reply.metadata.message_type == "train"
            if late and not asked_twice:
                self.held.append(reply)
            else:
                found.append(reply)
        if asked_twice and self.held:  # whoever asks for them may have them now
            ready = [r for r in self.held if r.metadata.reply_to_message_id in set(message_ids)]
            found += ready
            self.late += len(self.held)
            self.held = []
        return found

    held: list[Message]
    late: int


def test_an_update_that_comes_too_late_is_in_no_later_round():
    """The result is that of a client which failed in the first round and was back in the second."""

    class Absent(Client):
        def reply(self, request: TrainRequest) -> Answer:
            return super().reply(request) if request.round > 1 else None

    grid = LateGrid(nodes(("a", "b", "c")))
    grid.held, grid.late = [], 0
    late, absent = Seen(), Seen()
    options: dict[str, Any] = {"clients": 3, "min_clients": 2, "deadline": 0.3}
    AdapterStrategy(hooks=late, **options).start(grid, ARRAYS, num_rounds=3)
    without = FakeGrid(nodes(("a", "b", "c"), cb=Absent("b", weight=11.0)))
    AdapterStrategy(hooks=absent, **options).start(without, ARRAYS, num_rounds=3)
    assert grid.late == 1  # it did come, while the second round was at work
    assert [sorted(o.reports) for o in late.outcomes[1:]] == [
        ["a", "c"],
        ["a", "b", "c"],
        ["a", "b", "c"],
    ]
    assert late.outcomes[1].failed == {"b": "no reply within the deadline"}
    for one, other in zip(late.outcomes, absent.outcomes, strict=True):
        assert one.state.adapter.digest() == other.state.adapter.digest()


def test_three_of_ten_clients_failing_each_round_do_not_end_a_run():
    names = tuple(str(k) for k in range(10))

    class Flaky(Client):
        def reply(self, request: TrainRequest) -> Answer:
            fails = (int(self.name) + 3 * request.round) % 10 < 3
            return Error(1, "killed") if fails else super().reply(request)

    grid = FakeGrid(nodes(names, **{f"c{name}": Flaky(name) for name in names}))
    seen = Seen()
    AdapterStrategy(hooks=seen, clients=7, min_clients=7, deadline=0.3, ours=True).start(
        grid, ARRAYS, num_rounds=10
    )
    for outcome in seen.outcomes[1:]:
        assert len(outcome.reports) == 7 and len(outcome.failed) == 3
    assert {name for outcome in seen.outcomes for name in outcome.failed} == set(names)


LOST = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


@pytest.mark.parametrize("code", LOST)
def test_who_died_with_a_message_is_asked_once_more_and_the_result_is_the_same(code: int):
    plain = Seen()
    AdapterStrategy(hooks=plain).start(FakeGrid(nodes()), ARRAYS, num_rounds=2)
    deaths: list[int] = []

    class Dying(Client):
        def reply(self, request: TrainRequest) -> Answer:
            if request.round not in deaths:
                deaths.append(request.round)
                return Error(code, "died")
            return super().reply(request)

    seen = Seen()
    grid = FakeGrid(nodes(c1=Dying("1", weight=11.0)))
    AdapterStrategy(hooks=seen).start(grid, ARRAYS, num_rounds=2)
    assert deaths == [1, 2] and seen.last.failed == {}
    assert seen.last.state.adapter.digest() == plain.last.state.adapter.digest()


def test_who_dies_again_and_again_or_stays_away_fails_with_flowers_reason(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(roster_module, "BACK_SECONDS", 0.1)
    grid = FakeGrid({1: lambda message: Error(8, "it crashed"), 2: lambda message: RecordDict()})
    replies = list(exchange(grid, messages(1, 2), 5.0))
    assert [m.metadata.dst_node_id for m in grid.sent] == [1, 2, 1, 1]
    assert sorted(r.error.reason if r.has_error() else "" for r in replies) == ["", "it crashed"]

    def leave(message: Message) -> Answer:
        del gone.nodes[1]
        return Error(5, "unavailable")

    gone = FakeGrid({1: leave})
    (reply,) = exchange(gone, messages(1), 5.0)
    assert reply.error.reason == "unavailable" and len(gone.sent) == 1


def test_an_exception_in_a_client_app_is_no_loss_to_be_asked_again():
    grid = FakeGrid({1: lambda message: Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "bug")})
    (reply,) = exchange(grid, messages(1), 5.0)
    assert reply.error.reason == "bug" and len(grid.sent) == 1


def test_what_flower_answers_itself_counts_for_the_client_that_was_asked():
    """For a node that is gone it is the SuperLink that replies, under its own id."""

    class Gone(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                reply.metadata.__dict__["_src_node_id"] = 1
                yield reply

    grid = Gone({9: Client("a"), 10: lambda message: Error(ErrorCode.UNKNOWN, "gone")})
    sent = [Message(RecordDict(), node, "train") for node in (10,)]
    (reply,) = exchange(grid, sent, 0.2)
    assert reply.metadata.src_node_id == 10
    assert refreshed(Gone(nodes(("a", "b")))).names() == ["a", "b"]
