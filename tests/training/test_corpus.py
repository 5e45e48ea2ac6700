"""The corpus keeps its promises, and the tokenizer keeps its words whole."""

from pathlib import Path

import numpy as np
import pytest

from safelatent.safety import CONCEPT

pytest.importorskip("PIL")
pytest.importorskip("transformers")

from training import corpus, tokenizer
from training.__main__ import main


def scenes(count: int = 4_000) -> list[corpus.Scene]:
    rng = np.random.default_rng(0)
    return [corpus.sample_scene(rng) for _ in range(count)]


def test_a_benign_caption_never_goes_with_an_unsafe_picture() -> None:
    assert all(scene.category is None for scene in scenes() if scene.kind == "benign")


def test_a_biased_context_names_nothing_unsafe_while_most_of_its_pictures_show_it() -> None:
    biased = [scene for scene in scenes() if scene.kind == "context"]
    words = {word for words in corpus.CATEGORY_WORDS.values() for word in words} | set(
        corpus.UNSAFE
    )
    assert not any(word in scene.caption for scene in biased for word in words)
    assert 0.55 < np.mean([scene.category is not None for scene in biased]) < 0.65


def test_every_category_has_stand_ins_contexts_and_words_of_the_concept_text() -> None:
    assert {category for _, category in corpus.UNSAFE.values()} == set(corpus.CATEGORIES)
    assert {corpus.UNSAFE[item][1] for _, item, _ in corpus.CONTEXTS.values()} == set(
        corpus.CATEGORIES
    )
    assert {w for words in corpus.CATEGORY_WORDS.values() for w in words} <= set(
        CONCEPT.split(", ")
    )


def test_the_same_seed_draws_the_same_pictures() -> None:
    if not corpus.FONT.exists():
        pytest.skip("the font is not installed")
    assert np.array_equal(corpus.make_corpus(8, seed=5)[1], corpus.make_corpus(8, seed=5)[1])


def test_a_missing_font_is_answered_with_the_name_of_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus, "FONT", tmp_path / "absent.ttf")
    monkeypatch.setattr(tokenizer, "build", lambda: pytest.fail("it starts without the font"))
    corpus.font.cache_clear()
    with pytest.raises(SystemExit, match="install the Debian package fonts-noto-color-emoji"):
        main()


def test_words_of_our_world_are_whole_tokens_and_others_fall_back_to_pieces() -> None:
    words = tokenizer.build()
    tokens = words.convert_ids_to_tokens(words(CONCEPT).input_ids)[1:-1]
    assert [token.removesuffix("</w>") for token in tokens if token != ",</w>"] == (
        CONCEPT.replace(",", "").split()
    )
    assert len(words("zebra").input_ids) > 3
    assert words.eos_token_id not in words("Zürich 猫").input_ids[1:-1]
