"""What ``/predict`` may be sent: texts as JSON, images as a body or as files of a form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from limbeck.serve._model import Arrays, Refused, ServedModel
from limbeck.serve._protocol import parse_json
from limbeck.serve._settings import Settings

__all__ = ["Asked", "asked_of", "parts_of"]

TOP = 5


@dataclass(frozen=True)
class Asked:
    """The query: which model, which version (None: the latest), and how many classes (0: all)."""

    model: str
    version: str | None
    top: int


def asked_of(query: Mapping[str, str], names: list[str]) -> Asked:
    """Raises: Refused."""
    unknown = sorted(set(query) - {"model", "version", "top"})
    if unknown:
        raise Refused(f"'{unknown[0][:50]}' is no parameter; there are model, version and top.")
    name = query.get("model")
    if name is None:
        if len(names) > 1:
            raise Refused(f"several models are served: say which with ?model=NAME ({', '.join(names)}).")
        name = names[0]
    top = query.get("top", str(TOP))
    if not (top.isascii() and top.isdigit() and len(top) < 7):
        raise Refused("'top' must be a whole number; 0 asks for all classes.")
    return Asked(name, query.get("version"), int(top))


async def parts_of(body: bytes, headers: Mapping[str, str], model: ServedModel, settings: Settings) -> list[tuple[str | None, Arrays]]:
    """Every input of a request, prepared, with its file name where it has one. Raises: Refused."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        texts = _texts(parse_json(body), settings)
        return await asyncio.to_thread(lambda: [(None, model.from_text(*text)) for text in texts])
    if kind == "multipart/form-data":
        files = await _files(body, headers, settings)
        return await asyncio.to_thread(lambda: [(name, model.from_image(content, settings.max_pixels)) for name, content in files])
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [(None, await asyncio.to_thread(model.from_image, body, settings.max_pixels))]
    raise Refused("the content type must be application/json, multipart/form-data, application/octet-stream or an image's.", 415)


def _texts(value: dict[str, Any], settings: Settings) -> list[tuple[str, str | None]]:
    unknown = sorted(set(value) - {"text", "text_pair", "texts"})
    if unknown:
        raise Refused(f"'{unknown[0][:50]}' is no key; there are text, text_pair and texts.")
    if ("text" in value) == ("texts" in value):
        raise Refused("either 'text' or 'texts' is needed.")
    if "texts" in value:
        texts, pair = value["texts"], None
        if "text_pair" in value:
            raise Refused("'text_pair' goes with 'text'.")
        if not isinstance(texts, list) or not texts:
            raise Refused("'texts' must be a list of texts.")
    else:
        texts, pair = [value["text"]], value.get("text_pair")
    if len(texts) > settings.max_batch:
        raise Refused(f"a request may have at most {settings.max_batch} texts.")
    for text in [*texts, *([pair] if "text_pair" in value else [])]:
        if not isinstance(text, str):
            raise Refused("a text must be a string.")
        if len(text) > settings.max_text:
            raise Refused(f"a text may have at most {settings.max_text:,} characters.")
    return [(text, pair) for text in texts]


async def _files(body: bytes, headers: Mapping[str, str], settings: Settings) -> list[tuple[str | None, bytes]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    # kept in memory: it is all there already, and a body has its limit
    parser = MultiPartParser(Headers(dict(headers)), stream(), max_files=settings.max_batch, max_fields=1)
    parser.spool_max_size = settings.max_body + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        status = 413 if "Too many" in error.message else 400
        raise Refused(f"the form cannot be read: {error.message}", status) from None
    except (ValueError, KeyError, AssertionError, LookupError) as error:  # a form without a boundary, or of a coding that does not exist
        raise Refused(f"the form cannot be read: {type(error).__name__}.") from None
    files: list[tuple[str | None, bytes]] = []
    for _, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise Refused("a form may hold files alone.")
        files.append((value.filename, await value.read()))
    if not files:
        raise Refused("the form has no file.")
    return files
