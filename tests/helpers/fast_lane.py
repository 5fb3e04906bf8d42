"""The fast lane, `pytest -m fast`: every test but those of slow files, and of these the ones that are named here.

A file is slow when its tests take more than a second and a half of one core together (`--durations=0` shows them).
"""

SLOW_FILES: dict[str, tuple[str, ...]] = {
    "calibration/test_batch_norms.py": ("test_one_norm_by_the_formula", "test_other_dtypes", "test_a_constant_channel"),
    "calibration/test_curvature.py": ("test_linear_layers", "test_convolutions", "test_exact", "test_a_tied_weight"),
    "calibration/test_hessian.py": ("test_one_layer", "test_all_layers_at_once", "test_sub_sample"),
    "candidates/test_factored.py": ("test_error_by_hand", "test_kinds", "test_ranks_and_widths"),
    "candidates/test_feedback.py": ("test_feedback_is_optimal_brain_quantisation", "test_rows_at_once"),
    "candidates/test_shaped.py": ("test_at_full_rate", "test_coarser_steps", "test_codes_beyond_a_byte"),
    "candidates/test_uniform.py": ("test_codes_are_those_of_the_formula", "test_stored_bytes_by_hand"),
    "certification/test_means.py": ("test_without_skewness", "test_constant_values", "test_the_bounded_bound"),
    "checkpoints/exports/test_onnx.py": (),
    "checkpoints/exports/test_stock_loading.py": (),
    "checkpoints/test_adapters.py": (),
    "checkpoints/test_architectures.py": (
        *(f"test_reload_is_the_compressed_model[{name}-3bit-fp32]" for name in ("bert", "resnet", "gpt2")),
        "test_a_plan_that_lies_about_its_bytes",
        "test_modules_left_alone[glob-and-part]",
    ),
    "checkpoints/test_coded_checkpoints.py": ("test_reload_is_the_compressed_model[bert-all-torch.float32]",),
    "checkpoints/test_low_rank_checkpoints.py": ("test_reload_of_every_architecture[bert-fp32]", "test_an_altered"),
    "checkpoints/test_new_process.py": (),
    "checkpoints/test_other_heads.py": ("test_another_head",),
    "checkpoints/test_quantised_activations.py": ("test_reload_is_the_same_model[bert]", "test_dead_layers"),
    "checkpoints/test_without_the_package.py": ("test_demand",),
    "checkpoints/test_saving.py": ("test_layer_that", "test_models_of_the_same_config_keep_apart"),
    "cli/test_demo.py": (),
    "cli/test_main.py": ("test_text_from_compress_to_inspect", "test_neighbourhood_says_what_is_wrong", "test_bits"),
    "data/tasks/test_question_answering.py": ("test_a_planted_span", "test_no_answer", "test_bad"),
    "data/tasks/test_tasks_end_to_end.py": (),
    "data/test_processes.py": ("test_alone",),
    "planning/test_knapsack.py": ("test_dense_equals_brute_force", "test_ties", "test_errors", "test_within"),
    "planning/test_planner.py": ("test_one_analysis_serves_many_plans", "test_the_other_layers_take_what_is_left"),
    "recipes/benchmarks/test_assets.py": ("test_neither", "test_the_flag_wins"),
    "recipes/benchmarks/test_cet_allocation.py": (),
    "recipes/test_smoke.py": (),
    "reports/card/test_model_card.py": ("test_the_front_matter", "test_sizes", "test_the_certificate_is_told"),
    "reports/hub/test_push.py": ("test_a_branch", "test_a_second_push_of_the_same"),
    "reports/hub/test_pushed_cards.py": ("test_a_card_of_somebody_else_stays",),
    "reports/test_html.py": ("test_what_a_folder_says_is_never_markup[script]", "test_regimes", "test_folders"),
    "reports/pictures/test_layers_figure.py": ("test_bits_ranks_and_inputs",),
    "reports/test_report_in_browser.py": (),
    "storage/entropy/test_coder.py": ("test_the_bytes_are_pinned", "test_what_cannot_be_a_stream", "test_any_number"),
    "storage/modules/test_low_rank_modules.py": ("test_equals_the_dense_layer", "test_shapes_of_the_factors"),
    "storage/modules/test_read_only.py": ("test_gradients_pass",),
    "storage/runtime/test_int8_linear.py": ("test_every_token",),
    "storage/runtime/test_torch_compile.py": (),
    "test_certified_search.py": ("test_too_few_rows_certify_nothing", "test_rows_that_cannot_certify"),
    "test_compression.py": (
        *("test_ratio", "test_loss_budget", "test_result_fields", "test_the_plan_is_the_best_of_all_that_fit"),
        *("test_an_unreachable", "test_bad_ranks", "test_a_broken", "test_tensor_bytes"),
    ),
    "test_errors.py": ("test_an_option", "test_data_for_a_text_model", "test_evaluation"),
    "test_light_imports.py": ("test_help_and_version_load_no_torch[--version]",),
    "test_poor_calibration.py": ("test_gradients_that_are_all_zero", "test_units_that_are_dead"),
    "test_readme.py": ("test_every_snippet", "test_relative_links", "test_the_table"),
    "theories/test_fitted_rounding.py": ("test_without_halves", "test_where_the_loss_does_not_reach"),
    "theories/test_llc_decomposition.py": ("test_the_slow_loop", "test_within_neighbourhood", "test_points_down"),
    "theories/test_neighbourhood.py": ("test_a_quadratic_loss", "test_a_linear_loss", "test_weights_against"),
    "theories/test_rate_distortion.py": ("test_white_spectra", "test_a_slow_sum", "test_damping"),
}
"""Files by their paths in tests/, with the beginnings of the names of their fast tests."""


def is_fast(node: str) -> bool:
    """Whether the test with this id, as pytest prints it, is in the fast lane."""
    path, _, name = node.removeprefix("tests/").partition("::")
    return path not in SLOW_FILES or name.startswith(SLOW_FILES[path])
