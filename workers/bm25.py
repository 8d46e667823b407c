"""BM25 over short texts: hard negatives for training, and the rival of a retriever that reads text.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with their
usual k1 and b and the idf that is never negative.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

K1 = 1.2
B = 0.75
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class Bm25:
    """An index of texts, asked by words."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        mean = float(lengths.mean()) if len(lengths) else 0.0
        self._n = len(counts)
        self._norms = K1 * (1 - B + B * lengths / max(mean, 1.0))
        self._postings: dict[str, list[tuple[int, int]]] = {}
        for i, count in enumerate(counts):
            for word, n in count.items():
                self._postings.setdefault(word, []).append((i, n))

    def scores(self, query: str) -> np.ndarray:
        """float64 [n_texts]; 0 for a text that shares no word with the query."""
        made = np.zeros(self._n)
        for word, n_asked in Counter(words(query)).items():
            found = self._postings.get(word, ())
            idf = math.log1p((self._n - len(found) + 0.5) / (len(found) + 0.5))
            for i, n in found:
                made[i] += n_asked * idf * n * (K1 + 1) / (n + self._norms[i])
        return made
