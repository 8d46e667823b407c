"""Run by test_journal.py in a process of its own: writes until it is killed, telling what is safe.

Each line on stdout is a promise made after the journal's call has returned.
"""

from __future__ import annotations

import sys

from longreach.cluster.journal import Journal
from longreach.cluster.records import NewRow, RowEnd
from longreach.cluster.row import RowSpec, RowState


def main(state_dir: str) -> None:
    journal = Journal(state_dir)
    journal.recover()
    say = sys.stdout.write
    job_number = 0
    while True:
        job_number += 1
        job_id = f"job-{journal.take_epoch(0.0)}-{job_number}"
        rows = [
            NewRow(line, f"c{line}", RowSpec(custom_id=f"c{line}", context="x", question="y"))
            for line in range(1, 11)
        ]
        journal.accept_job(job_id, "test", job_id, "sha", rows)
        say(f"accepted {job_id}\n")
        for line in range(1, 11):
            row_id = f"{job_id}.{line}"
            journal.start_row(row_id)
            for index in range(7):
                journal.tokens.append(row_id, index, 1000 * line + index)
                if index % 3 == 2:
                    journal.tokens.flush()
                    say(f"tokens {row_id} {index + 1}\n")
            if line % 2:
                journal.end_row(RowEnd(row_id, RowState.DONE, f"result of {row_id}"))
                say(f"ended {row_id}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(sys.argv[1])
