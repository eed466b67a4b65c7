"""Shortening, near names and lone surrogates."""

from grpo_jax.text import has_lone_surrogate, nearest, replace_lone_surrogates, shorten


def test_a_shortened_text_has_the_limit_and_ends_in_an_ellipsis():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"


def test_the_most_similar_name_comes_first():
    assert nearest("lerning_rate", ["warmup_steps", "learning_rate", "learning"], n=2) == [
        "learning_rate",
        "learning",
    ]
    assert nearest("zzz", ["learning_rate"], cutoff=0.6) == []


def test_half_a_surrogate_pair_is_found_and_replaced_and_a_whole_one_stays():
    assert has_lone_surrogate("a\ud83d") and not has_lone_surrogate("a😀")
    assert replace_lone_surrogates("a\ud83db") == "a\ufffdb"
    assert replace_lone_surrogates("😀") == "😀"
