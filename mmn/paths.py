"""Files: where the data that comes with the package is (beside it in a checkout, inside it once installed), and how one is written."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mmn.errors import MmnError
from mmn.hooks import uninterrupted


def data_path(name: str) -> Path:
    """The folder or file `name` of the shipped data. Raises MmnError if it is not there."""
    package = Path(__file__).parent
    for root in (package.parent / "data", package / "_data"):
        if (root / name).exists():
            return root / name
    raise MmnError(f"The shipped data has no {name!r}; install the package again, or make it as data/README.md says.")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder to: it becomes `path`, in the place of what was there, when the block ends well, and vanishes
    when it does not. Only a kill leaves it behind, as `.NAME.PID.part`. Whatever wrote it, its permissions are those that the umask
    gives to new files and folders.

    Raises MmnError where nothing can be written, such as on a full disk."""
    if not path.name:
        raise MmnError(f"{str(path)!r} names no file: give a name.")
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a process that had this one's number, and was killed
        part.mkdir()
        mode = part.stat().st_mode  # of a new folder here: reading the umask itself would change it for all threads
        part.rmdir()
        try:
            yield part
            _permit(part, mode)
            with uninterrupted():
                if part.is_dir() and path.exists():  # which a folder cannot take the place of
                    os.replace(path, old)
                os.replace(part, path)
        finally:
            if old.exists() and not path.exists():  # the new one did not get there
                os.replace(old, path)
            for left in (part, old):
                _remove(left)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MmnError(f"{path} could not be written ({reason}): free some space or choose another place.") from error


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _permit(written: Path, mode: int) -> None:
    """Give a folder, all that it holds, or a file the permissions of new ones, where `mode` is a new folder's. safetensors makes
    its files for their owner alone, and a copy keeps the permissions of what was copied."""
    for path in (written, *written.rglob("*")):
        if path.is_symlink():
            continue
        wanted = stat.S_IMODE(mode) if path.is_dir() else mode & 0o666
        if stat.S_IMODE(path.stat().st_mode) != wanted:
            with suppress(PermissionError):  # some file systems know no permissions
                path.chmod(wanted)


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """A name of a file or a folder that is there, in UTF-8: its own, or a link's where its own is not. safetensors and tokenizers
    take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Make a folder if it is not there, and hold it until the block or the process ends. One that was made for nothing is taken away.

    Gives the descriptor of the lock: a child process that inherits it holds the folder as well, also when its parent is killed.

    Raises MmnError where another process holds it, or nothing can be written to it."""
    from filelock import FileLock, Timeout

    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise MmnError(f"Another run is at work in {folder}: wait for it, or stop it.") from None
    except OSError as error:
        raise MmnError(f"{folder} cannot be written ({error.strerror}): give another folder.") from error
    descriptor = lock._context.lock_file_fd
    assert descriptor is not None  # it was acquired
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            (folder / ".lock").unlink()
            if made and not any(folder.iterdir()):
                folder.rmdir()
        lock.release()


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all, as UTF-8; bytes of a file's name that are none are spelled out, in JSON as it wants them. Raises
    MmnError where it cannot be written."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
