"""The kernels that run notebooks: how this package starts them, and whether it is run by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def private() -> Iterator[dict[str, Any]]:
    """Options of nbclient's NotebookClient, and of papermill, which passes them on: a kernel is spoken to through sockets in a folder
    that only this user can read, and not over TCP, of which ipykernel warns. Where there are no such sockets, or the folder's path is too
    long for one, it is TCP on this machine without the warning."""
    import zmq
    from traitlets.config import Config

    with TemporaryDirectory(prefix="mmn-") as folder:
        place = Path(folder, "kernel")
        if os.name == "posix" and len(os.fsencode(place)) + len("-5") <= zmq.IPC_PATH_MAX_LEN:  # five sockets, numbered
            yield {"config": Config({"KernelManager": {"transport": "ipc", "ip": str(place)}})}
        else:
            yield {"extra_arguments": ["--log-level=ERROR"]}


def shell() -> Any:
    """The IPython shell of the notebook that runs this code; None outside of one, also in a terminal's IPython."""
    found = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return found if hasattr(found, "kernel") else None
