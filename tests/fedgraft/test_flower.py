"""What of Flower's inside FedGraft touches: a new release that changes it fails here, by name."""

from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.flower_config import read_superlink_connection
from flwr.common.config import get_fused_config_from_dir, parse_config_args
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

from fedgraft import flower
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import RunError


def test_messages_can_be_made_once_the_process_has_an_identity():
    flower.set_identity(77)
    message = Message(RecordDict(), 5, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (77, flower.SERVER_NODE)
    flower.set_message_id(message, "m-1")
    reply = Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=message)
    assert message.metadata.message_id == reply.metadata.reply_to_message_id == "m-1"
    assert (reply.metadata.src_node_id, reply.metadata.run_id) == (5, 77)


def test_objects_are_asked_for_soon_and_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    pull, inflate = (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    )
    for function in (pull, inflate):
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__))
    came: list[float] = []

    def later(object_id: str) -> bytes:
        came.append(time.monotonic())
        if len(came) < 3:
            raise ObjectUnavailableError(object_id)
        return b"here"

    flower.ask_soon_for_objects()
    assert pull(["a"], later) == {"a": b"here"}
    assert came[2] - came[0] < 1.0  # 0.05 s and 0.1 s, give or take a fifth; Flower takes 3 s

    def never(object_id: str) -> bytes:
        raise ObjectUnavailableError(object_id)

    flower.ask_soon_for_objects(0.2)
    with pytest.raises(ObjectPullError):
        pull(["a"], never)
    assert inflate.__kwdefaults__["max_time"] == 0.2


def test_lines_with_nothing_in_them_are_left_out(monkeypatch: pytest.MonkeyPatch):
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "filters", [])
    flower.leave_out_empty_lines()
    kept = [
        text
        for text in ("", "  ", "Sent successfully")
        if logger.filter(logger.makeRecord("flwr", logging.INFO, "", 0, text, (), None))
    ]
    assert kept == ["Sent successfully"]


def test_an_error_reply_says_what_was_raised():
    flower.set_identity(77)
    message = Message(RecordDict(), 5, "train")
    flower.set_message_id(message, "m-2")
    reply = flower.error_reply(message, ValueError("no such thing"))
    assert reply.has_error() and not reply.has_content()
    assert reply.error.reason == "ValueError: no such thing"
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (5, "m-2")


# The app folder and Flower's configuration, read by Flower itself


def test_the_app_folder_carries_the_config_and_no_code(tmp_path: Path):
    config = Config().with_overrides(
        {"task.template": 'Question: "{question}"\nAnswer: {answer}', "task.data": "C:\\new"}
    )
    run_config = {RUN_CONFIG_KEY: config.to_json(), "fedgraft.out": "/tmp/x", "n": 3}
    flower.write_app(tmp_path, run_config)
    tree, _ = load_and_validate(tmp_path / "pyproject.toml", check_module=False)
    components = tree["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    fused = get_fused_config_from_dir(tmp_path, {})
    assert fused == run_config and Config.from_run_config(fused) == config
    (tmp_path / "secret.py").write_text("x = 1")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as bundle:
        files = [name for name in bundle.namelist() if not name.startswith(".info/")]
    assert files == ["pyproject.toml"]


def test_our_own_pyproject_is_an_app_whose_bundle_has_no_code():
    root = Path(flower.__file__).parents[1]
    tree, _ = load_and_validate(root / "pyproject.toml", check_module=True)
    assert tree["tool"]["flwr"]["app"]["fab-include"] == ["/pyproject.toml"]


def test_flower_finds_our_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flower.write_connection(tmp_path, 8123)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    for name in (None, flower.CONNECTION):
        connection = read_superlink_connection(name)
        assert (connection.address, connection.insecure) == ("127.0.0.1:8123", True)
    flower.write_connection(tmp_path, 8123, tmp_path / "ca.crt")
    connection = read_superlink_connection(flower.CONNECTION)
    assert (connection.insecure, connection.root_certificates) == (False, str(tmp_path / "ca.crt"))


def test_flower_reads_our_simulation_settings():
    settings = parse_config_args([flower.simulation_settings(20, 2, 0)])
    assert settings == {
        "num-supernodes": 20,
        "client-resources-num-cpus": 2,
        "client-resources-num-gpus": 0.0,
    }


def test_flowers_processes_are_quiet_and_at_home(tmp_path: Path):
    environment = flower.flower_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    # Their commands are those of this Python's environment.
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "FLWR_HOME" not in os.environ or os.environ["FLWR_HOME"] != str(tmp_path)


# Processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_a_process_started_ends_with_it_even_in_another_session(tmp_path: Path):
    grandchild = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True);"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    log_path = tmp_path / "log"
    with log_path.open("w") as log, flower.started(python(code), log, tmp_path, os.environ) as one:
        end = time.monotonic() + 30
        while not log_path.read_text().strip() and time.monotonic() < end:
            time.sleep(0.02)
        other = psutil.Process(int(log_path.read_text()))
        assert other.is_running() and one.poll() is None
        # Ctrl-C at our terminal reaches neither.
        assert os.getsid(one.pid) != os.getsid(0)
    assert one.poll() is not None
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flower, "_STOP_SECONDS", 0.3)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(600)"
    )
    log_path = tmp_path / "log"
    with (
        pytest.raises(KeyError),
        log_path.open("w") as log,
        flower.started(python(code), log, tmp_path, os.environ) as process,
    ):
        while not log_path.read_text():
            time.sleep(0.02)
        raise KeyError  # whatever ends the block
    assert process.poll() == -9


def test_a_process_that_has_ended_is_no_trouble(tmp_path: Path):
    with (
        (tmp_path / "log").open("w") as log,
        flower.started(python("print(input())"), log, tmp_path, os.environ) as process,
    ):
        process.wait(30)  # its standard input is empty, so it does not wait for us
    assert process.returncode == 1


def sleeper() -> subprocess.Popen[str]:
    return subprocess.Popen(python("import time; time.sleep(60)"), text=True)


def test_waiting_for_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process = sleeper()
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            flower.wait_for_port(listener.getsockname()[1], process, tmp_path / "log")
        monkeypatch.setattr(flower, "_START_SECONDS", 0.3)
        with pytest.raises(RunError, match=r"did not start \(exit None\)"):
            flower.wait_for_port(flower.free_port(), process, tmp_path / "log")
    finally:
        process.kill()
        process.wait()
    monkeypatch.setattr(flower, "_START_SECONDS", 60.0)  # one that died is not waited for
    with pytest.raises(RunError, match=r"did not start \(exit -9\)") as caught:
        flower.wait_for_port(flower.free_port(), process, tmp_path / "log")
    assert str(tmp_path / "log") in caught.value.remedy


def test_a_free_port_is_free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", flower.free_port()))
