"""Names of pages: equal exactly when the bytes they stand for are equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.core.errors import InvalidInput
from longreach.core.page_key import ROOT_KEY, Recipe, page_keys, private_recipe, prompt_keys

RECIPE = Recipe(
    model_fingerprint="model",
    tokenizer_fingerprint="tokenizer",
    kv_dtype="float32",
    n_layers=30,
    n_kv_heads=3,
    head_dim=64,
    page_tokens=16,
    attention_fingerprint="attention",
    rope_fingerprint="rope",
)
CHANGED = {
    "model_fingerprint": "other",
    "tokenizer_fingerprint": "other",
    "kv_dtype": "float16",
    "n_layers": 31,
    "n_kv_heads": 4,
    "head_dim": 128,
    "page_tokens": 32,
    "attention_fingerprint": "other",
    "rope_fingerprint": "other",
    "device_class": "cuda",
    "kernel_revision": RECIPE.kernel_revision + 1,
    "retriever_fingerprint": "other",
    "tenant": "alice",
}
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=120)


@given(TOKENS, st.data())
def test_a_changed_token_changes_this_and_all_later_keys_only(
    tokens: list[int], data: st.DataObject
) -> None:
    fingerprint = RECIPE.fingerprint()
    keys = page_keys(tokens, fingerprint, 16)
    at = data.draw(st.integers(0, len(tokens) - 1))
    tokens[at] ^= data.draw(st.integers(1, 2**32 - 1))
    changed = page_keys(tokens, fingerprint, 16)
    first = at // 16
    assert changed[:first] == keys[:first]
    assert not set(changed[first:]) & set(keys[first:])


@given(TOKENS, st.integers(0, 6))
def test_a_chain_continues_from_any_page(tokens: list[int], n_pages: int) -> None:
    fingerprint = RECIPE.fingerprint()
    keys = page_keys(tokens, fingerprint, 16)
    n_pages = min(n_pages, len(keys))
    parent = keys[n_pages - 1] if n_pages else ROOT_KEY
    assert page_keys(tokens[n_pages * 16 :], fingerprint, 16, parent) == keys[n_pages:]


@pytest.mark.parametrize(("n_tokens", "n_keys"), [(0, 0), (15, 0), (16, 1), (17, 1), (48, 3)])
def test_only_full_pages_have_names(n_tokens: int, n_keys: int) -> None:
    keys = page_keys(range(n_tokens), RECIPE.fingerprint(), 16)
    assert len(keys) == n_keys == len(set(keys))
    assert all(len(key) == 32 for key in keys)


def test_equal_pages_at_different_places_have_different_names() -> None:
    assert len(set(page_keys([5] * 64, RECIPE.fingerprint(), 16))) == 4


def test_every_field_of_the_recipe_changes_every_key() -> None:
    assert set(CHANGED) == set(Recipe.model_fields), "a new field needs a line in CHANGED"
    tokens = list(range(64))
    seen = set(page_keys(tokens, RECIPE.fingerprint(), 16))
    for field, value in CHANGED.items():
        recipe = RECIPE.model_copy(update={field: value})
        keys = set(page_keys(tokens, recipe.fingerprint(), 16))
        assert not keys & seen, field
        seen |= keys


def test_fields_cannot_trade_places() -> None:
    swapped = RECIPE.model_copy(
        update={"model_fingerprint": "tokenizer", "tokenizer_fingerprint": "model"}
    )
    assert swapped.fingerprint() != RECIPE.fingerprint()


def test_private_recipes_belong_to_their_row() -> None:
    shared = RECIPE.fingerprint()
    mine, yours = private_recipe(shared, "row-1"), private_recipe(shared, "row-2")
    assert len({shared, mine, yours}) == 3
    assert mine == private_recipe(shared, "row-1")
    other = RECIPE.model_copy(update={"tenant": "alice"}).fingerprint()
    assert mine != private_recipe(other, "row-1")


@pytest.mark.parametrize("dtype", ["<u4", ">u4", "<i8", "<u2", ">i4"])
def test_names_do_not_depend_on_how_the_numbers_are_held(dtype: str) -> None:
    fingerprint = RECIPE.fingerprint()
    tokens = list(range(100, 148))
    assert page_keys(np.array(tokens, dtype), fingerprint, 16) == page_keys(tokens, fingerprint, 16)


@pytest.mark.parametrize(
    "tokens", [[-1] * 16, [2**32] * 16, np.full(16, -1, np.int64), [0.5] * 16, [True] * 16]
)
def test_numbers_that_would_wrap_around_are_refused(tokens: list[int]) -> None:
    with pytest.raises(InvalidInput, match="token ids"):
        page_keys(tokens, RECIPE.fingerprint(), 16)


def test_golden_values() -> None:
    """Names are shared between releases and machines: a change here orphans every stored page."""
    assert RECIPE.fingerprint().hex() == GOLDEN_RECIPE
    keys = page_keys(range(32), RECIPE.fingerprint(), 16)
    assert [key.hex() for key in keys] == GOLDEN_KEYS
    asked = prompt_keys(range(32), 16, 8, RECIPE.fingerprint(), 16)
    assert [key.hex() for key in asked] == [GOLDEN_KEYS[0], GOLDEN_QUESTION]


GOLDEN_RECIPE = "e0a78d1b57f24e279ef7f1a3b0b23850196c320d351de3d241bbd9254a3f9a1b"
GOLDEN_QUESTION = "8952da6c54c15d780483763fb15581d1e9d3d0608190308b6021dbb89167fbe1"
GOLDEN_KEYS = [
    "4f184cd858b45618ec9f6ee11a347eac59c6f10081abf69ffa7e083129c067b9",
    "37c2b9446dbfd2e90dc81842c13d7ace91ff4448a761a625deac944979a62282",
]


def test_a_questions_pages_bear_their_own_names() -> None:
    recipe, tokens = RECIPE.fingerprint(), list(range(200))
    whole = page_keys(tokens, recipe, 16)
    assert prompt_keys(tokens, 200, 16, recipe, 16) == whole
    mine = prompt_keys(tokens, 64, 16, recipe, 16)
    assert mine[:4] == whole[:4]
    assert len(mine) == len(whole)
    assert not set(mine[4:]) & set(whole)
    for other in (prompt_keys(tokens, 64, 8, recipe, 16), prompt_keys(tokens, 80, 16, recipe, 16)):
        assert not set(mine[5:]) & set(other)
    assert prompt_keys(tokens[:10], 0, 16, recipe, 16) == []
    # a page that holds the end of the context and the question belongs to the question
    assert prompt_keys(tokens, 64, 16, recipe, 48)[:1] == page_keys(tokens, recipe, 48)[:1]
    assert prompt_keys(tokens, 64, 16, recipe, 48)[1] != page_keys(tokens, recipe, 48)[1]
