"""A seccomp filter of system calls that compression never needs: sockets, other processes, mounts, the kernel's insides.

A list of what is refused, not of what is allowed: torch, CUDA's driver and the C library use several hundred calls, and
others with every version. Calls newer than the list do not exist for the process, as if its kernel were older.

The filter is classic BPF, `struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}` each: see seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

# (x86_64, aarch64); None where there is no such call. From asm/unistd_64.h and asm-generic/unistd.h.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # The network.
    "socket": (41, 198),
    # Other processes, and leaving the process group that is killed and whose memory is counted.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "setsid": (112, 157), "setpgid": (109, 154),
    # Namespaces and mounts. chroot and open_by_handle_at get around rules on paths.
    "setns": (308, 268), "unshare": (272, 97), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "mknod": (133, None),
    "mknodat": (259, 33),
    # Large parts of the kernel that most of its flaws were found in.
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "modify_ldt": (154, None), "lookup_dcookie": (212, 18),
    # The machine.
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58),
    # Memory that no limit counts once it is unmapped, and queues that outlive the process.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
    # By path; Landlock knows of it since Linux 6.2 alone. ftruncate is allowed.
    "truncate": (76, 45),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)
_NEWEST = 456
"""futex_requeue, of Linux 6.7."""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the numbers above, and AUDIT_ARCH."""
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_X32 = 0x40000000
_AF_UNIX = 1

_LOAD, _RETURN = 0x20, 0x06
_IF_EQUAL, _IF_GREATER, _IF_SET = 0x15, 0x25, 0x45
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE = 22, 38, 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def supported() -> bool:
    """Whether the system calls of this processor are known here."""
    return platform.machine() in _ARCHITECTURES


def program() -> bytes:
    """The filter for this machine, as the kernel and bubblewrap take it."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    refused = [numbers[column] for numbers in _REFUSED.values()]
    steps = [
        _step(_LOAD, _ARCHITECTURE), *_unless(_IF_EQUAL, architecture, _KILL),
        _step(_LOAD, _NUMBER),
        *_if(_IF_GREATER, _X32 - 1, _KILL),
        *_if(_IF_GREATER, _NEWEST, _ERROR | errno.ENOSYS),
        # Its flags are behind a pointer, out of a filter's sight; the C library goes on with clone.
        *_if(_IF_EQUAL, _CLONE3[column], _ERROR | errno.ENOSYS),
    ]  # fmt: skip
    for number in refused:
        if number is not None:
            steps += _if(_IF_EQUAL, number, _ERROR | errno.EPERM)
    steps += [
        _step(_IF_EQUAL, _CLONE[column], on_false=4),
        _step(_LOAD, _FIRST_ARGUMENT),
        *_if(_IF_SET, _NEW_NAMESPACES, _ERROR | errno.EPERM),
        _step(_RETURN, _ALLOW),
        _step(_IF_EQUAL, _SOCKETPAIR[column], on_false=3),
        _step(_LOAD, _FIRST_ARGUMENT),
        *_unless(_IF_EQUAL, _AF_UNIX, _ERROR | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)


def no_new_privileges() -> None:
    """No setuid program gives this process more than it has: what filters and Landlock ask for first. Raises OSError."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def restrict_self(instructions: bytes) -> None:
    """Put this process and all it starts under a filter, for good; after `no_new_privileges`. Raises OSError."""
    loaded = _Program(len(instructions) // 8, instructions)
    _check(_LIBC.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(loaded), 0, 0))


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {errno.errorcode.get(code, code)}")


def _step(code: int, value: int, *, on_true: int = 0, on_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, on_true, on_false, value)


def _if(test: int, value: int, answer: int) -> list[bytes]:
    return [_step(test, value, on_false=1), _step(_RETURN, answer)]


def _unless(test: int, value: int, answer: int) -> list[bytes]:
    return [_step(test, value, on_true=1), _step(_RETURN, answer)]
