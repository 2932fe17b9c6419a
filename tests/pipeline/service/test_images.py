"""Single pairs: their pictures, what is known of them, and taking them out while the service runs."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from tests.jobs.embedded import embed_directly
from tests.kills import add_images, image_row, save_clip
from tests.pipeline.models.test_clip import TINY
from tests.pipeline.service.asking import Client, folder_of, index, serving
from tests.pipeline.service.conftest import N

Indexed = tuple[Workspace, EncoderCard]


@pytest.fixture
def own(tmp_path: Path, indexed: Indexed) -> Workspace:
    """A copy, to be changed."""
    shutil.copytree(folder_of(indexed[0]), tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def test_a_picture_as_it_is_stored(client: Client) -> None:
    row = image_row(3)
    answer = client.ask("GET", f"/v1/images/{row['pair_key']}")
    assert (answer.status, answer.body) == (200, row["image"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    tag = answer.headers["etag"]
    again = client.ask("GET", f"/v1/images/{row['pair_key']}", if_none_match=tag)
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert client.ask("GET", f"/v1/images/{image_row(4)['pair_key']}", if_none_match=tag).status == 200


def test_a_record(client: Client, indexed: Indexed) -> None:
    row = image_row(3)
    found = client.ask("GET", f"/v1/images/{row['pair_key']}/record").json
    assert (found["key"], found["index"]) == (str(row["pair_key"]), indexed[1].id)
    assert (found["record"]["caption"], found["record"]["width"]) == ("picture 3", 16)
    assert (found["image"]["sha256"], found["image"]["status"]) == (row["sha256"], "ok")
    assert found["pair"]["url"] == row["url"]
    assert not {"image_vec", "text_vec", "image", "file"} & (found["record"].keys() | found["image"].keys())


def test_deleted_everywhere_from_the_answer_on(own: Workspace) -> None:
    key = image_row(5)["pair_key"]
    with serving(own, deletions=True) as one, serving(own, deletions=True) as other:  # two replicas
        for client in (one, other):
            assert client.keys({"text": "a"}, k=N).count(key) == 1
        answer = one.ask("DELETE", f"/v1/images/{key}")
        assert (answer.status, answer.json["deleted"], answer.json["key"]) == (200, True, str(key))
        for client in (other, one):
            for more in ({}, {"where": "width = 16"}, {"modality": "text"}, {"unique": 1.0}):
                found = client.keys({"text": "a"}, k=N, **more)
                assert key not in found and len(found) == N - 1
            assert client.ask("GET", f"/v1/images/{key}").status == 404
            assert client.ask("GET", f"/v1/images/{key}/record").status == 404
            assert client.search({"key": key}).status == 404
            assert client.ask("DELETE", f"/v1/images/{key}").status == 404
            (info,) = client.ask("GET", "/v1/indices").json["indices"]
            assert info["count"] == N - 1


def test_a_new_version_is_taken_up_without_a_failed_request(own: Workspace) -> None:
    encoder = own.indexed_encoders()[0]
    clip = Path(own.published_index(encoder).encoder.model.removeprefix("local-dir:"))  # type: ignore[union-attr]
    new = image_row(N)["pair_key"]
    failed: list[Any] = []
    versions: list[str] = []
    stop = threading.Event()

    def ask(client: Client) -> None:
        while not stop.is_set():
            answer = client.search({"text": "a"}, k=N + 1)
            if answer.status != 200:
                failed.append(answer)
                continue
            versions.append(answer.json["version"])
            assert len(answer.json["results"]) in (N, N + 1)

    with serving(own) as client:
        before = client.search({"text": "a"}).json["version"]
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            add_images(own, [N])
            embed_directly(own, clip, run="later")
            index(own)
            published = own.published_index(encoder)
            assert published is not None and published.version != before
            while published.version not in versions[-20:] and not failed:
                time.sleep(0.02)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == [] and set(versions) == {before, published.version}
        assert new in client.keys({"text": "a"}, k=N + 1)
        text = client.ask("GET", "/metrics").body.decode()
        assert f'clipmill_index_info{{index="{encoder}",version="{published.version}"}} 1.0' in text
        assert f'clipmill_index_swaps_total{{index="{encoder}"}} 1.0' in text


def test_a_version_that_cannot_be_opened_is_not_taken_up(own: Workspace) -> None:
    encoder = own.indexed_encoders()[0]
    with serving(own) as client:
        before = client.search({"text": "a"}).json["version"]
        broken = own.index_dir(encoder) / "broken"
        shutil.copytree(str(own.index_dir(encoder) / before), str(broken))
        card = own.published_index(encoder)
        assert card is not None
        (broken / "card.json").write_text(card.model_copy(update={"version": "broken"}).to_json())
        file = broken / card.file("image").path
        file.write_bytes(file.read_bytes()[:-8])
        (own.index_dir(encoder) / "CURRENT").write_text("broken")
        line = f'clipmill_index_refresh_failures_total{{index="{encoder}"}}'
        while line not in client.ask("GET", "/metrics").body.decode():
            time.sleep(0.02)
        answer = client.search({"text": "a"})
        assert (answer.status, answer.json["version"]) == (200, before)


def test_an_encoder_indexed_later_is_served(own: Workspace, tmp_path: Path) -> None:
    first = own.indexed_encoders()[0]
    card = embed_directly(own, save_clip(tmp_path / "other", TINY | {"embed_dim": 8}, seed=1))
    index(own, encoder=card.id)
    published = own.published_index(card.id)
    assert published is not None
    current = Path(str(own.index_dir(card.id) / "CURRENT"))
    file = Path(str(own.index_dir(card.id))) / published.version / published.file("image").path
    whole = file.read_bytes()
    current.rename(current.with_name("LATER"))
    with serving(own) as client:

        def names() -> list[str]:
            return [info["name"] for info in client.ask("GET", "/v1/indices").json["indices"]]

        assert names() == [first]
        file.write_bytes(whole[:-8])
        current.with_name("LATER").rename(current)
        while f'refresh_failures_total{{index="{card.id}"}}' not in client.ask("GET", "/metrics").body.decode():
            time.sleep(0.02)
        assert names() == [first]
        damaged = own.index_dir("000") / "CURRENT"  # in front of it, and it stays so
        damaged.parent.mkdir()
        damaged.write_text("none")
        file.write_bytes(whole)
        while names() != [first, card.id]:
            time.sleep(0.02)
        answer = client.search({"text": "a"}, k=N, index=card.id)
        assert (answer.status, answer.json["version"], len(answer.json["results"])) == (200, published.version, N)
        assert client.search({"text": "a"}).json["index"] == first  # still the default
