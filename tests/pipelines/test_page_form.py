"""The form of the page: what it shows of a model, what it says of a mistake, and that a keyboard is enough."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.serve.local import local_app
from pipelines.serve.replica import Replica
from tests.pipelines.browsing import Turnstile, Visit, ask, drawn, name_of_focused, png_of, serving

pytestmark = pytest.mark.slow

# A radio button that is drawn as a part of a bar shows its focus on its text.
SHOWS_FOCUS = "e => [e, e.nextElementSibling].some(x => x && getComputedStyle(x).outlineStyle !== 'none')"
QUICK = "#num_inference_steps=4&num_images=1"


def test_a_keyboard_is_enough(visit: Visit, turnstile: Turnstile, expect: Callable[..., Any]) -> None:
    page = visit.open()
    press = page.keyboard.press
    press("Tab")
    assert name_of_focused(page) == "To the pictures"
    names = []
    while not names or names[-1] != "Draw":
        press("Tab")
        names.append(name_of_focused(page))
        assert page.locator("*:focus").evaluate(SHOWS_FOCUS), names[-1]
    in_order = ["Pictures", "Model", "zero", "Seed", "Another seed", "Pictures", "Steps", "Guidance", "Draw"]
    position = -1
    for name in in_order:  # as they stand on the page
        position = names.index(name, position + 1)

    page.locator("[name=mode]:checked").focus()
    press("ArrowRight")
    assert page.locator("[name=mode]:checked").get_attribute("value") == "compare"
    press("ArrowLeft")
    while name_of_focused(page) != "three":
        press("Tab")
    press("Space")
    press("Enter")  # from wherever one is
    expect(page.locator(".picture").first).to_have_accessible_name("three, seed 0, not drawn yet")
    expect(page.locator("#cancel")).to_be_enabled()
    press("Escape")
    expect(page.locator(".state")).to_have_text("Cancelled")
    expect(page.locator("#announce")).to_have_text("Cancelled")
    assert visit.status(visit.ids()[0]) == "cancelled"

    turnstile.open()
    press("Enter")
    drawn(page)
    while name_of_focused(page) != "three, seed 1":
        press("Tab")
    press("Enter")
    expect(page.locator("#viewer-title")).to_have_text("three, seed 1")
    press("ArrowRight")
    expect(page.locator("#viewer-title")).to_have_text("three, seed 2")
    press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("*:focus")).to_have_accessible_name("three, seed 2")  # set a moment after the dialog closes
    press("Tab")
    assert name_of_focused(page) == "Link to three, seed 2"
    press("Enter")  # the link draws that one picture, here
    expect(page.locator(".picture")).to_have_count(1)
    assert png_of(drawn(page)) == ask(visit.url, labels=[3], seed=2)[0]


def test_a_wrong_value_is_one_line_at_the_form(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open(QUICK)
    before = png_of(drawn(page))
    steps, error = page.locator("#a-num_inference_steps"), page.locator("#error")
    steps.fill("5000")
    steps.press("Enter")
    expect(error).to_have_text("num_inference_steps=5000: the most here is 1000")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_be_focused()
    expect(steps).to_have_accessible_description("num_inference_steps=5000: the most here is 1000")
    expect(page.get_by_role("alert").filter(has_text="5000")).to_be_visible()
    assert png_of(page.locator(".picture img")) == before  # what was drawn is still there
    sent = len(visit.sent("POST", "/v1/samples"))
    steps.fill("4")
    page.locator("#seeds").fill("1, x")
    page.locator("#draw").click()
    expect(error).to_have_text("seeds=x: give a whole number")
    page.locator("#seeds").fill("2")
    steps.fill("")
    page.locator("#draw").click()
    expect(error).to_have_text("num_inference_steps: give a number")
    assert len(visit.sent("POST", "/v1/samples")) == sent  # the page itself said those two
    steps.fill("4")
    page.locator("#draw").click()
    expect(error).to_be_hidden()
    assert png_of(drawn(page)) == ask(visit.url, seed=2, num_inference_steps=4)[0]


@pytest.mark.parametrize(
    ("link", "line"),
    [
        ("#model=nobody", "model=nobody: is not served here"),
        ("#colour=red", "colour=red: this link has an unknown setting"),
        ("#b.seeds=3", "b.seeds=3: this link has an unknown setting"),
        ("#num_inference_steps=ten", "num_inference_steps=ten: give a whole number"),
        ("#eta=2", "eta=2: must be from 0 (deterministic) to 1 (ancestral), or sigma_hat"),
        ("#mode=sing", "mode=sing: give draw, compare or interpolate"),
        ("#eta=0.5&sampler=dpmpp_2m", "eta=0.5: is not for this model and sampler"),
        ("#sampler=heun", "sampler=heun: is not for this model and sampler"),
        ("#spacing=cosy", "spacing=cosy: is not for this model and sampler"),
        ("#labels=17", "labels=17: is no class of this model"),
    ],
)
def test_a_wrong_link_says_why(visit: Visit, expect: Callable[..., Any], link: str, line: str) -> None:
    page = visit.open(link)
    expect(page.locator("#error")).to_contain_text(line)


def test_a_link_of_other_weights_is_noted(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open(f"{QUICK}&weights=000000000000")
    drawn(page)
    expect(page.locator("#note")).to_contain_text("other weights")
    again = visit.open("#" + page.url.split("#")[1])
    drawn(again)
    expect(again.locator("#note")).to_be_hidden()


def test_only_what_the_model_understands_is_shown(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open("#model=blank")
    drawn(page)
    for hidden in ("#classes", "#prompt-field", "#a-guidance_scale"):
        expect(page.locator(hidden)).to_be_hidden()
    panel = page.locator(".panel").first
    panel.get_by_text("More settings").click()

    def shown() -> set[str]:
        fields = panel.locator("[data-of]:visible").all()
        return {str(field.get_attribute("data-of")) for field in fields}

    common = {"sampler", "num_inference_steps", "clip_x0"}
    diffusion = common | {"spacing", "steps_offset", "final_alpha_cumprod"}
    assert shown() == diffusion | {"eta", "sigma_hat", "profile"}
    panel.get_by_label("Sampler").select_option("dpmpp_2m")
    assert shown() == diffusion
    panel.get_by_label("Sampler").select_option("ddpm")
    assert shown() == diffusion | {"sigma_hat"}
    page.get_by_label("Model").select_option("flow")
    expect(page.get_by_role("checkbox", name="zero")).to_be_visible()
    assert panel.get_by_label("Sampler").locator("option").all_inner_texts() == ["Euler", "Heun"]
    assert shown() == common | {"guidance_scale"}
    panel.get_by_label("Guidance", exact=True).fill("2")
    panel.get_by_label("Guidance", exact=True).press("Tab")
    assert shown() == common | {"guidance_scale", "guidance_interval", "guidance_rescale"}
    panel.get_by_label("Sampler").select_option("heun")
    page.locator("#a-num_inference_steps").fill("4")
    page.locator("#num-images").fill("3")
    page.locator("#draw").click()
    settings = {"model": "flow", "sampler": "heun", "guidance_scale": 2, "num_inference_steps": 4, "num_images": 3}
    assert [png_of(image) for image in drawn(page).all()] == ask(visit.url, **settings)


def test_many_classes_are_a_list_with_a_filter(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open(f"{QUICK}&model=animals")
    drawn(page)
    box = page.get_by_role("combobox", name="Filter the classes")
    options = page.get_by_role("option").filter(visible=True)
    box.fill("GREY")
    expect(page.locator("[role=option]")).to_have_count(15)
    box.fill("grey o")
    expect(page.locator("[role=option]")).to_have_count(3)
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        box.press(key)
    expect(page.locator("[role=option][aria-selected=true]")).to_have_text(["grey owl 219"])
    expect(box).to_be_focused()
    box.fill("44")
    expect(page.locator("[role=option]")).to_have_text(["tiny tern 344"])
    options.last.click()
    page.locator("#num-images").fill("2")
    page.locator("#num-images").press("Enter")
    expect(page.locator(".what")).to_have_text(["grey owl 2, seed 0", "tiny tern 3, seed 1"])
    drawn(page)
    assert "labels=19,44" in page.url
    page.get_by_role("button", name="Remove grey owl 2").click()
    box.press("Enter")
    expect(page.locator(".what").first).to_have_text("tiny tern 3, seed 0")


def test_a_full_queue_and_a_server_that_is_gone_are_said(
    visit: Visit, turnstile: Turnstile, expect: Callable[..., Any]
) -> None:
    waiting = [visit.open(f"{QUICK}&seeds={seed}") for seed in (1, 2)]
    for page in waiting:
        expect(page.locator(".column")).to_be_visible()  # it was taken
    third = visit.open(f"{QUICK}&seeds=3")
    expect(third.locator("#error")).to_contain_text(re.compile(r"try again in \d+ s"))
    expect(third.locator("#cancel")).to_be_disabled()
    turnstile.open()
    for page in waiting:
        drawn(page)
    third.route("**/v1/samples", lambda route: route.abort())
    third.locator("#draw").click()
    expect(third.locator("#error")).to_have_text("The server does not answer; is it still running?")
    assert all("ERR_FAILED" in complaint for complaint in visit.complaints)  # of the browser itself
    visit.complaints.clear()
    third.unroute("**/v1/samples")
    third.locator("#draw").click()
    drawn(third)


def test_a_stream_that_breaks_is_followed_again(visit: Visit, expect: Callable[..., Any]) -> None:
    page, broken = visit.open(), []

    def break_twice(route: Any) -> None:
        if len(broken) < 2:
            broken.append(route)
            route.fulfill(status=200, content_type="text/event-stream", body="event: progress\r\nda")
        else:
            route.continue_()

    page.route("**/events", break_twice)
    page.locator("#num-images").fill("1")
    page.locator("#draw").click()
    assert png_of(drawn(page)) == ask(visit.url)[0]
    assert len(broken) == 2


def test_a_token_is_asked_for_kept_and_sent(browser: Any, page_replica: Replica, expect: Callable[..., Any]) -> None:
    token = "a-token-of-the-server"
    digest = hashlib.sha256(token.encode()).hexdigest()
    with serving(local_app(page_replica, token_sha256=digest)) as url:
        visit = Visit(browser.new_context(), url)
        page = visit.open(QUICK)
        box = page.get_by_label("This server asks for a token")
        expect(box).to_be_focused()
        expect(page.locator("#main")).to_be_hidden()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="does not take this token")).to_be_visible()
        box.fill(token)
        box.press("Enter")
        drawn(page)  # the link was not forgotten
        expect(page.locator("#door")).to_be_hidden()
        events = visit.sent("GET", "/v1/samples/.*/events")
        assert [request.headers["authorization"] for request in events] == [f"Bearer {token}"]
        page.reload()
        drawn(page)
        expect(page.locator("#door")).to_be_hidden()
        other = visit.open()  # another tab has a session of its own
        expect(other.locator("#door")).to_be_visible()
        assert token not in "".join(request.url for request in visit.requests)
        assert visit.complaints == []
        visit.context.close()
