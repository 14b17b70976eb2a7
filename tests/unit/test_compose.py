"""Compose: what people write on the command line is what they get, or one line that says what to write."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build import compose_build
from data_pipeline.errors import ConfigError

WORDS = ["source=synthetic", "features=patch"]
# A brace after a dollar sign is an interpolation; null, numbers and quotes around the whole have a meaning of their own.
LETTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="$")
PATHS = st.text(LETTERS, max_size=12).map(lambda text: f"/d/{text}x")


@settings(max_examples=12, deadline=None)
@given(PATHS)
def test_any_path_can_be_given(path: str) -> None:
    assert compose_build([*WORDS, f"out={path}"]).out == path


@pytest.mark.parametrize("path", ["/a b/ü (1), [x]", "it's here\\", "a,b", "a\\'b", "=", "/x:y{z}"])
def test_paths_with_blanks_quotes_and_commas(path: str) -> None:
    assert compose_build([*WORDS, f"out={path}", f"root={path}"]).root == path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limit=3", "limit=1e3"], "limit=1e3: "),  # the one that counts, not the first
        (["splits=train"], "splits=train; a list is needed; write splits=[train]"),
        (["splits=train,validation"], "splits=train,validation; a list is needed; write splits=[train,validation]"),
        (["splits=[train"], "write splits=[train]"),
        (["limit=1,2"], "limit="),
        (["--dryrun"], "'--dryrun' cannot be read as a setting"),
        (["features.position_scale=nan"], "features.position_scale=nan"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_build([*WORDS, "out=x", *words])
    assert message in str(refused.value) and "\n" not in str(refused.value)
