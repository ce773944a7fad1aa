"""What the models floor says about rows and messages at the edge of what it takes."""
import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.models.generation import token_log_probs
from fine_tune_llm.models.hub import without_token
from fine_tune_llm.models.loading import build_causal, load_model

def test_a_row_without_tokens_is_named() -> None:
    model = load_model("pocket", "sft", device="cpu")
    with pytest.raises(DataError, match="1 rows cannot be scored.*rows 1"):
        token_log_probs(model, build_causal(model), [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [], "labels": []}])


@pytest.mark.parametrize("before", range(260, 300, 3))
def test_a_cut_message_holds_no_piece_of_a_token(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    "The cut falls into and behind the token; a token of an unknown shape is known by its name in the environment."
    token = "hf_" + "a1B2" * 9
    for given in (token, None): assert "hf_" not in without_token("x" * before + f" {token} rest", given)
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")
    assert "my-o" not in without_token("x" * before + " my-own-secret", None)
