"""The trainer behind its socket: one order at a time, callers that leave, idle times, the relay."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from trainers import listening, order, own, request
from waiting import until

from client import relay
from client.resident import service
from client.resident.desk import Answer, Desk
from client.resident.orders import encode
from client.resident.protocol import CLIENT, PROTOCOL, SOCKET, address, channel
from client.resident.trainer_pb2 import Greeting, Order, Welcome
from client.resident.trainer_pb2_grpc import ResidentTrainerStub
from client.resident.worker import BusyError
from fedgraft import __version__
from fedgraft.adapter import Tensors, digest, from_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import ConfigError
from fedgraft.flower import set_identity, set_message_id
from fedgraft.messages import HELLO, Hello, Reply
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.stopping import stop_if_asked


class Echo(Desk):
    """Answers with what it is sent; an order of type "wait" is at work until it is given up."""

    began: threading.Event = threading.Event()
    ended: threading.Event = threading.Event()

    def answer(self, order: Order) -> Answer:
        if order.kind == "wait":
            self.began.set()
            try:
                while True:
                    stop_if_asked()
                    time.sleep(0.005)
            finally:
                self.ended.set()
        return Answer(order.content, out_of_memory=order.kind == "full")


@pytest.fixture
def echo(tmp_path: Path) -> Echo:
    Echo.began, Echo.ended = threading.Event(), threading.Event()
    return Echo(own(tmp_path))


def empty(kind: str) -> Order:
    return Order(protocol=PROTOCOL, fedgraft=__version__, kind=kind, content=encode(RecordDict()))


def test_it_says_who_and_how_it_is(echo: Echo, tmp_path: Path) -> None:
    with listening(echo, tmp_path / "s"), channel(tmp_path / "s") as connection:
        said = ResidentTrainerStub(connection).Greet(Greeting())
        assert (said.protocol, said.fedgraft, said.client) == (PROTOCOL, __version__, "north")
        assert not said.busy and (tmp_path / "s").stat().st_mode & 0o077 == 0
        health = health_pb2_grpc.HealthStub(connection)
        for name in ("", service.SERVICE):
            told = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert told.status == health_pb2.HealthCheckResponse.SERVING


def test_a_path_may_hold_what_has_a_meaning_in_a_uri(echo: Echo, tmp_path: Path) -> None:
    folder = tmp_path / "a #?%20b"
    folder.mkdir()
    with listening(echo, folder / "s"), channel(folder / "s") as connection:
        assert ResidentTrainerStub(connection).Greet(Greeting()).client == "north"


def test_an_adapter_of_200_megabytes_passes_both_ways(echo: Echo, tmp_path: Path) -> None:
    large = bytes(200 * 2**20)  # 200 MiB
    with listening(echo, tmp_path / "s"), channel(tmp_path / "s") as connection:
        asked = Order(protocol=PROTOCOL, fedgraft=__version__, kind="train", content=large)
        assert len(ResidentTrainerStub(connection).Work(asked).content) == len(large)


def test_another_version_is_told_so(echo: Echo, tmp_path: Path) -> None:
    with listening(echo, tmp_path / "s"), channel(tmp_path / "s") as connection:
        for other in ({"protocol": 0}, {"fedgraft": "0.0.1"}):
            asked = empty("train")
            for name, value in other.items():
                setattr(asked, name, value)
            with pytest.raises(grpc.RpcError) as caught:
                ResidentTrainerStub(connection).Work(asked)
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert f"the trainer is FedGraft {__version__}" in caught.value.details()


def test_one_order_at_a_time_and_none_for_a_caller_that_left(echo: Echo, tmp_path: Path) -> None:
    with listening(echo, tmp_path / "s") as worker, channel(tmp_path / "s") as connection:
        trainer = ResidentTrainerStub(connection)
        call = trainer.Work.future(empty("wait"))
        assert Echo.began.wait(20) and trainer.Greet(Greeting()).busy
        with pytest.raises(grpc.RpcError) as caught:
            trainer.Work(empty("train"))
        assert caught.value.code() == grpc.StatusCode.ABORTED
        # Who this is, is known all the same.
        content = trainer.Work(empty(HELLO)).content
        said = recorddict_from_proto(ProtoRecordDict.FromString(content))
        assert Hello.decode(said) == Hello("north")
        call.cancel()
        # The next caller waits for the step under way, and need not be refused.
        assert trainer.Work(empty("train")).content == encode(RecordDict())
        assert Echo.ended.is_set()
        until(lambda: not worker.busy)


def test_after_memory_has_run_out_a_new_process_is_asked_for(
    echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(echo, tmp_path / "s") as worker, channel(tmp_path / "s") as connection:
        with ThreadPoolExecutor(1) as pool:
            worker.stop()
            until(lambda: not worker.busy)
            fresh = service.Worker(echo, 60.0)
            job = fresh.submit(empty("full"))
            refused: list[bool] = []

            def enter() -> None:  # in the very moment in which the order is done
                with pytest.raises(BusyError):
                    fresh.submit(empty("train"))
                refused.append(True)
                threading.Event.set(job.done)

            monkeypatch.setattr(job.done, "set", enter)
            ended = pool.submit(fresh.work)
            assert job.done.wait(20) and job.answer is not None
            assert ended.result(20) is True and refused
        with pytest.raises(grpc.RpcError) as caught:
            ResidentTrainerStub(connection).Work(empty("train"))
        assert caught.value.code() == grpc.StatusCode.ABORTED


def test_base_and_data_are_let_go_when_idle_and_loaded_anew(tiny: Config, tmp_path: Path) -> None:
    desk = Desk(own(tmp_path))
    task = resident_task(tiny)
    start = resident_model(task, tiny).initial_adapter(0).tensors()
    with listening(desk, tmp_path / "s", idle_seconds=0.3), channel(tmp_path / "s") as connection:
        trainer = ResidentTrainerStub(connection)

        def trained() -> str:
            content = trainer.Work(order("train", tiny, request(start))).content
            reply = Reply.decode(recorddict_from_proto(ProtoRecordDict.FromString(content)))
            assert reply.arrays is not None, reply.refusal
            return digest(from_arrays(reply.arrays))

        first = trained()
        until(lambda: trainer.Greet(Greeting()).base == "")
        assert trained() == first
    assert resident_task(tiny) is not task


def test_a_path_that_is_too_long_for_a_socket_is_refused(echo: Echo, tmp_path: Path) -> None:
    worker = service.Worker(echo, 1.0)
    with pytest.raises(ConfigError, match="is longer than 100 bytes"):
        service.start(worker, tmp_path / ("s" * 100))


# The relay


def relayed(kind: str, config: Config, content: RecordDict) -> RecordDict:
    """Let the relay answer a message as Flower does."""
    set_identity(7)
    message = Message(content, 2, kind)
    set_message_id(message, "m")
    context = Context(7, 2, {}, RecordDict(), {RUN_CONFIG_KEY: config.to_json()})
    reply: Message = relay.app(message=message, context=context)
    return reply.content


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The socket that the relay is told of, with a short patience."""
    monkeypatch.setenv(SOCKET, str(tmp_path / "s"))
    monkeypatch.setenv(CLIENT, "north")
    monkeypatch.setenv(relay.WAIT, "0.3")
    return tmp_path / "s"


def test_the_relay_brings_the_clients_own_answers(
    tiny: Config, model: ResidentModel, ours: Path, tmp_path: Path
) -> None:
    start: Tensors = model.initial_adapter(0).tensors()
    desk = Desk(own(tmp_path))
    with listening(desk, ours):
        reply = Reply.decode(relayed("train", tiny, request(start)))
        assert reply.arrays is not None and reply.weight == 390, reply.refusal
        reply = Reply.decode(relayed("evaluate", tiny, request(start)))
        assert reply.weight == 180 and "accuracy" in reply.metrics
        assert Hello.decode(relayed(HELLO, tiny, RecordDict())).name == "north"


def test_the_relay_says_that_the_trainer_is_away(tiny: Config, ours: Path) -> None:
    said = Reply.decode(relayed("train", tiny, RecordDict())).refusal
    assert said.startswith("client north: its resident trainer is away (")
    assert Hello.decode(relayed(HELLO, tiny, RecordDict())) == Hello("north")


def test_the_relay_says_that_the_trainer_is_of_another_version(
    tiny: Config, ours: Path, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*_: Any) -> Welcome:
        return Welcome(protocol=PROTOCOL, fedgraft="0.0.1")

    monkeypatch.setattr(service.Service, "Greet", older)
    with listening(echo, ours):
        said = Reply.decode(relayed("train", tiny, RecordDict())).refusal
    assert f"is FedGraft 0.0.1, and its SuperNode {__version__}; start `fedgraft client`" in said
    server = grpc.server(ThreadPoolExecutor(1))  # one that knows no such service
    server.add_insecure_port(address(ours))
    server.start()
    said = Reply.decode(relayed("train", tiny, RecordDict())).refusal
    server.stop(None).wait()
    assert said == "client north: its resident trainer is of another version"


def test_the_relay_says_that_the_trainer_is_busy(tiny: Config, ours: Path, echo: Echo) -> None:
    with listening(echo, ours), channel(ours) as connection:
        call = ResidentTrainerStub(connection).Work.future(empty("wait"))
        assert Echo.began.wait(20)
        said = Reply.decode(relayed("train", tiny, RecordDict())).refusal
        call.cancel()
    assert said == "client north: its resident trainer is at work for somebody else"


def test_the_relay_waits_for_what_a_dead_run_left_at_work(
    tiny: Config, ours: Path, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller is there yet, and goes away only after the next run has asked."""
    monkeypatch.setenv(relay.WAIT, "20")
    with listening(echo, ours), channel(ours) as connection, ThreadPoolExecutor(1) as pool:
        call = ResidentTrainerStub(connection).Work.future(empty("wait"))
        assert Echo.began.wait(20)
        refused, ask = threading.Event(), relay.time.sleep
        monkeypatch.setattr(relay.time, "sleep", lambda s: (refused.set(), ask(s)))
        content = RecordDict({"config": ConfigRecord()})
        answered = pool.submit(relayed, "train", tiny, content)
        assert refused.wait(20)
        call.cancel()
        assert answered.result(20) == content


def test_the_relay_needs_a_client(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET, raising=False)
    said = Reply.decode(relayed("train", tiny, RecordDict())).refusal
    assert said == f"{SOCKET} is not set; a SuperNode is started by `fedgraft client`"


def test_what_a_client_kept_back_stays_back(tiny: Config, ours: Path, tmp_path: Path) -> None:
    """A refusal crosses the socket in the words of the policy."""
    with listening(Desk(own(tmp_path, "largest-rank = 4")), ours):
        content = RecordDict({"config": ConfigRecord()})
        said = Reply.decode(relayed("train", tiny, content)).refusal
    assert said.startswith("policy of client north, largest-rank: the adapter's largest rank is 8")


def test_the_relay_imports_no_torch() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import client.relay;"
        "print(round(time.perf_counter() - began, 2), *{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    print(f"client.relay is imported in {seconds} s")
    assert "grpc" in modules and "flwr" in modules
    assert not {"torch", "transformers", "peft", "datasets", "scipy", "pydantic"} & set(modules)
