"""`python -m tests.families [NAME ...]`: the proof of every family, or of the named ones."""

from __future__ import annotations

import os
import sys

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}

if __name__ == "__main__":
    from transformers.utils import logging

    from tests.families.run import main

    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
