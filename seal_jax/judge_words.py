"""Text as words that compare equal when they mean the same: stems, numbers, nationalities.

What stands between spaces is analysed once and remembered, so a text costs a look-up per word.
"""

import functools
import re
import unicodedata
from typing import NamedTuple


class Word(NamedTuple):
    """One word of a text.

    Attributes:
      stem: Equal for words that count as the same; the digits of a number.
      text: As written, in lower case and without accents.
      capital: Starts with a capital letter.
      stop: Carries no content of its own.
      number: Its value, or None.
      role: "scale" multiplies the number before it, "unit" adds to tens, "end" ends a sentence.
    """

    stem: str
    text: str
    capital: bool = False
    stop: bool = False
    number: float | None = None
    role: str = ""


STOP = frozenset(
    "a an the of in on at to for from by with as and or but is are was were be been being am do "
    "does did done has have had having it its this that these those he she they them his her their "
    "him i you we us our your my me who whom whose which what when where why how there here will "
    "would can could should may might must shall not no nor so than then too very also such into "
    "onto over under between among during about against through each any some both all more most "
    "other only own same if because while up down out off however approximately".split()
)
NEGATIONS = frozenset(
    "not no never none neither nor without cannot nothing nobody nowhere hardly unlikely".split()
)

_DIGITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
_DIGITS += " fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh"
_ORDINALS += " twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
NUMBERS: dict[str, float] = {
    **{word: float(i) for i, word in enumerate(_DIGITS.split())},
    **{word: float(i) for i, word in enumerate(_ORDINALS.split())},
    **{word: 10.0 * i for i, word in enumerate(_TENS.split(), 2)},
    "twentieth": 20.0,
    "once": 1.0,
    "twice": 2.0,
    "double": 2.0,
    "triple": 3.0,
    "half": 0.5,
    "dozen": 12.0,
}
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}

# A word, then the words that are taken for it: irregular forms, nationalities, abbreviations.
_SAME = """
america us usa american americans; britain uk british; england english; france french; scotland
scottish scots; germany german germans; greece greek greeks; netherlands dutch holland; spain
spanish spaniards; china chinese; poland polish poles; switzerland swiss; turkey turkish turks;
wales welsh; ireland irish; denmark danish danes; sweden swedish swedes; norway norwegian; finland
finnish; portugal portuguese; belgium belgian; japan japanese; russia russian russians; italy
italian italians; mexico mexican mexicans; canada canadian; prussia prussian prussians; austria
austrian austrians; egypt egyptian; rome roman romans; normandy norman normans; europe european
europeans; africa african africans; asia asian; australia australian; india indian indians; israel
israeli; iraq iraqi; iran iranian; persia persian; vietnam vietnamese; korea korean; thailand thai;
mongol mongolian mongols mongolia; jew jewish jews; catholic catholics catholicism; brazil
brazilian; argentina argentine; kenya kenyan; estonia estonian estonians; arab arabs arabic arabian;
color colour; center centre; theater theatre; defense defence; behavior behaviour; labor labour;
program programme; child children; man men; woman women; foot feet ft; wife wives; life lives live
living; write wrote written; make made; build built; give gave given; take took taken; lead led;
lose lost; win won; sell sold; buy bought; find found; hold held; leave left; die died death dead
dying; fight fought; break broke broken; grow grew grown growth; send sent; bring brought; think
thought; teach taught; choose chose chosen choice; begin began begun; run ran; rise rose risen; fall
fell fallen; speak spoke spoken speech; drive drove driven; wear wore worn; know knew known; keep
kept; see saw seen; get got; draw drew drawn; eat ate eaten; sing sang sung song; pay paid; mean
meant; become became; january jan; february feb; april apr; june jun; july jul; august aug;
september sept sep; october oct; november nov; december dec; kilometer km kilometre kilometres
kilometers; meter metre metres meters; mile mi miles; kilogram kg; pound lb lbs; television tv;
mount mt; saint st; doctor dr; general gen; year yrs; about approx; percent percentage; tuberculosis
tb; professor prof; government govt; large larger largest big bigger biggest; great greater
greatest; high higher highest height; low lower lowest; good better best; bad worse worst; early
earlier earliest; old older oldest; long longer longest length; strong stronger strength; wide width
"""
SAME = {
    form: group.split()[0] for group in _SAME.split(";") for form in group.split() if group.strip()
}

# The longest that fits goes, and what follows the colon comes, if four letters stay.
_SUFFIXES = {
    ending: rest
    for ending, _, rest in (
        part.partition(":")
        for part in """
ically:ic ational:ate fulness: iveness: ization:iz isation:iz ations:at ation:at ments: ment: ities:
ity: ness: ingly: edly: ising:iz izing:iz ised:iz ized:iz ise:iz ize:iz ating:at ated:at ates:at
ate:at ions: ion: ances: ance: ences: ence: ants: ant: ents: ent: ings: ing: ies:y ied:y ers: er:
ors: or: ists: ist: ism: ally: ly: als: al: ians: ian: ans: an: ous: ive: ic: ed: es: e: s: y:
""".split()
    )
}
_LONGEST = max(map(len, _SUFFIXES))
_TOKENS = re.compile(  # golds often lack an abbreviation's last period: D.C
    r"(?:[A-Za-z]\.)+[A-Za-z]\b\.?|[^\W\d_]+(?:'[^\W\d_]+)*"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:(?:st|nd|rd|th|s)\b)?"
    r"|[%$£€°]|[.!?;]$"
)
_ROMAN = re.compile(r"(?=[IVXL]{2})(?:XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_SIGNS = {"%": "percent", "$": "dollar", "£": "pound", "€": "euro", "°": "degree"}
_JOINING = frozenset(("scale", "unit"))
_END = Word("", "", stop=True, role="end")
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_QUOTES = str.maketrans("’‘–—−", "''---")


def words(text: str) -> list[Word]:
    """Returns the words of a text, sentence ends among them, numbers merged ("3 million")."""
    if not text.isascii():
        text = _FOREIGN.sub(lambda found: _without_accents(found[0]), text)
    found: list[Word] = []
    for line in text.split("\n"):
        for chunk in line.split():
            found += _analyse_chunk(chunk)
        found.append(_END)
    found.pop()
    if _JOINING.isdisjoint([word.role for word in found]):
        return found
    merged: list[Word] = []
    for word in found:
        before = merged[-1] if merged else None
        if before is None or before.number is None or word.role not in _JOINING:
            merged.append(word)
        elif word.role == "scale":
            merged[-1] = _number(before.number * word.number, before.text)
        elif before.role == "tens":
            merged[-1] = _number(before.number + word.number, before.text)
        else:
            merged.append(word)
    return merged


def stem(word: str) -> str:
    """Returns what a lower-case word shares with its relatives."""
    if word in SAME:
        return SAME[word]
    for size in range(_LONGEST, 0, -1):
        rest = _SUFFIXES.get(word[-size:])
        if rest is not None and len(word) - size + len(rest) >= 4:
            return word[:-size] + rest
    return word


@functools.lru_cache(200_000)
def trigrams(word: str) -> frozenset[str]:
    """Returns a word's runs of three letters, its ends marked."""
    marked = f"^{word}$"
    return frozenset(marked[i : i + 3] for i in range(len(marked) - 2))


@functools.lru_cache(200_000)
def similarity(one: str, other: str) -> float:
    """Returns twice the longest common subsequence of two words over their length."""
    masks: dict[str, int] = {}
    for i, letter in enumerate(one):
        masks[letter] = masks.get(letter, 0) | 1 << i
    full = state = (1 << len(one)) - 1  # a zero bit for each letter in common (bit-parallel)
    for letter in other:
        matched = state & masks.get(letter, 0)
        state = (state + matched | state - matched) & full
    return 2 * (len(one) - state.bit_count()) / (len(one) + len(other))


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.translate(_QUOTES))
    return "".join(c for c in decomposed if not unicodedata.combining(c))


@functools.lru_cache(200_000)
def _analyse_chunk(chunk: str) -> tuple[Word, ...]:
    """Returns the words of a text without spaces."""
    return tuple([_analyse(token) for token in _TOKENS.findall(chunk)])


@functools.lru_cache(200_000)
def _analyse(token: str) -> Word:
    if token in (".", "!", "?", ";"):
        return _END
    if token in _SIGNS:
        return Word(stem(_SIGNS[token]), _SIGNS[token])
    if token[0].isdecimal():  # other digits, such as those in circles, are no numbers to Python
        digits = token.rstrip("stndrh").replace(",", "")
        decade = token.endswith("s")
        return _number(float(digits), token, suffix="s" if decade else "")
    token = token.replace(".", "")
    lower = token.lower()
    if lower.endswith("n't"):
        return Word("not", "not", stop=True)
    if lower.endswith("'s"):
        lower, token = lower[:-2], token[:-2]
    lower = lower.replace("'", "")
    capital = token[0].isupper()
    if token.isupper() and _ROMAN.fullmatch(token):
        return _number(float(_roman(token)), lower)
    if lower in NUMBERS:
        value = NUMBERS[lower]
        role = "tens" if lower in _TENS.split() else "unit" if 0 < value < 10 else ""
        return _number(value, lower, role=role)
    if lower in SCALES:
        return _number(SCALES[lower], lower, role="scale")
    return Word(stem(lower), lower, capital, lower in STOP)


def _number(value: float, text: str, suffix: str = "", role: str = "") -> Word:
    return Word(f"{value:.10g}{suffix}", text, number=value, role=role)


def _roman(digits: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50}[digit] for digit in digits]
    pairs = zip(values, values[1:] + [0], strict=True)
    return sum(-value if value < following else value for value, following in pairs)
