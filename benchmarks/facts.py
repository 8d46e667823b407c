"""Facts to hide in long texts: each has a wording of its own and an answer that can be copied.

A small model is asked with the opening words of the fact's sentence as `answer_prefix`, so that
the answer shows whether the sentence was found, not whether the model can reason.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One sentence, its question, the opening words given to the model, and what must follow."""

    prefix: str
    answer: str
    question: str

    @property
    def sentence(self) -> str:
        return f"{self.prefix} {self.answer}."

    def found_in(self, text: str) -> bool:
        """Whether an answer holds the fact; case does not count."""
        return self.answer.lower() in text.lower()


DOCUMENT_FACTS = (
    (
        Fact(
            "The captain of the Silver Heron was named",
            "Osric Valdemar",
            "What was the captain of the Silver Heron named?",
        ),
        Fact(
            "The combination of the iron safe is",
            "71-04-36",
            "What is the combination of the iron safe?",
        ),
        Fact(
            "The code name of the expedition was",
            "Operation Marmalade",
            "What was the code name of the expedition?",
        ),
        Fact(
            "The favourite horse of the queen was called",
            "Thunderbell",
            "What was the favourite horse of the queen called?",
        ),
        Fact(
            "The licence plate of the stolen van was",
            "KRT 4907",
            "What was the licence plate of the stolen van?",
        ),
    ),
    (
        Fact(
            "The telephone number of the ferry office is",
            "555-8042",
            "What is the telephone number of the ferry office?",
        ),
        Fact(
            "The password of the smugglers was",
            "purple walnut",
            "What was the password of the smugglers?",
        ),
        Fact(
            "The parrot of the harbour master was called",
            "Captain Crackers",
            "What was the parrot of the harbour master called?",
        ),
        Fact(
            "The mountain hut at the pass is owned by",
            "the Brotherhood of Lanterns",
            "Who owns the mountain hut at the pass?",
        ),
        Fact(
            "The first woman to cross the desert alone was",
            "Harriet Okonkwo",
            "Who was the first woman to cross the desert alone?",
        ),
    ),
    (
        Fact(
            "The secret name of the river spirit is",
            "Mirabelle",
            "What is the secret name of the river spirit?",
        ),
        Fact(
            "The flight to Port Amber has the number",
            "XQ 318",
            "What number has the flight to Port Amber?",
        ),
        Fact(
            "The inventor of the glass violin was",
            "Casimir Dunlop",
            "Who was the inventor of the glass violin?",
        ),
        Fact(
            "The lawyer's post office box bears the number",
            "6613",
            "Which number does the lawyer's post office box bear?",
        ),
        Fact(
            "The secret tunnel begins behind",
            "the bakery oven",
            "Where does the secret tunnel begin?",
        ),
    ),
    (
        Fact(
            "The stolen crown was hidden in",
            "a barrel of pickles",
            "Where was the stolen crown hidden?",
        ),
        Fact(
            "The observatory on the hill was founded by",
            "Professor Zelinka",
            "Who founded the observatory on the hill?",
        ),
        Fact(
            "The largest bell of the monastery weighs",
            "8250 pounds",
            "How much does the largest bell of the monastery weigh?",
        ),
        Fact(
            "The favourite dish of the emperor was",
            "roasted chestnuts",
            "What was the favourite dish of the emperor?",
        ),
        Fact(
            "The sheepdog of the monastery was called",
            "Bartholomew",
            "What was the sheepdog of the monastery called?",
        ),
    ),
)
"""Five facts for each of the four documents: answers of different kinds (a person, a number, an
animal, a place, a word), because a small model takes one name for another in any text.

Chosen by dense attention alone, from 44 candidates: those that it found in texts of 1,200 and of
3,000 tokens. What is missed in a long text is then the long text's fault.
"""

FACTS = tuple(fact for facts in DOCUMENT_FACTS for fact in facts)

_ANIMALS = ("silver fox", "grey whale", "green beetle", "brown bear", "white stork", "red squirrel")


def magic_number(seed: int) -> Fact:
    """The classic needle: a number of five digits that nothing else in the text gives away."""
    rng = random.Random(seed)
    animal = _ANIMALS[seed % len(_ANIMALS)]
    return Fact(
        f"The magic number of the {animal} is",
        str(rng.randint(10_000, 99_999)),
        f"What is the magic number of the {animal}?",
    )
