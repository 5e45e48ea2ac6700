"""What a generation looks like: its one line, its facts, its HTML."""

import base64
import sys
from typing import Any

import pytest

from safelatent import Client, GenerationRequest
from safelatent.client.rendering import facts


def test_a_notebook_shows_the_picture_beside_its_safety(url: str) -> None:
    with Client(url) as client:
        done = client.generate("<b>a cat</b>", seed=7, safety="strong")
        html = done._repr_html_()
        content = base64.b64encode(done.images[0].bytes()).decode()
    assert f"data:image/png;base64,{content}" in html
    assert "&lt;b&gt;a cat" in html and "<b>a cat" not in html
    for words in ("strong", "12.4%", "43 of 50 calls", "passed; nearest: nudity 0.12, limit 0.5"):
        assert words in html


def test_a_blocked_image_renders_as_what_it_is(either: Any, url: str) -> None:
    client = either(url)
    done = client.generate("an unsafe cat", n=2)
    assert "2 images, 1 blocked" in repr(done)
    html = done._repr_html_()
    assert html.count("<strong>Blocked") == 1
    assert "sd_checker flagged nudity: 0.91 &gt; 0.5" in html
    assert ("<img" in html) == (either.kind is Client)  # what must be awaited is said instead
    done.images[1].bytes()
    assert "<img" in done._repr_html_()


def test_after_its_client_was_closed_it_still_shows_its_safety(url: str) -> None:
    with Client(url) as client:
        done = client.generate("a cat")
    assert "Not loaded" in done._repr_html_() and "12.4%" in done._repr_html_()


def test_the_facts_say_why_safety_did_not_act(url: str) -> None:
    with Client(url) as client:
        done = client.generate(GenerationRequest(prompt="a cat"), safety="off")
    assert facts(done, done.images[0])["applied"] == "no: the level is off"


def test_pillow_is_asked_for_only_where_it_is_needed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(url) as client:
        [picture] = client.generate("a cat", seed=7).images
        assert picture.pil().getpixel((0, 0)) == (7, 90, 160)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match="pip install pillow"):
            picture.pil()
