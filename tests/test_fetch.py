"""Fetching from a server that misbehaves: every bad address is one row with its reason, every good one a file; nothing is asked twice."""

import io
import json
import resource
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmn import fetch, sources
from mmn.errors import MmnError
from mmn.paths import alone


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(out, "JPEG")
    return out.getvalue()


def thin() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 1)).save(out, "PNG")
    return out.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few kB that says it has 900 million pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


class Server(BaseHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def send(self, body: bytes, kind: str = "image/jpeg", announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        name = self.path.split("/")[-1].split(".")[0].rstrip("0123456789")
        Server.asked.append(self.path)
        assert self.headers["User-Agent"] == fetch.AGENT
        to = {
            "astray": "http://[x/",
            "port": "http://127.0.0.1:99999/x.jpg",
            "moved": "/good9.jpg",
            "loop": "/loop.jpg",
            "file": "file:///etc/hostname",
            "inside": "http://192.168.0.1/x.jpg",
        }
        if name in to:
            self.send_response(302)
            self.send_header("Location", to[name])
            self.end_headers()
        elif name == "gone":
            self.send_error(404)
        elif name == "page":
            self.send(b"<html>", "text/html")
        elif name == "half":
            self.send(jpeg()[:200], announced=len(jpeg()))
        elif name == "broken":
            self.send(jpeg()[:200])
        elif name == "huge":
            self.send(b"\xff" * 300_000)
        elif name == "bomb":
            self.send(bomb(), "image/png")
        elif name == "thin":
            self.send(thin(), "image/png")
        elif name == "busy":  # the first time only
            if Server.asked.count(self.path) == 1:
                self.send_response(429)
                self.send_header("Retry-After", "0")
                self.end_headers()
            else:
                self.send(jpeg())
        elif name in ("down", "later"):  # always busy
            self.send_response(503 if name == "down" else 429)
            if name == "later":
                self.send_header("Retry-After", "0")
            self.end_headers()
        elif name == "shout":
            self.send(jpeg(), "IMAGE/JPEG")
        elif name == "odd":
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", "abc")
            self.end_headers()
            self.wfile.write(jpeg())
        elif name in ("drip", "headers"):  # a byte at a time, so that no single read is slow
            try:
                if name == "drip":
                    self.send_response(200)
                    self.send_header("Content-Type", "image/jpeg")
                    self.end_headers()
                for _ in range(50):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.2)
            except OSError:
                pass
        elif name == "slow":
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        else:
            self.send(jpeg())


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


LIMITS = fetch.Limits(seconds=1.0, megabytes=0.2, private=True)
REASONS = {
    "gone": "status 404",
    "page": "text/html is no picture",
    "loop": "more than 5 redirects",
    "file": "file scheme",
    "half": "cut short|IncompleteRead|ChunkedEncodingError|ConnectionError",
    "broken": "^it is damaged",
    "huge": "more than 0.2 MB",
    "bomb": "^it has far more than 64 million pixels",
    "slow": "longer than 1 seconds",
    "drip": "longer than 1 seconds",
    "headers": "longer than 1 seconds",
    "astray": "no address",
    "port": "no address",
    "odd": "no address",
    "down": "status 503",
    "later": "status 429|longer than 1 seconds",
    "thin": "^it has 300 x 1 pixels",
}


def test_every_bad_address_has_its_reason_and_every_good_one_its_file(address, tmp_path):
    names = ["good1", *REASONS, "moved", "good2", "busy", "shout"]
    started = time.monotonic()
    items = [(f"{address}/{name}.jpg", f"a caption, of {name}") for name in names]
    table = fetch.fetch(items, tmp_path, len(items), limits=LIMITS, progress=False).set_index("number")
    assert time.monotonic() - started < 8, "no address takes longer than it may"
    for number, name in enumerate(names):
        row = table.loc[number]
        if name in REASONS:
            assert row["file"] == "" and pd.Series([row["reason"]]).str.contains(REASONS[name]).all(), row["reason"]
        else:
            assert row["reason"] == "" and (tmp_path / "images" / row["file"]).read_bytes() == jpeg()
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == sorted(table["file"][table["file"] != ""])
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "manifest.csv", keep_default_na=False).set_index("number"), table, check_dtype=False
    )
    some = sources.load(f"sbu:{tmp_path}")
    assert [picture.captions[0] for picture in some] == [
        f"a caption, of {name}" for name in ("good1", "moved", "good2", "busy", "shout")
    ]
    assert some[0].open().size == (40, 30)


def test_what_is_there_is_not_asked_again_and_enough_is_enough(address, tmp_path):
    items = [(f"{address}/{'gone' if n % 3 == 1 else 'good'}{n}.jpg", "") for n in range(20)]
    first = fetch.fetch(items, tmp_path, 3, limits=LIMITS, workers=4, progress=False)
    assert (first["file"] != "").sum() == 3 and list(first["number"]) == list(range(len(first)))
    Server.asked.clear()
    lost = tmp_path / "images" / first["file"][0]
    lost.write_bytes(b"bent")
    (tmp_path / "manifest.jsonl").open("a").write('{"number": 19, "ur')  # as a stopped run leaves it
    again = fetch.fetch(items, tmp_path, 5, limits=LIMITS, workers=1, progress=False)
    assert (again["file"] != "").sum() == 5 and lost.read_bytes() == jpeg()
    assert sorted(Server.asked) == sorted(["/good0.jpg", *(f"/{u.split('/')[-1]}" for u, _ in items[len(first) : len(again)])])


def test_a_line_that_was_cut_off_costs_itself_alone(address, tmp_path):
    items = [(f"{address}/good{n}.jpg", "") for n in range(8)]
    log = tmp_path / "manifest.jsonl"
    for count in (2, 4, 6):
        Server.asked.clear()
        table = fetch.fetch(items, tmp_path, count, limits=LIMITS, workers=1, progress=False)
        assert len(Server.asked) == 2 and (table["file"] != "").sum() == count
        log.write_text(log.read_text().rstrip("\n") + '\n{"number": 7, "ur')


def test_what_may_pass_is_asked_again_but_not_for_ever(address, tmp_path):
    items = [(f"{address}/{name}.jpg", "") for name in ("down", "gone")] + [("http://no-such-host.invalid/x.jpg", "")]
    for tries in (1, 2, 3, 3):
        Server.asked.clear()
        table = fetch.fetch(items, tmp_path, 3, limits=LIMITS, progress=False)
        assert table["tries"].tolist() == [tries, 0, tries]
        assert ("/gone.jpg" in Server.asked) == (len(set(Server.asked)) == 2), "what is dead is asked once"
    assert not Server.asked


@pytest.mark.parametrize("told", ["0", "1", "²", None])
def test_a_host_that_stays_busy_may_pass_however_long_it_says_to_wait(address, told, monkeypatch):
    """It is not taken for one that leads round and round, which would be dead for good."""
    now, asked = [0.0], []

    @contextmanager
    def asking(url, *_):
        asked.append(url)
        yield SimpleNamespace(status=429, headers={"Retry-After": told})

    monkeypatch.setattr(fetch, "_asked", asking)
    monkeypatch.setattr(fetch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda pause: now.append(now.pop() + pause)))
    with pytest.raises(fetch.Passing, match="status 429"):
        fetch.get(f"{address}/x.jpg", fetch.Limits(private=True))
    assert len(asked) > fetch.Limits().redirects + 1 and 18 < now[0] < 20


def test_without_a_network_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SILENCE", 5)
    items = [(f"http://no-such-host.invalid/{n}.jpg", "") for n in range(30)]
    with pytest.raises(MmnError, match="No picture came from [5-8] addresses in a row: see whether the network is up"):
        fetch.fetch(items, tmp_path, 30, workers=2, progress=False)
    assert len(pd.read_csv(tmp_path / "manifest.csv")) < 10


def test_a_network_that_goes_down_costs_few_addresses_a_try_and_dead_hosts_are_none(address, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SILENCE", 5)
    known = fetch.get

    def get(url, limits):
        if "dead" in url:
            raise fetch.Passing("the host is not known")
        return known(url, limits)

    def broken(url, limits):
        asked.append(url)
        if len(asked) > 8:
            raise fetch.Passing("ConnectionRefusedError")
        return known(url, limits)

    asked: list[str] = []
    items = [(f"{address}/{'dead' if 5 <= n < 40 else 'good'}{n}.jpg", "") for n in range(60)]
    monkeypatch.setattr(fetch, "get", get)  # a stretch of dead hosts, longer than SILENCE
    table = fetch.fetch(items, tmp_path / "dead", 7, limits=LIMITS, workers=2, progress=False)
    assert (table["file"] != "").sum() == 7 and table["tries"].sum() == 35
    monkeypatch.setattr(fetch, "get", broken)
    with pytest.raises(MmnError, match="in a row: see whether the network is up"):
        fetch.fetch(items, tmp_path / "down", 60, limits=LIMITS, workers=1, progress=False)
    table = pd.read_csv(tmp_path / "down" / "manifest.csv", keep_default_na=False)
    assert (table["file"] != "").sum() == 8 and table["tries"].sum() == 5, "most are as if never asked"
    monkeypatch.setattr(fetch, "get", known)
    table = fetch.fetch(items, tmp_path / "down", 60, limits=LIMITS, workers=2, progress=False)
    assert (table["file"] != "").all()


@pytest.mark.parametrize(
    "url", ["http://[bad/x.jpg", "http://example.com:99999/", "http://a..b/", f"http://{'a' * 70}.org/", "", "//", "http://", "\0"]
)
def test_what_is_no_address_is_a_row(tmp_path, url):
    table = fetch.fetch([(url, "")], tmp_path, 1, limits=LIMITS, progress=False)
    assert table["file"].tolist() == [""] and table["reason"][0] and table["tries"][0] == 0


def test_numbers_that_make_no_sense_and_folders_that_cannot_be(address, tmp_path):
    items = [(f"{address}/good.jpg", "")]
    for more in ({"workers": 0}, {"limits": fetch.Limits(seconds=-5)}, {"limits": fetch.Limits(seconds=float("inf"))}):
        with pytest.raises(MmnError, match="is a number above 0"):
            fetch.fetch(items, tmp_path / "new", 1, progress=False, **more)
    (tmp_path / "file").write_text("")
    with pytest.raises(MmnError, match="cannot be written"):
        fetch.fetch(items, tmp_path / "file" / "x", 1, progress=False)


def test_on_a_full_disk_one_sentence_and_what_is_there_stays(address, tmp_path):
    items = [(f"{address}/good{n}.jpg", "") for n in range(4)]
    fetch.fetch(items, tmp_path, 2, limits=LIMITS, progress=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))  # fewer bytes than a picture
    try:
        with pytest.raises(MmnError, match="free some space or choose another"):
            fetch.fetch(items, tmp_path, 4, limits=LIMITS, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    table = fetch.fetch(items, tmp_path, 4, limits=LIMITS, progress=False)
    assert (table["file"] != "").sum() == 4 and not list((tmp_path / "images").glob(".*"))


def test_a_folder_holds_one_list_and_is_fetched_into_by_one_process(address, tmp_path):
    fetch.fetch([(f"{address}/good1.jpg", "one")], tmp_path, 1, limits=LIMITS, progress=False)
    for other in ([(f"{address}/good2.jpg", "one")], [(f"{address}/good1.jpg", "two")], []):
        with pytest.raises(MmnError, match="holds pictures of another list"):
            fetch.fetch(other, tmp_path, 1, limits=LIMITS, progress=False)
    with alone(tmp_path), pytest.raises(MmnError, match="Another run is at work"):
        fetch.fetch([(f"{address}/good1.jpg", "one")], tmp_path, 1, limits=LIMITS, progress=False)


def test_what_was_fetched_while_it_was_stopped_is_not_asked_again(address, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    items = [(f"{address}/good{n}.jpg", "a\rcaption") for n in range(4)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "wait", stopped)
        fetch.fetch(items, tmp_path, 4, limits=LIMITS, workers=2, progress=False)
    assert [picture.captions for picture in sources.load(f"sbu:{tmp_path}")] == [("a\rcaption",)] * 2
    Server.asked.clear()
    fetch.fetch(items, tmp_path, 4, limits=LIMITS, progress=False)
    assert sorted(Server.asked) == ["/good2.jpg", "/good3.jpg"]


def test_private_addresses_are_refused_unless_allowed(address, tmp_path):
    table = fetch.fetch([(f"{address}/good.jpg", "")], tmp_path, 1, progress=False)
    assert table["reason"].tolist() == ["the host is inside a private network"]
    for url in ("http://localhost/x.jpg", "http://[::1]/x.jpg", "http://169.254.169.254/x", "http://10.0.0.8/x", "ftp://x.org/x",
                "http://[64:ff9b::a00:1]/", "http://[64:ff9b:1::7f00:1]/", "http://[::127.0.0.1]/", "http://192.0.0.8/",
                "http://[2002:7f00:1::]/", "http://[fec0::1]/", "http://224.0.0.1/"):  # fmt: skip
        with pytest.raises(MmnError, match="private network|only http"):
            fetch.check(url, fetch.Limits())


def test_a_list_of_another_form_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"image_urls": ["a"], "captions": ["x"], "user_ids": ["u"]}))
    assert fetch.addresses(path) == [("a", "x")]
    for text in ("[1, 2]", "{", '{"image_urls": 5, "captions": 5}', json.dumps({"image_urls": ["a"], "captions": []}), "[" * 10**5):
        path.write_text(text)
        with pytest.raises(MmnError, match="list"):
            fetch.addresses(path)


def test_the_split_is_the_one_of_the_releases_generator():
    np.random.seed(2023)
    order = np.random.permutation(1400)
    parts = fetch.split(1400)
    assert parts["train"] == order[:1000].tolist() and parts["valid"] == order[1000:1200].tolist()
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == list(range(1400))


def test_coco_gives_objects_captions_and_real_masks(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "val2017" / "7.jpg")
    polygon = {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": [[2, 2, 12, 2, 12, 8, 2, 8]], "area": 60}
    counts = [3, 5, 192]  # column by column: 3 pixels off, 5 on, the rest off
    rle = {"id": 2, "image_id": 7, "category_id": 1, "iscrowd": 1, "segmentation": {"size": [10, 20], "counts": counts}, "area": 5}
    image = {"id": 7, "file_name": "7.jpg", "width": 20, "height": 10}
    cats = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps({"images": [image], "annotations": [polygon, rle], "categories": cats})
    )
    (tmp_path / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": [image], "annotations": [{"id": 5, "image_id": 7, "caption": "A dog with a frisbee."}]})
    )
    (picture,) = sources.load(f"coco:{tmp_path}")
    assert (
        picture.objects == ("dog", "person") and picture.captions == ("A dog with a frisbee.",) and picture.open().size == (20, 10)
    )
    dog, person = picture.mask("dog"), picture.mask("person")
    assert dog.shape == (10, 20) and dog[5, 7] and not dog[0, 0] and 50 <= dog.sum() <= 77
    assert person.sum() == 5 and person[3:8, 0].all()
    assert picture.mask("cat") is None
    assert picture.true == ["dog", "person", "frisbee"], "what people name is true, too"
    assert picture.named("Puppies and a man by fire hydrants.") == ["dog", "person", "fire hydrant"]
    assert picture.name_at("two fire hydrants", 17) == "fire hydrant" and picture.name_at("two fire hydrants", 8) is None
    (tmp_path / "annotations" / "synonyms.txt").write_text("dog, dingo\nperson, ranger\n")
    assert sources.load(f"coco:{tmp_path}")[0].named("A ranger, a puppy, two dingos") == ["person", "dog"]
    (tmp_path / "annotations" / "synonyms.txt").write_text("dog, dingo")
    with pytest.raises(MmnError, match="synonyms.txt names fewer than two categories"):
        sources.load(f"coco:{tmp_path}")
    (tmp_path / "annotations" / "synonyms.txt").unlink()
    (tmp_path / "annotations" / "captions_val2017.json").write_text("[")
    with pytest.raises(MmnError, match="COCO's annotations val2017 in .* are damaged"):
        sources.load(f"coco:{tmp_path}")
    with pytest.raises(MmnError, match="instances_val2017"):
        sources.load(f"coco:{tmp_path / 'val2017'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 99}]}, "damaged .KeyError.99"),
        ({"images": [{"id": 1}]}, "damaged .KeyError.'file_name'"),
        ({"images": [{"id": 1, "file_name": 5}]}, "damaged .TypeError"),
        ({"images": [{"id": 1, "file_name": "1.jpg"}, {"id": "a", "file_name": "a.jpg"}]}, "damaged .TypeError"),
        ({"categories": [{"id": 18}]}, "damaged .KeyError.'name'"),
        (
            {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "1.jpg"}]},
            "names a picture twice: get it again",
        ),
        ({"images": []}, "no annotation of a picture that it lists: get it again"),
        ({"annotations": []}, "no annotation of a picture that it lists: get it again"),
        ({"annotations": [{"id": 1, "image_id": "1", "category_id": 18}]}, "no annotation of a picture that it lists"),
        ({"captions": [{"id": 1, "image_id": 1}]}, "damaged .KeyError.'caption'"),
        ("[" * 10**5, "damaged .RecursionError"),
    ],
)
def test_coco_that_is_not_quite_right_is_refused_in_a_sentence(tmp_path, change, message):
    whole = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "category_id": 18}],
             "categories": [{"id": 18, "name": "dog"}]}  # fmt: skip
    (tmp_path / "annotations").mkdir()

    def write(data):
        said = {"images": [], "annotations": data.pop("captions", [])} if isinstance(data, dict) else {}
        for name, each in (("instances", data), ("captions", said)):
            text = each if isinstance(each, str) else json.dumps(each)
            (tmp_path / "annotations" / f"{name}_val2017.json").write_text(text)

    write(dict(whole))
    assert [picture.objects for picture in sources.load(f"coco:{tmp_path}")] == [("dog",)]
    write(change if isinstance(change, str) else whole | change)
    with pytest.raises(MmnError, match=message):
        sources.load(f"coco:{tmp_path}")


@pytest.mark.parametrize("outline", [{}, {"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [["a"] * 6]}])
def test_what_coco_says_wrong_of_one_object_costs_that_alone(tmp_path, outline):
    (tmp_path / "annotations").mkdir()
    square = {"segmentation": [[2, 2, 12, 2, 12, 8, 2, 8]]}
    own = [{"id": 1, "image_id": 1, "category_id": 1, **outline}, {"id": 2, "image_id": 1, "category_id": 2, **square}]
    images = [{"id": 1, "file_name": "1.jpg", "width": 20, "height": 10}]
    cats = [{"id": 1, "name": "Cat"}, {"id": 2, "name": "combine harvester"}]
    said = [{"id": 1, "image_id": 1, "caption": None}, {"id": 2, "image_id": 1, "caption": "A dog."}]
    for name, each in (("instances", {"annotations": own, "categories": cats}), ("captions", {"annotations": said})):
        (tmp_path / "annotations" / f"{name}_val2017.json").write_text(json.dumps({"images": images, **each}))
    (picture,) = sources.load(f"coco:{tmp_path}")
    assert picture.mask("Cat") is None and picture.mask("combine harvester").any()
    assert picture.captions == ("A dog.",) and picture.true == ["Cat", "combine harvester", "dog"]
    assert picture.named("Two combine harvesters, a cat and a dog") == ["combine harvester", "Cat", "dog"], (
        "categories of one's own"
    )


def test_scenes_and_folders(tmp_path):
    some = sources.load("", 3, seed=2)
    assert [p.id for p in some] == ["scene-6", "scene-7", "scene-8"] and some[0].mask(some[0].objects[0]).any()
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(jpeg())
    assert [p.id for p in sources.load(str(tmp_path))] == ["a.jpg", "b.png"]
    assert sources.left_out(str(tmp_path)) == sources.left_out("scenes") == ""
    (tmp_path / "c.heic").touch()
    assert sources.left_out(str(tmp_path)).startswith("c.heic cannot be read here")
    assert sources.absolute("scenes") == "scenes"
    with pytest.raises(MmnError, match="images must not be empty"):
        sources.absolute("")
    for kind in ("", "sbu:", "coco:"):
        with pytest.raises(MmnError, match="cannot be read .File name too long|has no manifest|There is no"):
            sources.load(kind + "a" * 5000)
    with pytest.raises(MmnError, match="manifest"):
        sources.load(f"sbu:{tmp_path}")


def test_what_was_fetched_may_lie_in_a_folder_with_a_colon_and_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a:b"
    (folder / "images").mkdir(parents=True)
    head = "number,url,caption,file,sha256,reason,tries\n"
    (folder / "manifest.csv").write_text(f"{head}0,http://x/1.jpg,NA,1.jpg,,,0\n1,http://x/2.jpg,no,,,status 404,0\n")
    for given in (f"sbu:{folder}", f"sbu:{folder}:train", "sbu:~/a:b"):
        assert [picture.captions for picture in sources.load(given)] == [("NA",)]
        assert sources.dead(given).to_numpy().tolist() == [["http://x/2.jpg", "status 404"]]
        assert sources.absolute(given) in (f"sbu:{folder}", f"sbu:{folder}:train")
        assert sources.undivided(given) == f"sbu:{folder}"
    assert sources.dead("scenes").empty and sources.dead(str(tmp_path)).empty
    with pytest.raises(MmnError, match="has too few pictures for the part test"):
        sources.load(f"sbu:{folder}:test")
    (folder / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(MmnError, match="is not what `mmn fetch sbu` writes"):
        sources.load(f"sbu:{folder}")
