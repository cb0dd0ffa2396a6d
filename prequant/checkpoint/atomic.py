"""Writing a folder, or a file, whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


@contextmanager
def replacing(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``folder`` at the end.

    An existing folder keeps what it holds beside the new files, except files for which ``replaced(name)`` is true:
    those are of the version before. Readers see the old folder or the new one, nothing between; an error inside leaves
    the old one as it was. On Linux the two are exchanged in one step. Elsewhere there is an instant without either, and
    if the second rename fails the first is undone. Raises :class:`CheckpointError` where the path is a file, or a
    working directory (which can't be exchanged under a process).
    """
    folder = check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
    try:
        staging.chmod(_folder_mode(folder))
        yield staging
        _share(staging)
        if folder.is_dir():
            _keep_others(folder, staging, replaced)
        _flush(staging)
        _swap(staging, folder)
        _flush_folder(folder.parent)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def check_replaceable(folder: Path) -> Path:
    """The real path of a folder that :func:`replacing` can write. Raises :class:`CheckpointError` where it can't."""
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a folder to save into belongs there")
    if folder.is_dir() and folder in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(
            f"{folder} is, or holds, the working directory, which can't be replaced; save into a folder inside it"
        )
    return folder


def check_writable(folder: Path) -> None:
    """Raise :class:`CheckpointError` if nothing could be saved to ``folder``: better said before hours of work than
    after.
    """
    folder = check_replaceable(folder)
    nearest = next(path for path in folder.parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=nearest):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder} can't be written: {error.strerror} ({nearest})") from error


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` at the end; an error inside leaves what was there. The folder
    is made where there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.chmod(0o666 & ~_umask())  # as any file that a program writes, not the owner's alone
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _folder_mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o7777 if folder.is_dir() else 0o777 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _share(staging: Path) -> None:
    """Give new files the usual mode: safetensors makes ones that none but their owner can read."""
    for path in staging.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_umask())


def _keep_others(old: Path, new: Path, replaced: Callable[[str], bool]) -> None:
    """Carry over what the new folder does not write, as hard links where the file system has them."""

    def ignore(folder: str, names: list[str]) -> Collection[str]:
        return [name for name in names if replaced(name) or (new / name).exists()] if Path(folder) == old else []

    shutil.copytree(old, new, symlinks=True, ignore=ignore, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without hard links: then the bytes are copied
        shutil.copy2(source, target, follow_symlinks=False)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # other systems have no handle on a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; what was there is afterwards at ``new`` or gone."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        aside = new.with_suffix(".old")
        folder.rename(aside)
        try:
            new.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system can't."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
