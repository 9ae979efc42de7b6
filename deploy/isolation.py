"""What keeps the server's code away from a client's data: two users, and folders between them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path

from deploy.as_user import become
from deploy.client_config import ClientConfig, user_and_group
from deploy.config_file import NODE, TRAINER
from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors

NODE_KEYS = ("ca.crt", "client.crt", "client.key", "node")
"""What the SuperNode needs of the client's keys."""
_PACKAGES = ("fedgraft", "strategies", "client", "deploy")
"""The code that the trainer runs."""
_LOOKED_INTO = 1000  # files of a folder of data


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
        return
    user = _user_of(config, only)
    if user_and_group(user)[0] != os.geteuid():
        raise ConfigError(
            f"--only {only} is started by user {os.geteuid()}, and the config names {user}",
            f"Start it as that user: runuser -u {user} -- fedgraft client --only {only} ...",
        )


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
        _prepare_one(config, only)
        return
    assert config.trainer_user is not None and config.node_user is not None
    trainer, node = user_and_group(config.trainer_user), user_and_group(config.node_user)
    if 0 in (*trainer, *node) or trainer[0] == node[0] or trainer[1] == node[1]:
        raise ConfigError(
            "trainer-user and node-user must be two users of different groups, none of them root",
            "Make them: useradd -r fedgraft-trainer; useradd -r fedgraft-node",
        )
    with disk_errors(config.state):
        config.state.chmod(0o711)  # to be passed through, not listed
        for path in (config.kept, *config.kept.rglob("*")):
            os.chown(path, *trainer, follow_symlinks=False)
        _renew(config.node, node)
        # The trainer makes the socket there; the SuperNode's group passes to it, and nobody else.
        os.chown(config.socket.parent, trainer[0], node[1])
        config.socket.parent.chmod(0o710)
        if config.keys is not None:
            copy_keys(config.keys, config.node_keys, node[1])
    _check(config, trainer, node)


def _user_of(config: ClientConfig, only: str) -> str | int:
    user = config.trainer_user if only == TRAINER else config.node_user
    assert user is not None
    return user


def _prepare_one(config: ClientConfig, only: str) -> None:
    """Do for one part, as its user, what `prepare` does for both as root.

    Raises:
        ConfigError: this user cannot do its work, or can read or change what it must not.
    """
    if only == NODE:
        for path in private_paths(config, keys=False):
            if os.access(path, os.R_OK):
                raise _too_open(config, path)
        for path in trusted_paths(config):
            if os.access(path, os.W_OK):
                raise _unprotected(config, path)
        return
    for path in _needed(config):
        if not os.access(path, os.R_OK):
            raise _out_of_reach(config, path)
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


def _check(config: ClientConfig, trainer: tuple[int, int], node: tuple[int, int]) -> None:
    if open_to := readable(*node, private_paths(config)):
        raise _too_open(config, open_to[0])
    if open_to := writable(*node, trusted_paths(config)):
        raise _unprotected(config, open_to[0])
    needed = _needed(config)
    can = readable(*trainer, needed)
    if missing := [path for path in needed if path not in can]:
        raise _out_of_reach(config, missing[0])
    for user, ids in ((config.trainer_user, trainer), (config.node_user, node)):
        if not readable(*ids, [Path(sys.executable)]):
            raise ConfigError(
                f"user {user} cannot run {sys.executable}",
                "Install FedGraft where every user can read it, /opt say.",
            )


def _needed(config: ClientConfig) -> list[Path]:
    """Return what the trainer must be able to read."""
    return [config.policy, *([] if config.data.path is None else [config.data.path])]


def _too_open(config: ClientConfig, path: Path) -> ConfigError:
    return ConfigError(
        f"node-user {config.node_user} can read {path}, and with it the server's code",
        f"Take it away: chown {config.trainer_user} {path}; chmod go= {path}",
    )


def _unprotected(config: ClientConfig, path: Path) -> ConfigError:
    return ConfigError(
        f"node-user {config.node_user} can change {path}, and with it the server's code",
        f"Take it away: chown root {path}; chmod go-w {path}",
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
    """Return what the SuperNode's user must not be able to change: policy, data, code that runs."""
    places = [import_module(name).__path__[0] for name in _PACKAGES]
    code = [sys.executable, sysconfig.get_path("purelib"), *places]
    data = [] if config.data.path is None else [config.data.path]
    return [config.policy, config.policy.parent, *data, *map(Path, code)]


def _below(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder; nothing where this user may not look."""
    with suppress(PermissionError):
        yield from folder.rglob("*")


def readable(uid: int, gid: int, paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that a user can read, asked as that user; by root only."""
    return _allowed(uid, gid, paths, os.R_OK)


def writable(uid: int, gid: int, paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that a user can change, asked as that user; by root only."""
    return _allowed(uid, gid, paths, os.W_OK)


def _allowed(uid: int, gid: int, paths: Iterable[Path], how: int) -> list[Path]:
    asked = list(paths)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(uid, gid)
            found = [number for number, path in enumerate(asked) if os.access(path, how)]
            with os.fdopen(into, "w") as file:
                json.dump(found, file)
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise ConfigError(f"user {uid} cannot be taken on here", "Start `fedgraft client` as root.")
    return [asked[number] for number in json.loads(text)]
