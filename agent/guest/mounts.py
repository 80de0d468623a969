"""Mounts of our own: a detached tmpfs that has no path while it is filled, and its way into a private mount namespace.

Owns the system calls of the mount API. Does not know what lies in a mount or who may read it.
Follows fsopen(2), fsconfig(2), fsmount(2), mount_setattr(2), move_mount(2) and the kernel's `filesystems/tmpfs.rst`.
glibc before 2.36 has no names for these calls, so they go by number. Standard library only: the supervisor imports it.
"""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass

# include/uapi/asm-generic/unistd.h; since Linux 5.2 every architecture gives a new call the same number
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442

# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_NOEXEC = 0x8
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
NOSUID = 0x2
NODEV = 0x4
NOEXEC = 0x8
# include/uapi/linux/fcntl.h, sched.h, magic.h
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_CLONE_NEWNS = 0x00020000
_TMPFS_MAGIC = 0x01021994

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class DetachedMount:
    """A tmpfs no path leads to. It lives as long as the descriptor, or as long as it is attached somewhere.

    Attributes:
        fd: the mount, usable as `dir_fd`; whoever holds this value closes it.
        noswap: the kernel never swaps its pages (Linux 6.4).
    """

    fd: int
    noswap: bool


def detached_tmpfs(
    size_bytes: int,
    gid: int,
    mode: int = 0o750,
    *,
    uid: int = 0,
    executable: bool = False,
    huge_pages: bool = True,
    inodes: int | None = None,
) -> DetachedMount:
    """Make a tmpfs that is not attached anywhere: nosuid, nodev, and noexec unless `executable`.

    Args:
        size_bytes: the most its files may take, rounded up to pages by the kernel.
        gid: group of the root directory; `uid` its owner, `mode` its permissions.
        uid: see `gid`.
        mode: see `gid`.
        executable: programs and libraries in it may be executed (a server's scratch space).
        huge_pages: use huge pages inside the size of a file, where the kernel has them.
        inodes: the most files and folders in it, the root counted; None: the kernel's default, one for two pages of memory.

    Raises:
        OSError: the kernel refused: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.2 or under a seccomp filter.
    """
    context = _call(_SYS_FSOPEN, ctypes.c_char_p(b"tmpfs"), ctypes.c_uint(_FSOPEN_CLOEXEC))
    try:
        for key, value in (("size", size_bytes), ("uid", uid), ("gid", gid), ("mode", f"{mode:o}")):
            _configure(context, key, str(value))
        if inodes is not None:
            _configure(context, "nr_inodes", str(inodes))
        if huge_pages:
            # Ten times cheaper to populate than 4 KiB pages. EINVAL: this kernel has none.
            with suppress(OSError):
                _configure(context, "huge", "within_size")
        try:
            _configure(context, "noswap", None)
            noswap = True
        except OSError:  # EINVAL before Linux 6.4, and in a user namespace
            noswap = False
        _call(_SYS_FSCONFIG, context, ctypes.c_uint(_FSCONFIG_CMD_CREATE), None, None, ctypes.c_int(0))
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (0 if executable else _MOUNT_ATTR_NOEXEC)
        mount = _call(_SYS_FSMOUNT, context, ctypes.c_uint(_FSMOUNT_CLOEXEC), ctypes.c_uint(attributes))
    finally:
        os.close(context)
    return DetachedMount(mount, noswap)


def detached_read_only(kind: str, device: str) -> int:
    """Mount a block device read-only, attached nowhere: nosuid, nodev, noexec. The value is a descriptor of the mount.

    Args:
        kind: type of the file system, such as `erofs`.
        device: path of the device.

    Raises:
        OSError: the kernel refused: ENODEV, it does not know the type; EIO, EINVAL and others for what lies on the device.
    """
    context = _call(_SYS_FSOPEN, ctypes.c_char_p(kind.encode()), ctypes.c_uint(_FSOPEN_CLOEXEC))
    try:
        _configure(context, "source", device)
        _configure(context, "ro", None)
        _call(_SYS_FSCONFIG, context, ctypes.c_uint(_FSCONFIG_CMD_CREATE), None, None, ctypes.c_int(0))
        attributes = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        return _call(_SYS_FSMOUNT, context, ctypes.c_uint(_FSMOUNT_CLOEXEC), ctypes.c_uint(attributes))
    finally:
        os.close(context)


def set_read_only(mount: int) -> None:
    """Make a mount read-only.

    Args:
        mount: descriptor of a mount; no file in it is open for writing or mapped writable.

    Raises:
        OSError: EBUSY, somebody can still write; EPERM; ENOSYS before Linux 5.12.
    """
    _set_attributes(mount, set_flags=_MOUNT_ATTR_RDONLY)


def set_writable(mount: int) -> None:
    """Let this one mount be written through again; copies of it in other namespaces stay as they are. Raises OSError."""
    _set_attributes(mount, clear_flags=_MOUNT_ATTR_RDONLY)


def _set_attributes(mount: int, set_flags: int = 0, clear_flags: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(set_flags, clear_flags, 0, 0)  # struct mount_attr: set, clear, propagation, userns
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call(_SYS_MOUNT_SETATTR, mount, ctypes.c_char_p(b""), ctypes.c_uint(_AT_EMPTY_PATH), attributes, size)


def attach(mount: int, target: str) -> None:
    """Attach a detached mount at the directory `target` of this process's mount namespace.

    Raises:
        OSError: the kernel refused.
    """
    path = ctypes.c_char_p(os.fsencode(target))
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    _call(_SYS_MOVE_MOUNT, mount, ctypes.c_char_p(b""), ctypes.c_int(_AT_FDCWD), path, flags)


def mount(kind: str, target: str, flags: int, options: str) -> None:
    """Mount a file system of the kernel's own.

    Args:
        kind: its type, which also stands where a device would.
        target: a directory.
        flags: of `NOSUID`, `NODEV` and `NOEXEC`.
        options: as mount(8) takes them, may be empty.

    Raises:
        OSError: EBUSY, it is mounted there already; ENODEV, the kernel has no such type.
    """
    source, where, data = (ctypes.c_char_p(os.fsencode(text)) for text in (kind, target, options))
    _check(_LIBC.mount(source, where, source, ctypes.c_ulong(flags), data))


def bind(source: str, target: str) -> None:
    """Show the directory `source` at the directory `target` too, under the flags of its own mount.

    Raises:
        OSError: the kernel refused.
    """
    what, where = (ctypes.c_char_p(os.fsencode(path)) for path in (source, target))
    _check(_LIBC.mount(what, where, None, ctypes.c_ulong(_MS_BIND), None))


def detach(target: str) -> None:
    """Take the mount at `target` out of the tree now; it ends with its last user.

    Raises:
        OSError: EINVAL, nothing is mounted there.
    """
    _check(_LIBC.umount2(ctypes.c_char_p(os.fsencode(target)), ctypes.c_int(_MNT_DETACH)))


def enter_private_mount_namespace() -> None:
    """Give this process a mount namespace of its own, out of which no mount is propagated. Children inherit it.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    _check(_LIBC.unshare(ctypes.c_int(_CLONE_NEWNS)))
    _check(_LIBC.mount(None, ctypes.c_char_p(b"/"), None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def is_tmpfs(fd: int) -> bool:
    """Does this descriptor lie on a tmpfs?

    Raises:
        OSError: as fstatfs(2).
    """
    answer = (ctypes.c_long * 32)()  # struct statfs is 120 bytes; its first word is f_type
    _check(_LIBC.fstatfs(ctypes.c_int(fd), answer))
    return answer[0] == _TMPFS_MAGIC


def _configure(context: int, key: str, value: str | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else ctypes.c_char_p(value.encode())
    _call(_SYS_FSCONFIG, context, ctypes.c_uint(command), ctypes.c_char_p(key.encode()), text, ctypes.c_int(0))


def _call(number: int, *arguments: object) -> int:
    words = [ctypes.c_int(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _check(_LIBC.syscall(ctypes.c_long(number), *words))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
