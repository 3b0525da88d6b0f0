"""Breaks of what a forward computes: the head's loss, LoRA's autograd, 4-bit weights, norms, attention.

(optimisation, file below mmft, ((what is wrong, the text there, what takes its place, the test that has to fail), …))
"""

from __future__ import annotations

Entry = tuple[str, str, str, str]

_HEAD = "fast/test_head.py::test_every_form_of_head"
_LINES = "fast/test_lora.py::test_gradients_by_differences"
_BLOCK = "fast/test_lora.py::test_gradients_of_a_gated_block_by_differences"
_PEFT = "fast/test_lora.py::test_fp32_is_peft"
_SDPA = "fast/test_attention.py::test_sdpa_by_products"
_CALL = "fast/test_attention.py::test_a_call_is_that_of_sdpa"

FORWARD: tuple[tuple[str, str, tuple[Entry, ...]], ...] = (
    (
        "head_in_forward",
        "fast/linear_loss.py",
        (
            ("smoothing is added to the whole loss", "(smoothing - 1.0) * logp.gather", "-logp.gather", _HEAD),
            ("the gradient knows no smoothing", "slope -= smoothing / slope.shape[1]", "pass", _HEAD),
            (
                "no slope of the soft cap",
                "slope *= 1.0 - (shaped / head.cap).square_()",
                "pass",
                _HEAD,
            ),
            ("the gradient knows no scale", "slope *= head.scale", "pass", _HEAD),
            (
                "capped before it is scaled",
                "torch.tanh(wide / self.cap) * self.cap",
                "torch.tanh(raw / self.cap) * self.cap * self.scale",
                _HEAD,
            ),
            ("no gradient through the head's adapter", "into.addmm_(narrow, a)", "pass", _HEAD),
            ("B's gradient without its scaling", "F.linear(hidden, a)) * head.scaling", "F.linear(hidden, a))", _HEAD),
            ("only the last chunk counts", "wide if before is None else before.add_(wide)", "wide", _HEAD),
            ("the loss's own gradient is left out", "(one * gradient).to(kind)", "one.to(kind)", _HEAD),
            (
                "softmax in the type of the products",
                "wide = raw.to(torch.promote_types(raw.dtype, torch.float32))",
                "wide = raw",
                "fast/test_head.py::test_softmax_is_taken_in_float32[0.7]",
            ),
            (
                "softmax of a plain head in the type of the products",
                '_Scratch.take("shaped", shape, wide, part.device).copy_(raw)',
                "raw.to(wide).copy_(raw.exp().log())",
                "fast/test_head.py::test_softmax_is_taken_in_float32[1.0]",
            ),
        ),
    ),
    (
        "head_in_forward",
        "fast/head.py",
        (
            (
                "products in the type of the stored states, not of the forward",
                "linear_cross_entropy(hidden, wanted, self.head, smoothing=smoothing, dtype=dtype)",
                "linear_cross_entropy(hidden, wanted, self.head, dtype=dtype)",
                "fast/test_head.py::test_smoothing_of_the_recipe",
            ),
            (
                "the proof's states stay small, where no cap shows",
                "args[0] if times == 1.0 else args[0] * times",
                "args[0]",
                "fast/test_head.py::test_a_model_that_does_more_to_its_logits_is_refused",
            ),
            (
                "a divisor of the logits is not read",
                '/ float(getattr(config, "logits_scaling", None) or 1.0)',
                "",
                "fast/test_head.py::test_scales_that_the_config_states",
            ),
        ),
    ),
    (
        "lora_fused",
        "fast/lora_linear.py",
        (
            ("B without its scaling", "(param * self.factor if self.factor != 1.0 else param)", "param", _LINES),
            ("B's gradient without its scaling", ".mul_(line.scaling)", "", _LINES),
            ("no gradient of x through A", "dx if narrow is None else dx.addmm_(*narrow)", "dx", _LINES),
            (
                "the last line's weights go into dx alone",
                "dx.addmm_(given, weight)",
                "dx = torch.mm(given, weight)",
                _LINES,
            ),
            (
                "a bias is left out",
                "bias = line.bias_in(x.dtype)",
                "bias = None",
                f"{_PEFT}[0.0-qwen2_vl]",
            ),
            (
                "an optimizer's step is not seen",
                "= [dtype, _Steps.taken]",
                "= [dtype, 0]",
                "fast/test_lora.py::test_masters_are_rounded_once_a_step_and_an_update_is_seen",
            ),
            (
                "new values in place are not seen",
                "(param.data_ptr(), param._version)",
                "param.data_ptr()",
                "fast/test_lora.py::test_masters_are_rounded_once_a_step_and_an_update_is_seen",
            ),
            ("dropped values are not made up for", ".mul_(1.0 / (1.0 - p))", "", f"{_PEFT}[0.3-llava]"),
            (
                "dropout has no part in the gradient of A",
                "torch.mm(slopes[number].t(), _dropped(x, mask, line.dropout))",
                "torch.mm(slopes[number].t(), x)",
                f"{_PEFT}[0.3-llava]",
            ),
            (
                "dropout has no part in the gradient of x",
                "kept.a[at : at + rank]), mask, line.dropout)",
                "kept.a[at : at + rank]), None, 0.0)",
                f"{_PEFT}[0.3-llava]",
            ),
            (
                "the product is not kept in the type that is computed in",
                "rows = x.reshape(-1, x.shape[-1]).to(dtype)\n            outs",
                "rows = x.reshape(-1, x.shape[-1])\n            outs",
                "fast/test_lora.py::test_all_is_computed_in_the_type_of_the_forward",
            ),
        ),
    ),
    (
        "lora_fused",
        "fast/lora_gated.py",
        (
            ("up's gradient goes to gate", "kept[0], slopes, wants_x", "kept[0], slopes[::-1], wants_x", _BLOCK),
            (
                "the slope of SiLU is that of GELU",
                "torch.ops.aten.silu_backward(given, x)",
                "torch.ops.aten.gelu_backward(given, x)",
                _BLOCK,
            ),
        ),
    ),
    (
        "lora_fused",
        "fast/lora_layers.py",
        (
            (
                "an output waits for any x",
                "seen() is x and version == x._version",
                "seen() is not None",
                "fast/test_lora.py::test_a_waiting_output_is_of_its_own_input",
            ),
            (
                "an input that was written to counts as the same",
                "seen() is x and version == x._version",
                "seen() is x",
                "fast/test_lora.py::test_a_waiting_output_is_of_its_own_input",
            ),
            (
                "merged adapters count twice",
                "or layer.disable_adapters or layer.merged_adapters",
                "or layer.disable_adapters",
                "fast/test_lora.py::test_peft_still_rules_its_layers",
            ),
            (
                "switched-off adapters count",
                "or layer.disable_adapters or layer.merged_adapters",
                "or layer.merged_adapters",
                "fast/test_lora.py::test_peft_still_rules_its_layers",
            ),
            (
                "another active adapter is not asked for",
                "list(layer.active_adapters) != [site.adapter]",
                "False",
                "fast/test_lora.py::test_peft_still_rules_its_layers",
            ),
            (
                "layers of different inputs are joined",
                "last is not None and last[1] is call[1]",
                "last is not None",
                "fast/test_lora.py::test_who_shares_an_input",
            ),
            (
                "any block is a gated one",
                "if act is not None and _is_gated(block, act)",
                "if act is not None",
                "fast/test_lora.py::test_a_block_that_does_more_is_left_alone",
            ),
        ),
    ),
    (
        "nf4_once",
        "fast/lora_linear.py",
        (
            (
                "nothing is kept",
                "weights.append(weight if line.keeps else None)",
                "weights.append(None)",
                "fast/test_lora.py::test_kept_weights_are_dequantised_once",
            ),
            (
                "another line's weight is taken in backward",
                "weight = kept.weights[number]",
                "weight = kept.weights[0]",
                "fast/test_lora.py::test_four_bits",
            ),
        ),
    ),
    (
        "nf4_once",
        "fast/lora_fused.py",
        (
            (
                "memory that is not there",
                "return 2 * wanted <= free, text",
                "return True, text",
                "fast/test_lora.py::test_kept_weights_need_room",
            ),
            (
                "8 bits a weight are counted",
                "return sum(2 * base.in_features",
                "return sum(base.in_features",
                "fast/test_lora.py::test_kept_weights_need_room",
            ),
            (
                "layers are told before they are fast",
                "layer.mmft_site.line.keeps = layer.mmft_site.four_bit",
                "layer.mmft_site.line.keeps = False",
                "fast/test_lora.py::test_four_bits",
            ),
        ),
    ),
    (
        "nf4_once",
        "backbones/quantize.py",
        (
            (
                "the scales of blocks are left out",
                "dequantize_4bit(weight.data, weight.quant_state).to(dtype)",
                "(dequantize_4bit(weight.data, weight.quant_state) * 1.01).to(dtype)",
                "fast/test_lora.py::test_four_bits",
            ),
        ),
    ),
    (
        "norms_fused",
        "fast/norms.py",
        (
            (
                "the mean's share has one rate too few",
                ".mul_(rate).mul_(rate).div_",
                ".mul_(rate).div_",
                "fast/test_attention.py::test_rms_norm_by_differences",
            ),
            (
                "the mean's share is added",
                "div_(-x.shape[-1])",
                "div_(x.shape[-1])",
                "fast/test_attention.py::test_rms_norm_by_differences",
            ),
            (
                "the gradient knows no weight",
                "given = (gradient * weight).to",
                "given = gradient.to",
                "fast/test_attention.py::test_rms_norm_by_differences",
            ),
            ("no eps", ".add_(eps)", "", "fast/test_attention.py::test_small_states_feel_eps"),
            (
                "the weight comes before the rounding",
                "torch.mul(x, rate).to(x.dtype) * weight",
                "(torch.mul(x, rate) * weight).to(x.dtype)",
                "fast/test_attention.py::test_bf16_norm_is_that_of_transformers",
            ),
            (
                "any module of one vector is a norm",
                "bool(torch.allclose(found, rms_norm(x, weight, eps), rtol=0, atol=1e-6))",
                "True",
                "fast/test_attention.py::test_another_norm_is_not_taken_for_one",
            ),
        ),
    ),
    (
        "norms_fused",
        "fast/fused_norms.py",
        (
            (
                "a weight that is trained gets no gradient",
                " or self.weight.requires_grad:",
                ":",
                "fast/test_attention.py::test_norms_of_a_run",
            ),
        ),
    ),
    (
        "attention_products",
        "fast/attention.py",
        (
            ("K's gradient without the scale", "(keys_gradient * ctx.scale).to", "keys_gradient.to", _SDPA),
            ("a token does not see itself", ".triu_(1)", ".triu_(0)", _SDPA),
            (
                "blocks are given the first block's mask",
                "mask[:, :, begin:end, :seen]",
                "mask[:, :, : end - begin, :seen]",
                _SDPA,
            ),
            (
                "V's gradient of the last block alone",
                "values_gradient[:, :seen] += to_values",
                "values_gradient[:, :seen] = to_values",
                _SDPA,
            ),
            ("a block sees one key too few", "min(at + BLOCK, keys)) for", "min(at + BLOCK, keys) - 1) for", _SDPA),
            (
                "scores in the type of Q",
                "exact = torch.float64 if query.dtype == torch.float64 else torch.float32",
                "exact = query.dtype",
                "fast/test_attention.py::test_bf16_is_close",
            ),
        ),
    ),
    (
        "attention_products",
        "fast/products.py",
        (
            ("the module's own scale is left out", "causal=causal, scale=scaling)", "causal=causal)", _CALL),
            ("dropout is left out", "special or wide or dropout or query", "special or wide or query", _CALL),
            ("soft caps are left out", 'in ("softcap", "position_bias", "s_aux")', "in ()", _CALL),
            (
                "a mask is thought causal too",
                "bool(causal) and attention_mask is None and query",
                "bool(causal) and query",
                _CALL,
            ),
            (
                "one that is not causal is made so",
                'getattr(module, "is_causal", True) if is_causal is None else is_causal',
                'getattr(module, "is_causal", True)',
                _CALL,
            ),
        ),
    ),
)
