"""Makes the token files in `megatron/` beside this file, by the builder of Megatron-LM itself.

Run once, with megatron-core==0.19.2 (and torch, which its builder imports):

    python tests/oracle/make_token_files.py [FOLDER]

Each pair holds three documents: one of two sequences, and two of one. The last token of int32 does not fit uint16.
"""

# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

LAST = {"uint16": 34, "int32": 70000}


def make(folder: Path) -> None:
    """Writes a pair of files for each type."""
    folder.mkdir(exist_ok=True)
    for name, last in LAST.items():
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=getattr(np, name))
        builder.add_document(np.array([11, 12, 13, 14, 15]), [2, 3])
        builder.add_document(np.array([21]), [1])
        builder.add_document(np.array([31, 32, 33, last]), [4])
        builder.finalize(f"{folder}/{name}.idx")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "megatron")
