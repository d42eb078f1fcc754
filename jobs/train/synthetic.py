"""Synthetic tasks: groups of outputs, graded by how they relate to the reference.

Each task says in its docstring what it teaches. It gives (prompt, reference, graded outputs): a higher grade is better,
equal grades are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from words import CAPITALS, edit, han, name, number, other_than, parts_of, perturb, sentence, words

Graded = tuple[str, float]
Drawn = tuple[str, str, list[Graded]]

Piece = Callable[[Random, bool], str]
"""Cuts a piece out of some real text, Chinese if asked."""

Kind = Callable[[Random, Piece], Drawn]

MARKS = [
    ("A: ", "A: "),
    ("A: ", "A: "),
    ("A: ", "A: "),
    ("Answer: ", "Answer: "),
    ("The answer is ", "The answer is "),
    ("A: ", "Answer: "),
    ("A: ", "So the answer is "),
    ("答案：", "【答案】"),
    ("答案：", "【答案】 "),
    ("故选：", "【答案】"),
    ("答：", "答："),
    ("答案是", "答案是"),
]
"""What introduces the final answer in the reference, and in the outputs; repeated where it should be frequent."""

FACTS = (
    "capital",
    "capital",
    "author",
    "longest river",
    "largest city",
    "currency",
    "president",
    "founder",
    "main product",
)

ENGLISH_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CHINESE_NUMBERS = "零一二三四五六七八九十"

CUT_TOLERANCE = 0.12
"""A cut text is not compared with an edit that keeps as much of the reference, give or take this share of it."""


def tiny(rng: Random, piece: Piece) -> Drawn:
    """An answer alone, right or wrong: find the reference's tokens again in the output, in order."""
    reference_mark, mark = rng.choice(MARKS)
    kind = rng.random()
    if kind < 0.25:
        answer, wrong = _choices(rng, most=2)
    elif kind < 0.6:
        answer, wrong = _number(rng)
    else:
        answer, wrong = _name(rng, zh=kind >= 0.8)
    if rng.random() < 0.4:
        reference_mark = mark = ""
    end = rng.choice(("", ".", "。"))
    outputs = [(mark + answer + end, 1.0), *((mark + wrong() + end, 0.0) for _ in range(3))]
    return words(rng, 1, 4), reference_mark + answer + end, outputs


def final_answer(rng: Random, piece: Piece) -> Drawn:
    """The final answer decides, whatever the words before it: those of wrong outputs are often the reference's own."""
    reference_mark, mark = rng.choice(MARKS)
    zh = not reference_mark.isascii()
    kind = rng.random()
    if kind < (0.6 if zh else 0.12):
        answer, wrong = _choices(rng, most=3)
    elif kind < 0.9:
        answer, wrong = _number(rng)
    else:
        answer, wrong = _name(rng, zh)
    body = _working(rng, piece, zh)
    end = rng.choice(("", "", "", ".", " "))

    def output(final: str, same_words: float) -> str:
        words_before = body if rng.random() < same_words else _working(rng, piece, zh)
        return words_before + mark + final + end

    right = [(output(answer, 0.25), 1.0) for _ in range(2)]
    outputs = [*right, *((output(wrong(), 0.5), 0.0) for _ in range(2))]
    prompt = sentence(rng) if rng.random() < 0.7 else piece(rng, zh)
    return prompt, body + reference_mark + answer, outputs


def fact(rng: Random, piece: Piece) -> Drawn:
    """One fact in a few words: short beats wordy, hedging beats wrong, and anything on the matter beats noise."""
    return _chinese_fact(rng) if rng.random() < 0.35 else _english_fact(rng)


def count(rng: Random, piece: Piece) -> Drawn:
    """Letters of a word counted: the answer counts more than the count before it, and both more than brevity."""
    zh = rng.random() < 0.4
    word = name(rng).lower()
    letter = rng.choice(word)
    right = word.count(letter)
    wrong = rng.choice([value for value in range(1, 10) if value != right])
    prompt, reference, worked, short = (_count_in_chinese if zh else _count_in_english)(rng, word, letter, right)
    outputs = [
        (reference, 6.0),
        (worked(right, right), 5.0),
        (short(right), 4.0),
        (worked(right, wrong), 3.0),
        (worked(wrong, right), 3.0),
        (worked(wrong, wrong), 2.0),
        (short(wrong), 1.0),
    ]
    return prompt, reference, outputs


def listing(rng: Random, piece: Piece) -> Drawn:
    """A numbered list: the number asked for counts more than the items, and one item twice is one too few."""
    zh = rng.random() < 0.4
    size = rng.randint(2, 5)
    separator = rng.choice((" ", "\n", ", "))

    def item() -> str:
        if zh:
            return name(rng, zh=True) + name(rng, zh=True)[:2]
        return name(rng) if rng.random() < 0.5 else words(rng, 1, 3)

    def numbered(items: Sequence[str]) -> str:
        return separator.join(f"{place}. {text}" for place, text in enumerate(items, 1))

    items, others = [item() for _ in range(size)], [item() for _ in range(size)]
    changed = list(items)
    changed[rng.randrange(size)] = item()
    graded = [
        (items, 6.0),
        (changed, 5.0),
        (others, 4.0),
        ([*items, item()], 3.5),
        (items[:-1], 3.0),
        (others[:-1], 1.5),
        ([*others, item()], 1.0),
    ]
    if size > 2:  # of two, one twice is hardly a list
        graded += [([*items[:-1], items[0]], 2.5), ([*others[:-1], others[0]], 1.0)]
    prompt = f"列出{size}个{name(rng, zh=True)}" if zh else f"Give {size} {words(rng, 1, 2)}."
    return prompt, numbered(items), [(numbered(listed), grade) for listed, grade in graded]


def similar(rng: Random, piece: Piece) -> Drawn:
    """More of the reference's words beats fewer of them: edits of several strengths, a cut, and unrelated text."""
    zh = rng.random() < 0.45
    reference, other, unrelated = (piece(rng, zh) for _ in range(3))
    shares = sorted(rng.sample((0.03, 0.08, 0.15, 0.25, 0.4, 0.6), 3))
    outputs = [(reference, 6.0), *_edits(rng, reference, shares, other), (unrelated, 0.0)]
    if rng.random() < 0.5:
        cut = reference[: max(8, int(len(reference) * rng.uniform(0.2, 0.7)))]
        if cut != reference:
            outputs.append((cut, cut_grade(len(cut) / len(reference), shares)))
    prompt = piece(rng, zh)[:200] if rng.random() < 0.8 else sentence(rng)
    return prompt, reference, outputs


def overlap(rng: Random, piece: Piece) -> Drawn:
    """Words of the reference among another text's, in order or not: the more of them, the better."""
    zh = rng.random() < 0.35
    most = rng.choice((12, 25, 50))
    wanted, strange = (parts_of(piece(rng, zh))[:most] for _ in range(2))

    def mixture(share: float) -> str:
        chosen = [*rng.sample(range(len(wanted)), round(share * len(wanted)))]
        filled = [wanted[place] for place in (sorted(chosen) if in_order else chosen)]
        for part in rng.sample(strange, round((1 - share) * len(strange))):
            filled.insert(rng.randint(0, len(filled)), part)
        return "".join(filled)

    in_order = rng.random() < 0.6
    shares = sorted(rng.sample((0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0), 5))
    return sentence(rng), "".join(wanted), [(mixture(share), share) for share in shares]


def cut_grade(kept: float, shares: Sequence[float]) -> float:
    """Grade of a text of which the share `kept` is left, among edits that change `shares` of it, graded 5, 4, 3.

    That of the edit that keeps about as much, if there is one; else half a grade below the last that keeps more.
    """
    nearest = min(range(len(shares)), key=lambda place: abs(1 - shares[place] - kept))
    if abs(1 - shares[nearest] - kept) < CUT_TOLERANCE:
        return 5.0 - nearest
    return 5.5 - sum(1 - share > kept for share in shares)


def solution(rng: Random, piece: Piece, questions: Sequence[tuple[str, str]]) -> Drawn:
    """A worked solution, its words or its numbers changed: the final answer first, then the steps that lead to it."""
    prompt, reference = rng.choice(questions)
    body, answer = reference.rsplit("\nA: ", 1)
    other = rng.choice(questions)[1].rsplit("\nA: ", 1)[0]
    mark = rng.choice(("A: ", "Answer: ", "The answer is ", "So it is ", ""))

    def wrong(steps: str) -> str:
        return f"{steps}\nA: {perturb(rng, answer)}"

    outputs = [
        (reference, 5.0),
        (edit(rng, body, rng.choice((0.05, 0.15, 0.3)), other) + "\nA: " + answer, 4.0),
        (edit(rng, body, 0.2, other) + "\nA: " + answer, 4.0),
        (mark + answer + rng.choice(("", ".")), 3.0),
        (wrong(body), 2.0),
        (wrong(_wrong_step(rng, body)), 2.0),
        (wrong(edit(rng, body, 0.15, other)), 1.5),
        (wrong(other), 1.0),
        (piece(rng, False), 0.0),
    ]
    return prompt, reference, outputs


KINDS: dict[str, Kind] = {task.__name__: task for task in (tiny, final_answer, fact, count, listing, similar, overlap)}


def _choices(rng: Random, most: int) -> tuple[str, Callable[[], str]]:
    """Letters of a multiple choice, mostly one, and a maker of others."""
    sizes = (1, 1, 1, 1, 2, 3) if most > 2 else (1, 1, 2)

    def letters() -> str:
        return "".join(sorted(rng.sample("ABCD", rng.choice(sizes))))

    answer = letters()
    return answer, lambda: other_than(answer, letters)


def _number(rng: Random) -> tuple[str, Callable[[], str]]:
    answer = number(rng)
    return answer, lambda: perturb(rng, answer)


def _name(rng: Random, zh: bool) -> tuple[str, Callable[[], str]]:
    answer = name(rng, zh)
    return answer, lambda: other_than(answer, lambda: name(rng, zh))


def _working(rng: Random, piece: Piece, zh: bool) -> str:
    """Words before a final answer: none, made-up sentences, or real text."""
    kind = rng.random()
    if kind < 0.25:
        return ""
    if kind < 0.7:
        return "\n".join(sentence(rng) for _ in range(rng.randint(1, 3))) + "\n"
    return piece(rng, zh) + "\n"


def _english_fact(rng: Random) -> Drawn:
    if rng.random() < 0.4:
        (subject, right), (_, wrong) = rng.sample(CAPITALS, 2)
    else:
        subject, right = name(rng), name(rng)
        wrong = other_than(right, lambda: name(rng))
    thing = rng.choice(FACTS)
    ask = rng.choice(("What is the {t} of {s}?", "Name the {t} of {s}.", "Which is the {t} of {s}?", "{s}: {t}?"))
    end = rng.choice((".", "", "."))
    outputs = [
        (right + end, 5.0),
        (f"{right} is the {thing} of {subject}.", 4.0),
        (f"The {thing} of {subject} is {right}. {sentence(rng, 8, 25)}", 3.0),
        (f"It is either {right} or {wrong}; {words(rng, 5, 15)}.", 2.0),
        (wrong + end, 1.0),
        (f"{wrong} is the {thing} of {subject}.", 1.0),
        (sentence(rng, 6, 14), 0.0),
    ]
    return ask.format(t=thing, s=subject), right + end, outputs


def _chinese_fact(rng: Random) -> Drawn:
    subject, right = name(rng, zh=True), name(rng, zh=True)
    wrong = other_than(right, lambda: name(rng, zh=True))
    thing = rng.choice(("首都", "作者", "主要河流", "最高的山", "颜色"))
    end = rng.choice(("", "。"))
    outputs = [
        (right + end, 5.0),
        (f"{subject}的{thing}是{right}。", 4.0),
        (f"{subject}的{thing}是{right}，{han(rng, 10, 30)}。", 3.0),
        (f"可能是{right}，也可能是{wrong}，我不能确定。", 2.0),
        (wrong + end, 1.0),
        (f"{subject}的{thing}是{wrong}。", 1.0),
        (han(rng, 8, 20) + "。", 0.0),
    ]
    return f"{subject}的{thing}是什么？", right + end, outputs


Counted = tuple[str, str, Callable[[int, int], str], Callable[[int], str]]
"""Prompt, reference, an output that counts one number and answers another, and a short output."""


def _count_in_english(rng: Random, word: str, letter: str, right: int) -> Counted:
    spelt = ", ".join(f"'{character}'" for character in word)

    def written(value: int) -> str:
        return rng.choice((str(value), ENGLISH_NUMBERS[value]))

    def worked(counted: int, answer: int) -> str:
        return f"Let's count: {spelt}. There are {written(counted)} '{letter}'s, so the answer is {written(answer)}."

    return (
        f"How many '{letter}'s are there in '{word}'?",
        f"There are {right} '{letter}'s in '{word}': {spelt}. So, the answer is {right}.",
        worked,
        lambda answer: f"There are {answer} '{letter}'s in '{word}'.",
    )


def _count_in_chinese(rng: Random, word: str, letter: str, right: int) -> Counted:
    spelt = "、".join(f"“{character}”" for character in word)

    def written(value: int) -> str:
        return rng.choice((str(value), CHINESE_NUMBERS[value]))

    def worked(counted: int, answer: int) -> str:
        spelling = f"我们来数一数单词“{word}”：{spelt}。"
        return f"{spelling}这里一共有{written(counted)}个“{letter}”，因此答案是{written(answer)}。"

    return (
        f"单词“{word}”中有几个“{letter}”？",
        f"单词“{word}”中包含{right}个字母“{letter}”。{spelt}。因此，答案是{right}。",
        worked,
        lambda answer: f"单词“{word}”中有{answer}个“{letter}”",
    )


def _edits(rng: Random, reference: str, shares: Sequence[float], other: str) -> list[Graded]:
    """Edits that changed something, graded 5, 4, 3 by how much they were to change."""
    edited = [(edit(rng, reference, share, other), 5.0 - place) for place, share in enumerate(shares)]
    return [(text, grade) for text, grade in edited if text != reference]


def _wrong_step(rng: Random, steps: str) -> str:
    numbers = list(re.finditer(r"\d+", steps))
    if not numbers:
        return steps
    one = rng.choice(numbers)
    return steps[: one.start()] + perturb(rng, one.group()) + steps[one.end() :]
