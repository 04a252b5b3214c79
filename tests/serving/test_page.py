"""The page in a real browser, Debian's Chromium, controlled by Playwright."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="pip install '.[test]' brings Playwright"
)

from fastllm import SimpleCharacterTokenizer  # noqa: E402
from fastllm.generation.decoding import start_decoding  # noqa: E402
from tests.serving.conftest import (  # noqa: E402
    TEXT,
    Model,
    RunningServer,
    alone,
    make_model,
    running_server,
    slowed,
    wait_until,
)

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no browser: apt-get install --no-install-recommends chromium"
    ),
]

Open = Callable[..., Any]
# About thirty times the longest wait observed.
sync_api.expect.set_options(timeout=15_000)
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a server's page; the test fails if its script logs an error."""
    contexts, problems = [], []

    def note(message: Any) -> None:
        # The console also lists failed responses, which some tests cause on purpose.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            problems.append(message.text)

    def open_page(server: RunningServer, clock: bool = False, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        if clock:
            page.clock.install()
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def ask(page: Any, prompt: str, wait: bool = True, **settings: Any) -> None:
    page.fill("#prompt", prompt)
    page.evaluate("document.getElementById('sampling').open = true")
    for name, value in settings.items():
        page.fill(f"[name={name}]", str(value))
    page.press("#prompt", "Control+Enter")
    if wait:
        page.locator("#state button").wait_for()  # the seed, shown at the end


def answer_of(page: Any) -> str:
    return str(page.evaluate("answer.textContent"))


# The continuation


def test_text_streams_and_stays_text(open_page: Open) -> None:
    """Markup in the prompt or in the continuation is shown as text."""
    tokenizer = SimpleCharacterTokenizer(["<img src=x onerror=alert(1)>&\"'/1234567890_"])
    model = make_model(tokenizer), tokenizer
    with running_server(*model) as server:
        page = open_page(server)
        prompt = "<img src=x>"
        with slowed(server.scheduler, 0.01):
            ask(page, prompt, wait=False, temperature=1, seed=3, max_tokens=200)
            page.locator("#answer b").nth(20).wait_for()
            assert page.get_attribute("#answer", "aria-busy") == "true"
            so_far = answer_of(page)
            assert len(prompt) + 20 <= len(so_far) < 150
            expect(page.locator("#state")).to_contain_text("tokens")
            page.locator("#state button").wait_for()
        text = answer_of(page)
        assert text.startswith(so_far) and text == prompt + alone(model, prompt, 200, 3)
        assert page.get_attribute("#answer", "aria-busy") is None
        tags = page.evaluate("[...answer.querySelectorAll('*')].map(e => e.tagName).join('')")
        assert tags == "I" + "B" * 200
        assert page.inner_text("#state").startswith("200 tokens, ")
        for i in range(12):  # the likeliest first, even if there are digits among them
            page.hover(f"#answer b >> nth={i}")
            values = page.locator("#token li > span").all_inner_texts()
            shares = [float(value.strip("<%")) for value in values]
            assert len(shares) >= 5 and shares == sorted(shares, reverse=True)


def test_characters_of_several_tokens(open_page: Open, subwords: Model) -> None:
    texts = (alone(subwords, "世界🙂", 120, seed) for seed in range(100))
    known = {*map(chr, range(128)), *TEXT, "\ufffd"}  # other characters take several tokens
    seed, text = next((seed, text) for seed, text in enumerate(texts) if set(text) - known)
    with running_server(*subwords) as server:
        page = open_page(server)
        ask(page, "世界🙂", temperature=1, seed=seed, max_tokens=120)
        assert answer_of(page) == "世界🙂" + text
        parts = page.evaluate(
            "[...answer.querySelectorAll('b')]"
            ".map((e) => [e.textContent, scores.get(e).map((each) => each.token)])"
        )
        assert sum(len(tokens) for _, tokens in parts) <= 120
        assert any(len(tokens) > 1 for _, tokens in parts)
        for shown, tokens in parts:
            assert "\ufffd" in "".join(tokens) or [shown] == tokens
        several = next(i for i, (_, tokens) in enumerate(parts) if len(tokens) > 1)
        page.hover(f"#answer b >> nth={several}")
        expect(page.locator("#token ol")).to_have_count(len(parts[several][1]))


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_frees_the_slot(open_page: Open, server: RunningServer, by: str) -> None:
    page = open_page(server)
    with slowed(server.scheduler, 0.02):
        ask(page, "abc", wait=False, max_tokens=2000)
        page.locator("#answer b").nth(9).wait_for()
        assert server.scheduler.running == 1
        if by == "key":
            page.keyboard.press("Escape")
        else:
            page.click("#abort")
        wait_until(lambda: not server.scheduler.running, 15)  # all tokens would take 40 s
    expect(page.locator("#state")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#abort")).to_be_hidden()
    assert page.locator("#problem").is_hidden()
    text = answer_of(page)
    ask(page, "cba", max_tokens=7)
    assert len(answer_of(page)) == 10 < len(text)


def test_every_control_is_sent(open_page: Open, server: RunningServer, characters: Model) -> None:
    page = open_page(server)
    assert page.get_attribute("[name=max_tokens]", "max") == str(server.service.max_tokens)
    settings = {
        "temperature": 0.35, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
        "max_tokens": 40, "seed": 7,
    }  # fmt: skip
    with page.expect_request("**/v1/completions") as sent:
        ask(page, "abc", stop=r"\n\\", **settings)
    assert sent.value.post_data_json == {
        "prompt": "abc", "stream": True, "logprobs": 5, "stop": "\n\\", **settings,
    }  # fmt: skip
    sampling = {name: settings[name] for name in settings if name not in ("max_tokens", "seed")}
    assert answer_of(page) == "abc" + alone(characters, "abc", 40, 7, **sampling)
    for name in settings:
        page.fill(f"[name={name}]", "")
    with page.expect_request("**/v1/completions") as sent:
        ask(page, "abc", stop="", temperature=0)
    body = sent.value.post_data_json
    seed = body.pop("seed")
    assert body == {"prompt": "abc", "stream": True, "logprobs": 5, "temperature": 0}
    assert answer_of(page) == "abc" + alone(characters, "abc", 16, 0, temperature=0)
    page.click("#state button")
    assert page.input_value("[name=seed]") == str(seed)
    whole = alone(characters, "ab", 60, 5)
    ask(page, "ab", seed=5, temperature=1, max_tokens=60, stop=whole[20:22])
    assert answer_of(page) == "ab" + whole[: whole.index(whole[20:22])]
    expect(page.locator("#state")).to_contain_text("reached the stop text")


def test_two_thousand_tokens_are_only_appended(open_page: Open, characters: Model) -> None:
    with running_server(make_model(characters[1], 2100), characters[1]) as server:
        page = open_page(server)
        ask(page, "a", max_tokens=1)
        page.evaluate(
            """() => {
              window.seen = { added: 0, removed: 0, spoken: 0 };
              new MutationObserver((all) => all.forEach((each) => {
                seen.added += each.addedNodes.length;
                seen.removed += each.removedNodes.length;
              })).observe(answer, { childList: true, subtree: true, characterData: true });
              new MutationObserver((all) => seen.spoken += all.length)
                .observe(document.getElementById("spoken"), { childList: true });
            }"""
        )
        ask(page, "ab", max_tokens=2000, wait=False)
        page.locator("#answer b").nth(1999).wait_for(state="attached", timeout=60_000)
        expect(page.locator("#state")).to_contain_text("2,000 tokens")
        seen = page.evaluate("seen")
        # The prompt and each token once; the removed nodes are the previous continuation.
        assert (seen["added"], seen["removed"]) == (2001, 2)
        assert 3 <= seen["spoken"] < 20  # a screen reader gets sentences
        assert page.inner_text("#spoken").startswith("The model is writing.")
        assert "".join(page.inner_text("#spoken").split()).endswith("2000tokens.")
        assert (
            page.evaluate("document.getElementById('answer-end').getBoundingClientRect().bottom")
            < 800
        )


# Probabilities


def test_probabilities_by_pointer_and_by_keyboard(open_page: Open, server: RunningServer) -> None:
    page = open_page(server)
    body = {"prompt": "abc", "max_tokens": 150, "seed": 5, "logprobs": 5, "temperature": 1}
    choice = page.request.post(f"{server.url}/v1/completions", data=body).json()["choices"][0]
    ask(page, "abc", temperature=1, seed=5, max_tokens=150)
    assert answer_of(page) == "abc" + choice["text"]

    def shown(i: int) -> bool:
        """Checks the alternatives of token i, the likeliest first; returns whether they show."""
        top = sorted(choice["logprobs"]["top_logprobs"][i].items(), key=lambda each: -each[1])
        names = [{" ": "space"}.get(token, token) for token, _ in top]
        expect(page.locator("#token code")).to_have_text(names)
        values = page.locator("#token li > span").all_inner_texts()
        for value, (_, logprob) in zip(values, top, strict=True):
            assert value == "<0.1%" or abs(float(value[:-1]) - 100 * 2.718281828**logprob) < 0.06
        own = choice["logprobs"]["tokens"][i]
        expect(page.locator("#token .chosen code")).to_have_text({" ": "space"}.get(own, own))
        return bool(page.locator("#token").is_visible())

    token = page.locator("#answer b")
    for i in (4, 77):
        token.nth(i).hover()
        assert shown(i)
    page.mouse.move(5, 5)
    expect(page.locator("#token")).to_be_hidden()

    # By keyboard: Tab reaches the text, and arrow keys move within it.
    page.focus("#send")
    for _ in ("seed", "copy", "shade", "history", "token"):
        page.keyboard.press("Tab")
    assert shown(0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(2)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "token"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowLeft")
    assert shown(1)
    place = "document.activeElement.getBoundingClientRect()"
    before = page.evaluate(place)
    page.keyboard.press("ArrowDown")
    below = page.evaluate(place)
    assert below["top"] > before["top"] + 10 and abs(below["left"] - before["left"]) < 20
    page.keyboard.press("ArrowUp")
    assert abs(page.evaluate(place)["top"] - before["top"]) < 1
    page.keyboard.press("End")
    assert shown(149)
    page.keyboard.press("ArrowRight")  # there is no next token
    assert shown(149)
    page.keyboard.press("Escape")
    expect(page.locator("#token")).to_be_hidden()
    page.keyboard.press("Home")
    assert shown(0)
    page.focus("#shade")
    expect(page.locator("#token")).to_be_hidden()
    line = "getComputedStyle(answer.querySelector('.p3')).textDecorationLine"
    assert page.evaluate(line) == "underline"
    page.keyboard.press("Space")
    assert page.evaluate(line) == "none"


# Errors


@pytest.mark.parametrize(
    ("name", "value", "message", "remedy", "mended"),
    [
        ("prompt", "", "Type a beginning", "Start from “ab cd”", "ab cd"),
        ("prompt", "abZ", "cannot read Z: its training text", "Remove", "ab"),
        ("prompt", "A“b”\n…", "cannot read A, “, ”, line break, …: its", "Replace or remove", "ab"),
        ("prompt", "a" * 2**20, "The prompt is too long", "Keep the end", "a" * 300),
        ("max_tokens", "131073", "number from 0 to 131072.", "Set max tokens to 256", "256"),
        ("max_tokens", "2.5", "be a whole number from 0 to 131072.", "max tokens to 256", "256"),
        ("temperature", "-1", "Temperature must be a number of at least 0.", "to 0.8", "0.8"),
        ("top_p", "7", "Top p must be a number from 0 to 1.", "Clear top p", ""),
        ("top_p", "0", "Top p must be greater than 0", "Clear top p", ""),
        ("repetition_penalty", "0", "Repetition penalty must be greater", "Clear repetition", ""),
        ("top_k", "-3", "Top k must be a whole number of at least 0.", "Clear top k", ""),
        ("seed", "12345678901234567890", "Seed must be a whole number of at most 15", "Clear", ""),
    ],
)  # fmt: skip
def test_errors_say_why_and_where_and_a_button_mends_them(
    open_page: Open, server: RunningServer, name: str, value: str, message: str, remedy: str,
    mended: str,
) -> None:  # fmt: skip
    page = open_page(server)
    page.locator("#card dd").first.wait_for()
    problem = page.get_by_role("alert")
    ask(page, "ab", max_tokens=3, temperature=1, seed=1)
    earlier = answer_of(page)
    page.click("text=History")
    page.click("#history-list button")  # an earlier text is marked as well
    page.fill("[name=max_tokens]", "256")
    page.fill("[name=seed]", "")
    page.fill(f"[name={name}]", value)
    page.evaluate("document.getElementById('sampling').open = false")
    page.press("#prompt", "Control+Enter")
    expect(problem).to_contain_text(message)
    field = page.locator(f"[name={name}]")
    expect(field).to_be_visible()
    expect(field).to_have_attribute("aria-invalid", "true")
    assert field.get_attribute("aria-describedby") == "problem-text"
    assert answer_of(page) == earlier  # still there, and marked
    expect(page.locator("#stale")).to_be_visible()
    assert page.evaluate("getComputedStyle(answer).color") == page.evaluate(
        "getComputedStyle(document.getElementById('stale')).color"
    )
    assert page.inner_text("#state") == ""
    expect(page.locator("#mend")).to_contain_text(remedy)
    page.click("#mend")  # which sends the request again
    expect(page.locator("#state")).to_contain_text("tokens")
    assert page.input_value(f"[name={name}]") == mended
    assert field.get_attribute("aria-invalid") is None
    expect(page.locator("#stale")).to_be_hidden()
    assert answer_of(page) != earlier


def test_a_request_to_a_full_server_can_be_retried(open_page: Open, characters: Model) -> None:
    with running_server(*characters, slots=1, max_queue=0) as server:
        first, second = open_page(server), open_page(server)
        with slowed(server.scheduler, 0.02):
            ask(first, "a", wait=False, max_tokens=2000)
            first.locator("#answer b").first.wait_for()
            ask(second, "ab", wait=False, max_tokens=5)
            expect(second.get_by_role("alert")).to_contain_text("The server is busy")
            first.keyboard.press("Escape")
            wait_until(lambda: not server.scheduler.running)
        second.get_by_role("button", name="Try again").click()
        expect(second.locator("#state")).to_contain_text("5 tokens")
        expect(second.get_by_role("alert")).to_be_hidden()


def test_the_page_asks_for_the_key(open_page: Open, characters: Model) -> None:
    with running_server(*characters, api_key="secret") as server:
        page = open_page(server)
        field = page.get_by_label("This server requires an API key.")
        expect(field).to_be_focused()
        assert page.inner_text("#name") == "fastllm"
        ask(page, "ab", wait=False)
        expect(field).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        field = page.get_by_label("The server rejected this API key.")
        expect(field).to_be_focused()
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#name")).to_have_text("tiny")
        expect(page.locator("#key")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()
        ask(page, "ab", max_tokens=5)
        page.reload()
        expect(page.locator("#name")).to_have_text("tiny")
        kept = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.search]")
        assert "secret" not in kept[0] and kept[1:] == ["", ""]


def test_a_server_that_has_stopped(open_page: Open, characters: Model) -> None:
    with ExitStack() as stack:
        with running_server(*characters) as server:
            page = open_page(server, clock=True)
            expect(page.locator("#name")).to_have_text("tiny")
            stack.enter_context(slowed(server.scheduler, 0.05))
            ask(page, "ab", wait=False, max_tokens=2000)
            page.locator("#answer b").nth(5).wait_for()
        expect(page.get_by_role("alert")).to_contain_text("The server has stopped computing.")
        expect(page.locator("#state")).to_contain_text("interrupted")
    page.click("#mend")
    expect(page.get_by_role("alert")).to_contain_text("The server is not responding.")
    assert page.locator("#mend").is_visible() and page.locator("#send").is_visible()
    page.clock.fast_forward(4000)
    expect(page.locator("#offline")).to_contain_text("The server is not responding.")


# The model


def test_the_curve_follows_a_training(open_page: Open, characters: Model, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"

    def write(steps: range) -> None:
        with log.open("a") as file:
            for step in steps:
                val_loss = 3 - step / 100 if step % 10 == 0 else None
                line = {"step": step, "loss": 4 - step / 50, "val_loss": val_loss}
                file.write(json.dumps(line) + "\n")

    with running_server(*characters, run_dir=tmp_path) as server:
        page = open_page(server, clock=True)
        expect(page.locator("#name")).to_have_text("tiny")
        card = dict(
            zip(
                page.locator("#card dt").all_inner_texts(),
                page.locator("#card dd").all_inner_texts(),
                strict=True,
            )
        )
        assert card["Step"] == "7" and card["Context length"] == "300 tokens"
        parameters = sum(parameter.numel() for parameter in characters[0].parameters())
        expect(page.locator("#summary")).to_have_text(f"{parameters:,} parameters · step 7")
        page.click("text=All training settings")
        expect(page.locator("#settings")).to_contain_text("hidden_size")
        assert page.locator("#losses").is_hidden()

        write(range(1, 21))
        page.clock.fast_forward(5000)
        curve = page.locator("#curve")
        expect(curve).to_have_attribute("aria-valuenow", "20")
        assert page.inner_text("figcaption").split() == (
            "Loss at step 20 training 3.600 validation 2.800".split()
        )
        corners = "document.querySelector('#curve .{}').getAttribute('d').split('L').length"
        assert page.evaluate(corners.format("loss")) == 20
        assert page.evaluate(corners.format("val_loss")) == 2
        write(range(21, 51))
        page.clock.fast_forward(5000)
        expect(curve).to_have_attribute("aria-valuenow", "50")
        assert page.evaluate(corners.format("loss")) == 50
        expect(page.locator("#in-progress")).to_be_visible()
        expect(curve).to_contain_text("served: step 7")

        # Reading points by keyboard and by pointer.
        curve.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("PageDown")
        assert page.get_attribute("#curve", "aria-valuetext") == (
            "step 46: training loss 3.080, validation loss 2.600"
        )
        page.keyboard.press("Home")
        assert page.inner_text("#curve-step") == "Loss at step 1"
        curve.hover()
        assert 20 <= int(page.inner_text("#curve-step").split()[-1]) <= 30
        page.focus("#prompt")
        page.mouse.move(5, 5)
        assert page.inner_text("#curve-step") == "Loss at step 50"

        # A hidden page does not poll.
        polled: list[str] = []
        page.on("request", lambda request: polled.append(request.url))
        hide = """(hidden) => {
          Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
        page.evaluate(hide, True)
        write(range(51, 61))
        page.clock.fast_forward(100_000)
        page.clock.fast_forward(100_000)
        assert page.get_attribute("#curve", "aria-valuenow") == "50" and polled == []
        page.evaluate(hide, False)
        expect(curve).to_have_attribute("aria-valuenow", "60")
        assert [url.partition("?")[2] for url in polled] == ["after=50"]
        # The longer nothing changes, the less often it polls.
        for _ in range(10):
            page.clock.run_for(30_000)
            wait_until(lambda: not page.evaluate("polling"))
        assert len(polled) < 30
        expect(page.locator("#in-progress")).to_be_hidden()


def test_a_newer_checkpoint_shows_its_step(
    open_page: Open, characters: Model, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 2}\n{"step": 12, "loss": 1}\n')
    with running_server(*characters, run_dir=tmp_path) as server:
        page = open_page(server, clock=True)
        expect(page.locator("#summary")).to_contain_text("step 7")
        ask(page, "ab", max_tokens=3)
        expect(page.locator("#state")).to_contain_text("step 7")
        decoding = start_decoding(characters[0], server.service.slots)
        server.service.renew(server.served._replace(progress={"step": 9}), decoding)
        page.clock.fast_forward(5000)
        expect(page.locator("#summary")).to_contain_text("step 9")
        expect(page.locator("#curve")).to_contain_text("served: step 9")
        expect(page.get_by_role("status").first).to_have_text("The server has loaded step 9.")
        assert "step 7" in page.inner_text("#state")  # which wrote the text
        ask(page, "ab", max_tokens=4)
        expect(page.locator("#state")).to_contain_text("step 9")


# What to begin with, and what was written before


def test_examples_start_the_empty_page(
    open_page: Open, server: RunningServer, characters: Model
) -> None:
    page = open_page(server)
    example = page.get_by_role("button", name="ab cd", exact=True)
    expect(example).to_be_visible()
    example.focus()
    page.keyboard.press("Enter")
    page.locator("#state button").wait_for()
    assert page.input_value("#prompt") == "ab cd"
    seed = int(page.inner_text("#state button"))
    assert answer_of(page) == "ab cd" + alone(characters, "ab cd", 256, seed, temperature=0.8)
    expect(page.locator("#start")).to_be_hidden()
    expect(page.locator("#send")).to_be_focused()


def test_the_history_is_kept_recalled_and_cleared(open_page: Open, server: RunningServer) -> None:
    page = open_page(server)
    expect(page.locator("#history")).to_be_hidden()
    ask(page, "abc", max_tokens=20, top_k=4, stop="x")
    first, seed = answer_of(page), page.inner_text("#state button")
    ask(page, "cba", max_tokens=5, top_k="", stop="")
    page.reload()
    page.locator("#history summary").click()
    entries = page.locator("#history-list button")
    expect(entries).to_have_count(2)
    expect(entries.nth(1)).to_contain_text(first[:15])
    expect(entries.nth(1)).to_contain_text("tiny · step 7")
    entries.nth(1).click()
    assert answer_of(page) == first
    values = {"prompt": "abc", "max_tokens": "20", "top_k": "4", "stop": "x", "seed": seed}
    for name, value in values.items():
        assert page.input_value(f"[name={name}]") == value
    page.press("#prompt", "Control+Enter")  # the same text again, now with its tokens
    page.locator("#answer b").nth(19).wait_for()
    wait_until(lambda: page.evaluate("running === null"))
    assert answer_of(page) == first
    page.click("#clear-history")
    expect(page.locator("#history")).to_be_hidden()
    page.reload()
    expect(page.locator("#name")).to_have_text("tiny")
    expect(page.locator("#history")).to_be_hidden()
    assert first[:10] not in page.evaluate("JSON.stringify(localStorage)")


def test_without_storage_the_page_works(open_page: Open, server: RunningServer) -> None:
    page = open_page(server)
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('refused'); }; }")
    ask(page, "abc", max_tokens=20)
    assert len(answer_of(page)) == 23


@pytest.mark.parametrize("secure", [True, False])
def test_copying(open_page: Open, server: RunningServer, secure: bool) -> None:
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    if not secure:  # an address of another computer, without https
        page.evaluate("navigator.clipboard.writeText = undefined")
    ask(page, "abc", max_tokens=20)
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == answer_of(page)
    expect(page.locator("#copy")).to_have_text("Copy")


# Appearance and accessibility


def test_a_phone(open_page: Open, server: RunningServer) -> None:
    page = open_page(server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    width = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    expect(page.locator("#name")).to_have_text("tiny")
    assert page.evaluate(width) == 360
    expect(page.locator("summary").first).to_contain_text("temperature 0.8, max tokens 256")
    assert page.locator("[name=seed]").is_hidden()
    page.tap("summary")
    page.fill("[name=seed]", "3")
    ask(page, "a" * 120, max_tokens=170)
    assert page.evaluate(width) == 360
    page.evaluate(
        "[...answer.querySelectorAll('b')]"
        ".reduce((a, b) => a.getBoundingClientRect().left > b.getBoundingClientRect().left ? a : b)"
        ".id = 'rightmost'"
    )
    page.tap("#rightmost")
    box = page.locator("#token").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert page.evaluate(width) == 360
    page.click("text=All training settings")
    assert page.evaluate(width) == 360
    page.set_viewport_size({"width": 360, "height": 300})
    with slowed(server.scheduler, 0.02):
        ask(page, "ab" * 60, wait=False, max_tokens=2000)
        page.locator("#answer[aria-busy] b").nth(100).wait_for()
        assert (
            page.locator("#abort").bounding_box()["y"] >= 0
        )  # still in sight at the end of a long text
        page.tap("#abort")
    expect(page.locator("#state")).to_contain_text("stopped")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 740), (375, 320)])
def test_alternatives_never_cover_their_token(
    open_page: Open, server: RunningServer, width: int, height: int
) -> None:
    page = open_page(server, viewport={"width": width, "height": height})
    ask(page, "ab", max_tokens=250, temperature=1.2, seed=2)
    page.evaluate("document.getElementById('sampling').open = false")
    overlap = """(i) => {
      const token = answer.querySelectorAll("b")[i];
      token.focus();
      const box = document.getElementById("token").getBoundingClientRect();
      if (!box.height) return "hidden";
      if (box.left < 0 || box.right > innerWidth) return "outside";
      return [...token.getClientRects()].some((rect) =>
        rect.left < box.right && box.left < rect.right
          && rect.top < box.bottom && box.top < rect.bottom
      );
    }"""
    for i in range(0, 250, 3):
        assert page.evaluate(overlap, i) is False


def test_text_under_a_pointer_at_rest_opens_nothing(open_page: Open, server: RunningServer) -> None:
    page = open_page(server)
    ask(page, "ab", max_tokens=100)
    page.mouse.move(*middle_of(page, "#answer b >> nth=20"))
    expect(page.locator("#token")).to_be_visible()
    page.keyboard.press("Escape")
    ask(page, "ab", max_tokens=120)
    page.wait_for_timeout(300)  # longer than the browser takes to see what is under the pointer
    expect(page.locator("#token")).to_be_hidden()


def middle_of(page: Any, selector: str) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 740)])
def test_nothing_moves_while_text_streams(
    open_page: Open, server: RunningServer, width: int, height: int
) -> None:
    page = open_page(server, viewport={"width": width, "height": height})
    places = """() => {
      const shown = ["prompt", "state", "copy", "history", "answer"];
      return shown.map((id) => document.getElementById(id).getBoundingClientRect())
        .map(({ x, y }) => [x, y + scrollY]);
    }"""
    with slowed(server.scheduler, 0.02):
        ask(page, "abc", max_tokens=120, wait=False)
        page.locator("#answer[aria-busy] b").nth(2).wait_for()
        page.evaluate(
            """() => {
              window.shifts = [];
              new PerformanceObserver((list) => shifts.push(
                ...list.getEntries().flatMap((each) => each.sources)
                  // Not the cursor, which is no element, nor a word that no longer fits its line.
                  .filter(({ node }) => node && !answer.contains(node))
                  .map(({ node }) => node.id || node.nodeName)
              )).observe({ type: "layout-shift" });
            }"""
        )
        before = page.evaluate(places)
        page.locator("#answer b").nth(100).wait_for()
        assert page.evaluate(places) == before
        page.locator("#state button").wait_for()
    assert page.evaluate("shifts") == []


CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return channels(color)[3] === 0 ? behind(e.parentElement) : color;
  };
  const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const texts = [...document.querySelectorAll("body *:not(script):not(.visually-hidden)")]
    .filter((e) => e.checkVisibility() && hasText(e));
  const contrast = (e) => {
    const both = [luminance(getComputedStyle(e).color), luminance(behind(e))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  };
  return [luminance(behind(document.body)), texts.length, Math.min(...texts.map(contrast))];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_color_schemes_are_legible(
    open_page: Open, server: RunningServer, scheme: str
) -> None:
    page = open_page(server, color_scheme=scheme, reduced_motion="reduce")
    ask(page, "abc", temperature=1, max_tokens=60)
    page.hover("#answer b >> nth=3")
    brightness, texts, contrast = page.evaluate(CONTRASTS)
    assert brightness < 0.05 if scheme == "dark" else brightness > 0.8
    assert texts > 60 and contrast >= 4.5
    page.click("text=History")
    ask(page, "", wait=False)
    expect(page.locator("#stale")).to_be_visible()
    brightness, texts, contrast = page.evaluate(CONTRASTS)
    assert texts > 60 and contrast >= 4.5
    with slowed(server.scheduler, 0.02):
        ask(page, "abc", wait=False, max_tokens=2000)
        page.locator("#answer b").first.wait_for()
        assert page.evaluate("getComputedStyle(answer, '::after').animationName") == "none"
        page.keyboard.press("Escape")


def test_keyboard_only(open_page: Open, server: RunningServer) -> None:
    page = open_page(server)
    expect(page.locator("#name")).to_have_text("tiny")

    def tab(count: int) -> list[str]:
        stops = []
        for _ in range(count):
            page.keyboard.press("Tab")
            stops.append(
                page.evaluate(
                    "document.activeElement.name || document.activeElement.id || "
                    "document.activeElement.innerText.split(/[: ]/)[0]"
                )
            )
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        return stops

    # The prompt first; the settings are folded.
    assert tab(4) == ["prompt", "Settings", "send", "ab"]
    page.focus("#sampling summary")
    page.keyboard.press("Enter")
    assert tab(9) == [
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("max_tokens", "seed", "stop", "send"),
    ]
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length)"
    assert page.evaluate(f"{unnamed}.length") == 0
    page.fill("#prompt", "ab")
    page.fill("[name=max_tokens]", "2000")
    page.focus("#send")
    with slowed(server.scheduler, 0.02):
        page.keyboard.press("Enter")
        expect(page.locator("#abort")).to_be_focused()
        page.locator("#answer b").first.wait_for()
        page.keyboard.press("Space")
        expect(page.locator("#send")).to_be_focused()
    expect(page.locator("#state")).to_contain_text("stopped")


def test_the_page_runs_only_its_own_files(browser: Any, server: RunningServer) -> None:
    page = browser.new_page()
    page.goto(server.url)
    expect(page.locator("#name")).to_have_text("tiny")
    requests = page.evaluate("performance.getEntriesByType('resource').map((each) => each.name)")
    names = {name.removeprefix(server.url).partition("?")[0] for name in requests}
    own = {"/style.css", "/script.js", "/api/card"}
    assert own <= names <= own | {"/api/curve"}
    refused = page.evaluate(
        """async (url) => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            refused.push(event.effectiveDirective);
          });
          const add = (tag, values) => {
            document.body.append(Object.assign(document.createElement(tag), values));
          };
          add("img", { src: `${url}/health` });
          add("style", { textContent: "body { color: red }" });
          document.body.setAttribute("style", "color: red");
          add("iframe", { src: url });
          await fetch("http://127.0.0.1:1/").catch(() => 0);
          try { add("p", { innerHTML: "<b>" }); } catch (error) { refused.push(error.name); }
          await new Promise((resolve) => setTimeout(resolve, 200));
          return refused;
        }""",
        server.url,
    )
    directives = {"img-src", "style-src-elem", "style-src-attr", "frame-src", "connect-src"}
    assert directives | {"TypeError"} <= set(refused)
    page.close()
