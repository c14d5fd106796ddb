# SPDX-License-Identifier: Apache-2.0
"""Tests that take a second or more and look again at what cheaper ones look at: `make test-all`.

By test, what stays in `make test` and would notice first. Tests that stand out by themselves have
the marker `full` where they are written.
"""

__all__ = ["SECOND_LOOKS"]

_STEP = "tests/kernels/test_masks_and_limits.py and test_contract.py"
_MODES = "the first tests of tests/pipelines/test_modes.py"
_UNET = "test_equals_stock_however_it_is_built"
_LOADING = "TestFromPretrained and TestSavePretrained"
_SERVE = "tests/serve/test_api.py and the other tests of the file"
_SHARDS = "test_sweep.py::test_every_cell_is_its_preference_seed_and_prompt and test_statistics.py"
_CLOSED = "the closed form in the same file"

_FAMILIES = "tests/families/test_families.py"

SECOND_LOOKS = {
    "tests/families/test_mechanisms.py": _FAMILIES,
    "tests/families/test_calls.py": _FAMILIES,
    "tests/families/test_saving.py": _FAMILIES,
    "tests/families/test_formats.py": _FAMILIES,
    "tests/pipelines/test_adapter_methods.py::TestANetworkOfItsOwn": (
        "the first tests of the file"
    ),
    "tests/pipelines/test_threads.py::test_pipelines_stay_copyable": "the first test of the file",
    "tests/evaluation/test_compare.py::test_a_comparison_killed_and_resumed": (
        "test_sweep.py and tests/test_resume.py"
    ),
    # random cases
    "tests/kernels/test_fuzz.py": _STEP,
    "tests/kernels/test_fuzz_bad_input.py": _STEP,
    "tests/kernels/test_library.py::test_the_step_is_a_sound_operator": "test_tracing.py",
    "tests/kernels/test_masks_and_limits.py::test_zero_variances_need_a_policy": "test_shares.py",
    "tests/kernels/test_contract.py::test_moments_are_wide_and_the_variance_keeps_its_shape": _STEP,
    "tests/kernels/test_dtypes_and_layouts.py::test_a_step_in_place": _STEP,
    "tests/kernels/test_grouped_lora_triton.py::test_it_errs_no_more_than_the_literal_chain": (
        "test_grouped_lora.py"
    ),
    "tests/steps/test_coefficients.py::test_every_backend_reads": "tests/kernels/test_accuracy.py",
    "tests/test_drop_in.py::test_a_stock_diffusers_loop_draws_from_eq_7": "test_theorem1.py",
    "tests/test_torch_private.py::test_the_compiler_is_not_imported_before_it_is_wanted": (
        "test_light_import.py"
    ),
    "tests/batched/test_unet.py::test_equals_stock_for_every_target_of_an_adapter": _UNET,
    "tests/batched/test_unet.py::test_equals_stock_for_any_number_of_rows": _UNET,
    "tests/batched/test_unet.py::test_every_sharing_changes_nothing": _UNET,
    "tests/batched/test_unet.py::test_float32_is_no_worse_than_twice_stock": _UNET,
    "tests/batched/test_network.py::test_every_convolution_reads_and_writes_channels_last": _UNET,
    "tests/pipelines/test_modes.py::TestApproximations": _MODES,
    "tests/pipelines/test_modes.py::TestExactLimits::test_merging_equal_adapters": _MODES,
    "tests/pipelines/test_modes.py::TestExactLimits::test_auto_without_a_budget_to_spend": _MODES,
    "tests/pipelines/test_modes.py::TestExactLimits::test_an_objective_at_a_time": _MODES,
    "tests/pipelines/test_captured.py::test_networks_of_their_own_run_in_the_same_step": (
        "test_latents_are_those_of_one_after_another"
    ),
    "tests/pipelines/test_loading.py::TestFromPipe::test_one_adapter_at_two_scales": _LOADING,
    "tests/pipelines/test_loading.py::TestFromPretrained::test_components_load": _LOADING,
    "tests/pipelines/test_loading.py::TestAdapterFormats::test_text_encoder_part": _LOADING,
    "tests/pipelines/test_shipped.py::test_stock_diffusers_loads_it": _LOADING,
    "tests/pipelines/test_equivalence.py::test_deterministic_and_partly": (
        "test_one_objective_is_stock_diffusers_at_every_step"
    ),
    "tests/parallel/test_engine.py::test_a_step_has_the_bits_of_one_process[split-2]": (
        "the row whole-4, and the split in tests/parallel/test_pipeline.py"
    ),
    "tests/parallel/test_lost.py::test_a_rank_that_never_comes": "the other tests of the file",
    "tests/parallel/test_pipeline.py::test_other_objectives": "the other tests of the file",
    "tests/batching/test_engine.py::TestPreviews::test_are_the_state_then": _SERVE,
    "tests/serve/test_hostile.py::TestSlowness": _SERVE,
    "tests/serve/test_faults.py::test_a_client_that_hangs_up": _SERVE,
    "tests/serve/test_faults.py::test_time_is_up": _SERVE,
    "tests/serve/test_faults.py::test_a_failed_batch_is_answered": _SERVE,
    "tests/serve/test_faults.py::test_nothing_is_served_before_it_is_warm": _SERVE,
    "tests/serve/test_api.py::TestForOperators::test_logs_are_json": _SERVE,
    "tests/evaluation/test_sweep.py::test_the_grid_has_a_row_per_prompt": _SHARDS,
    "tests/evaluation/test_report.py::test_the_page_stands_alone": "tests/cli/test_compare.py",
    "tests/evaluation/test_compare.py::test_parts_write_shards": "tests/evaluation/test_runs.py",
    "tests/evaluation/test_runs.py::test_a_later_reward_judges": _SHARDS,
    "tests/methods/test_guided.py::test_cost_of_a_step": "test_costs.py",
    "tests/methods/test_code.py::test_costs_with_guidance": "test_costs.py",
    "tests/methods/test_das.py::test_particles_are_of_the_tilted_distribution": _CLOSED,
    "tests/methods/test_das.py::test_few_rows_at_a_time": _CLOSED,
    "tests/methods/test_code.py::test_equal_latents_are_evaluated_once": _CLOSED,
    "tests/methods/test_kl_strength.py::test_ends_are_the_base": _CLOSED,
    "tests/emoji/test_training_resumes.py::test_denoiser_and_text_encoder": (
        "tests/training/test_trainer.py"
    ),
    "tests/emoji/test_data.py::test_a_painted_sprite_is_mostly_its_colour": (
        "the other tests of the file"
    ),
    "tests/emoji/test_data.py::test_every_object_has_a_sprite": "the other tests of the file",
    "tests/emoji/test_align.py::test_a_reward_that_was_not_stored": (
        "tests/training/test_collect.py"
    ),
    "tests/rewards/test_consistency.py::test_scorers_name_drawings": (
        "test_right_renders_score_high_and_wrong_prompts_low"
    ),
    "tests/cli/test_train.py::test_step_dpo_from_a_folder_of_pairs": (
        "tests/training/test_step_dpo.py and test_pair_files.py"
    ),
    "tests/training/test_alignment.py": "tests/training/test_step_dpo.py",
}
