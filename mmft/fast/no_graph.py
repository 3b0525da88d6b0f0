"""No graph through frozen parts: towers and every layer before the first trained one run without autograd's records.

Autograd keeps nothing of a function none of whose inputs wants a gradient. All that is needed is that nothing makes an
input of a frozen part want one: transformers' own checkpointing does (`enable_input_require_grads` hooks the embedding
of every nested model, so that a frozen tower is run twice and back-propagated), and `checkpoint_layers` does not.

Saves: the backward of the frozen part (as much as its forward) and, with checkpointing, its second forward; the
activations of every layer of it. Price: nothing.
"""

from __future__ import annotations

from mmft.fast.plan import Candidate, Setting


def frozen_parameters(setting: Setting) -> tuple[int, int]:
    """Parameters of the parts that nothing trains and that see no gradient pass, and all parameters of the base."""
    trained = {setting.adapted.home(name)[0] for name in setting.adapted.trainable()}
    free = {"vision", "audio"} - trained
    if not {"vision", "audio", "projector"} & trained:
        free.add("projector")
    parts = setting.adapted.backbone.parts
    count = total = 0
    for name, value in setting.adapted.backbone.model.named_parameters():
        total += value.numel()
        count += value.numel() if parts.part_of(name) in free else 0
    return count, total


def holds(setting: Setting) -> tuple[bool, str]:
    """Always; the reason says how much of the model it is about."""
    free, _ = frozen_parameters(setting)
    if not free:
        return True, "no part lies wholly before the first trained one; frozen first layers still keep no graph"
    return True, f"{free:,} frozen weights lie before the first trained one"


def saves(setting: Setting) -> str:
    """The share of the weights that no gradient passes through."""
    free, total = frozen_parameters(setting)
    return f"the backward through {free / max(total, 1):.0%} of the weights"


CANDIDATE = Candidate("frozen_no_graph", holds, saves, bits=False)
