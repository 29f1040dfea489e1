"""How far the semantic cache can be trusted: what it finds again, and what it mixes up.

    python tests/benchmarks/similarity.py [--prompts 2000] [--seed 0]

ShareGPT prompts are put in other words that mean the same (*edits*: these should hit) and changed so that they mean
something else (*changes*: these must not), and each is compared with the prompt it was made of; *others* compares each
prompt with the nearest of all the others. By threshold of the cosine: the share of pairs that would hit by the vectors
alone, and with the words' consent (``serve/words.py``), which is what the gateway does. Last, the cosines of pairs of
single words: vectors do not know opposites from synonyms.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator

import numpy as np
from hydra import compose, initialize_config_dir

from selfspec import plan as plans
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.model.embedding import Meaning
from selfspec.run import CONF
from selfspec.serve.words import same, words

THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
SYNONYMS = {"show": "display", "make": "build", "write": "compose", "explain": "describe", "big": "large"}
SYNONYMS |= {"give": "provide", "help": "assist", "start": "begin", "need": "require", "best": "top", "list": "name"}
PAIRS = {
    "synonyms": "show display,write compose,big large,give provide,fast quick,buy purchase,error mistake,car auto",
    "opposites": "increase decrease,best worst,before after,buy sell,open close,more less,import export,add remove",
    "siblings": "French German,Python Java,summer winter,London Paris,red blue,Monday Friday,dog cat,Linux Windows",
    "inflections": "list lists,write writing,explain explained,story stories,function functions,company companies",
}


def edits(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    """The same in other words: (how, text)."""
    yield "lower case", text.lower()
    yield "please", f"Please {text[0].lower()}{text[1:]}"
    yield "thanks", f"{text.rstrip('.?! ')}. Thanks!"
    yield "punctuation", text.rstrip(".?! ") + ("" if text[-1] in ".?!" else ".")
    yield "article", re.sub(r"\b(a|the) ", "", text, count=1)
    yield "inflection", re.sub(r"\b([a-z]{4,}[^s\W])\b", r"\1s", text, count=1)
    said = text.split(" ")
    at = chance.randrange(len(said))
    if len(said[at]) > 3:
        letters = list(said[at])
        letters[1], letters[2] = letters[2], letters[1]
        yield "typo", " ".join([*said[:at], "".join(letters), *said[at + 1 :]])
    for at, word in enumerate(said):
        if word.lower() in SYNONYMS:
            yield "synonym", " ".join([*said[:at], SYNONYMS[word.lower()], *said[at + 1 :]])
            return


def changes(text: str, chance: random.Random, vocabulary: list[str]) -> Iterator[tuple[str, str]]:
    """Nearly the same words for something else: (how, text)."""
    said = text.split(" ")
    long = [at for at, word in enumerate(said) if word.isalpha() and len(word) > 4]
    if long:
        at = chance.choice(long)
        yield "another word", " ".join([*said[:at], chance.choice(vocabulary), *said[at + 1 :]])
    if len(long) > 1:
        one, two = chance.sample(long, 2)
        swapped = said[:]
        swapped[one], swapped[two] = said[two], said[one]
        yield "words swapped", " ".join(swapped)
    if number := re.search(r"\d+", text):
        yield "another number", text[: number.start()] + str(int(number[0]) + 1) + text[number.end() :]
    for plain, negated in ((" is ", " is not "), (" can ", " cannot "), (" do ", " do not ")):
        if plain in text:
            yield "negation", text.replace(plain, negated, 1)
            return


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = plans.make(compose("config", ["tracking=none"]))
    meaning, chance = Meaning(factory.weights(settings)), random.Random(options.seed)

    with workload.table(settings.workload).open(encoding="utf-8") as file:
        pool = [text for text in (json.loads(line)["prompt"] for line in file) if 10 < len(text) <= 1500]
    chance.shuffle(pool)
    base = pool[: options.prompts]
    vocabulary = sorted({word for text in base for word in text.split() if word.isalpha() and len(word) > 4})
    edited = [(k, how, other) for k, t in enumerate(base) for how, other in edits(t, chance) if other != t]
    changed = [(k, how, other) for k, t in enumerate(base) for how, other in changes(t, chance, vocabulary)]
    changed = [(k, how, other) for k, how, other in changed if other != base[k]]

    began = time.perf_counter()
    vectors = np.stack([meaning(text) for text in base])
    print(f"{len(base)} prompts, {1e6 * (time.perf_counter() - began) / len(base):.0f} us a vector")
    nearness = vectors @ vectors.T
    np.fill_diagonal(nearness, -1)
    nearest = [(k, "others", base[int(other)]) for k, other in enumerate(nearness.argmax(1))]

    def alike(a: str, b: str) -> float:
        return float(meaning(" " + a) @ meaning(" " + b))

    print("\npairs, number, then for each threshold: by vectors alone / with the words' consent")
    print("threshold", *(f"{threshold:g}" for threshold in THRESHOLDS), sep="\t")
    for title, pairs in (("edits", edited), ("changes", changed), ("others", nearest)):
        found = [(how, float(vectors[k] @ meaning(t)), same(words(base[k]), words(t), alike)) for k, how, t in pairs]
        for how in dict.fromkeys([title, *(how for how, *_ in found)]):
            mine = [(near, agreed) for h, near, agreed in found if how in (title, h)]
            shares = [
                (np.mean([n >= t for n, _ in mine]), np.mean([n >= t and a for n, a in mine])) for t in THRESHOLDS
            ]
            print(f"{how} ({len(mine)})", *(f"{alone:.4f} / {both:.4f}" for alone, both in shares), sep="\t")

    print("\ncosines of single words, sorted")
    for kind, listed in PAIRS.items():
        cosines = sorted(alike(*(word.lower() for word in pair.split())) for pair in listed.split(","))
        print(kind, " ".join(f"{cosine:.2f}" for cosine in cosines), sep="\t")


if __name__ == "__main__":
    main()
