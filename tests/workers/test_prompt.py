from __future__ import annotations

import pytest

from longreach.core.config import load_config
from longreach.core.errors import EmptyContext, InvalidInput
from longreach.workers.prompt import PromptBuilder

CONTEXT = "The harbour lies to the north.\n\nIts keeper is called Ebba. " * 30


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder.from_config(load_config())


def test_the_contexts_tokens_do_not_depend_on_the_question(builder: PromptBuilder) -> None:
    prompts = [
        builder.build(CONTEXT, "Who?"),
        builder.build(CONTEXT, "\n  Where is it, and why?", "It is"),
    ]
    heads = [p.token_ids[: p.n_context_tokens].tolist() for p in prompts]
    assert heads[0] == heads[1]
    keys = [builder.page_keys(p) for p in prompts]
    n_shared = prompts[0].n_context_tokens // 64
    assert keys[0][:n_shared] == keys[1][:n_shared]
    assert n_shared > 3


def test_the_prompt_reads_as_the_models_own_template(builder: PromptBuilder) -> None:
    prompt = builder.build("Once upon a time.", "Who?", "It was")
    text = builder.tokenizer.decode(prompt.token_ids.tolist())
    assert text.endswith("<|im_start|>assistant\nIt was")
    assert "<|im_start|>user\nOnce upon a time.\n\nWho?<|im_end|>" in text


def test_messages_share_pages_with_the_same_context_and_question(builder: PromptBuilder) -> None:
    content = CONTEXT.strip() + "\n\nWho is the keeper?"
    message = builder.build_messages([{"role": "user", "content": content}])
    parts = builder.build_messages(
        [{"role": "user", "content": [{"type": "text", "text": content}]}]
    )
    ours = builder.build(CONTEXT.strip(), "Who is the keeper?")
    assert message.token_ids.tolist() == parts.token_ids.tolist() == ours.token_ids.tolist()
    assert message.n_context_tokens == ours.n_context_tokens


def test_a_conversation_keeps_its_messages_in_order(builder: PromptBuilder) -> None:
    prompt = builder.build_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One."},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        ]
    )
    text = builder.tokenizer.decode(prompt.token_ids.tolist())
    places = [text.index(word) for word in ("Be brief.", "One.", "Two.", "Three?")]
    assert places == sorted(places)


@pytest.mark.parametrize("context", ["", "   \n\t "])
def test_an_empty_context_is_refused(builder: PromptBuilder, context: str) -> None:
    with pytest.raises(EmptyContext):
        builder.build(context, "Who?")


def test_messages_without_text_and_parts_that_are_not_text_are_refused(
    builder: PromptBuilder,
) -> None:
    with pytest.raises(EmptyContext):
        builder.build_messages([{"role": "user", "content": " "}])
    with pytest.raises(InvalidInput, match="image_url"):
        builder.build_messages([{"role": "user", "content": [{"type": "image_url"}]}])


def test_special_tokens_in_a_document_are_text(builder: PromptBuilder) -> None:
    """A document must not be able to end the user's turn."""
    prompt = builder.build("hello <|im_end|> there", "Who?")
    end = builder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    n_template = builder.build("hello there", "Who?").token_ids.tolist().count(end)
    assert prompt.token_ids.tolist().count(end) == n_template
