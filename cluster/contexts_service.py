"""Contexts: documents uploaded once and named by their content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .contexts import ContextRecord
from .proto import contexts_pb2 as pb
from .proto import contexts_pb2_grpc
from .rpc_status import long_call, unary
from .service import Service
from .uploads import whole_upload


class ContextsServicer(contexts_pb2_grpc.ContextsServicer):
    """Thread-safe."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @long_call
    def Upload(self, requests: Iterator[pb.UploadContextRequest], context: Any) -> pb.Context:
        self.service.dispatcher.check_accepting()
        return _context(self.service.contexts.add(whole_upload(requests), "upload"))

    @long_call
    def Import(self, request: pb.ImportContextRequest, context: Any) -> pb.Context:
        self.service.dispatcher.check_accepting()
        context_id = self.service.preparer.import_uri(request.uri, request.uri)
        return _context(self.service.contexts.get(context_id))

    @unary
    def Get(self, request: pb.GetContextRequest, context: Any) -> pb.Context:
        return _context(self.service.contexts.get(request.context_id))

    @unary
    def Delete(self, request: pb.DeleteContextRequest, context: Any) -> pb.DeleteContextResponse:
        self.service.contexts.delete(request.context_id)
        return pb.DeleteContextResponse()


def _context(record: ContextRecord) -> pb.Context:
    return pb.Context(
        context_id=record.context_id,
        n_bytes=record.n_bytes,
        created_s=record.created_s,
        source=record.source,
    )
