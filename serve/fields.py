"""Reads a JSON body: known fields go into a msgspec struct, impossible ones are refused, unknown ones are reported."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ..runtime.app.openai_format import HARMLESS, IMPOSSIBLE
from .decoding import DecodePool
from .errors import ApiError, unsupported
from .http import Exchange

T = TypeVar("T", bound=msgspec.Struct)


def parse(exchange: Exchange, body: bytes, kind: type[T], impossible: Mapping[str, tuple[Any, ...]] = IMPOSSIBLE) -> T:
    """Convert a JSON object to a struct. Raises ApiError that names the wrong field.

    Unknown fields are added to `exchange.ignored`.
    """
    try:
        given = msgspec.json.decode(body)
        for name in (given.keys() if isinstance(given, dict) else set()) - set(kind.__struct_fields__):
            if name in impossible:
                if given[name] not in impossible[name]:
                    raise unsupported(name, f"{name} is not supported by this model")
            elif name not in HARMLESS:
                exchange.ignore([name])
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        param = where.removesuffix("`").lstrip(".") or None
        raise ApiError(400, "invalid_value", f"{param or 'the body'}: {message}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON ({error})") from None


async def json_body(exchange: Exchange, pool: DecodePool) -> bytes:
    """The request's JSON body. The base64 audio of a long body has been moved to files (see `worker.extract`)."""
    body = await exchange.body()
    if isinstance(body, bytes):
        return body
    exchange.reserve(body.stat().st_size)
    folder = exchange.folder()
    slim, files = await exchange.watched(pool.extract(body, folder))
    exchange.files |= set(files)
    return slim
