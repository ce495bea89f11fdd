"""Captions: every option by example, and laws that hold for any text and any settings."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_fast.data import captions
from anima_fast.data.captions import Caption
from anima_fast.data.subset import Subset


def render(text, seed=0, epoch=1, step=0, max_steps=100, tags="", **settings):
    return captions.render(
        Caption(text, tags),
        Subset(**settings),
        rng=random.Random(seed),
        epoch=epoch,
        step=step,
        max_steps=max_steps,
    )


def test_plain_text_is_left_alone():
    assert render("a,b ,  c") == "a,b ,  c"
    assert render("{a|b}, {{c}}") == "{a|b}, {{c}}"
    assert render("") == ""


def test_first_line_prefix_suffix_and_secondary_separator():
    text = "\n  one;;;two, three\r\nfour"
    settings = dict(caption_prefix="pre", caption_suffix="suf", secondary_separator=";;;")
    assert render(text, **settings) == "pre one,two, three suf"


def test_dropout_by_rate_and_by_epoch():
    assert render("a", caption_dropout_rate=1.0) == ""
    dropped = sum(render("a", seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 430 < dropped < 570
    kept = [render("a", epoch=e, caption_dropout_every_n_epochs=3) for e in range(1, 7)]
    assert kept == ["a", "a", "", "a", "a", ""]
    assert render("a", epoch=1, caption_dropout_every_n_epochs=1) == ""


def test_wildcards():
    text = "a {red|blue} {{cat}}\n\n second "
    seen = Counter(render(text, seed, enable_wildcard=True) for seed in range(400))
    assert set(seen) == {"a red {cat}", "a blue {cat}", "second"}
    assert seen["second"] > 150 and min(seen.values()) > 60
    both = render(text, enable_wildcard=True, caption_prefix="P", caption_suffix="{S|S}")
    assert both.startswith("P ") and both.endswith(" S")


def test_shuffle_keeps_the_first_tags():
    text = "x, y, a, b, c, d"
    seen = {render(text, seed, shuffle_caption=True, keep_tokens=2) for seed in range(50)}
    assert len(seen) > 10
    for found in seen:
        assert found.startswith("x, y, ")
        assert sorted(found.split(", ")) == sorted(text.split(", "))


def test_keep_tokens_separator_encloses_the_flexible_part():
    text = "x, y ||| a, , b, c ||| end, more"
    settings = dict(keep_tokens_separator="|||", keep_tokens=1)
    seen = {render(text, seed, shuffle_caption=True, **settings) for seed in range(50)}
    assert len(seen) == 6
    assert all(s.startswith("x, y, ") and s.endswith(", end, more") for s in seen)
    # Without anything to arrange the separator is removed all the same.
    assert render(text, **settings) == "x, y, a, b, c, end, more"
    assert render("no separator,here", **settings) == "no separator,here"


def test_secondary_separator_moves_tags_together():
    settings = dict(shuffle_caption=True, secondary_separator=";;;")
    for seed in range(20):
        assert "b,c" in render("a, b;;;c, d, e", seed, **settings)


def test_other_separator():
    found = render("a; b; c", shuffle_caption=True, caption_separator=";")
    assert sorted(found.split("; ")) == ["a", "b", "c"]


def test_tag_dropout_spares_kept_tags():
    assert render("a, b, c", keep_tokens=1, caption_tag_dropout_rate=1.0) == "a"
    text = ", ".join("abcdefghij")
    total = sum(
        len(render(text, seed, keep_tokens=2, caption_tag_dropout_rate=0.5).split(", "))
        for seed in range(400)
    )
    assert 2250 < total < 2550


@pytest.mark.parametrize(
    "step, count", [(0, 1), (5, 1), (10, 2), (25, 3), (49, 5), (50, 6), (99, 6)]
)
def test_token_warmup(step, count):
    text = "k, a, b, c, d, e, f"
    for warmup in (50.0, 0.5):
        found = render(text, step=step, keep_tokens=1, token_warmup_step=warmup)
        assert found == ", ".join(text.split(", ")[: 1 + count])


def test_metadata_tags_join_every_line():
    assert render("cap", tags="t1, t2\nt3") == "cap,t1, t2,t3"
    assert render("", tags="t1") == "t1"
    seen = {render("a\nb", seed, tags="t", enable_wildcard=True) for seed in range(20)}
    assert seen == {"a,t", "b,t"}


def test_variants_are_distinct_complete_and_repeatable():
    subset = Subset(shuffle_caption=True, keep_tokens=1, caption_prefix="P", caption_dropout_rate=1)
    caption = Caption("k, a, b, c")
    found = captions.variants(caption, subset, 4, seed=3)
    assert len(set(found)) == len(found) == 4
    assert all(text.startswith("P k, ") for text in found)
    assert found == captions.variants(caption, subset, 4, seed=3)
    assert found != captions.variants(caption, subset, 4, seed=4)
    assert len(captions.variants(caption, subset, 50, seed=3)) == 6


def test_variants_without_randomness():
    caption = Caption("a ||| b\nsecond")
    subset = Subset(keep_tokens_separator="|||", caption_suffix="S", caption_dropout_rate=0.5)
    assert captions.variants(caption, subset, 8, seed=0) == ["a, b S"]
    assert not captions.is_random(subset, caption)
    assert captions.variants(Caption("one"), Subset(shuffle_caption=True), 8, seed=0) == ["one"]


def test_variants_with_tag_dropout_keep_their_frequencies():
    subset = Subset(caption_tag_dropout_rate=0.1)
    found = captions.variants(Caption("a, b"), subset, 1000, seed=0)
    assert len(found) == 1000
    assert 760 < found.count("a, b") < 860


def test_variants_are_the_same_in_another_process():
    code = (
        "from anima_fast.data.captions import Caption, variants\n"
        "from anima_fast.data.dataset_config import Subset\n"
        "print(variants(Caption('a, b, c, d, e'), Subset(shuffle_caption=True), 3, 7))"
    )
    here = captions.variants(Caption("a, b, c, d, e"), Subset(shuffle_caption=True), 3, 7)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


texts = st.text(max_size=40) | st.text(alphabet="ab ,;|{}\n", max_size=40)
separators = st.sampled_from([",", ";", " ", "|", "ab", "{"])
subsets = st.builds(
    Subset,
    shuffle_caption=st.booleans(),
    caption_separator=separators,
    keep_tokens=st.integers(0, 5),
    keep_tokens_separator=st.sampled_from(["", "|||", "|", ","]),
    secondary_separator=st.none() | st.sampled_from(["", ";;;", ","]),
    enable_wildcard=st.booleans(),
    caption_prefix=st.none() | texts,
    caption_suffix=st.none() | texts,
    caption_dropout_rate=st.floats(0, 1),
    caption_dropout_every_n_epochs=st.integers(0, 3),
    caption_tag_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
    token_warmup_min=st.integers(0, 5),
    token_warmup_step=st.floats(0, 50),
)


@settings(max_examples=300, deadline=None)
@given(texts, texts, subsets, st.integers(0, 9), st.integers(1, 5), st.integers(0, 60))
def test_any_caption_renders(text, tags, subset, seed, epoch, step):
    caption = Caption(text, tags)
    arguments = dict(epoch=epoch, step=step, max_steps=50)
    found = captions.render(caption, subset, rng=random.Random(seed), **arguments)
    assert isinstance(found, str)
    assert found == captions.render(caption, subset, rng=random.Random(seed), **arguments)
    several = captions.variants(caption, subset, 3, seed)
    assert 1 <= len(several) <= 3
    if not captions.is_random(subset, caption):
        others = {captions.variants(caption, subset, 1, other)[0] for other in range(5)}
        assert others == set(several)


words = st.text(alphabet="abcdé日 ", min_size=1, max_size=5).map(str.strip).filter(bool)


@given(st.lists(words, min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 99))
def test_shuffling_loses_nothing_and_keeps_places(tags, keep, seed):
    found = render(", ".join(tags), seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert found[:keep] == tags[:keep]
    assert Counter(found) == Counter(tags)


@given(st.lists(words, max_size=4), st.lists(words, max_size=5), st.lists(words, max_size=3))
def test_enclosed_tags_stay_when_the_rest_is_dropped(head, middle, tail):
    text = "|||".join(",".join(part) for part in (head, middle, tail))
    settings = dict(keep_tokens_separator="|||", caption_tag_dropout_rate=1.0)
    assert render(text, **settings) == ", ".join(head + tail)


@given(st.text(alphabet="ab{}|, ", max_size=30), st.integers(0, 9))
def test_doubled_braces_are_literal(text, seed):
    doubled = text.strip().replace("{", "{{").replace("}", "}}")
    assert render(doubled, seed, enable_wildcard=True) == text.strip()
    assert not captions.is_random(Subset(enable_wildcard=True), Caption(doubled))
