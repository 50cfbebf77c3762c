"""Templates: the seed alone chooses, what the library would pass over is an error, and every expansion ends."""

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import UserError
from pipelines.wildcards import LONGEST, Wildcards

ROOT = Path(__file__).parents[1]
COLOURS = {"red", "50% grey", "grün"}
DOUBLED = "".join(f"${{{b}=${{{a}}}${{{a}}}}}" for a, b in pairwise("abcdefghijklmno"))
FILES = {
    "colour.txt": "\ufeffred\r\n# no colour\n\n50% grey\ngrün\rred\n",
    "animals/cat.txt": "a tabby\na {young|old} tom\n",
    "animals/dog.txt": "a __colour__ dog\n",
    "more.yaml": "more:\n  metal: [gold, '3::silver', {text: tin, weight: 0}]\n  one: only\n",
    "more.json": '{"list": ["x", {"content": "y", "weight": 2.5}]}',
    "self.txt": "and __self__\n",
    "nothing.json": '{"nothing": ["# no word"]}',
    "g0.txt": "x\n",
    "empty.txt": "# none\n\n",
    "bytes.txt": b"\xff\n",
    "long.txt": "y" * (LONGEST + 1),
    "big.txt": "z" * 300,
    ".hidden/no.txt": "no",
    "notes.md": "no",
} | {f"g{k}.txt": f"__g{k - 1}__ __g{k - 1}__\n" for k in range(1, 20)}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("words"), FILES)


@pytest.fixture(scope="module")
def words(folder: Path) -> Wildcards:
    return Wildcards(folder)


def results(words: Wildcards, template: str, count: int = 100) -> Counter[str]:
    return Counter(words.expand(template, seed) for seed in range(count))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("a {red|blue} fox", {"a red fox", "a blue fox"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{2$$a|b}", {"a,b", "b,a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$a|b}", {"a", "b", "a,b", "b,a"}),
        ("{{a|b} c|d}", {"a c", "b c", "d"}),
        ("{0::a|b}", {"b"}),
        ("{|very }big", {"big", "very big"}),
        ("${x=!{a|b}}${x}${x}", {"aa", "bb"}),
        ("${x:c} {a|b}", {"c a", "c b"}),
        ("%{big ... cat$${a|b}}", {"big a cat", "big b cat"}),
        ("__colour__", COLOURS),
        ("{2$$__colour__}", {",".join(pair) for pair in permutations(COLOURS, 2)}),
        ("__animals/cat__", {"a tabby", "a young tom", "a old tom"}),
        ("__dog__", {"a red dog", "a 50% grey dog", "a grün dog"}),  # as the library: also in folders within
        ("__animals/d*__", {"a red dog", "a 50% grey dog", "a grün dog"}),
        ("__~more/metal__", {"gold", "silver"}),
        ("__more/one__ __list__", {"only x", "only y"}),
        ("__${n:colour}__", COLOURS),
        (
            "100% {a|b}, $5, (x:1.2) [y] <lora:z:1> 猫🦊",
            {f"100% {e}, $5, (x:1.2) [y] <lora:z:1> 猫🦊" for e in "ab"},
        ),
        ("a__nothing__b", {"ab"}),
        ("  a  {b|b}\n c ", {"  a  b\n c "}),
    ],
)
def test_what_templates_become(words: Wildcards, template: str, wanted: set[str]) -> None:
    assert set(results(words, template)) == wanted


def test_weights_are_kept(words: Wildcards) -> None:
    for template, often in (
        ("{3::a|b}", "a"),
        ("__more/metal__", "silver"),
    ):  # 3 of 4, ± 4 standard deviations
        assert abs(results(words, template, 1000)[often] - 750) < 55


@given(st.text().filter(lambda text: not {"{", "}"} & set(text) and "__" not in text))
@settings(max_examples=50, deadline=None)
def test_a_text_without_syntax_stays_as_it_is(text: str) -> None:
    assert Wildcards().expand(text, 1) == text


@pytest.mark.parametrize(
    "text", ["", "  a  ", "a # b", "a // b /* c */", "50% $5 $$", "a|b (c:1.1) [d]", "a_b_"]
)
def test_so_does_what_only_looks_like_syntax(words: Wildcards, text: str) -> None:
    assert words.expand(text, 1) == text


@given(st.text(st.sampled_from("{}|$%_:!~@#=?.-/*()12ax "), max_size=24), st.integers(-(2**63), 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_any_text_becomes_one_text_or_one_line(text: str, seed: int) -> None:
    def once() -> str:
        try:
            return Wildcards().expand(text, seed)
        except UserError as error:
            assert str(error).isprintable()
            return f"error: {error}"

    random.seed(1)
    first, state = once(), random.getstate()
    random.seed(2)
    assert once() == first
    random.seed(1)
    assert random.getstate() == state  # nor does it draw from what others draw from


def test_seeds_differ(words: Wildcards) -> None:
    template = "{" + "|".join(map(str, range(200))) + "}"
    drawn = [words.expand(template, seed) for seed in (0, 1, -1, 2**64 - 1, 2**32, 2**64 - 2)]
    assert len(set(drawn)) == 5 and drawn[2] == drawn[3]  # a seed is one of 64 bits, with a sign or without


def test_other_processes_and_other_orders_of_files_give_the_same(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", dict(reversed(FILES.items())))
    templates = [
        "__more/*__ {a|b}",
        "{2-3$$__colour__}",
        "__animals/*__ __list__",
        "{a|b|c} ${x={d|e}}${x}${x}",
    ]
    program = (
        "import sys; from pathlib import Path; from pipelines.wildcards import Wildcards\n"
        "words = Wildcards(Path(sys.argv[1]))\n"
        "print(words.digest, ascii([words.expand(t, s) for t in sys.argv[2:] for s in range(9)]))"
    )
    here = Wildcards(folder)
    wanted = f"{here.digest} {[here.expand(t, s) for t in templates for s in range(9)]!a}\n"
    for place, seed in ((folder, "1"), (tmp_path / "other", "2")):
        run = [sys.executable, "-c", program, str(place), *templates]
        told = subprocess.run(
            run, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert told.stdout == wanted and not told.stderr
    assert here.expand("{a|b|c|d|e|f} __colour__ {2$$x|y|z}", 7) == "f grün x,z"  # and so it stays


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a {b", "can't be read from '{b' on"),
        ("a {50% b|c", "can't be read from '{50% b|c' on"),
        ("a __b", "can't be read from '__b' on"),
        ("__color__", "the wildcard __color__ is not in "),
        ("__color__", "did you mean colour?"),
        ("{2$$__none__}", "the wildcard __none__ is not in "),
        ("__../words/colour__", "the wildcard __../words/colour__ is not in "),
        ("__no__", "the wildcard __no__ is not in "),
        ("__empty__", "__empty__ holds no words"),
        ("__bytes__", "bytes.txt is not valid UTF-8"),
        ("__long__", "has a word of 20,001 characters"),
        ("__self__", "leads back to itself"),
        ("${x=${x}}${x}", "leads back to itself"),
        ("__g19__", "doesn't come to an end"),
        ("${a=x}" + DOUBLED + "${o}", "doesn't come to an end"),
        ("{" * 500 + "a" + "}" * 500, "nested too deeply"),
        ("__big__ " * 80, "becomes a text of more than 20,000"),
        ("{a|b} " * 4000, "is longer than 20,000"),
        ("${y} {a|b}", "Variable y is not defined"),
        ("{0::a|0::b}", "can't be expanded: Total of weights"),
        ("{@a|b}", "'@' chooses from one text to the next"),
        ("{!a|b}", "'!' chooses from one text to the next"),
        ("__@colour__", "'@' chooses"),
        ("__a${x:{b|c}}__", "can't be expanded"),
    ],
)
def test_mistakes_cost_one_line(words: Wildcards, template: str, said: str) -> None:
    for seed in (1, 2):
        with pytest.raises(UserError) as error:
            words.expand(template, seed)
        assert said in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": "x", "b.yaml": "a: [y]"}, "the wildcard __a__ is in"),
        ({"a.yaml": "a: [1990]"}, "a holds 1990, which is no word"),
        ({"a.yaml": "a: {b: [{text: x, weight: many}]}"}, "which is no word"),
        ({"a.yaml": "1: [x]"}, "the name 1 is no text"),
        ({"a.yaml": "a: [x"}, "is not valid YAML"),
        ({"a.json": "{"}, "is not valid JSON"),
        ({"a.json": "5"}, "expected lists of words by name"),
        ({"a.yaml": b"\xff"}, "is not valid UTF-8"),
    ],
)
def test_mistakes_in_a_folder(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Wildcards(write(tmp_path, files))
    assert str(error.value).isprintable()


def test_without_a_folder_or_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Wildcards().expand("{a|a}", 1) == "a"
    with pytest.raises(UserError, match="__colour__ needs a folder"):
        Wildcards().expand("__colour__", 1)
    with pytest.raises(UserError, match="none: no such folder"):
        Wildcards(tmp_path / "none")
    from pipelines import wildcards

    wildcards._library.cache_clear()
    monkeypatch.setitem(sys.modules, "dynamicprompts.enums", None)
    with pytest.raises(UserError, match=r'pip install "ldm-text-to-image\[batch\]"'):
        Wildcards()


def test_the_digest_is_of_names_and_words(tmp_path: Path) -> None:
    digests = {
        Wildcards(write(tmp_path, {"a.txt": "x"})).digest,
        Wildcards(write(tmp_path, {"a.txt": "y"})).digest,
    }
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = Wildcards(tmp_path)
    assert len({*digests, found.digest}) == 3 and found.expand("__b__", 1) == "y"
