"""The page's server: hands out tasks, takes judgements, keeps nothing that is not in the store."""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lightning_align.data.records import STRENGTHS
from lightning_align.errors import UserError
from lightning_align.feedback.human.access import Gate
from lightning_align.feedback.human.render import code_css, messages, to_html
from lightning_align.feedback.human.store import Conflict, Store
from lightning_align.feedback.human.tasks import Item, Verdict

LONGEST_REASON = 500  # characters of a skip
LONGEST_KEY = 64
BACKLOG = 128  # connections that wait


class Page:
    """What the page asks for.

    Args:
        store: Of items and judgements.
        guidelines: Markdown, shown beside the answers.
    """

    def __init__(self, store: Store, guidelines: str) -> None:
        self.store = store
        self.guidelines = to_html(guidelines)

    def task(self, annotator: str) -> dict[str, Any]:
        """What ``annotator`` is to judge now (None if nothing is left), and how far the work is."""
        found = self.store.next_task(annotator)
        task = None if found is None else self._shown(*found, annotator)
        return {"annotator": annotator, "progress": self.store.progress(annotator), "task": task}

    def _shown(self, item: Item, aspect: str, annotator: str) -> dict[str, Any]:
        order = self.store.plan.shown(item.key, annotator, len(item.answers))
        return {
            **{"item": item.id, "aspect": aspect, "aspects": self.store.plan.aspects},
            "prompt": messages(item.prompt),
            "answers": [messages(item.answers[number]) for number in order],
            "strengths": STRENGTHS if len(item.answers) == 2 else [],
        }

    def judge(self, annotator: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Save what the page says; raises :class:`ValueError` with a line for the one who judges."""
        key, number, aspect = (said.get(name) for name in ("key", "item", "aspect"))
        if not isinstance(key, str) or not 8 <= len(key) <= LONGEST_KEY or type(number) is not int:
            raise ValueError("a judgement has a key and the number of an item")
        if not 0 < number < 2**63 or not self.store.is_handed_out(number, annotator):
            raise ValueError("this was not given to you to judge: reload the page")
        item = self.store.item(number)
        shown = self.store.plan.shown(item.key, annotator, len(item.answers))
        verdict = _verdict(said, shown)
        if (verdict.strength is None) == (sorted(verdict.ranks) == [1, 2]):
            raise ValueError("say how much better the better answer is")
        self.store.judge(key, item, annotator, str(aspect), verdict, seconds=_seconds(said), shown=shown)
        return self.task(annotator)

    def undo(self, annotator: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Take back the judgement that is ``last`` and show it again, as it was, in ``before``."""
        last = said.get("last")
        if type(last) is not int or not 0 < last < 2**63:
            raise ValueError("there is nothing to undo")
        undone = self.store.undo(annotator, last=last)
        if undone is None:
            raise ValueError("there is nothing to undo")
        verdict, place = undone.verdict, {number: index for index, number in enumerate(undone.shown)}
        before = {
            "ranks": [verdict.ranks[number] for number in undone.shown] if verdict.ranks else [],
            "unsafe": sorted(place[number] for number in verdict.unsafe),
            "strength": verdict.strength,
        }
        return {**self.task(annotator), "before": before}


def _verdict(said: Mapping[str, Any], shown: Sequence[int]) -> Verdict:
    """A verdict on answers as they were shown, in the numbers of the item's own."""
    ranks, unsafe = (said.get(name, []) for name in ("ranks", "unsafe"))
    strength, skipped = said.get("strength"), said.get("skipped")
    if not all(isinstance(part, list) and all(type(n) is int for n in part) for part in (ranks, unsafe)):
        raise ValueError("ranks and unsafe answers are lists of whole numbers")
    if not all(part is None or isinstance(part, str) for part in (strength, skipped)):
        raise ValueError("strength and reason are texts")
    if len(skipped or "") > LONGEST_REASON:
        raise ValueError(f"the reason is longer than {LONGEST_REASON} characters")
    verdict = Verdict(tuple(ranks), strength, tuple(unsafe), skipped)
    verdict.check(len(shown))
    own = dict(zip(shown, ranks, strict=False))  # no ranks of what is skipped
    return replace(
        verdict,
        ranks=tuple(own[number] for number in sorted(own)),
        unsafe=tuple(shown[index] for index in unsafe),
    )


def _seconds(said: Mapping[str, Any]) -> float:
    seconds = said.get("seconds")
    known = (
        isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds) and seconds >= 0
    )
    return float(seconds) if known else math.nan  # type: ignore[arg-type] # a number if known


def build_app(store: Store, tokens: Mapping[str, str], hosts: Sequence[str], guidelines: str) -> Starlette:
    """The page and what it asks for, behind a :class:`Gate`."""
    page = Page(store, guidelines)
    folder = files("lightning_align.feedback.human").joinpath("page")
    css = code_css()

    def index(_: Request) -> Response:
        return FileResponse(str(folder.joinpath("index.html")), media_type="text/html")

    def colours(_: Request) -> Response:
        return Response(css, media_type="text/css")

    def beginning(request: Request) -> Response:
        return _answered(lambda: {**page.task(request.scope["annotator"]), "guidelines": page.guidelines})

    async def said(request: Request, method: Any) -> Response:
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            return JSONResponse({"error": "this is no JSON"}, 400)
        if not isinstance(body, dict):
            return JSONResponse({"error": "send a mapping"}, 422)
        return await run_in_threadpool(_answered, method, request.scope["annotator"], body)

    async def judge(request: Request) -> Response:
        return await said(request, page.judge)

    async def undo(request: Request) -> Response:
        return await said(request, page.undo)

    routes = [
        Route("/", index),
        Route("/code.css", colours),
        Mount("/page", StaticFiles(directory=str(folder))),
        Route("/api/task", beginning),
        Route("/api/judge", judge, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Gate, tokens=tokens, hosts=hosts)])


def _answered(method: Any, *arguments: Any) -> JSONResponse:
    try:
        return JSONResponse(method(*arguments))
    except Conflict as error:
        return JSONResponse({"error": str(error)}, 409)
    except ValueError as error:
        return JSONResponse({"error": str(error)}, 422)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 503)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes a free one. Raises :class:`UserError` where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)  # whoever opens the link before the server is up waits instead of being turned away
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; give another --port, or 0 for a free one"
        ) from error
    return found


def serve(app: Starlette, where: socket.socket) -> None:
    """Answer until interrupted."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[where])
