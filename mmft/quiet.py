"""Chatter of upstream packages that says nothing a user of mmft can act on."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_upstream() -> None:
    """Before anything is loaded: no bars per weight file, no deprecation talk between upstream packages.

    Errors stay as they are; MMFT_VERBOSE=1 leaves everything on.
    """
    if os.environ.get("MMFT_VERBOSE"):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a loader's fork
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\..*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
