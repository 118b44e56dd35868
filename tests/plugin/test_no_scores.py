"""The marker no_materialised_scores."""

import pytest
from plugin_models import Run


def test_no_scores_names_layers_and_why_sdpa_was_not_fused(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        """
        import pytest, torch
        from plugin_models import make_gpt2, train
        from torch import nn

        @pytest.mark.no_materialised_scores
        @pytest.mark.parametrize("dropout", [0.0, 0.1])
        def test_sdpa(dropout):
            train(make_gpt2("sdpa", dropout=dropout), 24)

        @pytest.mark.no_materialised_scores()
        def test_eager():
            train(make_gpt2("eager"), 24)

        @pytest.mark.no_materialised_scores
        def test_fast_path():
            layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
            x = torch.randn(2, 24, 32)
            with torch.no_grad():
                layer(x, x, x, need_weights=False)

        @pytest.mark.no_materialised_scores
        def test_without_attention():
            nn.Linear(3, 4)(torch.ones(2, 3)).sum().backward()
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*_ test_sdpa[[]0.1] _*",
            "2 attention layers make a score matrix, and none may [[]no_materialised_scores]",
            "* KiB  transformer.h.[[]0-1].attn, each: 24 × 24 scores in 4 heads; "
            "scaled_dot_product_attention fell back to math: dropout on the attention weights",
            "To see every byte: attnprof report *",
            "*_ test_eager _*",
            "2 attention layers make a score matrix, and none may [[]no_materialised_scores]",
            "* KiB  transformer.h.[[]0-1].attn, each: 24 × 24 scores in 4 heads; "
            "written out: products around _softmax",
            "*_ test_fast_path _*",
            "1 attention layer makes a score matrix, and none may [[]no_materialised_scores]",
            "* KiB  outside of submodules: 24 × 24 scores in 4 heads; "
            "written out: products around _softmax",
        ]
    )
