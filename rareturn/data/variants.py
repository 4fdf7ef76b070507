"""Lexical variants of an English utterance: another surface, the same meaning.

Three patterns: contraction + hedge, style shift + filler, hesitation marker. Negations, digits, names, questions and
quoted words stay; hedges go before plain statements only.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ENGLISH = yaml.safe_load(Path(__file__).with_name("english.yaml").read_text(encoding="utf-8"))
ATTITUDE_HEDGES = tuple(ENGLISH["attitude_hedges"])
BELIEF_HEDGES = tuple(ENGLISH["belief_hedges"])
OPENERS = frozenset(ENGLISH["opener_words"].split())
SPEAKER_ITSELF = frozenset(ENGLISH["speaker_itself"])


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of `english.yaml`: its lines joined, its `{parts}` filled in."""
    pattern = pattern.replace("\n", "")
    while (filled := re.sub(r"\{(\w*[a-z])\}", lambda m: PARTS[m[1]], pattern)) != pattern:
        pattern = filled
    return re.compile(pattern)


PARTS = {name: part.replace("\n", "") for name, part in ENGLISH["parts"].items()}
PATTERNS = {name: _compiled(pattern) for name, pattern in ENGLISH["patterns"].items()}
STYLE_SHIFTS = [
    (shift["needle"], _compiled(shift["pattern"]), shift["to"]) for shift in ENGLISH["style_shifts"]
]
PROTECTED = [re.compile(pattern, re.DOTALL) for pattern in ENGLISH["protected"]]
MAY_NEED_PROTECTION = re.compile(r"[\"“«`\u2018@#/]|www\.|(?<!\w)'")
PLAIN_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
DOING = re.compile(r" \w+ing\b")
WORD = re.compile(r"[\w'\u2019]+")
CAPITALISED = re.compile(r"(?<![.!?…\n])(?<![.!?…][)\]])[^\S\n]+[^\w\s]*([^\W\d_][\w'\u2019-]*)")
SENTENCE_END = re.compile(r"[.!?…]+[)\]]*\s+|\n\s*")


class Edit(NamedTuple):
    """Replace text[start:end]; `marker` is the word or phrase that it brings in."""

    start: int
    end: int
    replacement: str
    marker: str


class Sentence(NamedTuple):
    """text[start:end], closing punctuation included; `clause` is where it goes on behind a "yes", an "and", a "hi".

    `kind` is "statement", "question", "hello" or "other"; `gap` is the start of the white space before `clause`.
    """

    start: int
    gap: int
    clause: int
    end: int
    kind: str


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def surface(text: str) -> tuple[list[str], ...]:
    """What a variant must share with its source, each a sorted list: negations ("don't", "dont", "do not" are one,
    spelt "not"), digits, capitalised words inside sentences, question marks, protected words."""
    words = PLAIN_WORD.findall(_plain(text).replace("cannot", "can not"))
    nots = ["not" for word in words if word in ENGLISH["nots"] or word.endswith("n't")]
    names = [word for word in CAPITALISED.findall(text) if word[0].isupper()]
    return (
        nots + sorted(word for word in words if word in ENGLISH["negative_words"]),
        sorted(re.findall(r"\d", text)),
        sorted(name for name in names if _plain(name) not in SPEAKER_ITSELF),
        re.findall("[?\uff1f]", text),
        sorted(text[start:end] for start, end in _protected(text)),
    )


@functools.lru_cache(maxsize=8)
def _protected(text: str) -> tuple[tuple[int, int], ...]:
    if not MAY_NEED_PROTECTION.search(text):
        return ()
    return tuple(match.span() for pattern in PROTECTED for match in pattern.finditer(text))


def _inside(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] touches protected words."""
    return any(low < end and start < high for low, high in _protected(text))


def _substitute(text: str, pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str]) -> str:
    """`pattern.sub` outside the protected words."""
    if not pattern.search(text):
        return text
    return pattern.sub(lambda match: match[0] if _inside(text, *match.span()) else replacement(match), text)


def _contract(text: str) -> str:
    mark = "\u2019" if "\u2019" in text else "'"

    def contracted(match: re.Match[str]) -> str:
        form, word = match.lastgroup, match[match.lastgroup]
        if form == "negated":
            return word[0] + {"an": "a", "ill": "o"}.get(word[1:], word[1:]) + f"n{mark}t"
        before = text[max(0, match.start() - 40) : match.start()].lower().split()[-2:]
        gap = set(before).intersection(ENGLISH["before_gap"]) and not DOING.match(text, match.end())
        return match[0] if gap else word + mark + ENGLISH["short_forms"][form]

    return _substitute(text, PATTERNS["contractions"], contracted)


def _expand(text: str) -> str:
    def expanded(match: re.Match[str]) -> str:
        if match["short"]:
            return f"{match['subject']} {ENGLISH['long_forms'][match['short']]}"
        verb = {"ca": "can", "wo": "will"}.get(match["verb"], match["verb"])
        return f"{match['subject']} {verb}{'' if verb == 'can' else ' '}not"

    return _substitute(text, PATTERNS["expansions"], expanded)


def _shift_style(text: str) -> str:
    for needle, pattern, replacement in STYLE_SHIFTS:
        if needle in text:
            text = _substitute(text, pattern, lambda match, to=replacement: match.expand(to))
    return text


@functools.lru_cache(maxsize=8)
def _sentences(text: str) -> list[Sentence]:
    """The sentences that begin outside protected words and with an English letter."""
    breaks = [
        match.end()
        for match in SENTENCE_END.finditer(text)
        if not PATTERNS["abbreviation"].search(text[max(0, match.start() - 9) : match.end()])
    ]
    sentences = []
    for start, end in itertools.pairwise([0, *breaks, len(text)]):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if not re.match(r"[A-Za-z]", text[start:end]) or any(a <= start < b for a, b in _protected(text)):
            continue
        hello, lead = PATTERNS["hello"].match(text, start, end), PATTERNS["lead"].match(text, start, end)
        ahead = hello or lead
        gap, clause = ahead.span("gap") if ahead and ahead["gap"] else (start, start)
        first = WORD.match(text, clause)[0]
        # After a lead, a capital is a name's; and "right now", "so sad", "sure as" hold no lead at all.
        named = clause > start and first[0].isupper() and _plain(first) not in SPEAKER_ITSELF
        led = hello or "," in text[gap:clause] or PATTERNS["opening"].match(text, clause)
        if named or not led:
            gap = clause = start
        body = text[clause:end]
        if "?" in body or PATTERNS["question"].match(body):
            kind = "question"
        elif hello and clause == start:
            kind = "hello"
        elif PATTERNS["statement"].match(body) and not PATTERNS["courtesy"].search(body):
            kind = "statement"
        else:
            kind = "other"
        sentences.append(Sentence(start, gap, clause, end, kind))
    return sentences


def _before_sentence(text: str, sentence: Sentence, marker: str) -> list[Edit]:
    """`marker` before the first word, which gives up its capital; a word that may be a name keeps it, behind "…"."""
    start, word = sentence.start, WORD.match(text, sentence.start)[0]
    plain = _plain(word)
    if word[0].islower() or (plain in SPEAKER_ITSELF and text.lstrip()[0].islower()):
        return [Edit(start, start, f"{marker} ", marker)]
    capital = marker[0].upper() + marker[1:]
    if plain in SPEAKER_ITSELF:
        return [Edit(start, start, f"{capital} ", marker)]
    if plain in OPENERS and not word[1:].isupper():
        return [Edit(start, start + 1, f"{capital} {word[0].lower()}", marker)]
    return [Edit(start, start, f"{capital[:-1]}... ", marker)] if marker.endswith(",") else []


def _before_clause(text: str, sentence: Sentence, marker: str) -> list[Edit]:
    if sentence.clause == sentence.start:
        return _before_sentence(text, sentence, marker)
    punctuation = text[sentence.gap : sentence.clause].rstrip() or ("," if marker.endswith(",") else "")
    return [Edit(sentence.gap, sentence.clause, f"{punctuation} {marker} ", marker)]


def _hedge_sites(text: str, sentence: Sentence) -> list[Edit]:
    if sentence.kind != "statement":
        return []
    body = text[sentence.clause : sentence.end]
    unsure = PATTERNS["assessment"].match(body) and not PATTERNS["already_hedged"].search(body)
    hedges = (*BELIEF_HEDGES, *ATTITUDE_HEDGES[:2]) if unsure else ATTITUDE_HEDGES
    return [edit for hedge in hedges for edit in _before_clause(text, sentence, hedge)]


def _filler_sites(text: str, sentence: Sentence) -> list[Edit]:
    if sentence.kind == "statement":
        fillers = ENGLISH["statement_fillers"]
        edits = [edit for filler in fillers for edit in _before_clause(text, sentence, filler)]
        end = len(text[: sentence.end].rstrip().removesuffix("."))
        body = text[sentence.clause : end]
        closes = re.search(r"[a-z]$", body) and not PATTERNS["no_closing_filler"].search(body)
        if closes and len(body.split()) > 3:
            edits.append(Edit(end, end, ", you know", "you know,"))
        return edits
    if sentence.kind == "hello" or PATTERNS["no_filler_before"].match(text, sentence.start):
        return []
    fillers = ("so,", "well,") if sentence.kind == "question" else ("well,",)
    return [edit for filler in fillers for edit in _before_sentence(text, sentence, filler)]


def _hesitation_sites(text: str, sentence: Sentence) -> list[Edit]:
    edits = [edit for marker in ENGLISH["hesitations"] for edit in _before_clause(text, sentence, marker)]
    for pause in (PATTERNS["paused_before"], PATTERNS["paused_after"]):
        for match in pause.finditer(text, sentence.clause + 1, sentence.end):
            before = text[: match.start("gap")]
            if before[-1].isalpha() and not before.endswith(tuple(ENGLISH["no_pause_behind"])):
                gap, markers = match.span("gap"), ENGLISH["hesitations"][:2]
                edits += [Edit(*gap, f", {marker} ", marker) for marker in markers]
    end = len(text.rstrip())
    trailing = re.search(r"(?<=[a-z])\.?$", text[sentence.start : end])
    if trailing and sentence.kind != "question" and end <= sentence.end:
        edits.append(Edit(sentence.start + trailing.start(), end, "...", "..."))
    return edits


def _marked(text: str, sites_of: Callable[[str, Sentence], list[Edit]], rng: random.Random) -> Iterator[str]:
    """Variants with a marker or, in a long text, with up to three of them, each in another sentence."""
    said = f" {' '.join(WORD.findall(text.lower()))} "
    choices = [
        (place, edit)
        for place, sentence in enumerate(_sentences(text))
        for edit in sites_of(text, sentence)
        if f" {edit.marker.lower().rstrip(',')} " not in said and not _inside(text, edit.start, edit.end)
    ]
    rng.shuffle(choices)
    number = min(3, 1 + len(text) // 250)
    for position, (place, edit) in enumerate(choices):
        chosen = {place: edit}
        for other_place, other in choices[position + 1 :] + choices[:position]:
            if len(chosen) == number:
                break
            if other.marker not in {edit.marker for edit in chosen.values()}:
                chosen.setdefault(other_place, other)
        pieces, done = [], 0
        for start, end, replacement, _ in sorted(chosen.values()):
            pieces += [text[done:start], replacement]
            done = end
        yield "".join(pieces) + text[done:]


def made_by(text: str, pattern: int, rng: random.Random) -> Iterator[str]:
    """Every variant of `text` that a pattern makes, in an order drawn from `rng`; repeats are possible.

    Args:
        pattern: 0 contraction + hedge, 1 style shift + filler, 2 hesitation marker.
    """
    base, sites_of = text, (_hedge_sites, _filler_sites, _hesitation_sites)[pattern]
    if pattern == 0:
        base = _contract(text)
        base = base if base != text else _expand(text)
    elif pattern == 1:
        base = _shift_style(text)
    for source in dict.fromkeys((base, text)):
        yield from _marked(source, sites_of, rng)
    if base != text:
        yield base


def augment_text(text: str, number: int, k: int, key: str) -> list[str]:
    """At most `k` variants of `text`, all different from it and each other in more than case and white space.

    Args:
        number: i, the running number of the source: variant j starts from pattern (i + j) mod 3.
        key: seeds the choice of words. A source draws its words alone, so that other rows cannot change them.
    """
    streams = [made_by(text, pattern, random.Random(f"{key}/{pattern}")) for pattern in range(3)]
    kept, source_surface = {_folded(text): text}, surface(text)
    for first in range(number, number + k):
        made = itertools.chain(*(streams[pattern % 3] for pattern in range(first, first + 3)))
        fresh = (new for new in made if _folded(new) not in kept and surface(new) == source_surface)
        if (variant := next(fresh, None)) is None:
            break
        kept[_folded(variant)] = variant
    return list(kept.values())[1:]


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
