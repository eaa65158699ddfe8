"""Decodes over paged caches: index scores, exact top-k, attention to what is selected, and the write of new entries.

A page has 64 tokens. `paged_index_scores.py` scores keys (`score_sums.py` has what a thread does with the products),
`select_few_rows.py` selects from scores (`few_rows_plan.py` shares rows among thread blocks), `paged_select_keys.py`
joins the two, and `write_entries.py` writes what the caches keep of new tokens. `paged_sparse_attention.py` chooses by
the number of heads among `attention_many_heads.py` (multiples of 64) and `attention_few_heads.py` (8, 16 or 32), which
gather and convert FP8 latents by `gather_rows.py`, and `attention_keys_as_rows.py` (8 or 16 whose keys are not split),
which makes operands of them in registers by `raw_rows.py`. `combine.py` joins the parts of keys that are split.
"""

from dsa_jax.pallas_kernels.decode.paged_index_scores import paged_index_scores
from dsa_jax.pallas_kernels.decode.paged_index_scores import why_not as why_not_index_scores
from dsa_jax.pallas_kernels.decode.paged_select_keys import paged_select_keys
from dsa_jax.pallas_kernels.decode.paged_select_keys import why_not as why_not_select_keys
from dsa_jax.pallas_kernels.decode.paged_sparse_attention import paged_sparse_attention
from dsa_jax.pallas_kernels.decode.paged_sparse_attention import why_not as why_not_attention
from dsa_jax.pallas_kernels.decode.write_entries import why_not as why_not_write_entries
from dsa_jax.pallas_kernels.decode.write_entries import write_entries

__all__ = [
    "paged_index_scores",
    "paged_select_keys",
    "paged_sparse_attention",
    "why_not_attention",
    "why_not_index_scores",
    "why_not_select_keys",
    "why_not_write_entries",
    "write_entries",
]
