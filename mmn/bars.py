"""Progress bars that the variable TQDM_DISABLE turns off in notebooks, too, where tqdm's own do not heed it."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm as _tqdm


def tqdm(*args: Any, disable: bool | None = False, **more: Any) -> Any:
    """`tqdm.auto.tqdm`, switched off where TQDM_DISABLE is set."""
    return _tqdm(*args, disable=True if os.environ.get("TQDM_DISABLE") else disable, **more)
