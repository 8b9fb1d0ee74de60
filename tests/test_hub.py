"""Models of the Hub where it cannot be reached: one attempt, then what its cache holds."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from huggingface_hub import constants

import mmn
from mmn import properties, vlm

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds a model whole, its weights in several files."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "models--owner--model"
    snapshot = folder / "snapshots" / COMMIT
    model, processor = tiny.llava_parts()
    model.save_pretrained(snapshot, max_shard_size="60KB")
    processor.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return cache


class Counted(http.server.BaseHTTPRequestHandler):
    """A Hub that is out of order, and how often it was asked."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        if "/owner/" in self.path:  # the client also asks what it is used by
            self.asked.append(self.path)
        self.send_response(503)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of a copy of that cache, and a Hub that answers no question."""
    copy = Path(shutil.copytree(whole, tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counted)
    Counted.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    yield copy / "models--owner--model" / "snapshots" / COMMIT
    server.shutdown()
    server.server_close()


def refusal(name: str = "owner/model") -> str:
    with pytest.raises(mmn.MmnError) as caught:
        mmn.load(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_one_attempt_and_then_the_cache(cache: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.warns(UserWarning, match="from this machine's cache, because the Hub cannot be reached .*HF_HUB_OFFLINE=1"):
        model = mmn.load("owner/model")
    assert model.anatomy.neurons == [24] * 3 and model.hash == mmn.load(cache).hash
    assert len(Counted.asked) == 1 and "Retrying" not in capfd.readouterr().err
    assert constants.HF_HUB_OFFLINE is False, "the next model is asked for anew"


def test_a_hub_that_refuses_connections(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.warns(UserWarning, match="cannot be reached"):
        mmn.load("owner/model")
    assert Counted.asked == []


@pytest.mark.filterwarnings("error")
def test_no_attempt_where_the_environment_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert mmn.load("owner/model").anatomy.neurons == [24] * 3 and Counted.asked == []
    assert "is not on this machine, and HF_HUB_OFFLINE is set: unset it" in refusal("owner/other")
    assert constants.HF_HUB_OFFLINE is True


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("model-00002-of-*", "lacks model-00002-of-"),
        ("*.safetensors*", "lacks weights in safetensors"),
        ("processor_config.json", "lacks a processor of pictures and words"),
        ("tokenizer.json", "lacks a tokenizer that can be read"),
        ("config.json", "is not on this machine"),
        ("*", "is not on this machine"),
    ],
)
def test_a_cache_that_is_not_whole(cache: Path, missing: str, what: str) -> None:
    gone = [file.unlink() for file in cache.glob(missing)]
    text = refusal()
    assert gone and what in text and "owner/model" in text and "the Hub cannot be reached (" in text and "go online" in text
    assert len(Counted.asked) == 1


def test_a_folder_that_is_not_whole(cache: Path) -> None:
    (cache / "tokenizer.json").unlink()
    assert "lacks a tokenizer that can be read: get the whole checkpoint" in refusal(str(cache))
    next(cache.glob("model-00002-of-*")).unlink()
    assert "lacks model-00002-of-" in refusal(str(cache))
    assert Counted.asked == []


def test_a_hub_that_answers_is_believed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Counted) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    monkeypatch.setattr(Counted, "do_HEAD", answer)
    with vlm.hub("owner/other") as offline:
        assert offline == "" and constants.HF_HUB_OFFLINE is False


def test_encoders_are_not_tried_again_either(cache: Path) -> None:
    for encoder in (properties.ClipEncoder, properties.BertEncoder):
        Counted.asked.clear()
        with pytest.raises(mmn.MmnError, match="while you are online"):
            encoder("owner/other")
        assert len(Counted.asked) == 1
