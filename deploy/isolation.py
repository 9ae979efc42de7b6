"""What keeps the server's code away from a client's data: two users, and folders between them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from deploy.as_user import become
from deploy.client_config import ClientConfig, user_and_group
from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors

NODE_KEYS = ("ca.crt", "client.crt", "client.key", "node")
"""What the SuperNode needs of the client's keys."""
_LOOKED_INTO = 1000  # files of a folder of data


def prepare(config: ClientConfig) -> None:
    """Make the state folder's parts, each for who may use it.

    Raises:
        ConfigError: one of the users cannot do its work, or the SuperNode's can read what it must
            not.
        RunError: a folder cannot be made.
    """
    with disk_errors(config.state):
        for folder in (config.kept, config.node, config.socket.parent, config.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
    if not config.two_users:
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
    private = private_paths(config)
    if open_to := readable(*node, private):
        raise ConfigError(
            f"node-user {config.node_user} can read {open_to[0]}, and with it the server's code",
            f"Take it away: chown {config.trainer_user} {open_to[0]}; chmod go= {open_to[0]}",
        )
    needed = [config.policy, *([] if config.data.path is None else [config.data.path])]
    can = readable(*trainer, needed)
    if missing := [path for path in needed if path not in can]:
        raise ConfigError(
            f"trainer-user {config.trainer_user} cannot read {missing[0]}",
            f"Let it: chown {config.trainer_user} {missing[0]}, and let it pass the folders above",
        )
    for user, ids in ((config.trainer_user, trainer), (config.node_user, node)):
        if not readable(*ids, [Path(sys.executable)]):
            raise ConfigError(
                f"user {user} cannot run {sys.executable}",
                "Install FedGraft where every user can read it, /opt say.",
            )


def private_paths(config: ClientConfig) -> list[Path]:
    """Return what the SuperNode's user must not be able to read."""
    paths = [config.policy, config.kept, *config.kept.rglob("*")]
    if config.keys is not None:
        paths += [config.keys / name for name in NODE_KEYS[2:]]
    if config.data.path is not None:
        paths.append(config.data.path)
        paths += islice(config.data.path.rglob("*"), _LOOKED_INTO)
    return paths


def readable(uid: int, gid: int, paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that a user can read, asked as that user; by root only."""
    asked = list(paths)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(uid, gid)
            found = [number for number, path in enumerate(asked) if os.access(path, os.R_OK)]
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
