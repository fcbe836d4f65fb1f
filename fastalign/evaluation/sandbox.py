"""The process that runs a model's code. It locks itself in first; what it then cannot do, the code cannot do either.

This file is run as a program by `fastalign/evaluation/code.py`, in a new process without fastalign, so it imports the
standard library alone. It reads {"program", "folder", "memory", "seconds", "isolation", "token"} as JSON from standard
input, and writes to the file descriptor in its argument: the token if the program ran to its end, else what failed.

- Files: Landlock, or a mount namespace in which everything is read-only. Both leave one folder to write to.
- Network, other processes, permissions of files: a seccomp filter refuses the system calls. With namespaces the process
  has a network without interfaces besides.
- Time, memory, size of files: resource limits.
- What only the superuser may do: all capabilities are given up, raising those limits among them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

# System calls that the code may not make, by machine. Those of chmod, chown and attributes are among them because
# Landlock does not restrict them.
_X86 = {
    "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "chmod": 90, "fchmod": 91, "chown": 92,
    "fchown": 93, "lchown": 94, "ptrace": 101, "rt_sigqueueinfo": 129, "utime": 132, "mount": 165, "setxattr": 188,
    "lsetxattr": 189, "fsetxattr": 190, "tkill": 200, "tgkill": 234, "utimes": 235, "fchownat": 260, "futimesat": 261,
    "fchmodat": 268, "unshare": 272, "utimensat": 280, "setns": 308, "process_vm_writev": 311, "bpf": 321,
    "execveat": 322, "pidfd_send_signal": 424, "io_uring_setup": 425, "fchmodat2": 452,
}  # fmt: skip
_ARM = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "mount": 40, "fchmod": 52, "fchmodat": 53, "fchownat": 54,
    "fchown": 55, "utimensat": 88, "unshare": 97, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131,
    "rt_sigqueueinfo": 138, "socket": 198, "execve": 221, "setns": 268, "process_vm_writev": 271, "bpf": 280,
    "execveat": 281, "pidfd_send_signal": 424, "io_uring_setup": 425, "fchmodat2": 452,
}  # fmt: skip
# Machine -> its number in seccomp, the number of clone, and the refused calls.
_MACHINES = {"x86_64": (0xC000003E, 56, _X86), "aarch64": (0xC00000B7, 220, _ARM)}
_CLONE3 = 435  # on both
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38

_NEW_USER, _NEW_MOUNTS, _NEW_NETWORK = 0x10000000, 0x20000, 0x40000000
_MOUNT_SETATTR, _RECURSIVE, _READ_ONLY = 442, 0x8000, 1
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Every right of Landlock's first version that writes, makes or removes.
_WRITES = 0b1111111110010

_libc = ctypes.CDLL(None, use_errno=True)


def isolations() -> list[str]:
    """What this system can lock code in with, the best first: "landlock", "namespaces"; empty if it has neither."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES or not _works(_libc.prctl(21, 0, 0, 0, 0)):
        return []
    found = []
    # Before its third version Landlock let files be truncated that it did not let be written.
    if _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1) >= 3:
        found.append("landlock")
    child = os.fork()
    if not child:
        os._exit(0 if _works(_libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_NETWORK)) else 1)
    if os.waitpid(child, 0)[1] == 0:
        found.append("namespaces")
    return found


def _works(result: int) -> bool:
    return result >= 0


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _limit(memory: int, seconds: int) -> None:
    """Resource limits: bytes of memory, seconds of computing, 16 MB per file, 64 open files, no core dump."""
    limits = {"RLIMIT_AS": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 2**24, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _landlock(folder: str) -> None:
    """Lets the process write in `folder` and to /dev/null alone."""
    handled = _WRITES | 1 << 13 | 1 << 14  # the second version added renaming into another folder, the third truncating
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", handled), ctypes.c_size_t(8), 0), "landlock")
    of_file = handled & (1 << 1 | 1 << 14)
    for path, allowed in ((folder, handled), ("/dev/null", of_file)):
        opened = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, opened)
        _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "landlock rule")
        os.close(opened)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock")
    os.close(rules)


def _namespaces(folder: str) -> None:
    """Gives the process a network without interfaces, and mounts that are read-only except `folder`."""
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_NETWORK), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    place = os.fsencode(folder)
    private, bind = 0x4000 | 0x40000, 0x1000
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None), "private mounts")
    _check(_libc.mount(place, place, None, ctypes.c_ulong(bind), None), "the folder's mount")
    everything = struct.pack("=QQQQ", _READ_ONLY, 0, 0, 0)
    _check(_libc.syscall(_MOUNT_SETATTR, -100, b"/", _RECURSIVE, everything, ctypes.c_size_t(32)), "read-only mounts")
    writable = struct.pack("=QQQQ", 0, _READ_ONLY, 0, 0)
    _check(_libc.syscall(_MOUNT_SETATTR, -100, place, 0, writable, ctypes.c_size_t(32)), "the folder's mount")
    os.chdir(folder)  # the working directory is still the one below the new mount


def _give_up_capabilities() -> None:
    """Leaves the process without the superuser's rights, also where the superuser has started it."""
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3 of the interface; this process
    _check(_libc.capset(header, struct.pack("=6I", 0, 0, 0, 0, 0, 0)), "capabilities")


def _refuse_calls() -> None:
    """A seccomp filter: no new processes (threads are allowed), no sockets, no signals, no change of permissions."""
    number, clone, refused = _MACHINES[platform.machine()]
    load, equal, any_bit, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06  # of the filter's machine language
    allow, deny = (0x7FFF0000, 0x50000 | _EPERM)
    program = [(load, 0, 0, 4), (equal, 1, 0, number), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    # x86_64 has a second table of calls above this number.
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]
    for call in refused.values():
        program += [(equal, 0, 1, call), (give, 0, 0, deny)]
    # clone3 hides its flags from filters. The C library takes clone where clone3 does not exist.
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, 0x50000 | _ENOSYS)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (give, 0, 0, deny)]
    program += [(give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(22, 2, header, 0, 0), "seccomp")


def main() -> None:
    """Reads a task, locks the process in, runs the program, and reports."""
    task = json.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # the process ends with the one that started it
    _limit(task["memory"], task["seconds"])
    if task["isolation"] != "none":
        _check(_libc.prctl(38, 1, 0, 0, 0), "no new privileges")
        (_landlock if task["isolation"] == "landlock" else _namespaces)(task["folder"])
        _give_up_capabilities()
        _refuse_calls()
    said = task["token"]
    try:
        exec(compile(task["program"], "the answer", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: whoever leaves early has not passed the tests
        said = f"{type(error).__name__}: {error}"[:300]
    os.write(report, said.encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
