"""Human sizes, the live view, the summary: what a person reads."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from longreach.cluster import render
from longreach.cluster.proto import jobs_pb2
from longreach.cluster.summary import answer_text, summarize


def shown(*renderables: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for renderable in renderables:
        console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "?"),
        (0.04, "0.0s"),
        (9.96, "10.0s"),
        (59.6, "1m 00s"),
        (75, "1m 15s"),
        (7384, "2h 03m"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert render.human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")]
)
def test_human_bytes(n: int, text: str) -> None:
    assert render.human_bytes(n) == text


def update(**fields: Any) -> jobs_pb2.JobUpdate:
    job = jobs_pb2.Job(
        job_id="job-1",
        state=jobs_pb2.JOB_STATE_RUNNING,
        rows=jobs_pb2.RowCounts(total=3, running=2, done=1),
        created_s=100.0,
    )
    job.MergeFrom(jobs_pb2.Job(**fields.pop("job", {})))
    return jobs_pb2.JobUpdate(job=job, **fields)


def test_live_view_shows_rows_rates_and_eta() -> None:
    rows = [
        jobs_pb2.RowProgress(custom_id="long", phase="prefill", prefilled=512, total=12_000),
        jobs_pb2.RowProgress(custom_id="short", phase="decode", decoded=3, max_tokens=12),
    ]
    view = render.job_view(
        update(active=rows, prefilled_tokens=1512, prefill_tokens_per_s=93.4, eta_s=75.0)
    )
    text = shown(view)
    assert "1/3" in text
    assert "512/12,000" in text
    assert "3/12" in text
    assert "1,512 tokens (93/s)" in text
    assert "ETA 1m 15s" in text


def test_lines_without_a_terminal_come_at_changes_only() -> None:
    console = Console(file=io.StringIO(), width=200)
    ended = {"state": jobs_pb2.JOB_STATE_COMPLETED, "started_s": 101.0, "ended_s": 131.0}
    updates = [update(eta_s=9.0), update(eta_s=8.0), update(eta_s=7.0), update(job=ended)]
    last = render.follow_job(console, iter(updates))
    assert last is not None
    assert last.state == jobs_pb2.JOB_STATE_COMPLETED
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2  # equal states within seconds are one line
    assert "ETA 9.0s" in lines[0]
    assert "took 30s" in lines[1]
    assert "ETA" not in lines[1]


def answered(name: str, **stats: float) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": f"answer {name}"}}
    body = {"choices": [choice], "longreach": {"stats": stats}}
    return json.dumps({"custom_id": name, "response": {"body": body}, "error": None})


def refused(name: str, code: str) -> str:
    return json.dumps({"custom_id": name, "error": {"code": code, "message": "why"}})


def test_summary_adds_rows_up() -> None:
    first = {"tokens_prefilled": 900, "tokens_reused": 0, "prefill_s": 9.0, "tokens_decoded": 8}
    first |= {"decode_s": 1.0, "pages_device": 40, "pages_context": 190, "bank_hits": 30}
    first |= {"bank_misses": 10, "mass_kept_sum": 1.9, "mass_kept_n": 2, "seconds_attend": 3.0}
    second = {"tokens_prefilled": 100, "tokens_reused": 800, "prefill_s": 1.0, "tokens_decoded": 2}
    second |= {"decode_s": 1.0, "pages_device": 48, "pages_context": 20, "bank_misses": 10}
    second |= {"bytes_store_to_device": 3 << 20, "seconds_linear": 7.0}
    lines = [answered("a", **first), answered("b", **second)]
    summary = summarize([*lines, refused("c", "EMPTY_CONTEXT"), refused("d", "CANCELLED")])
    assert summary.rows == {"answered": 2, "failed": 1, "cancelled": 1}
    assert summary.prefill_tokens_per_s == 100.0
    assert summary.decode_tokens_per_s == 5.0
    assert summary.hit_ratio == 0.6
    assert summary.mass_kept == 0.95
    assert list(summary.seconds) == ["linear", "attend"]
    text = shown(render.summary_table(summary))
    for part in ("1,000 prefilled, 800 reused", "at most 48", "190", "3.0 MiB", "60.0%", "95.0%"):
        assert part in text


def test_summary_of_nothing() -> None:
    summary = summarize([])
    assert (summary.hit_ratio, summary.mass_kept, summary.decode_tokens_per_s) == (None, None, 0)
    assert "none" in shown(render.summary_table(summary))


def test_answer_text_of_each_kind_of_line() -> None:
    assert answer_text(answered("a")) == "answer a"
    assert answer_text(refused("a", "DATA_LOSS")) == "DATA_LOSS: why"
    body = {"choices": [{"index": 0, "text": "plain"}]}
    assert answer_text(json.dumps({"response": {"body": body}, "error": None})) == "plain"


def test_job_ids_are_whole_in_narrow_terminals() -> None:
    job = jobs_pb2.Job(job_id="job-0123456789abcdef", name="x" * 40, created_s=1.0)
    assert job.job_id in shown(render.jobs_table([job]), width=60)
