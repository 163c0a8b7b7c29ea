"""The tokenizer against transformers', with a small vocabulary and, if available, the official one."""

import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from minidrag.networks.tokenizer import BOS, EOS
from minidrag.tiny.vocabulary import learn_merges, train
from minidrag.weights.vocabulary import load_tokenizer

CAPTIONS = [
    "a red circle on the grass",
    "a blue square and two yellow stars in the snow",
    "it's the circle's shadow, they're 12 of 345!",
    "Un café, naïve résumé; über Straße",
    "猫が桌子上 привет мир",
    "hello!!! (best:1.2), snake_case_word",
]
HARD = [
    *("", "   ", "a photo of a cat", "A PHOTO OF A CAT", "  a \t photo\n\n of   a cat  "),
    *(
        "a\u00a0photo\u3000of\u2003cat",
        "a\u200bphoto",
        "👨\u200d👩\u200d👧\u200d👦 portrait",
        "a cat 😀🔥 on fire",
    ),
    *("\U0001f1ef\U0001f1f5 flag", "👍🏽", "caf\u00e9 na\u00efve", "cafe\u0301 nai\u0308ve", "ÜBER Straße ẞ"),
    *(
        "\u0130stanbul ISPARTA \u0131",
        "ΟΔΥΣΣΕΥΣ",
        "Привет мир",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते दुनिया",
        "สวัสดี",
    ),
    *("一只猫在桌子上", "猫がテーブルの上にいる カタカナ", "고양이", "a 猫 photo写真of cat"),
    *("tom &amp; jerry &lt;3 &#39;hi&#39;", "<b>bold</b>", "it's they're I've I'm we'll he'd don't CAN'T"),
    *(
        "it\u2019s \u201cquoted\u201d text \u2014 dash\u2026",
        "it`s",
        "12345 3.14 1,000,000 2x4k 8K",
        "Ⅷ ½ ² ①",
    ),
    *("ＡＢＣ１２３", "ﬁne ﬂow", "!!!???...,,,;;;###", "(masterpiece:1.2), [bad], ((best))", "dogs' cats'"),
    *("a cat, <lora:foo:0.8>, BREAK, _underscore_", "https://example.com/a?b=c&d=e", "'s ''s 'S 'sun 'tis"),
    *(
        "congre\u017fs '\u017f",
        "a <|endoftext|> b",
        "<|startoftext|> a",
        "a <|ENDOFTEXT|> b",
        "<|STARTOFTEXT|>x",
    ),
    *(
        "cafÃ© â€œhiâ€\u009d",
        "a\x00b\x07c\x1bd",
        "co\u00adop",
        "\ufeffcat",
        "a\u200fb",
        "a\ufffdb",
        "𝔘𝔫𝔦 𝐛𝐨𝐥𝐝",
    ),
    *("\u0301a", "a\u2028b\u2029c", "a\x0bb\x0cc", "a\x85b", "a\x1cb", "\u212a \u212b \u2126", "a≤b ∑ ∞"),
    *(
        "cat " * 74,
        "cat " * 75,
        "cat " * 76,
        "cat " * 400,
        "supercalifragilistic" * 30,
        "hello! wow!! a!b ! <|endoftext|>!",
    ),
]


def random_prompts(count: int) -> list[str]:
    """Random strings from all of Unicode except surrogates, with a bias to the first blocks."""
    rng = random.Random(0)
    blocks = [(32, 127), (32, 127), (0, 0x300), (0x300, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000)]
    blocks += [(0x10000, 0x20000)]
    return [
        "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(60)))
        for _ in range(count)
    ]


def assert_same(folder: Path) -> None:
    """Assert that all prompts above and random ones get the ids that transformers gives them."""
    ours, theirs = load_tokenizer(folder), CLIPTokenizerFast.from_pretrained(folder)
    prompts = HARD + CAPTIONS + random_prompts(2000)
    got = ours(prompts)
    want = theirs(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    different = [repr(prompts[i]) for i in range(len(prompts)) if not torch.equal(got[i], want[i])]
    assert not different, f"{len(different)} of {len(prompts)} prompts differ: {different[:3]}"
    assert [ours.length(prompt) for prompt in prompts[:100]] == [
        len(theirs(p).input_ids) for p in prompts[:100]
    ]


def set_pad(folder: Path, pad: object) -> None:
    """Change the pad token of the tokenizer in a folder."""
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))


@pytest.fixture(scope="session")
def official() -> Path:
    folder = os.environ.get("MINIDRAG_CLIP_VOCAB")
    if not folder:
        pytest.skip("MINIDRAG_CLIP_VOCAB is not set to a folder with CLIP's vocab.json and merges.txt")
    return Path(folder)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    train(CAPTIONS, 600, tmp_path)
    return tmp_path


def test_small_vocabulary_gives_the_ids_of_transformers(small: Path) -> None:
    assert_same(small)


def test_official_vocabulary_gives_the_ids_of_transformers(official: Path) -> None:
    assert_same(official)


@pytest.mark.parametrize("pad", ["!", {"content": "!", "lstrip": False, "rstrip": False}])
def test_sd_2_pads_with_an_exclamation_mark(small: Path, pad: object) -> None:
    set_pad(small, pad)
    assert load_tokenizer(small)("a")[0, 3:].eq(0).all()
    assert_same(small)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("café naïve résumé", [15304, 1097, 35689, 563, 29106, 7054, 4166]),
        (unicodedata.normalize("NFD", "café naïve résumé"), [15304, 1097, 35689, 563, 29106, 7054, 4166]),
        ("a cat 😀🔥 on fire", [320, 2368, 12832, 3016, 525, 1769]),
        (
            "一只猫在桌子上",
            [19759, 222, 34517, 103, 163, 234, 104, 37746, 101, 162, 94, 234, 35751, 238, 19759, 488],
        ),
        ("it’s", [585, 728, 503, 338]),
        ("", []),
    ],
)
def test_worked_examples(official: Path, prompt: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer(official)
    assert tokenizer(prompt).tolist() == [[49406, *ids, *[49407] * (76 - len(ids))]]
    assert tokenizer.length(prompt) == len(ids) + 2


def test_shape_start_end_and_truncation(small: Path) -> None:
    tokenizer = load_tokenizer(small)
    rows = tokenizer(["", "a", "a " * 75, "a " * 76, "a " * 500])
    assert rows.shape == (5, 77) and rows.dtype == torch.int64
    assert tokenizer("a").shape == (1, 77) and tokenizer([]).shape == (0, 77)
    assert rows[:, 0].eq(tokenizer.bos).all() and rows[:, -1].eq(tokenizer.eos).all()
    assert torch.equal(rows[2], rows[3]) and torch.equal(rows[3], rows[4])
    assert [tokenizer.length(text) for text in ("", "a", "a " * 75, "a " * 76)] == [2, 3, 77, 78]


def test_learned_vocabulary_has_the_layout_of_clip(small: Path) -> None:
    tokens = sorted(json.loads((small / "vocab.json").read_text()).items(), key=lambda item: item[1])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [i for _, i in tokens] == list(range(600))
    assert [token for token, _ in tokens[:512]] == letters + [letter + "</w>" for letter in letters]
    assert [token for token, _ in tokens[-2:]] == [BOS, EOS]
    lines = (small / "merges.txt").read_text().split("\n")
    assert lines[0] == "#version: 0.2" and lines[-1] == "" and len(lines) == 600 - 514 + 2
    assert [line.replace(" ", "") for line in lines[1:-1]] == [token for token, _ in tokens[512:-2]]


def test_official_vocabulary_has_the_same_layout(official: Path) -> None:
    tokens = sorted(json.loads((official / "vocab.json").read_text()).items(), key=lambda item: item[1])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [token for token, _ in tokens[:512]] == letters + [letter + "</w>" for letter in letters]
    assert [token for token, _ in tokens[-2:]] == [BOS, EOS]


def test_training_merges_the_most_frequent_pair_first() -> None:
    words = {("l", "o", "w</w>"): 5, ("l", "o", "t</w>"): 2, ("a", "a", "a", "a</w>"): 1}
    merges = learn_merges(words, 3)  # type: ignore[arg-type]
    # l o occurs 7 times; then lo w</w> 5 times; then a a and lo t</w> twice each
    assert merges == [("l", "o"), ("lo", "w</w>"), ("a", "a")]


def test_training_ignores_order_and_stops_without_pairs(tmp_path: Path) -> None:
    train(CAPTIONS, 600, tmp_path / "forwards")
    train(reversed(CAPTIONS), 600, tmp_path / "backwards")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "forwards" / name).read_bytes() == (tmp_path / "backwards" / name).read_bytes()
    tokenizer = train(["red circle", "red square"], 5000, tmp_path / "few")
    assert tokenizer.length("red circle square") == 5  # every word is one token, so no pair is left
    assert len(json.loads((tmp_path / "few" / "vocab.json").read_text())) < 600
    assert_same(tmp_path / "few")
    with pytest.raises(ValueError, match="513"):
        train(CAPTIONS, 513, tmp_path / "none")


# --- added tokens, and tokenizer.json ---


def next_id(folder: Path) -> int:
    return len(json.loads((folder / "vocab.json").read_text()))


MENTIONS = [
    "a <cat-toy> on the grass",
    "<cat-toy><cat-toy>x<cat-toy>",
    "A <Big> one, a <big> one",
    "my sks dog, asks",
    "<Special> and <special>",
    "an <|endoftext|> <cat-toy>!",
]


def assert_added(folder: Path) -> None:
    """Assert that prompts with added tokens, hard ones, and random ones get the ids of transformers."""
    ours, theirs = load_tokenizer(folder), CLIPTokenizerFast.from_pretrained(folder)
    prompts = MENTIONS + HARD + random_prompts(200)
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    want = theirs(prompts, **options).input_ids
    different = [
        prompt for prompt, a, b in zip(prompts, ours(prompts), want, strict=True) if not torch.equal(a, b)
    ]
    assert not different, different[:3]


def test_added_tokens_json(small: Path) -> None:
    first = next_id(small)
    (small / "added_tokens.json").write_text(json.dumps({"<cat-toy>": first, "<Big>": first + 1}))
    assert load_tokenizer(small)("<cat-toy>")[0, 1] == first and load_tokenizer(small).size == first + 2
    assert_added(small)


def save_with_added(small: Path, folder: Path) -> Path:
    tokenizer = CLIPTokenizerFast.from_pretrained(small)
    tokenizer.add_tokens(["<cat-toy>", "<Big>", AddedToken("sks", single_word=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<Special>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_what_transformers_saves(small: Path, tmp_path: Path) -> None:
    """transformers 5 saves tokenizer.json and tokenizer_config.json alone."""
    saved = save_with_added(small, tmp_path / "saved")
    assert (saved / "tokenizer.json").is_file()
    assert_added(saved)
    assert load_tokenizer(saved)("sks")[0, 1] == next_id(small) + 2


@pytest.mark.parametrize("pairs", [True, False])
def test_merges_in_tokenizer_json_are_pairs_or_texts(small: Path, tmp_path: Path, pairs: bool) -> None:
    plain = load_tokenizer(small)(HARD)
    saved = save_with_added(small, tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):
        (saved / name).unlink(missing_ok=True)
    whole = json.loads((saved / "tokenizer.json").read_text())
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
    whole["model"]["merges"] = merges if pairs else [" ".join(pair) for pair in merges]
    whole["added_tokens"] = whole["added_tokens"][:2]
    (saved / "tokenizer.json").write_text(json.dumps(whole))
    assert merges and torch.equal(load_tokenizer(saved)(HARD), plain)


def test_the_added_tokens_of_a_resaved_tokenizer_with_a_vocabulary(small: Path, tmp_path: Path) -> None:
    """transformers 4 saved the vocabulary, tokenizer.json, added_tokens.json, and the same in its config."""
    saved = save_with_added(small, tmp_path / "saved")
    whole = json.loads((saved / "tokenizer.json").read_text())
    for name in ("vocab.json", "merges.txt"):
        (saved / name).write_bytes((small / name).read_bytes())
    expected = load_tokenizer(saved)(MENTIONS)
    added = {entry["id"]: entry for entry in whole["added_tokens"]}
    config = json.loads((saved / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(number): entry for number, entry in added.items()}
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    numbers = {entry["content"]: number for number, entry in added.items() if number >= next_id(small)}
    (saved / "added_tokens.json").write_text(json.dumps(numbers))
    assert torch.equal(load_tokenizer(saved)(MENTIONS), expected)
    (saved / "tokenizer.json").unlink()
    assert torch.equal(load_tokenizer(saved)(MENTIONS), expected)


def test_a_concept_of_several_vectors_is_named_by_its_first(small: Path) -> None:
    """As in the pipelines of diffusers, which write <toy> <toy>_1 <toy>_2 for <toy>."""
    first = next_id(small)
    names = {"<toy>": first, "<toy>_1": first + 1, "<toy>_2": first + 2, "<one>": first + 3}
    (small / "added_tokens.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(small)
    a, end = tokenizer("a")[0, 1].item(), tokenizer.eos
    assert tokenizer("a <toy> a <one>")[0, 1:8].tolist() == [
        a,
        first,
        first + 1,
        first + 2,
        a,
        first + 3,
        end,
    ]
    assert torch.equal(tokenizer("a <toy> <toy>_1 <toy>_2"), tokenizer("a <toy>"))
    assert tokenizer.length("<toy>") == 5


@pytest.mark.parametrize("pad", ["!", {"content": "!"}, "<|endoftext|>", None])
def test_the_pad_token_of_a_config_without_a_map(small: Path, pad: object) -> None:
    (small / "special_tokens_map.json").unlink()
    config = {"pad_token": pad, "model_max_length": None}
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(small)("a")[0, 3:].eq(0 if pad and "!" in str(pad) else next_id(small) - 1).all()


def test_an_added_token_without_a_vector_of_its_own_keeps_its_id(small: Path) -> None:
    """Ids need not follow on the vocabulary's."""
    (small / "added_tokens.json").write_text(json.dumps({"<far>": 5000}))
    assert load_tokenizer(small)("a <far>")[0, 2] == 5000 and load_tokenizer(small).size == 5001
