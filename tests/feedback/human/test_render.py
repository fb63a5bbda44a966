"""Answers are texts of models: what they write is shown, and does nothing."""

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.feedback.human.render import LONGEST_MARKDOWN, code_css, messages, to_html

TEXT = ("p", "br", "em", "strong", "s", "code", "pre", "span", "ul", "ol", "li", "blockquote", "hr", "a")
TABLES = ("table", "thead", "tbody", "tr", "th", "td")
HARMLESS = {*TEXT, *TABLES, *(f"h{level}" for level in range(1, 7))}
ATTRIBUTES = {"a": {"href", "title", "target", "rel"}, "code": {"class"}, "span": {"class"}, "ol": {"start"}}
ATTRIBUTES |= {"td": {"class"}, "th": {"class"}}


class Tags(HTMLParser):
    """Fails at anything but harmless tags with harmless attributes."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in HARMLESS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES.get(tag, set()), (tag, name)
            if name == "href":
                assert not re.match(r"\s*(javascript|vbscript|data|file):", value or "", re.I)
            if name == "class" and tag in ("td", "th"):
                assert value in ("left", "right", "center")


def check(html: str) -> None:
    Tags(convert_charrefs=True).feed(html)


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://127.0.0.1/track.png)",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "<javascript:alert(1)>",
    '[a](http://x "onmouseover=alert(1)")',
    '[a](http://x/"onclick="alert(1))',
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "```python\n</code></pre><script>alert(1)</script>\n```",
    "| <script> | b |\n|---|---|\n| <img onerror=x> | [x](javascript:1) |",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>*{display:none}</style><svg onload=alert(1)>",
    "<a href='http://x' onclick='alert(1)'>x</a>",
    "\x00<script>alert(1)</script>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_shown_as_text(attack: str) -> None:
    check(to_html(attack))
    check(to_html(f"- > {attack}\n\n**{attack}**"))
    check(to_html(attack * (LONGEST_MARKDOWN // len(attack) + 1)))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>&\"'`[]()!*_-|#:\\/ \nabjs=", max_size=80))
def test_no_text_becomes_a_tag_that_does_something(text: str) -> None:
    check(to_html(text))


def test_markdown_is_read_and_its_code_coloured() -> None:
    html = to_html("# T\n\nsome **bold** `code`\n\n```python\nfor n in x: pass\n```\n\n| a |\n|---|\n| 1 |\n\none\ntwo")
    for part in (
        "<h1>T</h1>",
        "<strong>bold</strong>",
        "<code>code</code>",
        '<span class="k">for</span>',
        "<td>1</td>",
    ):
        assert part in html
    assert "one<br" in html
    assert "<span" not in to_html("```nosuchlanguage\nfor\n```")
    assert r"\(x^2\) \{a\} a\\b" in to_html(r"so \(x^2\) \{a\} a\\b")  # formulas stand as they were written
    assert '<td class="right">1</td>' in to_html("| a |\n|--:|\n| 1 |")
    assert ".k " in code_css()
    assert "prefers-color-scheme: dark" in code_css()


def test_links_open_elsewhere_and_tell_nothing() -> None:
    assert '<a href="https://a.b/c" target="_blank" rel="noopener noreferrer nofollow">' in to_html(
        "[x](https://a.b/c)"
    )


def test_long_texts_are_shown_whole_as_they_are_and_at_once() -> None:
    text = "[" * 1_000_000 + "<b>"
    started = time.perf_counter()
    html = to_html(text)
    assert time.perf_counter() - started < 1
    assert html == f"<pre>{'[' * 1_000_000}&lt;b&gt;</pre>"


def test_messages_keep_their_roles_and_tool_calls() -> None:
    assert messages("**a**") == [{"role": "", "html": "<p><strong>a</strong></p>\n", "text": "**a**"}]
    calls = [{"function": {"name": "look<up>"}}]
    shown = messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}])
    assert [message["role"] for message in shown] == ["user", "assistant"]
    assert "look&lt;up&gt;" in shown[1]["html"]
