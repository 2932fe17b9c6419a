"""The page where things go wrong: a server that refuses or is gone, and captions that are hostile."""

from __future__ import annotations

from urllib.parse import quote

from playwright.sync_api import expect

from tests.pages.site import Visit
from tests.pages.test_page import PNG, image_term
from tests.pages.world import HOSTILE


def test_a_bad_filter_is_explained_beside_it(visit: Visit) -> None:
    page = visit.open(q="a red circle")
    for where in ("heigth > 3", "1=1; drop table pairs", "exists (select * from read_text('/etc/passwd'))"):
        page.fill("#where", where)
        page.press("#where", "Enter")
        visit.settle()
        body = {"terms": [{"text": "a red circle"}], "where": where}
        error = page.request.post(f"{visit.site.url}/v1/search", data=body).json()["error"]
        box = page.locator("#where-problem")
        for told in filter(None, error.values()):
            if told != error["code"]:
                expect(box).to_contain_text(told)
        expect(page.locator("#where")).to_have_attribute("aria-invalid", "true")
        assert visit.keys() == []
    page.fill("#where", "width > 3")
    page.press("#where", "Enter")
    expect(box).to_be_hidden()
    assert visit.keys() == visit.site.keys(terms=[{"text": "a red circle"}], where="width > 3")


def test_a_token_is_asked_for_and_stays_out_of_urls(visit: Visit) -> None:
    page = visit.page
    with visit.site.limited(token="open sesame"):
        page.goto(f"{visit.site.url}/#q=a+red+circle")
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Token").fill("a wrong one")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_have_text("That token was refused.")
        dialog.get_by_label("Token").fill("open sesame")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#results .item")).to_have_count(30)
        first = page.locator("#results .item img").first
        expect(first).to_have_js_property("complete", True)
        assert first.evaluate("async (img) => { await img.decode(); return img.src.split(':')[0]; }") == "blob"
        page.reload()
        assert visit.keys() == visit.site.keys(terms=[{"text": "a red circle"}])
    assert page.evaluate("sessionStorage.length") == 1
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert not [r.url for r in visit.requests if quote("open sesame") in r.url]


def test_no_token_is_given(visit: Visit) -> None:
    with visit.site.limited(token="secret"):
        visit.page.goto(visit.site.url)
        visit.page.get_by_role("button", name="Cancel").click()
        expect(visit.page.locator("#problem")).to_contain_text("a token is needed")
        visit.page.get_by_role("button", name="Try again").click()
        expect(visit.page.get_by_role("dialog")).to_be_visible()


def test_too_large_an_image_is_sent_smaller_on_request(visit: Visit) -> None:
    photo = PNG + b"moving" * 100_000  # as phones append a film to a photo
    page = visit.open()
    with visit.site.limited(max_bytes=500_000):
        visit.drop(photo, name="photo.png")
        expect(page.locator("#problem")).to_contain_text("the body is too large")
        expect(page.locator("#problem")).to_contain_text("500000 bytes")
        page.get_by_role("button", name="Search with a smaller copy").click()
        expect(page.locator("#results .item")).to_have_count(30)


def test_a_busy_server_is_asked_again(visit: Visit) -> None:
    page = visit.open()
    with visit.site.limited(concurrency=0):
        visit.search("a red circle")
        expect(page.locator("#problem")).to_contain_text("ask again a little later")
        expect(page.get_by_role("button", name="Try again (by itself in 1 s)")).to_be_visible()
    expect(page.locator("#results .item")).to_have_count(30)
    expect(page.locator("#problem .problem")).to_have_count(0)


def test_a_server_that_is_gone_and_comes_back(visit: Visit) -> None:
    page = visit.open()
    page.context.set_offline(True)
    visit.search("a red circle")
    expect(page.get_by_role("alert").filter(has_text="The server does not answer")).to_be_visible()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert visit.keys() == visit.site.keys(terms=[{"text": "a red circle"}])


def test_what_the_server_refuses_is_told_in_its_words(visit: Visit) -> None:
    page = visit.open(q="a red circle", k=0)
    expect(page.locator("#problem")).to_contain_text("greater than or equal to 1")
    visit.open(key="1*123")
    expect(page.locator("#problem")).to_contain_text("there is no key 123")
    visit.open(url="http://127.0.0.1/secret.png")
    expect(page.locator("#problem")).to_contain_text("this service fetches no images")


def test_an_image_of_another_page_is_asked_for_again(visit: Visit) -> None:
    page = visit.open()
    visit.drop(PNG)
    visit.search("red")
    page.reload()
    visit.settle()
    expect(page.get_by_role("heading", name="This link holds an image")).to_be_visible()
    page.get_by_role("button", name="Remove an image, to be given again").click()
    assert visit.keys() == visit.site.keys(terms=[{"text": "red"}])
    assert visit.site.keys(terms=[{"text": "red"}]) != visit.site.keys(terms=[image_term(PNG), {"text": "red"}])


def test_hostile_captions_are_texts(visit: Visit) -> None:
    page = visit.open(q="x", k=36)
    # Every result is made of the same elements, whatever its caption says.
    tags = "all => [...new Set(all.map((item) => item.querySelectorAll('*').length))]"
    assert len(page.locator("#results .item").evaluate_all(tags)) == 1
    texts = page.locator("#results .caption").all_text_contents()
    for caption in (HOSTILE["markup"], HOSTILE["attribute"], HOSTILE["template"], HOSTILE["direction"]):
        assert caption in texts
    assert "before␀after␇ ␛[31mred" in texts
    assert HOSTILE["long"][:240] + "…" in texts
    assert max(map(len, texts)) <= 241
    for view in ("image", "text"):
        visit.open(q="x", k=36, view=view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.open(q="x", k=36)
    for row in visit.site.first.search("x", k=36).rows():
        if row["caption"] in HOSTILE.values():
            visit.open(q="x", k=36, open=row["pair_key"])
            expect(page.locator("#details .record dl")).not_to_have_count(0)
            expect(page.locator("#details a[href^=javascript]")).to_have_count(0)
            assert (
                page.evaluate("document.querySelectorAll('#details script, #details base, #details svg').length") == 0
            )
            assert page.evaluate("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('.facts'))")
    visit.open(view="generated")
    expect(page.locator(".prompt h2")).to_contain_text(["<b onclick=alert(7)>a green square</b>", "a red circle"])
    assert page.evaluate("document.querySelectorAll('b').length") == 0


def test_a_hostile_link_asks_nobody(visit: Visit) -> None:
    for state in (
        {"open": "//elsewhere.invalid/x"},
        {"open": "../../healthz?"},
        {"view": "generated", "open": "https://elsewhere.invalid/x"},
        {"index": "<b>", "q": "x", "where": "<img src=x onerror=alert(1)>"},
        {"key": "1*../../x", "text": "1*<img src=x onerror=alert(1)>"},
    ):
        visit.page.goto("about:blank")
        visit.open(**state)
        expect(visit.page.locator("#details")).to_be_hidden()
    paths = {r.url.removeprefix(visit.site.url).partition("?")[0] for r in visit.requests if r.url.startswith("http")}
    assert all(path.startswith(("/page/", "/v1/")) or path == "/" for path in paths), paths
    assert not [path for path in paths if ".." in path or "elsewhere" in path]
