"""What compiled code is told about one query's attention: a book of int64 numbers and addresses."""

from __future__ import annotations

# fixed while pages and selection stay
N_HEADS, N_KV_HEADS, HEAD_DIM, N_SEGMENTS, N_RUNS_ALL, N_BASES, N_WEIGHTS = range(7)
TABLE, RUNS, KEY_STARTS, BASE, RULES, WEIGHTS, PAGES = range(7, 14)
COS, SIN, COARSE_COS, COARSE_SIN, FOLD, EXACT = range(14, 20)
COUNTERS, MOST = 20, 21
"""MOST: the largest number that the format of keys and values holds."""
# of one token
Q_START, QUERY, N_PARTIALS, PARTIALS, LSES, RESULT, RESULT_LSE = range(22, 29)
NEW_KEY, NEW_VALUE, WRONG = range(29, 32)
"""NEW_KEY: 0 if the token's key is in its page already; else heads of a token lie side by side, and WRONG
becomes 1 where one is not finite in the format."""
BOOK_NUMBERS = 32

COUNTER_NUMBERS = 32
"""int64 numbers of a pair of counters in `cpu_block_parts`."""
PARTIALS_COUNTER, MERGE_COUNTER, APPEND_COUNTER, N_COUNTERS = range(4)
