"""Do the results depend on the processor? Chapters and quick tables on a shipped model whose weights carry noise.

Kernels of different processors round differently, by about 1e-7 of a number. Here every weight is changed by a relative 1e-6,
which is more than that, and the thread count and the instruction set are varied: everything that is compared must still agree.

    python tests/noise.py                         every chapter and quick table under every setting, an hour or more
    python tests/noise.py --seeds 1 --only 02_finding flips
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTERS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
SLOW = {"editing", "editing_curve", "editing_ways", "hallucination", "hallucination_mentions"}  # minutes a key

# Runs in the kernel of each chapter before its first cell. The hash is that of the weights' files, so stored tables are still read.
STARTUP = """
import os
import torch
import mmn.vlm

_load = mmn.vlm.load

def load(*args, **kwargs):
    vlm = _load(*args, **kwargs)
    draw = torch.Generator().manual_seed(int(os.environ["MMN_NOISE_SEED"]))
    with torch.no_grad():
        for weight in vlm.model.parameters():
            weight.mul_(1 + float(os.environ["MMN_NOISE"]) * torch.randn(weight.shape, generator=draw))
    return vlm

mmn.vlm.load = load
"""
TABLE = """
import sys
from mmn import tables
import mmn
faults = tables.check(sys.argv[1], mmn.load("tiny-llava"), 2, seed=int(os.environ["MMN_NOISE_SEED"]))
print(*faults, sep="\\n")
sys.exit(bool(faults))
"""


def settings(seeds: int) -> list[dict[str, str]]:
    """The environments to run in: noise of several seeds, then two threads, and two instruction sets."""
    plain = {"OMP_NUM_THREADS": "1", "MMN_NOISE": "1e-6"}
    noisy = [{**plain, "MMN_NOISE_SEED": str(seed)} for seed in range(seeds)]
    other = [
        {**plain, "OMP_NUM_THREADS": "2"},
        {**plain, "ATEN_CPU_CAPABILITY": "default"},
        {**plain, "ATEN_CPU_CAPABILITY": "avx2"},
    ]
    return noisy + ([{**each, "MMN_NOISE_SEED": "0"} for each in other] if seeds > 1 else [])


def run(name: str, setting: dict[str, str]) -> str:
    """What differs when a chapter, or two keys of a quick table, is run in a setting; empty if nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        startup = Path(folder) / "profile_default" / "startup" / "noise.py"
        startup.parent.mkdir(parents=True)
        startup.write_text(STARTUP, encoding="utf-8")
        if name in CHAPTERS:
            command = ["-m", "pytest", "-vv", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
            command += ["--nbval-cell-timeout=600", str(ROOT / "notebooks" / f"{name}.ipynb")]
        else:
            command = ["-c", STARTUP + TABLE, name]
        environment = {**os.environ, **setting, "IPYTHONDIR": folder, "TQDM_DISABLE": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    """Exit code 1 where anything differs."""
    from mmn import tables

    quick = sorted({*tables.tables()} - SLOW)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of the noise; 1 leaves out the other settings (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=[*CHAPTERS, *quick], default=[*CHAPTERS, *quick], help="default: all")
    args = parser.parse_args()
    red = 0
    for setting in settings(args.seeds):
        for name in args.only:
            differs = run(name, setting)
            red += bool(differs)
            told = ", ".join(f"{key}={value}" for key, value in setting.items())
            print(f"{'DIFFERS' if differs else 'equal'}: {name} ({told})\n{differs}".rstrip(), flush=True)
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
