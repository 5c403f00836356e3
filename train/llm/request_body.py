"""Bodies of chat completion requests."""

from typing import Any

from train.llm.journal import Request


def request_body(model: str, request: Request, *, limit_name: str = "max_tokens") -> dict[str, Any]:
    """Return the JSON body of a request. `limit_name`: the server's name for the token limit."""
    return {
        "model": model,
        "messages": request.messages,
        limit_name: request.decoding.max_tokens,
        **request.decoding.parameters(request.sample),
    }
