"""The material that synthetic tasks are made of: made-up words and sentences, numbers, and small changes to them.

A model that has seen a name before can learn the name; from made-up ones it can only learn to compare.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from random import Random


def split(text: str, separator: str = " ") -> list[str]:
    """Entries of a text that is wrapped over lines."""
    return [entry.strip() for entry in text.replace("\n", " ").split(separator) if entry.strip()]


CAPITALS = [
    entry.split(": ")
    for entry in split(
        """
France: Paris; Japan: Tokyo; Italy: Rome; Spain: Madrid; Egypt: Cairo; Kenya: Nairobi; Peru: Lima; Cuba: Havana;
Norway: Oslo; Poland: Warsaw; Greece: Athens; Chile: Santiago; India: New Delhi; Russia: Moscow; Canada: Ottawa;
Turkey: Ankara; Iran: Tehran; Vietnam: Hanoi; Thailand: Bangkok; Austria: Vienna; Hungary: Budapest; Ireland:
Dublin; Portugal: Lisbon; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen; Brazil: Brasilia; Mexico:
Mexico City; Morocco: Rabat; Nepal: Kathmandu
""",
        ";",
    )
]
"""Country and capital: real names beside the made-up ones, since callers ask about real ones."""

SYLLABLES = split("""
ba be bi bo bu da de di do du fa fe fi ga ge go ha he hi ka ke ko la le li lo lu ma me mi mo mu na ne ni no nu pa pe
po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we wi za ze zo sha cha tha bri cro dra ster ton ville
land mont ing er an on
""")

HAN_CHARACTERS = (
    "北南东西海山江河湖林田石白黄青安平宁州阳春秋云龙泉金玉长新古大小天地明华光木水火土风雪花叶城村镇桥港岛"
)
"""Frequent in names of places; the tokenizer has a piece of its own for most of them."""

ENGLISH_WORDS = split("""
the of and to in is that it for was on are as with they be at one have this from by hot word but what some we can
out other were all there when up use your how said an each she which do their time if will way about many then them
write would like so these her long make thing see him two has look more day could go come did number sound no most
people my over know water than call first who may down side been now find any new work part take get place made live
where after back little only round man year came show every good me give our under name very through just form
sentence great think say help low line differ turn cause much mean before move right boy old too same tell does set
three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near
build self earth father
""")

_NUMBER = re.compile(r"\$?(0|[1-9][\d,]*)(\.\d+)?")
_PARTS = re.compile(r"[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+\s*|\s+")
"""A Han character or full-width mark, a word with the space after it, or space."""


def name(rng: Random, zh: bool = False) -> str:
    """A made-up name, in one script or the other."""
    length = rng.choice((2, 2, 3))
    if zh:
        return "".join(rng.choice(HAN_CHARACTERS) for _ in range(length))
    return "".join(rng.choice(SYLLABLES) for _ in range(length)).capitalize()


def han(rng: Random, fewest: int, most: int) -> str:
    """Han characters that mean nothing."""
    return "".join(rng.choice(HAN_CHARACTERS) for _ in range(rng.randint(fewest, most)))


def words(rng: Random, fewest: int, most: int) -> str:
    """English words in any order."""
    return " ".join(rng.choice(ENGLISH_WORDS) for _ in range(rng.randint(fewest, most)))


def sentence(rng: Random, fewest: int = 3, most: int = 12) -> str:
    """English words that look like a sentence, with a number or a name now and then."""
    parts = words(rng, fewest, most).split()
    if rng.random() < 0.5:
        parts.insert(rng.randint(0, len(parts)), number(rng))
    if rng.random() < 0.3:
        parts.insert(rng.randint(0, len(parts)), name(rng))
    text = " ".join(parts)
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", "!", "?"))


def number(rng: Random) -> str:
    """A number as answers have them: mostly of two or three digits, some with a point or a currency."""
    kind = rng.random()
    if kind < 0.35:
        return str(rng.randint(0, 99))
    if kind < 0.6:
        return str(rng.randint(100, 999))
    if kind < 0.75:
        return str(rng.randint(1000, 99999))
    if kind < 0.85:
        return f"{rng.randint(1, 999)}.{rng.randint(1, 99)}"
    if kind < 0.92:
        return f"${rng.randint(1, 2000)}"
    return str(rng.randint(1, 99) * 10)


def perturb(rng: Random, text: str) -> str:
    """Another number than `text`, mostly one that is hard to tell from it: a digit changed, added, lost or moved."""
    value = _value(text)
    for _ in range(50):
        other = _change_digit(rng, text)
        if other != text and _NUMBER.fullmatch(other) and (value is None or _value(other) != value):
            return other
    return text + "1"


def other_than(text: str, make: Callable[[], str]) -> str:
    """What `make` makes, the first time that it is not `text`."""
    while (other := make()) == text:
        pass
    return other


def parts_of(text: str) -> list[str]:
    """Words with the space after them, or Han characters: put together they are the text."""
    return _PARTS.findall(text)


def edit(rng: Random, text: str, share: float, other: str) -> str:
    """`text` with about that share of its words, or Han characters, replaced by `other`'s, lost, or followed by one."""
    strangers = parts_of(other) or ["x "]
    edited: list[str] = []
    for part in parts_of(text):
        if rng.random() >= share:
            edited.append(part)
            continue
        kind = rng.random()
        if kind < 0.55:
            edited.append(rng.choice(strangers))
        elif kind >= 0.8:
            edited += [part, rng.choice(strangers)]
    return "".join(edited)


def _change_digit(rng: Random, text: str) -> str:
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    if not digits:
        return number(rng)
    characters = list(text)
    place, kind = rng.choice(digits), rng.random()
    if kind < 0.5:
        characters[place] = rng.choice(string.digits)
    elif kind < 0.62:
        characters.insert(place, rng.choice(string.digits))
    elif kind < 0.74 and len(digits) > 1:
        del characters[place]
    elif kind < 0.84 and len(digits) > 1:
        second = rng.choice(digits)
        characters[place], characters[second] = characters[second], characters[place]
    else:
        return number(rng)
    return "".join(characters)


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None
