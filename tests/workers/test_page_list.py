"""A list of pages that is also an array."""

from __future__ import annotations

import pytest

from longreach.workers.page_list import PageList


@pytest.mark.parametrize("first", [[], [4, 2, 9], list(range(40))])
def test_it_is_the_list_it_was_made_of_and_what_was_appended(first: list[int]) -> None:
    pages, want = PageList(first), list(first)
    for page_id in range(100, 150):
        assert list(pages) == pages.array.tolist() == want
        assert len(pages) == len(want)
        pages.append(page_id)
        want.append(page_id)
    assert pages[-1] == 149
    assert pages[3:7] == want[3:7]
    assert 120 in pages
    assert 150 not in pages
    with pytest.raises(IndexError):
        pages[len(want)]
    assert isinstance(pages[0], int)
