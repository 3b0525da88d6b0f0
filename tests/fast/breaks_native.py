"""Breaks of the kernels in C and of what calls them.

(optimisation, file below mmft, ((what is wrong, the text there, what takes its place, the test that has to fail), …))
"""

from __future__ import annotations

Entry = tuple[str, str, str, str]

_NATIVE = "fast/test_native_attention.py"
_LINE = f"{_NATIVE}::test_values_and_gradients_are_those_of_float64"
_ODD = f"{_LINE}[odd lengths-True]"
_RESTS = f"{_LINE}[rests of a beginning-True]"
_CALL = "fast/test_native_attention.py::test_a_call_is_that_of_sdpa"
_NORM = "fast/test_native_rows.py::test_a_norm_is_torchs"
_GATE = "fast/test_native_rows.py::test_a_gate_is_torchs[1000]"
_EXP = "fast/test_native_rows.py::test_the_exponential_over_its_whole_range"

_PRODUCT = "fast/test_native_product.py"
_SUM = f"{_PRODUCT}::test_a_layer_and_its_adapters_are_one_sum[(4, 6)-(7, 62, 65)]"
_ACT = f"{_PRODUCT}::test_an_act_is_torchs_over_all_numbers"
_ACTS = f"{_PRODUCT}::test_an_act_follows_every_value_of_a_layer[(7, 62, 65)-tanh_gelu]"
_MIDDLE = f"{_PRODUCT}::test_an_act_follows_every_value_of_a_layer[(13, 98, 100)-relu]"
_MLP = "fast/test_native_mlp.py"
_BACK = f"{_PRODUCT}::test_the_gradient_of_several_layers_is_one_sum[(7, 62, 65)]"
_LINES = "fast/test_native_lines.py"
_SAME = f"{_LINES}::test_outputs_and_dx_are_the_product_kernels[three-45]"
_BLOCK = f"{_LINES}::test_a_gated_block_is_its_layers_one_after_the_other[45]"
_ADAPTERS = f"{_LINES}::test_gradients_of_adapters_are_those_of_float64[three-45]"
_LOSS = "fast/test_native_loss.py"
_HEAD = f"{_LOSS}::test_losses_hits_and_slopes_are_those_of_float64[(13, 64, 2100)]"
_FEW = f"{_LOSS}::test_losses_hits_and_slopes_are_those_of_float64[(1, 2, 2)]"
_TAKES = f"{_LOSS}::test_the_loss_of_a_bare_head_takes_it"
_FROZEN = f"{_PRODUCT}::test_frozen_layers_forward_and_backward"

NATIVE: tuple[tuple[str, str, tuple[Entry, ...]], ...] = (
    (
        "native_kernels",
        "fast/native/vectors.h",
        (
            (
                "cut off, not rounded",
                "bits = (__m256i)_mm512_cvtneps_pbh(x);",
                "bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));",
                _NORM,
            ),
            (
                "two rows of a turned block change places",
                "y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);",
                "y[i + 4] = _mm512_shuffle_i32x4(d, b, 0x88);",
                _SUM,
            ),
            ("denormals are dropped", "__builtin_expect(small, 0) ?", "0 ?", _EXP),
            ("denormals are cut off", "_mm512_srli_epi32(up, 16));", "_mm512_srli_epi32(bits, 16));", _EXP),
            ("a coefficient of the exponential", "5.0000001201e-1f", "4.9e-1f", _HEAD),
            ("a coefficient of the power", "6.9312418e-1f", "6.8e-1f", _ODD),
            ("the exponential ends too soon", "_mm512_set1_ps(-104.f)", "_mm512_set1_ps(-4.f)", _HEAD),
        ),
    ),
    (
        "native_kernels",
        "fast/native/attention.h",
        (
            ("a row sees one key too few", "causal ? seen + i : seen,", "causal && i ? seen + i - 1 : seen,", _ODD),
            ("scores without their scale", "z->causal, columns, z->scale)", "z->causal, columns, 1.f)", _ODD),
            ("what is not seen counts", "x = _mm512_maskz_mov_ps(first(n - at), x);", "", _ODD),
            ("powers of e as of 2", "scale *= 1.44269504f;", "", _ODD),
            (
                "the greatest of every second vector",
                "x + at + 16 * j));",
                "x + at + 32 * (j / 2)));",
                f"{_NATIVE}::test_scores_that_are_far_apart[True]",
            ),
            (
                "a column's tokens are those of the first",
                "token_at(x, stride, row, t + i)",
                "token_at(x, stride, row, i)",
                _ODD,
            ),
            (
                "P that is kept is not over its sum",
                "_mm512_loadu_ps(scores + i * lds + at), _mm512_set1_ps(share[i])",
                "_mm512_loadu_ps(scores + i * lds + at), _mm512_set1_ps(1.f)",
                _ODD,
            ),
            ("the beginning is not seen", "(t < row[3] ? row[2] + t :", "(t < row[3] ? row[0] + t :", _RESTS),
            ("the last columns are left out", "if (wide == 48)", "if (wide == 49)", _RESTS),
        ),
    ),
    (
        "native_kernels",
        "fast/native/attention.c",
        (
            ("the last rows of a tile are left out", "at < s.own; at += TILE", "at + TILE <= s.own; at += TILE", _ODD),
            ("an odd key is left out", "(seen + 1) / 2, pairs", "seen / 2, pairs", _ODD),
            (
                "heads that share a key are given the first one's P",
                "kept + row[4] + head * s.own * s.wide",
                "kept + row[4] + h * s.own * s.wide",
                _ODD,
            ),
            ("an output is not over its sum", "_mm512_mul_ps(sum, _mm512_set1_ps(share[i]))", "sum", _ODD),
        ),
    ),
    (
        "native_kernels",
        "fast/native/attention_back.c",
        (
            ("the sum of P dP is left out", "_mm512_set1_ps(_mm512_reduce_add_ps(sum))", "_mm512_setzero_ps()", _ODD),
            (
                "K's gradient without the scale",
                "_mm512_mul_ps(scale, _mm512_loadu_ps(from + d))",
                "_mm512_loadu_ps(from + d)",
                _ODD,
            ),
            (
                "the beginning's gradient is not summed",
                "for (long t = 0; t < s.keys",
                "for (long t = s.before; t < s.keys",
                _RESTS,
            ),
            ("a key's first queries are left out", "(j - before) / 2 : 0", "(j - before) / 2 + 1 : 0", _ODD),
            (
                "queries behind the first that are held count from the row's start",
                "before = s.before + begin;",
                "before = s.before;",
                f"{_LINE}[more queries than are held at once-True]",
            ),
            (
                "slopes of the first queries for all",
                "{row[0] + begin, many,",
                "{row[0], many,",
                f"{_LINE}[more queries than are held at once-True]",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/rows.c",
        (
            (
                "the weight comes before the rounding",
                "scaled = rounded(_mm512_mul_ps(load_some(from + at, some), _mm512_set1_ps(r)))",
                "scaled = _mm512_mul_ps(load_some(from + at, some), _mm512_set1_ps(r))",
                _NORM,
            ),
            ("the mean's share is added", "share = -_mm512", "share = _mm512", _NORM),
            (
                "no eps",
                "/ width + eps)",
                "/ width)",
                "fast/test_native_rows.py::test_a_norms_node_takes_the_kernel_and_feels_eps",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/gate.h",
        (
            (
                "the gate is not rounded",
                "return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, sigmoid(gate))), up);",
                "return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up);",
                _GATE,
            ),
            (
                "the gate's slope is the sigmoid",
                "_mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one))",
                "s",
                _GATE,
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_attention.py",
        (
            (
                "values that do not lie side by side",
                "x if whole else x.contiguous()",
                "x",
                "fast/test_native_attention.py::test_where_tokens_and_heads_lie_does_not_matter",
            ),
            (
                "any width",
                " and width % VECTOR == 0 and value",
                " and value",
                "fast/test_native_attention.py::test_what_fits",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_kernels.py",
        (
            ("a mask is left out", "plain = attention_mask is None and lengths", "plain = lengths", _CALL),
            ("one that is not causal is made so", "causal=bool(causal))", "causal=True)", _CALL),
            ("dropout is left out", "not special and not dropout and", "not special and", _CALL),
            (
                "the kernels stay chosen",
                "native_build.choose(before)\n        native_linear",
                "native_linear",
                "fast/test_native_run.py::test_a_run_is_no_further_from_float32_than_without[llava]",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_build.py",
        (
            (
                "a folder that others may write into",
                "own = state.st_uid == os.getuid() and not state.st_mode & 0o022",
                "own = state.st_uid == os.getuid()",
                "fast/test_native_build.py::test_a_folder_that_is_not_the_users_own_is_not_used[written by a group]",
            ),
            (
                "what is loaded does not depend on the sources",
                "told.update(source.read_bytes())",
                "pass",
                "fast/test_native_build.py::test_other_sources_or_flags_are_another_library",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/product.h",
        (
            (
                "the last column's bias is left out",
                "first(columns - 16 * j)) : _mm",
                "first(columns - 1 - 16 * j)) : _mm",
                _SUM,
            ),
            ("a pair holds one row twice", "some : 0, from + t->ldb)", "some : 0, from)", _BACK),
            (
                "a panel is packed for the first term alone",
                "t < j->terms + j->count; to +=",
                "t < j->terms + 1; to +=",
                _SUM,
            ),
            ("the last rows are left out", "(j->rows + high_of(j) - 1) / high_of(j)", "j->rows / high_of(j)", _BACK),
            ("a panel of another column is taken", "if (column != packed)", "if (packed < 0)", _SUM),
        ),
    ),
    (
        "native_kernels",
        "fast/native/product.c",
        (
            (
                "an act of all rows but the last",
                "for (; row < end; row++)",
                "for (; row + 1 < end; row++)",
                _ACTS,
            ),
            ("an act of a panel's first vector", "at < PANEL; at += 16)", "at < 16; at += 16)", _ACTS),
            ("an act of the last panel's first vector", "at < wide; at += 16)", "at < 16; at += 16)", _MIDDLE),
            ("nothing follows", "act == NOTHING ? 0 : &with", "0", _ACTS),
        ),
    ),
    (
        "native_kernels",
        "fast/native/acts.h",
        (
            ("a coefficient of GELU's end", "0.446926409f", "0.44f", f"{_ACT}[erf_gelu]"),
            ("the other side of GELU", "above, one, y)", "above, y, y)", f"{_ACT}[erf_gelu]"),
            (
                "no cube",
                "square, _mm512_set1_ps(-2.30220819f * 0.044715f)",
                "square, _mm512_set1_ps(0.f)",
                f"{_ACT}[tanh_gelu]",
            ),
            (
                "x is not rounded before the sigmoid",
                "steep = rounded(_mm512_mul_ps(x, _mm512_set1_ps(1.702f)))",
                "steep = _mm512_mul_ps(x, _mm512_set1_ps(1.702f))",
                f"{_ACT}[quick_gelu]",
            ),
            (
                "the sigmoid is not rounded",
                "rounded(_mm512_div_ps(_mm512_set1_ps(1.f), below))",
                "_mm512_div_ps(_mm512_set1_ps(1.f), below)",
                f"{_ACT}[quick_gelu]",
            ),
            (
                "NaN is 0",
                "_mm512_max_ps(_mm512_setzero_ps(), x)",
                "_mm512_max_ps(x, _mm512_setzero_ps())",
                f"{_PRODUCT}::test_what_is_no_number_passes_an_act_as_in_torch[relu-nan]",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_mlp.py",
        (
            (
                "a gradient is lost",
                "None if torch.is_grad_enabled() and x.requires_grad else rows_of",
                "rows_of",
                f"{_MLP}::test_where_a_gradient_flows_it_is_the_blocks_own_forward",
            ),
            (
                "a block is not tried",
                "or not _is_formula(block, first, second, ACTS[act])",
                "",
                f"{_MLP}::test_blocks_that_are_something_else_stay",
            ),
            (
                "a block is tried as it is",
                "block.train(mode)(x)",
                "block(x)",
                f"{_MLP}::test_blocks_that_are_something_else_stay",
            ),
            (
                "a hook is not called",
                "any(_is_watched(one) for one in (block, *children.values()))",
                "_is_watched(block)",
                f"{_MLP}::test_blocks_that_are_something_else_stay",
            ),
            (
                "a block stays fast",
                "        block.__class__ = kind\n        del",
                "        del",
                f"{_MLP}::test_a_block_is_torchs_within_a_unit_behind_the_act[relu]",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/tower.py",
        (
            (
                "other kernels give the same features",
                "native_build.digest() if",
                "True if",
                "fast/test_feature_store.py::test_other_kernels_are_misses",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_product.py",
        (
            (
                "a bias of another type is read",
                "if bias is not None and not whole(bias):",
                "if False:",
                f"{_PRODUCT}::test_what_is_not_its_own_is_left_to_torch",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_linear.py",
        (
            (
                "a layer that trains is taken",
                "any(one.requires_grad or one.dtype",
                "any(one.dtype",
                f"{_PRODUCT}::test_frozen_layers_forward_and_backward",
            ),
            (
                "the gradient of a layer without its weight's turn",
                "product([(gradient.contiguous(), weight)], across=False)",
                "product([(gradient.contiguous(), weight.flip(0).contiguous())], across=False)",
                _FROZEN,
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/lines.c",
        (
            ("every line reads the first one's narrow columns", "{s->narrow + at, l->b,", "{s->narrow, l->b,", _SAME),
            ("the gradient through A is left out", "{terms, s->count + 1, 0,", "{terms, s->count, 0,", _SAME),
            ("B's gradient without its scaling", "l->db, l->scale, l->rank}", "l->db, 1.f, l->rank}", _ADAPTERS),
            ("an odd last row is left out", "row < s->rows ? s->steep", "row < s->rows - 1 ? s->steep", _ADAPTERS),
            (
                "A's gradient from x A^T",
                "term one = {s->turned, s->x,",
                "term one = {s->turned + at * even, s->x,",
                _ADAPTERS,
            ),
            ("the product that is made again is not kept", "store_some(g->product + here, product, some);", "", _BLOCK),
            ("the gate opens without up", "gated(gate, up), some", "gated(gate, gate), some", _BLOCK),
            (
                "threads do not wait for the narrow product",
                "to_narrow(two, p);\n#pragma omp barrier",
                "to_outs(two, p, 0);\n#pragma omp barrier",
                _BLOCK,
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/product.h",
        (
            (
                "float32 without its factor",
                "_mm512_mul_ps(sum[i][at], _mm512_set1_ps(j->scale))",
                "sum[i][at]",
                _ADAPTERS,
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native_lines.py",
        (
            ("a bias is not given", "address(weight), _at(bias), address(b)", "address(weight), 0, address(b)", _SAME),
            (
                "gate and up of unlike sizes",
                "== [second.width] * 2",
                "!= []",
                f"{_LINES}::test_what_is_not_its_own_is_left_to_torch",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/native/loss.c",
        (
            ("the goal's logit pulls nothing", "p, _mm512_set1_ps(1.f));", "p, _mm512_setzero_ps());", _HEAD),
            ("the last block takes the place of the others", "sums, 1.f, 1, at > 0}", "sums, 1.f, 1, 0}", _HEAD),
            (
                "words behind the last count",
                "sum = _mm512_mask_add_ps(sum, some, sum, e)",
                "sum = _mm512_add_ps(sum, e)",
                _FEW,
            ),
            (
                "any of equal logits is the answer",
                "*hit = there == top && before == goal;",
                "*hit = there == top;",
                f"{_LOSS}::test_the_first_of_equal_logits_is_the_answer",
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/linear_loss.py",
        (
            ("a cap is left out", " and self.scale == 1.0 and self.cap is None", " and self.scale == 1.0", _TAKES),
            ("smoothing is left out", "native = not smoothing and head.bare", "native = head.bare", _TAKES),
            (
                "a head that trains gets no gradient",
                " and not any(wanted[5:]) and native_loss",
                " and native_loss",
                _TAKES,
            ),
        ),
    ),
    (
        "native_kernels",
        "fast/lora_linear.py",
        (
            (
                "the adapter's own product is left out",
                "product([(x, weight), (part, wide)], across=True, bias=bias)",
                "product([(x, weight)], across=True, bias=bias)",
                f"{_PRODUCT}::test_adapters_in_bfloat16_are_as_near_to_float32_as_torchs[eight lines]",
            ),
            (
                "the gradient through the adapters is left out",
                "[*terms, narrow] if narrow is not None else terms",
                "terms",
                f"{_PRODUCT}::test_adapters_in_bfloat16_are_as_near_to_float32_as_torchs[eight lines]",
            ),
        ),
    ),
)
