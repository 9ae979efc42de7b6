"""A container or a hardened service without either's machinery: namespaces, a root of its own.

The process sees the machine's programs, this Python and this checkout, and of the rest only what
is mounted; its root is read-only, it is the user that was named, with no way to other rights, and
it has a network or none.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VENV, PYTHON = Path(sys.prefix), Path(sys.base_prefix)
IMAGE = Path("/opt/fedgraft")
"""Where images and units have FedGraft."""
_MACHINE = ("usr", "bin", "sbin", "lib", "lib64")
_OF_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl", "alternatives")


@dataclass(frozen=True)
class Mount:
    """Something of the machine's, seen in the box at `target`."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Box:
    """One container's or service's surroundings.

    Attributes:
        users: name to number, of a group of the same name each.
        user: who runs in it.
        groups: what further groups that user is in.
        network: whether it has any.
    """

    users: Mapping[str, int]
    user: str
    groups: Sequence[str] = ()
    network: bool = True
    mounts: Sequence[Mount] = field(default_factory=list)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return what runs a command in the box, as one process: its id is the command's."""
        lines = ["set -e", 'R="$1"', "mount -t tmpfs -o mode=755 tmpfs $R", "umask 022"]
        for name in _MACHINE:
            path = Path("/", name)
            if path.is_symlink():
                lines.append(f"ln -s {path.readlink()} $R/{name}")
            elif path.is_dir():
                lines += [f"mkdir $R/{name}", f"mount --rbind /{name} $R/{name}"]
        lines += [
            "mkdir $R/dev $R/proc $R/tmp $R/etc",
            "mount --rbind /dev $R/dev; mount --rbind /proc $R/proc",
            "mount -t tmpfs -o mode=1777 tmpfs $R/tmp",
            *(f"if [ -e /etc/{name} ]; then cp -a /etc/{name} $R/etc/; fi" for name in _OF_ETC),
            f"printf %s {shlex.quote(self._passwd())} > $R/etc/passwd",
            f"printf %s {shlex.quote(self._group())} > $R/etc/group",
            "echo '127.0.0.1 localhost server' > $R/etc/hosts",
        ]
        seen = [Mount(path, str(path), True) for path in (PYTHON, VENV, ROOT)]
        for mount in (*seen, Mount(VENV, str(IMAGE), True), *self.mounts):
            there, source = f"$R{mount.target}", shlex.quote(str(mount.source))
            if mount.source.is_dir():
                lines.append(f"mkdir -p {there}")
            else:
                lines.append(f"mkdir -p {Path(there).parent}; [ -e {there} ] || touch {there}")
            lines.append(f"mount --bind {source} {there}")
            if mount.read_only:
                lines.append(f"mount -o remount,bind,ro {there}")
        lines.append("mount -o remount,ro $R")
        if not self.network and shutil.which("ip"):
            lines.append("ip link set lo up")
        number = self.users[self.user]
        groups = ",".join(str(self.users[name]) for name in self.groups) or str(number)
        variables = {
            "PATH": f"{IMAGE}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/tmp",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        lines.append(
            f"exec chroot --userspec={number}:{number} --groups={groups} $R "
            f"env -i {shlex.join(f'{k}={v}' for k, v in variables.items())} "
            f"setpriv --no-new-privs {shlex.join(words)}"
        )
        apart = ["unshare", "--mount", *([] if self.network else ["--net"])]
        return [*apart, "sh", "-c", "\n".join(lines), "box", _stand()]

    def run(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the box to its end."""
        return subprocess.run(self.command(words), capture_output=True, text=True, timeout=120)

    def start(self, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command in the box."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def _passwd(self) -> str:
        rows = {"root": 0, **self.users}
        return "".join(f"{name}:x:{n}:{n}::/tmp:/bin/sh\n" for name, n in rows.items())

    def _group(self) -> str:
        rows = {"root": 0, **self.users}
        member = dict.fromkeys(self.groups, self.user)
        return "".join(f"{name}:x:{n}:{member.get(name, '')}\n" for name, n in rows.items())


_stands: list[str] = []


def _stand() -> str:
    """Return an empty folder, on which every box mounts a root that others do not see."""
    if not _stands:
        _stands.append(tempfile.mkdtemp(prefix="box-"))
    return _stands[0]


def need_boxes() -> None:
    """Skip the test where no namespaces can be had."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "chroot"))):
        pytest.skip("containers' surroundings need root, unshare, setpriv and chroot")
    tried = ["unshare", "--mount", "--net", "sh", "-c", 'mount -t tmpfs tmpfs "$1"', "box"]
    if subprocess.run([*tried, _stand()], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
