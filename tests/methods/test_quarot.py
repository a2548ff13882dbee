from pathlib import Path
from typing import Any

import pytest

import dfrot
from dfrot.system.errors import UserError
from tests.tiny_models import write_tiny_model


@pytest.mark.parametrize(
    ("changed", "method", "options", "way_out", "instead"),
    [
        ({"intermediate_size": 81}, "quarot", {}, "Use --fold-only", {"fold_only": True}),
        ({"hidden_size": 42}, "quarot", {}, "Use --rotation orthogonal", {"rotation": "orthogonal"}),
        ({"hidden_size": 42}, "duquant", {"base": "quarot"}, "Use --base none", {"base": "none"}),
        (
            {"num_attention_heads": 6},
            "quarot",
            {"head_mixing": True},
            "Leave out --head-mixing",
            {"head_mixing": False},
        ),
        ({"head_dim": 30}, "quarot", {}, "Use --method none", {"method": "none"}),
        ({"head_dim": 30}, "duquant", {}, "Use --method none", {"method": "none"}),
    ],
)
def test_where_there_is_no_hadamard_matrix_the_message_names_a_way_that_works(
    tmp_path: Path,
    text_file: Path,
    changed: dict[str, Any],
    method: str,
    options: dict[str, Any],
    way_out: str,
    instead: dict[str, Any],
) -> None:
    model = write_tiny_model("mistral", tmp_path / "model", **changed)
    asked: dict[str, Any] = {"method": method, "weights": "rtn", "calib": str(text_file), "calib_tokens": 64, **options}
    with pytest.raises(UserError, match=f"no Hadamard matrix of size {next(iter(changed.values()))}.*{way_out}"):
        dfrot.quantize(model, dfrot.Recipe.parse(**asked), tmp_path / "out")
    dfrot.quantize(model, dfrot.Recipe.parse(**asked | instead), tmp_path / "out")
