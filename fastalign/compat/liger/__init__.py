"""The chunked losses of Liger Kernel 0.8.5 (`liger_kernel.chunked_loss`): names, signatures, what they return.

    from fastalign.compat.liger import LigerFusedLinearDPOLoss

Each loss has three names, as in Liger: a module, `LigerFusedLinear*Loss`; a function, `liger_fused_linear_*`; and
`LigerFusedLinear*Function`, whose `apply` is that function.

What to know before swapping the import:

- `compiled` and `chunk_size` choose how Liger computes. They are accepted and have no effect.
- The caller shifts: `target[:, t]` is the token that `_input[:, t]` predicts.
- Log-probabilities, losses and auxiliary values are float32 (float64 for float64 inputs), whatever the inputs are.
- Only the loss carries gradients.
- An argument that does not fit raises `InputError` or `ConfigError`. Both are ValueErrors, where Liger often asserts.
"""

from fastalign.compat.liger.distillation import (
    LigerFusedLinearCosineSimilarityFunction as LigerFusedLinearCosineSimilarityFunction,
)
from fastalign.compat.liger.distillation import (
    LigerFusedLinearCosineSimilarityLoss as LigerFusedLinearCosineSimilarityLoss,
)
from fastalign.compat.liger.distillation import LigerFusedLinearJSDFunction as LigerFusedLinearJSDFunction
from fastalign.compat.liger.distillation import LigerFusedLinearJSDLoss as LigerFusedLinearJSDLoss
from fastalign.compat.liger.distillation import liger_fused_linear_cosine as liger_fused_linear_cosine
from fastalign.compat.liger.distillation import liger_fused_linear_jsd as liger_fused_linear_jsd
from fastalign.compat.liger.policy import LigerFusedLinearGRPOFunction as LigerFusedLinearGRPOFunction
from fastalign.compat.liger.policy import LigerFusedLinearGRPOLoss as LigerFusedLinearGRPOLoss
from fastalign.compat.liger.policy import LigerFusedLinearPPOBase as LigerFusedLinearPPOBase
from fastalign.compat.liger.policy import get_gamma_weights as get_gamma_weights
from fastalign.compat.liger.policy import liger_fused_linear_grpo as liger_fused_linear_grpo
from fastalign.compat.liger.preference import LigerFusedLinearCPOFunction as LigerFusedLinearCPOFunction
from fastalign.compat.liger.preference import LigerFusedLinearCPOLoss as LigerFusedLinearCPOLoss
from fastalign.compat.liger.preference import LigerFusedLinearDPOFunction as LigerFusedLinearDPOFunction
from fastalign.compat.liger.preference import LigerFusedLinearDPOLoss as LigerFusedLinearDPOLoss
from fastalign.compat.liger.preference import LigerFusedLinearORPOFunction as LigerFusedLinearORPOFunction
from fastalign.compat.liger.preference import LigerFusedLinearORPOLoss as LigerFusedLinearORPOLoss
from fastalign.compat.liger.preference import LigerFusedLinearSimPOFunction as LigerFusedLinearSimPOFunction
from fastalign.compat.liger.preference import LigerFusedLinearSimPOLoss as LigerFusedLinearSimPOLoss
from fastalign.compat.liger.preference import liger_fused_linear_cpo as liger_fused_linear_cpo
from fastalign.compat.liger.preference import liger_fused_linear_dpo as liger_fused_linear_dpo
from fastalign.compat.liger.preference import liger_fused_linear_orpo as liger_fused_linear_orpo
from fastalign.compat.liger.preference import liger_fused_linear_simpo as liger_fused_linear_simpo
from fastalign.compat.liger.unpaired import LigerFusedLinearKTOFunction as LigerFusedLinearKTOFunction
from fastalign.compat.liger.unpaired import LigerFusedLinearKTOLoss as LigerFusedLinearKTOLoss
from fastalign.compat.liger.unpaired import liger_fused_linear_kto as liger_fused_linear_kto
