"""Words in every script, symbols that mean something, and what a copy may change without hiding."""

from __future__ import annotations

import sys
import time
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpursuit.data.duplicates import NearCopies
from gradpursuit.data.leakage import Leaks, Protected
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.words import _words, fold, grams, weight, with_whole_formulas, words


def leaks(target: str, row: str, coverage: float | None = None) -> bool:
    """Whether `row` as a user turn holds the user turn `target` whole, or a share of it of at least `coverage`."""
    made = Leaks([Protected("t", "1", Conversation(({"role": "user", "content": target},)))], coverage=coverage)
    return made.find("0", Conversation(({"role": "user", "content": row},))) is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't stop, it's fine_1!", "don t stop it s fine_1"),
        ("请解释潮汐。", "请 解 释 潮 汐"),
        ("用Python写代码", "用 python 写 代 码"),
        ("カメラーを見る", "カ メ ラ ー を 見 る"),
        ("สวัสดี", "ส วั ส ดี"),
        ("नमस्ते दुनिया", "नमस्ते दुनिया"),
        ("தமிழ் மொழி", "தமிழ் மொழி"),
        ("안녕 하세요", "안 녕 하 세 요"),
        ("མི་རིགས་", "མི རིགས"),
        ("ສະບາຍ", "ສ ະ ບ າ ຍ"),
        ("مُحَمَّدٌ", "محمد"),
        ("שָׁלוֹם עולם", "שלום עולם"),
        ("Tiếng Việt", "tiếng việt"),
        ("İSTANBUL ISPARTA", "istanbul isparta"),
        ("ＡＢＣ１２ ｶﾞ", "abc12 ガ"),
        ("٣٤ ৫", "34 5"),
        ("wo\u200brd so\u00adft", "word soft"),
        ("x² + y₁", "x ^ 2 + y1"),
        ("😀👩\u200d👧 ok", "😀 👩 👧 ok"),
        ("👍🏽", "👍"),
        ("?! ;", "? ! ;"),
        ("", ""),
    ],
)
def test_words(text: str, found: str) -> None:
    assert words(text) == found.split()
    assert words(unicodedata.normalize("NFD", text)) == found.split()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1 + 2) * 3", "1 + (2 * 3)"),
        ("5 - 3 =", "5 + 3 ="),
        ("7 * 2", "7 / 2"),
        ("-4 degrees", "4 degrees"),
        ("from -2 to 5", "from 2 to 5"),
        ("1.5 litres", "15 litres"),
        ("1.5 litres", "1 5 litres"),
        ("total += price", "total -= price"),
        ("total - price < limit", "total - price > limit"),
        ("if a != b", "if a == b"),
        ("x ≤ y", "x ≥ y"),
        ("∑ of terms", "∏ of terms"),
        ("x² is", "x2 is"),
        ("$5 each", "€5 each"),
        ("5% more", "5 more"),
        ("a && b", "a || b"),
        ("if (!done)", "if (done)"),
        ("height * width", "height / width"),
        ("height*width", "height/width"),
        ("C++ or", "C or"),
        ("C# or", "C or"),
        ("2**3", "2*3"),
        ("x -> y", "x => y"),
        ("see /a/b", "see a b"),
        ("10° north", "10 north"),
        ("Close them: [ [ { ]", "Close them: [ { [ ]"),
        ("Close them: (()[", "Close them: ([)("),
        ("Decode: .- -... -.", "Decode: -. .-. --"),
        ("Decode:\n- . -.", "Decode:\n. . -."),
        ("¬A ∧ B", "A ∧ B"),
        ("i++", "i--"),
    ],
)
def test_symbols_that_mean_something_are_words(one: str, other: str) -> None:
    assert words(one) != words(other)


PROSE = "The first train from Bergen leaves at nine, and the ferry follows it at ten o'clock every day."


@pytest.mark.parametrize(
    "changed",
    [
        PROSE.removesuffix("."),
        PROSE.upper(),
        PROSE.replace(",", ";").replace(".", "!"),
        PROSE.replace(", ", " - "),
        PROSE.replace(", ", " — "),
        PROSE.replace("'", "’"),
        f'"{PROSE}"',
        f"„{PROSE}“",
        PROSE.replace("Bergen", "**Bergen**").replace("ferry", "*ferry*").replace("nine", "`nine`"),
        PROSE.replace("first train", "__first train__").replace("ten", "~~ten~~"),
        f"# {PROSE}",
        f"> {PROSE}",
        f"- {PROSE}",
        f"+ {PROSE}",
        f"1. {PROSE}",
        PROSE.replace(", ", "\n* "),
        PROSE.replace(", ", "\n• "),
        PROSE.replace(", ", "\n2) "),
        PROSE.replace(", ", "\n---\n"),
        PROSE.replace(" and", "\u200b and"),
        f"| {PROSE.replace(', ', ' | ')} |",
    ],
)
def test_other_punctuation_hides_no_leak(changed: str) -> None:
    assert leaks(PROSE, changed)
    assert leaks(changed, PROSE)


@pytest.mark.parametrize(
    "row",
    ["((1 * 2 - 9 + 5) * (2 - 4 * 4 + 7)) =", "((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * 7)) =", "1 2 9 5 2 4 4 7"],
)
def test_other_sums_are_no_leaks(row: str) -> None:
    target = "((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7)) ="
    assert not leaks(target, row)
    assert leaks(target, f"Please compute {target} Thanks!")
    assert leaks(target, target.replace(" ", "").replace("-", "−"))


SUM = "((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7) + 12 * 3) * 4 ="


@pytest.mark.parametrize(
    ("target", "row"),
    [
        (SUM, SUM.replace("-1", "1", 1)),
        (SUM, SUM.replace("* 5", "+ 5")),
        (SUM, SUM.replace("12", "13")),
        (SUM, f"What is {SUM.replace('* 3', '* 30')} Answer briefly."),
        (SUM.replace(" ", ""), SUM.replace(" ", "").replace("9", "8")),
        ("2x + 3y - z^2 = 4(x - 1.5) / (y + 7) ≤ 12", "2x + 3y - z^2 = 4(x - 1.5) / (y - 7) ≤ 12"),
        (
            r"Compute $\frac{1}{2} + \frac{3}{4} - \sqrt{16} + \frac{5}{6} - 2 \cdot 3$",
            r"Compute $\frac{1}{2} + \frac{3}{4} - \sqrt{16} + \frac{5}{6} - 2 \cdot 4$",
        ),
        ("sqrt(16) + 3 * log(4) - sin(2) / cos(5) + 7 =", "sqrt(16) + 3 * log(4) - sin(2) / cos(5) + 8 ="),
        ("１＋２＋３×４−５÷６＋７×８＝", "１＋２＋３×４−５÷６＋７×９＝"),
        ("[ [ { ( ) } ] < > ( ( [ ] ) ) { } [", "[ [ { ( ) } ] < > ( ( [ ] ) ) { } ("),
    ],
)
def test_a_sum_that_differs_in_one_symbol_is_no_part_of_the_other(target: str, row: str) -> None:
    assert not leaks(target, row, 0.5)
    assert leaks(target, f"Please compute {target} Thanks!", 0.5)


def test_formulas_count_as_one_word_in_parts() -> None:
    text = f"{PROSE} It adds up as {SUM} and that is all there is to say about it."
    assert leaks(text, text.replace("all there", "everything there").replace("-1", "1", 1), 0.5)
    assert with_whole_formulas(words("add (1 + 2) * x = 9 then go")) == ["add", "( 1 + 2 ) * x = 9", "then", "go"]
    assert with_whole_formulas(words("1 + 2 = 3\n4 + 5 = 9")) == ["1 + 2 = 3", "4 + 5 = 9"]
    assert with_whole_formulas(words("it is -4 or 3 5")) == ["it", "is", "-", "4", "or", "3", "5"]
    assert with_whole_formulas(words("a sin of max 3 times")) == words("a sin of max 3 times")
    assert with_whole_formulas(words("请算 3 + 5 的和")) == ["请", "算", "3 + 5", "的", "和"]


SENTENCES = {
    "Yi": "ꋍꂷꃅꄿꐨꐥꌺꐋꀕꊿꂷꃅꄿꐨꐥꌺꐋꀕ",
    "Bopomofo": "ㄑㄧㄥㄐㄧㄝㄕㄨㄛㄔㄠㄒㄧㄇㄟㄊㄧㄢㄊㄨㄟㄔ",
    "Chinese": "请解释一下为什么潮汐每天会推迟大约五十分钟并举一个简单的例子",
    "Japanese": "なぜ潮の満ち引きが毎日およそ五十分ずつ遅れるのかを説明してください",
    "Thai": "อธิบายว่าทำไมน้ำขึ้นน้ำลงจึงช้าลงประมาณห้าสิบนาทีทุกวัน",
    "Lao": "ອະທິບາຍວ່າເປັນຫຍັງນ້ຳຂຶ້ນນ້ຳລົງຈຶ່ງຊ້າລົງທຸກມື້",
    "Khmer": "ពន្យល់ពីមូលហេតុដែលជំនោរយឺតជាងមុនរាល់ថ្ងៃ",
    "Burmese": "ဒီရေသည် နေ့စဉ် မိနစ်ငါးဆယ်ခန့် နောက်ကျရသည့် အကြောင်းရင်းကို ရှင်းပြပါ",
    "Tibetan": "ཉིན་ལྟར་རྒྱ་མཚོའི་དུས་རླབས་སྐར་མ་ལྔ་བཅུ་ཙམ་འགོར་བའི་རྒྱུ་མཚན་འགྲེལ་བཤད་གནང་རོགས།",
    "Korean": "조수가 매일 약 오십 분씩 늦어지는 이유를 간단한 예와 함께 설명해 주세요",
    "Hindi": "समझाइए कि ज्वार हर दिन लगभग पचास मिनट देर से क्यों आता है",
    "Tamil": "அலைகள் ஒவ்வொரு நாளும் ஏன் சுமார் ஐம்பது நிமிடம் தாமதமாக வருகின்றன என்று விளக்கவும்",
    "Arabic": "اشرح لماذا يتأخر المد كل يوم نحو خمسين دقيقة مع مثال بسيط",
    "Hebrew": "הסבר מדוע הגאות מתאחרת בכל יום בכחמישים דקות ותן דוגמה פשוטה",
    "Vietnamese": "Giải thích vì sao thủy triều mỗi ngày đến muộn khoảng năm mươi phút",
    "Russian": "Объясни, почему прилив каждый день запаздывает примерно на пятьдесят минут",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_turn_of_any_script_leaks_between_other_words(language: str) -> None:
    text = SENTENCES[language]
    assert leaks(text, f"{text}!")
    for before, after in (("OK: ", " Thanks"), (f"{text[:3]}。", f"。{text[-3:]}"), ("「", "」")):
        assert leaks(text, before + text + after)
        assert leaks(unicodedata.normalize("NFD", text), before + text + after)
    assert not leaks(text, text[: len(text) // 2])
    assert weight(words(text)) >= 8


@pytest.mark.parametrize(
    "thanks", ["ขอบคุณมากครับ", "ありがとうございます", "谢谢你的帮助", "도와주셔서 감사합니다", "Thank you very much"]
)
def test_a_phrase_of_a_few_words_says_too_little_in_any_script(thanks: str) -> None:
    assert weight(words(thanks)) < 8
    assert not leaks(thanks, f"{thanks} {thanks}")


@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai", "Korean"])
def test_near_copies_of_scripts_without_spaces(language: str) -> None:
    text = SENTENCES[language] * 2
    near = NearCopies(0.8)
    assert near.first(words(text), "first") is None
    assert near.first(words(text[:-1]), "shorter") == "first"
    others = [sentence for name, sentence in SENTENCES.items() if name != language]
    assert all(near.first(words(other), other) is None for other in others)


def test_runs_weigh_as_much_as_eight_words_in_any_script() -> None:
    assert [run[1:] for run in grams(list("abcdefghi"), 8)] == [(0, 8), (1, 9)]
    assert [run[1:] for run in grams(words("一二三四五六七八九"), 8)] == [(0, 8), (1, 9)]
    assert [run[1:] for run in grams(["か"] * 17, 8)] == [(0, 16), (1, 17)]
    assert list(grams(["a"] * 7, 8)) == []


@settings(max_examples=1500, deadline=None)
@given(st.text(alphabet="ab 12.,!?-'\"()[]:;\n\\@` *_", max_size=14))
def test_the_short_way_of_ascii_finds_the_same(text: str) -> None:
    if any(map(str.isalnum, text)):
        assert words(text) == _words(fold(text))


def test_digits_that_are_newer_than_python_stay() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for digit in regex.findall(r"\p{Nd}", "".join(every)):
        value = unicodedata.digit(digit, None)
        assert words(f"a{digit}") == [f"a{digit if value is None else value}"]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_text_has_words_that_are_stable(text: str) -> None:
    found = words(text)
    assert all(word and not word.isspace() for word in found)
    assert words(text.swapcase()) is not None
    assert weight(found) <= len(found)


@pytest.mark.parametrize("part", ["_a ", "~~a ", "!-", "( ", "a+", "1.", "**a", ". , ", "|a", "a b + c ", "- "])
def test_time_grows_with_the_text_alone(part: str) -> None:
    times = []
    for length in (4_000, 64_000):
        text = part * (length // len(part))
        began = time.process_time()
        words(text)
        times.append(time.process_time() - began)
    assert times[1] < 100 * max(times[0], 0.002)  # 16 times the text; with its square it would be 256
