"""Breaks of what a forward is given and keeps: frozen parts, rows of the head, lines of rows, kept features.

(optimisation, file below mmft, ((what is wrong, the text there, what takes its place, the test that has to fail), …))
"""

from __future__ import annotations

Entry = tuple[str, str, str, str]

_CACHES = "fast/test_kernel_caches.py"
_HELD = "fast/test_feature_store.py::test_pixels_are_held_in_the_towers_type_and_until_it_has_answered"
_BLOCKS = "fast/test_native_blocks.py"
_GRAPH = "fast/test_no_graph.py::test_a_frozen_tower_runs_once_without_a_graph"
_COUNT = "fast/test_no_graph.py::test_the_plan_counts_what_lies_before_the_first_trained_weight"
_PACKED = "fast/test_packing.py::test_a_packed_step_is_the_plain_step"
_SHARED = "fast/test_packing.py::test_a_shared_beginning_is_the_plain_step"
_STORED = "fast/test_feature_store.py::test_loss_and_gradients_are_those_of_pixels"
_LINE = "fast/test_line_attention.py::test_values_and_gradients_are_those_of_rows_alone"
_LAST = "fast/test_last_layer.py"
_OTHERS = "fast/test_store_objectives.py"
_PIXELS = f"{_OTHERS}::test_loss_and_gradients_are_those_of_pixels"
_ONCE = f"{_OTHERS}::test_a_picture_is_encoded_once_for_all_forwards_and_then_never"
_KEPT = "fast/test_kept_tower.py"
_MISSES = "fast/test_feature_store.py::test_one_weight_one_setting_one_pixel_are_misses"

_REPLAY = "fast/test_replay.py"

ROWS: tuple[tuple[str, str, tuple[Entry, ...]], ...] = (
    (
        "verify_fast",
        "replay.py",
        (
            (
                "chance is given a tenth more a step, however many",
                "math.exp(DEVIATIONS * SPREAD / math.sqrt(steps))",
                "1.1**steps",
                f"{_REPLAY}::test_what_chance_is_given",
            ),
            (
                "the reference keeps what 16 bits cut off the weights",
                "value.data = value.data.to(stored).to(value.dtype)",
                "pass",
                f"{_REPLAY}::test_a_small_break_in_16_bits_is_told[nothing]",
            ),
            (
                "the gradients are not looked at",
                'return {\n        "loss": apart.loss,',
                'apart = _Apart(apart.loss, 0.0)\n    return {\n        "loss": apart.loss,',
                f"{_REPLAY}::test_a_small_break_in_16_bits_is_told[a 64th too much]",
            ),
        ),
    ),
    (
        "kernel_caches",
        "fast/kernel_caches.py",
        (
            (
                "the name that oneDNN reads",
                '"ONEDNN_PRIMITIVE_CACHE_CAPACITY": PRODUCTS',
                '"ONEDNN_CACHE_CAPACITY": PRODUCTS',
                f"{_CACHES}::test_what_a_user_set_stays",
            ),
            (
                "no bound",
                "PRODUCTS, DESCRIPTIONS = 128, 8",
                "PRODUCTS, DESCRIPTIONS = 1024, 1024",
                f"{_CACHES}::test_products_of_many_lengths_are_not_all_kept",
            ),
            (
                "what the user set is written over",
                "os.environ.setdefault(name, str(most))",
                "os.environ[name] = str(most)",
                f"{_CACHES}::test_what_a_user_set_stays",
            ),
            (
                "blocks stay after the run",
                "replace(work, undo=(*work.undo, native_blocks.put_in()))",
                "replace(work, undo=(*work.undo, *[native_blocks.put_in()][1:]))",
                f"{_BLOCKS}::test_a_run_has_them_and_leaves_none_behind",
            ),
        ),
    ),
    (
        "kernel_caches",
        "fast/native/blocks.cpp",
        (
            (
                "gaps as torch leaves them",
                "std::malloc(bytes + MORE)",
                "std::aligned_alloc(LINE, (bytes + MORE) / LINE * LINE + LINE)",
                f"{_BLOCKS}::test_a_gap_is_filled_by_a_tensor_of_the_same_shape",
            ),
            (
                "not aligned",
                "constexpr size_t LINE = 64;",
                "constexpr size_t LINE = 16;",
                f"{_BLOCKS}::test_values_and_alignment[1]",
            ),
            (
                "the profiler is not told",
                "c10::profiledCPUMemoryReporter().New(at, bytes);",
                "",
                f"{_BLOCKS}::test_the_profiler_sees_blocks",
            ),
        ),
    ),
    (
        "frozen_no_graph",
        "engine/memory.py",
        (
            (
                "embeddings of every nested model want a gradient",
                "    layers: list[nn.Module] = []\n",
                "    base.enable_input_require_grads()\n    layers: list[nn.Module] = []\n",
                f"{_GRAPH}[llava-True]",
            ),
            (
                "checkpointing that needs an input with a gradient",
                "use_reentrant=False",
                "use_reentrant=True",
                f"{_GRAPH}[smolvlm-True]",
            ),
            (
                "recomputed layers are not marked",
                "module.gradient_checkpointing = True",
                "module.gradient_checkpointing = False",
                f"{_GRAPH}[qwen2_vl-True]",
            ),
        ),
    ),
    (
        "frozen_no_graph",
        "fast/no_graph.py",
        (
            ("a trained tower counts as free", '{"vision", "audio"} - trained', '{"vision", "audio"}', f"{_COUNT}"),
            (
                "a trained projector counts as free",
                'if not {"vision", "audio", "projector"} & trained',
                "if True",
                _COUNT,
            ),
        ),
    ),
    (
        "head_rows",
        "objectives/sft.py",
        (
            (
                "the row of the target itself is scored",
                "rows = F.pad(targets != IGNORED, (0, 1), value=False)",
                "rows = F.pad(targets != IGNORED, (1, 0), value=False)",
                "objectives/test_sft.py::test_equals_plain_loss",
            ),
            (
                "labels are not shifted",
                "targets = batch.labels[:, 1:]",
                "targets = batch.labels[:, :-1]",
                "objectives/test_sft.py::test_equals_transformers_own_loss",
            ),
            (
                "the head sees the neighbours' rows",
                "hidden[rows].unsqueeze(0)",
                "hidden[rows.roll(1, 1)].unsqueeze(0)",
                "fast/test_plan.py::test_the_head_on_every_position_is_the_same_loss",
            ),
            (
                "virtual tokens are cut off behind",
                "hidden = hidden[:, ahead:]",
                "hidden = hidden[:, : hidden.shape[1] - ahead]",
                "objectives/test_sft.py::test_virtual_tokens_have_no_row",
            ),
            (
                "softmax in the type of the products",
                "logits.reshape(-1, logits.shape[-1]).float()",
                "logits.reshape(-1, logits.shape[-1])",
                "objectives/test_sft.py::test_softmax_is_taken_in_float32",
            ),
            (
                "the hook stays",
                "        handle.remove()",
                "        pass",
                "objectives/test_sft.py::test_head_computes_supervised_rows_only",
            ),
        ),
    ),
    (
        "packing",
        "data/packing.py",
        (
            (
                "positions go on over rows",
                "places = line([positions(row) for row in rows])",
                "places = torch.arange(sum(len(row.input_ids) for row in rows))",
                "data/test_packing.py::test_a_line_of_two_rows",
            ),
            (
                "a row's first token is predicted by the row before",
                "own[0] = IGNORED",
                "own[0] = own[0]",
                "data/test_packing.py::test_a_line_of_two_rows",
            ),
        ),
    ),
    (
        "packing",
        "fast/packed_attention.py",
        (
            ("a window of one token more", "places < window", "places <= window", f"{_PACKED}[window]"),
            (
                "rows see their neighbours",
                "key=lambda row: row[2:] if row[3] else row",
                "key=lambda row: row[2:]",
                f"{_PACKED}[llava]",
            ),
        ),
    ),
    (
        "shared_prefix",
        "fast/packed_attention.py",
        (
            (
                "rests do not see the beginning",
                "((rests == -1) | (rests",
                "((rests == -2) | (rests",
                f"{_SHARED}[llava]",
            ),
            ("rests see each other", "(rests == rest[:, None])", "(rests >= 0)", f"{_SHARED}[llava]"),
            (
                "tokens do not see themselves",
                "places <= place[:, None]",
                "places < place[:, None]",
                f"{_SHARED}[llava]",
            ),
        ),
    ),
    (
        "shared_prefix",
        "data/packing.py",
        (
            (
                "the token before a target is shared",
                "len(ids) - 1, int(targets[0]) if",
                "len(ids) - 1, int(targets[0]) + 1 if",
                "data/test_packing.py::test_rows_of_one_picture_begin_together",
            ),
            (
                "a shared picture is given once for each row",
                "media_rows.append(group[0])",
                "media_rows += group",
                f"{_SHARED}[llava]",
            ),
            (
                "pictures behind the beginning are lost",
                "return 0 if any(seen) else length",
                "return length",
                "data/test_packing.py::test_what_is_not_shared",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/stored.py",
        (
            ("pixels wait in float32", "value.to(self.dtype) if", "value if", _HELD),
            (
                "the address leaves the tower out",
                "[space, *map(media_digest, media)]",
                "list(map(media_digest, media))",
                "fast/test_feature_store.py::test_an_address_is_of_pictures_and_tower",
            ),
            (
                "the renderer that evaluation goes by is changed",
                "made = copy.copy(renderer)",
                "made = renderer",
                f"{_ONCE}[dpo]",
            ),
            (
                "places are looked for in another text",
                "self._text = found[1]",
                "self._text = found[1][1:]",
                f"{_ONCE}[grpo]",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/feature_store.py",
        (
            (
                "pixels stay until the step's end",
                "one.answer(known)",
                "pass",
                _HELD,
            ),
            (
                "changed pictures go the way of the others",
                "altered=self._filled(batch.altered)",
                "altered=self._filled(batch)",
                f"{_PIXELS}[mdpo, cropped]",
            ),
            (
                "pictures of answers are not looked at",
                "for one in sample.candidates} or",
                "for one in ()} or",
                f"{_OTHERS}::test_a_sound_among_the_answers_says_why",
            ),
        ),
    ),
    (
        "feature_store",
        "objectives/contrastive_locked.py",
        (
            (
                "a locked tower's address leaves the tower out",
                "hashlib.sha256(self.space + mark)",
                "hashlib.sha256(mark)",
                "objectives/test_locked.py::test_a_key_is_of_the_tower_and_the_row",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/kept_tower.py",
        (
            (
                "a trained tower is kept",
                "if value.requires_grad), None)",
                "if not value.is_leaf), None)",
                f"{_KEPT}::test_plan_tells_of_it_and_why_not",
            ),
            (
                "a loss with other states passes",
                "if not apart <= allowed or",
                "if",
                f"{_KEPT}::test_a_tower_that_is_told_otherwise_is_found_at_the_start",
            ),
            (
                "the tower stays as it was made",
                "undo=(*work.undo, kept.release)",
                "undo=work.undo",
                f"{_KEPT}::test_each_picture_is_encoded_once_for_all_its_captions_and_runs",
            ),
        ),
    ),
    (
        "feature_store",
        "data/preference_render.py",
        (
            (
                "pictures that are seen once are kept",
                'if self.altered == "crop":',
                "if False:",
                f"{_ONCE}[mdpo, cropped]",
            ),
        ),
    ),
    (
        "feature_store",
        "adapters/build.py",
        (
            (
                "a head beside the backbone counts as its projector",
                'if group.part == "head")',
                'if group.part == "none")',
                f"{_PIXELS}[reward]",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/tower.py",
        (
            ("the projector does not count", 'FROZEN = ("vision", "projector")', 'FROZEN = ("vision",)', _MISSES),
            (
                "the precision does not count",
                "[str(model.dtype), autocast]",
                "[str(model.dtype)]",
                _MISSES,
            ),
            (
                "the tower computes in another precision",
                "dtype=torch.bfloat16, enabled=self.autocast",
                "dtype=torch.bfloat16, enabled=False",
                "fast/test_feature_store.py::test_features_are_computed_as_a_step_computes_them",
            ),
            (
                "features of a batch in another order",
                ".items()}) for row in rows]",
                ".items()}) for row in rows[::-1]]",
                f"{_STORED}[llava]",
            ),
        ),
    ),
    (
        "feature_store",
        "fast/slabs.py",
        (
            (
                "an entry is not looked over",
                "own != key or hashlib.sha256(rest).digest() != digest",
                "own != key",
                "fast/test_slabs.py::test_a_torn_entry_is_never_read",
            ),
        ),
    ),
    (
        "packing",
        "fast/line_attention.py",
        (
            ("a token does not see itself", ".triu_(1)", ".triu_(0)", f"{_LINE}[one row]"),
            (
                "the padding of a row is put into the next",
                "min(width, end - start - block[0])",
                "width",
                f"{_LINE}[long and short]",
            ),
            ("keys lose their scale", "to_key.mul_(ctx.scale).to(kind)", "to_key.to(kind)", f"{_LINE}[one row]"),
            (
                "a beginning hears of its first rest only",
                "rows[:, :, : group.seen].sum(0, dtype=total.dtype)",
                "rows[0, :, : group.seen].to(total.dtype)",
                f"{_LINE}[rests of a beginning]",
            ),
            (
                "a block's values are written over",
                "to_values[:, :seen] += values",
                "to_values[:, :seen] = values",
                f"{_LINE}[beyond what is kept]",
            ),
        ),
    ),
    (
        "packing",
        "data/packing.py",
        (
            (
                "what fills a line up is a target",
                "        targets[:, -spare:] = IGNORED\n",
                "        pass\n",
                "data/test_packing.py::test_a_line_is_filled_up_with_copies_of_its_last_token",
            ),
        ),
    ),
    (
        "last_layer",
        "fast/last_layer.py",
        (
            (
                "the rows of the targets themselves",
                "F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)",
                "F.pad(labels[:, 1:] != IGNORED, (1, 0), value=False)",
                f"{_LAST}::test_target_rows_stand_before_their_targets",
            ),
            (
                "rows go back to other places",
                "index_copy(0, rows.index, out[0])",
                "index_copy(0, rows.index.flip(0), out[0])",
                f"{_LAST}::test_loss_and_gradients_stay[False]",
            ),
            (
                "a generation is cut too",
                "            and torch.is_grad_enabled()\n",
                "",
                f"{_LAST}::test_the_modules_see_supervised_rows_only",
            ),
            (
                "any layer passes for the last one",
                "called[-1:] != [layer] or ",
                "",
                f"{_LAST}::test_a_layer_that_is_not_the_last_is_refused",
            ),
            (
                "any objective passes",
                'setting.custom or setting.recipe.objective.name != "sft"',
                "setting.custom",
                f"{_LAST}::test_other_objectives_are_left_alone",
            ),
        ),
    ),
)
