"""The errors of requests whose step in the engine failed."""

from ...kernels.errors import AfnextError
from ..errors import EngineError, InsufficientMemoryError

NOT_FINITE = (
    "the model computed scores that are NaN or infinite, so no token can be chosen. The likely cause are damaged or "
    'wrongly scaled weights, or an overflow in float16: check the checkpoint, or load with dtype="bfloat16" or '
    '"float32".'
)


def step_error(error: BaseException) -> AfnextError:
    """The error of the sequences that were running when a step failed."""
    if isinstance(error, AfnextError):
        return error
    failure = EngineError(f"a step of the engine failed ({type(error).__name__}: {error}); send the request again")
    failure.__cause__ = error
    return failure


def explained(error: Exception) -> Exception:
    """The error itself, or, if it is a failed allocation, one that says what to do."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    ):
        return error
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = InsufficientMemoryError(
        f"there was not enough memory to compute the request ({detail}). Load with a smaller chunk_size and "
        'encode_batch, kv="int8", a quantized scheme or a lower `memory`; `afnext plan` shows what takes how much.'
    )
    memory.__cause__ = error
    return memory
