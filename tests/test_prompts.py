"""Prompts in others' syntaxes: what is read, which tokens have which weight, which text holds at which step."""

import pytest

from ldm.conditioning.prompts.chunks import chunks_of
from ldm.conditioning.prompts.reading import read_prompt
from ldm.conditioning.prompts.weighted import Lora, Piece, WeightedText
from ldm.errors import UserError

Pieces = list[tuple[str, float]]

# From AUTOMATIC1111's rules, by hand: a round bracket is 1.1 or its number, a square one 1 / 1.1; the two kinds do not
# know of each other; what is open reaches to the end, what closes nothing is text; equal neighbours are one.
A1111: dict[str, list[Pieces]] = {
    "": [[]],
    " ": [[(" ", 1)]],
    "a cat": [[("a cat", 1)]],
    "a (cat)": [[("a ", 1), ("cat", 1.1)]],
    "a (cat:1.3)": [[("a ", 1), ("cat", 1.3)]],
    "a (cat: 1.3 )": [[("a ", 1), ("cat", 1.3)]],
    "(cat:+.5)": [[("cat", 0.5)]],
    "(cat:-1)": [[("cat", -1)]],
    "(cat:2.)": [[("cat", 2)]],
    "(cat:0)": [[("cat", 0)]],
    "[cat]": [[("cat", 1 / 1.1)]],
    "[[cat]]": [[("cat", 1 / 1.21)]],
    "((cat))": [[("cat", 1.21)]],
    "((cat:1.3))": [[("cat", 1.43)]],
    "((cat:1.3) dog:2)": [[("cat", 2.6), (" dog", 2)]],
    "([cat])": [[("cat", 1)]],
    "(a [b) c]": [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]],
    "(un)(necessary)": [[("unnecessary", 1.1)]],
    "(open": [[("open", 1.1)]],
    "((open": [[("open", 1.21)]],
    "[open": [[("open", 1 / 1.1)]],
    "a (b [c": [[("a ", 1), ("b ", 1.1), ("c", 1)]],
    "closed)": [[("closed)", 1)]],
    "closed]": [[("closed]", 1)]],
    "a:1.3)": [[("a:1.3)", 1)]],
    "(a:": [[("a:", 1.1)]],
    "(a:)": [[("a:", 1.1)]],
    "(:1.3)": [[]],
    "()": [[]],
    "[]": [[]],
    "((()))": [[]],
    ")(": [[(")", 1)]],
    ":)": [[(":)", 1)]],
    ":( sad": [[(":", 1), (" sad", 1.1)]],
    "a :) b (:": [[("a :) b ", 1), (":", 1.1)]],
    "(a:b:1.5)": [[("a:b", 1.5)]],
    "(a:1.2.3)": [[("a:1.2.3", 1.1)]],
    "(wait:...)": [[("wait:...", 1.1)]],
    "(a:1e3)": [[("a:1e3", 1.1)]],
    "(a:nan)": [[("a:nan", 1.1)]],
    "(a:inf)": [[("a:inf", 1.1)]],
    "4:3 ratio": [[("4:3 ratio", 1)]],
    r"\(a\)": [[("(a)", 1)]],
    r"\[a\]": [[("[a]", 1)]],
    r"(a \(b\):1.4)": [[("a (b)", 1.4)]],
    r"\\": [[("\\", 1)]],
    r"a\b": [[("ab", 1)]],
    "a\\": [[("a", 1)]],
    "\\": [[]],
    r"\\(a)": [[("\\", 1), ("a", 1.1)]],
    "a BREAK b": [[("a", 1)], [("b", 1)]],
    "BREAK": [[], []],
    "BREAK a": [[], [("a", 1)]],
    "a BREAK": [[("a", 1)], []],
    "a BREAK BREAK b": [[("a", 1)], [], [("b", 1)]],
    "(a BREAK b:1.2) c": [[("a", 1.2)], [("b", 1.2), (" c", 1)]],
    "BREAKFAST": [[("BREAKFAST", 1)]],
    "a\nBREAK\nb": [[("a", 1)], [("b", 1)]],
    "ein (Büßer:1.5) 🦝": [[("ein ", 1), ("Büßer", 1.5), (" 🦝", 1)]],
    "(猫:0.5)犬": [[("猫", 0.5), ("犬", 1)]],
    "a <lora:x:0.8>(b)": [[("a ", 1), ("b", 1.1)]],
    "a <3 (b)": [[("a <3 ", 1), ("b", 1.1)]],
    "{a|b} (c)": [[("{a|b} ", 1), ("c", 1.1)]],
    "[a:b]": [[("a:b", 1 / 1.1)]],
    "[a:b:c]": [[("a:b:c", 1 / 1.1)]],
    "[a:b:nan]": [[("a:b:nan", 1 / 1.1)]],
    "[a:(b:0.5]": [[("a:", 1 / 1.1), ("b:0.5", 1)]],
    "[x [a:b] y:0.5]": [[("x ", 1 / 1.1), ("a:b", 1 / 1.21), (" y:0.5", 1 / 1.1)]],
}

# From ComfyUI's rules, by hand: a number stands in place of the weight around it, a bracket without one is 1.1 times.
COMFYUI: dict[str, list[Pieces]] = {
    "": [[]],
    "a cat": [[("a cat", 1)]],
    "(cat)": [[("cat", 1.1)]],
    "((cat))": [[("cat", 1.21)]],
    "(cat:1.3)": [[("cat", 1.3)]],
    "((cat:1.3))": [[("cat", 1.3)]],
    "((cat:1.3):2)": [[("cat", 1.3)]],
    "(a (b):1.3)": [[("a ", 1.3), ("b", 1.43)]],
    "(a (b:2) c:1.5)": [[("a ", 1.5), ("b", 2), (" c", 1.5)]],
    "(un)(merged)": [[("un", 1.1), ("merged", 1.1)]],
    "[cat]": [[("[cat]", 1)]],
    "a (b: 1.2 ) c": [[("a ", 1), ("b", 1.2), (" c", 1)]],
    "(a:1e1)": [[("a", 10)]],
    "(a:-.5)": [[("a", -0.5)]],
    "(a:b:1.5)": [[("a:b", 1.5)]],
    "(a:b)": [[("a:b", 1.1)]],
    "(a:)": [[("a:", 1.1)]],
    "(:1.3)": [[(":1.3", 1.1)]],
    "(open (a:1.2) b": [[("(open (a:1.2) b", 1)]],
    "a) (b:1.3)": [[("a) (b:1.3)", 1)]],
    "a) ( (b:1.3)": [[("a) ( ", 1), ("b", 1.3)]],
    ":) ;) (:": [[(":) ;) (:", 1)]],
    "()": [[]],
    r"\(a\) (b)": [[("(a) ", 1), ("b", 1.1)]],
    r"(a \(b\):1.2)": [[("a (b)", 1.2)]],
    "a\\": [[("a\\", 1)]],
    r"a\b": [[(r"a\b", 1)]],
    "an embedding:foo.pt, (cat)": [[("an ", 1), ("foo", 1), (", ", 1), ("cat", 1.1)]],
    "(embedding:<x>:1.2)": [[("<x>", 1.2)]],
    "embedding:": [[("embedding:", 1)]],
    "no_embedding:x": [[("no_embedding:x", 1)]],
    "a BREAK b": [[("a BREAK b", 1)]],
}

# compel's own parser is the reference of these: see test_prompts_weights.
COMPEL = [
    "",
    "a cat",
    "a cat+ and dog",
    "cat++ dog-",
    "cat---",
    "(a cat)1.3 dog",
    "(a cat)+ dog",
    "(a cat)-- (dog)0.5",
    "a (b (c)1.5 d)++ e",
    "((a cat)1.5)1.5",
    "rock-n-roll++, jazz",
    "mid-century a+b",
    "mid- x +",
    '"a cat"1.2 dog',
    '"a cat"++',
    r"a \(cat\) dog",
    "a (cat) dog",
    "(a)(b)",
    "a, (b, c)1.2, d",
    "a,b+,c",
    "(open cat",
    "closed) cat",
    "cat(dog)",
    "3.5 4:3",
    ":) cat",
    "(cat)2",
    "(cat).5",
    "cat.",
    "cat+.",
]


def pieces(text: object) -> list[Pieces]:
    assert isinstance(text, WeightedText)
    return [[(piece.text, pytest.approx(piece.weight, rel=1e-12)) for piece in each] for each in text.windows]


def tokenize(text: str) -> list[int]:
    return [*text.replace(" ", "").encode()]


@pytest.mark.parametrize(
    ("syntax", "prompt", "expected"),
    [(name, *each) for name, table in (("a1111", A1111), ("comfyui", COMFYUI)) for each in table.items()],
)
def test_texts_ids_and_weights(syntax: str, prompt: str, expected: list[Pieces]) -> None:
    read = read_prompt(prompt, syntax, steps=10)
    (segment,) = read.segments
    assert segment.step == 0 and pieces(segment.text) == expected
    # Each window's tokens are those of its pieces, each with the weight of its own.
    windows = [[(id, w) for text, w in window for id in tokenize(text)] for window in expected]
    if len(windows) > 1 and not windows[-1]:
        windows.pop()
    chunks = chunks_of(segment.text, tokenize, 75)
    assert [list(zip(each.ids, each.weights, strict=True)) for each in chunks] == [
        [(id, pytest.approx(w, rel=1e-12)) for id, w in window] for window in windows
    ]
    assert chunks_of(segment.text, tokenize, None)[0].ids == tuple(id for each in windows for id, _ in each)


def test_plain_is_the_string() -> None:
    for prompt in ("a (cat:1.3) [b:c:3] <lora:x:1>", "", ":)", "(" * 1000):
        read = read_prompt(prompt)
        assert read.texts == [prompt] and read.at(7) == prompt and not read.loras and not read.notes


def texts(prompt: str, steps: int) -> list[tuple[int, str]]:
    return [
        (each.step, each.text.text)
        for each in read_prompt(prompt, "a1111", steps).segments
        if isinstance(each.text, WeightedText)
    ]


@pytest.mark.parametrize(
    ("prompt", "steps", "expected"),
    [
        ("a [b:c:0.25] d", 20, [(0, "a b d"), (5, "a c d")]),
        ("a [b:c:0.25] d", 10, [(0, "a b d"), (2, "a c d")]),
        ("a [b:c:0.25] d", 3, [(0, "a c d")]),
        ("a [b:c:10]", 20, [(0, "a b"), (10, "a c")]),
        ("a [b:c:10]", 10, [(0, "a b")]),
        ("a [b:c:0]", 10, [(0, "a c")]),
        ("a [b:c:1.0]", 10, [(0, "a b")]),
        ("a [b:c:-3]", 10, [(0, "a c")]),
        ("a[b::.6]", 10, [(0, "ab"), (6, "a")]),
        ("a[:b:.3]", 10, [(0, "a"), (3, "ab")]),
        ("a[b: 3 ]", 10, [(0, "a"), (3, "ab")]),
        ("a[b:[c:d:2]:1]e", 10, [(0, "abe"), (1, "ace"), (2, "ade")]),
        ("[a:b:2] [c:d:4]", 10, [(0, "a c"), (2, "b c"), (4, "b d")]),
        ("[a|b|c]", 5, [(0, "a"), (1, "b"), (2, "c"), (3, "a"), (4, "b")]),
        ("[a|b] [c::1]", 3, [(0, "a c"), (1, "b "), (2, "a ")]),
        ("[fe|]male", 2, [(0, "female"), (1, "male")]),
        ("[a|a]", 9, [(0, "a")]),
        ("[[a|b]|c]", 4, [(0, "a"), (1, "c"), (2, "a"), (3, "c")]),
        ("[a|b:3]", 4, [(0, "a|b:3")]),
        ("[(a:2):3]", 10, [(0, ""), (3, "a")]),
        ("((a][:b:c [d:3]", 10, [(0, "a]:b:c "), (3, "a]:b:c d")]),
        ("[a : ) :3] [b:c:2]", 10, [(0, "a : ) :3 b"), (2, "a : ) :3 c")]),
        (r"[a\:b:c:2]", 10, [(0, "a:b"), (2, "c")]),
        (r"\[a:b:2\]", 10, [(0, "[a:b:2]")]),
        ("a | b [c:2]", 10, [(0, "a | b "), (2, "a | b c")]),
        ("a [b:BREAK c:2]", 10, [(0, "a b"), (2, "a c")]),
    ],
)
def test_texts_of_the_steps(prompt: str, steps: int, expected: list[tuple[int, str]]) -> None:
    found = [(step, text.replace("  ", " ")) for step, text in texts(prompt, steps)]
    assert found == expected


def test_alternation_changes_every_step_at_any_number_of_them() -> None:
    for steps in (1, 2, 7, 50):
        read = read_prompt("[a|b|c] cat", "a1111", steps)
        assert [each.step for each in read.segments] == list(range(steps))
        for step in range(steps):
            assert pieces(read.at(step)) == [[("abc"[step % 3] + " cat", 1)]]
        assert len(read.texts) == min(steps, 3)


def test_loras_and_embeddings_are_given_back() -> None:
    read = read_prompt("a <lora:one:0.8> [b<lora:two>:c:3] <lora:my style:-1>", "a1111", 10)
    assert read.loras == (Lora("one", 0.8), Lora("two", 1.0), Lora("my style", -1.0)) and read.loras[0] == (
        "one",
        0.8,
    )
    read = read_prompt("a <hypernet:h:1> AND b <x:y>", "a1111")
    assert pieces(read.at(0)) == [[("a  AND b <x:y>", 1)]] and len(read.notes) == 2
    assert read_prompt("embedding:a.safetensors (embedding:b,:2) embedding:a", "comfyui").embeddings == (
        "a",
        "b",
    )
    assert read_prompt("a withLora(one, 0.5) useLora(two)", "compel").loras == (("one", 0.5), ("two", 1.0))


@pytest.mark.parametrize(
    ("syntax", "prompt", "message"),
    [
        ("a1111", "a dog (cat:" + "9" * 400 + ")", 'prompt "a dog.*weight inf of "cat" is no usable number'),
        ("a1111", "(cat:1001)", 'weight 1001 of "cat"'),
        ("a1111", "(" * 1000 + "cat", 'weight 2.46993e.41 of "cat"'),
        ("a1111", "[a:b:1e999]", r"\[...:1e999\] names no step"),
        ("a1111", "[a:b:9." + "9" * 400 + "e307]", "names no step"),
        ("a1111", "<lora:a:b>", "<lora:a:b> must be <lora:name> or"),
        ("a1111", "<lora:a:1:2>", "one number"),
        ("a1111", "<lora:a:9999>", "weight 9999"),
        ("comfyui", "(cat:nan) dog", 'prompt "\\(cat:nan\\) dog": the weight nan of "cat"'),
        ("comfyui", "(cat:inf)", "weight inf"),
        ("comfyui", "(Daft Punk: Infinity)", "weight inf.*write"),
        ("comfyui", "(" * 1000 + "cat" + ")" * 1000, "weight"),
        ("compel", "cat" + "+" * 5000, "weight"),
        ("compel", "(cat)" + "9" * 400, "weight inf"),
        ("compel", '("a", "b").blend(1, 1)', r"compel's .blend\(\) is not read here"),
        ("compel", '("a", "b").and()', r".and\(\)"),
        ("compel", "a cat.swap(dog)", r".swap\(\)"),
        ("a111", "a", "there is no prompt syntax 'a111', did you mean a1111"),
    ],
)
def test_what_cannot_be_used_is_one_line(syntax: str, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_prompt(prompt, syntax, 10)
    assert "\n" not in str(caught.value)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(UserError, match="there is no emphasis 'no norm', did you mean no_norm"):
        read_prompt("a", "a1111", emphasis="no norm")
    with pytest.raises(UserError, match="for 0 steps"):
        read_prompt("a", "a1111", 0)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "compel"])
@pytest.mark.parametrize(
    "unit", ["(", ")", "[", "[a|b]", "[a:", "()", "\\", "<lora:", "+a", '"', ":", " ", "-+"]
)
def test_long_prompts_of_brackets_take_no_time(syntax: str, unit: str) -> None:
    """Anything quadratic would take minutes."""
    end = ")1" if syntax == "compel" else ":1)"
    for prompt in (unit * (10_000 // len(unit)), "(" * 3000 + unit + end * 3000 + "cat"):
        read = read_prompt(prompt, syntax, 3)
        assert 1 <= len(read.segments) <= 3


# Long texts


def text_of(syntax: str, *runs: tuple[str, int, float]) -> WeightedText:
    return WeightedText((tuple(Piece(letter * count, weight) for letter, count, weight in runs),), syntax)  # type: ignore[arg-type]


def lengths(text: str | WeightedText) -> list[int]:
    return [len(each.ids) for each in chunks_of(text, tokenize, 75)]


def test_a1111_splits_at_the_last_comma_of_twenty_tokens() -> None:
    for place, first in ((0, 75), (54, 75), (55, 56), (73, 74), (74, 75), (75, 75)):
        text = text_of("a1111", ("a", place, 1.0), (",", 1, 1.0), ("b", 79 - place, 1.2))
        assert lengths(text) == [first, 80 - first], place
    assert lengths(text_of("a1111", ("a", 151, 1.0))) == [75, 75, 1]
    assert lengths(text_of("a1111", (",", 76, 1.0))) == [75, 1]
    both = read_prompt("a" * 80 + " BREAK b", "a1111").at(0)
    assert lengths(both) == [75, 5, 1]


def test_comfyui_takes_short_pieces_whole_to_the_next_window() -> None:
    assert lengths(text_of("comfyui", ("a", 70, 1.0), ("b", 7, 1.1))) == [70, 7]
    assert lengths(text_of("comfyui", ("a", 70, 1.0), ("b", 8, 1.1))) == [75, 3]
    assert lengths(text_of("comfyui", ("a", 160, 1.0), ("b", 5, 1.1))) == [75, 75, 15]
    assert lengths(text_of("comfyui", ("a", 75, 1.0))) == [75]
    assert lengths("a" * 76) == lengths(text_of("compel", ("a", 76, 1.0))) == [75, 1]
