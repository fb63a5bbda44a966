"""Who may ask the page's server for what: a token each, and only from the page itself."""

import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_align.errors import UserError

LARGEST_BODY = 64 * 1024  # bytes of what a page sends
_NAME = re.compile(r"[\w.@+-]{1,64}")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def annotators_of(path: Path) -> list[str]:
    """Who has a token in a file; nobody where there is none."""
    return list(_read(path))


def tokens_of(path: Path, annotators: Sequence[str]) -> dict[str, str]:
    """The token of each annotator, from a file that only its owner can read; made for those who have none.

    They stay the same when a server starts again, so that open pages go on.

    Raises:
        UserError: A name cannot stand in a file of judgements, or the file holds something else or cannot be written.
    """
    for name in annotators:
        if not _NAME.fullmatch(name):
            raise UserError(f"--annotators: {name!r} is no name: up to 64 letters, digits and . _ @ + -")
    if len(set(annotators)) < len(annotators):
        raise UserError(f"--annotators {' '.join(annotators)}: a name is given twice")
    try:
        known = _read(path)
        tokens = {name: known.get(name) or secrets.token_urlsafe(24) for name in annotators}
        if not tokens.items() <= known.items():
            descriptor = os.open(path.with_name(f".{path.name}.tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**known, **tokens}, file)
            os.replace(path.with_name(f".{path.name}.tmp"), path)
    except OSError as error:
        raise UserError(f"cannot keep the annotators' tokens in {path}: {error.strerror}") from error
    return tokens


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(known, dict) or not all(isinstance(token, str) for token in known.values()):
            raise ValueError
    except (ValueError, OSError) as error:
        raise UserError(f"{path} holds no tokens: remove it, and new ones are made") from error
    return known


class Gate:
    """Lets through what the page itself asks; everything else is answered with one line that says what is wrong.

    Args:
        app: What it guards.
        tokens: Token of each annotator. The name of the one who asks is put into ``scope["annotator"]``.
        hosts: Names under which the server may be asked, so that no other site can point its own name here (DNS
            rebinding); without a port.
    """

    def __init__(self, app: ASGIApp, tokens: Mapping[str, str], hosts: Sequence[str]) -> None:
        self.app = app
        self.tokens = dict(tokens)
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; only HTTP is answered."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        status, reason = self._refusal(scope)
        if reason:
            await JSONResponse({"error": reason}, status)(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _hostname(f"//{host}") not in self.hosts:
            return 400, "this server is not asked under that name: open the link that the terminal shows"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "another site may not ask this server"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "another site may not ask this server"
        if not scope["path"].startswith("/api/"):
            return 0, ""
        scope["annotator"] = self._annotator(headers.get("authorization", ""))
        if scope["annotator"] is None:
            return 401, "this link is not, or no longer, valid: open the one that the terminal shows"
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0] != "application/json":
            return 415, "send JSON"
        if scope["method"] == "POST" and not 0 <= _length(headers) <= LARGEST_BODY:
            return 413, f"send at most {LARGEST_BODY:,} bytes, and say how many"
        return 0, ""

    def _annotator(self, authorization: str) -> str | None:
        given = authorization.removeprefix("Bearer ").encode()
        found = None
        for name, token in self.tokens.items():  # all of them, whichever it is, so that the time tells nothing
            if hmac.compare_digest(token.encode(), given):
                found = name
        return found


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _length(headers: Headers) -> int:
    """Bytes of the body, or -1 where they are not told."""
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 12 else -1
