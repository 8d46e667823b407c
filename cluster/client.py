"""The Python client of a gateway. Errors arrive as the gateway's own; every call has a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ..core.errors import DeadlineExceeded, InternalError, InvalidInput, Unavailable, UnreadableUri
from .kv_client import KvClient
from .local_documents import LocalDocuments
from .proto import (
    admin_pb2,
    admin_pb2_grpc,
    contexts_pb2,
    contexts_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    kv_pb2_grpc,
)
from .rpc_errors import error_from_rpc
from .uploads import upload_parts

T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:50051"
CHUNK_BYTES = 1 << 20
_STREAM_S = 600.0
"""Longest life of one watch or results stream; both go on in a new one where they were."""
_RETRY_PAUSE_S = 0.5


class Client:
    """One gateway, from any number of threads. Close it, or use it in a `with` block."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        retry_s: float = 60.0,
        max_message_bytes: int = 8 << 20,
    ) -> None:
        """timeout_s: deadline of short calls. retry_s: how long `watch` and `results` wait for
        a gateway that went away in the middle."""
        self.address = address
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                # a long prefill sends nothing; this finds a dead peer all the same
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                ("grpc.enable_retries", 0),
            ],
        )
        self._inference = _stub(inference_pb2_grpc.InferenceStub, self._channel)
        self._jobs = _stub(jobs_pb2_grpc.JobsStub, self._channel)
        self._contexts = _stub(contexts_pb2_grpc.ContextsStub, self._channel)
        self._admin = _stub(admin_pb2_grpc.AdminStub, self._channel)
        self.kv = KvClient(
            _stub(kv_pb2_grpc.KvStub, self._channel), self._call, self._send, self._stream
        )
        """What operators ask of the stores."""

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def generate(
        self,
        question: str = "",
        *,
        context: str | None = None,
        context_id: str | None = None,
        context_uri: str | None = None,
        messages: Sequence[Mapping[str, str]] = (),
        answer_prefix: str = "",
        model: str = "",
        sampling: Mapping[str, Any] | None = None,
        timeout_s: float = 24 * 3600.0,
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Progress and token events, last the answer. Closing the iterator cancels the row.

        `sampling` takes max_tokens, temperature, top_p, seed, stop (str or list of str).
        """
        request = inference_pb2.GenerateRequest(
            question=question,
            answer_prefix=answer_prefix,
            model=model,
            messages=[inference_pb2.ChatMessage(**dict(m)) for m in messages],
            sampling=_sampling(sampling or {}),
        )
        for name, value in (
            ("context_text", context),
            ("context_id", context_id),
            ("context_uri", context_uri),
        ):
            if value is not None:
                if request.WhichOneof("context"):
                    raise InvalidInput("give one of context, context_id and context_uri")
                setattr(request, name, value)
        return self._stream(self._inference.Generate, request, timeout_s)

    def ask(self, question: str, **arguments: Any) -> inference_pb2.Answer:
        """`generate` without the events in between."""
        for event in self.generate(question, **arguments):
            if event.HasField("answer"):
                return event.answer
        raise InternalError(f"the gateway at {self.address} ended without an answer")

    def submit(
        self,
        batch: str | Path | bytes = b"",
        *,
        uri: str = "",
        name: str = "",
        idempotency_key: str = "",
        timeout_s: float = 600.0,
    ) -> jobs_pb2.Job:
        """Submit JSONL: a path, the bytes themselves, or a URI that the gateway reads.

        Documents that a batch file names by a local path are uploaded first, each once.
        """
        if bool(uri) == bool(batch):
            raise InvalidInput("give a batch (path or bytes) or a uri, one of the two")
        if not name and isinstance(batch, str | Path) and batch:
            name = Path(batch).name
        header = jobs_pb2.SubmitHeader(name=name, uri=uri, idempotency_key=idempotency_key)
        chunks = _chunks(batch) if batch else iter(())
        if isinstance(batch, str | Path) and batch:
            chunks = self._with_documents(Path(batch), chunks)

        def requests() -> Iterator[jobs_pb2.SubmitRequest]:
            yield jobs_pb2.SubmitRequest(header=header)
            if not uri:
                yield from upload_parts(jobs_pb2.SubmitRequest, chunks)

        response: jobs_pb2.SubmitResponse = self._send(self._jobs.Submit, requests(), timeout_s)
        return response.job

    def _with_documents(self, batch: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The batch's pieces with its local documents named by their uploads."""
        documents = LocalDocuments(
            batch.parent, lambda path: str(self.upload_context(path).context_id)
        )
        # twice: uploads and their errors come before the stream, whose iterator would hide them
        for _ in documents.lines(batch):
            pass
        if not documents.found:
            return chunks
        return (piece for line in documents.lines(batch) for piece in _chunks(line))

    def jobs(self, *, limit: int = 0, active_only: bool = False) -> list[jobs_pb2.Job]:
        """Newest first."""
        request = jobs_pb2.ListJobsRequest(limit=limit, active_only=active_only)
        return list(self._call(self._jobs.List, request).jobs)

    def get(self, job_id: str) -> jobs_pb2.Job:
        job: jobs_pb2.Job = self._call(self._jobs.Get, jobs_pb2.GetJobRequest(job_id=job_id))
        return job

    def cancel(self, job_id: str) -> jobs_pb2.Job:
        """Raises AlreadyEnded if the job has ended."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id)
        job: jobs_pb2.Job = self._call(self._jobs.Cancel, request)
        return job

    def watch(self, job_id: str, *, interval_s: float = 1.0) -> Iterator[jobs_pb2.JobUpdate]:
        """The job's state until it has ended, across restarts of the gateway."""
        request = jobs_pb2.WatchJobRequest(job_id=job_id, interval_s=interval_s)
        ended = False
        for update in self._lasting(lambda: self._stream(self._jobs.Watch, request, _STREAM_S)):
            if update is None:
                if ended:
                    return
                continue
            ended = has_ended(update.job)
            yield update

    def results(
        self, job_id: str, *, follow: bool = False, offset: int = 0
    ) -> Iterator[jobs_pb2.ResultLine]:
        """Result lines in the order rows ended; `follow` goes on until the job has ended."""
        position = offset

        def open_stream() -> Iterator[jobs_pb2.ResultLine]:
            request = jobs_pb2.ResultsRequest(job_id=job_id, follow=follow, offset=position)
            return self._stream(self._jobs.Results, request, _STREAM_S)

        for line in self._lasting(open_stream):
            if line is None:
                return
            position = line.position + 1
            yield line

    def upload_context(self, document: str | Path | bytes) -> contexts_pb2.Context:
        """Store a document once: bytes of UTF-8 text, or the path of a file."""
        requests = upload_parts(contexts_pb2.UploadContextRequest, _chunks(document))
        upload = self._contexts.Upload
        context: contexts_pb2.Context = self._send(upload, requests, 20 * self._timeout_s)
        return context

    def import_context(self, uri: str) -> contexts_pb2.Context:
        request = contexts_pb2.ImportContextRequest(uri=uri)
        load = self._contexts.Import
        context: contexts_pb2.Context = self._send(load, request, 20 * self._timeout_s)
        return context

    def delete_context(self, context_id: str) -> None:
        self._call(self._contexts.Delete, contexts_pb2.DeleteContextRequest(context_id=context_id))

    def stats(self) -> admin_pb2.StatsResponse:
        stats: admin_pb2.StatsResponse = self._call(self._admin.Stats, admin_pb2.StatsRequest())
        return stats

    def drain(self, timeout_s: float = 60.0) -> int:
        """No new work from now on; returns the rows still running when the time was over."""
        request = admin_pb2.DrainRequest(timeout_s=timeout_s)
        response = self._send(self._admin.Drain, request, timeout_s + self._timeout_s)
        return int(response.running_rows)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the gateway accepts calls. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.stats()
                return
            except (Unavailable, DeadlineExceeded) as exc:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"the gateway at {self.address} was not ready within {timeout_s:.0f} s"
                    ) from exc
                time.sleep(0.2)

    def _call(self, method: Any, request: Any) -> Any:
        return self._send(method, request, self._timeout_s)

    def _send(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self.address) from None

    def _stream(self, method: Any, request: Any, timeout_s: float) -> Iterator[Any]:
        call = method(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self.address) from None
        finally:
            call.cancel()

    def _lasting(self, open_stream: Callable[[], Iterator[T]]) -> Iterator[T | None]:
        """Items of one stream after the other; None where one ended in order.

        A stream that reached its own deadline is opened again; while the gateway is away, for
        retry_s, so is one that broke. One that never began is not waited for.
        """
        heard_s: float | None = None
        while True:
            try:
                for item in open_stream():
                    heard_s = time.monotonic()
                    yield item
                yield None
            except DeadlineExceeded:
                heard_s = time.monotonic()
            except Unavailable:
                if heard_s is None or time.monotonic() - heard_s > self._retry_s:
                    raise
            time.sleep(_RETRY_PAUSE_S)


def has_ended(job: jobs_pb2.Job) -> bool:
    """True in the three states that never change."""
    return job.state in (
        jobs_pb2.JOB_STATE_COMPLETED,
        jobs_pb2.JOB_STATE_FAILED,
        jobs_pb2.JOB_STATE_CANCELLED,
    )


def _stub(kind: Any, channel: Any) -> Any:
    return kind(channel)  # generated without types


def _sampling(fields: Mapping[str, Any]) -> inference_pb2.Sampling:
    given = {name: value for name, value in fields.items() if value is not None}
    stop = given.pop("stop", [])
    try:
        return inference_pb2.Sampling(stop=[stop] if isinstance(stop, str) else stop, **given)
    except (TypeError, ValueError) as exc:
        raise InvalidInput(f"sampling: {exc}") from exc


def _chunks(source: str | Path | bytes) -> Iterator[bytes]:
    """Pieces of bytes, or of the file at a path. An unreadable file is told here, not later:
    gRPC hides what an iterator of requests raises."""
    if isinstance(source, bytes):
        starts = range(0, len(source), CHUNK_BYTES)
        return (source[start : start + CHUNK_BYTES] for start in starts)
    try:
        file = open(source, "rb")  # noqa: SIM115
    except OSError as exc:
        raise UnreadableUri(f"{source}: {exc.strerror}") from exc

    def pieces() -> Iterator[bytes]:
        with file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    return pieces()
