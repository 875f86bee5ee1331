"""Every error that Saddle raises on purpose.

    SaddleError
    ├── RequestError            one request is wrong or cannot be served now; the process is well
    │   ├── InvalidRequest      400  a field is wrong; names the field and says what would be right
    │   ├── ContextTooLong      400  the prompt does not fit the model's context
    │   ├── NotFound            404  unknown model, unknown stored object
    │   ├── Overloaded          429  the queue is full, try again later
    │   └── Unavailable         503  the server is loading, draining or its engine is gone
    ├── StartupError            this configuration cannot start; says what would
    │   └── CheckpointError     a tensor or file of the checkpoint is missing, extra or mis-shaped
    └── EngineError             the engine or a device failed; its requests end as Failed
        └── EngineDead          the engine process is gone

A `RequestError` carries what every HTTP API needs: the status, the field (`param`) and a message for the
person who sent the request. Messages never contain paths, addresses or tracebacks of the server.
"""

from __future__ import annotations


class SaddleError(Exception):
    """Base of all errors raised on purpose."""


class RequestError(SaddleError):
    """One request cannot be served.

    Args:
        message: what is wrong and what would be right, for the sender.
        param: dotted path of the field at fault, if there is one.
        retry_after: seconds after which trying again makes sense, for 429 and 503.
    """

    status = 400
    kind = "BadRequestError"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """A field has a value that is wrong or not supported."""


class ContextTooLong(RequestError):
    """The prompt does not fit the context that this server was started with.

    Args:
        num_tokens, limit: of the prompt and of the context, for APIs that word it in their own way.
    """

    def __init__(
        self, message: str, param: str | None = None, num_tokens: int | None = None, limit: int | None = None
    ) -> None:
        super().__init__(message, param)
        self.num_tokens, self.limit = num_tokens, limit

    @classmethod
    def of(cls, num_tokens: int, limit: int, *, at_least: bool = False) -> ContextTooLong:
        """In the words of vLLM. `at_least`: the prompt was not counted to its end."""
        more = "at least " if at_least else ""
        return cls(
            f"This model's maximum context length is {limit} tokens. However, your prompt contains {more}{num_tokens} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
            "input prompt.",
            param="input_tokens",
            num_tokens=num_tokens,
            limit=limit,
        )


class NotFound(RequestError):
    status = 404
    kind = "NotFoundError"


class Overloaded(RequestError):
    status = 429
    kind = "RateLimitError"


class Unavailable(RequestError):
    status = 503
    kind = "ServiceUnavailableError"


class StartupError(SaddleError):
    """The configuration cannot start on this machine; the message says what would."""


class CheckpointError(StartupError):
    """A file or tensor of the checkpoint is missing, extra or has the wrong shape or dtype."""


class EngineError(SaddleError):
    """The engine or one of its devices failed."""


class EngineDead(EngineError):
    """The engine process ended; every request that it held has failed."""
