"""Landlock: a process gives up, for itself and all it starts, every file but those under the paths it names.

Works without privileges and inside an ordinary container. System calls by number, since the C library has no names for
them; numbers and flags of linux/landlock.h. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

from workers.confinement.access import NULL_DEVICES, Access

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = (
    _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER
)  # fmt: skip
_USE_DEVICE = _READ_FILE | _READ_DIR | _WRITE_FILE | _IOCTL_DEV

_ALL_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every right on files that a version of the interface knows."""
_TCP_BIND_AND_CONNECT = 3  # since version 4
_ABSTRACT_SOCKETS_AND_SIGNALS = 3  # since version 6

_LIBC = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version of the kernel's interface; 0 where there is no Landlock."""
    return max(0, int(_LIBC.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)))


def create_ruleset(access: Access, *, version: int) -> int:
    """A descriptor of the rules for `restrict_self`; the caller closes it. Raises OSError."""
    handled = _handled(version)
    attributes = struct.pack("<QQQ", handled, _TCP_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, attributes, size, 0))
    try:
        for path in (*access.readable, Path("/proc")):
            _allow(ruleset, path, _READ & handled)
        for path in access.writable:
            _allow(ruleset, path, _WRITE & handled)
        for path in (*access.devices, *NULL_DEVICES):
            _allow(ruleset, path, _USE_DEVICE & handled)
    except OSError:
        os.close(ruleset)
        raise
    return ruleset


def _handled(version: int) -> int:
    return _ALL_FILES[min(version, 5)]


def restrict_self(ruleset: int, *, version: int) -> None:
    """Put this process and all it starts under the rules, for good; `no_new_privs` must be set. Raises OSError."""
    # It may write below its own /proc, e.g. to reset its high-water mark of memory, and below no other's.
    _allow(ruleset, Path("/proc/self"), (_READ | _WRITE_FILE | _TRUNCATE) & _handled(version))
    _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0))


def _allow(ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = rights if path.is_dir() else rights & _ON_FILES
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("<Qi", rights, descriptor), 0))
    finally:
        os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {errno.errorcode.get(code, code)}")
    return result
