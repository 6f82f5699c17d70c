"""What PyTorch computes on some CPUs alone."""

import pytest
import torch

# Older CPUs take other ways in bfloat16, which are not fused: those of Intel before 2017, of AMD before 2022.
ONEDNN_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
needs_onednn_bf16 = pytest.mark.skipif(not ONEDNN_BF16, reason="oneDNN has no bfloat16 for this CPU")
