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


FACTS = (
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
        "The youngest member of the choir was",
        "Philippa Grange",
        "Who was the youngest member of the choir?",
    ),
    Fact(
        "The telephone number of the ferry office is",
        "555-8042",
        "What is the telephone number of the ferry office?",
    ),
    Fact(
        "The first woman to cross the desert alone was",
        "Harriet Okonkwo",
        "Who was the first woman to cross the desert alone?",
    ),
    Fact(
        "The favourite horse of the queen was called",
        "Thunderbell",
        "What was the favourite horse of the queen called?",
    ),
    Fact(
        "The inventor of the glass violin was",
        "Casimir Dunlop",
        "Who was the inventor of the glass violin?",
    ),
    Fact(
        "The licence plate of the stolen van was",
        "KRT 4907",
        "What was the licence plate of the stolen van?",
    ),
    Fact(
        "The mountain hut at the pass is owned by",
        "the Brotherhood of Lanterns",
        "Who owns the mountain hut at the pass?",
    ),
    Fact(
        "The observatory on the hill was founded by",
        "Professor Zelinka",
        "Who founded the observatory on the hill?",
    ),
    Fact(
        "The winner of the chess tournament was",
        "Leopold Finch",
        "Who was the winner of the chess tournament?",
    ),
    Fact(
        "The flight to Port Amber has the number",
        "XQ 318",
        "What number has the flight to Port Amber?",
    ),
    Fact(
        "The ship's cat answered to the name of",
        "Admiral Biscuit",
        "To which name did the ship's cat answer?",
    ),
    Fact(
        "The shipwreck off Cape Sorrow was discovered by",
        "Ignatius Thorne",
        "Who discovered the shipwreck off Cape Sorrow?",
    ),
    Fact(
        "The locomotive of the Kestrel Bay line bears the number",
        "29461",
        "Which number does the locomotive of the Kestrel Bay line bear?",
    ),
    Fact(
        "The code name of the expedition was",
        "Operation Marmalade",
        "What was the code name of the expedition?",
    ),
    Fact(
        "The password of the smugglers was",
        "purple walnut",
        "What was the password of the smugglers?",
    ),
    Fact(
        "The comet of that summer was first seen by",
        "Beatrix Holloway",
        "Who first saw the comet of that summer?",
    ),
    Fact(
        "The lawyer's post office box bears the number",
        "6613",
        "Which number does the lawyer's post office box bear?",
    ),
    Fact(
        "The dragon in the puppet play is called",
        "Fizzlewick",
        "What is the dragon in the puppet play called?",
    ),
    Fact(
        "The largest bell of the monastery weighs",
        "8250 pounds",
        "How much does the largest bell of the monastery weigh?",
    ),
    Fact(
        "The soup of the pilots was first cooked by",
        "Tilda Osterberg",
        "Who first cooked the soup of the pilots?",
    ),
    Fact(
        "The divers named their yellow submarine",
        "Blue Pelican",
        "How did the divers name their yellow submarine?",
    ),
    Fact(
        "The secret name of the river spirit is",
        "Mirabelle",
        "What is the secret name of the river spirit?",
    ),
    Fact(
        "The duke signed his letters with the word",
        "Nightingale",
        "With which word did the duke sign his letters?",
    ),
    Fact(
        "The account number of the orphanage is",
        "40-7719",
        "What is the account number of the orphanage?",
    ),
    Fact(
        "The tallest giant of the old legend was known as",
        "Grumbold",
        "As what was the tallest giant of the old legend known?",
    ),
    Fact(
        "The architect of the spiral library was",
        "Ottoline Marsh",
        "Who was the architect of the spiral library?",
    ),
)

DOCUMENT_FACTS = tuple(FACTS[5 * i : 5 * i + 5] for i in range(4))
"""Five facts for each of the four documents."""

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
