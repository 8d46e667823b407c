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
    Fact("The captain of the Silver Heron was named", "Osric Valdemar", "Who was the captain?"),
    Fact("The password of the night watch is", "purple walnut", "What is the password?"),
    Fact("The combination of the iron safe is", "71-04-36", "What is the combination of the safe?"),
    Fact("The youngest member of the choir was", "Philippa Grange", "Who was the youngest singer?"),
    Fact(
        "The telephone number of the ferry office is",
        "555-8042",
        "What is the telephone number of the ferry office?",
    ),
    Fact("The favourite horse of the queen was called", "Thunderbell", "Which horse was it?"),
    Fact(
        "The treasure of the abbey was buried beneath",
        "the crooked sundial",
        "Where was the treasure of the abbey buried?",
    ),
    Fact(
        "The inventor of the glass violin was", "Casimir Dunlop", "Who invented the glass violin?"
    ),
    Fact(
        "The mountain hut at the pass is owned by",
        "the Brotherhood of Lanterns",
        "Who owns the mountain hut at the pass?",
    ),
    Fact("The licence plate of the stolen van was", "KRT 4907", "What was the licence plate?"),
    Fact("The secret name of the river spirit is", "Mirabelle", "What is the secret name?"),
    Fact("The train to Kestrel Bay leaves from platform", "29", "From which platform?"),
    Fact(
        "The winner of the chess tournament was",
        "Leopold Finch",
        "Who won the chess tournament?",
    ),
    Fact(
        "The missing painting was found inside",
        "a grandfather clock",
        "Where was the missing painting found?",
    ),
    Fact("The code name of the expedition was", "Operation Marmalade", "What was the code name?"),
    Fact(
        "The first woman to cross the desert alone was",
        "Harriet Okonkwo",
        "Who was the first woman to cross the desert alone?",
    ),
    Fact("The rarest stamp in the album shows", "a blue flamingo", "What does the stamp show?"),
    Fact("The ship's cat answered to the name of", "Admiral Biscuit", "What was the cat's name?"),
    Fact(
        "The recipe for the royal pudding requires exactly",
        "seventeen quinces",
        "What does the royal pudding require?",
    ),
    Fact(
        "The observatory on the hill was founded by",
        "Professor Zelinka",
        "Who founded the observatory?",
    ),
    Fact("The flight to Port Amber has the number", "XQ 318", "What is the flight number?"),
    Fact("The gardener's daughter married", "a clockmaker from Trieste", "Whom did she marry?"),
    Fact("The village of Nettlecombe is famous for its", "giant radishes", "Famous for what?"),
    Fact("The duke's letters were signed with the word", "Nightingale", "How were they signed?"),
    Fact(
        "The largest bell of the monastery is known as",
        "Old Marigold",
        "What is the largest bell of the monastery called?",
    ),
    Fact("The dragon in the puppet play is called", "Fizzlewick", "What is the dragon called?"),
    Fact(
        "The shipwreck off Cape Sorrow was discovered by",
        "Ignatius Thorne",
        "Who discovered the shipwreck?",
    ),
    Fact("The key to the map room hangs behind", "the stuffed owl", "Where does the key hang?"),
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
