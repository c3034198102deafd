"""What counts as a word, in every script: the one answer for leaks, near copies and word counts.

A word is a run of letters, marks, digits and underscores. Scripts that put no spaces between words (Chinese, Japanese,
Thai, ...) and Korean, whose spacing varies, give one word for each character with its marks. Symbols are words where
they carry the meaning: operators, currency signs, emoji, and everything but spaces inside a formula. Punctuation of
prose and marks of Markdown are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import regex

_ALONE = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
_ALONE += r"\p{Yi}\p{Bopomofo}\p{Nushu}\p{Tangut}\p{Khitan_Small_Script}\p{Vai}\p{Buginese}\p{Batak}"
_HALF = rf"[[{_ALONE}\p{{Hiragana}}\p{{Katakana}}\p{{Hangul}}ー]&&\p{{L}}]"  # two of them weigh as much as a word
_SINGLE = rf"[[{_ALONE}\p{{Hiragana}}\p{{Katakana}}\p{{Hangul}}\p{{Han}}ー々〆]&&[\p{{L}}〇]]"
_RUN = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--{_SINGLE}]+"
_NUMBER = r"(?<![\w.])\d+(?:[.,]\d+)+"
_STRONG = r"=<>+&%^[\p{Sm}--[|~]]"
_FLAGS = regex.VERSION1 | regex.MULTILINE

_PROSE = regex.compile(
    rf"""{_NUMBER}|{_SINGLE}\p{{M}}*|{_RUN}
    |[*/!:|.?\-]{{0,4}}[{_STRONG}][*/!:|?\-{_STRONG}]*   # operators: += != => <= %
    |(?<![\w)\]\-])-(?=\d)                         # a sign
    |(?<=[a-z0-9)\]])\*+(?=[a-z0-9(\[])|(?<=\S[ ])\*+(?=[ ]\S)|/+|\|\||(?<=\p{{L}})\#
    |(?<![\w\s!?])!(?=\w)|(?<=\s)!(?=[a-z(])       # not
    |\$(?=\s?\d)|(?<=\d)\$|[\p{{Sc}}--\$]|\p{{So}}""",
    _FLAGS | regex.VERBOSE,
)
_FORMULA = regex.compile(
    r"(?:(?:(?<![\w.])\d+(?:[.,]\d+)*(?!\w)|(?<![\w'])\p{L}\p{M}*(?![\w'])|[()\[\]{}+\-*/^=<>%!|&\p{Sm}·])"
    r"[ \t]*+){3,}",
    _FLAGS,
)
# Brackets to close, Morse code: three symbols or more that stand alone.
_SEQUENCE = regex.compile(r"(?<!\S)[^\w\s]+(?:[ \t]+[^\w\s]+){2,}(?!\S)|[()\[\]{}](?:[ \t]*[()\[\]{}]){2,}", _FLAGS)
_OPERATOR = regex.compile(r"[+*/^=<>%&\-\p{Sm}·]", _FLAGS)
_INSIDE = regex.compile(rf"{_NUMBER}|{_SINGLE}\p{{M}}*|{_RUN}|[^\s\w]", _FLAGS)
# Line by line: rules and underlines, quotes, headings, bullets and numbers of lists.
_MARKS = regex.compile(
    r"^[ \t]*(?:[-=*_~\#|: \t]{3,}$|(?:>[ \t]*)+(?=\s|\p{L})|\#{1,6}[ \t]+)?"
    r"(?:[-*+•‣⁃◦●○■□▪▫▶►➢➤✓✔·∙][ \t]+(?=\S*\w))?(?:\d{1,3}[.)][ \t]+)?",
    _FLAGS,
)
_EMPHASIS = regex.compile(
    r"(?<![a-z0-9)\]*])(\*{1,3}|_{1,3}|~~)(?=[^\s*_~])([^*\n]{0,80}?[^\s*_~])\1(?![a-z0-9(*_])", _FLAGS
)
_TABLE = regex.compile(r"^[ \t]*\|.*$", _FLAGS)

# What makes the words of an ASCII text more than its runs of letters and digits.
_TRICKY = re.compile(
    r"[+*/^=<>%&$#|~_\x00-\x08\x0e-\x1f\x7f]|\d[.,]\d|(?<![a-z]{2})-|-(?![a-z]{2})|(?<![a-z]{2})!|!(?!\s|$)"
    r"|^[ \t]*\d{1,3}[.)][ \t]|[^\w\s][ \t]+[^\w\s]|[()\[\]{}][ \t]*[()\[\]{}][ \t]*[()\[\]{}]",
    re.MULTILINE,
)
_ASCII = re.compile(r"[a-z0-9]+")

_DASHES = str.maketrans({**dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"), "ı": "i", "×": "*", "÷": "/", "∕": "/", "⁄": "/"})
_RAISED = regex.compile(r"[⁰¹²³⁴-⁹ⁱⁿ⁺⁻]+")
_UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]|[\U0001F3FB-\U0001F3FF]", _FLAGS)
_OPTIONAL = regex.compile(r"[\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]")
_OTHER_DIGIT = regex.compile(r"[\p{Nd}--[0-9]]", _FLAGS)
_THAI_AM = regex.compile(r"\u0e4d([\u0e48-\u0e4b])")
_HALF_WORD = regex.compile(_HALF, _FLAGS)
_FULL_SYMBOL = regex.compile(r"\p{So}", _FLAGS)
_OPERAND = regex.compile(r"\d+(?:[.,]\d+)*\p{L}?|[\p{Latin}\p{Greek}\p{Cyrillic}]\p{M}*\d*", _FLAGS)
# What LaTeX and programs call operators and functions: parts of a formula, where one is.
_NAMES = frozenset(
    (
        *("frac", "dfrac", "tfrac", "sqrt", "cdot", "times", "div", "mod", "pm", "leq", "geq", "neq", "left", "right"),
        *("sin", "cos", "tan", "log", "ln", "exp", "abs", "min", "max", "pow", "sum", "prod", "int", "lim", "pi"),
    )
)


def words(text: str) -> list[str]:
    """The words of `text` in order, folded as :func:`fold` does; of a text of symbols alone, every symbol."""
    text = fold(text)
    if text.isascii() and not _TRICKY.search(text) and any(map(str.isalnum, text)):
        return _ASCII.findall(text)  # the same, several times as fast
    return _words(text)


def _words(text: str) -> list[str]:
    text = _plain(text)
    found, place = list[str](), 0
    for start, stop in _formulas(text):
        found += _PROSE.findall(text, place, start)
        found += _INSIDE.findall(text, start, stop)
        place = stop
    found += _PROSE.findall(text, place)
    return found if any(map(str.isalnum, text)) else [mark for mark in text if not mark.isspace()]


def _formulas(text: str) -> list[tuple[int, int]]:
    """Where every symbol counts, in order, none in another."""
    found_at = _FORMULA.finditer(text) if _OPERATOR.search(text) else ()
    formulas = [found.span() for found in found_at if _counts(found.group())]
    spans, place = list[tuple[int, int]](), 0
    for start, stop in [*formulas, (len(text), len(text))]:
        between = (found for found in _SEQUENCE.finditer(text, place, start))
        spans += [found.span() for found in between if len(set(found.group()) - set(" \t")) > 1]
        spans.append((start, stop))
        place = stop
    return spans


def _counts(formula: str) -> bool:
    return bool(_OPERATOR.search(formula)) and any(map(str.isalnum, formula))


def fold(text: str) -> str:
    """`text` without differences of writing: case, width, composed or not, invisible characters, kinds of digits and
    dashes, and the vowel points of Arabic and Hebrew, which a writer may leave out."""
    if text.isascii():
        return text.lower()
    text = _RAISED.sub(lambda found: f"^{found.group()}", text)  # x² is no x2
    text = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).translate(_DASHES)
    # Python may know fewer digits than `regex`, whose Unicode is newer: those stay as they are.
    text = _OTHER_DIGIT.sub(lambda found: str(unicodedata.digit(found.group(), found.group())), text)
    return _THAI_AM.sub("\\1\u0e4d", _OPTIONAL.sub("", text))


def weight(said: Sequence[str]) -> float:
    """How much `said` says, in words of a language with spaces.

    A Chinese character counts as a word. A character of the other scripts without spaces, a Korean syllable or a symbol
    counts as half of one.
    """
    return sum(map(_weight, said))


def with_whole_formulas(said: Sequence[str]) -> Sequence[str]:
    """`said` with every formula as one word: a sum that differs in one symbol is another sum, not most of the same one.

    A formula is a run of at least three symbols, numbers, single letters and names of functions, one of them a symbol,
    that ends where two numbers or letters follow each other. Sequences of brackets and Morse code are such runs too.
    """
    kinds = list(map(_kind, said))
    if "symbol" not in kinds:
        return said
    made, start = list[str](), 0
    for stop in range(1, len(said) + 1):
        ends = stop == len(said) or "word" in kinds[stop - 1 : stop + 1]
        if not ends and not kinds[stop - 1] == kinds[stop] == "operand":
            continue
        run = said[start:stop]
        made += [" ".join(run)] if len(run) > 2 and "symbol" in kinds[start:stop] else run
        start = stop
    return made


@lru_cache(maxsize=1 << 16)
def _kind(word: str) -> Literal["word", "operand", "name", "symbol"]:
    if _OPERAND.fullmatch(word):
        return "operand"
    if word in _NAMES:
        return "name"
    known = word[0] == "_" or any(map(str.isalnum, word)) or _FULL_SYMBOL.match(word)
    return "word" if known else "symbol"


def grams(said: Sequence[str], size: int) -> Iterator[tuple[str, int, int]]:
    """Every shortest run of words that weighs at least `size`: its text, where it starts, and where it ends."""
    weights = list(map(_weight, said))
    if sum(weights) == len(said):
        runs = zip(*(said[i:] for i in range(size)), strict=False)
        yield from ((" ".join(run), start, start + size) for start, run in enumerate(runs))
        return
    stop, total = 0, 0.0
    for start in range(len(said)):
        while total < size and stop < len(said):
            total += weights[stop]
            stop += 1
        if total < size:
            return
        yield " ".join(said[start:stop]), start, stop
        total -= weights[start]


@lru_cache(maxsize=1 << 16)
def _weight(word: str) -> float:
    if word[0].isalnum() or word[0] == "_":
        return 0.5 if _HALF_WORD.match(word) else 1.0
    return 1.0 if _FULL_SYMBOL.match(word) or (len(word) > 1 and any(map(str.isalnum, word))) else 0.5


def _plain(text: str) -> str:
    """`text` without what Markdown marks lines and words with."""
    text = _MARKS.sub("", text)
    if "*" in text or "_" in text or "~~" in text:
        text = _EMPHASIS.sub(r"\2", _EMPHASIS.sub(r"\2", text))
    return _TABLE.sub(lambda row: row.group().replace("|", " "), text) if "|" in text else text
