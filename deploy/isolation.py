"""What keeps the server's code away from a client's data: two users, and folders between them."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path

from deploy.client_config import ClientConfig, user_and_group
from deploy.config_file import NODE, TRAINER
from deploy.reach import asked_as, changed_at
from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors

NODE_KEYS = ("ca.crt", "client.crt", "client.key", "node")
"""What the SuperNode needs of the client's keys."""
_PACKAGES = ("fedgraft", "strategies", "client", "deploy")
"""The code that the trainer runs."""
_LOOKED_INTO = 1000  # files of a folder of data


class StrangerError(ConfigError):
    """What two users can do was asked by a third."""


def check_starter(config: ClientConfig, only: str | None = None) -> None:
    """Check that whoever starts a client can make its processes the users that it names.

    Args:
        config: the client's.
        only: the one part that is started; it takes its own user to start it.

    Raises:
        ConfigError: another user must start it.
    """
    if not config.two_users:
        return
    if only is None:
        if os.geteuid() != 0:
            raise ConfigError(
                "trainer-user and node-user are set, and only root can start two users' processes",
                "Start `fedgraft client` as root, each part as its own user with --only, or leave "
                "both keys out.",
            )
        _check_state(config)
        return
    user = _user_of(config, only)
    if user_and_group(user)[0] != os.geteuid():
        raise ConfigError(
            f"--only {only} is started by user {os.geteuid()}, and the config names {user}",
            f"Start it as that user: runuser -u {user} -- fedgraft client --only {only} ...",
        )


def _check_state(config: ClientConfig) -> None:
    """Check that nobody but root could have put something into the state folder, as root.

    Raises:
        ConfigError: the SuperNode's user can change it, or a link stands in a folder's place.
    """
    _, node = _users(config)
    if config.state.exists():
        for path in asked_as(node, lambda: [at for at in [changed_at(config.state)] if at]):
            raise _unprotected(config, path)
    ours = (config.kept, config.node, config.node_keys, config.socket.parent, config.log.parent)
    for folder in ours:
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a link", "Let it be a folder, or take another state.")


def prepare(config: ClientConfig, only: str | None = None) -> None:
    """Make the state folder's parts, each for who may use it.

    Args:
        config: the client's.
        only: the one part that is started; nothing of the other's is touched.

    Raises:
        ConfigError: one of the users cannot do its work, or the SuperNode's can read or change
            what it must not.
        RunError: a folder cannot be made.
    """
    folders = {TRAINER: [config.kept, config.socket.parent], NODE: [config.node]}
    wanted = [*folders[TRAINER], *folders[NODE]] if only is None else folders[only]
    with disk_errors(config.state):
        for folder in (*wanted, config.house(only).log.parent):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
    if not config.two_users:
        return
    if only is not None:
        if only == TRAINER:
            _open_socket(config)
        check_users(config)
        return
    trainer, node = _users(config)
    with disk_errors(config.state):
        os.chown(config.state, 0, 0)
        config.state.chmod(0o711)  # to be passed through, not listed
        for path in (config.kept, *config.kept.rglob("*")):
            os.chown(path, *trainer, follow_symlinks=False)
        _renew(config.node, node)
        # The trainer makes the socket there; the SuperNode's group passes to it, and nobody else.
        os.chown(config.socket.parent, trainer[0], node[1])
        config.socket.parent.chmod(0o710)
        if config.keys is not None:
            copy_keys(config.keys, config.node_keys, node[1])
    check_users(config)


def check_users(config: ClientConfig) -> None:
    """Check what the two users can do, as far as whoever asks can tell: root, or one of them.

    Raises:
        ConfigError: one of them cannot do its work, or the SuperNode's can read or change what it
            must not.
        StrangerError: somebody else asks.
    """
    trainer, node = _users(config)
    me = os.geteuid()
    if me not in (0, trainer[0], node[0]):
        raise StrangerError(
            "only root, trainer-user and node-user can tell what they can do",
            "Ask as one of them.",
        )
    if me in (0, node[0]):
        private = private_paths(config, keys=me == 0)
        trusted = trusted_paths(config)
        for path in asked_as(node, lambda: [one for one in private if os.access(one, os.R_OK)]):
            raise _too_open(config, path)
        for path in asked_as(node, lambda: [at for at in map(changed_at, trusted) if at]):
            raise _unprotected(config, path)
    if me in (0, trainer[0]):
        needed = [config.policy]
        if config.data.path is not None and not config.data_missing:
            needed.append(config.data.path)
        for path in asked_as(trainer, lambda: [p for p in needed if not os.access(p, os.R_OK)]):
            raise _out_of_reach(config, path)
    if me == 0:
        python = Path(sys.executable)
        for user, ids in ((config.trainer_user, trainer), (config.node_user, node)):
            if asked_as(ids, lambda: [] if os.access(python, os.R_OK) else [python]):
                raise ConfigError(
                    f"user {user} cannot run {sys.executable}",
                    "Install FedGraft where every user can read it, /opt say.",
                )


def _users(config: ClientConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return user and group of trainer and SuperNode.

    Raises:
        ConfigError: they are none, or not two.
    """
    assert config.trainer_user is not None and config.node_user is not None
    trainer, node = user_and_group(config.trainer_user), user_and_group(config.node_user)
    if 0 in (*trainer, *node) or trainer[0] == node[0] or trainer[1] == node[1]:
        raise ConfigError(
            "trainer-user and node-user must be two users of different groups, none of them root",
            "Make them: useradd -r fedgraft-trainer; useradd -r fedgraft-node",
        )
    return trainer, node


def _user_of(config: ClientConfig, only: str) -> str | int:
    user = config.trainer_user if only == TRAINER else config.node_user
    assert user is not None
    return user


def _open_socket(config: ClientConfig) -> None:
    """Let the SuperNode's group come to the socket, as the trainer's user.

    Raises:
        ConfigError: this user is not in that group.
    """
    group = user_and_group(_user_of(config, NODE))[1]
    try:
        os.chown(config.socket.parent, -1, group)
    except PermissionError:
        raise ConfigError(
            f"trainer-user {config.trainer_user} is not in the group of node-user "
            f"{config.node_user}, and so cannot let it come to {config.socket.parent}",
            f"Add it: usermod --append --groups {config.node_user} {config.trainer_user}",
        ) from None
    config.socket.parent.chmod(0o710)


def _renew(folder: Path, owner: tuple[int, int]) -> None:
    """Give the SuperNode's user its folder: an empty one, where another user had it.

    What is in there is never touched one by one: it may be links that lead elsewhere.
    """
    if folder.stat().st_uid != owner[0]:
        shutil.rmtree(folder)
        folder.mkdir(0o700)
        os.chown(folder, *owner)


def copy_keys(source: Path, target: Path, group: int) -> None:
    """Copy what the SuperNode needs of the keys to a folder that its group may read, not change."""
    target.mkdir(exist_ok=True)
    os.chown(target, -1, group)
    target.chmod(0o750)
    for name in NODE_KEYS:
        copy = target / name
        copy.unlink(missing_ok=True)
        copy.touch(0o400)
        copy.write_bytes((source / name).read_bytes())
        os.chown(copy, -1, group)
        copy.chmod(0o440)


def _too_open(config: ClientConfig, path: Path) -> ConfigError:
    return ConfigError(
        f"node-user {config.node_user} can read {path}, and with it the server's code",
        f"Take it away: chown {config.trainer_user} {path}; chmod go= {path}",
    )


def _unprotected(config: ClientConfig, path: Path) -> ConfigError:
    owner = "root" if path.is_dir() else config.trainer_user
    return ConfigError(
        f"node-user {config.node_user} can change {path}, and with it the server's code",
        f"Take it away: chown {owner} {path}; chmod go-w {path}; or, where others need {path} as "
        "it is, keep what this client trusts elsewhere.",
    )


def _out_of_reach(config: ClientConfig, path: Path) -> ConfigError:
    return ConfigError(
        f"trainer-user {config.trainer_user} cannot read {path}",
        f"Let it: chown {config.trainer_user} {path}, and let it pass the folders above",
    )


def private_paths(config: ClientConfig, keys: bool = True) -> list[Path]:
    """Return what the SuperNode's user must not be able to read.

    Args:
        config: the client's.
        keys: whether the original keys belong to it: not where the SuperNode has no copy.
    """
    paths = [config.policy, config.kept, *_below(config.kept)]
    if keys and config.keys is not None:
        paths += [config.keys / name for name in NODE_KEYS[2:]]
    if config.data.path is not None:
        paths += [config.data.path, *islice(_below(config.data.path), _LOOKED_INTO)]
    return paths


def trusted_paths(config: ClientConfig) -> list[Path]:
    """Return what the SuperNode's user must not be able to change: it decides what is trained.

    Policy, client.toml, ledger, data, a base in a folder, and all code that the trainer runs.
    """
    code = [Path(place) for name in _PACKAGES for place in import_module(name).__path__]
    libraries = Path(sysconfig.get_path("purelib"))
    paths = [config.policy, config.kept, Path(sys.executable), libraries, *_listed(libraries)]
    if config.file is not None:
        paths.append(config.file)
    for folder in code:
        paths += [folder, *_below(folder)]
    base = Path(config.model.base or "")
    for place in (config.data.path, base if base.is_absolute() else None):
        if place is not None:
            paths += [place, *islice(_below(place), _LOOKED_INTO)]
    return paths


def _listed(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder; nothing where this user may not look."""
    with suppress(PermissionError):
        yield from folder.iterdir()


def _below(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder; nothing where this user may not look."""
    with suppress(PermissionError):
        yield from folder.rglob("*")
