"""The atlas: its figures against brute force, its page in a browser, by keyboard and on a phone."""

import base64
import json

import browser
import numpy as np
import pytest
import tiny
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from sklearn.metrics import roc_auc_score

import mmn
from mmn import atlas, cli, scenes, sources
from mmn.errors import MmnError


@pytest.fixture(scope="module")
def found():
    return atlas.compute(mmn.load("tiny-llava"), sources.load("scenes", 60), batch_size=12)


def test_the_best_pictures_are_those_of_all_heatmaps():
    vlm, images = tiny.llava(), tiny.pictures(7)
    best, highest = atlas.excited(vlm, images, batch_size=3)
    every = [mmn.Neuron(layer, unit) for layer, size in enumerate(vlm.anatomy.neurons) for unit in range(size)]
    maps = torch.stack([mmn.heatmap(vlm, vlm.caption(image, max_new_tokens=1), every).grid.flatten(1) for image in images])
    peaks = maps.amax(-1)
    torch.testing.assert_close(highest.float(), peaks, rtol=2e-3, atol=2e-3)
    for place, neuron in enumerate(every):
        values, order = peaks[:, place].sort(descending=True)
        some = int((values[: atlas.BEST] > 0).sum())
        mine = best[neuron.layer]
        torch.testing.assert_close(mine.values[:some, neuron.unit], values[:some], rtol=1e-4, atol=1e-5)
        assert mine.which[:some, neuron.unit].tolist() == order[:some].tolist()
        if some:
            heat = maps[order[0], place] / values[0] * atlas.LEVELS
            assert (mine.heat(neuron.unit)[0].float() - heat.clamp(0, atlas.LEVELS)).abs().max() <= 0.51


def test_aurocs_are_scikit_learns():
    rng = np.random.default_rng(0)
    highest = torch.from_numpy(rng.integers(0, 5, (30, 7)).astype(np.float16))
    shown = rng.random((3, 30)) < 0.3
    table = atlas.aurocs(highest, shown)
    for concept, row in zip(shown, table, strict=True):
        for neuron, value in enumerate(row):
            assert value == pytest.approx(roc_auc_score(concept, highest[:, neuron].float().numpy()), abs=1e-6)


def test_heat_is_packed_two_to_a_byte():
    grids = np.arange(15).reshape(3, 5) % 16
    raw = base64.b64decode(atlas._packed(grids.astype(np.uint8)))
    assert [nibble for byte in raw for nibble in (byte >> 4, byte & 15)][:15] == grids.ravel().tolist()


def test_heat_at_an_odd_number_of_positions_is_read_as_it_was_written():
    levels = torch.randint(0, atlas.LEVELS + 1, (5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grids = torch.zeros(atlas.BEST, 3, 3, dtype=torch.uint8)
    padded = torch.cat((levels, levels.new_zeros(1, 3)))
    grids[1] = padded[::2] << 4 | padded[1::2]
    best = atlas.Best(torch.ones(atlas.BEST, 3), torch.zeros(atlas.BEST, 3, dtype=torch.int16), grids, 5)
    for unit in range(3):
        assert torch.equal(best.heat(unit)[1], levels[:, unit]) and not best.heat(unit)[0].any()


def test_what_it_says_of_neurons_is_true(found):
    vlm = mmn.load("tiny-llava")
    with_concept = [row for row in found["neurons"] if "effect" in row]
    assert found["about"]["passed"] > 10 * (found["about"]["by_chance"] + 1)
    row = max(with_concept, key=lambda each: each["effect"])
    neuron, concept = mmn.Neuron(row["layer"], row["unit"]), found["concepts"][row["concept"]]
    assert row["auroc"] >= atlas.SURE and all(
        found["concepts"].index(concept) in found["shows"][picture] for picture in row["pictures"][:1]
    )
    tokens = mmn.top_tokens(vlm, [neuron], k=atlas.WORDS)["tokens"].iloc[0]
    assert [found["tokens"][str(token)] for token in row["words"]] == tokens
    scene = next(s for s in scenes.sample(60) if concept in s.names and any(n.lemma == concept for n in vlm.caption(s.image).nouns))
    trace = vlm.caption(scene.image)
    noun = trace.noun(concept)

    def log_p():
        with torch.no_grad():
            return vlm.model(**vlm.replay(trace, noun.step)).logits[0, -1].log_softmax(-1)[noun.token]

    before = log_p()
    with mmn.zero(vlm, [neuron]):
        after = log_p()
    assert row["effect"] == pytest.approx(float(before - after), abs=2e-3)


def test_captions_in_batches_choose_the_same_pictures(monkeypatch):
    """The first that shows the concept and whose caption says it, as when each is captioned alone; and no more than are needed."""
    vlm, pictures = mmn.load("tiny-llava"), sources.load("scenes", 24)
    names = list(dict.fromkeys(name for picture in pictures for name in picture.objects))
    neurons = {mmn.Neuron(7, unit): name for unit, name in enumerate([*names, "chimera"])}
    first = {}
    for picture in pictures:
        for noun in vlm.caption(picture.open()).nouns:
            if noun.lemma in picture.objects:
                first.setdefault(noun.lemma, picture)
    asked, captioned = {}, []
    cases = atlas.properties.cases

    def counted(vlm, images):
        captioned.append(len(images))
        return cases(vlm, images)

    def effects(vlm, case, some):
        asked[case.lemma] = case.trace.image
        return {"drop": [0.0] * len(some)}

    monkeypatch.setattr(atlas.properties, "cases", counted)
    monkeypatch.setattr(atlas.properties, "effects", effects)
    found = atlas.effects(vlm, neurons, pictures, batch_size=5)
    assert {neurons[neuron] for neuron in found} == set(first) == set(asked)
    assert all(asked[name].tobytes() == first[name].open().tobytes() for name in first)
    assert max(captioned) == 5 and sum(captioned) <= len(pictures)


def test_pictures_of_which_nothing_is_known(tmp_path):
    for number, scene in enumerate(scenes.sample(5)):
        scene.image.save(tmp_path / f"{number}.png")
    some = atlas.compute(mmn.load("tiny-llava"), sources.load(str(tmp_path), 5), most=50)
    assert some["concepts"] == [] and some["about"]["passed"] == 0 and len(some["neurons"]) == 50
    assert all(len(row["pictures"]) == len(row["peaks"]) and "concept" not in row for row in some["neurons"])


def test_a_broken_picture_is_left_out(tmp_path, capsys):
    model, processor = tiny.llava_parts()
    for each in (model, processor):
        each.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(tiny.pictures(3)):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "1.png").write_bytes(b"cut short")
    words = ["atlas", "--model", str(tmp_path / "model"), "--images", str(tmp_path / "pictures"), "--most", "5"]
    assert cli.main([*words, "--out", str(tmp_path / "atlas.html")]) == 0
    said = capsys.readouterr()
    assert said.err.count("left out: 1.png") == 1 and "Traceback" not in said.err
    data = (tmp_path / "atlas.html").read_text().split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["about"]["pictures"] == 2


def test_a_model_without_image_positions_and_no_pictures_are_refused():
    with pytest.raises(MmnError, match="no pictures"):
        atlas.compute(tiny.llava(), [])


@pytest.fixture(scope="module")
def driver(found, tmp_path_factory):
    browser.need("The atlas")
    folder = tmp_path_factory.mktemp("atlas")
    (folder / "atlas.html").write_text(atlas.page(found), encoding="utf-8")
    started = browser.start(folder / "profile")
    started.get((folder / "atlas.html").as_uri())
    yield started
    started.quit()


def test_a_reader_filters_opens_and_follows_links(driver, found):
    wait = WebDriverWait(driver, 20)
    with_concept = [row for row in found["neurons"] if "concept" in row]
    counts = np.bincount([row["concept"] for row in with_concept])
    concept = int(counts.argmax())
    Select(driver.find_element(By.ID, "concept")).select_by_visible_text(found["concepts"][concept])
    wait.until(lambda d: d.find_element(By.ID, "count").text == f"{counts[concept]} neurons")
    entries = driver.find_elements(By.CSS_SELECTOR, "#list button")
    assert len(entries) == counts[concept] and all(found["concepts"][concept] in entry.text for entry in entries)
    entries[0].click()
    name = entries[0].get_attribute("data-neuron")
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#detail canvas"))
    assert driver.current_url.endswith("#" + name) and found["concepts"][concept] in driver.find_element(By.ID, "detail").text
    painted = """return [...document.querySelectorAll('#detail canvas')].every(
        c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 20)"""
    wait.until(lambda d: d.execute_script(painted))
    links = driver.find_elements(By.CSS_SELECTOR, "#detail p a")
    other = links[0].text
    links[0].click()
    wait.until(lambda d: other[1:].split(".")[1] in d.find_element(By.CSS_SELECTOR, "#detail h2").text)
    Select(driver.find_element(By.ID, "concept")).select_by_value("")
    driver.find_element(By.ID, "word").send_keys("zzzz")
    wait.until(lambda d: d.find_element(By.ID, "count").text == "0 neurons")
    driver.find_element(By.ID, "word").clear()
    driver.find_element(By.ID, "word").send_keys(Keys.SPACE)
    wait.until(lambda d: d.find_element(By.ID, "count").text == f"{len(found['neurons'])} neurons")
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_is_worked_by_keyboard_fits_a_phone_and_has_no_barriers(driver):
    first, second = driver.find_elements(By.CSS_SELECTOR, "#list button")[:2]
    driver.execute_script("arguments[0].focus()", first)
    driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert driver.switch_to.active_element == second
    name = second.get_attribute("data-neuron")
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    WebDriverWait(driver, 20).until(lambda d: second.get_attribute("aria-current") == "true")
    assert driver.current_url.endswith("#" + name)
    assert browser.barriers(driver) == []
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 380
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_holds_everything_itself(found):
    text = atlas.page(found)
    assert "http" not in text.split('<script id="data"')[0] and len(text) < 3 * 2**20
    data = text.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(data.replace("<\\/", "</")) == json.loads(json.dumps(found))
