"""Lexical variants of an English utterance: another surface, the same meaning (`surface` says what stays)."""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml

from rareturn.data.label_guide import fold_whitespace

ENGLISH = yaml.safe_load(Path(__file__).with_name("english.yaml").read_text(encoding="utf-8"))
ATTITUDE_HEDGES, BELIEF_HEDGES = ENGLISH["attitude_hedges"], ENGLISH["belief_hedges"]
SPEAKER_ITSELF, OPENERS = ENGLISH["speaker_itself"], frozenset(ENGLISH["opener_words"].split())
PARTS = {name: part.replace("\n", "") for name, part in ENGLISH["parts"].items()}


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of `english.yaml`: its lines joined, its `{parts}` filled in."""
    pattern = pattern.replace("\n", "")
    while (filled := re.sub(r"\{(\w*[a-z])\}", lambda m: PARTS[m[1]], pattern)) != pattern:
        pattern = filled
    return re.compile(pattern)


PATTERNS = SimpleNamespace(**{name: _compiled(pattern) for name, pattern in ENGLISH["patterns"].items()})
PROTECTED = [re.compile(pattern, re.DOTALL) for pattern in ENGLISH["protected"]]


class Edit(NamedTuple):
    """Replace text[start:end]."""

    start: int
    end: int
    replacement: str
    marker: str  # the word or phrase that it brings in


class Sentence(NamedTuple):
    """text[start:end], closing punctuation included."""

    start: int
    gap: int  # the start of the white space before `clause`
    clause: int  # where it goes on behind a "yes", an "and", a "hi"
    end: int
    kind: str  # "statement", "question", "hello" or "other"


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def surface(text: str) -> tuple[list[str], ...]:
    """What a variant must share with its source, each a sorted list: negations ("don't", "dont", "do not" are one,
    spelt "not"), digits, capitalised words inside sentences, question marks, protected words."""
    words = PATTERNS.plain_word.findall(_plain(text).replace("cannot", "can not"))
    nots = ["not" for word in words if word in ENGLISH["nots"] or word.endswith("n't")]
    names = [word for word in PATTERNS.capitalised.findall(text) if word[0].isupper()]
    return (
        nots + sorted(word for word in words if word in ENGLISH["negative_words"]),
        sorted(re.findall(r"\d", text)),
        sorted(name for name in names if _plain(name) not in SPEAKER_ITSELF),
        re.findall("[?\uff1f]", text),
        sorted(text[start:end] for start, end in _protected(text)),
    )


@functools.lru_cache(maxsize=8)
def _protected(text: str) -> tuple[tuple[int, int], ...]:
    if not PATTERNS.may_need_protection.search(text):
        return ()
    return tuple(match.span() for pattern in PROTECTED for match in pattern.finditer(text))


def _inside(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] touches protected words."""
    return any(low < end and start < high for low, high in _protected(text))


def _substitute(text: str, pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str]) -> str:
    """`pattern.sub` outside the protected words."""
    return pattern.sub(lambda match: match[0] if _inside(text, *match.span()) else replacement(match), text)


def _contract(text: str) -> str:
    mark = "\u2019" if "\u2019" in text else "'"

    def contracted(match: re.Match[str]) -> str:
        form, word = match.lastgroup, match[match.lastgroup]
        if form == "negated":
            return word[0] + {"an": "a", "ill": "o"}.get(word[1:], word[1:]) + f"n{mark}t"
        before = text[max(0, match.start() - 40) : match.start()].lower().split()[-2:]
        gap = set(before).intersection(ENGLISH["before_gap"]) and not PATTERNS.doing.match(text, match.end())
        return match[0] if gap else word + mark + ENGLISH["short_forms"][form]

    return _substitute(text, PATTERNS.contractions, contracted)


def _expand(text: str) -> str:
    def expanded(match: re.Match[str]) -> str:
        if match["short"]:
            return f"{match['subject']} {ENGLISH['long_forms'][match['short']]}"
        verb = {"ca": "can", "wo": "will"}.get(match["verb"], match["verb"])
        return f"{match['subject']} {verb}{'' if verb == 'can' else ' '}not"

    return _substitute(text, PATTERNS.expansions, expanded)


def _shift_style(text: str) -> str:
    for shift in ENGLISH["style_shifts"]:
        if shift["needle"] in text:
            pattern, to = _compiled(shift["pattern"]), shift["to"]
            text = _substitute(text, pattern, lambda match, to=to: match.expand(to))
    return text


@functools.lru_cache(maxsize=8)
def _sentences(text: str) -> list[Sentence]:
    """The sentences that begin outside protected words and with an English letter."""
    breaks = [
        match.end()
        for match in PATTERNS.sentence_end.finditer(text)
        if not PATTERNS.abbreviation.search(text[max(0, match.start() - 9) : match.end()])
    ]
    sentences = []
    for start, end in itertools.pairwise([0, *breaks, len(text)]):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if not re.match(r"[A-Za-z]", text[start:end]) or _inside(text, start, start + 1):
            continue
        hello = PATTERNS.hello.match(text, start, end)
        ahead = hello or PATTERNS.lead.match(text, start, end)
        gap, clause = ahead.span("gap") if ahead and ahead["gap"] else (start, start)
        first = PATTERNS.word.match(text, clause)[0]
        # After a lead, a capital is a name's; and "right now", "so sad", "sure as" hold no lead at all.
        named = clause > start and first[0].isupper() and _plain(first) not in SPEAKER_ITSELF
        led = hello or "," in text[gap:clause] or PATTERNS.opening.match(text, clause)
        if named or not led:
            gap = clause = start
        body = text[clause:end]
        if "?" in body or PATTERNS.question.match(body):
            kind = "question"
        elif hello and clause == start:
            kind = "hello"
        elif PATTERNS.statement.match(body) and not PATTERNS.courtesy.search(body):
            kind = "statement"
        else:
            kind = "other"
        sentences.append(Sentence(start, gap, clause, end, kind))
    return sentences


def _before_sentence(text: str, sentence: Sentence, marker: str) -> list[Edit]:
    """`marker` before the first word, which gives up its capital; a word that may be a name keeps it, behind "…"."""
    start, word = sentence.start, PATTERNS.word.match(text, sentence.start)[0]
    plain = _plain(word)
    capital = marker[0].upper() + marker[1:]
    lower = word[0].islower() or (plain in SPEAKER_ITSELF and text.lstrip()[0].islower())
    if lower or plain in SPEAKER_ITSELF:
        return [Edit(start, start, f"{marker if lower else capital} ", marker)]
    if plain in OPENERS and not word[1:].isupper():
        return [Edit(start, start + 1, f"{capital} {word[0].lower()}", marker)]
    return [Edit(start, start, f"{capital[:-1]}... ", marker)] if marker.endswith(",") else []


def _before_clause(text: str, sentence: Sentence, markers: Iterable[str]) -> Iterator[Edit]:
    for marker in markers:
        if sentence.clause == sentence.start:
            yield from _before_sentence(text, sentence, marker)
        else:
            comma = "," if marker.endswith(",") else ""
            punctuation = text[sentence.gap : sentence.clause].rstrip() or comma
            yield Edit(sentence.gap, sentence.clause, f"{punctuation} {marker} ", marker)


def _hedge_sites(text: str, sentence: Sentence) -> Iterator[Edit]:
    if sentence.kind == "statement":
        body = text[sentence.clause : sentence.end]
        unsure = PATTERNS.assessment.match(body) and not PATTERNS.already_hedged.search(body)
        hedges = (*BELIEF_HEDGES, *ATTITUDE_HEDGES[:2]) if unsure else ATTITUDE_HEDGES
        yield from _before_clause(text, sentence, hedges)


def _filler_sites(text: str, sentence: Sentence) -> Iterator[Edit]:
    if sentence.kind == "statement":
        yield from _before_clause(text, sentence, ENGLISH["statement_fillers"])
        end = len(text[: sentence.end].rstrip().removesuffix("."))
        body = text[sentence.clause : end]
        closes = re.search(r"[a-z]$", body) and not PATTERNS.no_closing_filler.search(body)
        if closes and len(body.split()) > 3:
            yield Edit(end, end, ", you know", "you know,")
    elif sentence.kind != "hello" and not PATTERNS.no_filler_before.match(text, sentence.start):
        for filler in ("so,", "well,") if sentence.kind == "question" else ("well,",):
            yield from _before_sentence(text, sentence, filler)


def _hesitation_sites(text: str, sentence: Sentence) -> Iterator[Edit]:
    markers = ENGLISH["hesitations"]
    yield from _before_clause(text, sentence, markers)
    for pause in (PATTERNS.paused_before, PATTERNS.paused_after):
        for match in pause.finditer(text, sentence.clause + 1, sentence.end):
            before = text[: match.start("gap")]
            if before[-1].isalpha() and not before.endswith(tuple(ENGLISH["no_pause_behind"])):
                yield from (Edit(*match.span("gap"), f", {marker} ", marker) for marker in markers[:2])
    end = len(text.rstrip())
    trailing = re.search(r"(?<=[a-z])\.?$", text[sentence.start : end])
    if trailing and sentence.kind != "question" and end <= sentence.end:
        yield Edit(sentence.start + trailing.start(), end, "...", "...")


def _marked(text: str, sites_of: Callable[..., Iterable[Edit]], rng: random.Random) -> Iterator[str]:
    """Variants with a marker or, in a long text, with up to three of them, each in another sentence."""
    said = f" {' '.join(PATTERNS.word.findall(text.lower()))} "
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
        varied = text
        for start, end, replacement, _ in sorted(chosen.values(), reverse=True):
            varied = varied[:start] + replacement + varied[end:]
        yield varied


def made_by(text: str, pattern: int, rng: random.Random) -> Iterator[str]:
    """Every variant of `text` that a pattern makes, in an order drawn from `rng`; repeats are possible.

    Pattern 0 is contraction + hedge, 1 style shift + filler, 2 hesitation marker.
    """
    changes = ((_contract, _expand), (_shift_style,), ())[pattern]
    sites_of = (_hedge_sites, _filler_sites, _hesitation_sites)[pattern]
    base = next((changed for change in changes if (changed := change(text)) != text), text)
    for source in dict.fromkeys((base, text)):
        yield from _marked(source, sites_of, rng)
    if base != text:
        yield base


def augment_text(text: str, number: int, k: int, key: str) -> list[str]:
    """At most `k` variants of `text`, all different from it and each other in more than case and white space.

    Variant j of the source with the running `number` starts from pattern (number + j) mod 3. `key` seeds the choice of
    words: a source draws its words alone, so that other rows cannot change them.
    """
    streams = [made_by(text, pattern, random.Random(f"{key}/{pattern}")) for pattern in range(3)]
    kept, source_surface = {fold_whitespace(text).casefold(): text}, surface(text)
    for first in range(number, number + k):
        for variant in itertools.chain(*(streams[pattern % 3] for pattern in range(first, first + 3))):
            folded = fold_whitespace(variant).casefold()
            if folded not in kept and surface(variant) == source_surface:
                kept[folded] = variant
                break
    return list(kept.values())[1:]
