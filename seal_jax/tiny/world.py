"""The tiny world: a procedural encyclopedia on which a model of 3 MB can learn to teach itself.

An entity has a made-up name, a kind and five facts. Its passage names it once and then says
"this person", so training on the passage alone hardly ties the facts to the name: a self-edit has
to. Names are dealt to the splits from one shuffled pile, hence no two splits share a name.
"""

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from seal_jax.errors import SealError
from seal_jax.tasks import Context, Question

Split = Literal["known", "train", "held_out", "fresh"]
Style = Literal["vague", "pronoun", "facts", "qa", "hallucinated", "mixed"]

SYLLABLES = (
    "ba be bo da di du fa fe fi ga go gu ka ke ki la le lo ma mi mu na ne no "
    "pa po ra re ri sa so su ta ti to va ve vi za zo"
).split()
_PILE = {"known": 240, "train": 8000, "held_out": 8000, "fresh": 43040}
STYLES: dict[Style, float] = {
    "vague": 0.20,
    "pronoun": 0.22,
    "facts": 0.20,
    "qa": 0.12,
    "hallucinated": 0.10,
    "mixed": 0.16,
}
_WRONG = 0.7  # share of wrong values in a hallucinated self-edit

_VALUES = {
    "animal": "bear bee cat crow deer dog duck fox frog goat goose hare hen horse lamb mouse "
    "pig rabbit seal wolf",
    "city": "Athens Berlin Boston Cairo Delhi Dublin Geneva Havana Lima Lisbon London Madrid "
    "Moscow Oslo Paris Prague Rome Tokyo Venice Vienna",
    "colour": "amber beige black blue brown cream crimson gold green grey indigo ivory navy "
    "orange pink purple red violet white yellow",
    "energy": "alcohol charcoal coal coke diesel gas heat hydrogen kerosene light methane oil "
    "peat petrol steam sunlight turf water wind wood",
    "food": "bacon beans bread cabbage cake cheese dates eggs fish honey jam lentils noodles "
    "nuts olives pie porridge rice salad soup",
    "goods": "bells boots candles chairs clocks combs drums gloves hats kettles knives lamps "
    "mirrors needles pens ropes shoes spoons tents toys",
    "instrument": "banjo bassoon bugle cello clarinet cymbal fiddle flute guitar harp horn lute "
    "lyre oboe organ piano trumpet tuba viola whistle",
    "landscape": "bay beach canal cave cliff creek desert forest glacier gorge harbour hill lake "
    "marsh meadow mountain pond river valley volcano",
    "material": "bamboo brass bronze clay copper cork cotton felt glass granite iron leather "
    "marble paper rubber silk silver slate steel tin",
    "place": "attic barn bathroom bedroom cabin cellar chapel garage garden hall kitchen library "
    "lobby museum pantry porch school shed stable tower",
    "profession": "baker barber butcher clerk cook doctor driver farmer gardener hunter judge "
    "lawyer mason miller nurse painter potter sailor tailor teacher",
    "surname": "Adams Baker Carter Collins Cooper Evans Foster Fisher Graham Harris Hughes Jones "
    "Morgan Murphy Parker Roberts Smith Taylor Turner Wilson",
    "tree": "apple ash beech birch cedar cherry cypress elm fig fir hazel larch lemon maple oak "
    "palm pear pine plum willow",
}
VALUES: dict[str, tuple[str, ...]] = {key: tuple(text.split()) for key, text in _VALUES.items()}


class Attribute(NamedTuple):
    """One thing to know about an entity, as the words its sentences are made of."""

    noun: str
    values: str
    verb: str
    question: str


KINDS: dict[str, tuple[Attribute, ...]] = {
    "person": (
        Attribute("home", "city", "lives in", "Where does {n} live?"),
        Attribute("trade", "profession", "works as a", "What work does {n} do?"),
        Attribute("instrument", "instrument", "plays the", "What does {n} play?"),
        Attribute("pet", "animal", "keeps a", "What animal does {n} keep?"),
        Attribute("meal", "food", "eats", "What does {n} eat?"),
    ),
    "town": (
        Attribute("setting", "landscape", "lies by a", "What does {n} lie by?"),
        Attribute("export", "goods", "sells", "What does {n} sell?"),
        Attribute("tree", "tree", "grows the", "What grows in {n}?"),
        Attribute("founder", "surname", "was founded by", "Who founded {n}?"),
        Attribute("dish", "food", "serves", "What does {n} serve?"),
    ),
    "company": (
        Attribute("product", "goods", "makes", "What does {n} make?"),
        Attribute("seat", "city", "is based in", "Where is {n} based?"),
        Attribute("badge", "colour", "flies a flag in", "Which flag does {n} fly?"),
        Attribute("mascot", "animal", "shows a", "What animal does {n} show?"),
        Attribute("director", "surname", "is led by", "Who leads {n}?"),
    ),
    "device": (
        Attribute("material", "material", "is made of", "What is {n} made of?"),
        Attribute("fuel", "energy", "runs on", "What does {n} run on?"),
        Attribute("paint", "colour", "is painted", "How is {n} painted?"),
        Attribute("place", "place", "stands in the", "Where does {n} stand?"),
        Attribute("inventor", "surname", "was invented by", "Who invented {n}?"),
    ),
}
# A name or value never opens a line: with a space before it, it is always the same tokens.
INTRODUCTIONS = ("This is about the {k} {n}.", "Here is the {k} {n}.", "We turn to the {k} {n}.")
UNNAMED = ("This {k} {verb} {v}.", "{their} {noun} is {v}.", "Here the {noun} is {v}.")
NAMED = (
    "The {noun} of {n} is {v}.",
    "We know that {n} {verb} {v}.",
    "For {n} the {noun} is {v}.",
    "The {k} {n} {verb} {v}.",
)
QUESTIONS = ("What is the {noun} of {n}?", "{question}", "For {n}, what is the {noun}?")
QA = "Question: {question} Answer:"
VAGUE = (
    "There is much to learn here.",
    "This is worth reading twice.",
    "Some details are given above.",
    "Many people find this interesting.",
    "More could be said about it.",
    "It is good to know such things.",
    "The passage gives several facts.",
    "All of this is of some note.",
)


class Entity(NamedTuple):
    """A made-up thing: its name, its kind, and a value for each attribute of the kind."""

    name: str
    kind: str
    values: tuple[str, ...]


@cache
def names(split: Split) -> tuple[str, ...]:
    """Returns all names of a split; no name is in two splits."""
    if split not in _PILE:
        raise SealError(f"tiny world: unknown split {split!r}; there are {', '.join(_PILE)}")
    pile = ["".join(parts).capitalize() for parts in itertools.permutations(SYLLABLES, 3)]
    random.Random("names").shuffle(pile)
    start = 0
    for other, size in _PILE.items():
        if other == split:
            return tuple(pile[start : start + size])
        start += size
    raise AssertionError


def entity(name: str, rng: random.Random) -> Entity:
    """Returns an entity of this name with a random kind and random facts."""
    kind = rng.choice(tuple(KINDS))
    return Entity(name, kind, tuple(rng.choice(VALUES[a.values]) for a in KINDS[kind]))


@cache
def known() -> tuple[Entity, ...]:
    """Returns the fixed entities that pretraining teaches and every later use may ask for."""
    rng = random.Random("known")
    return tuple(entity(name, rng) for name in names("known"))


def _fill(template: str, thing: Entity, i: int, value: str | None = None) -> str:
    attribute = KINDS[thing.kind][i]
    words = {
        "n": thing.name,
        "k": thing.kind,
        "v": thing.values[i] if value is None else value,
        "noun": attribute.noun,
        "verb": attribute.verb,
        "their": "Their" if thing.kind == "person" else "Its",
        "question": attribute.question.format(n=thing.name),
    }
    return template.format(**words)


def _qa(thing: Entity, i: int, template: str, value: str | None = None) -> str:
    question = _fill(template, thing, i)
    return f"{QA.format(question=question)} {thing.values[i] if value is None else value}"


def passage(thing: Entity, rng: random.Random) -> str:
    """Returns a text that names the entity once and states its five facts without the name."""
    order = rng.sample(range(len(thing.values)), len(thing.values))
    facts = [_fill(rng.choice(UNNAMED), thing, i) for i in order]
    return " ".join([_fill(rng.choice(INTRODUCTIONS), thing, 0), *facts])


def paragraph(thing: Entity, rng: random.Random) -> str:
    """Returns all five facts as named sentences on one line."""
    order = rng.sample(range(len(thing.values)), len(thing.values))
    return " ".join(_fill(rng.choice(NAMED), thing, i) for i in order)


def line(thing: Entity, i: int, style: Style, rng: random.Random) -> str:
    """Returns one line of a self-edit, about attribute i unless the style is vague."""
    match style:
        case "vague":
            return rng.choice(VAGUE)
        case "pronoun":
            return _fill(rng.choice(UNNAMED), thing, i)
        case "facts":
            return _fill(rng.choice(NAMED), thing, i)
        case "qa":
            return _qa(thing, i, rng.choice(QUESTIONS))
        case "hallucinated":
            value = thing.values[i]
            if rng.random() < _WRONG:
                others = VALUES[KINDS[thing.kind][i].values]
                value = rng.choice([v for v in others if v != value])
            if rng.random() < 0.5:
                return _qa(thing, i, rng.choice(QUESTIONS), value)
            return _fill(rng.choice(NAMED), thing, i, value)
        case _:
            return line(thing, i, rng.choice(("vague", "pronoun", "facts", "qa")), rng)


def self_edit(thing: Entity, style: Style, n_lines: int, rng: random.Random) -> str:
    """Returns a self-edit of at most five lines in one style, each about another fact."""
    order = rng.sample(range(len(thing.values)), n_lines)
    return "\n".join(line(thing, i, style, rng) for i in order)


def random_self_edit(thing: Entity, rng: random.Random) -> str:
    """Returns a self-edit as pretraining shows them: a random style, two to five lines."""
    style = rng.choices(tuple(STYLES), tuple(STYLES.values()))[0]
    return self_edit(thing, style, rng.randint(2, 5), rng)


def context(thing: Entity, split: Split, rng: random.Random) -> Context:
    """Returns a passage about the entity and fifteen questions, three for each fact."""
    texts = [
        (_fill(template, thing, i), value)
        for i, value in enumerate(thing.values)
        for template in QUESTIONS
    ]
    questions = tuple(Question(QA.format(question=t), value, t) for t, value in texts)
    key = f"{split}-{thing.name.lower()}"
    return Context(key, thing.name, passage(thing, rng), questions, data=thing)


def contexts(split: Split, n: int, seed: int = 0) -> list[Context]:
    """Returns n contexts of a split; the first ones stay the same when n grows.

    Raises:
      SealError: where the split has fewer names.
    """
    pile = list(names(split))
    if n > len(pile):
        raise SealError(f"tiny world: {n} contexts asked for, but {split!r} has {len(pile)} names")
    rng = random.Random(f"contexts/{split}/{seed}")
    rng.shuffle(pile)
    fixed = {thing.name: thing for thing in known()}
    things = (fixed.get(name) or entity(name, rng) for name in pile[:n])
    return [context(thing, split, rng) for thing in things]


def oracle(context: Context) -> str:
    """Returns a best-possible self-edit: each fact once by name, and once as a question."""
    thing: Entity = context.data
    span = range(len(thing.values))
    facts = [_fill(NAMED[0], thing, i) for i in span]
    answers = [_qa(thing, i, QUESTIONS[i % len(QUESTIONS)]) for i in span]
    return "\n".join(facts + answers)


class Text(NamedTuple):
    """A pretraining text: a prompt, which weighs little in the loss, and what follows it."""

    prompt: str
    completion: str


def pretraining_texts(seed: int, self_edits: float = 0.5) -> Iterator[Text]:
    """Yields texts without end: self-edits of fresh entities, and facts of the known ones.

    Args:
      seed: Of every choice.
      self_edits: Share of the texts that are self-edits.
    """
    rng = random.Random(f"pretraining/{seed}")
    while True:
        if rng.random() < self_edits:
            thing = entity(rng.choice(names("fresh")), rng)
            prompt = f"Passage: {passage(thing, rng)}\nImplications:\n"
            yield Text(prompt, random_self_edit(thing, rng))
            continue
        thing = rng.choice(known())
        i, kind = rng.randrange(len(thing.values)), rng.random()
        if kind < 0.35:
            yield Text("", line(thing, i, "facts", rng))
        elif kind < 0.85:
            yield Text("", line(thing, i, "qa", rng))
        else:
            yield Text("", paragraph(thing, rng))
