"""`mmn fetch sbu`: the pictures of SBU Captions, from the published list of addresses, politely and with limits.

    mmn fetch sbu sbu-captions-all.json --out PICTURES --count 1400

The list (Ordonez et al. 2011) is a JSON object of three lists, `image_urls`, `captions` and `user_ids`. Many addresses are dead by now. As
Pan et al.'s released code does, addresses are taken in the order of the list until `count` pictures are there; `split` then divides them
as that code does. Which addresses were alive when the authors asked is not known, so their very pictures cannot be had again for certain.

What an address gives is not trusted: only http and https, no address inside a private network (also not after a redirect), limits on
time, bytes, redirects and pixels, and a file is kept only if it opens as a picture. `manifest.csv` says of each what became of it."""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from mmn.errors import MmnError
from mmn.images import MAX_PIXELS, open_image
from mmn.paths import put

AGENT = "mmn/0.1 (research on vision-language models; a few pictures a second)"
A_HOST = 4  # connections to one host at once
SEED = 2023  # of the release's split
TRAIN, VALID, TEST = 1000, 200, 200  # the release's numbers


@dataclass(frozen=True)
class Limits:
    """What one picture may cost. seconds: in all, from the first request on. redirects: how many. private: allow addresses of private
    networks and of this machine (for tests)."""

    seconds: float = 20.0
    megabytes: float = 20.0
    redirects: int = 5
    pixels: int = MAX_PIXELS
    private: bool = False


@dataclass(frozen=True)
class Got:
    """One row of the manifest: number in the list, address, caption, the file's name (empty for a dead address), its SHA-256, and why it is
    dead."""

    number: int
    url: str
    caption: str
    file: str = ""
    sha256: str = ""
    reason: str = ""


def addresses(path: Path) -> list[tuple[str, str]]:
    """Address and caption of every picture of the published list. Raises MmnError for a file of another form."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        urls, captions = data["image_urls"], data["captions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MmnError(f"{path} is not the list of SBU Captions (JSON with image_urls and captions): {error}.") from None
    if len(urls) != len(captions):
        raise MmnError(f"{path} has {len(urls)} addresses and {len(captions)} captions: get the list again.")
    return list(zip(map(str, urls), map(str, captions), strict=True))


def check(url: str, limits: Limits) -> None:
    """Raises MmnError for an address that is not http or https, or that leads into a private network.

    The name is looked up once more when the connection is made, so a server that answers two questions differently is not caught."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MmnError(f"{parts.scheme or 'no'} scheme: only http and https are fetched")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, proto=socket.IPPROTO_TCP)
    except OSError:
        raise MmnError("the host is not known") from None
    if not limits.private and not all(ipaddress.ip_address(each[4][0]).is_global for each in found):
        raise MmnError("the host is inside a private network")


def get(url: str, limits: Limits) -> bytes:
    """The bytes behind an address. Raises MmnError, with the reason, where they are not to be had within the limits."""
    import requests

    end = time.monotonic() + limits.seconds
    for _ in range(limits.redirects + 1):
        check(url, limits)
        left = max(0.1, end - time.monotonic())
        try:
            with requests.get(url, headers={"User-Agent": AGENT}, stream=True, timeout=left, allow_redirects=False) as reply:
                if reply.is_redirect:
                    url = urljoin(url, reply.headers["Location"])
                    continue
                if reply.status_code != 200:
                    raise MmnError(f"status {reply.status_code}")
                kind = reply.headers.get("Content-Type", "")
                if not kind.startswith("image/"):
                    raise MmnError(f"{kind or 'nothing'} is no picture")
                return _body(reply.iter_content(1 << 14), int(reply.headers.get("Content-Length") or 0), end, limits)
        except requests.RequestException as error:
            raise MmnError(f"{type(error).__name__}") from None
    raise MmnError(f"more than {limits.redirects} redirects")


def _body(chunks: Iterator[bytes], announced: int, end: float, limits: Limits) -> bytes:
    whole = bytearray()
    for chunk in chunks:
        whole += chunk
        if len(whole) > limits.megabytes * 1e6 or announced > limits.megabytes * 1e6:
            raise MmnError(f"more than {limits.megabytes:g} MB")
        if time.monotonic() > end:
            raise MmnError(f"longer than {limits.seconds:g} seconds")
    if announced and len(whole) < announced:
        raise MmnError("cut short")
    return bytes(whole)


def fetch(
    items: Sequence[tuple[str, str]], out: Path, count: int, *, limits: Limits = Limits(), workers: int = 16, progress: bool = True
) -> pd.DataFrame:
    """Fetch pictures, given as (address, caption), in their order until `count` are there; the manifest, which is also written to
    `out/manifest.csv`. A run that was stopped goes on where it was: dead addresses are not asked again.

    Raises MmnError for a count below 1."""
    if count < 1:
        raise MmnError(f"count is a number of pictures, at least 1, not {count}.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    log = out / "manifest.jsonl"
    rows = {row.number: row for row in _logged(log) if not row.file or _whole(out / "images" / row.file, row.sha256)}
    doors: dict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(A_HOST))
    bar = tqdm(total=count, desc="pictures", disable=not progress, delay=5)

    def one(number: int) -> Got:
        url, caption = items[number]
        with doors[urlsplit(url).hostname or ""]:
            return _fetched(number, url, caption, out / "images", limits)

    with log.open("a", encoding="utf-8") as handle, ThreadPoolExecutor(workers) as pool, bar:
        waiting: set[Future[Got]] = set()
        numbers = iter(number for number in range(len(items)) if number not in rows)
        while True:
            alive = sum(bool(row.file) for row in rows.values())
            bar.update(alive - bar.n)
            # As many are asked as are still wanted, so that no more than `workers` are asked in vain at the end.
            while len(waiting) < min(workers, count - alive) and (number := next(numbers, None)) is not None:
                waiting.add(pool.submit(one, number))
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for each in done:
                row = rows[each.result().number] = each.result()
                handle.write(json.dumps(asdict(row)) + "\n")
                handle.flush()
    frame = pd.DataFrame([asdict(rows[number]) for number in sorted(rows)], columns=list(Got.__dataclass_fields__))
    put(out / "manifest.csv", frame.to_csv(index=False))
    return frame


def _fetched(number: int, url: str, caption: str, folder: Path, limits: Limits) -> Got:
    part = folder / f".{number}.part"
    try:
        body = get(url, limits)
        part.write_bytes(body)
        open_image(part, limits.pixels)
        suffix = Path(urlsplit(url).path).suffix.lower()
        name = f"{number:07d}{suffix if suffix in ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp') else '.jpg'}"
        os.replace(part, folder / name)
        return Got(number, url, caption, name, hashlib.sha256(body).hexdigest())
    except MmnError as error:
        return Got(number, url, caption, reason=str(error))
    finally:
        part.unlink(missing_ok=True)


def _logged(log: Path) -> Iterator[Got]:
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            yield Got(**json.loads(line))
        except (ValueError, TypeError):  # the line that was being written when the run was stopped
            return


def _whole(path: Path, sha256: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def split(pictures: int) -> dict[str, list[int]]:
    """Train, validation and test set of the release among so many pictures in the order of the list: numpy's legacy generator, seed 2023,
    one permutation, the first 1,000, the next 200, the next 200."""
    order = np.random.RandomState(SEED).permutation(pictures).tolist()
    return {"train": order[:TRAIN], "valid": order[TRAIN : TRAIN + VALID], "test": order[TRAIN + VALID : TRAIN + VALID + TEST]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn fetch`."""
    parser.add_argument("what", choices=("sbu",))
    parser.add_argument("list", type=Path, help="sbu-captions-all.json, as published")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and of manifest.csv")
    parser.add_argument("--count", type=int, default=TRAIN + VALID + TEST, help="pictures wanted (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=16, help="addresses asked at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="that one picture may take (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn fetch`: exit code 1 where fewer pictures than wanted could be had."""
    found = fetch(addresses(args.list), args.out, args.count, limits=Limits(seconds=args.seconds), workers=args.workers)
    alive = int((found["file"] != "").sum())
    print(f"{alive} pictures, {len(found) - alive} dead addresses: {args.out / 'manifest.csv'}")
    return 0 if alive >= args.count else 1
