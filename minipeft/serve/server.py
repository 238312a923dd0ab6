"""The HTTP side of the server: OpenAI's /v1/models and /v1/completions, where `model` names an adapter or the base.

    python -m minipeft.serve FOLDER --model pocket
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="pirate", prompt="Anna went to the", max_tokens=20)

`order.py` reads a request, `engine.py` writes its tokens, and this file turns them into text as they come.
Whatever is wrong with a request is answered with a 4xx and OpenAI's {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minipeft.serve.engine import Engine, Full, Request
from minipeft.serve.order import Limits, Order, Refused, parse


# ---------------------------------------------------------------------------------------------------------------------
# Writing text
# ---------------------------------------------------------------------------------------------------------------------
class Text:
    """Tokens become text: `add` gives what can be shown after one more, `end` the rest. `why` says if a stop ends it.

    A token's text may depend on the one before (a space in front), so a few tokens of the prompt are decoded along.
    Half of a character, and what may be the beginning of a stop, waits.
    """

    def __init__(self, tokenizer, prompt: tuple[int, ...], stops: tuple[str, ...]):
        self.tokenizer, self.stops, self.why = tokenizer, stops, None
        self.before, self.tokens, self.shown, self.text = list(prompt[-8:]), [], 0, ""
        self.skip = len(self.decode(self.before))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        self.tokens.append(token)
        self.text = self.decode(self.before + self.tokens)[self.skip :]
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.why = self.text[: min(found)], "stop"
            return self.end()
        hidden = max((n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        whole = self.text[: len(self.text) - hidden]
        return self._show(len(whole.rstrip("�")))

    def end(self) -> str:
        return self._show(len(self.text))

    def _show(self, until: int) -> str:
        new = self.text[self.shown : until]
        self.shown = max(self.shown, until)
        return new


class Service:
    """What the routes share: the engine, the tokenizer, the folder of adapters, the limits and the counters."""

    def __init__(self, engine: Engine, tokenizer, folder=None, base: str = "base", limits: Limits | None = None):
        self.engine, self.tokenizer, self.folder, self.base = engine, tokenizer, folder, base
        self.limits, self.created = limits or Limits(), int(time.time())
        self.registry = registry = prometheus.CollectorRegistry()
        self.answered = prometheus.Counter(
            "minipeft_requests", "Requests for a completion, by HTTP status", ["status"], registry=registry
        )
        self.tokens = prometheus.Counter("minipeft_tokens", "Tokens read and written", ["kind"], registry=registry)
        self.first = prometheus.Histogram(
            "minipeft_first_token_seconds", "From a request to its first token", registry=registry
        )
        self.whole = prometheus.Histogram(
            "minipeft_answer_seconds", "From a request to the end of its answer", registry=registry
        )
        for name, what, look in (
            ("running", "Texts in the batch", lambda: len(engine.rows)),
            ("waiting", "Texts that wait for a row", engine.waiting),
            ("adapters", "Adapters that are served", lambda: len(engine.adapters)),
            ("swaps", "Adapters loaded so far", lambda: engine.swaps),
        ):
            prometheus.Gauge(f"minipeft_{name}", what, registry=registry).set_function(look)

    # -- routes -------------------------------------------------------------------------------------------------------
    async def health(self, call: Call) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, call: Call) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    def card(self, name: str) -> dict:
        parent = None if name == self.base else self.base
        return {"id": name, "object": "model", "created": self.created, "owned_by": "minipeft", "parent": parent}

    async def models(self, call: Call) -> Response:
        names = [self.base, *sorted(self.engine.adapters)]
        return JSONResponse({"object": "list", "data": [self.card(name) for name in names]})

    async def model(self, call: Call) -> Response:
        self.known(name := call.path_params["name"])
        return JSONResponse(self.card(name))

    def known(self, name: str) -> None:
        if name != self.base and name not in self.engine.adapters:
            why = self.folder.refused.get(name) if self.folder else None
            message = f"The model {name[:100]!r} is not served" + (f": {why}" if why else "; see /v1/models.")
            raise Refused(404, message, "model", "model_not_found")

    async def complete(self, call: Call) -> Response:
        started = time.perf_counter()
        try:
            order = parse(await self.body(call), self.tokenizer, self.limits)
            self.known(order.model)
            answer = Answer(self, order, started)
            if order.stream:
                return StreamingResponse(answer.stream(), media_type="text/event-stream")
            response = JSONResponse(await answer.whole(call))
            self.answered.labels("200").inc()
            return response
        except Refused as error:
            self.answered.labels(str(error.status)).inc()
            raise

    async def body(self, call: Call) -> bytes:
        """At most `limits.body` bytes, within `limits.seconds`."""
        most, data, kind = self.limits.body, bytearray(), call.headers.get("content-type", "")
        if kind.partition(";")[0].strip() != "application/json":  # a page of another site can send any other kind
            raise Refused(415, "The body must be sent as Content-Type: application/json.")
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in call.stream():
                    data += part
                    if len(data) > most:
                        raise Refused(413, f"The body has more than {most:,} bytes.", code="body_too_large")
        except TimeoutError as error:
            raise Refused(408, f"The body was not here after {self.limits.seconds:g} s.", code="timeout") from error
        return bytes(data)


class Answer:
    """The answer to one order: its texts, as the engine's tokens come in."""

    def __init__(self, service: Service, order: Order, started: float):
        self.service, self.order, self.started = service, order, started
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.texts = [Text(service.tokenizer, prompt, order.stops) for prompt in order.prompts]
        self.left = time.monotonic() + service.limits.seconds
        self.events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def to(row: int):
            def put(event) -> None:  # in the engine's thread
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self.events.put_nowait, (row, event))

            return put

        end = service.tokenizer.eos_token_id
        self.requests = [
            Request(
                None if order.model == service.base else order.model, list(prompt), order.most, to(row),
                order.temperature, order.top_p, (order.seed + row) % 2**63, frozenset(() if end is None else (end,)),
            )
            for row, prompt in enumerate(order.prompts)
        ]  # fmt: skip
        try:
            for request in self.requests:
                service.engine.submit(request)
        except Full as error:
            self.cancel()
            raise Refused(429, f"{error} Try again later.", code="queue_full") from error
        except ValueError as error:
            self.cancel()
            raise Refused(400, str(error), "max_tokens", "context_length_exceeded") from error
        except RuntimeError as error:
            self.cancel()
            raise Refused(503, str(error)) from error

    def cancel(self) -> None:
        """Frees the rows. Nothing happens to texts that are done."""
        for request in self.requests:
            request.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(row, new text, why it ended or None), until all have ended; raises `Refused` where that fails."""
        service, open_rows = self.service, set(range(len(self.texts)))
        try:
            while open_rows:
                try:
                    async with asyncio.timeout(self.left - time.monotonic()):
                        row, event = await self.events.get()
                except TimeoutError as error:
                    raise Refused(504, f"It took over {service.limits.seconds:g} s.", code="timeout") from error
                text = self.texts[row]
                if row not in open_rows:  # the engine was a token ahead of the stop
                    continue
                if isinstance(event, LookupError):
                    raise Refused(404, str(event), "model", "model_not_found")
                if isinstance(event, Exception):
                    status = 503 if isinstance(event, RuntimeError) and service.engine.closed else 500
                    raise Refused(status, f"The text could not be written: {event}")
                if isinstance(event, int):
                    if not any(each.tokens for each in self.texts):
                        service.first.observe(time.perf_counter() - self.started)
                    piece, why = text.add(event), text.why
                else:
                    piece, why = text.end(), event
                if why:
                    open_rows.discard(row)
                    self.requests[row].cancelled = True
                if piece or why:
                    yield row, piece, why
            service.tokens.labels("read").inc(sum(map(len, self.order.prompts)))
            service.tokens.labels("written").inc(self.written())
            service.whole.observe(time.perf_counter() - self.started)
        finally:
            self.cancel()

    def written(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    def usage(self) -> dict:
        read, written = sum(map(len, self.order.prompts)), self.written()
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def say(self, choices: list[dict], **more) -> dict:
        model = self.order.model
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": model} | {
            "choices": choices, **more
        }  # fmt: skip

    async def whole(self, call: Call) -> dict:
        """The answer in one piece; a client that hangs up frees its rows."""

        async def hung_up() -> None:
            while (await call.receive())["type"] != "http.disconnect":
                pass

        reading, listening = asyncio.ensure_future(self.collected()), asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait((reading, listening), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ClientDisconnect()
            return self.say(reading.result(), usage=self.usage())
        finally:
            for task in (reading, listening):
                task.cancel()
            self.cancel()

    async def collected(self) -> list[dict]:
        why = {row: reason async for row, _, reason in self.pieces() if reason}
        return [choice(row, text.text, why[row]) for row, text in enumerate(self.texts)]

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: a piece each, then the usage if asked for, then [DONE]. An error is an event as well."""
        status = "499"  # unless it comes to an end
        try:
            async for row, piece, why in self.pieces():
                yield event(self.say([choice(row, piece, why)]))
            if self.order.usage:
                yield event(self.say([], usage=self.usage()))
            status = "200"
            yield "data: [DONE]\n\n"
        except Refused as error:
            status = str(error.status)
            yield event(error.body())
        finally:
            self.cancel()
            self.service.answered.labels(status).inc()


def choice(index: int, text: str, why: str | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": why}


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


# ---------------------------------------------------------------------------------------------------------------------
# The application
# ---------------------------------------------------------------------------------------------------------------------
class Token:
    """Middleware that lets nobody in who does not say "Authorization: Bearer <token>"; /health is open."""

    def __init__(self, app, token: str):
        self.app, self.right = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.right):
                refused = Refused(401, "Say the server's token: Authorization: Bearer …", code="invalid_api_key")
                await JSONResponse(refused.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def application(service: Service, token: str | None = None) -> Starlette:
    """The ASGI application; with a `token`, only for those who say it."""

    async def refused(call: Call, error: Refused) -> Response:
        more = {"Retry-After": "1"} if error.status == 429 else {}
        return JSONResponse(error.body(), error.status, more)

    async def other(call: Call, error: HTTPException) -> Response:
        message = {404: f"There is no {call.url.path[:100]}.", 405: f"{call.method} is not for {call.url.path[:100]}."}
        return await refused(call, Refused(error.status_code, message.get(error.status_code, str(error.detail))))

    async def broken(call: Call, error: Exception) -> Response:  # and starlette logs it
        return await refused(call, Refused(500, "The server failed; its log says where."))

    async def gone(call: Call, error: ClientDisconnect) -> Response:
        service.answered.labels("499").inc()
        return Response(status_code=499)

    return Starlette(
        routes=[
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.complete, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HTTPException: other, ClientDisconnect: gone, Exception: broken},
        middleware=[Middleware(Token, token=token)] if token else [],
    )
