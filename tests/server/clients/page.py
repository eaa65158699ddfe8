"""Uses the server's page in Chromium: python page.py ADDRESS KEY."""

import json
import shutil
import sys

from playwright.sync_api import expect, sync_playwright

address, key = sys.argv[1:]
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>\u202e</div><b>bold</b>'


def events(*deltas):
    parts = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    return "".join(f"data: {part}\n\n" for part in [*parts, "[DONE]"])


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


expect.set_options(timeout=60_000)
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page()
    problems, urls = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))

    page.goto(address)
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#problem")).to_contain_text("API key")
    assert [text for text in problems if "401" not in text] == [], problems
    problems.clear()
    page.fill("#key", key)
    page.click("#key-form button")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).not_to_have_text("dsa_jax")
    title = page.title()

    # An answer of the model itself, and another one in the same conversation.
    page.fill("#tokens", "12")
    for count in (1, 2):
        ask(page, "Hello <b>you</b>")
        expect(page.locator("#status")).to_contain_text("tokens/s")
        expect(page.locator("#send")).to_be_visible()
        assert page.locator("article").count() == 2 * count
    assert "Hello <b>you</b>" in page.locator("article.user").first.inner_text()

    # What a hostile model says is text.
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream",
        body=events({"reasoning_content": HOSTILE}, {"content": HOSTILE}, {"tool_calls": [
            {"index": 0, "id": "a", "function": {"name": HOSTILE, "arguments": HOSTILE}}]}),
    ))  # fmt: skip
    ask(page, "again")
    expect(page.locator("article").last.locator(".calls")).to_contain_text("onerror")
    for part in ("content", "reasoning"):
        assert page.locator("article").last.locator(f".{part}").inner_text() == HOSTILE
    assert page.locator("main img, main script, main article b >> text=bold").count() == 0 and page.title() == title

    # The stop button ends what is coming, and an error is shown.
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page, "never answered")
    expect(page.locator("#stop")).to_be_visible()
    page.click("#stop")
    expect(page.locator("#send")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    page.fill("#tokens", "100000")
    ask(page, "too long")
    expect(page.locator("#problem")).to_contain_text("must fit")
    page.click("#reset")
    assert page.locator("article").count() == 0

    # Nothing was fetched from elsewhere, nothing broke the page's policy, and the key is kept nowhere.
    assert all(url.startswith(address) for url in urls), urls
    assert [text for text in problems if "400" not in text] == [], problems
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.locator("#key-form")).to_be_visible()
    browser.close()
print("all right")
