from __future__ import annotations

import numpy as np
import pytest

from longreach.core.errors import NumericalError, SamplingError
from longreach.workers.detokenizer import Detokenizer
from longreach.workers.sampling import Sampling, sample, uniform


def test_greedy_takes_the_best_and_the_lower_id_of_equals() -> None:
    logits = np.array([0.0, 3.0, 3.0, 1.0], dtype=np.float32)
    assert sample(logits, Sampling(), position=5) == 1


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    assert uniform(1, 7) == uniform(1, 7)
    assert len({uniform(s, p) for s in (1, 2, -1) for p in range(50)}) == 150
    draws = np.array([uniform(3, p) for p in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert ((draws >= 0) & (draws < 1)).all()


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    counts = np.zeros(3)
    for position in range(6000):
        counts[sample(logits, Sampling(temperature=1.0, seed=9), position)] += 1
    assert np.abs(counts / 6000 - [0.5, 0.3, 0.2]).max() < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    seen = {sample(logits, Sampling(temperature=1.0, top_p=0.6, seed=1), p) for p in range(300)}
    assert seen == {0, 1}
    tiny = {sample(logits, Sampling(temperature=1.0, top_p=0.01), p) for p in range(100)}
    assert tiny == {0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_row(bad: float) -> None:
    logits = np.array([0.0, bad], dtype=np.float32)
    with pytest.raises(NumericalError, match="position 12"):
        sample(logits, Sampling(), position=12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("n", 2),
    ],
)
def test_absurd_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=field):
        Sampling.parse({field: value})


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_is_held_back_until_a_character_is_complete() -> None:
    detokenizer = Detokenizer(Bytes())
    deltas = [detokenizer.push(b) for b in "aé漢b".encode()]
    assert "".join(deltas) == "aé漢b" == detokenizer.text
    assert deltas[1] == ""


def test_a_stop_string_ends_the_text_before_it_even_across_tokens() -> None:
    detokenizer = Detokenizer(Bytes(), stop=("END",))
    for b in b"abcENDdef":
        detokenizer.push(b)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped
    assert detokenizer.text == "abc"
