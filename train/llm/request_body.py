"""Bodies of chat completion requests, in the form that a server accepts."""

from dataclasses import dataclass
from typing import Any

from train.llm.refusals import names_field, requires_completion_tokens, requires_stream
from train.llm.request import Request


@dataclass(slots=True)
class RequestForm:
    """The form of request that a server accepts; its refusals change it.

    limit_name: field of the token limit.
    stream: it answers only in a stream of events.
    stream_usage: a stream may be asked to end with its token counts.
    """

    limit_name: str = "max_tokens"
    stream: bool = False
    stream_usage: bool = True

    def adapt(self, text: str, body: dict[str, Any]) -> bool:
        """Change to the form that an error asks for (see `refusals.extract_error_text`); False if it asks for none.

        Requests of the old form may still be in flight when the form changes: they are sent again, too.
        """
        if "max_tokens" in body and requires_completion_tokens(text):
            self.limit_name = "max_completion_tokens"  # the name for OpenAI's reasoning models
        elif "stream" not in body and requires_stream(text):
            self.stream = True
        elif "stream_options" in body and names_field(text, "stream_options"):
            self.stream_usage = False
        else:
            return False
        return True


_USUAL = RequestForm()


def request_body(model: str, request: Request, form: RequestForm = _USUAL) -> dict[str, Any]:
    """Return the JSON body of a request. The decoding's own name for the token limit overrides the form's."""
    decoding = request.decoding
    body: dict[str, Any] = {"model": model, "messages": request.messages}
    if decoding.limit_name:
        body[form.limit_name if decoding.limit_name == "max_tokens" else decoding.limit_name] = decoding.max_tokens
    body |= decoding.parameters(request.sample)
    if form.stream:
        body["stream"] = True
        if form.stream_usage:
            body["stream_options"] = {"include_usage": True}
    return body
