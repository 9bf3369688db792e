"""The page of `ldm serve` in a real Chromium, before the real application: what a user does, and what is seen then."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.pipelines.browsing import Turnstile, Visit, ask, drawn, png_of

pytestmark = pytest.mark.slow

FEW_STEPS = "num_inference_steps=4"


def test_pictures_form_step_by_step(visit: Visit, turnstile: Turnstile, expect: Callable[..., Any]) -> None:
    page = visit.open()
    page.locator("#num-images").fill("2")
    page.locator("#draw").click()
    first = page.locator(".picture").first
    expect(first).to_be_disabled()  # nothing is there to be opened
    turnstile.let(6)
    expect(first).to_have_accessible_name("zero, seed 0, step 4")
    early = png_of(first.locator("img"))
    turnstile.let(20)
    expect(first).to_have_accessible_name("zero, seed 0, step 22")
    assert png_of(first.locator("img")) != early
    assert 0 < float(page.get_by_role("progressbar").get_attribute("value")) < 1
    assert "0 of 2 pictures" in page.locator(".state").inner_text()
    turnstile.open()
    pictures = drawn(page)
    expect(first).to_have_accessible_name("zero, seed 0")
    assert [png_of(image) for image in pictures.all()] == ask(visit.url, num_images=2)
    assert re.fullmatch(r"2 pictures in \d+\.\d\d s", page.locator(".state").inner_text())
    expect(page.locator("#announce")).to_contain_text("Done: 2 pictures in")
    first.click()  # and how it formed can be gone through again
    page.locator("#viewer-slider").press("Home")
    expect(page.locator("#viewer-step")).to_have_text("step 4")
    assert png_of(page.locator("#viewer-picture")) == early


def test_a_comparison_is_two_columns_of_the_same_seeds(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open()
    page.get_by_text("Compare", exact=True).click()
    page.locator("#num-images").fill("3")
    page.locator("#seeds").fill("7")
    page.locator("#a-num_inference_steps").fill("8")
    page.locator("#b-num_inference_steps").fill("3")
    page.locator("#b-guidance_scale").fill("2.5")
    page.locator("#draw").click()
    drawn(page, columns=2)
    left, right = page.locator(".column").all()
    assert left.bounding_box()["y"] == right.bounding_box()["y"]  # side by side
    assert left.bounding_box()["x"] < right.bounding_box()["x"]
    expect(left.get_by_role("heading")).to_contain_text("8 steps")
    expect(right.get_by_role("heading")).to_contain_text("3 steps · η 0 · guidance 2.5")
    captions = [column.locator(".what").all_inner_texts() for column in (left, right)]
    assert captions[0] == captions[1] == ["zero, seed 7", "one, seed 8", "two, seed 9"]
    for column, settings in ((left, {}), (right, {"guidance_scale": 2.5})):
        steps = 8 if column is left else 3
        expected = ask(visit.url, seed=7, num_images=3, num_inference_steps=steps, **settings)
        assert [png_of(image) for image in column.locator("img").all()] == expected
    left.locator(".picture").first.click()
    shown = png_of(page.locator("#viewer-picture"))
    page.get_by_role("button", name="Show B").click()
    assert png_of(page.locator("#viewer-picture")) != shown


def test_the_link_of_a_picture_draws_it_again_to_the_byte(visit: Visit) -> None:
    page = visit.open(f"#labels=3,5&seeds=11,4,90&{FEW_STEPS}&guidance_scale=1.7&eta=0.3&sampler=ddim")
    third = drawn(page).nth(2)
    link = page.locator(".tile .link").nth(2).get_attribute("href")
    again = drawn(visit.open(link))
    assert again.count() == 1
    assert png_of(again) == png_of(third)
    ours = drawn(visit.open(page.url.split("/")[-1]))  # and the page's own link all of them
    assert [png_of(image) for image in ours.all()] == [png_of(image) for image in drawn(page).all()]


def test_a_link_fills_the_form(visit: Visit, expect: Callable[..., Any]) -> None:
    settings = "sampler=ddim&num_inference_steps=6&eta=sigma_hat&guidance_scale=2&spacing=leading&clip_x0=3"
    page = visit.open(f"#mode=compare&model=numerals&labels=4&seeds=5&num_images=2&{settings}&b.sampler=dpmpp_2m")
    drawn(page, columns=2)
    assert page.locator("#seeds").input_value() == "5"
    assert page.get_by_role("checkbox", name="four").is_checked()
    assert page.get_by_label("Larger variance").first.is_checked()
    assert page.locator("#a-clip_x0").input_value() == "3"
    assert page.locator("#b-sampler").input_value() == "dpmpp_2m"
    for text in settings.split("&"):
        assert text in page.url  # the page's own link says them too
    page.get_by_text("Pictures", exact=True).first.click()
    page.locator("#draw").click()
    drawn(page)
    page.go_back()  # to the comparison
    drawn(page, columns=2)


def test_interpolation_goes_from_one_seed_to_another(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open()
    page.get_by_text("Interpolate", exact=True).click()
    page.get_by_text("two", exact=True).click()
    page.get_by_label("From seed").fill("3")
    page.get_by_label("To seed").fill("8")
    page.get_by_label("Frames").fill("5")
    page.locator("#a-num_inference_steps").fill("4")
    page.locator("#draw").click()
    frames = [png_of(image) for image in drawn(page).all()]
    assert frames == ask(visit.url, labels=[2], seed=3, seed_to=8, num_images=5, num_inference_steps=4)
    assert len(set(frames)) == 5
    slider = page.get_by_label("Between the seeds")
    for frame in frames[1:]:
        slider.press("ArrowRight")
        assert png_of(page.locator("#film-picture")) == frame
    again = visit.open(
        page.locator(".tile .link").nth(2).get_attribute("href")
    )  # of one frame: it stands at that frame
    drawn(again)
    expect(again.locator("#film-at")).to_have_text("50 % of the way")
    assert png_of(again.locator("#film-picture")) == frames[2]


def test_cancel_a_new_drawing_and_leaving_end_the_request(
    visit: Visit, turnstile: Turnstile, expect: Callable[..., Any]
) -> None:
    page = visit.open()
    draw, cancel = page.locator("#draw"), page.locator("#cancel")
    expect(cancel).to_be_disabled()
    for _ in range(2):  # the second one takes the place of the first
        with page.expect_request("**/events"):
            draw.click()
    first, second = visit.ids()
    with page.expect_response(lambda response: response.request.method == "DELETE") as answer:
        cancel.click()
    assert answer.value.json() | {"status": "cancelled"} == answer.value.json()
    assert [visit.status(first), visit.status(second)] == ["cancelled", "cancelled"]
    expect(page.locator(".state")).to_have_text("Cancelled")
    expect(draw).to_be_focused()  # not lost with the button that cannot be pressed any more
    with page.expect_request("**/events"):
        draw.press("Enter")
    page.goto("about:blank")
    third = visit.ids()[2]
    for _ in range(300):
        if visit.status(third) == "cancelled":
            break
        page.wait_for_timeout(100)
    assert visit.status(third) == "cancelled"
    turnstile.open()
    page = visit.open(f"#{FEW_STEPS}&num_images=1")
    assert png_of(drawn(page)) == ask(visit.url, num_inference_steps=4)[0]


def test_the_steps_slider_draws_and_shows_the_time_taken(visit: Visit, expect: Callable[..., Any]) -> None:
    page = visit.open("#num_inference_steps=6&num_images=1")
    drawn(page)
    slider = page.get_by_label("Steps, slider").first
    slider.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "5 steps")
    rows = page.get_by_role("list", name="Time taken").get_by_role("listitem")
    expect(rows).to_have_count(2)
    assert [re.sub(r"\d+\.\d\d s", "TIME", " ".join(row.split())) for row in rows.all_inner_texts()] == [
        "5 steps TIME",
        "6 steps TIME",
    ]
    assert png_of(drawn(page)) == ask(visit.url, num_inference_steps=5)[0]
    assert "num_inference_steps=5" in page.url
