"""The frame of every page of the lab: one file, no request, light and dark, readable on a phone."""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib.resources import files

from lightning_align import __version__


def page(title: str, sections: Iterable[str], *, script: str = "", footer: str = "") -> str:
    """A whole page.

    Args:
        title: Of the window.
        sections: HTML; whoever made them has escaped what is not theirs. Empty ones are left out.
        script: JavaScript that may run; no other can, whatever a sampled text holds.
        footer: Text under it.
    """
    css = files("lightning_align.lab").joinpath("report.css").read_text(encoding="utf-8")
    allowed = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed = f"; script-src 'sha256-{digest}'"
        script = f"<script>{script}</script>\n"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:{allowed}"
    body = "\n".join(section for section in sections if section)
    end = f"{footer} Written by lightning_align {__version__}.".strip()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>{escape(end)}</footer>\n{script}</body>\n</html>\n"
    )


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], *, words: int = 1, name: str = "") -> str:
    """A table that scrolls by itself on a narrow screen; cells are HTML, the first ``words`` columns are text."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=word' if index < words else ''}>{cell}</{tag}>" for index, cell in enumerate(cells)
        )

    own = f' id="{name}"' if name else ""
    top = f"<caption>{escape(caption)}</caption><thead><tr>{line(head, 'th')}</tr></thead>"
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table{own}>{top}<tbody>{body}</tbody></table></div>'
