"""What the oldest torch that is allowed cannot do: marks for the tests of it."""

import pytest
import torch

from attnprof.capture.dynamo import RUNS_COMPILED

needs_compiled_code = pytest.mark.skipif(
    not RUNS_COMPILED, reason="torch before 2.10 runs compiled code op by op under a trace"
)
needs_profiled_modes = pytest.mark.skipif(
    not RUNS_COMPILED, reason="before torch 2.10 profiles do not say which op ran under a mode"
)
_Q, _K = torch.ones(1, 4, 16, 8), torch.ones(1, 2, 16, 8)
needs_fused_groups = pytest.mark.skipif(
    torch._fused_sdp_choice(_Q, _K, _K, enable_gqa=True) == 0,
    reason="torch 2.8 has no fused kernel for grouped queries on the CPU",
)
