"""Some wrong inputs of every kind, always the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wrong_inputs import KINDS
from tests.wrong_inputs.trying import bad_ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_input_is_refused_in_one_line_or_works(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tries, _, count = KINDS[kind]
    assert not bad_ends(tries(tmp_path, 0, count))
