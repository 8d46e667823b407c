"""Jobs: submit, look, watch, fetch results, cancel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..core.errors import InvalidInput
from .progress import Snapshot
from .proto import jobs_pb2 as pb
from .proto import jobs_pb2_grpc
from .records import JobRecord
from .row import JobState, RowState
from .rpc_status import long_call, streaming, unary
from .service import Service
from .submission import MAX_BATCH_BYTES
from .uploads import whole_upload
from .uri import read_uri

DEFAULT_LIST = 100
MAX_LIST = 1000
MIN_INTERVAL_S = 0.1
_RESULT_LINES = 100
_LOOK_S = 0.5
"""Longest wait before a stream looks again whether its client is there."""
_STATES = {
    JobState.QUEUED: pb.JOB_STATE_QUEUED,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.CANCELLING: pb.JOB_STATE_CANCELLING,
    JobState.COMPLETED: pb.JOB_STATE_COMPLETED,
    JobState.FAILED: pb.JOB_STATE_FAILED,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
}


class JobsServicer(jobs_pb2_grpc.JobsServicer):
    """Thread-safe."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @long_call
    def Submit(self, requests: Iterator[pb.SubmitRequest], context: Any) -> pb.SubmitResponse:
        service = self.service
        service.dispatcher.check_accepting()
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("header: the first message must be the header", field="header")
        header = first.header
        chunks: Iterator[bytes]
        if header.uri:
            if next(requests, None) is not None:
                raise InvalidInput("uri: a batch by URI takes no chunks", field="uri")
            gateway = service.config.gateway
            chunks = read_uri(
                header.uri,
                max_bytes=MAX_BATCH_BYTES,
                timeout_s=gateway.uri_timeout_s,
                protocols=gateway.uri_protocols,
            )
        else:
            chunks = whole_upload(requests)
        submission = service.intake.submit(
            chunks,
            name=header.name or header.uri.rpartition("/")[2],
            idempotency_key=header.idempotency_key,
            n_open_rows=service.dispatcher.n_open_rows,
        )
        if not submission.existed:
            service.dispatcher.accepted(submission.job_id)
        return pb.SubmitResponse(job=self._job(submission.job_id), existed=submission.existed)

    @unary
    def Get(self, request: pb.GetJobRequest, context: Any) -> pb.Job:
        return self._job(request.job_id)

    @unary
    def List(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        limit = request.limit or DEFAULT_LIST
        if not 0 < limit <= MAX_LIST:
            raise InvalidInput(f"limit: {limit} is not within 1 and {MAX_LIST}", field="limit")
        records = self.service.journal.jobs(limit, request.active_only)
        return pb.ListJobsResponse(jobs=[_job(record) for record in records])

    @unary
    def Cancel(self, request: pb.CancelJobRequest, context: Any) -> pb.Job:
        self.service.dispatcher.cancel(request.job_id)
        return self._job(request.job_id)

    @streaming
    def Watch(self, request: pb.WatchJobRequest, context: Any) -> Iterator[pb.JobUpdate]:
        interval_s = request.interval_s or 1.0
        if not (math.isfinite(interval_s) and interval_s >= MIN_INTERVAL_S):
            raise InvalidInput(
                f"interval_s: {interval_s} is below {MIN_INTERVAL_S}", field="interval_s"
            )
        dispatcher = self.service.dispatcher
        clock = self.service.clock
        while context.is_active():
            seen = dispatcher.n_changes
            snapshot = dispatcher.snapshot(request.job_id)
            record = self.service.journal.job(request.job_id)
            yield _update(record, snapshot)
            if record.state.ended:
                return
            next_s = clock.monotonic_s() + interval_s
            while context.is_active() and (left_s := next_s - clock.monotonic_s()) > 0:
                # a change may be the job's end, which is told without waiting for the interval
                changed = dispatcher.wait_change(seen, min(left_s, _LOOK_S))
                if changed != seen:
                    seen = changed
                    if self.service.journal.job_state(request.job_id).ended:
                        break

    @streaming
    def Results(self, request: pb.ResultsRequest, context: Any) -> Iterator[pb.ResultLine]:
        journal = self.service.journal
        if request.offset < 0:
            raise InvalidInput(f"offset: {request.offset} is negative", field="offset")
        position = request.offset
        while context.is_active():
            seen = self.service.dispatcher.n_changes
            # asked before the lines are read: an ended job has no line after these
            ended = journal.job_state(request.job_id).ended
            while lines := journal.results(request.job_id, position, _RESULT_LINES):
                for at, custom_id, line in lines:
                    yield pb.ResultLine(position=at, custom_id=custom_id, line=line)
                position = lines[-1][0] + 1
            if ended or not request.follow:
                return
            self.service.dispatcher.wait_change(seen, _LOOK_S)

    def _job(self, job_id: str) -> pb.Job:
        return _job(self.service.journal.job(job_id))


def _job(record: JobRecord) -> pb.Job:
    counts = record.counts
    return pb.Job(
        job_id=record.job_id,
        name=record.name,
        state=_STATES[record.state],
        rows=pb.RowCounts(
            total=sum(counts.values()), **{state.value: counts[state] for state in RowState}
        ),
        created_s=record.created_s,
        started_s=record.started_s,
        ended_s=record.ended_s,
        prompt_tokens=record.prompt_tokens,
        reused_tokens=record.reused_tokens,
        decoded_tokens=record.decoded_tokens,
        idempotency_key=record.idempotency_key,
    )


def _update(record: JobRecord, snapshot: Snapshot | None) -> pb.JobUpdate:
    update = pb.JobUpdate(
        job=_job(record),
        prefilled_tokens=record.prompt_tokens,
        decoded_tokens=record.decoded_tokens,
    )
    if snapshot is None or record.state.ended:
        return update
    for row in snapshot.active:
        update.active.add(
            custom_id=row.custom_id,
            phase=row.phase,
            prefilled=row.prefilled,
            reused=row.reused,
            total=row.total,
            decoded=row.decoded,
            max_tokens=row.max_tokens,
            worker_id=row.worker_id,
            attempt=row.attempt,
        )
    # the record knows ended rows (also of earlier starts), the snapshot the running ones
    update.prefilled_tokens += sum(row.prefilled for row in snapshot.active)
    flushed = record.decoded_tokens - record.ended_decoded_tokens
    update.decoded_tokens += max(0, sum(row.decoded for row in snapshot.active) - flushed)
    update.prefill_tokens_per_s = snapshot.prefill_tokens_per_s
    update.decode_tokens_per_s = snapshot.decode_tokens_per_s
    update.eta_s = snapshot.eta_s
    return update
