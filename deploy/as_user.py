"""Run a command as another Unix user: `python -m deploy.as_user UID GID COMMAND ...`, by root.

Unlike `su` it takes numbers that no user database knows, keeps no supplementary groups, and lets
nothing that is started later gain rights (no_new_privs, on Linux).
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_NO_NEW_PRIVS = 38


def become(uid: int, gid: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    os.umask(0o077)


def main() -> None:
    """Become the user and start the command in this process."""
    uid, gid, *command = sys.argv[1:]
    become(int(uid), int(gid))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"user {uid} cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
