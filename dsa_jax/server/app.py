"""The application: every endpoint, behind both doors."""

import importlib.resources
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from dsa_jax.server.access import Access
from dsa_jax.server.admission import PAGE_PATH, Admission
from dsa_jax.server.answering import Answer, Job
from dsa_jax.server.chat import make_chat
from dsa_jax.server.completions import make_completion
from dsa_jax.server.errors import ApiError, ErrorBody, invalid_body
from dsa_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsa_jax.server.service import Service
from dsa_jax.server.tokens import detokenize, tokenize, tokenizer_info

BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
PAGE_TYPES = {"chat.css": "text/css", "chat.js": "text/javascript", "icon.svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
}


def make_app(service: Service) -> tuple[ASGIApp, Admission]:
    """Makes the application, and the door that counts its requests and can be shut."""
    app = FastAPI(
        title="dsa_jax", version="1", docs_url=None, redoc_url=None, responses=ERRORS,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},
    )  # fmt: skip
    admission = Admission(app, settings=service.settings, keys=service.keys)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_health(app, service, admission)
    _add_page(app)
    _describe_bodies(app, service.settings.name)
    inner: ASGIApp = admission
    if service.settings.origins:
        inner = CORSMiddleware(
            inner, allow_origins=service.settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )  # fmt: skip
    settings, count = service.settings, service.metrics.count
    return Access(inner, hosts=settings.hosts, origins=settings.origins, count=count), admission


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, model: type[BaseModel], make: Callable[..., Job]) -> Response:
        code = request.state.code
        job = await service.in_thread(_with_body, model, await request.body(), lambda body: make(body, service, code))
        return Answer(job, service)

    events: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest), responses=events)
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        return await answer(request, CompletionRequest, make_completion)

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest), responses=events)
    async def chat(request: Request) -> Response:
        """Answers a conversation."""
        return await answer(request, ChatRequest, make_chat)


def _add_tokens(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, model: type[BaseModel], make: Callable[..., Any]) -> Response:
        found = await service.in_thread(_with_body, model, await request.body(), lambda body: make(body, service))
        return JSONResponse(found)

    @app.post("/tokenize", openapi_extra=_takes(TokenizeRequest))
    async def tokens_of(request: Request) -> Response:
        """Returns the tokens of a text."""
        return await answer(request, TokenizeRequest, tokenize)

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeRequest))
    async def text_of(request: Request) -> Response:
        """Returns the text of tokens."""
        return await answer(request, DetokenizeRequest, detokenize)

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """Returns the special tokens."""
        return tokenizer_info(service)

    model = {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "dsa_jax"}
    model |= {"max_model_len": service.longest}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Lists the model."""
        return dict(object="list", data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Describes the model."""
        if name != model["id"]:
            raise ApiError(404, f"the model must be {model['id']}, got {name!r}", code="model_not_found")
        return model


def _add_health(app: FastAPI, service: Service, admission: Admission) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """Tells whether the last step went well; a server that is not live must be started again."""
        return _state(service.failed is None, failed=service.failed)

    @app.get("/health/ready")
    async def ready() -> Response:
        """Tells whether requests are let in."""
        return _state(service.failed is None and not admission.draining, draining=admission.draining)

    @app.get("/health")
    async def health() -> Response:
        """Tells both."""
        fine = service.failed is None and not admission.draining
        return _state(fine, failed=service.failed, draining=admission.draining)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Tells the counts, as Prometheus reads them."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _state(fine: bool, **more: Any) -> Response:
    return JSONResponse({"status": "ok" if fine else "unavailable", **more}, 200 if fine else 503)


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("dsa_jax.server") / "page"
    files = {name: (folder / name).read_bytes() for name in ("chat.html", *PAGE_TYPES)}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["chat.html"], media_type="text/html", headers=PAGE_HEADERS)

    @app.get(PAGE_PATH + "{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in PAGE_TYPES:
            raise ApiError(404, "there is nothing at this path", code="not_found")
        return Response(files[name], media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)


def _with_body[B: BaseModel, T](model: type[B], data: bytes, work: Callable[[B], T]) -> T:
    """Parses a body, and works on it: both may take long."""
    try:
        body = model.model_validate_json(data)
    except ValidationError as error:
        raise invalid_body(error) from None
    return work(body)


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """Describes the body of an endpoint that parses it by itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI, model: str) -> None:
    """Adds the bodies' schemas to the OpenAPI description."""
    made = app.openapi
    _, found = models_json_schema(
        [(each, "validation") for each in BODIES], ref_template="#/components/schemas/{model}"
    )

    def openapi() -> dict[str, Any]:
        schema = made()
        for name, body in found["$defs"].items():
            if "model" in body["properties"]:
                body["properties"]["model"] = {"enum": [model, None]}
            schema["components"]["schemas"][name] = body
        return schema

    app.openapi = openapi


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this path", 405: "this path has another method"}
    message = words.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _failure(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server has failed at this request").response()
