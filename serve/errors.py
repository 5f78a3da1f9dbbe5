"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status.

Messages never contain paths, addresses or tracebacks.
"""

import errno
import secrets
from collections.abc import Mapping
from typing import Any

from ..kernels.errors import AfnextError
from ..runtime.errors import (
    AudioError,
    AudioTooLongError,
    ContextLengthError,
    EngineDeadError,
    OutOfPagesError,
    PromptError,
    SamplingError,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}
_UNEXPECTED = ("internal_error", "engine_error", "insufficient_storage")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# The most specific class first: the first that matches decides.
_CODES: tuple[tuple[type[AfnextError], int, str], ...] = (
    (AudioTooLongError, 400, "audio_too_long"),
    (AudioError, 400, "invalid_audio"),
    (ContextLengthError, 400, "context_length_exceeded"),
    (OutOfPagesError, 400, "request_too_large"),
    (PromptError, 400, "invalid_prompt"),
    (EngineDeadError, 503, "engine_dead"),
)
# Fields of requests with which a SamplingError begins.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_repetition")


class ApiError(Exception):
    """A request that fails with a status and a code. `param` names the field that is wrong, if one is."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def unexpected(self) -> bool:
        """Whether the server must log details that the client may not see."""
        return self.status >= 500 and self.code in _UNEXPECTED

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def new_request_id() -> str:
    """The id of a request, sent to the client and logged."""
    return f"req_{secrets.token_hex(12)}"


def overloaded(message: str, retry_seconds: int = 5) -> ApiError:
    """The error for a request that the client has to retry later."""
    return ApiError(
        429, "server_overloaded", f"{message}; try again later", headers={"Retry-After": str(retry_seconds)}
    )


def unavailable(code: str, message: str) -> ApiError:
    """The error of a server that cannot answer now."""
    return ApiError(503, code, message, headers={"Retry-After": "5"})


def unsupported(param: str | None, message: str) -> ApiError:
    """The error for a value that this server cannot honour."""
    return ApiError(400, "unsupported_value", message, param=param)


def api_error(error: BaseException) -> ApiError:
    """The error that a client gets for an exception. Only messages of known errors are passed on."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SamplingError):
        name = str(error).partition(" ")[0]
        return unsupported(name if name in _SAMPLING else None, str(error))
    for kind, status, code in _CODES:
        if isinstance(error, kind):
            return ApiError(status, code, str(error))
    if isinstance(error, AfnextError):
        return ApiError(500, "engine_error", "the model failed on this request; the server's log says why")
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return ApiError(507, "insufficient_storage", "the server's disk is full")
    return ApiError(500, "internal_error", "the server failed on this request; its log says why")
