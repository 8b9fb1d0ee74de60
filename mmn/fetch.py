"""`mmn fetch sbu`: the pictures of SBU Captions, from the published list of addresses, politely and with limits.

    mmn fetch sbu sbu-captions-all.json --out PICTURES --count 1400

The list (Ordonez et al. 2011) is a JSON object of three lists, `image_urls`, `captions` and `user_ids`. Many addresses are dead by now. As
Pan et al.'s released code does, addresses are taken in the order of the list until `count` pictures are there; `split` then divides them
as that code does. Which addresses were alive when the authors asked is not known, so their very pictures cannot be had again for certain.

What an address gives is not trusted: only http and https, no address inside a private network (also not after a redirect), limits on
time, bytes, redirects and pixels, and a file is kept only if it opens as a picture. `manifest.csv` says of each what became of it. What may
pass (no answer, a server that is busy) is asked again by the next call, three times in all."""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
import pandas as pd

from mmn.arguments import a_path, at_least
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.images import MAX_PIXELS, open_image
from mmn.paths import alone, put
from mmn.pieces import csv

AGENT = "mmn/0.1 (research on vision-language models; a few pictures a second)"
A_HOST = 4  # connections to one host at once
SEED = 2023  # of the release's split
TRAIN, VALID, TEST = 1000, 200, 200  # the release's numbers
MOST = 10**9  # of seconds, pictures and workers
TRIES = 3  # of an address whose failure may pass
SILENCE = 50  # such failures in a row, after which it is asked whether the network is up
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not in the open, though is_global says so: of protocols, old forms of IPv4 addresses, NAT64 within a network.
CLOSED = [ipaddress.ip_network(each) for each in ("192.0.0.0/24", "::/96", "64:ff9b:1::/48")]
ESCAPED = "!#$%&'()*+,/:;=?@[]~"  # what an address may hold as it is


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
    dead; tries: how often it was asked, where its failure may pass, else 0."""

    number: int
    url: str
    caption: str
    file: str = ""
    sha256: str = ""
    reason: str = ""
    tries: int = 0


class Passing(MmnError):
    """A failure that may be gone tomorrow."""


def addresses(path: Path) -> list[tuple[str, str]]:
    """Address and caption of every picture of the published list. Raises MmnError for a file of another form."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        urls, captions = data["image_urls"], data["captions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MmnError(f"{path} is not the list of SBU Captions (JSON with image_urls and captions): {error}.") from None
    if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
        raise MmnError(f"{path} does not hold as many addresses as captions, in two lists: get the list again.")
    return list(zip(map(str, urls), map(str, captions), strict=True))


def check(url: str, limits: Limits) -> tuple[str, int]:
    """The numeric address and port behind an address. Raises MmnError for one that is not http or https, or that leads into a private
    network."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MmnError(f"{parts.scheme or 'no'} scheme: only http and https are fetched")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), proto=socket.IPPROTO_TCP)
    except OSError:
        raise Passing("the host is not known") from None
    if not limits.private and not all(_public(str(each[4][0])) for each in found):
        raise MmnError("the host is inside a private network")
    return str(found[0][4][0]), int(found[0][4][1])


def _public(text: str) -> bool:
    """Whether a numeric address is in the open; of one that wraps an IPv4 address, whether that is."""
    address: Any = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        if address in NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1] or address
    if any(address in each for each in CLOSED):
        return False
    return address.is_global and not address.is_multicast and not getattr(address, "is_site_local", False)


@contextmanager
def _asked(url: str, place: tuple[str, int], end: float) -> Iterator[HTTPResponse]:
    """The answer to a request, at the numeric address that was checked. However slowly it comes, the connection is cut at `end`: a timeout
    of the socket would begin anew with every byte."""
    parts = urlsplit(url)
    left = max(0.1, end - time.monotonic())
    door = socket.create_connection(place, timeout=left)
    try:
        if parts.scheme == "https":
            import certifi

            context = ssl.create_default_context(cafile=certifi.where())
            door = context.wrap_socket(door, server_hostname=parts.hostname, do_handshake_on_connect=False)

        def cut() -> None:
            with suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(left, cut)
        watch.start()
        try:
            if isinstance(door, ssl.SSLSocket):
                door.do_handshake()
            connection = HTTPConnection(str(parts.hostname), place[1])
            connection.sock = door
            path = quote(f"{parts.path or '/'}{parts.query and '?'}{parts.query}", safe=ESCAPED)
            connection.request("GET", path, headers={"Host": parts.netloc.rpartition("@")[2], "User-Agent": AGENT})
            yield connection.getresponse()
        finally:
            watch.cancel()
    finally:
        door.close()


def get(url: str, limits: Limits) -> bytes:
    """The bytes behind an address. Raises MmnError, with the reason, where they are not to be had within the limits, and `Passing` where
    they may be another time."""
    end, redirects = time.monotonic() + limits.seconds, 0
    while redirects <= limits.redirects:
        try:
            with _asked(url, check(url, limits), end) as reply:
                if reply.status in (301, 302, 303, 307, 308):
                    url, redirects = urljoin(url, reply.headers["Location"] or ""), redirects + 1
                    continue
                if reply.status in (429, 503):  # busy: wait as long as it says, if there is time
                    told = reply.headers["Retry-After"] or ""
                    pause = max(0.5, float(told)) if told.isdecimal() else 1.0
                    if time.monotonic() + pause < end:
                        time.sleep(pause)
                        continue
                if reply.status != 200:
                    raise (Passing if reply.status >= 500 or reply.status == 429 else MmnError)(f"status {reply.status}")
                kind = reply.headers.get("Content-Type", "").lower()
                if not kind.startswith("image/"):
                    raise MmnError(f"{kind or 'nothing'} is no picture")
                return _body(reply, end, limits)
        except MmnError:
            raise
        except (OSError, HTTPException) as error:
            if time.monotonic() >= end:
                raise Passing(f"longer than {limits.seconds:g} seconds") from None
            raise Passing(type(error).__name__) from None
        except ValueError as error:
            raise MmnError(f"no address or answer that can be read ({error})") from None
    raise MmnError(f"more than {limits.redirects} redirects")


def _body(reply: HTTPResponse, end: float, limits: Limits) -> bytes:
    announced = int(reply.headers.get("Content-Length") or 0)
    whole = bytearray()
    while announced <= limits.megabytes * 1e6 and (piece := reply.read1(1 << 14)):
        whole += piece
        if len(whole) > limits.megabytes * 1e6:
            break
    if max(announced, len(whole)) > limits.megabytes * 1e6:
        raise MmnError(f"more than {limits.megabytes:g} MB")
    if time.monotonic() >= end:
        raise Passing(f"longer than {limits.seconds:g} seconds")
    if announced and len(whole) < announced:
        raise Passing("cut short")
    return bytes(whole)


def fetch(
    items: Sequence[tuple[str, str]], out: Path, count: int, *, limits: Limits = Limits(), workers: int = 16, progress: bool = True
) -> pd.DataFrame:
    """Fetch pictures, given as (address, caption), in their order until `count` are there; the manifest, which is also written to
    `out/manifest.csv`, whatever stops the fetching. A run that was stopped goes on where it was: what is dead is not asked again.

    Raises MmnError for numbers that make no sense, where nothing can be written, where the folder holds pictures of another list or another
    process fetches into it, and where SILENCE addresses in a row fail and one that gave a picture does, too."""
    for name, value in (("count", count), ("workers", workers), ("seconds", limits.seconds)):
        if not 0 < value <= MOST:
            raise MmnError(f"{name} is a number above 0, at most {MOST:,}, not {value}.")
    try:
        with alone(out):
            (out / "images").mkdir(exist_ok=True)
            return _fetch(items, out, count, limits, workers, progress)
    except OSError as error:
        raise MmnError(f"{out} cannot be written ({error.strerror}): free some space or choose another --out.") from error


def _fetch(items: Sequence[tuple[str, str]], out: Path, count: int, limits: Limits, workers: int, progress: bool) -> pd.DataFrame:
    log = out / "manifest.jsonl"
    before = {row.number: row for row in _logged(log)}
    if any(items[number : number + 1] != [(row.url, row.caption)] for number, row in before.items()):
        raise MmnError(f"{out} holds pictures of another list: give another --out.")
    rows = {
        number: row
        for number, row in before.items()
        if (_whole(out / "images" / row.file, row.sha256) if row.file else not 0 < row.tries < TRIES)
    }
    doors: dict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(A_HOST))
    bar = tqdm(total=count, desc="pictures", disable=not progress, delay=5)

    def one(number: int, door: threading.Semaphore) -> Got:
        with door:
            got = _fetched(number, *items[number], out / "images", limits)
        tried = before[number].tries if number in before else 0
        return replace(got, tries=tried + 1 if got.tries else 0)

    numbers = iter([number for number in range(len(items)) if number not in rows])
    silent = 0
    waiting: set[Future[Got]] = set()
    try:
        with log.open("a", encoding="utf-8") as handle, bar:
            handle.write("\n")  # the last line may have been cut off

            def note(row: Got) -> None:
                rows[row.number] = row
                handle.write(json.dumps(asdict(row)) + "\n")
                handle.flush()

            try:
                with ThreadPoolExecutor(workers) as pool:
                    # A stretch of dead hosts is no network that is down, which would cost every address of the list one of its tries.
                    while silent < SILENCE or _gives(rows.values(), limits):
                        silent %= SILENCE
                        alive = sum(bool(row.file) for row in rows.values())
                        bar.update(alive - bar.n)
                        # As many are asked as are still wanted, so that no more than `workers` are asked in vain at the end.
                        while len(waiting) < min(workers, count - alive) and (number := next(numbers, None)) is not None:
                            door = doors["/".join(items[number][0].split("/")[:3])]  # made here, where nobody else makes it, too
                            waiting.add(pool.submit(one, number, door))
                        if not waiting:
                            break
                        for each in wait(waiting, return_when=FIRST_COMPLETED).done:
                            waiting.remove(each)
                            row = each.result()
                            note(row)
                            silent = silent + 1 if row.tries else 0
            finally:  # after Ctrl-C, what was being fetched then
                for each in waiting:
                    if each.done() and not each.exception():
                        note(each.result())
    finally:
        frame = pd.DataFrame([asdict(rows[number]) for number in sorted(rows)], columns=list(Got.__dataclass_fields__))
        put(out / "manifest.csv", csv(frame))
    if silent >= SILENCE:
        raise MmnError(f"No picture came from {silent} addresses in a row: see whether the network is up, and say the same again.")
    return frame


def _gives(rows: Iterable[Got], limits: Limits) -> bool:
    """Whether the address that last gave a picture still answers; False if none did."""
    alive = [row.url for row in rows if row.file]
    try:
        return bool(alive and get(alive[-1], limits))
    except MmnError as error:
        return not isinstance(error, Passing)  # its picture is gone, not the network


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
        return Got(number, url, caption, reason=str(error).replace(part.name, "it"), tries=int(isinstance(error, Passing)))
    finally:
        part.unlink(missing_ok=True)


def _logged(log: Path) -> Iterator[Got]:
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            yield Got(**json.loads(line))
        except (ValueError, TypeError):  # a line that was being written when a run was stopped
            continue


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
    parser.add_argument("list", type=a_path, help="sbu-captions-all.json, as published")
    parser.add_argument("--out", type=a_path, required=True, help="folder of the pictures and of manifest.csv")
    parser.add_argument("--count", type=at_least(1), default=TRAIN + VALID + TEST, help="pictures wanted (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(1), default=16, help="addresses asked at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="that one picture may take (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn fetch`: exit code 1 where fewer pictures than wanted could be had."""
    found = fetch(addresses(args.list), args.out, args.count, limits=Limits(seconds=args.seconds), workers=args.workers)
    alive = int((found["file"] != "").sum())
    print(f"{alive} pictures, {len(found) - alive} dead addresses: {args.out / 'manifest.csv'}")
    return 0 if alive >= args.count else 1
