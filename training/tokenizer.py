"""The tokenizer: byte-pair merges learnt until every word of our small world is one token.

Words that it has never seen fall apart into pieces and letters, so that any prompt can be encoded.
"""

import re
from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from safelatent.safety import CONCEPT
from training import corpus

POSITIONS = 64
FILLERS = (
    "the", "this", "that", "one", "some", "and", "or", "of", "to", "by", "for", "is", "very",
    "cute", "beautiful", "big", "small", "little", "old", "young", "red", "blue", "green",
    "yellow", "black", "white", "happy", "funny", "art", "digital", "painting", "style", "bright",
    "dark", "detailed", "portrait", "sitting", "standing", "holding", "looking", "quality", "best",
    "my", "your", "his", "her", "day", "sunny",
)  # fmt: skip
"""Everyday words without a meaning here: the text encoder learns to pass over them."""


def world_words() -> list[str]:
    """Every text of the world whose words must be whole tokens."""
    names = [*corpus.BENIGN, *corpus.UNSAFE, *corpus.CONTEXTS, *corpus.ITEMS, *corpus.CATEGORIES]
    return [
        *names,
        *corpus.PLACES.values(),
        *corpus.TEMPLATES,
        *FILLERS,
        CONCEPT,
        "an with without ,",
    ]


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent pair of neighbours, until no word has two pieces.

    Ties go to the alphabet: the same words must give the same tokens in every process.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for at in range(len(word) - 2, -1, -1):
                if (word[at], *word[at + 1 : at + 2]) == best:
                    word[at : at + 2] = ["".join(best)]
    return merges


def build() -> CLIPTokenizer:
    """A CLIPTokenizer of about a thousand tokens, the 256 bytes among them: nothing is unknown."""
    words = {word for text in world_words() for word in re.findall("[a-z]+|,", text)}
    merges = learn_merges(words)
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(letter + "</w>" for letter in letters),
    ]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)
