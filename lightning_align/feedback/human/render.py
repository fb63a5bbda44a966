"""Answers as HTML that can do nothing: they are written by models, and nobody has read them before."""

from functools import lru_cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from lightning_align.data.templates import Completion, Prompt

LONGEST_MARKDOWN = (
    20_000  # characters; longer texts are shown as they are, because reading Markdown takes longer with each
)
_LIGHT, _DARK = "default", "github-dark"


def messages(text: Prompt | Completion) -> list[dict[str, str]]:
    """Whose turn, HTML and source of each message; a plain text is one message of nobody's."""
    if isinstance(text, str):
        return [{"role": "", "html": to_html(text), "text": text}]
    return [_message(message) for message in text]


def _message(message: dict[str, Any]) -> dict[str, str]:
    content = str(message["content"])
    if message.get("tool_calls"):
        content = f"{content}\n{message['tool_calls']}".strip()
    return {"role": str(message["role"]), "html": to_html(content), "text": content}


@lru_cache(maxsize=4096)
def to_html(text: str) -> str:
    """Markdown with its code coloured. Tags stand as text, images as links, and a link leads to the web or nowhere."""
    if len(text) > LONGEST_MARKDOWN:
        return f"<pre>{escape(text)}</pre>"
    return str(_MARKDOWN.render(text))


def code_css() -> str:
    """Colours of code, light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs("code") for style in (_LIGHT, _DARK))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _coloured(code: str, language: str, _attributes: str) -> str:
    """The inside of a block of code; empty, which leaves it plain, where the language is unknown."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


def _reader() -> MarkdownIt:
    reader = MarkdownIt("js-default", {"html": False, "breaks": True, "highlight": _coloured})
    reader.disable("image")  # an image is a request to whoever the model names
    reader.disable("escape")  # else backslashes of formulas were gone

    def link_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        tokens[index].attrSet("target", "_blank")
        tokens[index].attrSet("rel", "noopener noreferrer nofollow")
        return str(self.renderToken(tokens, index, options, env))

    def cell_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        style = tokens[index].attrs.pop("style", "")  # the page's policy allows no styles in HTML
        if style:
            tokens[index].attrSet("class", str(style).removeprefix("text-align:"))
        return str(self.renderToken(tokens, index, options, env))

    reader.add_render_rule("link_open", link_open)
    for name in ("th_open", "td_open"):
        reader.add_render_rule(name, cell_open)
    return reader


_MARKDOWN = _reader()
