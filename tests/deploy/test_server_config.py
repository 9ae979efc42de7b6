from __future__ import annotations

from pathlib import Path

import pytest

from deploy.server_config import ServerConfig, write_example
from fedgraft.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_the_example_loads_and_its_paths_are_relative_to_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    write_example(Path("there/server.toml"), Path("there/KEYS"))
    assert 'keys = "KEYS"' in (tmp_path / "there/server.toml").read_text()
    config = ServerConfig.load(Path("there/server.toml"))
    assert config.keys == tmp_path / "there" / "KEYS"
    assert config.state == tmp_path / "there" / "server-state"
    assert (config.host, config.port, config.superlink_port) == ("127.0.0.1", 9443, 8000)
    defaults = ServerConfig.model_validate({"keys": "k", "state": "s"})
    assert config.limits == defaults.limits  # the example shows the defaults
    with pytest.raises(ConfigError, match="exists already"):
        write_example(Path("there/server.toml"), Path("KEYS"))
    write_example(Path("there/other.toml"), Path("KEYS"))
    assert ServerConfig.load(Path("there/other.toml")).keys == tmp_path / "KEYS"


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ('keys = "k"\nstate = "s"\nlisten-to = "x:1"', "unknown config key listen-to", "listen"),
        ('keys = "k"\nstate = "s"\n[limits]\nbody = 3', "key limits.body", "body-mib"),
        ('keys = "k"\nstate = "s"\nsuperlink-port = "8000"', "superlink-port .* is '8000'", "Set"),
        ('keys = "k"', "config key state is missing", "--init"),
        ('keys = "k"\nstate = "s"\nlisten = "9443"', "must be HOST:PORT", "0.0.0.0:9443"),
        ('keys = "k"\nstate = "s"\nlisten = "a:99999"', "must be HOST:PORT", "0.0.0.0:9443"),
        ('keys = "k"\nstate = "s"\nlisten = "a; b:1"', "must be HOST:PORT", "0.0.0.0:9443"),
        ('keys = "k"\nstate = "s"\nlisten = "a:8000"', "the same port, 8000", "different"),
        ("keys = ", "not valid TOML", "line"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    tmp_path: Path, text: str, message: str, remedy: str
):
    with pytest.raises(ConfigError, match=message) as caught:
        ServerConfig.load(written(tmp_path, text))
    assert remedy in caught.value.remedy and caught.value.exit_status == 2


def test_an_ipv6_address_loses_its_brackets(tmp_path: Path):
    config = ServerConfig.load(written(tmp_path, 'keys = "k"\nstate = "s"\nlisten = "[::1]:9"'))
    assert (config.host, config.port) == ("::1", 9)
