"""Models: load one, make it ready for packed training, score batches, read its output layer."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.models.adapters import causal_lm as causal_lm
    from fastalign.models.fit import check_fit as check_fit
    from fastalign.models.head import Head as Head
    from fastalign.models.head import output_head as output_head
    from fastalign.models.head import token_divergence as token_divergence
    from fastalign.models.loading import default_dtype as default_dtype
    from fastalign.models.loading import load_model as load_model
    from fastalign.models.loading import load_tokenizer as load_tokenizer
    from fastalign.models.loading import load_with_adapter as load_with_adapter
    from fastalign.models.loading import tokenizer_beside as tokenizer_beside
    from fastalign.models.ready import adopt_special_tokens as adopt_special_tokens
    from fastalign.models.ready import check_trainable as check_trainable
    from fastalign.models.ready import disable_dropout as disable_dropout
    from fastalign.models.scoring import Scores as Scores
    from fastalign.models.scoring import prepare as prepare
    from fastalign.models.scoring import restore as restore
    from fastalign.models.snapshot import ReferenceWeights as ReferenceWeights
    from fastalign.models.snapshot import fingerprint as fingerprint
    from fastalign.models.teacher import Teacher as Teacher
    from fastalign.models.teacher import TopK as TopK
    from fastalign.models.teacher import store_topk as store_topk
    from fastalign.models.vocabulary import check_vocabulary as check_vocabulary

lazy_exports(
    __name__,
    {
        "Head": "fastalign.models.head",
        "ReferenceWeights": "fastalign.models.snapshot",
        "Scores": "fastalign.models.scoring",
        "Teacher": "fastalign.models.teacher",
        "TopK": "fastalign.models.teacher",
        "adopt_special_tokens": "fastalign.models.ready",
        "causal_lm": "fastalign.models.adapters",
        "check_fit": "fastalign.models.fit",
        "check_trainable": "fastalign.models.ready",
        "check_vocabulary": "fastalign.models.vocabulary",
        "default_dtype": "fastalign.models.loading",
        "disable_dropout": "fastalign.models.ready",
        "fingerprint": "fastalign.models.snapshot",
        "load_model": "fastalign.models.loading",
        "load_tokenizer": "fastalign.models.loading",
        "load_with_adapter": "fastalign.models.loading",
        "output_head": "fastalign.models.head",
        "prepare": "fastalign.models.scoring",
        "restore": "fastalign.models.scoring",
        "store_topk": "fastalign.models.teacher",
        "token_divergence": "fastalign.models.head",
        "tokenizer_beside": "fastalign.models.loading",
    },
)
