"""Lexical variants of an English utterance: another surface, the same meaning.

Three patterns: contraction + hedge, style shift + filler, hesitation marker. Negations, digits, names, questions and
quoted words stay; hedges go before plain statements only.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Hedges on how something is said: they doubt no fact, so they may stand before any plain statement.
ATTITUDE_HEDGES = ("honestly,", "to be honest,", "if I'm honest,", "I mean,")


# Hedges on whether something is so: only before an assessment of something other than the speaker's own life.
# "I guess" or "maybe" would take back some of what was said, and how sure somebody is can be what a label is about.
BELIEF_HEDGES = ("I think", "I feel like")


STATEMENT_FILLERS = ("you know,", "well,", "like,")


HESITATIONS = ("um,", "uh,", "hmm,")


NUM_PATTERNS = 3


# Sentence openers that are no names, and so may lose their capital when something is put before them.
OPENER_WORDS = """
a about absolutely actually after again agreed ah all almost also although always and any anyone anything
anyway apparently are around as at awesome basically be because been before being besides better between
both but by bye can cannot could currently definitely despite did didn't do does doesn't don't due during
each either even eventually every everybody everyone everything exactly except fair fairly feel feeling
feels finally fine first for from funny get getting glad going good goodbye got great had haha happy has
have having he he'd he'll he's hello help her here here's hey hi his hopefully hoping how however if in
initially instead is isn't it it'll it's its just keep kind last lately let let's life like literally
looking looks lots love luckily made mainly make makes making many maybe me meanwhile more most mostly must
my never next nice no nobody none nope not nothing now nowadays of often oh ok okay on once one only or
other our overall part people perhaps physical please plus possibly potentially pretty probably really right
sadly same seems several she she'd she'll she's should since so some somebody someone something sometimes
sorry sort sounds still stuck such sure take talking than thank thanks that that's thats the their them then
there there's theres these they they'd they'll they're they've theyre things think thinking this those
though three times to today tomorrow tonight too true trying two under unfortunately until up usually very
was wasn't we we'll we're we've well were what what's when whenever where whether which while who why wish
with without work working would wow yea yeah yep yes yesterday you you'd you'll you're you've your
"""


OPENERS = frozenset(OPENER_WORDS.split())


SPEAKER_ITSELF = frozenset(("i", "i'm", "i've", "i'd", "i'll", "im", "ive", "iam"))


# What may stand before the clause proper: a hedge or a filler goes behind it ("yes, I think it is").
LEAD = re.compile(
    r"(?:yes|yeah|yea|yep|ya|no|nope|ok|okay|well|oh|wow|hmm|right|sure|true|anyway|and|but|so|because|cause|cuz|or)"
    r"(?:,? (?:and|but|so))?(?P<gap>\s*,\s*|\s+)(?=[A-Za-z])",
    re.IGNORECASE,
)


NO_FILLER_BEFORE = re.compile(r"(?:and|but|so|because|cause|cuz|or|well|anyway|oh|wow|hmm)\b", re.IGNORECASE)


HELLO = re.compile(r"(?:hi+|hello|hey)(?: there)?\b(?:(?P<gap>\s*[,.!]+\s*|\s+)(?=[A-Za-z]))?", re.IGNORECASE)


PLAIN_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


WORD = re.compile(r"[\w'\u2019]+")


QUESTION = re.compile(
    r"(?:what|when|where|who|whom|whose|why|which|how)\b|"
    r"(?:am|is|are|was|were|do|does|did|have|has|had|can|could|will|would|should|may|might|must)(?:n['\u2019]?t)? "
    r"(?:i|you|u|he|she|it|we|they|this|that|there|the|my|your|his|her|our|their|any|people|anyone|everyone)\b",
    re.IGNORECASE,
)


PRONOUN = r"(?:i|you|he|she|it|they|we|that(?! (?:i|you|he|she|it|we|they)\b)|there|everyone|everybody|nobody|someone)"


STATEMENT = re.compile(
    rf"(?:(?:{PRONOUN}['\u2019][a-z]+|im|ive|iam|hes|shes|its|theyre|thats|theres) |"
    rf"(?:{PRONOUN}|my(?! god\b| goodness| bad\b)|our|his|her|their|this|the|everything|people) \S+\s+)\S",
    re.IGNORECASE,
)


# What makes the word before it a lead, where no comma does.
OPENING = re.compile(rf"(?:{QUESTION.pattern}|{STATEMENT.pattern})", re.IGNORECASE)


ASSESSMENT = re.compile(
    r"(?:it|that|this|he|she|they|people|everyone|everybody|there)"
    r"(?:['\u2019](?:s|re)| is| are| feels?| seems?| sounds?| should| could| would)\b(?! (?:been|why|when|how|what|where))",
    re.IGNORECASE,
)


ALREADY_HEDGED = re.compile(
    r"\b(?:think|thought|guess|suppose|feel|feels|feeling|felt|seems?|sounds?|maybe|perhaps|probably|might|may|believe|"
    r"hope|hopefully|wonder|wish|honest|honestly|sure|know|mean|say|apparently|god)\b|\d",
    re.IGNORECASE,
)


COURTESY = re.compile(r"\b(?:thank|thanks|thx|bye|goodbye|sorry|please|welcome|glad|luck)\b", re.IGNORECASE)


NO_CLOSING_FILLER = re.compile(r"\b(?:know|lol|haha|right|ok|okay|too|though)\b", re.IGNORECASE)


# What is never edited: quoted words, an unclosed quotation up to the end, addresses, @names and #tags.
PROTECTED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r'"[^"]*(?:"|$)',
        r"“[^”]*(?:”|$)",
        r"«[^»]*(?:»|$)",
        r"`[^`]*(?:`|$)",
        r"\u2018.*?(?:\u2019(?!\w)|$)",
        r"(?<!\w)'(?=\S).*?(?:(?<=\S)'(?!\w)|$)",
        r"(?:https?://|www\.)\S+|\S*[@#]\S*",
    )
)


MAY_NEED_PROTECTION = re.compile(r"[\"“«`\u2018@#/]|www\.|(?<!\w)'")


NEGATIVE_WORDS = frozenset(
    ("no", "nope", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor", "without")
)


UNMARKED_NOTS = (
    "aint arent cant couldnt didnt doesnt dont hadnt hasnt havent isnt shouldnt wasnt werent wont wouldnt"
)


NOTS = frozenset(("not", *UNMARKED_NOTS.split()))


CAPITALISED = re.compile(r"(?<![.!?…\n])(?<![.!?…][)\]])[^\S\n]+[^\w\s]*([^\W\d_][\w'\u2019-]*)")


SENTENCE_END = re.compile(r"[.!?…]+[)\]]*\s+|\n\s*")


ABBREVIATION = re.compile(
    r"(?:\b(?:[a-z]|mr|mrs|ms|dr|st|prof|vs|etc|e\.g|i\.e|approx|a\.m|p\.m)|(?:^|\n)\d+)\.\s+$", re.I
)


# Contraction never before a gap: "that is how sad I am", "yes I am but ...", "more than I am today".
GAP = (
    r"(?! (?:and|but|or|nor|because|cause|cuz|if|when|while|although|than|then|too|here|now|today|also|as|is|are|was|"
    r"were|at|i|he|she|it|we|they|you|thanks?|yes|yeah)\b)(?= [A-Za-z])"
)


BEFORE_GAP = frozenset(
    ("than", "as", "what", "who", "where", "how", "whoever", "wherever", "whatever", "all", "here")
)


CONTRACTIONS = re.compile(
    rf"\b(?:(?P<am>I|i) am|(?P<are>[Yy]ou|[Ww]e|[Tt]hey) are|(?P<is>[Hh]e|[Ss]he|[Ii]t|[Tt]hat|[Tt]here) is){GAP}"
    rf"|\b(?P<will>I|i|[Yy]ou|[Hh]e|[Ss]he|[Ii]t|[Ww]e|[Tt]hey) will{GAP}(?! not\b)"
    r"|\b(?P<have>I|i|[Yy]ou|[Ww]e|[Tt]hey) have(?= (?:been|had|done|got|gotten|gone|seen|tried|never|always|already|"
    r"lost|made|heard|felt|known|worked|thought|lived|started|become|found|told|given|taken|come|learned|noticed|"
    r"decided)\b)"
    r"|\b(?P<would>I|i|[Yy]ou|[Hh]e|[Ss]he|[Ww]e|[Tt]hey) would(?= (?:like|love|hate|rather|never|be|feel|say)\b)"
    r"|\b(?P<negated>[Dd]o|[Dd]oes|[Dd]id|[Ii]s|[Aa]re|[Ww]as|[Ww]ere|[Hh]ave|[Hh]as|[Hh]ad|[Ww]ould|[Cc]ould|"
    r"[Ss]hould|[Cc]an|[Ww]ill)(?: not|(?<=an)not)\b(?! (?:only|just)\b)"
)


SHORT_FORMS = {"am": "m", "are": "re", "is": "s", "will": "ll", "have": "ve", "would": "d"}


EXPANSIONS = re.compile(
    r"\b(?P<subject>I|i|[Yy]ou|[Ww]e|[Tt]hey|[Hh]e|[Ss]he|[Ii]t|[Tt]hat|[Tt]his|[Tt]here|who|people)"
    r"(?: (?P<verb>do|does|did|is|are|was|were|have|has|had|would|could|should|ca|wo)n(?P<negated>['\u2019]t)"
    r"(?! (?:I|i|you|we|they|he|she|it)\b)|['\u2019](?P<short>m|re|ve|ll)(?! (?:gonna|gotta)\b))\b"
)


LONG_FORMS = {"m": "am", "re": "are", "ve": "have", "ll": "will"}


VERB = (
    r"(?= (?:be|have|do|get|go|make|take|try|tell|say|see|let|lose|need|keep|start|look|give|call|talk|ask|find|happen|"
    r"come|leave|stay|stop|feel|help|know|think|live|learn|move|quit|spend|pay|put|hear|die|cry|sleep|eat|buy|sell|"
    r"hurt|fail|end|become|finish|meet|play|read|write|listen|wait|change|visit|apologize|lie|hide|run|deal)\b)"
)


SAID_OF = r"\b((?:is|are|was|were|am|just|feel|feels|felt|feeling|it|i)|\w+['\u2019](?:s|m|re)) "


# (what the text must hold, checked first because it is fast; pattern; replacement)
STYLE_SHIFTS = tuple(
    (needle, re.compile(pattern), replacement)
    for needle, pattern, replacement in (
        ("going to", rf"\bgoing to{VERB}", "gonna"),
        (
            "want to",
            rf"(?:(?<=\b[Ii] )|(?<=\bwe )|(?<=\byou )|(?<=\bto )|(?<=n['\u2019]t ))want to{VERB}",
            "wanna",
        ),
        (
            "have to",
            rf"(?<!\b[Dd]o )(?<!\bdid )(?<!\b[Ww]ill )(?<!ould )\b([Ii]|[Ww]e|[Tt]hey) have to{VERB}",
            r"\1 gotta",
        ),
        (" of", rf"(?i:{SAID_OF})(kind|sort) of\b(?= [a-z])", r"\1 \2a"),
        ("because", r"\bbecause\b(?! of)", "cuz"),
        (
            "very",
            r"(?<!\bnot )(?<!n['\u2019]t )(?<!\bthe )(?<!\bmy )(?<!\bthat )\bvery\b(?! (?:much|little|few|own|same)\b)",
            "really",
        ),
        (
            "a lot of",
            r"(?<!\bquite )(?<!\bsuch )(?<!\bnot )(?<!\bwhole )(?<!n['\u2019]t )\ba lot of\b",
            "lots of",
        ),
        ("hank you", r"(?:^|(?<=[.!,] ))([Tt])hank you(?= for\b| so much\b|[,.!]|$)", r"\1hanks"),
        ("es", r"(?:^|(?<=[.!] ))([Yy])es\b(?!-)", r"\1eah"),
        ("kay", r"\b([Oo])kay\b", r"\1k"),
        ("hough", r"\b([Tt]|[Aa]lt)hough\b", r"\1ho"),
        ("until", r"\buntil\b", "till"),
        ("at the moment", r"\bat the moment\b", "right now"),
    )
)


PAUSED_BEFORE = re.compile(r"(?P<gap>,? )(?=(?:but|because|cuz|although)\b)")


NO_PAUSE_BEHIND = (" not", " just", " only", " all", "nothing", "anything")


PAUSED_AFTER = re.compile(
    r"\b(?:am|is|are|was|were|(?:I|i|[Ii]t|[Hh]e|[Ss]he)['\u2019][ms]|(?:[Tt]hey|[Yy]ou|[Ww]e)['\u2019]re)"
    r"(?P<gap> )(?=(?:a|an|so|just|really|very)\b)"
)


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


def surface(text: str) -> tuple[list[str], ...]:
    """What a variant must share with its source, each a sorted list: negations ("don't", "dont", "do not" are one,
    spelt "not"), digits, capitalised words inside sentences, question marks, protected words."""
    words = PLAIN_WORD.findall(text.lower().replace("\u2019", "'").replace("cannot", "can not"))
    nots = ["not" for word in words if word in NOTS or word.endswith("n't")]
    names = [word for word in CAPITALISED.findall(text) if word[0].isupper()]
    return (
        nots + sorted(word for word in words if word in NEGATIVE_WORDS),
        sorted(re.findall(r"\d", text)),
        sorted(name for name in names if name.lower().replace("\u2019", "'") not in SPEAKER_ITSELF),
        re.findall("[?\uff1f]", text),
        sorted(text[start:end] for start, end in _protected(text)),
    )


@functools.lru_cache(maxsize=8)
def _protected(text: str) -> tuple[tuple[int, int], ...]:
    if not MAY_NEED_PROTECTION.search(text):
        return ()
    return tuple(match.span() for pattern in PROTECTED for match in pattern.finditer(text))


def _substitute(text: str, pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str]) -> str:
    """`pattern.sub` outside the protected words."""
    if not pattern.search(text):
        return text
    spans = _protected(text)

    def replace(match: re.Match[str]) -> str:
        inside = any(start < match.end() and match.start() < end for start, end in spans)
        return match[0] if inside else replacement(match)

    return pattern.sub(replace, text)


def _contract(text: str) -> str:
    mark = "\u2019" if "\u2019" in text else "'"

    def contracted(match: re.Match[str]) -> str:
        form, word = match.lastgroup, match[match.lastgroup]
        if form == "negated":
            return word[0] + {"an": "a", "ill": "o"}.get(word[1:], word[1:]) + f"n{mark}t"
        before = text[max(0, match.start() - 40) : match.start()].lower().split()[-2:]
        if not BEFORE_GAP.isdisjoint(before) and not re.match(r" \w+ing\b", text[match.end() :]):
            return match[0]
        return word + mark + SHORT_FORMS[form]

    return _substitute(text, CONTRACTIONS, contracted)


def _expand(text: str) -> str:
    def expanded(match: re.Match[str]) -> str:
        if match["short"]:
            return f"{match['subject']} {LONG_FORMS[match['short']]}"
        verb = {"ca": "can", "wo": "will"}.get(match["verb"], match["verb"])
        return f"{match['subject']} {verb}{'' if verb == 'can' else ' '}not"

    return _substitute(text, EXPANSIONS, expanded)


def _shift_style(text: str) -> str:
    for needle, pattern, replacement in STYLE_SHIFTS:
        if needle in text:
            text = _substitute(text, pattern, lambda match, to=replacement: match.expand(to))
    return text


@functools.lru_cache(maxsize=8)
def _sentences(text: str) -> list[Sentence]:
    """The sentences that begin outside protected words and with an English letter."""
    breaks = [
        m
        for m in SENTENCE_END.finditer(text)
        if not ABBREVIATION.search(text[max(0, m.start() - 9) : m.end()])
    ]
    spans = _protected(text)
    sentences = []
    for start, end in zip(
        [0, *(m.end() for m in breaks)], [*(m.end() for m in breaks), len(text)], strict=True
    ):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if not re.match(r"[A-Za-z]", text[start:end]) or any(low <= start < high for low, high in spans):
            continue
        hello, lead = HELLO.match(text, start, end), LEAD.match(text, start, end)
        ahead = hello or lead
        gap, clause = ahead.span("gap") if ahead and ahead["gap"] else (start, start)
        first = WORD.match(text, clause)[0]
        if (
            clause > start
            and first[0].isupper()
            and first.lower().replace("\u2019", "'") not in SPEAKER_ITSELF
        ):
            gap = clause = start  # after a lead, a capital is a name's
        if not hello and "," not in text[gap:clause] and not OPENING.match(text, clause):
            gap = clause = start  # "right now", "so sad", "sure as": no lead at all
        body = text[clause:end]
        if "?" in body or QUESTION.match(body):
            kind = "question"
        elif hello and clause == start:
            kind = "hello"
        elif STATEMENT.match(body) and not COURTESY.search(body):
            kind = "statement"
        else:
            kind = "other"
        sentences.append(Sentence(start, gap, clause, end, kind))
    return sentences


def _before_sentence(text: str, sentence: Sentence, marker: str) -> list[Edit]:
    """`marker` before the first word, which gives up its capital; a word that may be a name keeps it, behind "…"."""
    start, word = sentence.start, WORD.match(text, sentence.start)[0]
    plain = word.lower().replace("\u2019", "'")
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
    unsure = ASSESSMENT.match(body) and not ALREADY_HEDGED.search(body)
    hedges = (*BELIEF_HEDGES, *ATTITUDE_HEDGES[:2]) if unsure else ATTITUDE_HEDGES
    return [edit for hedge in hedges for edit in _before_clause(text, sentence, hedge)]


def _filler_sites(text: str, sentence: Sentence) -> list[Edit]:
    if sentence.kind == "statement":
        edits = [edit for filler in STATEMENT_FILLERS for edit in _before_clause(text, sentence, filler)]
        end = len(text[: sentence.end].rstrip().removesuffix("."))
        body = text[sentence.clause : end]
        if re.search(r"[a-z]$", body) and len(body.split()) > 3 and not NO_CLOSING_FILLER.search(body):
            edits.append(Edit(end, end, ", you know", "you know,"))
        return edits
    if sentence.kind == "hello" or NO_FILLER_BEFORE.match(text, sentence.start):
        return []
    return [
        edit
        for filler in (("so,", "well,") if sentence.kind == "question" else ("well,",))
        for edit in _before_sentence(text, sentence, filler)
    ]


def _hesitation_sites(text: str, sentence: Sentence) -> list[Edit]:
    edits = [edit for marker in HESITATIONS for edit in _before_clause(text, sentence, marker)]
    for pause in (PAUSED_BEFORE, PAUSED_AFTER):
        for match in pause.finditer(text, sentence.clause + 1, sentence.end):
            before = text[: match.start("gap")]
            if not before[-1].isalpha() or before.endswith(NO_PAUSE_BEHIND):
                continue
            edits += [Edit(*match.span("gap"), f", {marker} ", marker) for marker in HESITATIONS[:2]]
    end = len(text.rstrip())
    trailing = re.search(r"(?<=[a-z])\.?$", text[sentence.start : end])
    if trailing and sentence.kind != "question" and end <= sentence.end:
        edits.append(Edit(sentence.start + trailing.start(), end, "...", "..."))
    return edits


def _marked(text: str, sites_of: Callable[[str, Sentence], list[Edit]], rng: random.Random) -> Iterator[str]:
    """Variants with a marker or, in a long text, with up to three of them, each in another sentence."""
    said = f" {' '.join(WORD.findall(text.lower()))} "
    spans = _protected(text)

    def fits(edit: Edit) -> bool:
        inside = any(low < edit.end and edit.start < high for low, high in spans)
        return not inside and f" {edit.marker.lower().rstrip(',')} " not in said

    sites = [[edit for edit in sites_of(text, sentence) if fits(edit)] for sentence in _sentences(text)]
    choices = [(place, edit) for place, edits in enumerate(sites) for edit in edits]
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
    if pattern == 0:
        bases = [_contract(text)]
        bases = bases if bases[0] != text else [_expand(text)]
        sites_of = _hedge_sites
    elif pattern == 1:
        bases = [_shift_style(text)]
        sites_of = _filler_sites
    else:
        bases = []
        sites_of = _hesitation_sites
    bases = [base for base in bases if base != text]
    for base in [*bases, text]:
        yield from _marked(base, sites_of, rng)
    yield from bases


def augment_text(text: str, number: int, k: int, key: str) -> list[str]:
    """At most `k` variants of `text`, all different from it and each other in more than case and white space.

    Args:
        number: i, the running number of the source: variant j starts from pattern (i + j) mod 3.
        key: seeds the choice of words. A source draws its words alone, so that other rows cannot change them.
    """
    streams = [made_by(text, pattern, random.Random(f"{key}/{pattern}")) for pattern in range(NUM_PATTERNS)]
    kept, seen, source_surface = [], {_folded(text)}, surface(text)
    for j in range(k):
        for pattern in ((number + j + step) % NUM_PATTERNS for step in range(NUM_PATTERNS)):
            variant = next(
                (v for v in streams[pattern] if _folded(v) not in seen and surface(v) == source_surface), None
            )
            if variant is not None:
                kept.append(variant)
                seen.add(_folded(variant))
                break
        else:
            break
    return kept


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
