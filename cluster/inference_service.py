"""Inference: one question, answered while the client listens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.errors import EmptyContext, InvalidInput
from .proto import inference_pb2 as pb
from .proto import inference_pb2_grpc
from .results import Outcome
from .row import ROLES, Message, RowSpec, check_model
from .rpc_status import streaming
from .sampling import Sampling, parse_sampling
from .service import Service
from .worker_pool import CancelSwitch, NewToken, Progress, RowEvent

_PHASES = {
    "queued": pb.PHASE_QUEUED,
    "prefill": pb.PHASE_PREFILL,
    "decode": pb.PHASE_DECODE,
}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Thread-safe."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @streaming
    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        service = self.service
        service.dispatcher.check_accepting()
        spec = row_spec(request, service)
        switch = CancelSwitch()
        # called when the client vanishes, cancels or runs out of time; also at the end, harmlessly
        if not context.add_callback(switch.cancel):
            return
        for row_id, event in service.interactive.run(spec, switch):
            response = _response(row_id, event)
            if response is not None:
                yield response


def row_spec(request: pb.GenerateRequest, service: Service) -> RowSpec:
    """Raises the InvalidInput family or UnsupportedModel, naming the field."""
    config = service.config
    check_model(request.model, config)
    sampling = _sampling(request.sampling, config.gateway.max_new_tokens)
    kind = request.WhichOneof("context")
    common: dict[str, Any] = {
        "custom_id": "",
        "answer_prefix": request.answer_prefix,
        "model": request.model,
        "sampling": sampling,
    }
    if request.messages:
        if kind or request.question:
            raise InvalidInput(
                "messages: give either messages, or a context and a question", field="messages"
            )
        messages = tuple(_message(i, m) for i, m in enumerate(request.messages))
        if not any(message.content.strip() for message in messages):
            raise EmptyContext("messages: all are empty", field="messages")
        return RowSpec(kind="chat", messages=messages, **common)
    if kind is None:
        raise InvalidInput(
            "context: give one of context_text, context_id, context_uri (or messages)",
            field="context",
        )
    if not request.question.strip():
        raise InvalidInput("question: it is empty", field="question")
    value = getattr(request, kind)
    if not value.strip():
        raise EmptyContext(f"{kind}: it is empty", field=kind)
    name = "context" if kind == "context_text" else kind
    return RowSpec(question=request.question, **{name: value}, **common)


def _message(index: int, message: pb.ChatMessage) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        field = f"messages.{index}.role"
        raise InvalidInput(
            f"{field}: '{message.role:.40}' is none of {', '.join(ROLES)}", field=field
        )
    return Message(role=role, content=message.content)


def _sampling(given: pb.Sampling, max_new_tokens: int) -> Sampling:
    names = ("max_tokens", "temperature", "top_p", "seed")
    values: dict[str, Any] = {name: getattr(given, name) for name in names if given.HasField(name)}
    return parse_sampling({**values, "stop": list(given.stop) or None}, max_new_tokens)


def _response(row_id: str, event: RowEvent) -> pb.GenerateResponse | None:
    match event:
        case Progress():
            progress = pb.Progress(
                phase=_PHASES.get(event.phase, pb.PHASE_UNSPECIFIED),
                prefilled=event.prefilled,
                reused=event.reused,
                total=event.total,
            )
            return pb.GenerateResponse(progress=progress)
        case NewToken(index, token_id, text):
            return pb.GenerateResponse(token=pb.Token(index=index, token_id=token_id, text=text))
        case Outcome():
            n_prompt = int(event.stats.get("tokens_prompt", 0))
            usage = pb.Usage(
                **event.usage(n_prompt), reused_tokens=int(event.stats.get("tokens_reused", 0))
            )
            return pb.GenerateResponse(
                answer=pb.Answer(
                    row_id=row_id,
                    text=event.text,
                    finish_reason=event.finish_reason,
                    usage=usage,
                    stats=event.stats,
                )
            )
    return None
