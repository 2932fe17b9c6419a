"""The page in Chromium, over the real service: searching, and what can be done with what is found."""

from __future__ import annotations

import base64
from urllib.parse import unquote

from playwright.sync_api import expect

from tests.pages.site import Visit
from tests.pages.world import COLOURS, HOSTILE, SHAPES, drawing

PNG = drawing("teal", "triangle", (120, 90))


def image_term(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def test_a_text_is_typed_and_found(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_role("heading", name="36 pairs")).to_be_visible()
    expected = visit.site.first.search("a red circle", k=30).rows()
    assert visit.search("a red circle") == [str(row["pair_key"]) for row in expected]
    shown = page.locator("#results .item").all_inner_texts()
    for row, text in zip(expected, shown, strict=True):
        assert text.startswith(f"{row['similarity']:.3f}")
        assert row["caption"] in HOSTILE.values() or text.endswith(row["caption"])
    expect(page.get_by_role("status")).to_contain_text("30 results of 36 pairs")
    assert page.title() == "a red circle · clipmill"
    assert "q=a+red+circle" in page.url


def test_pictures_are_the_stored_ones_and_nothing_moves_as_they_come(visit: Visit) -> None:
    page = visit.open()
    page.route("**/v1/images/*", lambda route: route.abort())
    visit.search("a red circle")
    boxes = "all => all.map((item) => JSON.stringify(item.getBoundingClientRect()))"
    before = page.locator("#results .item").evaluate_all(boxes)
    page.unroute("**/v1/images/*")
    page.reload()
    visit.settle()
    images = page.locator("#results .item img")
    loaded = images.evaluate_all(
        "all => Promise.all(all.slice(0, 8).map(async (i) => (await i.decode(), [i.naturalWidth, i.width > 0])))"
    )
    widths = {str(row["pair_key"]): row["width"] for row in visit.site.first.search("a red circle", k=30).rows()}
    assert loaded == [[widths[key], True] for key in visit.keys()[:8]]
    assert page.locator("#results .item").evaluate_all(boxes) == before


def test_a_dropped_image_is_searched_with(visit: Visit) -> None:
    page = visit.open(q="a blue ring")
    visit.drop(PNG)
    assert visit.keys() == visit.site.keys(terms=[image_term(PNG)])
    assert page.input_value("#text") == ""
    # This image, but red.
    both = [image_term(PNG), {"text": "red"}]
    assert visit.search("red") == visit.site.keys(terms=both)
    expect(page.locator("#terms li")).to_have_count(1)
    # A second image beside both.
    other = drawing("red", "circle", (50, 50))
    visit.drop(other, zone="add")
    assert visit.keys() == visit.site.keys(terms=[image_term(PNG), image_term(other), {"text": "red"}])


def test_an_image_is_chosen_or_pasted(visit: Visit) -> None:
    page = visit.open()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": PNG})
    expected = visit.site.keys(terms=[image_term(PNG)])
    assert visit.keys() == expected
    page.get_by_role("button", name="Remove a.png").click()
    assert visit.keys() == []
    page.evaluate(
        """(data) => {
          const clipboardData = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          clipboardData.items.add(new File([bytes], 'image.png', { type: 'image/png' }));
          document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData, bubbles: true, cancelable: true }));
        }""",
        base64.b64encode(PNG).decode(),
    )
    assert visit.keys() == expected


def test_a_result_is_dragged_into_the_search(visit: Visit) -> None:
    page = visit.open(q="a blue ring", k=12)
    second, third = visit.keys()[1:3]

    def drag(item: int, x: int) -> None:
        page.locator("#results .item").nth(item).hover()
        page.mouse.down()
        page.mouse.move(x, 500)
        page.mouse.move(x, 400, steps=3)
        page.mouse.up()

    drag(2, 1000)  # to the right half: beside the text
    assert visit.keys() == visit.site.keys(k=12, terms=[{"key": int(third)}, {"text": "a blue ring"}])
    drag(visit.keys().index(second), 300)
    assert visit.keys() == visit.site.keys(k=12, terms=[{"key": int(second)}])


def test_what_is_no_image_is_said_and_the_results_stay(visit: Visit) -> None:
    page = visit.open(q="a red circle")
    before = visit.keys()
    visit.drop(b"a text", name="notes.txt", kind="text/plain")
    expect(page.get_by_role("alert").filter(has_text="This is no image: notes.txt")).to_be_visible()
    assert visit.keys() == before
    # The server looks at the bytes, whatever the file calls itself.
    visit.drop(b"a text")
    alert = page.locator("#problem [role=alert]")
    expect(alert).to_be_visible()
    assert visit.keys() == []


def test_terms_are_weighed_negated_and_removed(visit: Visit) -> None:
    page = visit.open()
    page.fill("#text", "a red circle")
    page.press("#text", "Alt+Enter")
    assert page.input_value("#text") == ""
    visit.search("-a line")
    not_line = [{"text": "a red circle"}, {"text": "a line", "weight": -1}]
    assert visit.keys() == visit.site.keys(terms=not_line)
    page.get_by_label("Weight of a line").fill("0.25")
    page.get_by_label("Weight of a line").press("Enter")
    assert visit.keys() == visit.site.keys(terms=[not_line[0], {"text": "a line", "weight": -0.25}])
    page.get_by_role("button", name="Negate a line").click()
    assert visit.keys() == visit.site.keys(terms=[not_line[0], {"text": "a line", "weight": 0.25}])
    page.get_by_role("button", name="Remove a red circle").click()
    assert visit.keys() == visit.site.keys(terms=[{"text": "a line", "weight": 0.25}])
    page.press("#text", "Backspace")
    assert visit.keys() == []


def test_a_result_opens_with_its_record_and_leads_on(visit: Visit) -> None:
    page = visit.open()
    keys = visit.search("a green square")
    page.locator("#results .item").nth(3).click()
    dialog = page.get_by_role("dialog")
    [row] = visit.site.first.records([int(keys[3])]).to_pylist()
    expect(dialog.locator(".caption")).to_contain_text(row["caption"][:200].split("\0")[0])
    expect(dialog.locator(".record")).to_contain_text(keys[3])
    expect(dialog.locator(".record")).to_contain_text(str(1 << 62))  # phash, to the last digit
    assert f"open={keys[3]}" in page.url
    page.keyboard.press("ArrowRight")
    expect(dialog.locator(".record")).to_contain_text(keys[4])
    dialog.get_by_role("button", name="More like this").click()
    expect(dialog).to_be_hidden()
    assert visit.keys() == visit.site.keys(terms=[{"key": int(keys[4])}])
    assert visit.keys()[0] == keys[4]
    page.locator("#results .item").first.click()
    dialog.get_by_role("button", name="Captions like this").click()
    assert visit.keys() == visit.site.keys(terms=[{"key": int(keys[4])}], modality="text")
    expect(page.get_by_role("tab", name="Captions")).to_have_attribute("aria-selected", "true")


def test_the_key_is_copied_as_it_is(visit: Visit) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.open(q="a green square")
    key = visit.keys()[0]
    page.locator("#results .item").first.click()
    page.get_by_role("button", name="Copy key").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key


def test_filter_numbers_and_completions(visit: Visit) -> None:
    page = visit.open(q="a red circle")
    terms = [{"text": "a red circle"}]
    page.click("#where")
    page.keyboard.type("wid")
    columns = page.locator("#columns").get_by_role("option")
    assert columns.all_inner_texts() == ["width"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.type(">= 96 and ")
    expect(columns).to_have_count(len(visit.site.first.columns))
    page.keyboard.type("caption like 'a %'")
    expect(columns).to_have_count(0)
    page.keyboard.press("Enter")
    where = "width >= 96 and caption like 'a %'"
    wide = visit.site.keys(terms=terms, where=where)
    assert visit.keys() == wide
    assert len(wide) == 18  # of five sizes, three are as wide
    page.fill("#k", "4")
    page.press("#k", "Enter")
    assert visit.keys() == visit.site.keys(terms=terms, where=where, k=4)
    page.click("#more")
    page.fill("#diversity", "0.8")
    page.press("#diversity", "Enter")
    assert visit.keys() == visit.site.keys(terms=terms, where=where, k=4, diversity=0.8)
    least = visit.site.first.search("a red circle", k=2).rows()[1]["similarity"] - 1e-6
    page = visit.open(q="a red circle", threshold=f"{least:.7f}")
    page.reload()
    assert visit.keys() == visit.site.keys(terms=terms, k=2)


def test_another_index_and_captions(visit: Visit) -> None:
    page = visit.open(q="a purple line")
    _, other = visit.site.collections
    page.select_option("#index", other)
    terms = [{"text": "a purple line"}]
    assert visit.keys() == visit.site.keys(other, terms=terms)
    assert visit.keys() != visit.site.keys(terms=terms)
    page.get_by_role("tab", name="Captions").click()
    assert visit.keys() == visit.site.keys(other, terms=terms, modality="text")
    assert f"index={other}" in unquote(page.url)


def test_the_back_button_undoes_step_by_step(visit: Visit) -> None:
    page = visit.open()
    first = visit.search("a red circle")
    visit.search("a blue line")
    page.get_by_role("tab", name="Captions").click()
    captions = visit.keys()
    page.locator("#results .item").nth(1).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert visit.keys() == captions
    page.go_back()
    expect(page.get_by_role("tab", name="Images")).to_have_attribute("aria-selected", "true")
    assert page.input_value("#text") == "a blue line"
    page.go_back()
    expect(page.locator("#text")).to_have_value("a red circle")
    assert visit.keys() == first
    page.go_forward()
    expect(page.locator("#text")).to_have_value("a blue line")


def test_a_state_survives_its_url(visit: Visit) -> None:
    page = visit.open()
    state = {
        "view": "text", "index": "a/b&c=d#e", "text": "2*x & <y> + z%20", "where": "caption = 'a=b&c'", "prompt": "",
        "k": 7, "threshold": -0.5, "unique": 0.99, "diversity": None, "open": "9223372036854775807",
        "terms": [
            {"kind": "text", "value": "-3*not a weight\n\u202e", "weight": -0.5},
            {"kind": "key", "value": "9223372036854775807", "weight": 1},
            {"kind": "url", "value": "https://h/a?b=1&c=#d", "weight": 2},
            {"kind": "image", "value": "1-2", "weight": 1},
        ],
    }  # fmt: skip
    module = "import('./page/state.js')"
    again = page.evaluate(
        f"async (state) => {{ const {{ read, write }} = await {module}; return read('#' + write(state)); }}", state
    )
    assert again == state
    junk = "#view=no&k=x&key=12a&key=1*-3&text=&diversity=&threshold=NaN&__proto__=1&constructor=2&k=Infinity"
    assert (
        page.evaluate(
            f"async (hash) => {{ const {{ read, write }} = await {module}; return write(read(hash)); }}", junk
        )
        == ""
    )


def test_generated_pictures(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("tab", name="Generated").click()
    visit.settle()
    expect(page.get_by_role("status")).to_have_text("2 prompts, 6 pictures kept")
    few = page.locator(".prompt").filter(has_text="a red circle")
    assert few.locator(".item").all_inner_texts() == ["0.400 #1", "0.390 #2", "0.380 #3"]
    assert few.locator(".scores li").all_inner_texts() == [f"#{i + 1} {0.4 - 0.01 * i:.3f}" for i in range(8)]
    decoded = few.locator("img").evaluate_all(
        "all => Promise.all(all.map((i) => i.decode().then(() => i.naturalWidth)))"
    )
    assert decoded == [32, 32, 32]
    page.fill("#text", "RED")
    page.press("#text", "Enter")
    visit.settle()
    expect(page.locator(".prompt")).to_have_count(1)
    page.locator(".item").nth(1).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".record")).to_contain_text("steps=4")
    expect(dialog.locator(".record")).to_contain_text("generate-1")
    dialog.get_by_role("button", name="More like this").click()
    expect(page.get_by_role("tab", name="Images")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#terms li")).to_have_count(1)
    assert visit.keys() == visit.site.keys(terms=[image_term(drawing(COLOURS[1], SHAPES[1], (32, 32)))])
