"""The page's source; tests/ecosystem has it in a browser."""

import re
from importlib import resources


def test_the_page_needs_nothing_from_elsewhere_and_no_text_becomes_html(client):
    html = resources.files("dph.serve").joinpath("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|<link|<img|<iframe|\ssrc=|\son\w+=", html)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|\.style\b|style=", html
    )
    response = client.get("/")
    assert response.text == html
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in re.findall(r"<(?:input|select|textarea)[^>]*", html):
        assert re.search(rf"<label>[^<]*{re.escape(name)}", html), f"{name} has no label"
